"""The models of FAMILY_MODELS, converted once."""

from pathlib import Path

import pytest

from tests.conftest import FAMILY_MODELS, made_once


@pytest.fixture(scope="session")
def converted(tiny_models, tmp_path_factory) -> Path:
    """A directory with a Megatron folder of every model."""
    from checkpoints_convert import hf_to_megatron

    def make(root: Path) -> None:
        for name in FAMILY_MODELS:
            hf_to_megatron.convert(tiny_models / name, root / name, dtype=None, check=False)

    return made_once(tmp_path_factory, "converted", make)
