"""Megatron's optimizer and learning-rate schedule from our settings."""

from collections.abc import Callable, Iterable

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from grpo_mcore.config import ModelConfig, TrainingConfig
from grpo_mcore.models.layers import DTYPES
from grpo_mcore.models.transformer_engine import optimizer_fields
from grpo_mcore.parallel.groups import Role
from grpo_mcore.training.optimizer_names import decay_style


def build_optimizer(
    chunks: Iterable[DistributedDataParallel],
    config: TrainingConfig,
    model: ModelConfig,
    role: Role,
    lr_lambda: Callable[[int], float] | None = None,
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW with global gradient clipping, and the schedule that also keeps weight decay off
    biases and norms (Megatron applies that only in the schedule's step)."""
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.learning_rate,
            min_lr=config.min_learning_rate,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_epsilon,
            clip_grad=config.max_grad_norm,
            bf16=model.dtype == "bfloat16",
            params_dtype=DTYPES[model.dtype],
            use_distributed_optimizer=config.distributed_optimizer,
            **offload_fields(config.optimizer_offload_fraction),
            **optimizer_fields(model),
        ),
        list(chunks),
        use_gloo_process_groups=False,
        pg_collection=role.groups,
    )
    if lr_lambda is None:
        return optimizer, OptimizerParamScheduler(optimizer, **schedule(config))
    return optimizer, LambdaSchedule(lr_lambda, optimizer, **schedule(config))


class LambdaSchedule(OptimizerParamScheduler):
    """The learning rate times what a function of the updates made says, as torch's LambdaLR."""

    def __init__(self, lr_lambda: Callable[[int], float], optimizer: MegatronOptimizer, **schedule):
        self.lr_lambda = lr_lambda
        super().__init__(optimizer, **schedule)

    def get_lr(self, param_group: dict) -> float:
        # Step n (from 1) is taken before update n, when n - 1 have been made.
        return self.max_lr * self.lr_lambda(max(0, self.num_steps - 1))


def offload_fields(fraction: float) -> dict:
    """OptimizerConfig fields that keep `fraction` of the optimizer's states, and the work on them,
    on the CPU."""
    if fraction == 0:
        return {}
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": fraction,
        # Megatron offloads only the states of this optimizer; they stay in float32 all the same.
        "use_precision_aware_optimizer": True,
    }


def schedule(config: TrainingConfig) -> dict:
    """OptimizerParamScheduler's arguments. Its step n (from 1) is taken before update n, so decay
    ends one step after the last update, which is thus not lost at the minimum rate."""
    style, stable = decay_style(config.lr_scheduler_type), config.stable_steps
    arguments = {
        "init_lr": 0.0,
        "max_lr": config.learning_rate,
        "min_lr": config.min_learning_rate,
        "lr_warmup_steps": config.warmup_steps,
        "lr_decay_steps": max(config.max_steps, config.warmup_steps) + 1,
        "lr_decay_style": style,
        "start_wd": config.weight_decay,
        "end_wd": config.weight_decay,
        "wd_incr_steps": config.max_steps,
        "wd_incr_style": "constant",
        # A resumed run takes the step from the checkpoint and the rest from its own settings.
        "use_checkpoint_opt_param_scheduler": False,
        "override_opt_param_scheduler": True,
    }
    if style != "constant" and stable:
        arguments |= {
            "lr_decay_style": "WSD",
            "lr_wsd_decay_style": style,
            "wsd_decay_steps": max(1, config.max_steps + 1 - config.warmup_steps - stable),
        }
    return arguments
