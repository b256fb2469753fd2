"""How a batch is cut into micro-batches, and what was computed of them joined again.

Every rank holds the whole batch, so each knows what all others compute.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from grpo_mcore.config import ModelConfig, TrainingConfig
from grpo_mcore.data.token_budget import deal_rows
from grpo_mcore.models.transformer_engine import length_multiple
from grpo_mcore.parallel.groups import Role
from grpo_mcore.training.batch import Batch


class Split:
    """Cuts batches for the ranks of `role`, which compute `model`.

    Data parallel rank n has the n-th run of a batch's rows, in micro-batches of
    `per_device_train_batch_size`. With `max_tokens_per_micro_batch` rows are dealt by their lengths
    instead (`data.token_budget`), and each micro-batch is as long as its own longest row needs.
    """

    def __init__(self, role: Role, model: ModelConfig, config: TrainingConfig):
        self.role = role
        self.size = config.per_device_train_batch_size
        self.max_tokens = config.max_tokens_per_micro_batch
        self.length_multiple = length_multiple(model, role.layout)
        self.count_multiple = role.layout.pipeline if model.virtual_pipeline > 1 else 1

    @property
    def row_multiple(self) -> int:
        """What the number of a batch's rows must divide by."""
        micro = self.size * self.count_multiple if self.count_multiple > 1 else 1
        return self.role.layout.data * micro

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """This data parallel rank's; with a token budget from a batch with "lengths"."""
        dealt = self._deal(batch)
        parts = []
        for number, rows in enumerate(dealt[self.role.data_rank]):
            # Ranks that share experts exchange tokens, as many from each, and rank 0 has the most.
            largest = dealt[0][number] if self.role.layout.expert > 1 else rows
            height, length = len(largest), self._length(batch, largest)
            parts.append({name: _block(t, rows, height, length) for name, t in batch.items()})
        return parts

    def join(self, batch: Batch, parts: list[Tensor]) -> Tensor:
        """[kinds, sequences, tokens] of the whole batch, on the CPU, from [kinds, sequences,
        tokens] of each of this rank's micro-batches; 0 at padding that was cut off. Collective over
        data parallel ranks."""
        whole = torch.zeros(len(parts[0]), *batch["tokens"].shape)
        for rows, part in zip(self._deal(batch)[self.role.data_rank], parts, strict=True):
            whole[:, rows, : part.shape[2]] = part[:, : len(rows)].cpu()
        dist.all_reduce(whole, group=self.role.groups.dp)
        return whole

    def _deal(self, batch: Batch) -> list[list[list[int]]]:
        """For each data parallel rank its micro-batches, as the numbers of their rows."""
        ranks = self.role.layout.data
        if self.max_tokens is None:
            share = len(batch["tokens"]) // ranks
            runs = torch.arange(share * ranks).split(share)
            return [[rows.tolist() for rows in run.split(self.size)] for run in runs]
        lengths = batch["lengths"].tolist()
        options = self.max_tokens, self.count_multiple, self.length_multiple
        if self.role.layout.expert == 1:
            return deal_rows(lengths, ranks, *options)
        # Rows of similar length, one for each rank, are dealt as one.
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        teams = [order[first : first + ranks] for first in range(0, len(order), ranks)]
        (dealt,) = deal_rows([lengths[team[0]] for team in teams], 1, *options)
        return [
            [[row for team in part for row in teams[team][rank : rank + 1]] for part in dealt]
            for rank in range(ranks)
        ]

    def _length(self, batch: Batch, rows: list[int]) -> int:
        if self.max_tokens is None:
            return batch["tokens"].shape[1]
        longest = int(batch["lengths"][rows].max())
        return -(-longest // self.length_multiple) * self.length_multiple


def _block(tensor: Tensor, rows: list[int], height: int, length: int) -> Tensor:
    """`rows` of an entry of a batch, cut to `length`, with empty ones added up to `height`."""
    block = tensor[rows, :length] if tensor.ndim > 1 else tensor[rows]
    return pad(block, [0, 0] * (tensor.ndim - 1) + [0, height - len(rows)])
