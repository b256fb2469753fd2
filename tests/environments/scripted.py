"""A tokenizer that ends turns as Qwen does, and an engine that follows a script."""

from collections.abc import Callable
from pathlib import Path

import trl
from tokenizers import AddedToken

from examples.demo.tokenizer import build_tokenizer
from grpo_mcore.data.prompts import Prompt, encode_prompt
from grpo_mcore.environments import Conversation, check_environment, run_turns
from grpo_mcore.environments.tools import tool_schemas
from grpo_mcore.rollout.requests import Completion, Request, request_seed

END = "<|im_end|>"
SEED = 100
TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def chat_tokenizer(template: str | None = "qwen2_5"):
    """The demo's tokenizer with Qwen's marks and a template of those TRL knows."""
    tokenizer = build_tokenizer()
    marks = [AddedToken(mark, special=True) for mark in ("<|im_start|>", END)]
    calls = [AddedToken(mark, special=False) for mark in ("<tool_call>", "</tool_call>")]
    tokenizer.add_tokens(marks + calls)
    tokenizer.eos_token = END
    if template:
        tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    return tokenizer


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


class Engine:
    """Completes requests from a script, which says what the model writes in each turn of each
    conversation: a text, or tokens, which may lack the end. It knows a turn by its seed. A token's
    log-probability is minus its place in the turn."""

    def __init__(self, tokenizer, scripts):
        self.tokenizer, self.batches = tokenizer, []
        self.said = {
            request_seed(SEED + place, turn): said
            for place, script in enumerate(scripts)
            for turn, said in enumerate(script)
        }

    def generate(self, requests: list[Request]) -> list[Completion]:
        self.batches.append(requests)
        return [self._complete(request) for request in requests]

    def _complete(self, request: Request) -> Completion:
        said = self.said.pop(request.seed)
        tokens = self.tokenizer(text=said + END)["input_ids"] if isinstance(said, str) else said
        kept = tokens[: request.max_tokens]
        log_probs = [-float(place) for place in range(1, len(kept) + 1)]
        return Completion(kept, log_probs, kept[-1] == self.tokenizer.eos_token_id)


def converse(
    tokenizer, texts: list, scripts: list[list], *, columns=None, environment=None, tools=(),
    once: Callable = lambda function: function(), max_completion_length=1000, all_said=True,
    **settings,
) -> tuple[list[Conversation], Engine]:  # fmt: skip
    """The conversations of `texts`, and the engine that has followed `scripts`, to their ends if
    `all_said`."""
    spec = check_environment(environment) if environment is not None else None
    schemas = tool_schemas(tools, spec)
    kwargs = settings.get("chat_template_kwargs", {})
    prompts = [
        Prompt(encode_prompt(tokenizer, text, schemas, **kwargs), text, columns or {})
        for text in texts
    ]
    requests = [
        Request(prompt.tokens, 9, SEED + place, temperature=0.7, top_k=5)
        for place, prompt in enumerate(prompts)
    ]
    engine = Engine(tokenizer, scripts)
    conversations = run_turns(
        prompts, requests, tokenizer, generate=engine.generate, once=once, tools=tools,
        environment=spec, max_completion_length=max_completion_length, **settings,
    )  # fmt: skip
    assert not (all_said and engine.said)
    return conversations, engine
