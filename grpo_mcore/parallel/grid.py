"""Which rank stands where: the TP x PP x DP grid of a role, as plain arithmetic.

Ranks are numbered as Megatron numbers them: tensor parallel fastest, then data, then pipeline.
Expert parallelism divides the data parallel ranks: neighbours hold different experts, and each
`replica` of such a set holds them all.
"""

import re
from dataclasses import dataclass
from itertools import product

from grpo_mcore.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """Sizes of a role's tensor, pipeline, data and expert parallel dimensions; `expert` divides
    `data`."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert: int = 1

    @classmethod
    def parse(cls, key: str, text: str) -> "Layout":
        """Reads "2x2x1" (TP x PP x DP). Raises ConfigError naming `key`."""
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
            raise ConfigError(f'{key}={text}: expected "auto" or TPxPPxDP such as "2x2x1"')
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        text = f"{self.tensor}x{self.pipeline}x{self.data}"
        return text if self.expert == 1 else f"{text} EP {self.expert}"

    @property
    def size(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def model_ranks(self) -> int:
        """Ranks that together hold one copy of the model."""
        return self.tensor * self.pipeline

    def rank(self, tensor: int, pipeline: int, expert: int, replica: int) -> int:
        return tensor + self.tensor * (expert + self.expert * replica + self.data * pipeline)

    def stage(self, rank: int) -> int:
        """The pipeline stage of `rank`."""
        return rank // (self.tensor * self.data)

    def ranks_along(self, *dimensions: str) -> list[list[int]]:
        """The rank sets that vary over `dimensions` ("tensor", "pipeline", "data", or of "data"
        only "expert" or "replica") and share every other coordinate."""
        sizes = {
            "tensor": self.tensor,
            "expert": self.expert,
            "replica": self.data // self.expert,
            "pipeline": self.pipeline,
        }
        if "data" in dimensions:
            dimensions += ("expert", "replica")
        varying = [d for d in sizes if d in dimensions]
        fixed = [d for d in sizes if d not in dimensions]
        return [
            sorted(
                self.rank(**dict(zip(fixed, at, strict=True)), **dict(zip(varying, v, strict=True)))
                for v in product(*(range(sizes[d]) for d in varying))
            )
            for at in product(*(range(sizes[d]) for d in fixed))
        ]
