"""A stand-in for an OpenAI-compatible endpoint that answers, or fails, as it is told."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread

HANGS, CUTS_OFF = "hangs", "cuts off"
HANG_SECONDS = 5.0


def verdict(score: float = 0.5, uncertainty: float = 0.1, **changes) -> dict:
    principles = [{"name": "clarity", "weight": 1.0, "description": "is it clear"}]
    return {
        "principles": principles,
        "score": score,
        "rationale": f"worth {score}",
        "uncertainty": uncertainty,
    } | changes


@dataclass
class FakeEndpoint:
    """
    Attributes:
        reply: from a request's body, a verdict; any text in its place; a status to fail with;
            HANGS or CUTS_OFF.
        requests: the bodies, in the order of their arrival.
        most: requests that were under way at once.
        listings: how often the list of models was asked for, which fails with `listing_status`.
    """

    url: str = ""
    reply: Callable[[dict], dict | str | int] = lambda body: verdict()
    seconds: float = 0.0
    requests: list[dict] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    under_way: int = 0
    most: int = 0
    listings: int = 0
    listing_status: int = 200
    lock: Lock = field(default_factory=Lock)


@contextmanager
def fake_endpoint() -> Iterator[FakeEndpoint]:
    fake = FakeEndpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with fake.lock:
                fake.listings += 1
            self.answer(
                fake.listing_status, json.dumps({"data": [{"id": "first"}, {"id": "second"}]})
            )

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with fake.lock:
                fake.requests.append(body)
                fake.keys.add(self.headers["Authorization"])
                fake.under_way += 1
                fake.most = max(fake.most, fake.under_way)
            time.sleep(fake.seconds)
            said = fake.reply(body)
            with fake.lock:
                fake.under_way -= 1
            if said == HANGS:
                time.sleep(HANG_SECONDS)
            if isinstance(said, int):
                self.answer(said, "{}")
                return
            content = said if isinstance(said, str) else json.dumps(said)
            text = json.dumps({"choices": [{"message": {"content": content}}]})
            self.answer(200, text, len(text) // 2 if said == CUTS_OFF else None)

        def answer(self, status: int, text: str, cut: int | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(text.encode()[:cut])
            self.close_connection = True

        def log_message(self, *_) -> None:
            """Silent."""

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
    fake.url = f"http://127.0.0.1:{listening.server_port}/v1"
    yield fake
    listening.shutdown()
    listening.server_close()
