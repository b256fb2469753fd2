"""What a run says, and whether it goes on, by how its engines agree with its trainer."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from grpo_mcore.config import GroupConfig
from grpo_mcore.errors import MismatchError
from grpo_mcore.preflight.settings import SAMPLES_FROM_REFERENCE, why_incomparable


@dataclass(frozen=True, order=True)
class HandOver:
    """What sampled a generation.

    Attributes:
        engine: the version all engines were proven to hold then, by checksums of what was sent.
        trainer: the policy's version then, whose log-probabilities are compared with theirs.
        tensors: how many the newest sync before it had sent and proven.
        model: whose version `engine` is: the trainer's, or the reference of so many updates.
    """

    engine: int
    trainer: int
    tensors: int
    model: str = "trainer"

    @property
    def is_proven(self) -> bool:
        return self.engine == self.trainer


def verdict(hand_overs: Iterable[HandOver], mismatch: float | None, is_high: bool) -> str:
    """One line on the samples of a step.

    Args:
        hand_overs: of the step's generations.
        mismatch: `sampling/mismatch` of the step; None where no token could be compared.
        is_high: it is above the limit.
    """
    known = sorted(set(hand_overs))
    is_proven = all(h.is_proven for h in known)
    tensors = known[-1].tensors
    proof = f"0 of {tensors} tensors differ" if is_proven else f"{tensors} tensors not proven"
    measured = "not measured" if mismatch is None else f"{mismatch:#.5g}"
    versions = [
        f"engine {h.engine} {'=' if h.is_proven else '!='} {h.model} {h.trainer}" for h in known
    ]
    state = "ok" if is_proven and not is_high else "in doubt"
    return f"sync {state}: {proof}, mismatch {measured}, {', '.join(versions)}"


class MismatchLimits:
    """`rollout.mismatch_warn` and `rollout.mismatch_stop`, of which only the crossings are told."""

    def __init__(self, warn: float | None, stop: float | None):
        self.warn, self.stop = warn, stop
        self.was_high = False

    @classmethod
    def of(cls, config: GroupConfig, samples_from_reference: bool) -> tuple[Self, str | None]:
        """Those of `config`; none where trainer and engines differ rightly, which a line for the
        user says if there was one to warn of."""
        rollout, reason = config.rollout, why_incomparable(config)
        if samples_from_reference:
            reason = SAMPLES_FROM_REFERENCE
        if reason is None:
            return cls(rollout.mismatch_warn, rollout.mismatch_stop), None
        warn = rollout.mismatch_warn
        note = None if warn is None else f"rollout.mismatch_warn={warn} is off with {reason}"
        return cls(None, None), note

    def is_high(self, mismatch: float | None) -> bool:
        """Whether it is above the first limit; what is not a number is."""
        limits = [limit for limit in (self.warn, self.stop) if limit is not None]
        return bool(limits) and mismatch is not None and not mismatch <= min(limits)

    def judge(self, step: int, mismatch: float | None) -> str | None:
        """A warning, if `mismatch` has come above the limit with this step.

        Raises:
            MismatchError: when it is above `stop`.
        """
        if mismatch is not None and self.stop is not None and not mismatch <= self.stop:
            raise MismatchError(
                f"step {step}: sampling/mismatch is {mismatch:#.5g}, above "
                f"rollout.mismatch_stop={self.stop}: {ADVICE}"
            )
        crossed = self.is_high(mismatch) and not self.was_high
        self.was_high = self.is_high(mismatch)
        if not crossed:
            return None
        return (
            f"warning: step {step}: sampling/mismatch is {mismatch:#.5g}, above "
            f"rollout.mismatch_warn={self.warn}: {ADVICE}"
        )


ADVICE = (
    "trainer and engine give the same tokens other probabilities; "
    "python tools/diagnose_mismatch.py MODEL names the first module that differs (with "
    "adapters, merge them first: docs/trainers.md, Adapters)"
)
