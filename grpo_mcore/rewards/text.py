"""Prompts and completions as the text that functions judge."""

from grpo_mcore.data.chat import Text, is_conversation


def text_of(text: Text) -> str:
    """Plain text as it is; of a conversation the content of the last message, "" where it has
    none, as one that only calls tools."""
    if not is_conversation(text):
        return text
    return text[-1].get("content") or ""
