"""The optimizer in a checkpoint: states by the names of their parameters, at any layout.

Megatron gives experts an optimizer of their own where they are spread over ranks, and else one to
all parameters; so a checkpoint may have another number of them than the run that loads it.
"""

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer

from grpo_mcore.checkpoint import distributed_adam

METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}
"""Of Megatron's ways to describe the states, the one that does not depend on the layout; they are
gathered on one rank of each data parallel group, in host memory."""

SETTINGS = ("max_lr", "min_lr", "betas", "eps")
"""Of a parameter group, what a resumed run has of its own. (Rate and weight decay are the
schedule's, which sets them before each step.)"""


def sharded_states(
    optimizer: ChainedOptimizer, model: dict, is_loading: bool, metadata: dict
) -> dict[int, dict]:
    """What to save of each optimizer, or where to load it. `model` is the model's own."""
    distributed_adam.cure(optimizer)
    optimizer._synchronize_steps()
    return {
        number: part.sharded_state_dict(model, is_loading, metadata=metadata | METADATA)
        for number, part in enumerate(optimizer.chained_optimizers)
    }


def load_states(optimizer: ChainedOptimizer, loaded: dict[int, dict], saved_parts: int) -> None:
    """Gives the optimizers what was loaded.

    Args:
        saved_parts: how many there were when they were saved.
    """
    parts = optimizer.chained_optimizers
    for number in range(saved_parts, len(parts)):
        loaded[number] = _with_step_of(loaded[0], loaded[number], parts[number])
    for number, part in enumerate(parts):
        own = [{k: v for k, v in group.items() if k in SETTINGS} for group in part.param_groups]
        with torch.no_grad():  # it copies into parameters that want gradients
            part.load_state_dict(loaded[number])
        for group, settings in zip(part.param_groups, own, strict=True):
            group |= settings
    optimizer._synchronize_steps()


def _with_step_of(first: dict, state: dict, part: MegatronOptimizer) -> dict:
    """`state` of the experts' optimizer `part`, of which there was none when it was saved, with the
    step of the first one and its own settings."""
    inner_of_first = first.get("optimizer", first)
    step = {k: v for k, v in inner_of_first["param_groups"][0].items() if k == "step"}
    groups = [group | step for group in part.param_groups]
    if "param_state" in state:
        return first | state | {"optimizer": {"param_groups": groups}}
    inner = state.get("optimizer", state)
    inner["param_groups"] = [
        group | own for group, own in zip(groups, inner["param_groups"], strict=True)
    ]
    inner["state"]["common_step"] = inner_of_first["state"]["common_step"]
    return state
