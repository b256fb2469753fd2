"""What is checked of a server before a job uses it, and what becomes of one that fails. Most tests
have a stand-in; those of tests/rollout/test_engine_contract.py have a real one."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from urllib.error import HTTPError

import pytest
import torch

from grpo_mcore.config import ConfigError, ModelConfig, RolloutConfig
from grpo_mcore.models.families import read_shape
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.preflight.layouts import count_engines
from grpo_mcore.preflight.servers import check_servers
from grpo_mcore.rollout.bucket import Receipt, fetch_buffer, to_json
from grpo_mcore.rollout.engine import EngineError
from grpo_mcore.rollout.requests import Request
from grpo_mcore.rollout.server import BucketOffer, ServerEngine
from tests.rollout.conftest import free_port, open_rig, serve_model

pytestmark = pytest.mark.engine

REQUEST = Request([5], 2, 0)
DEADLINES = {"start": 60.0, "generate": 60.0, "sync": 60.0}
START = 64, "float32", [1]


@dataclass
class StandIn:
    """Answers as a vLLM server does.

    Attributes:
        description: what its workers say of it, and its number of replicas.
        failing: path -> the status it fails with.
        seen: the (path, Authorization) it was asked for.
        page: what it answers to whatever it is asked, as a server of something else.
    """

    description: dict
    version: str = "default"
    failing: dict[str, int] = field(default_factory=dict)
    seen: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""
    page: bytes | None = None

    def answer(self, path: str, body: dict) -> dict:
        if path == "/collective_rpc":
            said = {key: value for key, value in self.description.items() if key != "replicas"}
            answers = {"describe": said, "end_sync": Receipt({}, [])}
            return {"results": [to_json(answers.get(body["args"][0]))]}
        if path == "/server_info?config_format=json":
            parallel = {"data_parallel_size": self.description["replicas"]}
            return {"vllm_config": {"parallel_config": parallel}}
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path == "/inference/v1/generate":
            tokens = body["token_ids"] * 2
            content = [{"logprob": -1.0} for _ in tokens]
            choice = {
                "token_ids": tokens,
                "logprobs": {"content": content},
                "finish_reason": "length",
                "weight_versions": [{"version": self.version, "start": 0, "end": 2}],
            }
            return {"choices": [choice]}
        return {"success": True}


@pytest.fixture
def server(tiny_models) -> Iterator[StandIn]:
    shape = json.loads((tiny_models / "llama" / "config.json").read_text())
    stand_in = StandIn(
        {
            "shape": shape,
            "dtype": "float32",
            "max_model_len": 64,
            "logprobs_mode": "processed_logprobs",
            "has_tokenizer": True,
            "splits_prompts": False,
            "device": "cpu",
            "replicas": 1,
        }
    )

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            stand_in.seen.append((self.path, self.headers["Authorization"]))
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
            status = stand_in.failing.get(self.path, 200)
            if status == 200 and self.path == "/inference/v1/generate" and not body:
                status = 400
            answer = stand_in.answer(self.path, body) if status == 200 else {"error": "no"}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(stand_in.page or json.dumps(answer).encode())

        def do_GET(self) -> None:
            self.send_response(stand_in.failing.get(self.path, 200))
            self.end_headers()
            self.wfile.write(json.dumps(stand_in.answer(self.path, {})).encode())

        def log_message(self, *_) -> None:
            """Silent."""

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=listening.serve_forever, daemon=True).start()
    stand_in.url = f"http://127.0.0.1:{listening.server_port}"
    yield stand_in
    listening.shutdown()
    listening.server_close()


def rollout_of(*urls: str, **settings) -> RolloutConfig:
    return RolloutConfig(engine="server", policy_servers=[*urls], **settings)


def check(server: StandIn, tiny_models: Path, max_model_len: int = 64, name: str = "llama") -> None:
    path = str(tiny_models / name)
    shape = read_shape("model.path", path)
    model = ModelConfig(path)
    check_servers("policy", rollout_of(server.url), model, shape, max_model_len, True)


def engine_of(server: StandIn, **settings) -> ServerEngine:
    rollout = rollout_of(server.url, **settings)
    return ServerEngine("policy-0", server.url, rollout, dict(DEADLINES))


def started(server: StandIn, **settings) -> ServerEngine:
    engine = engine_of(server, **settings)
    engine.call("start", *START)
    return engine


def test_a_server_that_suits_is_taken(server, tiny_models, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    check(server, tiny_models)
    assert {key for _, key in server.seen} == {"Bearer secret"}


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"max_model_len": 60}, "has --max-model-len 60, the job's sequences have up to 64 tokens"),
        ({"dtype": "bfloat16"}, "has --dtype bfloat16, the model has float32"),
        (
            {"logprobs_mode": "raw_logprobs"},
            "has --logprobs-mode raw_logprobs, needs processed_logprobs",
        ),
        ({"device": "cuda"}, "runs on cuda, the trainer on cpu: their checksums would differ"),
        ({"replicas": 2}, "has --data-parallel-size 2, needs 1: vLLM passes on receipts"),
        ({"splits_prompts": True}, "needs --no-enable-chunked-prefill"),
        ({"has_tokenizer": False}, "has no tokenizer, which stop and bad_words and"),
    ],
)
def test_a_server_that_does_not_suit_is_named(server, tiny_models, changes, reason):
    server.description |= changes
    with pytest.raises(ConfigError) as caught:
        check(server, tiny_models)
    assert str(caught.value).startswith(f"rollout.policy_servers={server.url}: {reason}")


def test_a_server_of_another_model_is_named(server, tiny_models):
    with pytest.raises(ConfigError, match=r"serves a model whose family is llama; that of .*qwen3"):
        check(server, tiny_models, name="qwen3")


@pytest.mark.parametrize(
    "path, status, reason",
    [
        ("/health", 503, "/health answered 503"),
        ("/inference/v1/generate", 403, "needs --enable-scale-out"),
        ("/inference/v1/generate", 401, "refuses the key in the environment's VLLM_API_KEY"),
        ("/collective_rpc", 404, "needs VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls"),
    ],
)
def test_what_a_server_was_not_started_with_is_said(server, tiny_models, path, status, reason):
    server.failing[path] = status
    with pytest.raises(ConfigError) as caught:
        check(server, tiny_models)
    assert f"server {server.url}: {reason}" in str(caught.value)


def test_where_nobody_listens(server, tiny_models):
    nowhere = StandIn({}, url="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"no vLLM server answers there: .*refused"):
        check(nowhere, tiny_models)


@pytest.mark.parametrize(
    "page, reason",
    [
        (b"<html>\n<body>Welcome</body>\n</html>", "no JSON: <html> <body>Welcome</body> </html>"),
        (b'{"status": "ok"}', "{'status': 'ok'}"),
        (b"[1]", "[1]"),
        (b'{"results": [1]}', "{'results': [1]}"),
    ],
)
def test_a_host_that_is_no_vllm_server_is_named_in_one_line(server, tiny_models, page, reason):
    server.page = page
    with pytest.raises(ConfigError) as caught:
        check(server, tiny_models)
    said = str(caught.value)
    assert said.startswith(f"rollout.policy_servers={server.url}: ") and "\n" not in said
    assert f"/collective_rpc answered {reason}" in said


def test_a_host_that_breaks_off_is_named(server, tiny_models):
    server.failing["/inference/v1/generate"] = 0  # no status that HTTP knows
    with pytest.raises(ConfigError, match=f"server {server.url}: /inference/v1/generate: BadStat"):
        check(server, tiny_models)


@pytest.mark.parametrize(
    "rollout, message",
    [
        (rollout_of(), "rollout.policy_servers=[]: rollout.engine=server needs the URL"),
        (rollout_of("host:8000"), "host:8000 is no URL such as http://host:8000"),
        (rollout_of("http://a:1", "http://a:1"), "each engine needs a server of its own"),
        (rollout_of(*(f"http://a:{n}" for n in range(3))), "3 must divide the role's 4 ranks"),
        (rollout_of("http://a:1", policy_engines=2), "rollout.policy_engines=2: there are 1"),
        (rollout_of("http://a:1", policy_tensor_parallel=2), "is the server's own"),
        (
            RolloutConfig(policy_servers=["http://a:1"]),
            "rollout.policy_servers=['http://a:1']: needs rollout.engine=server",
        ),
    ],
)
def test_servers_that_do_not_suit_the_layout(tiny_models, rollout, message):
    shape = read_shape("model.path", str(tiny_models / "llama"))
    with pytest.raises(ConfigError) as caught:
        count_engines(rollout, "policy", Layout(data=4), shape)
    assert message in str(caught.value)


def test_teacher_and_student_do_not_share_a_server(tiny_models):
    shape = read_shape("model.path", str(tiny_models / "llama"))
    teacher, student = ["http://a:1"], ["http://b:1", "http://a:1"]
    rollout = RolloutConfig(engine="server", teacher_servers=teacher, student_servers=student)
    for role, other in (("teacher", "student"), ("student", "teacher")):
        with pytest.raises(ConfigError, match=f"http://a:1 is in rollout.{other}_servers too"):
            count_engines(rollout, role, Layout(data=4), shape)


def test_an_engine_for_each_server(tiny_models):
    shape = read_shape("model.path", str(tiny_models / "llama"))
    rollout = rollout_of("http://a:1", "https://b/engine")
    assert count_engines(rollout, "policy", Layout(data=4), shape) == 2


def test_completions_of_other_weights_are_refused(server):
    engine = started(server)
    engine.call("end_sync")
    assert engine.call("generate", [REQUEST]).completions[0].tokens == [5, 5]
    server.version = "default"  # as of a server that was started anew
    with pytest.raises(EngineError, match=r"policy-0(.|\n)*its weights are \{'default'\}"):
        engine.call("generate", [REQUEST])
    engine.close()


def test_what_was_finished_before_a_failure_is_kept(server):
    engine = started(server, max_num_seqs=1)
    engine.call("end_sync")
    honest, answered = server.answer, []

    def answer(path, body):
        if path == "/inference/v1/generate":
            answered.append(path)
            if len(answered) > 2:
                server.failing[path] = 500
        return honest(path, body)

    server.answer = answer
    call = engine.submit("generate", [Request([n], 2, 0) for n in range(1, 6)])
    with pytest.raises(EngineError, match="/inference/v1/generate answered 500"):
        engine.result("generate")
    assert {n: c.tokens for n, c in call.finished.items()} == {0: [1, 1], 1: [2, 2], 2: [3, 3]}
    assert call.tokens == 6
    engine.close()


def test_an_aborted_request_is_no_sample(server):
    """As another trainer's start makes of those under way on its server."""
    engine, honest = started(server), server.answer
    engine.call("end_sync")

    def answer(path, body):
        said = honest(path, body)
        if path == "/inference/v1/generate":
            said["choices"][0]["finish_reason"] = "abort"
        return said

    server.answer = answer
    call = engine.submit("generate", [REQUEST])
    with pytest.raises(EngineError, match=r"given up \(abort\) before it was answered"):
        engine.result("generate")
    assert not call.finished
    engine.close()


