"""Processes that have imported what takes seconds, and fork what needs it.

    python -m tests.fork_server SOCKET MODULE ...

imports each MODULE when it is first asked for a process, and then forks one for every request: a
function "package.module:name" with `sys.argv`, environment, directory and open files of its own.
`Server` starts one, `Server.fork` asks it, from any process of this machine.
"""

import array
import atexit
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_PR_SET_PDEATHSIG = 1
_LONGEST = 1 << 20
"""Bytes of a request."""


class Server:
    """A fork server, known by its socket, which may have been started by another process."""

    def __init__(self, path: str, process: subprocess.Popen | None = None):
        self.path, self.process = path, process

    @classmethod
    def start(cls, modules: list[str], environment: Mapping[str, str]) -> "Server":
        """Starts one that ends with this process, if not before.

        Args:
            environment: what libraries read as they are loaded, on top of this process's.
        """
        path = tempfile.mktemp(prefix="fork-", suffix=".socket")
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", path, *modules],
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
        )
        return cls(path, process)

    def end(self) -> None:
        """Of one that was started here. What its processes took is then counted as this one's."""
        self.process.terminate()
        self.process.wait()
        Path(self.path).unlink(missing_ok=True)

    def fork(
        self,
        function: str,
        arguments: list[str],
        environment: Mapping[str, str],
        files: Mapping[int, int],
        own_session: bool = False,
    ) -> "Forked":
        """A process that runs `function` with `arguments` as `sys.argv`.

        Args:
            environment: all of it.
            files: a file descriptor there -> the one of this process that it shall be.
        """
        connection = socket.socket(socket.AF_UNIX)
        for attempt in range(200):  # it may just be starting
            try:
                connection.connect(self.path)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if attempt == 199:
                    raise
                select.select([], [], [], 0.05)
        request = {
            "function": function,
            "arguments": arguments,
            "environment": dict(environment),
            "directory": os.getcwd(),
            "files": list(files),
            "own_session": own_session,
        }
        handed = array.array("i", files.values())
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, handed)] if files else []
        text = json.dumps(request).encode() + b"\n"
        connection.sendmsg([text[:1]], ancillary)
        connection.sendall(text[1:])
        return Forked(connection)


class Forked:
    """A forked process, as subprocess.Popen shows one."""

    def __init__(self, connection: socket.socket):
        self.lines = connection.makefile("r")
        self.connection, self.returncode = connection, None
        self.pid = int(self.lines.readline())

    def poll(self) -> int | None:
        return self.returncode if self._is_over(0) else None

    def wait(self, timeout: float | None = None) -> int:
        if not self._is_over(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # its end may not be known here yet
            if self.poll() is None:
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _is_over(self, timeout: float | None) -> bool:
        if self.returncode is None:
            if not select.select([self.connection], [], [], timeout)[0]:
                return False
            # Nothing comes where the server itself is gone.
            self.returncode = int(self.lines.readline() or -signal.SIGKILL)
            self.connection.close()
        return True


def main() -> None:
    path, modules = sys.argv[1], sys.argv[2:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    ends, news = socket.socketpair()
    for end in (ends, news):
        end.setblocking(False)
    signal.set_wakeup_fd(news.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, socket.socket] = {}
    is_loaded = False
    while True:
        ready, _, _ = select.select([listener, ends], [], [])
        if ends in ready:
            ends.recv(4096)
            _reap(running)
        if listener in ready:
            connection, _ = listener.accept()
            request, files = _receive(connection)
            if not is_loaded:
                for module in modules:
                    import_module(module)
                is_loaded = True
            pid = os.fork()
            if pid == 0:
                for other in (listener, ends, news, connection, *running.values()):
                    other.close()
                _run(request, files)
            for file in files:
                os.close(file)
            running[pid] = connection
            connection.sendall(f"{pid}\n".encode())


def _reap(running: dict[int, socket.socket]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        connection = running.pop(pid)
        with suppress(BrokenPipeError):  # who asked for it may be gone
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        connection.close()


def _receive(connection: socket.socket) -> tuple[dict, list[int]]:
    files = array.array("i")
    text, ancillary, *_ = connection.recvmsg(1, socket.CMSG_LEN(64 * files.itemsize))
    for _, _, data in ancillary:
        files.frombytes(data)
    while not text.endswith(b"\n"):
        text += connection.recv(_LONGEST)
    return json.loads(text), list(files)


def _run(request: dict, files: list[int]) -> None:
    """What the forked process does, to its end."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if request["own_session"]:
        os.setsid()
    # Above all that they shall become, so that none is overwritten before it is in place.
    spare = [os.dup2(file, 200 + place) for place, file in enumerate(files)]
    for file, wanted in zip(spare, request["files"], strict=True):
        os.dup2(file, wanted)
    for file in {*files, *spare} - {*request["files"]}:
        os.close(file)
    os.chdir(request["directory"])
    exit_with(request["function"], request["arguments"], request["environment"])


def exit_with(function: str, arguments: list[str], environment: Mapping[str, str]) -> None:
    """Ends this forked process as an interpreter does that has run `function`."""
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    sys.argv = arguments
    module, _, name = function.partition(":")
    code = 0
    try:
        getattr(import_module(module), name)()
    except SystemExit as error:
        code = error.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        atexit._run_exitfuncs()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


if __name__ == "__main__":
    main()
