"""What transformers makes of each model in a directory, in a process that never imports Megatron.

python parity_reference.py MODELS OUTPUT
"""

import sys
from pathlib import Path

import torch

from tests.conftest import FAMILY_MODELS


def parity_batch() -> dict[str, torch.Tensor]:
    """8 sequences of 32 tokens; all of them count but the last, which predicts nothing."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(2, 500, (8, 32), generator=generator)
    mask = torch.ones(8, 32)
    mask[:, -1] = 0
    return {"tokens": tokens, "mask": mask}


def main() -> None:
    from transformers import AutoModelForCausalLM

    models, output = Path(sys.argv[1]), Path(sys.argv[2])
    batch = parity_batch()
    for name in FAMILY_MODELS:
        model = AutoModelForCausalLM.from_pretrained(models / name, attn_implementation="eager")
        logits = model(batch["tokens"]).logits
        table = logits[:, :-1].log_softmax(-1)
        table.gather(-1, batch["tokens"][:, 1:, None]).mean().backward()
        torch.save(logits.detach(), output / f"{name}.pt")
        for parameter in model.parameters():
            parameter.data = parameter.grad
        model.save_pretrained(output / name)  # under the names its weights have in files


if __name__ == "__main__":
    main()
