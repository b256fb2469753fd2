"""What TRL 1.16 makes of rows, through its trainers' own preparation of datasets."""

from pathlib import Path
from types import SimpleNamespace

import accelerate
import trl
from datasets import Dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from examples.demo.tokenizer import build_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def tokenizer_with(template: str | None):
    """The demo's tokenizer with a template of those TRL knows."""
    tokenizer = build_tokenizer()
    if template:
        tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    return tokenizer


def prompt_tokens(prompts, tokenizer, tools, template_kwargs):
    trainer = SimpleNamespace(
        processing_class=tokenizer, _is_vlm=False, environment_factories=None, tools=tools,
        chat_template=None, chat_template_kwargs=template_kwargs,
    )  # fmt: skip
    return GRPOTrainer._tokenize_prompts(trainer, prompts)[0]


def supervised(
    rows, tokenizer, max_length=None, completion_only_loss=None, assistant_only_loss=False,
    packing=False, text_column="text",
):  # fmt: skip
    """[(tokens, labels, lengths of documents)], labels as its collator gives them to the loss."""
    accelerate.PartialState()
    arguments = SimpleNamespace(
        dataset_num_proc=None, dataset_text_field=text_column, max_length=max_length,
        assistant_only_loss=assistant_only_loss, truncation_mode="keep_start",
        packing_strategy="bfd", shuffle_dataset=False, seed=0,
    )  # fmt: skip
    if completion_only_loss is None:
        completion_only_loss = {"prompt", "completion"} <= rows[0].keys()
    trainer = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=None, completion_only_loss=completion_only_loss
    )
    prepared = SFTTrainer._prepare_dataset(
        trainer, Dataset.from_list(rows), tokenizer, arguments, packing, None, "train"
    )
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packing)
    return [
        (
            row["input_ids"],
            collate([row])["labels"][0].tolist(),
            row.get("seq_lengths", [len(row["input_ids"])]),
        )
        for row in prepared
    ]


def preferences(rows, tokenizer, max_length=None):
    """[(chosen tokens, its completion mask, rejected tokens, its completion mask)]"""
    accelerate.PartialState()
    arguments = SimpleNamespace(
        dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start"
    )
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    prepared = DPOTrainer._prepare_dataset(
        trainer, Dataset.from_list(rows), tokenizer, arguments, "train"
    )
    collate = DataCollatorForPreference(pad_token_id=0, max_length=max_length)
    found = []
    for row in prepared:
        batch = collate([row])
        for place in range(2):
            end = batch["attention_mask"][place].sum()
            found += [batch[k][place, :end].tolist() for k in ("input_ids", "completion_mask")]
    return [tuple(found[i : i + 4]) for i in range(0, len(found), 4)]
