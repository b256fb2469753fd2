"""An engine on another host: a vLLM server the user has started (`examples/serve_engine.sh`),
behind the calls of `grpo_mcore.rollout.engine.Engine`."""

import http.client
import json
import os
import secrets
import shutil
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from queue import SimpleQueue
from textwrap import shorten
from threading import Thread
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from torch import Tensor

from grpo_mcore import device
from grpo_mcore.config import RolloutConfig
from grpo_mcore.rollout.bucket import Delivery, Receipt, from_json, to_json
from grpo_mcore.rollout.engine import Call, EngineCalls, EngineError
from grpo_mcore.rollout.requests import Completion, Request, ended_itself, sampling_settings

COMMAND = "examples/serve_engine.sh"
API_KEY = "VLLM_API_KEY"
"""The environment variable from which vLLM's servers and this client take their key."""
POLL_SECONDS = 1.0
ANSWER_SECONDS = 60.0
"""Longest wait for an answer that takes no work."""
SHOWN_CHARACTERS = 1000
"""Of an answer that is an error, in one line."""


class ServerEngine(EngineCalls):
    """A vLLM server. The requests of one generation are under way together; a silence is the time
    in which none of them is finished.

    The server is not ours: closing leaves it running, and one that died is only waited for. Each
    completion says by which weights it was sampled; others than those of the last sync, as of a
    server that was started anew since, are an error.
    """

    def __init__(self, name: str, url: str, config: RolloutConfig, deadlines: dict[str, float]):
        super().__init__(name, f"the server {url}", deadlines)
        self.url, self.config = url, config
        self.weights = "none"
        """The name the server knows its weights by."""
        self.stop_token_ids: list[int] = []
        self.offer: BucketOffer | None = None
        self.is_last = False
        """Whether the buffers are let go after the sync."""
        self.is_closed = False

    def close(self) -> None:
        """Leaves the server, which goes on running."""
        with self.news:  # whoever takes over what is finished finds no more of it later
            self.is_closed = True
        if self.offer:
            self.offer.close()

    def _send(self, call: Call) -> None:
        call.begun, call.heard = time.time(), time.monotonic()
        Thread(target=self._run, args=(call,), name=f"engine {self.name}", daemon=True).start()

    def _run(self, call: Call) -> None:
        run = getattr(self, f"_{call.method}", partial(self._on_workers, call.method))
        try:
            answer = "ok", run(*call.arguments)
        except Exception as error:  # raised by `result`
            answer = "error", str(error) or repr(error)
        with self.news:
            self._answered(call, answer)
            self.news.notify_all()

    def _start(self, max_model_len: int, dtype: str, stop_token_ids: list[int]) -> None:
        """Waits until the server is up, which may have to start again first."""
        self.stop_token_ids = stop_token_ids
        give_up = time.monotonic() + self.deadlines["start"]
        while (reason := silence(self.url)) and time.monotonic() < give_up:
            time.sleep(POLL_SECONDS)
        if reason:
            raise EngineError(reason)
        found = describe(self.url)
        if reason := misfit(found, max_model_len, dtype):
            raise EngineError(reason)
        self._ask("/abort_requests", {})  # what an earlier trainer may have left under way
        self.offer = BucketOffer(_own_address(self.url))

    def _generate(self, requests: list[Request]) -> None:
        call = self._under_way()
        waiting, outcomes = deque(enumerate(requests)), SimpleQueue()

        def serve() -> None:
            while not self.is_closed:
                try:
                    number, request = waiting.popleft()
                except IndexError:  # another thread has taken the last
                    return
                try:
                    outcomes.put((number, self._complete(request)))
                except Exception as error:  # raised below
                    outcomes.put((number, error))
            outcomes.put((None, EngineError("is no longer used")))

        for _ in range(min(self.config.max_num_seqs, len(requests))):
            Thread(target=serve, name=f"engine {self.name}", daemon=True).start()
        for _ in requests:
            number, outcome = outcomes.get()
            if isinstance(outcome, Exception):
                waiting.clear()
                raise outcome
            with self.news:
                if self.is_closed:
                    raise EngineError("is no longer used")
                call.heard = time.monotonic()
                call.finished[number] = outcome
                call.tokens += len(outcome.tokens)

    def _complete(self, request: Request) -> Completion:
        body = {
            "token_ids": request.prompt,
            "sampling_params": sampling_settings(request, self.stop_token_ids),
        }
        choice = self._ask("/inference/v1/generate", body)["choices"][0]
        held = {span["version"] for span in choice["weight_versions"]}
        if held != {self.weights}:
            raise EngineError(f"its weights are {held}, it was given {self.weights}")
        tokens = choice["token_ids"]
        log_probs = [token["logprob"] for token in choice["logprobs"]["content"]]
        return Completion(tokens, log_probs, ended_itself(choice["finish_reason"]))

    def _begin_sync(self, delivery: Delivery | None) -> None:
        if delivery:
            self.is_last = delivery.is_last
            delivery = replace(delivery, source=("http", self.offer.urls(*delivery.source)))
        self._on_workers("begin_sync", delivery)

    def _end_sync(self) -> list[Receipt]:
        receipts = self._on_workers("end_sync")
        if self.is_last:
            self.offer.buffers = {}
        # What the old weights computed must not serve the new ones.
        if not self._ask("/reset_prefix_cache", {})["success"]:
            raise EngineError("its prefix cache cannot be reset while it answers others")
        self.weights = f"{self.name}/{secrets.token_hex(8)}"
        self._ask("/update_weight_version", {"new_version": self.weights})
        return receipts

    def _ask_workers(self, method: str, *arguments) -> list:
        return self._on_workers(method, *arguments)

    @property
    def _patience(self) -> float:
        """The longest wait for the server, by which time the call has failed in any case."""
        return max(self.deadlines.values())

    def _on_workers(self, method: str, *arguments) -> list:
        return ask_workers(self.url, self._patience, method, *arguments)

    def _ask(self, path: str, body: Any) -> Any:
        return ask(self.url, path, body, self._patience)


