"""The vLLM servers of a role, asked before models load."""

from grpo_mcore.config import ConfigError, ModelConfig, RolloutConfig
from grpo_mcore.models.families import shape_of
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.rollout.engine import EngineError
from grpo_mcore.rollout.server import describe, misfit
from grpo_mcore.rollout.spec import TEXTS


def check_servers(
    role: str,
    rollout: RolloutConfig,
    model: ModelConfig,
    shape: ModelShape,
    max_model_len: int,
    with_tokenizer: bool,
) -> None:
    """Asks the servers of `role`, if there are any, whether they are up and suit a model of
    `shape`, sequences of `max_model_len` tokens and (`with_tokenizer`) requests in text.

    Raises:
        ConfigError: for the first that does not.
    """
    for url in getattr(rollout, f"{role}_servers"):
        key = f"rollout.{role}_servers={url}"
        try:
            found = describe(url)
        except EngineError as error:
            raise ConfigError(f"{key}: {error}") from error
        if reason := misfit(found, max_model_len, model.dtype):
            raise ConfigError(f"{key}: {reason}")
        if with_tokenizer and not found["has_tokenizer"]:
            raise ConfigError(f"{key}: has no tokenizer, which {' and '.join(TEXTS)} need")
        other = shape_of(found["shape"], f"{key}: its model")
        if other != shape:
            named = next(n for n in vars(shape) if getattr(shape, n) != getattr(other, n))
            raise ConfigError(
                f"{key}: serves a model whose {named} is {getattr(other, named)}; that of "
                f"{model.path} is {getattr(shape, named)}"
            )
