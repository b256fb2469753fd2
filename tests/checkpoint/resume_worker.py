"""Saves at one layout and goes on, then loads at several and goes on from there.

torchrun --nproc-per-node 4 resume_worker.py MODELS DIRECTORY

For each layout the first ranks form a world of its size; only the last is smaller than the job.
Rank 0 writes what it found to DIRECTORY/LAYOUT.pt.
"""

import os
import random
import resource
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from grpo_mcore.checkpoint import distributed_adam
from grpo_mcore.checkpoint.folder import checkpoint_at
from grpo_mcore.checkpoint.run import CheckpointWriter, load_checkpoint
from grpo_mcore.config import LoraConfig, ModelConfig, TeacherGRPOConfig
from grpo_mcore.errors import FilesError
from grpo_mcore.models.families import read_shape
from grpo_mcore.models.lora import adapter_rules
from grpo_mcore.objectives.sft import sft_loss
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.groups import Role
from grpo_mcore.parallel.world import join
from grpo_mcore.training.batch import pad_batch
from grpo_mcore.training.policy import Policy, Reference
from grpo_mcore.weights.gather import stream_tensors
from grpo_mcore.weights.plan import make_plan

CASES = {
    "plain": ("qwen3_tied", "float32", False),
    "plain_bf16": ("llama3", "bfloat16", False),
    "distributed": ("qwen3_tied", "float32", True),
    "distributed_bf16": ("llama3", "bfloat16", True),
    "adapters": ("qwen3_tied", "float32", True),
    "adapters_bf16": ("llama3", "bfloat16", False),
    "moving": ("qwen3_tied", "float32", True),
    "moving_bf16": ("llama3", "bfloat16", False),
    "experts": ("qwen3_moe", "float32", True),
    "experts_joined": ("qwen3_moe", "float32", False),
}
SPREAD = ["experts", "experts_joined"]
"""Cases whose experts are spread over the data parallel ranks when they are loaded; and, but for
JOINED, when they are saved."""
JOINED = "experts_joined"
"""Name -> model, weights' type, distributed optimizer. Sizes of qwen3's parameters are no multiples
of 64; llama3 has five layers."""
LORA = {
    "adapters": LoraConfig(r=3, target_modules=["k_proj", "o_proj", "up_proj", "down_proj"]),
    "adapters_bf16": LoraConfig(lora_dropout=0.1),
}
"""What is trained in place of the model's weights."""
MOVING = ("moving", "moving_bf16")
"""Cases with a reference, which moves after every step."""
LAYOUTS = ("1x2x2", "2x1x2", "2x2x1", "1x1x1")
"""Saved at the first, loaded at each."""
CURES = {
    "get_parameter_state_dp_zero": distributed_adam.CuredOptimizer,
    "state_dict": distributed_adam.CuredPlainAdam,
    "_set_main_param_and_optimizer_states": distributed_adam.CuredPlainAdam,
    "load_state_dict": distributed_adam.CuredPlainAdam,
}
BESIDE = ("plain", "distributed", "moving")
"""Cases saved while training goes on."""
SAVED, LAST = 2, 4