class BucketOffer:
    """Serves the buffers of buckets to the workers of a server, under paths that only they are
    told."""

    def __init__(self, address: str):
        """`address` is this host's as the server's host reaches it."""
        self.buffers: dict[str, Callable[[], BinaryIO]] = {}
        """By path, what opens each."""
        offer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path not in offer.buffers:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.end_headers()
                with offer.buffers[self.path]() as data:
                    shutil.copyfileobj(data, self.wfile, 1 << 20)

            def log_message(self, *_) -> None:
                """Silent: a line a bucket tells nobody anything."""

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in address else socket.AF_INET

        self.server = Server((address, 0), Handler)
        host = f"[{address}]" if ":" in address else address
        self.address = f"http://{host}:{self.server.server_port}"
        Thread(target=self.server.serve_forever, name="bucket offer", daemon=True).start()

    def urls(self, kind: str, buffers: Sequence[str | Tensor]) -> list[str]:
        """Offers the buffers of a delivery's source, and no others; gives their URLs."""
        if kind == "memory":
            opens = [partial(Path(path).open, "rb") for path in buffers]
        else:
            opens = [partial(_bytes_of, tensor) for tensor in buffers]
        self.buffers = {f"/{secrets.token_urlsafe()}": opening for opening in opens}
        return [self.address + path for path in self.buffers]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def describe(url: str) -> dict[str, Any]:
    """What the server at `url` says of itself (`WeightReceiver.describe`), and the number of its
    data parallel replicas, which each worker of a dense model takes for 1.

    Raises:
        EngineError: when there is none, or none that a trainer can use.
    """
    if reason := silence(url):
        raise EngineError(f"server {url}: {reason}")
    try:
        status, _ = exchange(url, "/inference/v1/generate", {}, ANSWER_SECONDS)
    except OSError as error:
        raise EngineError(f"server {url}: /inference/v1/generate: {error}") from error
    if status == 401:
        raise EngineError(f"server {url}: refuses the key in the environment's {API_KEY}")
    if status in (403, 404):
        raise EngineError(f"server {url}: needs --enable-scale-out; {COMMAND} sets it")
    try:
        found = ask_workers(url, ANSWER_SECONDS, "describe")[0]
        settings = ask(url, "/server_info?config_format=json", None, ANSWER_SECONDS)["vllm_config"]
        return found | {"replicas": settings["parallel_config"]["data_parallel_size"]}
    except EngineError as error:
        raise EngineError(
            f"server {url}: needs VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls "
            f"grpo_mcore.rollout.receiver.WeightReceiver; {COMMAND} sets them ({error})"
        ) from error


