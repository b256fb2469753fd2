"""The phases of a job and what each device, or on a CPU each process, holds in them."""

from dataclasses import dataclass, replace

from grpo_mcore.config import GroupConfig, ModelConfig, TeacherGRPOConfig
from grpo_mcore.memory.activations import ELEMENT, Passes
from grpo_mcore.memory.devices import GIB, Device
from grpo_mcore.memory.engines import bucket_bytes, cache_of_sequence, engine_weights
from grpo_mcore.memory.parameters import held
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
CONTEXT = GIB
"""A round number for what one process takes of a GPU beside its tensors: its CUDA context, its
kernels, its communicators' buffers. Not measured here."""


@dataclass(frozen=True)
class Place:
    """Devices, or on a CPU processes, that hold the same.

    Attributes:
        memory: bytes of each; None: not known.
        phases: bytes of each by phase and by what they hold.
    """

    name: str
    count: int
    memory: int | None
    phases: dict[str, Bytes]

    @property
    def peak(self) -> tuple[str, int]:
        """The phase that holds most, and its bytes."""
        phase = max(self.phases, key=lambda name: total(self.phases[name]))
        return phase, total(self.phases[phase])


@dataclass(frozen=True)
class Job:
    """What a plan is made for.

    Attributes:
        layouts, engines: by role, as checks choose them (`trainers.layouts`).
        lengths: of the longest sequence, by role, in tokens.
    """

    config: TeacherGRPOConfig
    shapes: dict[str, ModelShape]
    placement: str
    layouts: dict[str, Layout]
    engines: dict[str, int]
    lengths: dict[str, int]
    device: Device

    def places(self) -> list[Place]:
        """All that hold something."""
        return self._on_gpus() if self.device.is_gpu else self._on_cpus()

    def sequences_cached(self, role: str) -> float:
        """How many of its longest sequences an engine of the role has room for at once."""
        return self._engine(role)["KV cache"] / self._longest_cached(role)

    def engine_needs(self, role: str) -> float:
        """What an engine of the role needs for its weights and its longest sequence, as a share of
        what it may take of a GPU."""
        least = self._engine(role)["engine weights"] + self._longest_cached(role)
        return least / (self.config.rollout.gpu_memory_utilization * self.device.memory)

    def _longest_cached(self, role: str) -> int:
        model, shape = getattr(self.config, role), self.shapes[role]
        return cache_of_sequence(shape, model.dtype, self._tensor(role), self.lengths[role])

    def _tensor(self, role: str) -> int:
        return getattr(self.config.rollout, f"{role}_tensor_parallel")

    def _engine(self, role: str) -> Bytes:
        """Of one worker of an engine of the role. On a GPU vLLM fills the share that
        `gpu_memory_utilization` gives it."""
        rollout, shape = self.config.rollout, self.shapes[role]
        dtype = getattr(self.config, role).dtype
        on_cpu = not self.device.is_gpu
        weights = engine_weights(shape, dtype, self._tensor(role), rollout.quantization, on_cpu)
        if on_cpu:
            return {"engine weights": weights, "KV cache": int(rollout.kv_cache_gib * GIB)}
        room = int(rollout.gpu_memory_utilization * self.device.memory) - weights
        return {"engine weights": weights, "KV cache": max(0, room)}

    def _teacher(self) -> dict[str, Bytes]:
        model = self.config.teacher
        fused = self.device.is_gpu and model.layers != "local"
        return rank_phases(
            self.config,
            model,
            self.shapes["teacher"],
            self.layouts["teacher"],
            self.lengths["teacher"],
            fused,
        )

    def _student(self) -> Bytes:
        """Of a rank that gives its weights to the student's engine, which it does once."""
        model, shape, layout = self.config.student, self.shapes["student"], self.layouts["student"]
        own = max(held(shape, layout, stage).total for stage in range(layout.pipeline))
        megabytes = self.config.rollout.bucket_megabytes
        return {
            "weights": own * ELEMENT[model.dtype],
            "buckets": bucket_bytes(shape, model.dtype, megabytes),
        }

    def _on_cpus(self) -> list[Place]:
        sizes = {role: layout.size for role, layout in self.layouts.items()}
        student, found = self._student(), []
        teacher = self._teacher()
        if self.placement == "colocated":
            teacher["init"] = max(teacher["init"], student, key=total)
        else:
            found.append(Place("student rank", sizes["student"], None, {"init": student}))
        found.insert(0, Place("teacher rank", sizes["teacher"], None, teacher))
        if self.config.rollout.engine == "local":
            found += [
                Place(f"{role} engine", self.engines[role], None, {"generate": self._engine(role)})
                for role in self.layouts
            ]
        return found

    def _on_gpus(self) -> list[Place]:
        config, is_colocated = self.config, self.placement == "colocated"
        is_local = config.rollout.engine == "local"
        engines = {role: self._engine(role) if is_local else {} for role in self.layouts}
        teacher, student = self._teacher(), self._student()
        processes = 1 + is_local * (1 + is_colocated)
        context = {"contexts": processes * CONTEXT}
        stays = is_colocated and config.disable_student_offloading
        beside = joined([context, engines["student"] if stays else {}])
        weights = {"engine weights": engines["teacher"].get("engine weights", 0)}
        away = {} if config.rollout.offload_policy else teacher["generate"]
        buckets = {"buckets": teacher["sync"]["buckets"]}
        phases = {
            # The engine, which has just started, is awake at its first sync.
            "init": joined([beside, engines["teacher"], teacher["init"], buckets]),
            "generate": joined([beside, engines["teacher"], away]),
            "log-probs": joined([beside, teacher["log-probs"]]),
            "update": joined([beside, teacher["update"]]),
            "sync": joined([beside, weights, teacher["sync"]]),
        }
        begins = joined([context, engines["student"], student])
        serves = joined([context, engines["student"]])
        memory, sizes = self.device.memory, {r: layout.size for r, layout in self.layouts.items()}
        if is_colocated:
            phases["init"] = max(phases["init"], begins, key=total)
            if not stays:
                away = teacher["generate"]  # what leaves does so for the teacher's engine only
                asked = joined([context, engines["student"], away])
                phases["generate"] = max(phases["generate"], asked, key=total)
            return [Place("device", sizes["teacher"], memory, phases)]
        return [
            Place("teacher device", sizes["teacher"], memory, phases),
            Place("student device", sizes["student"], memory, {"init": begins, "generate": serves}),
        ]


def rank_phases(
    config: GroupConfig,
    model: ModelConfig,
    shape: ModelShape,
    layout: Layout,
    length: int,
    fused: bool,
) -> dict[str, Bytes]:
    """Bytes by phase of a rank that trains `model`, each of the pipeline stage that then holds
    most; without engines.

    Args:
        length: of the longest sequence.
        fused: whether layers are Transformer Engine's.
    """
    rows, length = micro_batch(config, length)
    passes = Passes(shape, model, layout, rows, length, fused)
    buckets = {"buckets": bucket_bytes(shape, model.dtype, config.rollout.bucket_megabytes)}
    stages: list[dict[str, Bytes]] = []
    for stage in range(layout.pipeline):
        found = states(config, model, shape, layout, stage)
        all_states = found.named()
        stages.append(
            {
                "init": replace(found, moments=0).named(),
                "generate": all_states,
                "log-probs": joined([all_states, log_probs_phase(passes, stage)]),
                "update": joined([all_states, update_phase(passes, config, stage)]),
                "sync": all_states | buckets,
            }
        )
    return {phase: max((s[phase] for s in stages), key=total) for phase in PHASES}
