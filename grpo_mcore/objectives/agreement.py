"""How closely the trainer's log-probabilities agree with the rollout engine's."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from grpo_mcore.objectives.metrics import effective_size_of, mean_of

PLACES = (0, 16, 64, 256, 1024, 4096, 16384, 65536)
"""Where the ranges of positions begin that are also reported apart. Powers of four, whatever a
run's longest completion, so that runs compare; the last range has no end."""


def agreement(log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Metrics of a part's sampled tokens, as `metrics.combine` wants them; a NaN of the engine (it
    could not tell) is left out, and a part without tokens has none.

    With r = p_trainer / p_engine of a sampled token: `mismatch` is the mean of exp(|log r|), 1 when
    both agree; `rollout_kl` the mean of r - 1 - log r, the k3 estimate of KL(engine || trainer)
    (http://joschu.net/blog/kl-approx.html); `max` the largest |log r|; `ratio` the mean of r; `ess`
    the effective sample size of weights r, as a share of the tokens. "at_16-63/mismatch" is the
    same of the tokens that come 16 to 63 tokens after the first one the model wrote.

    Args:
        log_probs, rollout_log_probs, mask: [sequences, tokens].
    """
    known = (mask > 0) & ~rollout_log_probs.isnan()
    gap = (log_probs - rollout_log_probs).double()
    found = _measure(gap, known)
    for name, there in _places(mask):
        found |= {f"at_{name}/{key}": value for key, value in _measure(gap, known & there).items()}
    return found


def _measure(gap: Tensor, known: Tensor) -> dict[str, Tensor]:
    if not known.any():
        return {}
    gap = gap.where(known, 0.0)
    return {
        "mismatch": mean_of(gap.abs().exp(), known),
        "rollout_kl": mean_of(torch.expm1(gap) - gap, known),
        "max": gap.abs().max(),
        "ratio": mean_of(gap.exp(), known),
        "ess": effective_size_of(gap.exp(), known),
    }


def _places(mask: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Ranges of positions in the completion: name, and which tokens lie there."""
    first = (mask > 0).int().argmax(1, keepdim=True)
    position = torch.arange(mask.shape[1], device=mask.device) - first
    for start, end in pairwise((*PLACES, None)):
        if end is None:
            yield f"{start}-", position >= start
        else:
            yield f"{start}-{end - 1}", (position >= start) & (position < end)
