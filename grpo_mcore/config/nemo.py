"""NeMo RL's settings, its configuration of sections or the arguments of `from_pretrained`, in our
words (NeMo RL, "Trainer Classes"). Both go through SETTINGS."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from grpo_mcore.errors import ConfigError, unknown_key


@dataclass(frozen=True)
class Setting:
    """One setting of NeMo RL's.

    Attributes:
        ours: what it is called here.
        kind: the type of its values.
        keys: where its configuration may have it.
        argument: what `from_pretrained` calls it; None: that has no such argument.
        words: its value -> ours, where they differ.
    """

    ours: str
    kind: type
    keys: tuple[str, ...]
    argument: str | None = None
    words: Mapping[Any, Any] | None = None


_POLICY = (
    Setting("model", object, ("policy.model_name",), "model_name_or_path"),
    Setting("learning_rate", float, ("policy.learning_rate",), "learning_rate"),
    Setting("per_device_train_batch_size", int, ("policy.train_micro_batch_size",)),
    # The rest make our `layout`.
    Setting("dtensor", bool, ("policy.dtensor_cfg.enabled",)),
    Setting("tensor", int, ("policy.dtensor_cfg.tensor_parallel_size",), "tensor_parallel_size"),
    Setting("megatron", bool, ("policy.megatron_cfg.enabled",)),
    Setting("megatron_tensor", int, ("policy.megatron_cfg.tensor_model_parallel_size",)),
    Setting("megatron_pipeline", int, ("policy.megatron_cfg.pipeline_model_parallel_size",)),
)
_BATCH = Setting("batch_size", int, ("policy.train_global_batch_size",), "batch_size")


def _longest(ours: str) -> Setting:
    """Tokens of a sequence at most."""
    keys = ("policy.max_sequence_length", "policy.max_total_sequence_length")
    return Setting(ours, int, keys, "max_sequence_length")


_GROUP = (
    Setting("num_prompts_per_step", int, ("grpo.num_prompts_per_step",), "num_prompts_per_step"),
    Setting(
        "num_generations",
        int,
        ("grpo.num_generations_per_prompt",),
        "num_generations_per_prompt",
    ),
    Setting(
        "scale_rewards",
        bool,
        ("grpo.normalize_rewards",),
        "normalize_rewards",
        {True: "group", False: "none"},
    ),
    Setting(
        "advantage_estimator",
        bool,
        ("grpo.use_leave_one_out_baseline",),
        "use_leave_one_out_baseline",
        {True: "loo", False: "group"},
    ),
    Setting("max_steps", int, ("grpo.max_num_steps",)),
)
SETTINGS = {
    "grpo": (*_POLICY, *_GROUP, _longest("max_sequence_length")),
    "teacher_grpo": (*_POLICY, *_GROUP),
    "sft": (
        *_POLICY,
        _longest("max_length"),
        _BATCH,
        Setting("max_steps", int, ("sft.max_num_steps",)),
    ),
    "dpo": (
        *_POLICY,
        _longest("max_length"),
        _BATCH,
        Setting("beta", float, ("dpo.reference_policy_kl_penalty",), "beta"),
        Setting("max_steps", int, ("dpo.max_num_steps",)),
    ),
}
"""Algorithm -> its settings."""
_GROUP_DEFAULTS = {
    "num_prompts_per_step": 32,
    "num_generations": 16,
    "learning_rate": 1e-6,
    "scale_rewards": "group",
    "advantage_estimator": "loo",
}
DEFAULTS = {
    "grpo": _GROUP_DEFAULTS | {"max_sequence_length": 512},
    "teacher_grpo": _GROUP_DEFAULTS,
    "sft": {"batch_size": 32, "learning_rate": 2e-5, "max_length": 512},
    "dpo": {"batch_size": 32, "learning_rate": 1e-6, "max_length": 512, "beta": 0.1},
}
"""Algorithm -> what NeMo RL takes where a setting is not given, in our words."""


def from_nemo(config: Mapping, world_size: int, algorithm: str = "grpo") -> dict[str, Any]:
    """NeMo RL's configuration as keyword arguments of ours, and "model".

    Their `layout` has the sizes of dtensor_cfg or megatron_cfg, whichever is enabled, and as many
    data parallel ranks as the job's processes make of that.

    Args:
        config: sections "policy" and that of the algorithm.
        world_size: processes in the job.
        algorithm: one of SETTINGS.

    Raises:
        ConfigError: for an unknown key, a value of the wrong type, two keys of one setting, no
            model, or sizes that do not divide the job's processes.
    """
    places = {key: setting for setting in SETTINGS[algorithm] for key in setting.keys}
    sections = {section for key in places for section in _sections(key)}
    values = dict(_leaves(config, "", sections))
    for key in values:
        if key not in places:
            raise unknown_key(key, [*places, *sections])
    given = _translate(values, places)
    if "model" not in given:
        raise ConfigError("policy.model_name: is missing; give a model's directory or hub id")
    return DEFAULTS[algorithm] | _with_layout(given, world_size)


def from_arguments(
    arguments: Mapping[str, Any], world_size: int, algorithm: str = "grpo"
) -> dict[str, Any]:
    """The arguments of NeMo RL's `from_pretrained` as those of our configuration, and "model".
    What `from_pretrained` does not have is taken for our own and left as it is.

    Raises:
        ConfigError: as `from_nemo`.
    """
    places = {setting.argument: setting for setting in SETTINGS[algorithm] if setting.argument}
    theirs = {name: value for name, value in arguments.items() if name in places}
    ours = {name: value for name, value in arguments.items() if name not in places}
    given = _translate(theirs, places)
    for name in theirs:
        made = "layout" if places[name].ours == "tensor" else places[name].ours
        if made in ours:
            raise ConfigError(f"{made}={ours[made]}: {name} says it too; give one of them")
    if "layout" not in ours:
        given = _with_layout(given, world_size)
    if "model" not in given | ours:
        raise ConfigError("model_name_or_path: is missing; give a model's directory or hub id")
    return DEFAULTS[algorithm] | given | ours


def _sections(key: str) -> list[str]:
    """Of "a.b.c": "a" and "a.b"."""
    return [key[:place] for place, letter in enumerate(key) if letter == "."]


def _leaves(config: Mapping, prefix: str, sections: set[str]) -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    for name, value in config.items():
        key = f"{prefix}{name}"
        if key not in sections:
            yield key, value
        elif isinstance(value, Mapping):
            yield from _leaves(value, f"{key}.", sections)
        else:
            raise ConfigError(f"{key}={value!r}: is a section; give a dictionary")


def _translate(values: Mapping[str, Any], places: Mapping[str, Setting]) -> dict[str, Any]:
    given, given_by = {}, {}
    for key, value in values.items():
        setting = places[key]
        number = setting.kind is float and type(value) is int
        if not number and not (setting.kind is object or type(value) is setting.kind):
            raise ConfigError(f"{key}={value!r}: must be of type {setting.kind.__name__}")
        if setting.ours in given:
            raise ConfigError(f"{key}={value}: {given_by[setting.ours]} says it too; give one")
        given[setting.ours] = setting.words[value] if setting.words else value
        given_by[setting.ours] = key
    return given


def _with_layout(given: dict[str, Any], world_size: int) -> dict[str, Any]:
    """`given` with the layout in place of its parts."""
    parts = {"dtensor", "tensor", "megatron", "megatron_tensor", "megatron_pipeline"}
    uses_dtensor = given.get("dtensor", "tensor" in given)
    uses_megatron = given.get("megatron", bool({"megatron_tensor", "megatron_pipeline"} & {*given}))
    if uses_dtensor and uses_megatron:
        raise ConfigError("policy.megatron_cfg.enabled=True: so is policy.dtensor_cfg; enable one")
    tensor = pipeline = 1
    if uses_megatron:
        tensor, pipeline = given.get("megatron_tensor", 1), given.get("megatron_pipeline", 1)
    elif uses_dtensor:
        tensor = given.get("tensor", 1)
    if tensor < 1 or pipeline < 1 or world_size % (tensor * pipeline):
        raise ConfigError(
            f"tensor_parallel_size={tensor}, pipeline_model_parallel_size={pipeline}: their "
            f"product must divide the job's processes, {world_size}"
        )
    layout = f"{tensor}x{pipeline}x{world_size // (tensor * pipeline)}"
    return {name: value for name, value in given.items() if name not in parts} | {"layout": layout}
