"""What a chat template puts between two turns of the model."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from grpo_mcore.data.chat import encode
from grpo_mcore.data.prompts import encode_prompt
from grpo_mcore.errors import ConfigError


def tokens_between(
    tokenizer: PreTrainedTokenizerBase, end: int, messages: Sequence[dict], **template
) -> list[int]:
    """The tokens from the end of the model's turn to where its next begins: the rest of its turn's
    end, `messages`, the beginning of the next turn.

    They are cut from a short made-up conversation (GRPOTrainer._get_tool_suffix_ids of TRL), so
    that nothing the model wrote is tokenised anew, nor rendered otherwise now that it is not last.

    Args:
        end: the token that ended the model's turn.
        template: further arguments of the chat template.

    Raises:
        ConfigError: when the chat template refuses the messages, or nothing tells where in it a
            turn ends.
    """
    spoken = {"role": "assistant", "content": "-"}
    # Some templates take the name in a tool's answer from the call.
    names = [message["name"] for message in messages if message["role"] == "tool"]
    if names:
        calls = [{"type": "function", "function": {"name": n, "arguments": {}}} for n in names]
        spoken = {"role": "assistant", "content": "", "tool_calls": calls}
    begun = [{"role": "user", "content": "-"}, spoken]
    before = list(encode(tokenizer, begun, **template)["input_ids"])
    after = encode_prompt(tokenizer, [*begun, *messages], **template)
    # What sampling stops at need not be what the template ends turns with.
    for mark in (end, tokenizer.eos_token_id):
        ends = before.count(mark)
        places = [place for place, token in enumerate(after) if token == mark]
        if 0 < ends <= len(places):
            return after[places[ends - 1] + 1 :]
    if after[: len(before)] != before:
        raise ConfigError(
            "cannot be continued: the chat template does not end the assistant's turn with the "
            "tokenizer's eos_token, and renders it otherwise once messages follow"
        )
    return after[len(before) :]
