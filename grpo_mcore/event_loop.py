"""The loop that a run's async functions share: rewards, tools and environments."""

import asyncio
import functools
from threading import Thread

from grpo_mcore import device


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """A loop in a thread of its own, which does not keep the process alive: the thread that asks
    may run a loop already, as in a notebook, and the connections that functions keep are bound to
    one loop."""
    loop = asyncio.new_event_loop()
    chosen = device.torch_device()

    def run() -> None:
        device.enter_thread(chosen)
        loop.run_forever()

    Thread(target=run, name="event loop", daemon=True).start()
    return loop
