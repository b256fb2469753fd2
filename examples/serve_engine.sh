#!/usr/bin/env bash
# A vLLM server that a trainer on other hosts generates with (rollout.engine=server):
#
#   examples/serve_engine.sh MODEL [options of vllm serve]
#
# MODEL is the directory of a model of the trained one's shape, with its tokenizer; the trainer sends
# the weights. Further options go to vLLM, such as --port, --max-model-len, --tensor-parallel-size,
# --dtype and --api-key. Such a server runs what anyone who reaches it asks for: keep its port
# inside your cluster.
set -euo pipefail
model=${1:?usage: examples/serve_engine.sh MODEL [options of vllm serve]}
shift
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}  # the workers load grpo_mcore.rollout.receiver
export VLLM_SERVER_DEV_MODE=1  # opens /collective_rpc, by which weights come
export VLLM_NO_USAGE_STATS=1
options=(
    --worker-extension-cls grpo_mcore.rollout.receiver.WeightReceiver
    --enable-scale-out
    --logprobs-mode processed_logprobs
    --generation-config vllm
    --load-format dummy
)
if ! command -v nvidia-smi >/dev/null; then
    export VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
    export VLLM_WORKER_MULTIPROC_METHOD=spawn
    export TORCHDYNAMO_DISABLE=1
    # On a CPU seeded requests are not reproduced when their prompts are split over steps.
    # So a batch has to hold the longest one, for which vLLM makes room where no size is given.
    options+=(--enforce-eager --no-enable-chunked-prefill)
fi
# Where vLLM comes from a CPU wheel under another name, its command `vllm` does not start.
exec python -m vllm.entrypoints.launchers.api_server.entry --model "$model" "${options[@]}" "$@"
