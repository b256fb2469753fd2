"""Converts a Megatron checkpoint, of a model or of a run, to a Hugging Face model.

python -m checkpoints_convert.megatron_to_hf --megatron DIR --output DIR [--dtype ...] [--check]
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_convert.command import progress, prove, run
from checkpoints_convert.megatron import MegatronModel, check_manifest, find_checkpoint
from grpo_mcore.models.hf_files import HFReader, fill_model, new_directory, total_bytes


def convert(source: Path, output: Path, dtype: torch.dtype | None, check: bool) -> None:
    """Writes the model in `source` to `output`, which it replaces.

    Args:
        source: a checkpoint, or a folder of them, of which the newest is taken.
        dtype: what its tensors are stored as; None: what they are.
        check: whether to compare the source's files with the checksums of its manifest, and the
            result, read back, with the source.

    Raises:
        ConfigError: when the model is none of the known families.
        FilesError: when it is damaged, or the output cannot be written, or the check fails.
    """
    model = MegatronModel(find_checkpoint(source), dtype)
    print(f"{model.directory}: came from {model.source}")
    if check:
        check_manifest(model.directory, with_checksums=True)
    expected = model.expected
    with new_directory(output, total_bytes(expected)) as work:
        with progress("writing", expected) as bar:

            def tensors() -> Iterator[tuple[str, Tensor]]:
                for name in expected:
                    yield name, model.read(name)
                    bar.update(expected[name].nbytes)

            fill_model(tensors(), work, model.companions, expected)
        if check:
            written = HFReader(work)
            with progress("checking", expected) as bar:
                proof = prove(
                    model.rules,
                    model.parameter,
                    lambda name: model.rules[name].shard(written, 0, 1),
                    bar,
                )
            print(proof)


if __name__ == "__main__":
    run(__doc__.splitlines()[0], "megatron", convert)
