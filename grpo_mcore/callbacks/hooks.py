"""The three kinds of hooks, each behind one `call`."""

import inspect
from collections.abc import Callable, Iterable

from transformers import TrainerCallback

from grpo_mcore.errors import ConfigError


class Callback:
    """NeMo RL's hooks (NeMo RL, "Trainer Classes"): override the ones needed.

    Steps are counted from 1, the same number at a step's begin and end; epochs from 0.
    """

    def on_train_begin(self, trainer): ...

    def on_step_begin(self, trainer, step): ...

    def on_step_end(self, trainer, step, metrics): ...

    def on_epoch_end(self, trainer, epoch, metrics): ...

    def on_train_end(self, trainer, result):
        """`result` is a grpo_mcore.report.result.TrainingResult."""


def _events_of(kind: type) -> set[str]:
    return {name for name in dir(kind) if name.startswith("on_")}


NEMO_EVENTS = _events_of(Callback)
TRANSFORMERS_EVENTS = _events_of(TrainerCallback)
NEVER_CALLED = {"on_substep_end", "on_pre_optimizer_step", "on_optimizer_step"}
"""They lie inside Megatron's schedule and optimizer."""
OBJECTS = (
    "model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader",
    "eval_dataloader",
)  # fmt: skip
"""What transformers gives to every event by name."""
DETAILS = {"on_log": ("logs",), "on_evaluate": ("metrics",), "on_predict": ("metrics",)}
"""What it gives to some events beside."""


class NemoHooks:
    """Calls a callback as NeMo RL does."""

    def __init__(self, callback):
        self.callback = callback
        events = _events_of(callback)
        for event in sorted(events & TRANSFORMERS_EVENTS - NEMO_EVENTS):
            raise ConfigError(
                f"callbacks={_name(callback)}: {event} is none of NeMo RL's hooks, "
                f"{_listed(NEMO_EVENTS)}"
            )
        for event in sorted(events & NEMO_EVENTS):
            wanted = inspect.signature(getattr(Callback, event)).parameters
            _check_takes(callback, event, list(wanted)[1:])

    def call(self, event: str, runner, values: tuple, details: dict) -> None:
        hook = getattr(self.callback, event, None)
        if hook and event in NEMO_EVENTS:
            hook(runner.trainer, *values)


class TransformersHooks:
    """Calls a callback as transformers.Trainer does. It may have some of the events only."""

    def __init__(self, callback):
        self.callback = callback
        for event in sorted(_events_of(callback) & TRANSFORMERS_EVENTS):
            if event in NEVER_CALLED and _overrides(callback, event):
                raise ConfigError(
                    f"callbacks={_name(callback)}: {event} is never called here; use on_step_begin "
                    "or on_step_end"
                )
            _check_takes_control(callback, event)

    def call(self, event: str, runner, values: tuple, details: dict):
        hook = getattr(self.callback, event, None)
        if hook:
            return _call_with_control(hook, runner, details)


class TrainerHooks:
    """Calls the methods a trainer's subclass may define (ATLAS, "Training Hooks"):
    on_epoch_begin(self), on_step_end and on_evaluate(self, args, state, control, **kwargs)."""

    def __init__(self, trainer):
        self.callback = trainer
        if hasattr(trainer, "on_epoch_begin"):
            _check_takes(trainer, "on_epoch_begin", ())
        for event in ("on_step_end", "on_evaluate"):
            if hasattr(trainer, event):
                _check_takes_control(trainer, event)

    def call(self, event: str, runner, values: tuple, details: dict):
        hook = getattr(self.callback, event, None)
        if hook and event == "on_epoch_begin":
            hook()
        elif hook and event in ("on_step_end", "on_evaluate"):
            return _call_with_control(hook, runner, details)


def hooks_of(callback) -> NemoHooks | TransformersHooks:
    """The hooks of a callback, or of one made of a class. One that inherits from neither
    library's class is NeMo's if its methods take a trainer, and transformers' if they take
    (args, state, control, **kwargs).

    Raises:
        ConfigError: naming the callback, and the method that could never be called.
    """
    if isinstance(callback, type):
        callback = callback()
    if isinstance(callback, TrainerCallback):
        return TransformersHooks(callback)
    if isinstance(callback, Callback):
        return NemoHooks(callback)
    events = sorted(_events_of(callback) & (TRANSFORMERS_EVENTS | NEMO_EVENTS))
    if not events:
        raise ConfigError(
            f"callbacks={_name(callback)}: has none of the methods of NeMo RL's Callback "
            f"({_listed(NEMO_EVENTS)}) or transformers.TrainerCallback "
            f"({_listed(TRANSFORMERS_EVENTS - NEVER_CALLED)})"
        )
    kinds = {event: _kind(getattr(callback, event)) for event in events}
    if len(set(kinds.values())) > 1:
        mine = {event for event in events if kinds[event] is NemoHooks}
        raise ConfigError(
            f"callbacks={_name(callback)}: takes a trainer in {_listed(mine)} but "
            f"(args, state, control, **kwargs) in {_listed(set(events) - mine)}"
        )
    return kinds[events[0]](callback)


def _kind(hook: Callable) -> type:
    parameters = list(inspect.signature(hook).parameters.values())
    first = parameters[0].name if parameters else ""
    takes_names = any(p.kind is p.VAR_KEYWORD for p in parameters)
    is_transformers = first == "args" or (takes_names and first != "trainer")
    return TransformersHooks if is_transformers else NemoHooks


def _call_with_control(hook: Callable, runner, details: dict):
    return hook(runner.args, runner.state, runner.control, **runner.objects, **details)


def _check_takes_control(owner, event: str) -> None:
    names = OBJECTS + DETAILS.get(event, ())
    _check_takes(owner, event, ("args", "state", "control"), names)


def _check_takes(owner, event: str, values: Iterable[str], names: Iterable[str] = ()) -> None:
    """Raises ConfigError where the event could not be called with `values` by place and `names`
    by name."""
    signature = inspect.signature(getattr(owner, event))
    try:
        signature.bind(*values, **dict.fromkeys(names))
    except TypeError:
        wanted = ", ".join([*values, *["**kwargs"] * bool(names)])
        raise ConfigError(f"{_name(owner)}.{event}{signature}: has to take ({wanted})") from None


def _overrides(callback, event: str) -> bool:
    base = getattr(TrainerCallback, event)
    return getattr(type(callback), event, base) is not base


def _name(callback) -> str:
    return type(callback).__name__


def _listed(events: set[str]) -> str:
    return ", ".join(sorted(events))
