"""What a run says, and whether it goes on, by how its engines agree with its trainer."""

from collections.abc import Iterable
from dataclasses import dataclass

from grpo_mcore.config import ConfigError, GroupConfig
from grpo_mcore.errors import MismatchError

UNTOUCHED = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "bad_words": None,
    "structured_outputs": None,
}
"""Settings with which the engine's log-probabilities are the model's own."""


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


def why_incomparable(config: GroupConfig) -> str | None:
    """The setting by which trainer and engine differ rightly; None where they must agree."""
    for key, plain in UNTOUCHED.items():
        value = getattr(config, key)
        if value and value != plain:
            return (
                f"{key}={value}: the engine's log-probabilities are of the tokens it leaves in, "
                "or as it penalises them, the trainer's of all tokens as they are"
            )
    return None


def check_mismatch_limits(config: GroupConfig) -> None:
    """Checks the limits, and that there is something to hold to them.

    Raises:
        ConfigError: when not.
    """
    warn, stop = config.rollout.mismatch_warn, config.rollout.mismatch_stop
    for key, value in (("mismatch_warn", warn), ("mismatch_stop", stop)):
        if value is None:
            continue
        if not (isinstance(value, int | float) and value >= 1):
            raise ConfigError(
                f"rollout.{key}={value!r}: must be a number of at least 1, which is perfect "
                "agreement"
            )
    if warn is not None and stop is not None and stop < warn:
        raise ConfigError(
            f"rollout.mismatch_stop={stop}: must be at least rollout.mismatch_warn={warn}"
        )
    if stop is not None and (reason := why_incomparable(config)):
        raise ConfigError(f"rollout.mismatch_stop={stop}: leave it out with {reason}")
