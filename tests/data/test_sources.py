"""Every kind of dataset becomes the same rows; what is none is refused by the setting's name."""

import json
from itertools import islice

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from torch.utils.data import DataLoader

from grpo_mcore.data.sources import (
    Stream,
    Table,
    open_dataset,
    open_eval_datasets,
    require_columns,
)
from grpo_mcore.errors import ConfigError

ROWS = [{"prompt": f"q{n}", "answer": n} for n in range(10)]


class Counting:
    """Rows that can only be iterated, and that count how many were read."""

    def __init__(self, rows):
        self.rows, self.read = rows, 0

    def __iter__(self):
        for row in self.rows:
            self.read += 1
            yield row


class MapStyle:
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, number):
        return ROWS[number]


class WithDatasets:
    train_dataset = ROWS
    eval_dataset = ROWS[:2]


class WithLoaders:
    def train_dataloader(self):
        return DataLoader(ROWS, batch_size=4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(ROWS[:2], batch_size=2)


def write(directory, kind):
    path = directory / f"rows.{kind}"
    if kind == "parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(
    params=["dataset", "list", "map style", "jsonl", "json", "parquet", "datasets", "loaders"]
)
def table_source(request, tmp_path):
    match request.param:
        case "dataset":
            return Dataset.from_list(ROWS)
        case "list":
            return ROWS
        case "map style":
            return MapStyle()
        case "datasets":
            return WithDatasets()
        case "loaders":
            return WithLoaders()
        case kind:
            return write(tmp_path, kind)


@pytest.mark.seed(5, 43)
def test_what_has_a_length_is_a_table(table_source):
    rows = open_dataset("train_dataset", table_source)
    assert isinstance(rows, Table)
    assert (rows.size, rows.columns) == (10, ["prompt", "answer"])
    assert [rows[number] for number in (3, 0, 9)] == [ROWS[3], ROWS[0], ROWS[9]]


STREAMS = {
    "from a table": lambda: Dataset.from_list(ROWS).to_iterable_dataset(),
    "from a generator": lambda: IterableDataset.from_generator(lambda: iter(ROWS)),
    "any iterable": lambda: Counting(ROWS),
}


@pytest.mark.seed(5, 43)
@pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS.keys())
def test_what_has_none_is_a_stream_of_epochs(make):
    rows = open_dataset("train_dataset", make())
    assert isinstance(rows, Stream)
    assert (rows.size, rows.columns) == (None, ["prompt", "answer"])
    assert [rows[position] for position in range(25)] == [*ROWS, *ROWS, *ROWS[:5]]
    assert rows[3] == ROWS[3]


def test_a_file_may_be_streamed(tmp_path):
    rows = open_dataset("train_dataset", write(tmp_path, "jsonl"), streaming=True)
    assert isinstance(rows, Stream) and rows[12] == ROWS[2]


def test_a_stream_is_read_no_further_than_asked():
    source = Counting(ROWS)
    rows = open_dataset("train_dataset", source)
    peeked = source.read
    assert [rows[position] for position in (2, 3)] == ROWS[2:4]
    assert source.read == peeked + 4


