"""Names of metrics: TRL's, and beside them the names the other documents use."""

import re

ALIASES = {
    "reward": ("rewards/mean", "mean_reward"),
    "kl": ("kl_divergence",),
    "completions/mean_length": ("completion_length",),
}
"""TRL's name -> ATLAS's ("Training Hooks", and its trainer's logs) and NeMo RL's (mean_reward)."""


def with_aliases(metrics: dict[str, float]) -> dict[str, float]:
    """`metrics` and, after them, their aliases; also `rewards/NAME` for `rewards/NAME/mean`, one
    reward function's (ATLAS). The same with the prefix "eval_". An alias that is already there
    stays as it is."""
    of_functions, of_all = {}, {}
    for name, value in metrics.items():
        prefix = "eval_" if name.startswith("eval_") else ""
        bare = name.removeprefix(prefix)
        of_all |= {prefix + alias: value for alias in ALIASES.get(bare, ())}
        if re.fullmatch("rewards/.+/mean", bare):
            of_functions[name.removesuffix("/mean")] = value
    aliases = of_functions | of_all  # "rewards/mean" is all functions', even where one is "mean"
    return metrics | {name: aliases[name] for name in aliases if name not in metrics}
