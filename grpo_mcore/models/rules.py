"""How one Megatron parameter, sharded over tensor parallel ranks, is made of Hugging Face tensors.

Each rule reads one rank's shard (`shard`), joins all shards back (`merge`), and says where in whole
tensors a shard belongs (`places`), so that it can be written there without joining; each undoes
`shard`, bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Reader(Protocol):
    """Slices of Hugging Face tensors by name; only what is asked for is read."""

    def shape(self, name: str) -> list[int]: ...

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor: ...


class Rule(Protocol):
    @property
    def names(self) -> tuple[str, ...]:
        """The Hugging Face tensors the parameter is made of."""

    def shard(self, reader: Reader, rank: int, size: int) -> Tensor:
        """The shard of tensor parallel rank `rank` of `size`."""

    def merge(self, shards: list[Tensor]) -> dict[str, Tensor]:
        """Hugging Face tensors by name, from the shards in rank order."""

    def places(self, tensors: dict[str, Tensor], rank: int, size: int) -> list[Tensor]:
        """Views of Hugging Face `tensors` that rank `rank`'s shard fills row by row, in its order;
        rows it has beyond them are padding."""


@dataclass(frozen=True)
class Replicated:
    """The same on every rank: norms, and the router of a mixture of experts."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def shard(self, reader: Reader, rank: int, size: int) -> Tensor:
        return reader.read(self.name)

    def merge(self, shards: list[Tensor]) -> dict[str, Tensor]:
        return {self.name: shards[0]}

    def places(self, tensors: dict[str, Tensor], rank: int, size: int) -> list[Tensor]:
        return [tensors[self.name]]


@dataclass(frozen=True)
class Columns:
    """Split along the input dimension (Megatron's row parallel layers)."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def shard(self, reader: Reader, rank: int, size: int) -> Tensor:
        width = reader.shape(self.name)[1] // size
        return reader.read(self.name, 1, rank * width, (rank + 1) * width)

    def merge(self, shards: list[Tensor]) -> dict[str, Tensor]:
        return {self.name: _join(shards, dim=1)}

    def places(self, tensors: dict[str, Tensor], rank: int, size: int) -> list[Tensor]:
        return [tensors[self.name].chunk(size, dim=1)[rank]]


@dataclass(frozen=True)
class Rows:
    """Split along the output dimension (Megatron's column parallel layers)."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def shard(self, reader: Reader, rank: int, size: int) -> Tensor:
        rows = reader.shape(self.name)[0] // size
        return reader.read(self.name, 0, rank * rows, (rank + 1) * rows)

    def merge(self, shards: list[Tensor]) -> dict[str, Tensor]:
        return {self.name: _join(shards)}

    def places(self, tensors: dict[str, Tensor], rank: int, size: int) -> list[Tensor]:
        return [tensors[self.name].chunk(size)[rank]]


@dataclass(frozen=True)
class VocabRows:
    """Split along the vocabulary, padded with zeros so that it divides."""

    name: str
    vocab: int

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def shard(self, reader: Reader, rank: int, size: int) -> Tensor:
        rows = -(-self.vocab // size)
        held = reader.read(
            self.name, 0, min(rank * rows, self.vocab), min((rank + 1) * rows, self.vocab)
        )
        padding = rows - held.shape[0]
        return torch.cat([held, held.new_zeros(padding, held.shape[1])]) if padding else held

    def merge(self, shards: list[Tensor]) -> dict[str, Tensor]:
        return {self.name: _join(shards)[: self.vocab]}

    def places(self, tensors: dict[str, Tensor], rank: int, size: int) -> list[Tensor]:
        rows = -(-self.vocab // size)
        return [tensors[self.name][rank * rows : (rank + 1) * rows]]


@dataclass(frozen=True)
class GateUp:
    """Gate and up projection stacked within each rank's shard: chunk first, then stack."""

    gate: str
    up: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def shard(self, reader: Reader, rank: int, size: int) -> Tensor:
        rows = reader.shape(self.gate)[0] // size
        return torch.cat(
            [reader.read(name, 0, rank * rows, (rank + 1) * rows) for name in (self.gate, self.up)]
        )

    def merge(self, shards: list[Tensor]) -> dict[str, Tensor]:
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return {self.gate: _join(gates), self.up: _join(ups)}

    def places(self, tensors: dict[str, Tensor], rank: int, size: int) -> list[Tensor]:
        return [tensors[name].chunk(size)[rank] for name in (self.gate, self.up)]


@dataclass(frozen=True)
class QKV:
    """Query, key and value interleaved by group: each group's queries, then its key and value."""

    query: str
    key: str
    value: str
    groups: int
    queries_per_group: int
    head_dim: int

    @property
    def names(self) -> tuple[str, ...]:
        return (self.query, self.key, self.value)

    def shard(self, reader: Reader, rank: int, size: int) -> Tensor:
        held = self.groups // size
        parts = []
        for name, heads in self._parts():
            rows = held * heads * self.head_dim
            part = reader.read(name, 0, rank * rows, (rank + 1) * rows)
            parts.append(part.view(held, heads * self.head_dim, *part.shape[1:]))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def merge(self, shards: list[Tensor]) -> dict[str, Tensor]:
        whole = _join(shards)
        heads = [heads for _, heads in self._parts()]
        grouped = whole.view(self.groups, sum(heads) * self.head_dim, *whole.shape[1:])
        parts = grouped.split([h * self.head_dim for h in heads], dim=1)
        return {
            name: part.flatten(0, 1) for (name, _), part in zip(self._parts(), parts, strict=True)
        }

    def places(self, tensors: dict[str, Tensor], rank: int, size: int) -> list[Tensor]:
        held = self.groups // size
        whole = [tensors[name].unflatten(0, (self.groups, -1)) for name, _ in self._parts()]
        return [part[group] for group in range(rank * held, (rank + 1) * held) for part in whole]

    def _parts(self) -> list[tuple[str, int]]:
        return [(self.query, self.queries_per_group), (self.key, 1), (self.value, 1)]


def _join(shards: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The whole of `shards`; a single one is that already, and is not copied."""
    return shards[0] if len(shards) == 1 else torch.cat(shards, dim=dim)
