"""Names and times of a step's phases."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from grpo_mcore import device


class Phases:
    """Seconds spent in each named phase of the current step."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.time()
        yield
        device.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.time() - started

    def take(self) -> dict[str, float]:
        """The step's times as metrics; the next step starts at zero."""
        taken = {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        self.seconds = {}
        return taken
