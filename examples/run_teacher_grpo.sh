#!/usr/bin/env bash
""":"  # One file, two languages: Bash skips the ":" here and stops at exec; to Python, to which torchrun hands the file, all of this is a string.
made=$(dirname "$0")/../.venv/bin/python
found=$([ -z "${VIRTUAL_ENV:-}" ] && [ -x "$made" ] && echo "$made" || echo python3)
exec "${PYTHON:-$found}" -m grpo_mcore.cli launch "$0" "$@"
"""
# Adaptive teaching, GRPO on the teacher. All arguments are overrides such as learning_rate=1e-6.
#   bash examples/run_teacher_grpo.sh [overrides]
#   torchrun --nproc-per-node N examples/run_teacher_grpo.sh [overrides]
import sys

if __name__ == "__main__":  # checkpoint writers import this file again
    from grpo_mcore.launch import run

    run(__file__, sys.argv[1:])
