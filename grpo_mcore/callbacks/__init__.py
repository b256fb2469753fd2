"""What a user hangs into a run: NeMo RL's callbacks, transformers' callbacks and methods of the
trainer itself, all called by one runner. Knows nothing of models or torch.distributed."""

from grpo_mcore.callbacks.hooks import Callback
from grpo_mcore.callbacks.runner import CallbackRunner

__all__ = ["Callback", "CallbackRunner"]
