"""A completion of one or many turns, and what is measured of several."""

from collections.abc import Sequence
from dataclasses import dataclass

from grpo_mcore.data.chat import Text
from grpo_mcore.data.prompts import Prompt


@dataclass(frozen=True)
class Conversation:
    """One sampled completion.

    Attributes:
        prompt: what it follows, the environment's first observation included.
        tokens: of the model's turns and of what tools or the environment answered between them.
        log_probs: as sampled; 0.0 where the model did not write the token.
        mask: 1 where the model wrote the token, else 0.
        finished: False where a limit of length or turns cut it off.
        messages: what follows the prompt's text: messages, or text where the prompt is text.
        reward: the environment's own, of all turns; None where it gives none.
        turns: of the model.
        tool_failures: those of the `tool_calls` that gave an error.
    """

    prompt: Prompt
    tokens: list[int]
    log_probs: list[float]
    mask: list[int]
    finished: bool
    messages: Text
    reward: float | None
    turns: int
    tool_calls: int
    tool_failures: int


def conversation_metrics(conversations: Sequence[Conversation]) -> dict[str, float]:
    """`tools/call_frequency` (calls in a conversation) and `tools/failure_frequency` (the part of
    the calls that failed; 0 without calls), as in TRL, and `turns/mean`."""
    calls = sum(conversation.tool_calls for conversation in conversations)
    failures = sum(conversation.tool_failures for conversation in conversations)
    turns = sum(conversation.turns for conversation in conversations)
    return {
        "tools/call_frequency": calls / len(conversations),
        "tools/failure_frequency": failures / calls if calls else 0.0,
        "turns/mean": turns / len(conversations),
    }
