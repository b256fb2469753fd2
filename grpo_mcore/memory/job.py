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
        shapes: by role; of the judge too, if the run has one of its own.
        layouts, engines: by role, as checks choose them (`trainers.layouts`).
        lengths: of the longest sequence, by role, in tokens.
        keeps_student: the student's own model stays on its ranks, for log-likelihoods.
    """

    config: TeacherGRPOConfig
    shapes: dict[str, ModelShape]
    placement: str
    layouts: dict[str, Layout]
    engines: dict[str, int]
    lengths: dict[str, int]
    device: Device
    keeps_student: bool = False

    def places(self) -> list[Place]:
        """All that hold something."""
        return self._on_gpus() if self.device.is_gpu else self._on_cpus()

    @property
    def own_engines(self) -> list[str]:
        """Roles whose engines the run itself starts: the judge's always."""
        is_local = self.config.rollout.engine == "local"
        return [role for role in self.engines if is_local or role == "judge"]

    def sequences_cached(self, role: str) -> float:
        """How many of its longest sequences an engine of the role has room for at once."""
        return self._engine(role)["KV cache"] / self._longest_cached(role)

    def engine_needs(self, role: str) -> float:
        """What an engine of the role needs for its weights and its longest sequence, as a share of
        what it may take of a GPU."""
        least = self._engine(role)["engine weights"] + self._longest_cached(role)
        return least / (self.config.rollout.gpu_memory_utilization * self.device.memory)

    def _longest_cached(self, role: str) -> int:
        shape, dtype = self.shapes[role], self._dtype(role)
        return cache_of_sequence(shape, dtype, self._tensor(role), self.lengths[role])

    def _dtype(self, role: str) -> str:
        if role == "judge":  # vLLM's "auto" is of two bytes, for a model in float32 as well
            return "float32" if self.config.judge.dtype == "float32" else "bfloat16"
        return getattr(self.config, role).dtype

    def _tensor(self, role: str) -> int:
        if role == "judge":
            return self.config.judge.tensor_parallel
        return getattr(self.config.rollout, f"{role}_tensor_parallel")

    def _engine(self, role: str) -> Bytes:
        """Of one worker of an engine of the role. On a GPU vLLM fills the share that
        `gpu_memory_utilization` gives it."""
        rollout, shape = self.config.rollout, self.shapes[role]
        quantization = None if role == "judge" else rollout.quantization
        on_cpu, dtype = not self.device.is_gpu, self._dtype(role)
        weights = engine_weights(shape, dtype, self._tensor(role), quantization, on_cpu)
        if on_cpu:
            return {"engine weights": weights, "KV cache": int(rollout.kv_cache_gib * GIB)}
        room = int(rollout.gpu_memory_utilization * self.device.memory) - weights
        return {"engine weights": weights, "KV cache": max(0, room)}

    def _is_fused(self, model: ModelConfig) -> bool:
        return self.device.is_gpu and model.layers != "local"

    def _teacher(self) -> dict[str, Bytes]:
        model = self.config.teacher
        return rank_phases(
            self.config,
            model,
            self.shapes["teacher"],
            self.layouts["teacher"],
            self.lengths["teacher"],
            self._is_fused(model),
        )

    def _student(self) -> tuple[Bytes, Bytes, Bytes]:
        """Of a rank of the student, beside its engine: while it gives the engine its weights, which
        it does once; what it keeps; and what a pass for log-likelihoods adds to that."""
        model, shape, layout = self.config.student, self.shapes["student"], self.layouts["student"]
        stages = range(layout.pipeline)
        own = max(held(shape, layout, stage).total for stage in stages)
        weights = {"weights": own * ELEMENT[model.dtype]}
        megabytes = self.config.rollout.bucket_megabytes
        begins = weights | {"buckets": bucket_bytes(shape, model.dtype, megabytes)}
        if not self.keeps_student:
            return begins, {}, {}
        rows, length = micro_batch(self.config, self.lengths["student"])
        passes = Passes(shape, model, layout, rows, length, self._is_fused(model))
        return begins, weights, max((log_probs_phase(passes, s) for s in stages), key=total)

    def _on_cpus(self) -> list[Place]:
        sizes = {role: layout.size for role, layout in self.layouts.items()}
        begins, kept, scoring = self._student()
        teacher, asked = self._teacher(), joined([kept, scoring])
        places: list[Place] = []
        if self.placement == "colocated":
            teacher = {phase: joined([found, kept]) for phase, found in teacher.items()}
            teacher["init"] = max(teacher["init"], begins, key=total)
            teacher["generate"] = joined([teacher["generate"], scoring])
        else:
            phases = {"init": begins} | ({"generate": asked} if asked else {})
            places.append(Place("student rank", sizes["student"], None, phases))
        places.insert(0, Place("teacher rank", sizes["teacher"], None, teacher))
        return places + [
            Place(f"{role} engine", self.engines[role], None, {"generate": self._engine(role)})
            for role in self.own_engines
        ]

    def _on_gpus(self) -> list[Place]:
        config, is_colocated = self.config, self.placement == "colocated"
        is_local = config.rollout.engine == "local"
        engines = {r: self._engine(r) if r in self.own_engines else {} for r in self.layouts}
        teacher, (student, kept, scoring) = self._teacher(), self._student()
        processes = 1 + is_local * (1 + is_colocated)
        context = {"contexts": processes * CONTEXT}
        stays = is_colocated and config.disable_student_offloading
        beside = joined([context, *([engines["student"], kept] if stays else [])])
        weights = {"engine weights": engines["teacher"].get("engine weights", 0)}
        syncs, generates = teacher["sync"], teacher["generate"]
        if config.rollout.offload_policy:
            syncs = _without({"gradients", "optimizer"}, syncs)
            generates = _without({"gradients", "optimizer", "weights"}, generates)
        buckets = {"buckets": teacher["sync"]["buckets"]}
        phases = {
            # The engine, which has just started, is awake at its first sync.
            "init": joined([beside, engines["teacher"], teacher["init"], buckets]),
            "generate": joined([beside, engines["teacher"], generates, scoring if stays else {}]),
            "log-probs": joined([beside, teacher["log-probs"]]),
            "update": joined([beside, teacher["update"]]),
            "sync": joined([beside, weights, syncs]),
        }
        begins = joined([context, engines["student"], student])
        serves = joined([context, engines["student"], kept, scoring])
        memory, sizes = self.device.memory, {r: layout.size for r, layout in self.layouts.items()}
        if is_colocated:
            phases["init"] = max(phases["init"], begins, key=total)
            if not stays:
                # What leaves does so for the teacher's engine only.
                asked = joined([serves, teacher["generate"]])
                phases["generate"] = max(phases["generate"], asked, key=total)
            return [Place("device", sizes["teacher"], memory, phases)]
        places = [
            Place("teacher device", sizes["teacher"], memory, phases),
            Place("student device", sizes["student"], memory, {"init": begins, "generate": serves}),
        ]
        if "judge" in self.layouts:
            judges = joined([{"contexts": 2 * CONTEXT}, engines["judge"]])
            places.append(Place("judge device", sizes["judge"], memory, {"generate": judges}))
        return places


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


def _without(gone: set[str], found: Bytes) -> Bytes:
    return {name: size for name, size in found.items() if name not in gone}
