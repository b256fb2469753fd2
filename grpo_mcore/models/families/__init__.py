"""One module per model family: `shape(hf, where)` maps its config.json, `rules(shape, fused_norms)`
maps its weights. To add a family, write the module and name it here."""

from grpo_mcore.models.families import llama, qwen2, qwen3

FAMILIES = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3}
