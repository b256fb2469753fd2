"""Cures for Megatron's distributed optimizer, without which it cannot load what it saved.

With any Adam:
1. where parameters fill more than one bucket (a tied embedding has its own), it saves their states
   shifted: it looks for each at its place in the padded buffer, but in a copy without the padding.

With plain torch AdamW, which it uses where neither Transformer Engine nor Apex is installed:
2. it reads a step count from states that do not exist before the first step (AssertionError);
3. it wants a "step" with each parameter's loaded states, where there is none (KeyError); the count
   in the parameter groups is right and is kept;
4. it gives all parameters one tensor as their step count, which each of them then advances, so that
   Adam's step runs ahead without a word.
"""

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


def cure(optimizer: ChainedOptimizer) -> None:
    """Makes the distributed optimizers in `optimizer` save and load what they hold."""
    for part in optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer):
            plain = isinstance(part.optimizer, torch.optim.AdamW)
            part.__class__ = CuredPlainAdam if plain else CuredOptimizer
            # States are gathered in host memory, which our groups move too.
            part.data_parallel_group_gloo = part.data_parallel_group


class CuredOptimizer(DistributedOptimizer):
    """Saves each parameter's states from where they are (1)."""

    def get_parameter_state_dp_zero(self, *args, **kwargs):
        state = super().get_parameter_state_dp_zero(*args, **kwargs)
        if state:
            for number, buffer in enumerate(self.buffers):
                for tensors in state[number].values():
                    for name in ("param", "exp_avg", "exp_avg_sq"):
                        if name in tensors:
                            tensors[name] = _with_padding(tensors[name], buffer)
        return state


class CuredPlainAdam(CuredOptimizer):
    """With states of its own for every parameter (2), no step among those loaded (3), and a step
    count for each (4)."""

    def state_dict(self):
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
        return super().state_dict()

    def _set_main_param_and_optimizer_states(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        step = self.optimizer.state[main]["step"]
        super()._set_main_param_and_optimizer_states(model_param, tensors | {"step": step})

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()


def _with_padding(states: Tensor, buffer) -> Tensor:
    """States of all the buffer's buckets, each moved from its place among buckets that follow
    directly on each other to its place among the padded ones."""
    moved = states.new_zeros(buffer.numel)
    sizes = [bucket.numel_unpadded for bucket in buffer.buckets]
    for bucket, part in zip(buffer.buckets, states.split(sizes), strict=True):
        moved[bucket.offset : bucket.offset + len(part)] = part
    return moved
