"""What the rank of a trained model holds."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass

from grpo_mcore.config import ModelConfig, TrainingConfig
from grpo_mcore.memory.activations import ELEMENT, Passes
from grpo_mcore.memory.parameters import adapters, held
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.grid import Layout

Bytes = dict[str, int]
"""By what they hold."""
GRADIENT, MOMENTS, MASTER = 4, 8, 4
"""Bytes for a trained parameter: its gradient and Adam's two moments, which are float32 always, and
the float32 copy of a weight that is not."""


@dataclass(frozen=True)
class States:
    """Bytes of one rank of a pipeline stage.

    Attributes:
        master: float32 copies of weights that are not.
        moments: Adam's, which the first update makes.
        reference: a frozen copy of the model, for the KL term.
    """

    weights: int
    gradients: int
    master: int
    moments: int
    reference: int

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def named(self) -> Bytes:
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.master + self.moments,
            "reference model": self.reference,
        }


def states(
    config: TrainingConfig, model: ModelConfig, shape: ModelShape, layout: Layout, stage: int
) -> States:
    """Those of a rank of pipeline stage `stage`. Megatron's distributed optimizer shares master
    weights and moments out over the ranks that hold the same parameters (Rajbhandari et al.,
    arXiv:1910.02054, stage 1); FP8 holds the layers' matrices twice, as they are and transposed."""
    own = held(shape, layout, stage, model.virtual_pipeline)
    element, lora = ELEMENT[model.dtype], config.peft_config
    weights = own.total * element
    if model.fp8:
        matrices = own.total - own.embedding
        weights += 2 * matrices - (matrices * element if model.fp8_param else 0)
    dense, experts = own.dense, own.experts
    if lora:
        dense, experts = adapters(shape, lora, layout, stage), 0
        weights += dense * element
    updated: float = dense + experts  # parameters whose states are on this rank's device
    if config.distributed_optimizer:
        updated = (dense + experts * layout.expert) / layout.data
    updated *= 1 - config.optimizer_offload_fraction
    return States(
        weights,
        GRADIENT * (dense + experts),
        int(MASTER * updated) if element < 4 else 0,
        int(MOMENTS * updated),
        own.total * element if getattr(config, "beta", 0) and not lora else 0,
    )


def largest_states(
    config: TrainingConfig, model: ModelConfig, shape: ModelShape, layout: Layout
) -> int:
    """Bytes of the stage that holds most."""
    return max(
        states(config, model, shape, layout, stage).total for stage in range(layout.pipeline)
    )


def micro_batch(config: TrainingConfig, length: int) -> tuple[int, int]:
    """Rows of a micro-batch, and their length, where sequences have `length` tokens."""
    if config.max_tokens_per_micro_batch is None:
        return config.per_device_train_batch_size, length
    return max(1, config.max_tokens_per_micro_batch // length), length


def log_probs_phase(passes: Passes, stage: int) -> Bytes:
    """What a pass without gradient adds to the states."""
    own = held(passes.shape, passes.layout, stage, passes.model.virtual_pipeline)
    if not own.output:
        return {"activations": passes.forward()}
    head = passes.head(False, own.output)
    return {"activations": passes.boundary, "logits": max(head, passes.forward())}


def update_phase(passes: Passes, config: TrainingConfig, stage: int) -> Bytes:
    """What an update adds to the states, at its largest moment: all activations and the logits, or
    all activations and a layer at work, or the optimizer's step, which needs two float32 copies of
    a parameter."""
    own = held(passes.shape, passes.layout, stage, passes.model.virtual_pipeline)
    kept, work = passes.kept(stage), passes.at_work(stage)
    gradient = own.largest * passes.element
    if passes.shape.tied and own.output and own.embedding == own.output:
        # The gradient of shared weights waits for their other use.
        work += gradient
    candidates: list[Bytes] = [
        {"activations": kept + work + gradient},
        {"optimizer's work": 2 * own.largest * 4},
    ]
    if own.output:
        candidates.append({"activations": kept, "logits": passes.head(True, own.output)})
    return max(candidates, key=total)


def total(found: Bytes) -> int:
    return sum(found.values())


def joined(parts: Iterable[Bytes]) -> Bytes:
    """All of them, what bears the same name as one."""
    whole: Bytes = {}
    for part in parts:
        for name, size in part.items():
            whole[name] = whole.get(name, 0) + size
    return whole
