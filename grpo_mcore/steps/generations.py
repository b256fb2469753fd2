"""Scored samples until they are used up, and the run's place in its data."""

import random
from collections.abc import Callable
from dataclasses import astuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from grpo_mcore.config import ConfigError, GroupConfig
from grpo_mcore.data.order import Order
from grpo_mcore.parallel.groups import Role
from grpo_mcore.preflight.batches import generation_cycle, prompts_per_generation
from grpo_mcore.steps.verdict import HandOver
from grpo_mcore.training.batch import OF_LAST_STAGE, Batch, everywhere


class Generations:
    """Generations of the run (numbered from 0) that updates are yet to be made of.

    Attributes:
        prompts: of a generation.
        cursor: rows of the dataset taken so far, in their order.
        num_tokens: of all prompts and completions so far.
        held: the scored samples of each.
        hand_overs: what sampled each.
    """

    def __init__(self, config: GroupConfig, size: int | None, role: Role, length_multiple: int):
        """
        Args:
            size: rows of the dataset; None: a stream.
            length_multiple: what the length of a batch must divide by.
        """
        self.config, self.role, self.length_multiple = config, role, length_multiple
        self.cycle = generation_cycle(config)
        self.prompts = prompts_per_generation(config, role.layout.data)
        self.order = Order(size, 1, config.seed, config.shuffle_dataset)
        self.cursor = self.num_tokens = 0
        self.held: dict[int, Batch] = {}
        self.hand_overs: dict[int, HandOver] = {}

    def take_rows(self, count: int) -> list[int]:
        """The numbers of the next rows of the dataset, which are then gone by."""
        numbers = self.next_rows(count)
        self.cursor += count
        return numbers

    def next_rows(self, count: int) -> list[int]:
        return [self.order.rows(self.cursor + i)[0] for i in range(count)]

    def lacking(self, parts: list[tuple[int, int]]) -> list[int]:
        """Generations that are not there of those whose `parts` (`GenerationCycle.parts`) a step
        needs."""
        return sorted({generation for generation, _ in parts} - self.held.keys())

    def hold(self, generation: int, batch: Batch, hand_over: HandOver) -> None:
        self.held[generation], self.hand_overs[generation] = batch, hand_over
        self.num_tokens += int(batch["lengths"].sum())

    def rows(self, parts: list[tuple[int, int]]) -> Batch:
        """The rows of a step's micro-batches, of one generation or several."""
        if len({g for g, _ in parts}) == 1 and len(parts) == self.cycle.steps_per_generation:
            return dict(self.held[parts[0][0]])
        length = max(self.held[generation]["tokens"].shape[1] for generation, _ in parts)
        rows = [self._part(generation, part, length) for generation, part in parts]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def sampled_by(self, parts: list[tuple[int, int]]) -> list[HandOver]:
        return [self.hand_overs[generation] for generation, _ in parts]

    def drop_used(self, step: int) -> None:
        """Drops what no step after `step` (from 0) needs."""
        needed = {generation for generation, _ in self.cycle.parts(step + 1)}
        self.held = {g: batch for g, batch in self.held.items() if g in needed}
        self.hand_overs = {g: self.hand_overs[g] for g in self.held}

    def boundary(self) -> Callable[[], None]:
        """What brings all this back to where it is now, from within a step's sampling."""
        cursor, num_tokens = self.cursor, self.num_tokens
        held, hand_overs = dict(self.held), dict(self.hand_overs)

        def go_back() -> None:
            self.cursor, self.num_tokens = cursor, num_tokens
            self.held, self.hand_overs = held, hand_overs

        return go_back

    def state(self) -> dict:
        return {
            "cursor": self.cursor,
            "num_tokens": self.num_tokens,
            "use_of_generations": self._use(),
            "hand_overs": {str(g): astuple(h) for g, h in self.hand_overs.items()},
        }

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{generation}/{name}": tensor
            for generation, batch in self.held.items()
            for name, tensor in everywhere(batch, self.role).items()
        }

    def restore(self, saved: dict) -> None:
        """
        Args:
            saved: `state`, with `tensors` under "tensors"; of a new run nothing else.

        Raises:
            ConfigError: for samples that these settings would use otherwise.
        """
        self.cursor = saved.get("cursor", 0)
        self.num_tokens = saved.get("num_tokens", 0)
        use, now = saved.get("use_of_generations"), self._use()
        if saved["tensors"] and use != now:
            changed = next(name for name in now if use[name] != now[name])
            raise ConfigError(
                f"{changed}={now[changed]}: the checkpoint holds samples that are not used up and "
                f"has {changed}={use[changed]}; go on with that, or from another checkpoint"
            )
        for key, tensor in saved["tensors"].items():
            generation, _, name = key.partition("/")
            if name in OF_LAST_STAGE and not self.role.is_last_stage:
                tensor = torch.zeros_like(tensor)
            self.held.setdefault(int(generation), {})[name] = tensor
        self.hand_overs = {int(g): HandOver(*h) for g, h in saved.get("hand_overs", {}).items()}
        for generation, batch in self.held.items():  # this layout may want another length
            length, multiple = batch["tokens"].shape[1], self.length_multiple
            self.held[generation] = _padded(batch, -(-length // multiple) * multiple)

    def _part(self, generation: int, part: int, length: int) -> Batch:
        """The rows of one micro-step, drawn from all groups, padded to `length`."""
        batch = self.held[generation]
        order = list(range(len(batch["tokens"])))
        random.Random(f"{self.config.seed}/parts/{generation}").shuffle(order)
        size = len(order) // self.cycle.steps_per_generation
        rows = order[part * size : (part + 1) * size]
        return _padded({name: t[rows] for name, t in batch.items()}, length)

    def _use(self) -> dict[str, int | bool]:
        """What samples that are kept for further updates depend on."""
        config, cycle = self.config, self.cycle
        sequences = config.per_device_train_batch_size * self.role.layout.data
        return {
            "num_generations": config.num_generations,
            "sequences of a generation": sequences * cycle.steps_per_generation,
            "sequences of a step": sequences * cycle.gradient_accumulation_steps,
            "num_iterations": cycle.num_iterations,
            "beta above 0": config.beta > 0,
        }


def _padded(batch: Batch, length: int) -> Batch:
    return {n: pad(t, (0, length - t.shape[1])) if t.ndim > 1 else t for n, t in batch.items()}
