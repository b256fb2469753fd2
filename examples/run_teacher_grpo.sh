#!/usr/bin/env bash
""":"  # Two languages: Bash runs this line (":" does nothing) and the next, which replaces it; to Python, to which torchrun hands the file, both are a string.
exec "${PYTHON:-python3}" -m grpo_mcore.cli launch "$0" "$@"
"""
# Adaptive teaching, GRPO on the teacher. All arguments are overrides such as learning_rate=1e-6.
#   bash examples/run_teacher_grpo.sh [overrides]
#   torchrun --nproc-per-node N examples/run_teacher_grpo.sh [overrides]
import sys

if __name__ == "__main__":  # checkpoint writers import this file again
    from grpo_mcore.launch import run

    run(__file__, sys.argv[1:])
