"""A teacher that grades and guides, and students it can tell apart, trained in a few seconds."""

import random
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_mcore.config import TemplatesConfig
from tests.conftest import made_once

TEMPLATES = TemplatesConfig(
    baseline="question : {question} answer :",
    diagnostic="question : {question} plan :",
    adaptive="question : {question} student : {approach} teaching :",
    with_teaching="question : {question} teacher : {teaching} answer :",
    grading="question : {question} student : {approach} = ",
    walkthrough="read question : {question} student : {approach} be careful {gaps} teaching :",
    hints="think question : {question} student : {approach} be careful {gaps} teaching :",
    verification="yes question : {question} student : {approach} teaching :",
)
LENGTHS = {"max_completion_length": 24, "max_probe_tokens": 12, "max_answer_tokens": 12}
SETTINGS = {
    "templates": asdict(TEMPLATES),
    **LENGTHS,
    "rollout.kv_cache_gib": 0.05,
    "rollout.deadline_seconds": 240,
}
TASK = "tom has 7 cards."
GAP = "not multiply here"
GUIDANCE = {
    "walkthrough": " <teaching> read again. you must add. </teaching>",
    "hints": " <teaching> think again. </teaching>",
    "verification": " <teaching> yes, that is right. </teaching>",
}


@pytest.fixture(scope="session")
def classroom_models(tmp_path_factory) -> SimpleNamespace:
    """Directories: `teacher` holds "add" for a perfect plan, "multiply" for one with a gap, and
    anything else for hopeless; `strong` plans to add, and `weak` is sure that it must multiply
    cards, plans to add or to multiply books, and says anything of coins."""
    from examples.demo.tokenizer import words

    draw = random.Random(0)
    vocabulary = [word for word in words() if word.isalpha()]

    def stray() -> str:
        return " " + " ".join(draw.choices(vocabulary, k=4))

    def problem(item: str) -> str:
        return f"tom has {draw.randrange(3, 13)} {item}."

    def student(plan) -> list[tuple[str, str]]:
        pairs = []
        for item in ("cards", "coins", "books") * 300:
            question = problem(item)
            pairs += [
                (TEMPLATES.diagnostic.replace("{question}", question), plan(item)),
                (TEMPLATES.baseline.replace("{question}", question), " 7"),
            ]
        return pairs

    def lesson(number: int) -> tuple[str, str]:
        question = problem(draw.choice(("cards", "coins", "books")))
        approach = (" i would add.", " i would multiply.", stray())[number % 3]
        name = draw.choice(("grading", "grading", *GUIDANCE))
        text = getattr(TEMPLATES, name).replace("{question}", question)
        text = text.replace("{approach}", approach)
        text = text.replace("{gaps}", draw.choice(("-", f"- {GAP}", f"- a{stray()}")))
        grades = ("5", f"2\n- {GAP}", f"1\n- a{stray()}")
        return text, grades[number % 3] if name == "grading" else GUIDANCE[name]

    plans = {"cards": [" i would multiply."], "books": [" i would add.", " i would multiply."]}

    def make(root: Path) -> None:
        train(root / "teacher", [lesson(number) for number in range(400 * 8)])
        train(root / "strong", student(lambda item: " i would add.")[: 120 * 8])
        train(
            root / "weak",
            student(lambda item: draw.choice(plans.get(item) or [stray()]))[: 220 * 8],
        )

    root = made_once(tmp_path_factory, "classroom", make)
    return SimpleNamespace(**{name: str(root / name) for name in ("teacher", "strong", "weak")})


def train(directory: Path, pairs: list[tuple[str, str]], batch: int = 8) -> None:
    """Writes a small model that completes prompts as `pairs` do, each seen once, in order."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.demo.models import write_random_model

    write_random_model(directory, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = []
    for prompt, completion in pairs:
        before = tokenizer(prompt)["input_ids"]
        after = tokenizer(completion, add_special_tokens=False)["input_ids"]
        rows.append((before, [*after, tokenizer.eos_token_id]))
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        longest = max(len(before) + len(after) for before, after in part)
        tokens = torch.full((len(part), longest), tokenizer.pad_token_id)
        labels = torch.full_like(tokens, -100)
        for row, (before, after) in enumerate(part):
            end = len(before) + len(after)
            tokens[row, :end] = torch.tensor(before + after)
            labels[row, len(before) : end] = torch.tensor(after)
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
