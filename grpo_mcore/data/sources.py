"""Datasets of every kind people pass, as rows by number."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import count, islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from grpo_mcore.errors import ConfigError

T = TypeVar("T")
U = TypeVar("U")

FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
MODULE_PARTS = {
    "train": ("train_dataset", "train_dataloader"),
    "eval": ("eval_dataset", "val_dataset", "val_dataloader"),
}
"""Where a data module keeps its datasets, the first that is there."""


class Table(Generic[T]):
    """Rows that can be read in any order: `table[number]`.

    Attributes:
        name: the setting they come from, as errors name it.
        columns: of the dataset's own rows.
        size: how many rows there are.
    """

    def __init__(self, name: str, columns: list[str], size: int, read: Callable[[int], T]):
        self.name, self.columns, self.size = name, columns, size
        self._read = read

    def __getitem__(self, number: int) -> T:
        return self._read(number)

    def map(self, function: Callable[[T], U]) -> "Table[U]":
        """What `function` makes of each row, computed when a row is first asked for and kept."""
        return Table(
            self.name,
            self.columns,
            self.size,
            cache(lambda number: _apply(function, self[number], self.name, number)),
        )

    def filter(self, keep: Callable[[T], bool]) -> "Table[T]":
        """The rows `keep` is true of; reads all of them now."""
        kept = [number for number in range(self.size) if keep(self[number])]
        return Table(self.name, self.columns, len(kept), lambda place: self[kept[place]])

    def regroup(self, function: Callable[[list[T]], list[U]], window: int) -> "Table[U]":
        """What `function` makes of every `window` rows in turn; reads all of them now."""
        rows = (self[number] for number in range(self.size))
        made = [new for group in _windows(rows, window) for new in function(group)]
        return Table(self.name, self.columns, len(made), made.__getitem__)


class Stream(Generic[T]):
    """Rows that can be read only from the first on, such as those of a datasets.IterableDataset.

    `stream[position]` reads forward to that place of the rows epoch after epoch, and no further;
    it holds one row. For an earlier place it begins again. So a step reads as many rows as it asks
    for, and a resumed run reads past those it has used.

    Attributes:
        name, columns: as of a Table.
        size: None; only reading to the end would tell.
    """

    size = None

    def __init__(self, name: str, columns: list[str], read: Callable[[int], Iterable[T]]):
        """
        Args:
            read: epoch -> its rows, the same each time.
        """
        self.name, self.columns = name, columns
        self._read = read
        self._begin()

    def __getitem__(self, position: int) -> T:
        if position < self._position:
            self._begin()
        row = next(islice(self._rows, position - self._position, None))
        self._position = position + 1
        return row

    def map(self, function: Callable[[T], U]) -> "Stream[U]":
        """What `function` makes of each row, as it is read."""

        def read(epoch: int) -> Iterator[U]:
            for number, row in enumerate(self._read(epoch)):
                yield _apply(function, row, self.name, number)

        return Stream(self.name, self.columns, read)

    def filter(self, keep: Callable[[T], bool]) -> "Stream[T]":
        """The rows `keep` is true of."""
        return Stream(self.name, self.columns, lambda epoch: filter(keep, self._read(epoch)))

    def regroup(self, function: Callable[[list[T]], list[U]], window: int) -> "Stream[U]":
        """What `function` makes of every `window` rows in turn, as they are read."""

        def read(epoch: int) -> Iterator[U]:
            for group in _windows(self._read(epoch), window):
                yield from function(group)

        return Stream(self.name, self.columns, read)

    def _begin(self) -> None:
        self._rows, self._position = self._epochs(), 0

    def _epochs(self) -> Iterator[T]:
        for epoch in count():
            row = None
            for row in self._read(epoch):
                yield row
            if row is None:  # the next epoch would be as empty, and the one after it
                raise ConfigError(f"{self.name}: no row is left to train on")


Rows = Table[T] | Stream[T]


def open_dataset(
    name: str,
    source: Any,
    split: str = "train",
    subset: str | None = None,
    streaming: bool = False,
    shuffle_seed: int | None = None,
) -> Rows[dict]:
    """The rows of one dataset.

    Args:
        name: the setting `source` is the value of, for errors.
        source: a datasets.Dataset or list of rows (a Table); a datasets.IterableDataset or other
            collection that can only be iterated, as often as asked (a Stream); a .jsonl, .json or
            .parquet path or the name of a dataset for datasets.load_dataset; or a data module, set
            up, of which the training data are taken (`open_eval_datasets` takes the others). Of a
            torch DataLoader the dataset is taken, since batches are formed here.
        split, subset, streaming: arguments of load_dataset, where `source` is a name.
        shuffle_seed: shuffles a datasets.IterableDataset anew in each epoch, through its buffer
            (the order of a Table is Order's matter); None: it is read in its own order.

    Raises:
        ConfigError: when `source` is none of these, cannot be read, or is empty.
    """
    from datasets import IterableDataset
    from torch.utils.data import DataLoader

    if isinstance(source, str | Path):
        source, name = read_source(name, str(source), split, subset, streaming), f"{name}={source}"
    elif is_data_module(source):
        source = _part(source, "train")
    if isinstance(source, DataLoader):
        source = source.dataset
    if source is None:
        raise ConfigError(f"{name}: there is no dataset")
    if isinstance(source, Mapping):
        raise ConfigError(
            f"{name}: has several datasets ({', '.join(map(str, source))}); pass one of them"
        )
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        first = source[0] if len(source) else None
        return Table(name, _columns(name, first), len(source), source.__getitem__)
    if not hasattr(source, "__iter__"):
        raise ConfigError(
            f"{name}: {type(source).__name__} is no dataset; pass a datasets.Dataset or "
            "IterableDataset, a list of rows, a path, or a dataset's name"
        )
    if iter(source) is source:
        raise ConfigError(
            f"{name}: {type(source).__name__} can be read only once, but a run reads its data "
            "again for each epoch and when it is resumed; pass a list or an IterableDataset"
        )
    if isinstance(source, IterableDataset) and shuffle_seed is not None:
        source = source.shuffle(seed=shuffle_seed)

    def read(epoch: int) -> Iterable[dict]:
        if hasattr(source, "set_epoch"):
            source.set_epoch(epoch)
        return source

    return Stream(name, _columns(name, next(iter(read(0)), None)), read)


def open_eval_datasets(name: str, source: Any, split: str = "test", **load) -> dict[str, Rows]:
    """The rows of the evaluation datasets by the prefix of their metrics, as transformers names
    them: "eval" of a single one, "eval_NAME" of each in a dictionary. {} where `source`, or its
    part of a data module, is None.

    Args:
        load: further arguments of `open_dataset`.

    Raises:
        ConfigError: as `open_dataset`.
    """
    if is_data_module(source):
        source = _part(source, "eval")
    if source is None:
        return {}
    if not isinstance(source, Mapping):
        return {"eval": open_dataset(name, source, split, **load)}
    return {
        f"eval_{part}": open_dataset(f"{name}[{part}]", rows, split, **load)
        for part, rows in source.items()
    }


def read_source(name: str, source: str, split: str, subset: str | None, streaming: bool = False):
    """The datasets.Dataset (IterableDataset, if `streaming`) in a .jsonl, .json or .parquet file,
    or of that name at the hub.

    Raises:
        ConfigError: when it cannot be read.
    """
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()  # every rank reads the data

    kind = FILES.get(Path(source).suffix)
    if kind and not Path(source).is_file():
        raise ConfigError(f"{name}={source}: no such file")
    if kind and Path(source).stat().st_size == 0:
        raise ConfigError(f"{name}={source}: the dataset is empty")
    try:
        if kind:
            return load_dataset(kind, data_files=source, split="train", streaming=streaming)
        return load_dataset(source, subset, split=split, streaming=streaming)
    except Exception as error:  # format, hub, network and naming errors have no common type
        cause = error.__cause__ or error
        what = (
            "cannot be read"
            if kind
            else "neither a .jsonl, .json or .parquet file nor a dataset that loads"
        )
        raise ConfigError(
            f"{name}={source}: {what} ({type(cause).__name__}: {' '.join(str(cause).split())})"
        ) from error


def is_data_module(source: Any) -> bool:
    """Whether `source` has datasets for training, as the data modules of NeMo and Lightning do."""
    return any(hasattr(source, part) for part in MODULE_PARTS["train"])


def require_columns(rows: Rows, *columns: str) -> None:
    """Raises ConfigError when the dataset lacks one of `columns`."""
    for column in columns:
        if column not in rows.columns:
            raise ConfigError(
                f"{rows.name}: has no column {column}; it has {', '.join(rows.columns)}"
            )


def _part(module: Any, part: str) -> Any:
    found = (getattr(module, name, None) for name in MODULE_PARTS[part])
    dataset = next((value for value in found if value is not None), None)
    return dataset() if callable(dataset) else dataset


def _columns(name: str, first: Any) -> list[str]:
    if first is None:
        raise ConfigError(f"{name}: the dataset is empty")
    if not isinstance(first, Mapping):
        raise ConfigError(f"{name}: its rows are {type(first).__name__}, not dictionaries")
    return list(first)


def _apply(function: Callable[[T], U], row: T, name: str, number: int) -> U:
    try:
        return function(row)
    except ConfigError as error:  # the function cannot know which row it has
        raise ConfigError(f"{name}: row {number} {error}") from error


def _windows(rows: Iterable[T], window: int) -> Iterator[list[T]]:
    rows = iter(rows)
    return iter(lambda: list(islice(rows, window)), [])
