"""SFT and DPO over four processes.

torchrun --nproc-per-node 4 offline_worker.py MODEL OTHER OUTPUT
"""

import os
import sys
from pathlib import Path
from unittest.mock import patch

from huggingface_hub import constants

from grpo_mcore import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from grpo_mcore.config import ModelConfig
from tests.models.hub_stub import running_hub
from tests.trainers.offline_reference import BETA, HELD_OUT, PAIRS, ROWS

DPO_LAYOUTS = ("2x1x2", "1x2x2")


def sft_config(model: str, directory: Path, **settings) -> SFTConfig:
    return SFTConfig(
        **{
            "model": ModelConfig(path=str(model)),
            "output_dir": str(directory),
            "layout": "1x1x1",
            "batch_size": 8,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "max_steps": 2,
        }
        | settings
    )


def dpo_config(model: str, directory: Path, **settings) -> DPOConfig:
    """Batches are smaller than the dataset, and shuffled."""
    shared = vars(sft_config(model, directory, batch_size=4, max_steps=3))
    known = DPOConfig.__dataclass_fields__
    kept = {name: value for name, value in shared.items() if name in known}
    return DPOConfig(**kept | {"beta": BETA} | settings)


def rows_of(packing: bool) -> dict:
    """Settings with which a batch has all of ROWS, in as many rows as they fill."""
    return {"packing": True, "max_length": 40, "batch_size": 4} if packing else {}


def main() -> None:
    model, other, output = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    for packing in (False, True):
        args = sft_config(
            model,
            output / f"sft-{packing}",
            layout="2x2x1",
            hub_model_id="org/mine",
            **rows_of(packing),
        )
        trainer = SFTTrainer(args=args, train_dataset=ROWS, eval_dataset=HELD_OUT)
        trainer.train()
        if not packing:
            push(trainer)
    for layout in DPO_LAYOUTS:
        args = dpo_config(model, output / layout, layout=layout)
        DPOTrainer(None, other, args, train_dataset=PAIRS, eval_dataset=PAIRS[:5]).train()


def push(trainer: SFTTrainer) -> None:
    """To a hub of this process, of which rank 0 writes down what it got."""
    os.environ["NO_PROXY"] = "127.0.0.1"
    with running_hub() as hub, patch.object(constants, "ENDPOINT", hub.url):
        if trainer.push_to_hub(token="hf_secret"):
            [commit] = hub.commits
            (Path(trainer.args.output_dir) / "pushed.txt").write_text(" ".join(commit))


if __name__ == "__main__":
    main()