def misfit(found: dict[str, Any], max_model_len: int, dtype: str) -> str | None:
    """Why a server that says `found` of itself cannot sample sequences of `max_model_len` tokens
    for a model of `dtype`; None where it can."""
    if found["max_model_len"] < max_model_len:
        return (
            f"has --max-model-len {found['max_model_len']}, the job's sequences have up to "
            f"{max_model_len} tokens"
        )
    if found["dtype"] != dtype:
        return f"has --dtype {found['dtype']}, the model has {dtype}"
    if found["device"] != (own := device.torch_device().type):
        return f"runs on {found['device']}, the trainer on {own}: their checksums would differ"
    if found["replicas"] > 1:
        return (
            f"has --data-parallel-size {found['replicas']}, needs 1: vLLM passes on receipts of "
            "weights from the first replica only; start a server for each"
        )
    if found["logprobs_mode"] != "processed_logprobs":
        return f"has --logprobs-mode {found['logprobs_mode']}, needs processed_logprobs"
    if found["splits_prompts"] and found["device"] == "cpu":
        return "needs --no-enable-chunked-prefill: on a CPU seeds are not kept otherwise"
    return None


def silence(url: str) -> str | None:
    """Why the server at `url` is not ready; None where it is."""
    try:
        status, _ = exchange(url, "/health", None, ANSWER_SECONDS)
    except OSError as error:
        return f"no vLLM server answers there: {error}"
    return None if status == 200 else f"/health answered {status}"


def ask_workers(url: str, seconds: float, method: str, *arguments) -> list:
    """What each worker of the server at `url` answers (`WeightReceiver.call_by_http`).

    Raises:
        EngineError: as `ask`.
    """
    body = {"method": "call_by_http", "args": [method, to_json(arguments)]}
    answer = ask(url, "/collective_rpc", body, seconds)
    try:
        return [from_json(text) for text in answer["results"]]
    except (KeyError, TypeError, ValueError) as error:  # not what our extension answers
        said = shorten(str(answer), SHOWN_CHARACTERS)
        raise EngineError(f"server {url}: /collective_rpc answered {said}") from error


def ask(url: str, path: str, body: Any, seconds: float) -> Any:
    """The JSON that the server at `url` answers to `body` (`exchange`).

    Raises:
        EngineError: when it answers with an error, in no JSON, or not in so many `seconds`.
    """
    try:
        status, text = exchange(url, path, body, seconds)
    except OSError as error:
        raise EngineError(f"server {url}: {path}: {error or type(error).__name__}") from error
    said = shorten(text.decode(errors="replace"), SHOWN_CHARACTERS)
    if status != 200:
        raise EngineError(f"server {url}: {path} answered {status}: {said}")
    try:
        return json.loads(text)
    except ValueError as error:
        raise EngineError(f"server {url}: {path} answered no JSON: {said}") from error


def exchange(url: str, path: str, body: Any, seconds: float) -> tuple[int, bytes]:
    """Status and text of the answer to a GET, or where there is a `body`, a POST.

    Raises:
        OSError: when the server cannot be reached, or breaks off.
    """
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(API_KEY):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body)
    connection = kind(parts.hostname, parts.port, timeout=seconds)
    try:
        connection.request("GET" if data is None else "POST", parts.path + path, data, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except http.client.HTTPException as error:  # such as an answer that ends too early
        raise OSError(f"{type(error).__name__}: {error}") from error
    finally:
        connection.close()


def _bytes_of(tensor: Tensor) -> BinaryIO:
    return BytesIO(tensor.cpu().numpy())


def _own_address(url: str) -> str:
    """This host's address on the way to the server."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with socket.create_connection((parts.hostname, port), ANSWER_SECONDS) as connection:
        return connection.getsockname()[0]
