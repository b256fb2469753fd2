"""The trained model: Megatron's DDP, optimizer and schedule around this rank's shard."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from torch import Tensor
from torch.nn import ModuleList

from grpo_mcore import device
from grpo_mcore.config import LoraConfig, ModelConfig, TrainingConfig
from grpo_mcore.models.build import load_model
from grpo_mcore.models.log_probs import log_probs_and_entropy
from grpo_mcore.models.lora import adapters_disabled, add_adapters
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.models.transformer_engine import gather_fields, read_weight, write_weight
from grpo_mcore.objectives.metrics import combine, mean_of
from grpo_mcore.parallel.groups import Role
from grpo_mcore.training.batch import Batch
from grpo_mcore.training.offload import offload
from grpo_mcore.training.optimizer import build_optimizer
from grpo_mcore.training.pipeline import compute_log_probs, run_pipeline
from grpo_mcore.training.split import Split

Loss = Callable[[Tensor, Tensor, Batch], tuple[Tensor, dict[str, Tensor]]]
"""(log-probabilities [sequences, tokens], entropies [sequences, tokens], micro-batch) -> (share of
the loss, its metrics)."""


class Policy:
    """A model in training, spread over the ranks of `role`; every method is called by all of them.

    Attributes:
        version: counts the updates made; the rollout engines carry it too.
        chunks: the model's parts on this rank: one, or those of a virtual pipeline.
        ddp: each of them in Megatron's DistributedDataParallel.
    """

    def __init__(
        self,
        role: Role,
        shape: ModelShape,
        model: ModelConfig,
        config: TrainingConfig,
        lora: LoraConfig | None = None,
        lr_lambda: Callable[[int], float] | None = None,
    ):
        """
        Args:
            lora: train adapters only.
            lr_lambda: from updates made to a factor of the learning rate, in place of the schedule.
        """
        self.role, self.shape, self.config, self.lora = role, shape, config, lora
        self.split = Split(role, model, config)
        self.version, self.holds_fp8 = 0, model.fp8_param
        self.chunks = load_model(shape, model, role, config.seed)
        if lora:
            add_adapters(self.chunks, shape, role, lora, config.seed)
        self.ddp = ModuleList(
            DistributedDataParallel(
                chunk.config,
                DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    use_distributed_optimizer=config.distributed_optimizer,
                    **gather_fields(model),
                ),
                chunk,
                pg_collection=role.groups,
            )
            for chunk in self.chunks
        )
        self.optimizer, self.scheduler = build_optimizer(self.ddp, config, model, role, lr_lambda)
        self.gone: list[Callable[[], None]] = []
        """What brings back what has left the device: training state first, then parameters."""
        megatron = self.chunks[0].config
        megatron.finalize_model_grads_func = finalize_model_grads
        megatron.grad_scale_func = self.optimizer.scale_loss
        no_sync = [ddp.no_sync for ddp in self.ddp]
        megatron.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    @property
    def length_multiple(self) -> int:
        """What the length of a batch must divide by."""
        return self.split.length_multiple

    def log_probs(self, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (`pipeline.compute_log_probs`) of the whole batch."""
        return compute_log_probs(self.ddp, self.split, batch, self.shape.vocab, temperature)

    def compute_gradients(self, batch: Batch, loss: Loss, temperature: float = 1.0) -> dict:
        """Forward and backward over the global batch; gradients are reduced over all ranks.

        Returns:
            The whole batch's metrics of those `loss` gave for parts of it (`objectives.metrics`),
            and its mean entropy, on every rank.
        """
        self.ddp.train()
        for ddp in self.ddp:
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._whole(self._run(batch, loss, temperature, forward_only=False))

    def measure(
        self, batches: Iterable[Batch], loss: Loss, temperature: float = 1.0
    ) -> dict[str, float]:
        """The metrics of all `batches` together, without gradient or dropout, as
        `compute_gradients` returns them."""
        self.ddp.eval()
        parts = (self._run(batch, loss, temperature, forward_only=True) for batch in batches)
        return self._whole(list(chain.from_iterable(parts)))

    def step(self) -> dict[str, float]:
        """One optimizer step on the computed gradients."""
        self.scheduler.step(1)
        _, grad_norm, _ = self.optimizer.step()
        self.version += 1
        return {"grad_norm": float(grad_norm), "learning_rate": self.learning_rate}

    def free_training_state(self) -> None:
        """Moves the optimizer to host memory and frees gradients, whose values are lost, so that
        engines can use the device's memory. The parameters can be read meanwhile."""
        if self.gone:
            return
        for ddp in self.ddp:
            ddp.offload_grad_buffers()
        # In float32 the distributed optimizer's parameters are parts of the model's own.
        own = {_storage(tensor) for tensor in self._model()}
        bring_back = offload(state for state in self._states() if _storage(state) not in own)

        def undo() -> None:
            bring_back()
            for ddp in self.ddp:
                ddp.restore_grad_buffers()

        self.gone.append(undo)
        device.empty_cache()

    def leave_device(self) -> None:
        """Frees the training state and moves the parameters to host memory too. The model cannot
        compute meanwhile."""
        self.free_training_state()
        if len(self.gone) == 1:
            self.gone.append(offload(self._model()))
            device.empty_cache()

    def return_parameters(self) -> None:
        """Brings the parameters back, if they have left."""
        self._return(1)

    def return_to_device(self) -> None:
        """Brings back all that has left."""
        self._return(0)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Off the device, from which parameters held in FP8 cannot leave; then as it was before."""
        before = len(self.gone)
        if not self.holds_fp8:
            self.leave_device()
        try:
            yield
        finally:
            self._return(before)

    def _return(self, still_gone: int) -> None:
        while len(self.gone) > still_gone:
            self.gone.pop()()

    def _model(self) -> Iterator[Tensor]:
        return chain(self.chunks.parameters(), self.chunks.buffers())

    def _states(self) -> Iterator[Tensor]:
        """The optimizer's tensors."""
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            for group in part.optimizer.param_groups:
                yield from group["params"]
            for state in part.optimizer.state.values():
                yield from (value for value in state.values() if torch.is_tensor(value))

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def _run(self, batch: Batch, loss: Loss, temperature: float, forward_only: bool) -> list[dict]:
        """The metrics of this rank's micro-batches, on the last stage."""
        parts = self.split.micro_batches(batch)
        # Megatron averages over micro-batches and data parallel ranks; our losses are shares of a
        # sum whose normaliser is already global.
        undo_average = len(parts) * self.role.layout.data

        def on_output(part: Batch, logits: Tensor):
            targets = part["tokens"].roll(-1, dims=1)  # the last column is always masked
            log_probs, entropy = log_probs_and_entropy(
                logits, targets, self.shape.vocab, temperature, self.role.groups.tp
            )
            share, metrics = loss(log_probs, entropy, part)
            metrics = metrics | {"entropy": mean_of(entropy, part["mask"])}
            return share * undo_average, {k: v.tolist() for k, v in metrics.items()}

        return run_pipeline(self.ddp, self.role, parts, on_output, forward_only)

    def _whole(self, collected: list[dict[str, float | list[float]]]) -> dict[str, float]:
        # Tensor parallel ranks computed the same numbers; one of each last stage speaks.
        spoken = collected if self.role.tensor_rank == 0 else []
        return combine(metrics for rank in self.role.all_gather(spoken) for metrics in rank)


