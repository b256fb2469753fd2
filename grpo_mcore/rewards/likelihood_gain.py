"""How much a teaching helps, as the student's own model sees it: dense where accuracy is sparse."""

from collections.abc import Sequence

from grpo_mcore.errors import ConfigError


class LikelihoodGainReward:
    """With x the question, t the teaching, y the reference answer with the token that ends it, and
    p the frozen student:

        gain = log p(y | prompt with x and t) - log p(y | prompt with x alone)

    in nats, divided by the tokens of y unless `gain_per_token` is False. Above 0 the teaching has
    made the reference answer likelier. The prompts are those that the student is asked with
    (`templates.with_teaching`, `templates.baseline`), in its chat template; y is the dataset's
    `data.reference_column`, or the final answer in `templates.reference`.
    """

    def __init__(self, gain_per_token: bool = True, gain_clip: float | None = None):
        """
        Args:
            gain_per_token: the mean over the tokens of the reference, so that long references do
                not outweigh short ones; False: the sum.
            gain_clip: the reward is kept within -gain_clip and gain_clip; None: as it is.

        Raises:
            ConfigError: for a clip that is not above 0.
        """
        if gain_clip is not None and gain_clip <= 0:
            raise ConfigError(f"gain_clip={gain_clip}: must be above 0, or None")
        self.gain_per_token, self.gain_clip = gain_per_token, gain_clip

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        *,
        likelihood_gains: Sequence[float | None],
        reference_tokens: Sequence[int],
        **_,
    ) -> list[float | None]:
        """One reward for each completion; None where the question has no reference.

        Args:
            likelihood_gains: in nats, of the whole reference.
            reference_tokens: what each reference has, its end included.
        """
        return [
            None if gain is None else self.reward(gain, tokens)
            for gain, tokens in zip(likelihood_gains, reference_tokens, strict=True)
        ]

    def reward(self, gain: float, tokens: int) -> float:
        """Of a gain in nats over so many tokens, at least one."""
        value = gain / tokens if self.gain_per_token else gain
        if self.gain_clip is None:
            return value
        return max(-self.gain_clip, min(self.gain_clip, value))