def test_a_shuffled_stream_has_another_order_each_epoch_and_the_same_each_time():
    def read(seed):
        stream = Dataset.from_list(ROWS).to_iterable_dataset()
        rows = open_dataset("train_dataset", stream, shuffle_seed=seed)
        return rows, [rows[position]["answer"] for position in range(20)]

    rows, seen = read(1)
    first, second = seen[:10], seen[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != list(range(10)) and second != first
    assert read(1)[1] == seen != read(2)[1]
    assert rows[12]["answer"] == second[2]  # reads from the beginning again


@pytest.mark.parametrize("make", [lambda: ROWS, STREAMS["any iterable"]], ids=["table", "stream"])
def test_map_filter_and_regroup(make):
    rows = open_dataset("train_dataset", make())
    answers = rows.map(lambda row: row["answer"])
    assert [answers[n] for n in range(4)] == [0, 1, 2, 3]
    odd = answers.filter(lambda answer: answer % 2)
    assert [odd[n] for n in range(5)] == [1, 3, 5, 7, 9]
    pairs = odd.regroup(lambda window: [tuple(window), len(window)], 2)
    assert [pairs[n] for n in range(6)] == [(1, 3), 2, (5, 7), 2, (9,), 1]
    assert (odd.size, pairs.size) == ((5, 6) if isinstance(rows, Table) else (None, None))


def test_a_table_computes_a_row_when_asked_and_once():
    asked = []
    rows = open_dataset("train_dataset", ROWS).map(lambda row: asked.append(row["answer"]))
    assert asked == []
    for number in (3, 3, 1):
        rows[number]
    assert asked == [3, 1]


@pytest.mark.parametrize("make", [lambda: ROWS, STREAMS["any iterable"]], ids=["table", "stream"])
def test_a_bad_row_is_named(make):
    def read(row):
        if row["answer"] == 7:
            raise ConfigError("is bad")

    rows = open_dataset("train_dataset", make()).map(read)
    with pytest.raises(ConfigError, match=r"^train_dataset: row 7 is bad$"):
        [rows[number] for number in range(10)]


def test_a_stream_with_nothing_left_stops():
    rows = open_dataset("train_dataset", Counting(ROWS)).filter(lambda row: False)
    with pytest.raises(ConfigError, match="train_dataset: no row is left"):
        rows[0]


REFUSED = {
    "None": (None, "train_dataset: there is no dataset"),
    "several": (
        DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS)),
        "train_dataset: has several datasets (train, test); pass one of them",
    ),
    "empty list": ([], "train_dataset: the dataset is empty"),
    "empty dataset": (Dataset.from_list(ROWS).select([]), "train_dataset: the dataset is empty"),
    "empty stream": (Counting([]), "train_dataset: the dataset is empty"),
    "no rows": (["text"], "train_dataset: its rows are str, not dictionaries"),
    "a number": (3, "train_dataset: int is no dataset"),
    "a generator": (islice(ROWS, 3), "train_dataset: islice can be read only once"),
    "no file": ("rows.jsonl", "train_dataset=rows.jsonl: no such file"),
}


@pytest.mark.parametrize("source, message", REFUSED.values(), ids=REFUSED.keys())
def test_refusals(source, message):
    with pytest.raises(ConfigError) as caught:
        open_dataset("train_dataset", source)
    assert str(caught.value).startswith(message)


@pytest.mark.seed(5)
def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    path = write(tmp_path, "jsonl")
    rows = open_dataset("dataset", path)
    require_columns(rows, "prompt", "answer")
    with pytest.raises(ConfigError) as caught:
        require_columns(rows, "prompt", "completion")
    assert str(caught.value) == (f"dataset={path}: has no column completion; it has prompt, answer")


@pytest.mark.seed(6, 44)
def test_evaluation_datasets_by_the_prefix_of_their_metrics(tmp_path):
    several = open_eval_datasets(
        "eval_dataset", {"hard": ROWS[5:], "easy": write(tmp_path, "json")}
    )
    assert {name: rows[0] for name, rows in several.items()} == {
        "eval_hard": ROWS[5], "eval_easy": ROWS[0],
    }  # fmt: skip
    assert open_eval_datasets("eval_dataset", ROWS)["eval"].size == 10
    assert open_eval_datasets("eval_dataset", None) == {}
    with pytest.raises(ConfigError, match=r"eval_dataset\[hard\]: the dataset is empty"):
        open_eval_datasets("eval_dataset", {"hard": []})


@pytest.mark.parametrize("module", [WithDatasets(), WithLoaders()])
def test_a_data_module_has_its_own_evaluation_dataset(module):
    (rows,) = open_eval_datasets("dataset", module).values()
    assert rows.size == 2


def test_a_data_module_needs_none():
    class TrainOnly:
        train_dataset = ROWS

    assert open_eval_datasets("dataset", TrainOnly()) == {}
