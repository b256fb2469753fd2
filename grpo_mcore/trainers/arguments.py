"""What trainers are given, in the words of several libraries."""

from collections.abc import Mapping
from dataclasses import replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR

from grpo_mcore.config import ConfigError, TrainingConfig
from grpo_mcore.config.lora import read_lora_config
from grpo_mcore.config.nemo import SETTINGS, from_nemo
from grpo_mcore.errors import unknown_key
from grpo_mcore.models.sources import local_model
from grpo_mcore.parallel.world import world_size

UNSET = "???"


def either(name: str, value: Any, alias: str, other: Any) -> Any:
    """The value given under one of two names of the same argument.

    Raises:
        TypeError: when it is given under both.
    """
    if value is not None and other is not None:
        raise TypeError(f"{name} and {alias} are two names of one argument; give one of them")
    return other if value is None else value


def read_settings(
    model: Any, args: TrainingConfig | None, kind: type[TrainingConfig], algorithm: str
) -> tuple[Any, TrainingConfig]:
    """The model and the configuration that a constructor was given.

    Args:
        model: may also be what `args` would be, or NeMo RL's whole configuration of `algorithm`.
        args: None: a `kind` with its defaults.

    Raises:
        ConfigError: for what NeMo RL's configuration cannot have.
        TypeError: when two configurations are given.
    """
    if args is not None and isinstance(model, Mapping | TrainingConfig):
        raise TypeError("model is a whole configuration; args is another: give one of them")
    if isinstance(model, TrainingConfig):
        return None, model
    if isinstance(model, Mapping):
        settings = from_nemo(model, world_size(), algorithm)
        return settings.pop("model"), kind(**settings)
    return model, kind() if args is None else args


def split_arguments(
    trainer: type, config: type, algorithm: str, given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of what `from_pretrained` is given, what makes the configuration, by its own names or NeMo
    RL's, and the arguments of the constructor of `trainer`.

    Raises:
        ConfigError: for a name that is neither.
    """
    settings = {setting.argument for setting in SETTINGS[algorithm]} | {
        *signature(config).parameters
    }
    by_name = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    parameters = (
        p for kind in trainer.__mro__ for p in signature(kind.__init__).parameters.values()
    )
    arguments = {p.name for p in parameters if p.kind in by_name}
    arguments -= {"self", "model", "args", "config"}
    for name in given:
        if name not in settings | arguments:
            raise unknown_key(name, settings - {None} | arguments)
    return (
        {name: value for name, value in given.items() if name in settings},
        {name: value for name, value in given.items() if name not in settings},
    )


def check_kind(args: Any, *kinds: type) -> None:
    """Raises ConfigError when `args` is a configuration of none of `kinds`."""
    if not isinstance(args, kinds):
        names = " or ".join(f"grpo_mcore.{kind.__name__}" for kind in kinds)
        raise ConfigError(f"args={type(args).__name__}: give a {names}")


def with_model(
    args: TrainingConfig,
    model: Any,
    tokenizer: Any,
    section: str = "model",
    revision: str | None = None,
) -> TrainingConfig:
    """`args` whose `section` names the directory of `model`: a path, a hub id or a transformers
    model; None: what the section says is one.

    Raises:
        ConfigError: when there is no such model, or the section names another.
    """
    held = getattr(args, section)
    if model is None:
        model = held.path
    elif held.path not in (UNSET, model):
        raise ConfigError(f"{section}.path={held.path}: model={model} is another; give one of them")
    if model == UNSET:
        raise ConfigError(f"{section}=None: give a path, a hub id or a transformers model")
    directory = Path(args.output_dir) / "models" / section
    revision = getattr(args, "revision", revision)
    path = local_model(section, model, directory, revision, tokenizer)
    return replace(args, **{section: replace(held, path=path)})


def with_adapters(args: TrainingConfig, peft_config: Any) -> TrainingConfig:
    """`args` with the adapters that the argument `peft_config` asks for.

    Raises:
        ConfigError: for options that are not supported, or given twice.
    """
    if peft_config is None:
        peft_config = args.peft_config
    elif args.peft_config is not None:
        raise ConfigError("peft_config: args.peft_config says it already; give one of them")
    if peft_config is None:
        return args
    return replace(args, peft_config=read_lora_config("peft_config", peft_config))


def with_optimizers(args: TrainingConfig, optimizers: tuple) -> tuple[TrainingConfig, Any]:
    """`args` with the settings of a torch optimizer, which Megatron's own then has; and a function
    from steps made to a factor of the learning rate, None without a scheduler.

    Args:
        optimizers: (torch.optim.AdamW or None, LambdaLR or None), of which the parameters are of no
            account: they are not those that are trained.

    Raises:
        ConfigError: for others.
    """
    optimizer, scheduler = optimizers
    if optimizer is not None:
        name = type(optimizer).__name__
        if type(optimizer) not in (AdamW, Adam) or optimizer.defaults.get("amsgrad"):
            raise ConfigError(
                f"optimizers[0]={name}: Megatron trains with AdamW; give torch.optim.AdamW, or the "
                "settings learning_rate, adam_beta1, adam_beta2, adam_epsilon, weight_decay"
            )
        if type(optimizer) is Adam and optimizer.defaults["weight_decay"]:
            raise ConfigError(
                "optimizers[0]=Adam: its weight decay is not AdamW's; give torch.optim.AdamW"
            )
        if len(optimizer.param_groups) > 1:
            raise ConfigError(
                f"optimizers[0]={name}: has {len(optimizer.param_groups)} parameter groups; one "
                "is supported"
            )
        group = optimizer.param_groups[0]
        args = replace(
            args,
            learning_rate=group.get("initial_lr", group["lr"]),
            adam_beta1=group["betas"][0],
            adam_beta2=group["betas"][1],
            adam_epsilon=group["eps"],
            weight_decay=group["weight_decay"],
        )
    if scheduler is None:
        return args, None
    if not isinstance(scheduler, LambdaLR):
        raise ConfigError(
            f"optimizers[1]={type(scheduler).__name__}: give a torch LambdaLR (transformers' "
            "get_..._schedule functions make them), or lr_scheduler_type and warmup_steps"
        )
    return args, scheduler.lr_lambdas[0]
