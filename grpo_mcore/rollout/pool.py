"""All engines of a role, used by its ranks together."""

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from grpo_mcore import device
from grpo_mcore.config import RolloutConfig
from grpo_mcore.parallel.groups import Role
from grpo_mcore.rollout.engine import Call, Engine, EngineCalls, EngineError
from grpo_mcore.rollout.requests import Completion, Generated, Request, check_requests
from grpo_mcore.rollout.server import ServerEngine
from grpo_mcore.rollout.spec import EngineSpec
from grpo_mcore.rollout.spread import spread

WAKE_ORDER = ("weights", "kv_cache", "scheduling")
"""What wakes after sleep. Weights come first and are loaded before the key-value cache takes its
memory, so that old weights, new weights and cache never stand side by side."""
WEIGHTS_WAIT, WEIGHTS_GO = 1, 2
"""vLLM's levels of sleep: weights move to host memory, or are dropped."""
PROGRESS_SECONDS = 30.0
"""Whoever waits longer for a generation is told every so often how far it is."""


class StaleEngine(EngineError):
    """Generation was asked of an engine that does not hold the trainer's weights."""


class RolloutPool:
    """The engines of `role`. Every method is called by all its ranks, with the same arguments.

    Whatever fails in an engine (it dies, a call fails there, nothing is heard of it) is learned by
    all ranks together and leads to its restart; what it has finished is kept. After
    `max_engine_restarts` restarts of an engine without a completed generation, every method that
    needs it raises EngineError on every rank.

    Attributes:
        versions: by replica, the trainer version whose weights its engine was proven to hold; -1:
            none. The same on all ranks.
        refill: brings engines that lack the current weights to them; collective. To be set by who
            has the weights.
        make_room: the context in which engines are restarted on a GPU, whose memory they look for;
            collective. To be set by who has a model there.
        beat: tells others who wait for these engines that these are at work; of any rank.
    """

    def __init__(
        self, role: Role, spec: EngineSpec, engines: int, config: RolloutConfig, log_dir: Path
    ):
        """Starts the engines without waiting for them; `wait_until_ready` does."""
        self.role, self.spec, self.engines = role, spec, engines
        self.config, self.log_dir = config, log_dir
        self.sleep_level = WEIGHTS_WAIT if spec.keeps_weights else WEIGHTS_GO
        self.remote = config.engine == "server"
        """Whether the engines have devices of their own."""
        self.versions = [-1] * engines
        self.refill: Callable[[], None] | None = None
        self.make_room: Callable[[], AbstractContextManager] = nullcontext
        self.beat: Callable[[], None] = lambda: None
        self.restarts = [0] * engines
        """By replica, since a generation was last completed."""
        self.failure: EngineError | None = None
        """Why engines are no longer restarted."""
        self.asleep: list[set[str]] = [set() for _ in range(engines)]
        """By replica."""
        self.pending: deque[Ticket] = deque()
        self.replica, place = divmod(role.rank, role.layout.size // engines)
        self.engine: EngineCalls | None = None
        self.ready = False
        if place == 0 and self.replica < engines:
            self.engine = self._start()

    @property
    def version(self) -> int:
        """The oldest version among the engines."""
        return min(self.versions)

    def behind(self, version: int) -> list[int]:
        """Replicas that do not hold `version`."""
        return [replica for replica, held in enumerate(self.versions) if held != version]

    def leader(self, replica: int) -> int:
        """The rank that talks to the replica's engine."""
        return replica * (self.role.layout.size // self.engines)

    def wait_until_ready(self) -> None:
        """Returns when the engines accept weights."""
        self.restart(self._failures(self._finish_start))

    def restart(self, failures: dict[int, str]) -> None:
        """Starts the engines of these replicas anew and waits until they accept weights; they hold
        none. On a GPU they then sleep, so that the owner of the weights fits beside them.

        Args:
            failures: why, by replica.

        Raises:
            EngineError: when one has been restarted too often.
        """
        if failures:
            with self.make_room() if self._can_sleep else nullcontext():
                self._restart(failures)

    def submit(self, requests: list[Request]) -> "Ticket":
        """Starts generating; the ticket's `result()` waits for it.

        Raises:
            RequestError: for a request that cannot be answered.
            StaleEngine: before the first sync, or after one that was not proven.
        """
        check_requests(self.role.name, requests, self.spec.max_model_len)
        if self.version < 0:
            raise self.failure or StaleEngine(self._no_weights())
        self.wake(*WAKE_ORDER)
        ticket = Ticket(self, requests, spread(requests, self.engines))
        self.pending.append(ticket)
        self._ask()
        return ticket

    def generate(self, requests: list[Request]) -> list[Completion]:
        """One completion a request, in order, on every rank."""
        return self.submit(requests).result().completions

    def sleep(self) -> None:
        """Frees the engines' device memory until they are needed: weights that will be replaced go,
        others wait in host memory. vLLM has this on GPUs only; on a CPU nothing happens."""
        if not self._can_sleep:
            return
        while awake := [r for r, asleep in enumerate(self.asleep) if not asleep]:
            failures = self._failures(lambda: self.engine.call("sleep", self.sleep_level), awake)
            for replica in awake:
                self.asleep[replica] = set(WAKE_ORDER)
                if self.sleep_level == WEIGHTS_GO:
                    self.versions[replica] = -1
            self.restart(failures)
            if failures and self.sleep_level == WEIGHTS_WAIT:
                self._refill()

    def wake(self, *parts: str, replicas: list[int] | None = None) -> None:
        """Takes back the memory of `parts` that sleep in engines of `replicas` (None: all). An
        engine that fails to wake is restarted, and then lacks weights: nothing but the memory for
        these wakes before they are there."""
        asked = range(self.engines) if replicas is None else replicas

        def is_due(replica: int) -> bool:
            has_weights = self.versions[replica] >= 0
            return bool(self.asleep[replica] & {*parts}) and (has_weights or parts == ("weights",))

        while sleeping := [replica for replica in asked if is_due(replica)]:
            device.empty_cache()
            self.role.all_gather(None)  # an engine's workers use other ranks' devices too
            failures = self._failures(lambda: self._wake_own(parts), sleeping)
            for replica in sleeping:
                self.asleep[replica] -= {*parts}
            self.restart(failures)

    def collect_until(self, ticket: "Ticket") -> None:
        """Answers come in the order of their requests, so earlier tickets are filled on the way."""
        while ticket.generated is None:
            self._collect(self.pending[0])
            self.pending.popleft()

    def generation_completed(self) -> None:
        """Restarts so far and any to come are not in a row. To be called where a generation does
        not go through the pool."""
        self.restarts = [0] * self.engines

    def close(self) -> None:
        if self.engine:
            self.engine.close()

    def _collect(self, ticket: "Ticket") -> None:
        shares: dict[int, Generated] = {}
        while len(shares) < self.engines:
            self._ask()
            leads = self.engine and self.replica not in shares
            news = self.role.all_gather(self._news(ticket) if leads else None)
            shares |= {n.replica: n.share for n in news if n and n.share}
            at_work = [n for n in news if n and not n.share and not n.failure]
            if at_work and self.role.rank == 0:
                tqdm.write(str(min(at_work, key=lambda n: n.done / max(1, n.size))))
            self.restart({n.replica: n.failure for n in news if n and n.failure})
        self.generation_completed()
        by_number = {
            number: completion
            for replica, share in shares.items()
            for number, completion in zip(ticket.shares[replica], share.completions, strict=True)
        }
        ticket.generated = Generated(
            [by_number[number] for number in range(len(by_number))],
            min(share.started for share in shares.values()),
            max(share.finished for share in shares.values()),
        )

    def _ask(self) -> None:
        """Asks the engine for what it was not asked for yet, as one is not that has taken a dead
        one's place; it is first given the weights."""
        self._refill()
        if self.engine:
            for ticket in self.pending:
                ticket.ask(self.engine)

    def _news(self, ticket: "Ticket") -> "News":
        """Of the own engine's share of `ticket`, once it is there or enough time has passed."""
        news = News(self.replica, self._name(self.replica), len(ticket.share))
        self.beat()
        if not self.engine.wait(self._round_seconds):
            news.done, news.speed = ticket.done, ticket.speed
            return news
        try:
            news.share = ticket.take()
        except EngineError as error:  # carried to all ranks, which restart it together
            news.failure = str(error)
        return news

    def _failures(
        self, action: Callable[[], object], replicas: list[int] | None = None
    ) -> dict[int, str]:
        """Runs `action` on those who lead `replicas` (None: all). Returns what failed of whose
        engine, on all ranks."""
        failure = None
        if self.engine and (replicas is None or self.replica in replicas):
            try:
                action()
            except EngineError as error:  # carried to all ranks, which restart it together
                failure = self.replica, str(error)
        return dict(found for found in self.role.all_gather(failure) if found)

    def _count_restart(self, replica: int, error: str) -> None:
        name, most = self._name(replica), self.config.max_engine_restarts
        if self.failure is None and self.restarts[replica] == most:
            self.failure = EngineError(
                f"engine {name} failed again after {most} restarts in a row "
                f"(rollout.max_engine_restarts={most}): {error}"
            )
        if self.failure:
            raise self.failure
        self.restarts[replica] += 1
        if self.role.rank == 0:
            number = self.restarts[replica]
            reason = error.splitlines()[0]
            tqdm.write(f"warning: restart {number} of {most} of {name}: {reason}")

    def _restart(self, failures: dict[int, str]) -> None:
        while failures:
            if self.engine and self.replica in failures:
                self.engine.close()
            for replica, error in failures.items():
                self.versions[replica], self.asleep[replica] = -1, set()
                self._count_restart(replica, error)
            device.empty_cache()  # vLLM sizes its cache by the device memory it finds free
            self.role.all_gather(None)  # an engine's workers use other ranks' devices too
            if self.engine and self.replica in failures:
                self.engine, self.ready = self._start(), False
            restarted = failures.keys()
            failures = self._failures(self._finish_start)
            if self._can_sleep:
                started = [replica for replica in restarted if replica not in failures]
                failures |= self._failures(lambda: self.engine.call("sleep", WEIGHTS_GO), started)
                for replica in started:
                    self.asleep[replica] = set(WAKE_ORDER)

    def _refill(self) -> None:
        """Has engines that lack weights given these, and wakes them."""
        while self.version < 0:
            if self.failure or self.refill is None:
                raise self.failure or StaleEngine(self._no_weights())
            lacking = [replica for replica, held in enumerate(self.versions) if held < 0]
            self.beat()
            self.refill()
            self.wake(*WAKE_ORDER, replicas=lacking)

    @property
    def _can_sleep(self) -> bool:
        """Whether the engines share GPUs with this role's models."""
        return device.is_cuda() and not self.remote

    @property
    def _round_seconds(self) -> float:
        """The longest wait without a word to other ranks, which give up after the deadline."""
        return min(PROGRESS_SECONDS, self.config.deadline_seconds / 2)

    def _no_weights(self) -> str:
        return f"{self.role.name}: the engines hold no proven weights"

    def _wake_own(self, parts: tuple[str, ...]) -> None:
        asleep = self.asleep[self.replica]
        self.engine.call("wake_up", [part for part in parts if part in asleep])

    def _start(self) -> EngineCalls:
        name, deadlines = self._name(self.replica), {}
        for phase in ("start", "generate", "sync"):
            deadline = getattr(self.config, f"{phase}_seconds")
            deadlines[phase] = self.config.deadline_seconds if deadline is None else deadline
        spec, log = self.spec, self.log_dir / f"{name}.log"
        if self.remote:
            url = getattr(self.config, f"{self.role.name}_servers")[self.replica]
            engine = ServerEngine(name, url, self.config, deadlines)
            engine.submit("start", spec.max_model_len, spec.dtype, spec.stop_token_ids)
            return engine
        engine, arguments = Engine(name, spec.environment(), log, deadlines), {}
        if spec.tokenizer:
            directory = str(self.log_dir / f"{name}.tokenizer")
            spec.tokenizer.save_pretrained(directory)
            arguments = {"tokenizer": directory, "skip_tokenizer_init": False}
        arguments = spec.llm_arguments(self.config) | arguments
        engine.submit("start", arguments, spec.stop_token_ids)
        return engine

    def _finish_start(self) -> None:
        if not self.ready:
            self.beat()
            while not self.engine.wait(self._round_seconds):
                self.beat()
            self.engine.result("start")
            self.ready = True

    def _name(self, replica: int) -> str:
        return f"{self.role.name}-{replica}"


class Ticket:
    """A generation under way.

    Attributes:
        shares: by replica, the numbers of the requests that its engine answers.
        share: the requests that this rank's engine answers.
    """

    def __init__(self, pool: RolloutPool, requests: list[Request], shares: list[list[int]]):
        self.pool, self.shares = pool, shares
        self.share = [requests[number] for number in shares[pool.replica]]
        self.generated: Generated | None = None
        self.kept: dict[int, Completion] = {}
        """By place in `share`: what engines finished before they failed."""
        self.engine: EngineCalls | None = None
        self.call: Call | None = None
        """The newest, of `engine`."""
        self.places: list[int] = []
        """In `share`, of the requests of `call`."""
        self.started = 0.0

    def result(self) -> Generated:
        self.pool.collect_until(self)
        return self.generated

    def ask(self, engine: EngineCalls) -> None:
        """Asks `engine`, unless that has been done, for what its predecessors have not finished."""
        if engine is not self.engine:
            self._keep()
            self.places = [place for place in range(len(self.share)) if place not in self.kept]
            self.engine = engine
            self.call = engine.submit("generate", [self.share[place] for place in self.places])

    def take(self) -> Generated:
        """The share, once its engine has all of it."""
        generated = self.engine.result("generate")
        self._keep()
        completions = [self.kept[place] for place in range(len(self.share))]
        return Generated(completions, self.started, generated.finished)

    @property
    def done(self) -> int:
        """Completions that are there."""
        return len(self.share) - len(self.places) + len(self.call.finished)

    @property
    def speed(self) -> float:
        """Tokens per second of the call under way."""
        return self.call.tokens / max(time.time() - self.call.begun, 1e-3)

    def _keep(self) -> None:
        if self.call:
            self.kept |= {self.places[n]: c for n, c in self.call.finished.items()}
            self.started = self.started or self.call.begun


@dataclass
class News:
    """What the leader of a replica tells of its share of a generation.

    Attributes:
        name: the engine's.
        size, done: completions, asked for and there.
        speed: tokens per second.
        share: all of it.
        failure: why there will be no more of this engine.
    """

    replica: int
    name: str
    size: int
    done: int = 0
    speed: float = 0.0
    share: Generated | None = None
    failure: str | None = None

    def __str__(self) -> str:
        done = f"{self.done} of {self.size} completions"
        return f"{self.name}: {done}, {self.speed:,.0f} tokens/s"
