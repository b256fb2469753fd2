"""The phases of a job and what each device, or on a CPU each process, holds in them."""

from dataclasses import replace

from grpo_mcore.config import GroupConfig, ModelConfig
from grpo_mcore.memory.activations import Passes
from grpo_mcore.memory.engines import bucket_bytes
from grpo_mcore.memory.training import (
    Bytes,
    joined,
    log_probs_phase,
    micro_batch,
    states,
    total,
    update_phase,
)
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.grid import Layout

PHASES = ("init", "generate", "log-probs", "update", "sync")


def rank_phases(
    config: GroupConfig,
    model: ModelConfig,
    shape: ModelShape,
    layout: Layout,
    length: int,
    fused: bool,
) -> dict[str, Bytes]:
    """Bytes by phase of a rank that trains; in each phase of the stage that then holds most.
    "engine" is one engine's, with one worker, on a CPU.

    Args:
        length: of the longest sequence.
        fused: whether layers are Transformer Engine's.
    """
    rows, length = micro_batch(config, length)
    megabytes = config.rollout.bucket_megabytes
    passes = Passes(shape, model, layout, rows, length, fused)
    stages: list[dict[str, Bytes]] = []
    for stage in range(layout.pipeline):
        found = states(config, model, shape, layout, stage)
        held = found.named()
        stages.append(
            {
                "init": replace(found, moments=0).named(),
                "generate": held,
                "log-probs": joined([held, log_probs_phase(passes, stage)]),
                "update": joined([held, update_phase(passes, config, stage)]),
                "sync": held | {"buckets": bucket_bytes(shape, model.dtype, megabytes)},
            }
        )
    return {phase: max((s[phase] for s in stages), key=total) for phase in PHASES}
