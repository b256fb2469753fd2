"""What the guard of an engine finds of its processes."""

import subprocess
import sys

from grpo_mcore.rollout import guard

NAMED = (
    "import ctypes, sys; ctypes.CDLL(None).prctl(15, b'\\xff\\xfe) (', 0, 0, 0); "  # PR_SET_NAME
    "print('named', flush=True); sys.stdin.read()"
)


def test_any_name_of_a_process_will_do():
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", NAMED], stdin=pipe, stdout=pipe) as process:
        process.stdout.readline()
        assert process.pid in guard._children()
        process.stdin.close()
