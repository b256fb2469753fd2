"""How likely transformers finds completions, in a process that never imports Megatron.

    python likelihood_reference.py MODEL FILE

FILE is a JSON list of [user's turn, completion]. Prints a JSON list of
[prompt's tokens, completion's tokens, log-likelihood].
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    found = []
    for turn, completion in json.loads(Path(sys.argv[2]).read_text()):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": turn}], add_generation_prompt=True, return_dict=False
        )
        tokens = [*tokenizer.encode(completion, add_special_tokens=False), tokenizer.eos_token_id]
        whole = torch.tensor([[*prompt, *tokens]])
        table = model(whole).logits[0].double().log_softmax(-1)
        chosen = table[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])
        found.append([prompt, tokens, chosen.sum().item()])
    print("found", json.dumps(found))


if __name__ == "__main__":
    main()
