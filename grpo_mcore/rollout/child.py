"""The engine's process: `python -m grpo_mcore.rollout.child FD PARENT` serves calls over
socket FD for as long as process PARENT, its guard, is there.

vLLM would build its process groups over the caller's whole torch.distributed world; in a process of
its own each engine has its own world and may have any tensor parallel size.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection, wait
from threading import Thread

import numpy as np

from grpo_mcore.rollout.bucket import Delivery, Receipt
from grpo_mcore.rollout.guard import end_with_parent
from grpo_mcore.rollout.requests import Completion, Request, ended_itself, sampling_settings

NEWS_SECONDS = 2.0
"""The longest that a generation, while no request finishes, says nothing of its progress."""


class Child:
    """Answers the calls of `grpo_mcore.rollout.engine.Engine`, one at a time."""

    def __init__(self, connection: Connection, llm_arguments: dict, stop_token_ids: list[int]):
        from vllm import LLM

        self.connection, self.stop_token_ids = connection, stop_token_ids
        self.llm = LLM(**llm_arguments)
        self.adapters = None
        """vLLM's LoRARequest, which goes with every request."""
        workers = multiprocessing.active_children()
        if workers:
            Thread(target=_end_with_any, args=(workers,), daemon=True).start()

    def generate(self, requests: list[Request]) -> None:
        """Tells of each completion as soon as it is there."""
        from vllm import TokensPrompt

        ids = self.llm.enqueue(
            [TokensPrompt(prompt_token_ids=r.prompt) for r in requests],
            [_sampling_params(r, self.stop_token_ids) for r in requests],
            use_tqdm=False,
            lora_request=self.adapters,
        )
        # vLLM adds to a request's number what makes it unique, and answers with the number.
        places = {name.partition("-")[0]: place for place, name in enumerate(ids)}
        engine, of_finished, told = self.llm.llm_engine, 0, time.monotonic()
        while engine.has_unfinished_requests():
            done = {places[o.request_id]: _completion(o.outputs[0]) for o in engine.step()}
            of_finished += sum(len(completion.tokens) for completion in done.values())
            if done or time.monotonic() - told > NEWS_SECONDS:
                told = time.monotonic()
                self.connection.send(("progress", (done, of_finished + self._unfinished())))

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

    def begin_sync(self, delivery: Delivery | None) -> None:
        self.llm.collective_rpc("begin_sync", args=(delivery,))

    def receive_bucket(self, number: int, place: int) -> None:
        self.llm.collective_rpc("receive_bucket", args=(number, place))

    def end_sync(self) -> list[Receipt]:
        receipts = self.llm.collective_rpc("end_sync")
        self._forget_prefixes()
        return receipts

    def load_adapters(self, directory: str, version: int) -> list[Receipt]:
        """Puts the adapters in `directory`, in PEFT's format, in place of those before."""
        from vllm.lora.request import LoRARequest

        if self.adapters:
            self.llm.llm_engine.remove_lora(self.adapters.lora_int_id)
        self.adapters = LoRARequest(f"version {version}", version + 1, directory)
        self.llm.llm_engine.add_lora(self.adapters)
        self._forget_prefixes()
        return self.llm.collective_rpc("check_adapters", args=(directory, version + 1))

    def ask_workers(self, method: str, *arguments) -> list:
        """What `method` of each worker's extension answers."""
        return self.llm.collective_rpc(method, args=arguments)

    def sleep(self, level: int) -> None:
        self.llm.sleep(level=level)

    def wake_up(self, tags: list[str]) -> None:
        self.llm.wake_up(tags)

    def _forget_prefixes(self) -> None:
        """What the old weights computed must not serve the new ones."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM's prefix cache cannot be reset while requests go on")

    def _unfinished(self) -> int:
        """Tokens sampled of requests that go on."""
        states = self.llm.llm_engine.output_processor.request_states.values()
        return sum(state.detokenizer.num_output_tokens() for state in states)


def _sampling_params(request: Request, stop_token_ids: list[int]):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    settings = sampling_settings(request, stop_token_ids)
    if settings["structured_outputs"]:
        settings["structured_outputs"] = StructuredOutputsParams(**settings["structured_outputs"])
    return SamplingParams(**settings)


def _completion(output) -> Completion:
    tokens = list(output.token_ids)
    log_probs = [at[token].logprob for at, token in zip(output.logprobs, tokens, strict=True)]
    return Completion(tokens, log_probs, ended_itself(output.finish_reason))


def _end_with_any(workers: list[multiprocessing.Process]) -> None:
    """Ends this process when one of vLLM's workers dies. vLLM would first wait for the others,
    which may be waiting for the dead one."""
    died = wait([worker.sentinel for worker in workers])
    names = ", ".join(worker.name for worker in workers if worker.sentinel in died)
    print(f"{names} died; so does the engine", file=sys.stderr, flush=True)
    os._exit(1)


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    if not end_with_parent(int(sys.argv[2]), signal.SIGKILL):
        return
    child = None
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            if method == "start":
                child, answer = Child(connection, *arguments), None
            else:
                answer = getattr(child, method)(*arguments)
            connection.send(("ok", answer))
        except Exception:  # told to the parent, which raises it with this process's name
            connection.send(("error", traceback.format_exc()))


if __name__ == "__main__":
    main()
