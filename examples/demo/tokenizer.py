"""A small tokenizer of Qwen2's kind, trained in code on the demo's words: nothing to download.

Byte pairs, so any text survives `decode(encode(text))` exactly; and since training goes on until
each word of the task is whole, a text of the task costs one token a word and one a digit:

    "tom has 14 cards."  ->  "tom" " has" " " "1" "4" " cards" "."

A tokenizer with other rules than Qwen2's would be shorter, but `AutoTokenizer` rebuilds Qwen2's
own from any directory that holds a Qwen2 model, and vLLM relies on `AutoTokenizer`.
The tags are ordinary tokens, not special ones, because they carry the answer and must survive
`skip_special_tokens=True`.
"""

import json
import re

from tokenizers import AddedToken, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from examples.demo import problems

PAD, EOS = "<pad>", "<eos>"
TAGS = ("<solution>", "</solution>", "<teaching>", "</teaching>")
VOCABULARY_SIZE = 576
"""Fixed and divisible by 16, so that every tensor parallel size of the demo divides it."""


def words() -> list[str]:
    """All words of the texts that the models are trained on; unseen wordings add none."""
    texts = [
        *problems.WORDINGS,
        *problems.CORRECTIONS,
        *problems.CONSTANT_HINTS,
        *(problems.BASELINE, problems.DIAGNOSTIC, problems.WITH_TEACHING, problems.ADAPTIVE),
        *(problems.SOLUTION, problems.PROBE, problems.TEACHING),
        *problems.NAMES,
        *problems.ITEMS,
        *problems.SIGNS.values(),
    ]
    plain = re.sub(r"\{\w+\}|</?\w+>", " ", " ".join(texts))  # without fields and tags
    return sorted(set(re.findall(r"[a-z]+|[^a-z\s]", plain)))


def build_tokenizer() -> Qwen2Tokenizer:
    special = {"pad_token": PAD, "eos_token": EOS, "unk_token": EOS}  # bytes leave nothing unknown
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, EOS, *TAGS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner = Qwen2Tokenizer(**special).backend_tokenizer
    learner.train_from_iterator([blank + word for word in words() for blank in ("", " ")], trainer)
    learned = json.loads(learner.to_str())["model"]
    vocabulary = learned["vocab"]
    for index in range(len(vocabulary), VOCABULARY_SIZE):
        vocabulary[f"<reserved_{index}>"] = index
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, **special)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return tokenizer
