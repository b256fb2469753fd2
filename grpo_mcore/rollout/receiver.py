"""The end of the weight sync inside each vLLM worker (vLLM's `worker_extension_cls`)."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from grpo_mcore.config.lora import ADAPTER_WEIGHTS
from grpo_mcore.rollout.bucket import (
    Delivery,
    Receipt,
    checksums,
    fetch_buffer,
    from_json,
    open_buffer,
    to_json,
    view,
)


class WeightReceiver:
    """Methods vLLM adds to its worker; called on every worker through `collective_rpc`."""

    def call_by_http(self, method: str, arguments: str) -> str:
        """Runs `method` for a trainer that reaches this worker through vLLM's `/collective_rpc`,
        which carries text only: arguments and answer are JSON (`to_json`)."""
        return to_json(getattr(self, method)(*from_json(arguments)))

    def describe(self) -> dict:
        """What a trainer has to know of the server this worker belongs to."""
        config, scheduler = self.model_config, self.scheduler_config
        return {
            "shape": config.hf_text_config.to_dict(),
            "dtype": str(config.dtype).removeprefix("torch."),
            "max_model_len": config.max_model_len,
            "logprobs_mode": config.logprobs_mode,
            "has_tokenizer": not config.skip_tokenizer_init,
            "splits_prompts": scheduler.enable_chunked_prefill,
            "device": self.device.type,
        }

    def begin_sync(self, delivery: Delivery | None) -> None:
        """Readies the live model for new weights; vLLM repacks some layers at load, so they are
        rebuilt layer by layer.

        Args:
            delivery: None: as last time.
        """
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if delivery:
            self.buffers = []  # those of the last delivery, before there are others
            self.delivery, self.buffers = delivery, self._open(delivery)
        model = self.model_runner.model
        _forget_unfinished(model)
        held = _names_of_parameters(model)
        self.kernels = []
        if self.device.type == "cpu":
            # With a kernel at hand vLLM takes experts for packed already, and would put them as
            # they come where the kernel reads packed ones.
            for layer in model.modules():
                method = getattr(layer, "quant_method", None)
                if getattr(method, "moe_kernel", None):
                    self.kernels.append((method, method.moe_kernel))
                    method.moe_kernel = None
        # These lie as they come and are loaded in place: no second copy of the largest tensors.
        embeddings = _embeddings(model)
        for layer in embeddings:
            _reload_info(layer).load_numel_total = 0  # vLLM takes the layer for prepared
            if self.device.type == "cpu" and layer is not model.lm_head:
                layer.cpu_linear = None  # a repacked copy that nothing multiplies by
        initialize_layerwise_reload(model)
        # No tensor is sent for a parameter that vLLM makes of others once they are loaded, as the
        # scales of weights in FP8, nor for one that it removes then.
        self.not_loaded = held & _names_of_parameters(model)
        for layer in embeddings:
            _reload_info(layer).reset()
        self.received: dict[str, int] = {}

    def receive_bucket(self, number: int, place: int) -> None:
        """Loads bucket `number`, which lies in buffer `place`. The buffer may be written again as
        soon as this returns."""
        self._fetch(place)
        tensors = view(self.buffers[place], self.delivery.buckets[number])
        names = list(tensors)
        if self.delivery.source[0] == "memory":
            # All workers read the same bytes, and share the work.
            names = names[self.rank :: self.parallel_config.tensor_parallel_size]
        sums = checksums([tensors[name] for name in names]).tolist()
        self.received |= zip(names, sums, strict=True)
        model = self.model_runner.model
        self.not_loaded -= model.load_weights(tensors.items())
        _keep_what_waits(model, self.buffers[place])
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # copies out of the buffer may only be queued

    def end_sync(self) -> Receipt:
        """Finishes the load."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        model = self.model_runner.model
        finalize_layerwise_reload(model, self.model_runner.model_config)
        for method, kernel in self.kernels:
            method.moe_kernel = method.moe_kernel or kernel  # of experts that were not sent
        tied = self.model_runner.model_config.hf_text_config.tie_word_embeddings
        source = "model.embed_tokens.weight" if tied else "lm_head.weight"
        if self.device.type == "cpu" and source not in self.not_loaded:
            model.lm_head.cpu_linear = None  # the repacked copy that it multiplies by
            model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
        if self.delivery.is_last:
            self.buffers = []
        return Receipt(self.received, sorted(self.not_loaded))

    def _fetch(self, place: int) -> None:
        """Fills buffer `place`, where it is not one of the trainer's own."""
        (kind, where), buffer = self.delivery.source, self.buffers[place]
        if kind != "http":
            return
        if buffer.is_cpu:
            fetch_buffer(where[place], buffer)
        else:
            fetched = torch.empty(len(buffer), dtype=torch.uint8)
            fetch_buffer(where[place], fetched)
            buffer.copy_(fetched)

    def check_adapters(self, directory: str, number: int) -> Receipt:
        """What this worker has of adapters `number`, which it read from `directory`."""
        if number not in self.list_loras():
            return Receipt({}, [])
        tensors = load_file(Path(directory) / ADAPTER_WEIGHTS)
        sums = checksums(list(tensors.values())).tolist()
        return Receipt(dict(zip(tensors, sums, strict=True)), [])

    def _open(self, delivery: Delivery) -> list[Tensor]:
        kind, where = delivery.source
        if kind == "memory":
            return [open_buffer(path, delivery.size) for path in where]
        if kind == "http":
            return [
                torch.empty(delivery.size, dtype=torch.uint8, device=self.device) for _ in where
            ]
        buffers = []
        for handle in where[self.rank]:
            arguments = list(handle)
            arguments[6] = torch.cuda.current_device()  # the device's number in this process
            buffers.append(rebuild_cuda_tensor(*arguments))
        return buffers


def _forget_unfinished(model: torch.nn.Module) -> None:
    """Undoes what a sync that was broken off has begun of layers it has not finished; vLLM would
    take what is sent anew for the rest of them."""
    from vllm.model_executor.model_loader.reload import layerwise

    for layer in model.modules():
        info = _reload_info(layer)
        if info.kernel_tensors is not None:
            layerwise._place_kernel_tensors(layer, info)
            info.reset()


def _names_of_parameters(model: torch.nn.Module) -> set[str]:
    """As `load_weights` tells of them. A tied output layer is the embedding itself, and named
    once."""
    return {name.replace(".base_layer.", ".") for name, _ in model.named_parameters()}


def _embeddings(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The embedding and the output layer, unless they are quantised."""
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    return [
        layer
        for layer in model.modules()
        if isinstance(getattr(layer, "quant_method", None), UnquantizedEmbeddingMethod)
    ]


def _reload_info(layer: torch.nn.Module):
    """vLLM's record of a layer that is being loaded."""
    from vllm.model_executor.model_loader.reload import layerwise

    return layerwise.get_layerwise_info(layer)


def _keep_what_waits(model: torch.nn.Module, buffer: Tensor) -> None:
    """Copies what vLLM holds back, of layers that are not complete yet, out of `buffer`."""
    shared = buffer.untyped_storage().data_ptr()
    for layer in model.modules():
        for _, call in _reload_info(layer).loaded_weights:
            for name, value in call.arguments.items():
                if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == shared:
                    call.arguments[name] = value.clone()
