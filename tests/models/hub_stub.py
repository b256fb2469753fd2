"""As much of the Hugging Face hub as uploading and downloading a model takes, on this machine."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote

SHA = "0123456789abcdef0123456789abcdef01234567"
USER = "someone"


class Hub(ThreadingHTTPServer):
    """
    Attributes:
        files: (repository, branch) -> path -> content.
        served: the paths of files that were downloaded.
        commits, created, tokens: what was asked for, in order.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.served, self.commits, self.created, self.tokens = [], [], [], set()
        self.refuses_commits = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    with Hub() as hub:
        thread = Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._file(with_content=False)

    def do_GET(self):
        match self._path():
            case ["api", "models", user, name, "revision", branch]:
                files = self.server.files.get((f"{user}/{name}", branch))
                if files is None:
                    return self._answer(404, {"error": "nothing"}, {"X-Error-Code": "RepoNotFound"})
                siblings = [{"rfilename": path} for path in files]
                self._answer(200, {"id": f"{user}/{name}", "sha": SHA, "siblings": siblings})
            case ["api", "models", user, name, "tree", _]:
                held = self._held(f"{user}/{name}")
                self._answer(
                    200,
                    [
                        {"type": "file", "path": path, "size": len(content), "oid": _sha(content)}
                        for path, content in held.items()
                    ],
                )
            case _:
                self._file(with_content=True)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.tokens.add(self.headers["Authorization"])
        match self._path():
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                self.server.created.append(asked)
                repo = f"{asked.get('organization') or USER}/{asked['name']}"
                if (repo, "main") in self.server.files:
                    return self._answer(
                        409, {"error": "it exists", "url": f"{self.server.url}/{repo}"}
                    )
                self.server.files[repo, "main"] = {}
                self._answer(200, {"url": f"{self.server.url}/{repo}"})
            case ["api", "models", user, name, "branch", branch]:
                self.server.files[f"{user}/{name}", branch] = {}
                self._answer(200, {})
            case ["api", "models", _, _, "preupload", _]:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self._answer(200, {"files": files})
            case ["api", "models", user, name, "commit", branch]:
                if self.server.refuses_commits:
                    return self._answer(403, {"error": "no"})
                header, *entries = map(json.loads, body.splitlines())
                held = self.server.files[f"{user}/{name}", branch]
                for entry in entries:
                    held[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                self.server.commits.append((f"{user}/{name}", branch, header["value"]["summary"]))
                url = f"{self.server.url}/{user}/{name}/commit/{SHA}"
                self._answer(200, {"commitUrl": url, "commitOid": SHA})
            case _:
                self._answer(404, {"error": self.path})

    def _file(self, with_content: bool):
        user, name, _, _, *path = self._path()
        path = "/".join(path)
        content = self._held(f"{user}/{name}")[path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{_sha(content)}"')
        self.send_header("X-Repo-Commit", SHA)
        self.end_headers()
        if with_content:
            self.server.served.append(path)
            self.wfile.write(content)

    def _held(self, repo: str) -> dict[str, bytes]:
        return next(files for (held, _), files in self.server.files.items() if held == repo)

    def _path(self) -> list[str]:
        return unquote(self.path.partition("?")[0]).strip("/").split("/")

    def _answer(self, status: int, content: dict | list, headers: dict | None = None):
        body = json.dumps(content).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _sha(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