class Run:
    """A policy in training, with what it measures."""

    def __init__(self, role: Role, models: Path, case: str, **settings):
        family, dtype, distributed = CASES[case]
        model = ModelConfig(
            str(models / family),
            dtype=dtype,
            sequence_parallel=True,
            expert_parallel=role.layout.expert,
        )
        self.shape = read_shape("model.path", model.path)
        self.config = TeacherGRPOConfig(
            teacher=model,
            lr_scheduler_type="linear",
            warmup_steps=2,
            max_steps=8,
            weight_decay=0.1,
            distributed_optimizer=distributed,
            per_device_train_batch_size=2,
            **{"learning_rate": 1e-3, **settings},
        )
        lora = LORA.get(case)
        self.policy = Policy(role, self.shape, model, self.config, lora)
        self.reference = None
        if case in MOVING:
            self.reference = Reference(role, self.shape, model, self.config)
        trained = adapter_rules(self.shape, lora, fused_norms=False) if lora else None
        self.plan = make_plan(self.policy.chunks, self.shape, role, 1 << 20, 4, trained)

    def writer(self, directory: Path) -> CheckpointWriter:
        path = self.config.teacher.path
        return CheckpointWriter(self.policy, directory, path, self.config, self.reference)

    def load(self, checkpoint: Path) -> dict:
        return load_checkpoint(self.policy, checkpoint, self.reference)

    def train(self, steps: range) -> dict:
        """Losses, each step's gradients and the weights after them, as Hugging Face tensors."""
        losses, gradients = [], []
        for step in steps:
            made = batch(step)
            if self.reference:
                made["reference"] = self.reference.log_probs(made, 1.0)
            losses.append(self.policy.compute_gradients(made, loss)["loss"])
            self.gather_gradients()
            gradients.append(self.whole(lambda p: p.main_grad))
            self.policy.step()
            if self.reference:
                self.reference.mix(self.policy, 0.3)
        weights = self.whole(lambda p: p.data)
        return {"losses": losses, "gradients": gradients, "weights": weights}

    def gather_gradients(self) -> None:
        """Each data parallel rank of a distributed optimizer has its own part of them."""
        if self.config.distributed_optimizer:
            for ddp in self.policy.ddp:
                for bucket in (b for buffer in ddp.buffers for b in buffer.buckets):
                    group = self.policy.role.groups.dp
                    mine = bucket.grad_data.chunk(group.size())[group.rank()]
                    dist.all_gather_into_tensor(bucket.grad_data, mine.clone(), group=group)

    def whole(self, pick) -> dict:
        policy = self.policy
        streams = stream_tensors(policy.chunks, self.shape, self.plan, policy.role, pick)
        return {k: v.clone() for tensors in streams for k, v in tensors.items()}


def seed(text: str) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    random.seed(text)
    np.random.seed(len(text))
    torch.manual_seed(len(text))
    tracker = get_cuda_rng_tracker()
    tracker.set_states({name: torch.get_rng_state() for name in tracker.get_states()})


