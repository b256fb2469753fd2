"""Prompts and completions as reward functions may be given them."""

Text = str | list[dict]
"""Plain text, or a conversation: messages of a role and a content."""


def text_of(text: Text) -> str:
    """Plain text as it is; of a conversation the content of the last message, "" where it has
    none, as one that only calls tools."""
    if isinstance(text, str):
        return text
    return text[-1].get("content") or ""
