"""Converts a Hugging Face model to a Megatron checkpoint, free of any layout.

python -m checkpoints_convert.hf_to_megatron --hf DIR --output DIR [--dtype bfloat16] [--check]
"""

from pathlib import Path

import torch
from torch import Tensor

from checkpoints_convert.command import progress, prove, run
from checkpoints_convert.megatron import MegatronModel
from grpo_mcore.checkpoint import folder, manifest
from grpo_mcore.checkpoint.torch_dist import checkpoint_slots, write_checkpoint
from grpo_mcore.errors import FilesError
from grpo_mcore.models.expected import check_tensors, hf_sizes, stored_rules, whole_size
from grpo_mcore.models.families import read_shape
from grpo_mcore.models.hf_files import HFReader, copy_companions, new_directory, total_bytes
from grpo_mcore.models.rules import Rule
from grpo_mcore.models.shape import ModelShape

ITERATION = 0
CHECKPOINT_VERSION = 3.0
"""Of Megatron-LM: queries, keys and values interleaved by group."""


def convert(source: Path, output: Path, dtype: torch.dtype | None, check: bool) -> None:
    """Writes the model in `source` to `output`, which it replaces.

    Args:
        dtype: what its tensors are stored as; None: what they are.
        check: whether to read the result back and compare it with the source.

    Raises:
        ConfigError: when the model is none of the known families.
        FilesError: when it is damaged, or the output cannot be written, or the check fails.
    """
    shape = read_shape("--hf", str(source))
    reader = HFReader(source, dtype)
    spare = check_tensors(reader, shape)
    if spare:
        print(f"left out {len(spare)} tensors that the model does not need, such as {spare[0]}")
    rules = stored_rules(shape)
    expected = _parameters(rules, shape, reader)
    common = {
        "hf_model": str(source.resolve()),
        "iteration": ITERATION,
        "checkpoint_version": CHECKPOINT_VERSION,
    }
    with new_directory(output, total_bytes(expected)) as work:
        checkpoint = folder.checkpoint_at(work, ITERATION)
        copy_companions(source, checkpoint / folder.COMPANIONS)
        with progress("writing", expected) as bar:

            def make(name: str) -> Tensor:
                bar.update(expected[name].nbytes)
                return rules[name].shard(reader, 0, 1)

            write_checkpoint(checkpoint, expected, make, common)
        files = [str(f.relative_to(checkpoint)) for f in checkpoint.rglob("*") if f.is_file()]
        manifest.write_manifest(checkpoint, manifest.describe(checkpoint, files))
        folder.record(work, folder.LATEST, ITERATION)
        if check:
            written = MegatronModel(checkpoint)
            with progress("checking", expected) as bar:
                proof = prove(hf_sizes(shape), reader.read, written.read, bar)
            print(proof)


def _parameters(rules: dict[str, Rule], shape: ModelShape, reader: HFReader) -> dict[str, Tensor]:
    """Every Megatron parameter's size and type, as a tensor without storage."""
    slots = checkpoint_slots(rules)
    kinds: dict[str, tuple[torch.dtype, str]] = {}
    expected = {}
    for name, rule in rules.items():
        for part in rule.names:
            dtype = reader.dtype(part)
            first, where = kinds.setdefault(slots[name].key, (dtype, part))
            if dtype != first:
                raise FilesError(
                    f"{reader.directory}: {where} is {first} and {part} is {dtype}, but Megatron "
                    "stores them as one tensor; choose a type with --dtype"
                )
        expected[name] = torch.empty(whole_size(name, shape), dtype=dtype, device="meta")
    return expected


if __name__ == "__main__":
    run(__doc__.splitlines()[0], "hf", convert)
