"""The end of the weight sync inside each vLLM worker (vLLM's `worker_extension_cls`)."""

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from grpo_mcore.rollout.bucket import (
    Receipt,
    Slot,
    checksum,
    fetch_buffer,
    from_json,
    open_buffer,
    to_json,
    unpack,
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
            "workers": self.parallel_config.world_size,
        }

    def join_trainer(self, address: str, port: int) -> None:
        """Joins the NCCL group over which buckets of kind "nccl" come; the trainer is rank 0."""
        from vllm.distributed.weight_transfer.nccl_common import (
            NCCLWeightTransferInitInfo,
            worker_init_process_group,
        )

        info = NCCLWeightTransferInitInfo(
            master_address=address,
            master_port=port,
            rank_offset=1,
            world_size=self.parallel_config.world_size + 1,
        )
        self.trainer_group = worker_init_process_group(info, self.parallel_config)

    def begin_sync(self) -> None:
        """Readies the live model for new weights; vLLM repacks some layers at load, so they are
        rebuilt layer by layer."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        model = self.model_runner.model
        # A tied output layer is the embedding itself, and named once.
        self.not_loaded = {name for name, _ in model.named_parameters()}
        if self.device.type == "cpu":
            # With a kernel at hand vLLM takes experts for packed already, and would put them as
            # they come where the kernel reads packed ones.
            for layer in model.modules():
                if getattr(getattr(layer, "quant_method", None), "moe_kernel", None):
                    layer.quant_method.moe_kernel = None
        initialize_layerwise_reload(model)
        self.received: dict[str, str] = {}

    def receive_bucket(self, source: tuple, size: int, slots: list[Slot]) -> None:
        """Loads one bucket.

        Args:
            source: ("memory", path); ("cuda", handles) with one IPC handle for each worker;
                ("http", url); or ("nccl", None), broadcast by the trainer (`join_trainer`).
        """
        kind, where = source
        if kind == "memory":
            buffer = open_buffer(where, size)
        elif kind == "http":
            buffer = fetch_buffer(where, size).to(self.device)
        elif kind == "nccl":
            buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
            self.trainer_group.broadcast(buffer, src=0, stream=torch.cuda.current_stream())
        else:
            arguments = list(where[self.rank])
            arguments[6] = torch.cuda.current_device()  # the device's number in this process
            buffer = rebuild_cuda_tensor(*arguments)
        tensors = unpack(buffer, slots)
        self.received |= {name: checksum(tensor) for name, tensor in tensors.items()}
        self.not_loaded -= self.model_runner.model.load_weights(tensors.items())

    def end_sync(self) -> Receipt:
        """Finishes the load."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        model = self.model_runner.model
        finalize_layerwise_reload(model, self.model_runner.model_config)
        # A tied output layer loads nothing itself, so vLLM leaves its repacked copy of the old
        # embedding in place.
        if self.model_runner.model_config.hf_text_config.tie_word_embeddings:
            model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
        return Receipt(self.received, sorted(self.not_loaded))
