"""What GRPO optimises: every setting of its advantages, corrections and loss.

Names and defaults are TRL's (1.16) where TRL has the setting, but for `beta`. docs/objectives.md
has the formulas.
"""

from dataclasses import dataclass

from grpo_mcore.config.bounds import choice, number, numbers
from grpo_mcore.errors import ConfigError

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3")
SCALES = ("group", "batch", "none")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
ADVANTAGE_ESTIMATORS = ("group", "loo")
CORRECTION_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass
class ObjectiveConfig:
    """Settings of the GRPO family; a trainer's configuration can inherit from it."""

    loss_type: str = choice("dapo", LOSS_TYPES)
    """One of LOSS_TYPES."""
    importance_sampling_level: str = choice("token", IMPORTANCE_SAMPLING_LEVELS)
    """"token", or "sequence": one ratio a sequence (GSPO)."""
    epsilon: float = number(0.2, least=0)
    """The ratio is clipped below 1 - epsilon."""
    epsilon_high: float | None = number(None, least=0)
    """And above 1 + epsilon_high; None: epsilon. Of "cispo" it is the cap itself, such as 5.0."""
    delta: float | None = number(None, above=0)
    """Caps the ratio where the advantage is negative, too (two-sided clipping)."""
    sapo_temperature_pos: float = number(1.0, above=0)
    sapo_temperature_neg: float = number(1.05, above=0)
    """Of tokens whose advantage is not positive."""
    vespo_k_pos: float = number(2.0, above=0)
    vespo_lambda_pos: float = number(3.0, above=0)
    vespo_k_neg: float = number(3.0, above=0)
    vespo_lambda_neg: float = number(2.0, above=0)

    beta: float = number(0.04, least=0)
    """Weight of the KL divergence from the reference model; 0: no reference model."""
    kl_estimator: str = choice("k3", KL_ESTIMATORS)
    """"k1", "k2" or "k3" (http://joschu.net/blog/kl-approx.html)."""
    use_bias_correction_kl: bool = True
    """Multiply the KL in the loss by the importance ratio."""
    use_kl_in_reward: bool = False
    """Take the KL from the reward and not into the loss; "k1" is the estimator for it."""

    entropy_coef: float = number(0.0)
    """Weight of the mean entropy, which the loss is lowered by (below 0: raised); the first one, if
    adaptive."""
    use_adaptive_entropy: bool = False
    entropy_coef_min: float = number(0.0)
    entropy_coef_max: float = number(1.0)
    entropy_coef_delta: float = number(0.005, least=0)
    """The step by which the adaptive coefficient moves."""
    entropy_target: float = number(0.2, least=0)
    """Nats; the adaptive coefficient applies at or below it."""
    top_entropy_quantile: float = number(1.0, least=0, most=1)
    """Share of the tokens, those of highest entropy, that the policy term counts."""

    off_policy_mask_threshold: float | None = number(None, above=0)
    """Sequences of negative advantage further than this (nats a token) from what sampled them
    leave the policy term."""
    mask_truncated_completions: bool = False
    """Leave completions that were cut off out of the loss; they stay in the advantages."""
    vllm_importance_sampling_correction: bool = True
    """Weigh tokens by how likelier they are in the trainer than in the engine."""
    vllm_importance_sampling_mode: str = choice("sequence_mask", CORRECTION_MODES)
    """One of CORRECTION_MODES: a ratio a token or a sequence; brought into bounds or set to 0."""
    vllm_importance_sampling_clip_max: float | None = number(3.0, above=0)
    vllm_importance_sampling_clip_min: float | None = number(None, least=0)

    advantage_estimator: str = choice("group", ADVANTAGE_ESTIMATORS)
    """"group": the baseline is the group's mean; "loo": the mean of the group's others."""
    scale_rewards: str = choice("group", SCALES)
    """The standard deviation advantages are divided by: "group", "batch" or "none"."""
    multi_objective_aggregation: str = choice("sum_then_normalize", AGGREGATIONS)
    """"sum_then_normalize", or "normalize_then_sum": each reward by itself first (GDPO)."""
    reward_weights: list[float] | None = numbers(None)
    """One a reward function; None: 1 each."""


def check_objective(config: ObjectiveConfig) -> None:
    """Raises ConfigError for settings that cannot work together."""
    if config.entropy_coef_min > config.entropy_coef_max:
        raise ConfigError(
            f"entropy_coef_min={config.entropy_coef_min}: must be at most "
            f"entropy_coef_max={config.entropy_coef_max}"
        )
    if config.loss_type == "cispo" and config.epsilon_high is None:
        raise ConfigError(
            "epsilon_high=None: with loss_type=cispo it is the ratio's cap itself; set one above "
            "1, such as 5.0"
        )
    if config.use_kl_in_reward and config.multi_objective_aggregation == "normalize_then_sum":
        raise ConfigError(
            "use_kl_in_reward=True: has no scale beside rewards that are each normalised; choose "
            "multi_objective_aggregation=sum_then_normalize, or the KL in the loss"
        )
    if config.vllm_importance_sampling_correction:
        _check_correction(config)


def _check_correction(config: ObjectiveConfig) -> None:
    mode = config.vllm_importance_sampling_mode
    low = config.vllm_importance_sampling_clip_min
    high = config.vllm_importance_sampling_clip_max
    if config.loss_type == "vespo" and mode.startswith("sequence"):
        raise ConfigError(
            f"vllm_importance_sampling_mode={mode}: loss_type=vespo corrects token by token; "
            "choose one of token_truncate, token_mask"
        )
    if low is None and high is None and mode.endswith("truncate"):
        raise ConfigError(
            f"vllm_importance_sampling_clip_max=None: vllm_importance_sampling_mode={mode} needs "
            "it, or vllm_importance_sampling_clip_min"
        )
    if low is not None and high is not None and low >= high:
        raise ConfigError(
            f"vllm_importance_sampling_clip_min={low}: must be below "
            f"vllm_importance_sampling_clip_max={high}"
        )
