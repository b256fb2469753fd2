"""Questions from files and datasets, and refusals that name what is wrong."""

import json

import pytest

from grpo_mcore.config import ConfigError, DataConfig
from grpo_mcore.data.questions import Question, final_answer, load_questions

ROWS = [
    {"question": "1 + 1?", "answer": "2", "level": 1},
    {"question": "600 + 634?", "answer": "600 + 634 = 1,234\n#### 1,234", "level": 2},
]


def load(source, **settings):
    return load_questions(DataConfig(**settings), "data.train", str(source), "train")


def refusal(source, **settings) -> str:
    with pytest.raises(ConfigError) as caught:
        load(source, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path, rows):
    if path.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_files_of_every_kind(tmp_path, kind):
    assert load(write(tmp_path / f"rows.{kind}", ROWS)) == [
        Question(0, "1 + 1?", "2", ROWS[0]),
        Question(1, "600 + 634?", "1234", ROWS[1]),
    ]


def test_columns_are_configurable_and_answers_may_be_numbers(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "1 + 1?", "result": 2}])
    (question,) = load(path, question_column="prompt", answer_column="result")
    assert (question.text, question.answer) == ("1 + 1?", "2")


def test_a_column_of_worked_answers_may_have_gaps(tmp_path):
    rows = [row | {"worked": text} for row, text in zip(ROWS, (" 1 + 1 = 2 ", None), strict=True)]
    path = write(tmp_path / "rows.jsonl", rows)
    assert [q.reference for q in load(path, reference_column="worked")] == ["1 + 1 = 2", ""]
    assert [q.reference for q in load(path)] == [None, None]
    assert f"data.reference_column=solved: {path} has no such column; it has question" in refusal(
        path, reference_column="solved"
    )


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so 3 * 4 = 12\n#### 12", "12"),
        ("#### 1,234", "1234"),
        ("#### 1 then\n#### -2 ", "-2"),
        ("####", ""),
        (" one, two ", "one, two"),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_missing_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert refusal(path) == f"data.train={path}: no such file"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_empty_dataset(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        from datasets import Dataset

        Dataset.from_list(ROWS).select([]).to_parquet(path)
    else:
        path.touch()
    message = refusal(path)
    assert message.startswith(f"data.train={path}: ")
    assert "the dataset is empty" in message or "no data" in message


@pytest.mark.parametrize("setting", ["question_column", "answer_column"])
def test_missing_column_is_named_with_those_there_are(tmp_path, setting):
    message = refusal(write(tmp_path / "rows.jsonl", ROWS), **{setting: "prompt"})
    assert message.startswith(f"data.{setting}=prompt: ")
    assert message.endswith("it has question, answer, level")


@pytest.mark.parametrize("value", [None, " ", 12])
def test_question_that_is_not_text_names_its_row(tmp_path, value):
    rows = [{"question": value, "answer": "2"}]
    if value != 12:  # a column has one type
        rows = [{"question": "?", "answer": "1"}, *rows]
    message = refusal(write(tmp_path / "rows.jsonl", rows))
    assert message.endswith(f"row {len(rows) - 1} has no text in question")


def test_file_that_is_not_what_its_name_says(tmp_path):
    for name in ("rows.jsonl", "rows.parquet"):
        (tmp_path / name).write_text("not { json\n")
        assert refusal(tmp_path / name).startswith(f"data.train={tmp_path / name}: cannot be read")


def test_name_of_no_dataset(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    message = refusal("no_such/dataset")
    assert message.startswith("data.train=no_such/dataset: neither a .jsonl, .json or .parquet")


def test_a_dataset_may_have_prompts_and_ground_truths():
    rows = [{"prompt": [{"role": "user", "content": "1 + 1?"}], "ground_truth": "2"}]
    (question,) = load_questions(DataConfig(), "data.train", rows, "train")
    assert (question.text, question.answer, question.columns) == ("1 + 1?", "2", rows[0])
    with pytest.raises(ConfigError, match=r"data.answer_column=answer: data.train has no such"):
        load_questions(DataConfig(), "data.train", [{"prompt": "?"}], "train")
