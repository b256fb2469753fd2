"""A model behind an OpenAI-compatible endpoint, asked for verdicts, and the cache of these."""

import asyncio
import hashlib
import json
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from grpo_mcore.config.reward_system import JudgeModelConfig
from grpo_mcore.errors import ConfigError, one_line

if TYPE_CHECKING:  # it takes a second to import, which only runs with judges shall wait
    from openai import AsyncOpenAI

CACHE_SECONDS = 60.0
"""The longest wait for another process that writes to the cache."""
SHOWN_CHARACTERS = 300
"""Of an error."""

_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


def _text(characters: int):
    """Asked to be short, so that the JSON ends before `max_tokens`; taken at any length."""
    return Annotated[str, Field(json_schema_extra={"maxLength": characters})]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Principle(_Strict):
    name: _text(60)
    weight: _Share
    description: _text(200)


class Verdict(_Strict):
    """What one model says as one judge."""

    principles: Annotated[list[Principle], Field(min_length=1, max_length=3)]
    score: _Share
    rationale: _text(600)
    uncertainty: _Share


SCHEMA = {"name": "verdict", "schema": Verdict.model_json_schema()}


class _Message(BaseModel):
    content: str


class _Choice(BaseModel):
    message: _Message


class _Completion(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1)]


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: Annotated[list[_Model], Field(min_length=1)]


class JudgeError(Exception):
    """A request has brought no verdict; the text says why, in one line."""


@dataclass(frozen=True)
class Endpoint:
    """Where a model is.

    Attributes:
        base_url: such as http://host:8000/v1.
        model: the endpoint's name of it; None: the first it lists.
    """

    base_url: str
    model: str | None = None
    api_key: str | None = None


class Cache:
    """Verdicts on disk, by the whole of their requests. Used by one thread of each process.

    Its methods raise ConfigError where the file cannot be used.
    """

    def __init__(self, path: str):
        self.path = Path(path)

    def check(self) -> None:
        """Makes no file."""
        if self.path.exists():
            self._execute("SELECT request, verdict FROM verdicts LIMIT 1")

    def get(self, request: dict) -> Verdict | None:
        found = self._execute("SELECT verdict FROM verdicts WHERE request = ?", _digest(request))
        return Verdict.model_validate_json(found[0]) if found else None

    def put(self, request: dict, verdict: Verdict) -> None:
        self._execute(
            "INSERT OR REPLACE INTO verdicts VALUES (?, ?)",
            _digest(request),
            verdict.model_dump_json(),
        )

    def _execute(self, statement: str, *values: str) -> tuple | None:
        """The first row."""
        try:
            return self._database.execute(statement, values).fetchone()
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"reward_system.cache={self.path}: {one_line(error)}") from error

    @cached_property
    def _database(self) -> sqlite3.Connection:
        """Each statement is a transaction, before which SQLite waits for other processes."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self.path, timeout=CACHE_SECONDS, isolation_level=None)
        # Without a wait for the disk at each verdict: what a power cut spoils can be asked again.
        database.execute("PRAGMA synchronous = OFF")
        database.execute(
            "CREATE TABLE IF NOT EXISTS verdicts (request TEXT PRIMARY KEY, verdict TEXT)"
        )
        return database


class JudgeModel:
    """Asks one model. All its coroutines run in one event loop."""

    def __init__(
        self,
        name: str | None,
        model: JudgeModelConfig,
        client: "AsyncOpenAI",
        seconds: float,
        gate: asyncio.Semaphore,
        patience: int,
        cache: Cache | None,
    ):
        """
        Args:
            name: the endpoint's; None: the first that it lists.
            seconds: for a request, all attempts at it included.
            gate: bounds the requests under way.
            patience: requests in a row without an answer after which no more are made, until
                `unanswered` is 0 again.
        """
        self.name, self.model, self.client, self.seconds = name, model, client, seconds
        self.gate, self.patience, self.cache = gate, patience, cache
        self.naming: asyncio.Task[str] | None = None
        self.unanswered = 0
        """Requests since the last that was answered."""

    async def ask(self, messages: list[dict[str, str]], temperature: float) -> Verdict:
        """
        Raises:
            JudgeError: when no verdict comes in time, or what comes is none.
        """
        from openai import OpenAIError

        try:
            request = {
                "model": await self._name(),
                "messages": messages,
                "temperature": temperature,
                "max_tokens": self.model.max_tokens,
            }
            if self.model.structured_outputs:
                request["response_format"] = {"type": "json_schema", "json_schema": SCHEMA}
            if self.cache and (known := self.cache.get(request)):
                return known
            completions = self.client.chat.completions.with_raw_response
            answer = await self._answer(lambda: completions.create(**request))
            content = _Completion.model_validate_json(answer.text).choices[0].message.content
            # xgrammar lets control characters through where a string's length is bounded.
            verdict = Verdict.model_validate(json.loads(content, strict=False))
        except ConfigError:  # the cache's, without which the run would pay again and again
            raise
        except (OpenAIError, TimeoutError, ValueError, RecursionError) as error:
            said = shorten(one_line(error), SHOWN_CHARACTERS)
            raise JudgeError(f"{type(error).__name__}: {said}") from error
        if self.cache:
            self.cache.put(request, verdict)
        return verdict

    async def _name(self) -> str:
        """Requests that wait for the name together fail together, lest each waits its time out."""
        if self.name is None:
            if self.naming is None or self.naming.done():
                self.naming = asyncio.create_task(self._first_listed())
            self.name = await asyncio.shield(self.naming)
        return self.name

    async def _first_listed(self) -> str:
        answer = await self._answer(self.client.models.with_raw_response.list)
        return _Models.model_validate_json(answer.text).data[0].id

    async def _answer(self, request: Callable[[], Awaitable]):
        """What the endpoint answers."""
        from openai import APIConnectionError, InternalServerError

        async with self.gate:
            if self.unanswered >= self.patience:
                raise TimeoutError(f"not asked: {self.unanswered} requests in a row had no answer")
            try:
                async with asyncio.timeout(self.seconds):
                    answer = await request()
            except (TimeoutError, APIConnectionError, InternalServerError):
                self.unanswered += 1
                raise
        self.unanswered = 0
        return answer


def _digest(request: dict) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
