"""Names and times of a step's phases."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from grpo_mcore import device


class Phases:
    """Seconds spent in each named phase of the current step."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.spans: dict[str, tuple[float, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.time()
        yield
        device.synchronize()
        finished = time.time()
        self.seconds[name] = self.seconds.get(name, 0.0) + finished - started
        self.spans[name] = (started, finished)

    def overlap(self, names: list[str], started: float, finished: float) -> float:
        """Seconds of the span from `started` to `finished` that lie within the named phases."""
        spans = [self.spans[name] for name in names if name in self.spans]
        return sum(max(0.0, min(finished, b) - max(started, a)) for a, b in spans)

    def take(self) -> dict[str, float]:
        """The step's times as metrics; the next step starts at zero."""
        taken = {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        self.seconds, self.spans = {}, {}
        return taken
