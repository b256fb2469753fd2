"""A sequence-classification model as a reward function."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import nn

from grpo_mcore import device
from grpo_mcore.data.chat import Text
from grpo_mcore.errors import ConfigError, one_line

ROWS_AT_ONCE = 16
"""Texts in one forward pass."""


class RewardModel:
    """Rewards a completion with the one logit its model gives prompt and completion together.

    The model is loaded, and moved to this process's device, when it is first asked for.
    """

    def __init__(
        self,
        key: str,
        source: str | nn.Module,
        tokenizer=None,
        chat_template_kwargs: dict | None = None,
    ):
        """
        Args:
            key: the setting `source` is the value of.
            source: a path, a hub id or a model.
            tokenizer: transformers' object; None: the one saved with the model.
            chat_template_kwargs: passed to its chat template.

        Raises:
            ConfigError: when there is no such model, or it has not exactly one label, or its
                tokenizer cannot be found or cannot pad.
        """
        from transformers import AutoConfig  # takes seconds, and few runs have a reward model

        self.source, self.chat_template_kwargs = source, chat_template_kwargs or {}
        if isinstance(source, str):
            self.where = f"{key}={source}"
            try:
                config = AutoConfig.from_pretrained(source)
            except (OSError, ValueError) as error:
                raise ConfigError(f"{self.where}: no model there: {one_line(error)}") from error
        else:
            config = source.config
            self.where = f"{key}={config._name_or_path or type(source).__name__}"
        if config.num_labels != 1:
            raise ConfigError(
                f"{self.where}: it has num_labels={config.num_labels}; a reward model is one for "
                "sequence classification with num_labels=1"
            )
        self.__name__ = config._name_or_path.rstrip("/").split("/")[-1] or type(source).__name__
        self.tokenizer = tokenizer
        if tokenizer is None:
            self.tokenizer = self._own_tokenizer(config._name_or_path)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.tokenizer.pad_token_id is None:
            raise ConfigError(f"{self.where}: its tokenizer has neither pad_token nor eos_token")

    def _own_tokenizer(self, path: str):
        from grpo_mcore.data.tokenizer import saved_tokenizer  # loads transformers

        try:
            return saved_tokenizer(path)
        except ValueError as error:
            raise ConfigError(
                f"{self.where}: it comes without a tokenizer ({error}); give one in "
                "reward_processing_classes"
            ) from error

    @cached_property
    def model(self) -> nn.Module:
        """
        Raises:
            ConfigError: when the checkpoint lacks weights, such as the head of a language model's.
        """
        from transformers import AutoModelForSequenceClassification

        model = self.source
        if isinstance(model, str):
            model, report = AutoModelForSequenceClassification.from_pretrained(
                model, num_labels=1, output_loading_info=True
            )
            lacking = sorted(report["missing_keys"])
            if lacking:
                raise ConfigError(f"{self.where}: its checkpoint lacks {', '.join(lacking)}")
        # The logit is that of the last token that is not this one.
        model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        return model.to(device.torch_device()).eval()

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        **_,
    ) -> list[float]:
        """One reward for each completion."""
        texts = [self._text(p, c) for p, c in zip(prompts, completions, strict=True)]
        parts = [texts[i : i + ROWS_AT_ONCE] for i in range(0, len(texts), ROWS_AT_ONCE)]
        return [reward for part in parts for reward in self._score(part)]

    def _text(self, prompt: Text, completion: Text) -> str:
        if isinstance(prompt, str):
            return prompt + completion
        return self.tokenizer.apply_chat_template(
            prompt + completion, tokenize=False, **self.chat_template_kwargs
        )

    @torch.inference_mode()
    def _score(self, texts: list[str]) -> list[float]:
        inputs = self.tokenizer(
            text=texts,
            return_tensors="pt",
            padding=True,
            padding_side="right",
            add_special_tokens=False,
        )
        return self.model(**inputs.to(self.model.device)).logits[:, 0].tolist()
