"""Rows, and what transformers and PEFT make of them, in a process that never imports Megatron.

python offline_reference.py MODEL OTHER OUTPUT [ADAPTER]
"""

import sys

import torch
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS = [
    {"prompt": f"{name} has {count} cards.", "completion": " how many? " * (count % 3 + 1)}
    for name, count in zip(["tom", "the", "how", "and"] * 2, range(11, 19), strict=True)
]
HELD_OUT = [{"prompt": "how many?", "completion": f" the number is {n}{n}"} for n in (3, 4, 56)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
            {"role": "user", "content": "and now?"},
            {"role": "assistant", "content": "the number"},
        ]
    }
    for row in ROWS
]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.role }}: {{ m.content }}{% endif %}{% endfor %}"
)
PAIRS = [
    {"prompt": row["prompt"], "chosen": " cards cards cards", "rejected": " number" * (n % 3 + 1)}
    for n, row in enumerate(ROWS)
]
BETA = 0.3


def encoded(tokenizer, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Tokens, and 1 for those of the completion."""
    before, after = (tokenizer(text)["input_ids"] for text in (prompt, completion))
    after.append(tokenizer.eos_token_id)
    return before + after, [0] * len(before) + [1] * len(after)


def chat(tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    found = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return found["input_ids"], found["assistant_masks"]


def costs(model, tokens: list[int], targets: list[int]) -> torch.Tensor:
    """Negative log-likelihoods of the targets."""
    logits = model(torch.tensor([tokens])).logits[0, :-1]
    each = cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")
    return each[torch.tensor(targets[1:]) == 1]


def measure(model, loss: torch.Tensor) -> dict[str, float]:
    model.zero_grad()
    loss.backward()
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return {"loss": loss.item(), "grad_norm": torch.stack(norms).norm().item()}


def mean_cost(model, rows: list[tuple]) -> torch.Tensor:
    return torch.cat([costs(model, *row) for row in rows]).mean()


def dpo(model, other, tokenizer) -> dict[str, float]:
    """Of the first step with `other` as the reference."""
    sums = {}
    for side in ("chosen", "rejected"):
        rows = [encoded(tokenizer, pair["prompt"], pair[side]) for pair in PAIRS]
        for name, scorer in (("model", model), ("other", other)):
            sums[name, side] = torch.stack([-costs(scorer, *row).sum() for row in rows])
    gain = {s: BETA * (sums["model", s] - sums["other", s]) for s in ("chosen", "rejected")}
    margin = gain["chosen"] - gain["rejected"]
    return measure(model, -logsigmoid(margin).mean()) | {
        "logps/chosen": sums["model", "chosen"].mean().item(),
        "rewards/rejected": gain["rejected"].mean().item(),
        "rewards/margins": margin.mean().item(),
        "rewards/accuracies": (margin > 0).float().mean().item(),
    }


def main() -> None:
    path, other, output, *adapters = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(path)
    model, other = (AutoModelForCausalLM.from_pretrained(p) for p in (path, other))
    rows = [encoded(tokenizer, row["prompt"], row["completion"]) for row in ROWS]
    held_out = [encoded(tokenizer, row["prompt"], row["completion"]) for row in HELD_OUT]
    found = {
        "completions": measure(model, mean_cost(model, rows)),
        "eval_loss": mean_cost(model, held_out).item(),
        "dpo": dpo(model, other, tokenizer),
    }
    tokenizer.chat_template = TEMPLATE
    chats = [chat(tokenizer, row["messages"]) for row in CHATS]
    found["chats"] = measure(model, mean_cost(model, chats))
    for adapter in adapters:
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(model, adapter)
        found["adapted"] = mean_cost(adapted, held_out).item()
    torch.save(found, output)


if __name__ == "__main__":
    main()
