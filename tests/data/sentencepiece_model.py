"""A SentencePiece model like Llama 2's, trained in a moment."""

from pathlib import Path

import sentencepiece

SENTENCES = [
    "tom has 14 cards and buys 3 more.",
    "how many cards does tom have?",
    "anna sells twelve apples for 2 dollars each.",
    "the answer is forty two, she said.",
    "a quick brown fox jumps over the lazy dog.",
]
START, END = 1, 2


def train_tokenizer(directory: Path) -> sentencepiece.SentencePieceProcessor:
    """Writes tokenizer.model into `directory`; returns what sentencepiece itself makes of it."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(20 * SENTENCES),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=START,
        eos_id=END,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
