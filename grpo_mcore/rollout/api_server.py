"""vLLM's OpenAI-compatible server for as long as its guard is there:
`python -m grpo_mcore.rollout.api_server OPTION... PARENT`, of which OPTIONs are vLLM's own."""

import runpy
import signal
import sys

from grpo_mcore.rollout.guard import end_with_parent

SERVER = "vllm.entrypoints.launchers.api_server.entry"
"""vLLM's command `vllm` does not start where it comes from a CPU wheel under another name."""


def main() -> None:
    if end_with_parent(int(sys.argv.pop()), signal.SIGKILL):
        runpy.run_module(SERVER, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