def test_an_engine_that_is_left_finishes_nothing_more(server):
    engine, honest, may_answer = started(server), server.answer, Event()
    engine.call("end_sync")
    server.answer = lambda path, body: may_answer.wait() and honest(path, body)
    call = engine.submit("generate", [REQUEST])
    engine.close()
    may_answer.set()
    assert engine.wait(60)
    assert not call.finished


def test_silence_past_the_deadline_is_an_error(server):
    engine = started(server)
    engine.deadlines["sync"] = 0.1
    server.answer = lambda path, body: time.sleep(1)
    with pytest.raises(EngineError, match=r"nothing heard of 'end_sync' for 0 s"):
        engine.call("end_sync")
    engine.close()


def test_a_server_that_comes_back_is_waited_for(server):
    server.failing["/health"] = 503
    engine = engine_of(server)
    engine.submit("start", *START)
    assert not engine.wait(0.2)
    del server.failing["/health"]
    engine.result("start")
    engine.close()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_bucket_goes_to_those_who_know_its_path(tmp_path, address):
    data = torch.arange(200, dtype=torch.uint8)
    (tmp_path / "bucket").write_bytes(data.numpy().tobytes())
    offer = BucketOffer(address)
    (old,) = offer.urls("memory", [str(tmp_path / "bucket")])
    fetched = torch.empty(200, dtype=torch.uint8)
    fetch_buffer(old, fetched)
    assert fetched.equal(data)
    first, second = offer.urls("tensor", [data, data.flip(0)])
    for url, expected in ((first, data), (second, data.flip(0))):
        fetch_buffer(url, fetched)
        assert fetched.equal(expected)
    with pytest.raises(OSError, match="ended after 200 of 201 bytes"):
        fetch_buffer(first, torch.empty(201, dtype=torch.uint8))
    for url in (old, first + "x"):
        with pytest.raises(HTTPError, match="404"):
            fetch_buffer(url, fetched)
    offer.close()


