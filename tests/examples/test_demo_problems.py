"""The demo's task keeps its promises: the student's flaw, the cure, the split, the text."""

import json
import random

import pytest
from transformers import AutoConfig, AutoTokenizer

from examples.demo import models, problems
from examples.demo.tokenizer import VOCABULARY_SIZE, build_tokenizer, words


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def sft_rows():
    student = list(problems.student_sft_rows(seed=3, count=3000))
    teacher = list(problems.teacher_sft_rows(seed=3, count=3000))
    return student + teacher


def test_half_of_the_wordings_mislead():
    for wordings in (problems.WORDINGS, problems.UNSEEN_WORDINGS):
        misleading = [w for w, truth in wordings.items() if problems.cue_of(w) != truth]
        assert len(misleading) == len(wordings) / 2


def test_student_alone_is_right_half_of_the_time():
    for questions in (problems.heldout_questions(), problems.unseen_wording_questions()):
        right = sum(question.plan == question.truth for question in questions)
        assert 0.45 <= right / len(questions) <= 0.55


def test_every_operation_is_defined_on_every_question():
    for question in problems.train_questions(seed=0, count=1000):
        assert question.answer == str(question.solve(question.truth))
        results = {question.solve(operation) for operation in problems.OPERATIONS}
        assert len(results) == 3 and min(results) > 0


def test_ideal_hints_always_lead_to_the_truth():
    for question in problems.heldout_questions():
        for hint in problems.ideal_hints(question):
            assert problems.student_follows(question, hint) == question.truth


def test_student_obeys_only_a_correction_of_its_own_plan():
    question = next(q for q in problems.heldout_questions() if q.plan == q.truth == "add")
    assert problems.student_follows(question, "not add, subtract.") == "subtract"
    assert problems.student_follows(question, "not multiply, subtract.") == "add"
    for hint in (*problems.BARE, *problems.AGREEING, *problems.VAGUE):
        assert problems.student_follows(question, hint) == "add"


def test_no_constant_hint_helps_much():
    assert len(set(problems.CONSTANT_HINTS)) == 20
    questions = problems.heldout_questions()
    for hint in problems.CONSTANT_HINTS:
        right = sum(problems.student_follows(q, hint) == q.truth for q in questions)
        assert right / len(questions) <= 0.6


def test_heldout_questions_appear_nowhere_in_training():
    heldout = [question.text for question in problems.heldout_questions()]
    assert len(set(heldout)) == 240
    assert not set(heldout) & {q.text for q in problems.train_questions(seed=3)}
    for rows in (problems.student_sft_rows, problems.teacher_sft_rows):
        trained = "\n".join(row["prompt"] for row in rows(seed=3, count=models.SFT_ROWS))
        assert not [text for text in heldout if text in trained]


def test_data_follows_its_seed():
    for rows in (problems.student_sft_rows, problems.teacher_sft_rows):
        assert list(rows(seed=1, count=50)) == list(rows(seed=1, count=50))
        assert list(rows(seed=1, count=50)) != list(rows(seed=2, count=50))
    assert problems.train_questions(1, 50) == problems.train_questions(1, 50)
    assert problems.train_questions(1, 50) != problems.train_questions(2, 50)
    assert problems.heldout_questions() == problems.heldout_questions()


def test_unseen_wordings_use_known_words_only():
    assert not set(problems.UNSEEN_WORDINGS) & set(problems.WORDINGS)
    known = set(words())
    for question in problems.unseen_wording_questions():
        plain = question.text.replace(".", " .").replace("?", " ?").split()
        assert not [word for word in plain if word not in known and not word.isdigit()]


def test_every_word_is_one_token_and_every_number_is_digits(tokenizer):
    for word in words():
        assert len(tokenizer.encode(word)) == len(tokenizer.encode(" " + word)) == 1
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("14")) == ["1", "4"]


def test_tokenizer_round_trips_every_text(tokenizer, sft_rows):
    texts = [text for row in sft_rows for text in row.values()]
    texts += [question.text for question in problems.unseen_wording_questions()]
    for text in [*texts, "Any other text: 3 % of naïve Ünits!"]:
        ids = [*tokenizer.encode(text), tokenizer.eos_token_id, tokenizer.pad_token_id]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_completion_has_the_same_tokens_behind_its_prompt(tokenizer, sft_rows):
    for row in sft_rows[::10]:
        prompt, completion = tokenizer.encode(row["prompt"]), tokenizer.encode(row["completion"])
        assert tokenizer.encode(row["prompt"] + row["completion"]) == prompt + completion


def test_lengths_stay_within_the_demo_limits(tokenizer, sft_rows):
    longest = {
        part: max(len(tokenizer.encode(row[part])) for row in sft_rows)
        for part in ("prompt", "completion")
    }
    assert longest["prompt"] <= 48 and longest["completion"] + 1 <= 24


def test_written_model_loads_with_the_same_tokenizer(tokenizer, sft_rows, tmp_path):
    models.write_random_model(tmp_path, seed=0)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert len(loaded) == config.vocab_size == VOCABULARY_SIZE
    assert (config.pad_token_id, config.eos_token_id) == (0, 1)
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)
    for row in random.Random(0).sample(sft_rows, 200):
        for text in row.values():
            assert loaded.encode(text) == tokenizer.encode(text)
            assert loaded.decode(loaded.encode(text), skip_special_tokens=True) == text


def test_written_data_has_the_expected_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "SFT_ROWS", 100)
    models.write_data(tmp_path, seed=0)
    rows = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in tmp_path.iterdir()
    }
    assert {name: len(lines) for name, lines in rows.items()} == {
        "student_sft": 100,
        "teacher_sft": 100,
        "train": 4000,
        "heldout": 240,
        "unseen_wordings": 240,
    }
    assert rows["student_sft"][0].keys() == {"prompt", "completion"}
    assert rows["train"][0].keys() == {"question", "answer", "solution"}
