"""What was sampled, as it is trained on and rewarded."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_mcore.data.chat import Text
from grpo_mcore.rollout.requests import Completion


@dataclass(frozen=True)
class Sample:
    """A prompt and what followed it, in one turn or several.

    Attributes:
        log_probs: of the tokens as they were sampled; anything where `mask` is 0.
        finished: False where a limit cut it off.
        mask: 1 for each token the model wrote, 0 for those of tools and environments; None: all 1.
    """

    prompt: list[int]
    tokens: list[int]
    log_probs: list[float]
    finished: bool
    mask: list[int] | None = None

    @classmethod
    def of(cls, prompt: list[int], completion: Completion) -> "Sample":
        return cls(prompt, completion.tokens, completion.log_probs, completion.finished)


@dataclass(frozen=True)
class Rollouts:
    """Samples, those of a group side by side, with what reward functions are told of each.

    Attributes:
        prompts, completions: as text or messages.
        columns: the dataset's, and what the rollout adds, one entry a sample.
        lessons: of a teacher, what each sample has taught; else empty.
        metrics: of the whole.
    """

    samples: list[Sample]
    prompts: list[Text]
    completions: list[Text]
    columns: dict[str, list]
    lessons: list = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    def rows(self, numbers: list[int]) -> "Rollouts":
        """Those of the samples `numbers`."""

        def pick(values: list) -> list[Any]:
            return [values[number] for number in numbers]

        return Rollouts(
            pick(self.samples),
            pick(self.prompts),
            pick(self.completions),
            {name: pick(values) for name, values in self.columns.items()},
            pick(self.lessons) if self.lessons else [],
            self.metrics,
        )

    def __add__(self, other: "Rollouts") -> "Rollouts":
        return Rollouts(
            self.samples + other.samples,
            self.prompts + other.prompts,
            self.completions + other.completions,
            {name: values + other.columns[name] for name, values in self.columns.items()},
            self.lessons + other.lessons,
            self.metrics | other.metrics,
        )


def length_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Tokens that the model wrote in completions, and in those that ended by themselves."""
    lengths = [len(s.tokens) if s.mask is None else sum(s.mask) for s in samples]
    ended = [n for n, sample in zip(lengths, samples, strict=True) if sample.finished] or [0]
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/mean_terminated_length": sum(ended) / len(ended),
        "completions/min_terminated_length": float(min(ended)),
        "completions/max_terminated_length": float(max(ended)),
        "completions/clipped_ratio": sum(not s.finished for s in samples) / len(samples),
    }
