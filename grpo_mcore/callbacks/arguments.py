"""A trainer's configuration as transformers' callbacks read it."""

import json
from dataclasses import asdict, fields, is_dataclass
from types import SimpleNamespace

FALLBACKS = {
    "logging_strategy": "steps",
    "logging_first_step": False,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 0,
    "eval_delay": 0,
    "save_strategy": "steps",
    "save_steps": 0,
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "greater_is_better": True,
    "run_name": None,
}
"""What transformers' own callbacks and trackers read from their `args`, for a configuration that
has no such field."""


class CallbackArguments(SimpleNamespace):
    """The fields of a configuration (a dataclass), as they are now, and FALLBACKS."""

    def __init__(self, config):
        own = {field.name: getattr(config, field.name) for field in fields(config)}
        super().__init__(**FALLBACKS | own)

    def to_dict(self) -> dict:
        """All fields. As in transformers, those named `*_token` are secrets and do not show."""
        return {
            name: f"<{name.upper()}>"
            if name.endswith("_token")
            else asdict(value)
            if is_dataclass(value)
            else value
            for name, value in vars(self).items()
        }

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, default=str)
