"""Alters one weight of the trainer after another, once the engine has them all, and has each found.

torchrun --nproc-per-node N probe_worker.py PARAMETERS MODEL [options of tools/diagnose_mismatch.py]

PARAMETERS are Megatron's, by their names over the whole model, with commas between. For each, and
for none, rank 0 prints "found NAME -> the first module that differs".
"""

import sys
from pathlib import Path

import torch

from grpo_mcore import device

device.prepare()


from grpo_mcore.models.names import named_weights  # noqa: E402
from tools.diagnose_mismatch import TOLERANCES, compare_modules, first_beyond  # noqa: E402
from tools.pair import open_pair, pair_parser  # noqa: E402


def main() -> None:
    names = sys.argv[1].split(",")
    arguments = pair_parser("", Path("unused.json")).parse_args(sys.argv[2:])
    with open_pair(arguments, completion=1, probed=True) as pair:
        pair.sync.push(1)
        weights = named_weights(pair.chunks, pair.shape, pair.role)
        for name in ("none", *names):
            altered = weights.get(name, torch.zeros(1))  # which another rank holds
            kept = altered.detach().clone()
            with torch.no_grad():
                altered *= 1.01
            found = compare_modules(pair)
            with torch.no_grad():
                altered.copy_(kept)
            if pair.role.rank == 0:
                first = first_beyond(found, TOLERANCES[arguments.dtype])
                print(f"found {name} -> {first} of {len(found)}", flush=True)


if __name__ == "__main__":
    main()
