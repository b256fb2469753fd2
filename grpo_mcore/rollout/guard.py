"""The process around an engine: `python -m grpo_mcore.rollout.guard PARENT SOCKET MODULE ...` runs
the engine, `python -m MODULE ... GUARD`, where GUARD is this process's id, with file descriptor
SOCKET (-1: none). When the engine or process PARENT ends, or on SIGTERM, it ends every process the
engine has started and removes what they leave.

Nothing else can be relied on for that: vLLM's workers notice the engine's death only between two
calls, and a killed engine leaves the sockets, files and shared memory it has made. This process
imports nothing but the standard library, so it starts at once and is small.
"""

import ctypes
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

NO_SOCKET = -1
SHARED_MEMORY = Path("/dev/shm")
LONGEST_DIRECTORY = 48
"""Characters of a directory for temporary files in which sockets of vLLM's find room."""
TRACKER_SECONDS = 10.0
"""The longest wait for Python's resource tracker to remove what the killed have left."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def end_with_parent(parent: int, signal_number: int) -> bool:
    """Has the system send this process `signal_number` when its parent dies, without a word as it
    may. Returns whether that is still process `parent`."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal_number)
    return os.getppid() == parent


def main() -> None:
    parent, socket = map(int, sys.argv[1:3])
    awaited = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    if not end_with_parent(parent, signal.SIGTERM):
        return
    # Processes whose parents die become this one's children, so that none gets lost.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    # Sockets' paths are short: there are 108 bytes for one.
    is_short = len(tempfile.gettempdir()) <= LONGEST_DIRECTORY
    directory = tempfile.mkdtemp(prefix="grpo_mcore-", dir=None if is_short else "/tmp")
    engine = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", *sys.argv[3:], str(os.getpid())],
        os.environ | {"TMPDIR": directory, "VLLM_RPC_BASE_PATH": directory},
        setsigmask=[],
    )
    if socket != NO_SOCKET:
        os.close(socket)  # so that the engine's end of it closes with the engine
    code = None
    while code is None and signal.sigwait(awaited) == signal.SIGCHLD:
        code = _reap().get(engine)
    code = _reap().get(engine, code)  # it may have died before it was to be ended
    _end_descendants()
    _remove_leftovers(Path(directory))
    sys.exit(code or 0)


def _reap() -> dict[int, int]:
    """Exit codes (128 + the signal's number of the killed) of the children that have ended."""
    codes = {}
    while _children():
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            break
        code = os.waitstatus_to_exitcode(status)
        codes[pid] = code if code >= 0 else 128 - code
    return codes


def _end_descendants() -> None:
    """Kills the engine's processes but for the resource tracker, which ends when all others have,
    and first removes shared memory that they have not."""
    patience = time.monotonic() + TRACKER_SECONDS
    while children := _children():
        for pid in children:
            if time.monotonic() > patience or not _is_tracker(pid):
                os.kill(pid, signal.SIGKILL)
        signal.sigtimedwait({signal.SIGCHLD}, 0.1)
        _reap()


def _children() -> list[int]:
    """Processes whose parent this one is, those that have ended too."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_bytes().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it has just gone
            continue
        if int(fields[1]) == os.getpid():
            found.append(int(stat.parent.name))
    return found


def _is_tracker(pid: int) -> bool:
    return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()


def _remove_leftovers(directory: Path) -> None:
    # vLLM's tensor parallel workers on a CPU share memory that is named after the file they met by.
    for file in directory.glob("vllm_dist_*"):
        for segment in SHARED_MEMORY.glob(f"{file.name}-*"):
            segment.unlink()
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