class Reference:
    """The initial policy, for the KL term; frozen, but for `mix`.

    Attributes:
        chunks: the model's parts on this rank, as a policy's.
    """

    @torch.no_grad()  # FP8 parameters then keep nothing for an optimizer
    def __init__(self, role: Role, shape: ModelShape, model: ModelConfig, config: TrainingConfig):
        self.shape, self.split = shape, Split(role, model, config)
        self.chunks = load_model(shape, model, role, config.seed).eval().requires_grad_(False)

    def log_probs(self, batch: Batch, temperature: float) -> Tensor:
        """[sequences, tokens] of the whole batch, as `Policy.log_probs`."""
        return compute_log_probs(self.chunks, self.split, batch, self.shape.vocab, temperature)[0]

    @torch.no_grad()
    def mix(self, policy: Policy, alpha: float) -> None:
        """Moves the reference towards `policy`, of the same role and model: to
        alpha policy + (1 - alpha) reference (TR-DPO's soft update, arXiv:2404.09656). Every rank
        mixes its own shards."""
        own, others = self.chunks.parameters(), policy.chunks.parameters()
        for parameter, other in zip(own, others, strict=True):
            mixed = read_weight(parameter)  # itself, unless it is held in FP8
            write_weight(parameter, mixed.mul_(1 - alpha).add_(read_weight(other), alpha=alpha))


class BaseReference:
    """The model that a policy's adapters adapt, for the KL term: the policy's own, without them."""

    def __init__(self, policy: Policy):
        self.policy = policy

    def log_probs(self, batch: Batch, temperature: float) -> Tensor:
        """[sequences, tokens] of the whole batch, as `Policy.log_probs`."""
        with adapters_disabled(self.policy.chunks):
            return self.policy.log_probs(batch, temperature)[0]


def release(chunks: ModuleList) -> None:
    """Frees the parameters of a model that has served its purpose."""
    for parameter in chunks.parameters():
        parameter.data = torch.empty(0)
    device.empty_cache()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
