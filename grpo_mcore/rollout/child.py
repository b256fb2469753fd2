"""The engine's process: `python -m grpo_mcore.rollout.child FD PARENT` serves calls over
socket FD for process PARENT.

vLLM would build its process groups over the caller's whole torch.distributed world; in a process of
its own each engine has its own world and may have any tensor parallel size.
"""

import ctypes
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection

import numpy as np

from grpo_mcore.rollout.bucket import Receipt
from grpo_mcore.rollout.requests import Completion, Generated, Request


class Child:
    """Answers the calls of `grpo_mcore.rollout.engine.Engine`, one at a time."""

    def __init__(self, llm_arguments: dict, stop_token_ids: list[int]):
        from vllm import LLM

        self.llm = LLM(**llm_arguments)
        self.stop_token_ids = stop_token_ids

    def generate(self, requests: list[Request]) -> Generated:
        from vllm import SamplingParams, TokensPrompt

        started = time.time()
        outputs = self.llm.generate(
            [TokensPrompt(prompt_token_ids=r.prompt) for r in requests],
            [
                SamplingParams(
                    max_tokens=r.max_tokens,
                    seed=r.seed,
                    temperature=r.temperature,
                    top_p=r.top_p,
                    top_k=r.top_k,
                    min_p=r.min_p,
                    repetition_penalty=r.repetition_penalty,
                    logprobs=0,  # of the sampled token only
                    stop_token_ids=self.stop_token_ids,
                    detokenize=False,
                )
                for r in requests
            ],
            use_tqdm=False,
        )
        completions = [_completion(output.outputs[0]) for output in outputs]
        return Generated(completions, started, time.time())

    def probe(self, prompts: list[list[int]]) -> list[list[dict[str, np.ndarray]]]:
        """What the modules compute of each prompt, by worker (`rollout.probe.Probe`)."""
        from vllm import SamplingParams, TokensPrompt

        found = []
        for prompt in prompts:
            self.llm.collective_rpc("begin_probe")
            self.llm.generate(
                TokensPrompt(prompt_token_ids=prompt),
                SamplingParams(max_tokens=1, detokenize=False),
                use_tqdm=False,
            )
            found.append(self.llm.collective_rpc("end_probe"))
        return found

    def begin_sync(self) -> None:
        self.llm.collective_rpc("begin_sync")

    def receive_bucket(self, *arguments) -> None:
        self.llm.collective_rpc("receive_bucket", args=arguments)

    def end_sync(self) -> list[Receipt]:
        receipts = self.llm.collective_rpc("end_sync")
        # What the old weights computed must not serve the new ones.
        self.llm.reset_prefix_cache()
        return receipts

    def sleep(self) -> None:
        self.llm.sleep(level=1)

    def wake_up(self, tags: list[str]) -> None:
        self.llm.wake_up(tags)


def _completion(output) -> Completion:
    tokens = list(output.token_ids)
    log_probs = [at[token].logprob for at, token in zip(output.logprobs, tokens, strict=True)]
    return Completion(tokens, log_probs, output.finish_reason == "stop")


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    # The parent may die without a word; this process must not outlive it.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[2]):
        return
    child = None
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            if method == "start":
                child, answer = Child(*arguments), None
            else:
                answer = getattr(child, method)(*arguments)
            connection.send(("ok", answer))
        except Exception:  # told to the parent, which raises it with this process's name
            connection.send(("error", traceback.format_exc()))


if __name__ == "__main__":
    main()