@pytest.mark.slow
def test_a_server_that_dies_in_a_sync_is_given_all_when_it_is_back(
    tiny_models, tmp_path, monkeypatch
):
    path, port = tiny_models / "qwen2_tied", free_port()
    with ExitStack() as stack:
        first = stack.enter_context(ExitStack())
        dying = serve_model(path, tmp_path / "first.log", port, end=signal.SIGKILL)
        rig = stack.enter_context(open_rig(path, tmp_path, first.enter_context(dying)))
        (undisturbed,) = rig.pool.generate([Request([5, 6], 40, 1)])
        honest, asked = ServerEngine._on_workers, []

        def die(engine, method, *arguments):
            asked.append(method)
            if asked.count("receive_bucket") == 1 and method == "receive_bucket":
                first.close()
                stack.enter_context(serve_model(path, tmp_path / "second.log", port))
            return honest(engine, method, *arguments)

        monkeypatch.setattr(ServerEngine, "_on_workers", die)
        rig.sync.push(2)
        assert asked.count("begin_sync") == 2
        assert rig.pool.versions == [2]
        assert rig.pool.generate([Request([5, 6], 40, 1)])[0].tokens == undisturbed.tokens


@pytest.mark.slow
def test_a_server_that_dies_in_a_generation_goes_on_when_it_is_back(tiny_models, tmp_path):
    """It is given the weights again, and asked for what it had not finished."""
    path, port = tiny_models / "qwen2_tied", free_port()
    # Enough for the generation not to be over when the server dies.
    requests = [Request([5, number], 150, number) for number in range(1, 400)]
    with ExitStack() as stack:
        first = stack.enter_context(ExitStack())
        dying = serve_model(path, tmp_path / "first.log", port, end=signal.SIGKILL)
        url = first.enter_context(dying)
        rig = stack.enter_context(open_rig(path, tmp_path, url))
        rig.pool.refill = lambda: rig.sync.push(1)
        undisturbed = rig.pool.generate(requests)
        ticket = rig.pool.submit(requests)
        call = rig.pool.engine.calls[0]
        while len(call.finished) < 8:
            time.sleep(0.01)
        first.close()
        finished = len(call.finished)
        stack.enter_context(serve_model(path, tmp_path / "second.log", port))
        generated = ticket.result()
        assert 8 <= finished < len(requests)
        assert len(ticket.places) == len(requests) - len(call.finished)
        assert [c.tokens for c in generated.completions] == [c.tokens for c in undisturbed]
        assert rig.pool.versions == [1]
