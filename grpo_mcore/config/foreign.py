"""Settings of transformers and TRL that scripts bring along and that have nothing to set here."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from grpo_mcore.errors import ConfigError

ANY = object()
"""Every value is as good."""
OF_TRAINING = {
    "remove_unused_columns": ANY,
    "per_device_eval_batch_size": ANY,
    "dataloader_num_workers": ANY,
    "dataloader_pin_memory": ANY,
    "dataloader_prefetch_factor": ANY,
    "dataset_num_proc": ANY,
    "gradient_checkpointing_kwargs": ANY,
    "disable_tqdm": ANY,
    "log_level": ANY,
    "logging_first_step": ANY,
    "ddp_find_unused_parameters": ANY,
    "ddp_timeout": ANY,
    "fp16": (False,),
    "tf32": (None, False),
    "torch_compile": (False,),
    "group_by_length": (False,),
    "auto_find_batch_size": (False,),
    "load_best_model_at_end": (False,),
    "save_only_model": (False,),
    "save_safetensors": (True,),
    "hub_strategy": ("end",),
    "deepspeed": (None,),
    "fsdp": (None, "", False),
    "use_liger_kernel": (False,),
    "neftune_noise_alpha": (None,),
    "disable_dropout": ANY,
}
"""Name -> the values that say what is so here anyway."""
OF_GRPO = {
    "ds3_gather_for_generation": ANY,
    "log_unique_prompts": ANY,
    "vllm_enable_sleep_mode": ANY,
    "vllm_model_impl": ("vllm", "auto"),
    "use_transformers_paged": (False,),
    "cache_implementation": (None,),
    "cast_lm_head_to_fp32": (False,),
}
OF_SFT = {
    "loss_type": ("nll",),
    "padding_free": (False,),
    "packing_strategy": ("bfd",),
    "eval_packing": (None, False),
    "dataset_kwargs": (None, {}),
}
OF_DPO = {
    "loss_type": ("sigmoid", ["sigmoid"]),
    "precompute_ref_log_probs": ANY,
    "reference_free": (False,),
    "padding_free": (False,),
    "f_divergence_type": ("reverse_kl",),
}


def accepts(values: Mapping[str, Any]) -> Callable[[type], type]:
    """A decorator of a configuration: its constructor also takes settings that are not its own, if
    they have one of `values`.

    Raises:
        ConfigError: by the constructor, for another value.
    """

    def decorate(config: type) -> type:
        construct = config.__init__

        @functools.wraps(construct)
        def __init__(self, *arguments, **settings):
            for name in values.keys() & settings.keys():
                value, allowed = settings.pop(name), values[name]
                if allowed is not ANY and value not in allowed:
                    raise ConfigError(
                        f"{name}={value}: is not supported; leave it out, or set "
                        f"{' or '.join(map(repr, allowed))}"
                    )
            construct(self, *arguments, **settings)

        config.__init__ = __init__
        return config

    return decorate
