"""Loads each converted checkpoint with Megatron at a layout awkward for its model, compares it with
the weights read straight from Hugging Face, and saves it again at that layout.

torchrun --nproc-per-node 4 layouts_worker.py MODELS CONVERTED SAVED
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from grpo_mcore.config import ModelConfig
from grpo_mcore.models.build import load_model
from grpo_mcore.models.families import read_shape
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.groups import Role
from grpo_mcore.parallel.world import join
from tests.conftest import FAMILY_MODELS


def sharded(chunks, role: Role) -> dict:
    """What Megatron saves of the model. It asks `parallel_state` for the rank of a tied layer."""
    from megatron.core import parallel_state

    parallel_state.set_data_parallel_rank(role.data_rank)
    metadata = {"dp_cp_group": role.groups.dp_cp}
    state = {f"model{i}": c.sharded_state_dict(metadata=metadata) for i, c in enumerate(chunks)}
    parallel_state.set_data_parallel_rank(None)
    return state


def main() -> None:
    from megatron.core import dist_checkpointing  # the package readies a CPU for it first
    from megatron.core.dist_checkpointing.validation import StrictHandling

    models, converted, saved = map(Path, sys.argv[1:])
    for name in FAMILY_MODELS:
        shape = read_shape("model.path", str(models / name))
        *_, text, settings = FAMILY_MODELS[name]
        model = ModelConfig(str(models / name), **settings)
        layout = replace(Layout.parse("layout", text), expert=model.expert_parallel)
        with join({"policy": layout}, "colocated", 120) as world:
            role = world.roles["policy"]
            chunks = load_model(shape, model, role, seed=0)
            expected = [p.detach().clone() for p in chunks.parameters()]
            with torch.no_grad():
                for parameter in chunks.parameters():
                    parameter.fill_(torch.nan)
            loaded, unused, absent = dist_checkpointing.load(
                sharded(chunks, role),
                str(converted / name / "iter_0000000"),
                strict=StrictHandling.RETURN_ALL,
            )
            assert not absent, absent
            # Transformer Engine's norms have a state, these have none.
            assert all(key.endswith("norm._extra_state") for key in unused), unused
            for i, chunk in enumerate(chunks):
                chunk.load_state_dict(loaded[f"model{i}"])
            for parameter, weights in zip(chunks.parameters(), expected, strict=True):
                assert torch.equal(parameter, weights), name
            if role.rank == 0:
                (saved / name).mkdir()
            role.all_gather(None)
            dist_checkpointing.save(sharded(chunks, role), str(saved / name))


if __name__ == "__main__":
    main()
