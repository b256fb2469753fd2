"""Log-probabilities of given tokens under logits whose vocabulary is sharded over ranks.

With x the logits over temperature less their maximum: log p(y) = x_y - log sum_v exp(x_v). Maximum
and sums run over ranks, so the logits are never gathered, and over `chunk` positions at a time, so
that the float32 copy of the logits stays small. Positions are handled independently.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def log_probs_and_entropy(
    logits: Tensor,
    targets: Tensor,
    vocab: int,
    temperature: float,
    group: dist.ProcessGroup,
    chunk: int = 2048,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy at its position, as if sampled at
    `temperature`.

    Args:
        logits: [..., vocabulary / ranks], this rank's slice of the (padded) vocabulary.
        targets: [...], token ids over the whole vocabulary.
        vocab: the vocabulary without padding; padded entries have probability 0.
        group: the tensor parallel group.

    Returns:
        (log-probabilities, entropies in nats), float32 (float64 for float64 logits), shaped like
        `targets`; gradients flow through both.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    log_probs, entropy = _ShardedLogProbs.apply(
        flat, targets.reshape(-1), vocab, temperature, group, chunk
    )
    return log_probs.view(targets.shape), entropy.view(targets.shape)


class _ShardedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, vocab, temperature, group, chunk):
        width = logits.shape[1]
        first = group.rank() * width
        held = max(0, min(width, vocab - first))  # the rest of this slice is padding
        log_probs, entropies, peaks, normalisers = [], [], [], []
        for part, target in zip(logits.split(chunk), targets.split(chunk), strict=True):
            scaled = _upcast(part[:, :held]) / temperature
            peak = scaled.max(dim=1).values if held else scaled.new_full((len(part),), -torch.inf)
            dist.all_reduce(peak, dist.ReduceOp.MAX, group)
            scaled -= peak[:, None]
            weights = scaled.exp()
            local = target - first
            mine = (local >= 0) & (local < held)
            chosen = scaled.new_zeros(len(part))
            if held:
                chosen = scaled.gather(1, local.clamp(0, held - 1)[:, None]).squeeze(1) * mine
            sums = torch.stack([weights.sum(1), (weights * scaled).sum(1), chosen])
            dist.all_reduce(sums, group=group)
            normaliser = sums[0].log()
            log_probs.append(sums[2] - normaliser)
            entropies.append(normaliser - sums[1] / sums[0])
            peaks.append(peak)
            normalisers.append(normaliser)
        entropy = torch.cat(entropies)
        ctx.save_for_backward(logits, targets, torch.cat(peaks), torch.cat(normalisers), entropy)
        ctx.first, ctx.held, ctx.temperature, ctx.chunk = first, held, temperature, chunk
        ctx.set_materialize_grads(False)
        return torch.cat(log_probs), entropy

    @staticmethod
    def backward(ctx, gradient, entropy_gradient):
        """With p the probabilities: d log p(y) / dx = onehot(y) - p, and
        d entropy / dx = -p (log p + entropy)."""
        logits, targets, *saved = ctx.saved_tensors
        result = torch.zeros_like(logits)
        parts = [t.split(ctx.chunk) for t in (logits, result, targets, *saved)]
        for n, (part, out, target, peak, normaliser, entropy) in enumerate(
            zip(*parts, strict=True)
        ):
            log_p = _upcast(part[:, : ctx.held]) / ctx.temperature
            log_p.sub_(peak[:, None]).sub_(normaliser[:, None])
            p = log_p.exp()
            slope = torch.zeros_like(p)
            if gradient is not None:
                g = gradient.split(ctx.chunk)[n]
                slope -= p * g[:, None]
                local = target - ctx.first
                mine = ((local >= 0) & (local < ctx.held)).nonzero().squeeze(1)
                slope[mine, local[mine]] += g[mine]
            if entropy_gradient is not None:
                g = entropy_gradient.split(ctx.chunk)[n]
                slope -= p * (log_p + entropy[:, None]) * g[:, None]
            out[:, : ctx.held] = slope / ctx.temperature
        return result, None, None, None, None, None


def _upcast(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
