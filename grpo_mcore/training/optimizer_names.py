"""transformers' names of optimizers and schedules (TrainingArguments' `optim` and
`lr_scheduler_type`), as Megatron serves them."""

import warnings
from collections.abc import Iterable

from grpo_mcore.errors import ConfigError
from grpo_mcore.parallel.world import is_rank_zero

ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused")
"""One algorithm, which is Megatron's; transformers 5 has the first two only."""
ADAMW_8BIT = ("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit")
"""The same with states of 8 bits, scaled block by block."""
DECAY_STYLES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
"""transformers' schedule -> Megatron's; every one of these warms up for `warmup_steps`."""


def check_optim(name: str) -> None:
    """Warns, on rank 0, of an optimizer whose states Megatron's AdamW keeps in float32 and not in 8
    bits.

    Megatron's own 8-bit states (`exp_avg_dtype`, by Transformer Engine's FusedAdam) are FP8 with
    one scale a tensor. Of a gradient that is all 0, which equal rewards give, that scale is 0 and
    the states become NaN; and small variances beside a large one become 0.

    Raises:
        ConfigError: for an optimizer that is not AdamW.
    """
    _check("optim", name, (*ADAMW, *ADAMW_8BIT))
    if name in ADAMW_8BIT and is_rank_zero():
        warnings.warn(
            f"optim={name}: AdamW with states in float32 takes its place; to hold less of them, "
            "use distributed_optimizer or optimizer_offload_fraction",
            stacklevel=2,
        )


def decay_style(name: str) -> str:
    """Megatron's name ("linear", "cosine" or "constant") of the schedule `name`.

    Raises:
        ConfigError: for a schedule that is not served.
    """
    _check("lr_scheduler_type", name, DECAY_STYLES)
    return DECAY_STYLES[name]


def _check(key: str, name: str, served: Iterable[str]) -> None:
    if name not in served:
        raise ConfigError(f"{key}={name}: choose one of {', '.join(served)}")