def draw() -> list:
    """What each generator has to say."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = {name: state.tolist() for name, state in get_cuda_rng_tracker().get_states().items()}
    return [random.random(), np.random.rand(), torch.rand(()).item(), states]


def batch(step: int):
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(2, 500, (8, 12), generator=generator).tolist()
    made = pad_batch([row[:4] for row in rows], [row[4:] for row in rows])
    return made | {"weights": made["mask"] / made["mask"].sum()}


def loss(log_probs, _, part):
    share = sft_loss(log_probs, part["weights"])
    if "reference" in part:
        share = share + 50 * (part["weights"] * (log_probs - part["reference"]).square()).sum()
    return share, {"loss": share}


def tensors_of(case: str) -> dict[str, torch.Tensor]:
    """What a trainer might give to be saved: here two views of one tensor, in some cases only."""
    if case not in MOVING:
        return {}
    columns = torch.arange(12.0).view(6, 2)
    return {"left": columns[:, 0], "right": columns[:, 1].long()}


def save_and_go_on(role: Role, models: Path, directory: Path, cases: list[str]) -> dict:
    found = {}
    for case in cases:
        run = Run(role, models, case)
        run.train(range(SAVED))
        seed(case)
        run.writer(directory / case).save(SAVED, {"mine": case}, tensors=tensors_of(case))
        found[case] = {"drawn": draw()} | run.train(range(SAVED, LAST))
    return found


def load_and_go_on(role: Role, models: Path, directory: Path, cases: list[str]) -> dict:
    """Saves what it has loaded, too."""
    at = f"{role.layout.tensor}x{role.layout.pipeline}x{role.layout.data}"
    found = {}
    for case in cases:
        run = Run(role, models, case)
        seed("another")
        state = run.load(checkpoint_at(directory / case, SAVED))
        drawn = draw()
        tensors = state.pop("tensors")
        run.writer(directory / f"{case} {at}").save(SAVED, state, tensors=tensors)
        found[case] = run.train(range(SAVED, LAST))
        found[case] |= {
            "state": state,
            "tensors": tensors,
            "version": run.policy.version,
            "drawn": drawn,
        }
    return found


def load_without_cures(role: Role, models: Path, directory: Path) -> dict:
    """What becomes of a distributed optimizer when one of the cures is taken away."""
    found, case = {}, "distributed"
    for name, owner in CURES.items():
        cure = vars(owner)[name]
        delattr(owner, name)
        save_and_go_on(role, models, directory / name, [case])
        try:
            found[name] = load_and_go_on(role, models, directory / name, [case])[case]
        except (AssertionError, KeyError) as error:
            found[name] = type(error).__name__
        setattr(owner, name, cure)
    return found


def save_beside_steps(role: Role, models: Path, directory: Path) -> None:
    """One asynchronous save, with a step before it is complete; the same state saved at once."""
    for case in BESIDE:
        run = Run(role, models, case, async_save=True)
        run.train(range(SAVED))
        begun = run.writer(directory / f"{case} async")
        begun.save(SAVED, {}, tensors=tensors_of(case))
        run.config.async_save = False
        run.writer(directory / f"{case} sync").save(SAVED, {})
        run.train(range(SAVED, SAVED + 1))
        begun.finish()


def save_on_a_full_disk(role: Role, models: Path, directory: Path) -> str:
    run = Run(role, models, "distributed")
    writer = run.writer(directory / "full")
    writer.save(1, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        writer.save(2, {})
    except FilesError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "no error"


def die_while_saving(role: Role, models: Path, directory: Path) -> None:
    """Ends this process when its writer has begun and not ended."""
    run = Run(role, models, "plain", async_save=True)
    writer = run.writer(directory / "died")
    writer.save(1, {})
    writer.finish()
    os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGSTOP))
    writer.save(2, {})
    writer.poll()
    os.kill(writer.under_way.async_calls[0].async_caller.process.pid, signal.SIGKILL)
    os._exit(0)


def tensors_in(directory: Path) -> dict[str, dict]:
    """Every tensor of every checkpoint, as it lies there."""
    from megatron.core import dist_checkpointing

    found = {}
    for path in directory.glob(f"*/iter_{SAVED:07d}"):
        content = dist_checkpointing.load_plain_tensors(str(path))
        found[path.parent.name] = {k: v for k, v in content.items() if torch.is_tensor(v)}
    return found


def main() -> None:
    models, directory = Path(sys.argv[1]), Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    for name in LAYOUTS:
        layout = Layout.parse("layout", name)
        if rank < layout.size:
            os.environ["WORLD_SIZE"] = str(layout.size)
            run_layout(layout, models, directory, directory / f"{name}.pt")


def run_layout(layout: Layout, models: Path, directory: Path, result: Path) -> None:
    first, last = result.stem == LAYOUTS[0], result.stem == LAYOUTS[-1]
    found: dict = {"expected": {}, "found": {}}
    spread = replace(layout, expert=layout.data)
    plain = [case for case in CASES if case not in SPREAD]
    with join({"policy": layout}, "colocated", 120) as world:
        role = world.roles["policy"]
        if first:
            found["expected"] |= save_and_go_on(role, models, directory, [*plain, JOINED])
            save_beside_steps(role, models, directory)
            found["full"] = save_on_a_full_disk(role, models, directory)
            found["without"] = load_without_cures(role, models, directory)
        found["found"] |= load_and_go_on(role, models, directory, plain)
        found["settings"] = load_with_other_settings(role, models, directory)
    with join({"policy": spread}, "colocated", 120) as world:
        role = world.roles["policy"]
        if first:
            others = [case for case in SPREAD if case != JOINED]
            found["expected"] |= save_and_go_on(role, models, directory, others)
        found["found"] |= load_and_go_on(role, models, directory, SPREAD)
        if last:
            found["tensors"] = tensors_in(directory)
        if role.rank == 0:
            torch.save(found, result)
        if last:
            die_while_saving(role, models, directory)


def load_with_other_settings(role: Role, models: Path, directory: Path) -> dict:
    """What the optimizer goes by, when the settings are not those of the checkpoint."""
    found = {}
    for case in ("plain", "distributed"):
        run = Run(role, models, case, learning_rate=5e-5, adam_beta2=0.9, adam_epsilon=1e-6)
        run.load(checkpoint_at(directory / case, SAVED))
        group = run.policy.optimizer.param_groups[0]
        found[case] = [group["max_lr"], *group["betas"], group["eps"]]
        run.train(range(SAVED, SAVED + 1))
        found[case].append(run.policy.learning_rate)
    return found


if __name__ == "__main__":
    main()
