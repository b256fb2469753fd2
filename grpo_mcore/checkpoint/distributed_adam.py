"""Cures for Megatron's distributed optimizer around plain torch AdamW, which it uses where neither
Transformer Engine nor Apex is installed. Without them it cannot load what it saved:

1. it reads a step count from states that do not exist before the first step (AssertionError);
2. the "step" it copies with each loaded state is not the one that was saved, so a resumed run
   differs from its second step on; the count in the parameter groups is right and is kept;
3. it gives all parameters one tensor as their step count, which each of them then advances, so that
   Adam's step runs ahead without a word.
"""

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def before_loading(optimizer: MegatronOptimizer) -> None:
    """Readies `optimizer` to describe and load its state (1 and 2)."""
    for part in _plain_distributed(optimizer):
        for parameter in _parameters(part):
            state = part.optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        part._set_main_param_and_optimizer_states = _with_step(part)


def after_loading(optimizer: MegatronOptimizer) -> None:
    """Gives each parameter a step count of its own (3)."""
    for part in _plain_distributed(optimizer):
        for parameter in _parameters(part):
            state = part.optimizer.state[parameter]
            state["step"] = state["step"].clone()


def _plain_distributed(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [
        part
        for part in parts
        if isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.AdamW)
    ]


def _parameters(part: DistributedOptimizer) -> list[torch.Tensor]:
    return [p for group in part.optimizer.param_groups for p in group["params"]]


def _with_step(part: DistributedOptimizer):
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_states_and_step(model_param, tensors):
        group, order = part.model_param_group_index_map[model_param]
        main = part.optimizer.param_groups[group]["params"][order]
        step = part.optimizer.state[main]["step"]
        set_states(part, model_param, tensors | {"step": step})

    return set_states_and_step
