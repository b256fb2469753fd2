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

from grpo_mcore.rollout.bucket import Delivery, Receipt
from grpo_mcore.rollout.requests import Completion, Generated, Request


class Child:
    """Answers the calls of `grpo_mcore.rollout.engine.Engine`, one at a time."""

    def __init__(self, llm_arguments: dict, stop_token_ids: list[int]):
        from vllm import LLM

        self.llm = LLM(**llm_arguments)
        self.stop_token_ids = stop_token_ids
        self.adapters = None
        """vLLM's LoRARequest, which goes with every request."""

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
            lora_request=self.adapters,
        )
        completions = [_completion(output.outputs[0]) for output in outputs]
        return Generated(completions, started, time.time())

    def begin_sync(self, delivery: Delivery | None) -> None:
        self.llm.collective_rpc("begin_sync", args=(delivery,))

    def receive_bucket(self, number: int, place: int) -> None:
        self.llm.collective_rpc("receive_bucket", args=(number, place))

    def end_sync(self) -> list[Receipt]:
        receipts = self.llm.collective_rpc("end_sync")
        # What the old weights computed must not serve the new ones.
        self.llm.reset_prefix_cache()
        return receipts

    def load_adapters(self, directory: str, version: int) -> list[Receipt]:
        """Puts the adapters in `directory`, in PEFT's format, in place of those before."""
        from vllm.lora.request import LoRARequest

        if self.adapters:
            self.llm.llm_engine.remove_lora(self.adapters.lora_int_id)
        self.adapters = LoRARequest(f"version {version}", version + 1, directory)
        self.llm.llm_engine.add_lora(self.adapters)
        self.llm.reset_prefix_cache()
        return self.llm.collective_rpc("check_adapters", args=(directory, version + 1))

    def ask_workers(self, method: str, *arguments) -> list:
        """What `method` of each worker's extension answers."""
        return self.llm.collective_rpc(method, args=arguments)

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
