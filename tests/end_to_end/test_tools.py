"""tools/diagnose_mismatch.py at layouts, and what tools/verify_sync.py makes of a failed sync. Both
on a run's checkpoint: test_job.py."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_mcore import device
from tests.end_to_end.conftest import run_script

device.prepare()


from grpo_mcore.config import ConfigError  # noqa: E402
from grpo_mcore.weights.sync import SyncError  # noqa: E402
from tools import verify_sync  # noqa: E402
from tools.pair import open_pair, pair_parser  # noqa: E402

pytestmark = [pytest.mark.cores(4), pytest.mark.engine]

WORKER = Path(__file__).with_name("probe_worker.py")
ATTENTION = "decoder.layers.{}.self_attention."
DENSE = {
    "none": "None",
    "embedding.word_embeddings.weight": "model.embed_tokens",
    ATTENTION.format(0) + "linear_qkv.weight": "model.layers.0.self_attn.q_proj",
    ATTENTION.format(1) + "k_layernorm.weight": "model.layers.1.self_attn.k_norm",
    ATTENTION.format(1) + "linear_proj.weight": "model.layers.1.self_attn.o_proj",
    "decoder.layers.1.mlp.linear_fc2.weight": "model.layers.1.mlp.down_proj",
    "decoder.final_layernorm.weight": "model.norm",
    "output_layer.weight": "lm_head",
}
MIXED = {
    "none": "None",
    "decoder.layers.1.mlp.linear_fc1.weight": "model.layers.1.mlp.gate_proj",
    "decoder.layers.2.mlp.experts.3.linear_fc1.weight": "model.layers.2.mlp",
    "decoder.layers.3.mlp.router.weight": "model.layers.3.mlp",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, altered, options",
    [
        ("qwen3", DENSE, "--layout 2x2x1 --sequence-parallel --engine-tensor-parallel 2"),
        ("qwen3_moe_mixed", MIXED, "--layout 1x2x2 --expert-parallel 2 --virtual-pipeline 2"),
        ("mixtral", {"none": "None"}, "--engine-tensor-parallel 2 --dtype bfloat16"),
    ],
)
def test_the_altered_module_is_found(tiny_models, tmp_path, model, altered, options):
    """Weights of every kind, at tensor, sequence, pipeline and expert parallelism."""
    processes = 4 if "--layout" in options else 1
    options = [*options.split(), "--output", tmp_path / "found.json"]
    said = run_script(WORKER, ",".join(altered), tiny_models / model, *options, ranks=processes)
    lines = [line for line in said.splitlines() if line.startswith("found")]
    assert {line.split()[1]: line.split()[3] for line in lines} == altered


@pytest.mark.parametrize(
    "options, said",
    [
        (["--layout", "2x1x1"], "layout=2x1x1: needs 2 processes, there are 1"),
        (["--engine-tensor-parallel", "3"], "rollout.policy_tensor_parallel=3: 4 attention heads"),
        (["--dtype", "float8"], "model.dtype=float8: choose one of"),
        (["--prompts", "nowhere.txt"], "prompts=nowhere.txt: no such file"),
    ],
)
def test_what_cannot_work_is_one_line(tiny_models, options, said):
    parser = pair_parser("", Path("unused.json"))
    arguments = parser.parse_args([str(tiny_models / "qwen3"), *options])
    with pytest.raises(ConfigError, match=said), open_pair(arguments, completion=1):
        pass


def test_models_and_lengths_that_do_not_fit(tiny_models):
    arguments = pair_parser("", Path("unused.json")).parse_args([str(tiny_models / "qwen3")])
    with pytest.raises(ConfigError, match="the model has room for 128"), open_pair(arguments, 120):
        pass
    other = str(tiny_models / "llama")
    with (
        pytest.raises(ConfigError, match=f"engine_model={other}: is not of the model's shape"),
        open_pair(arguments, 1, engine_model=other),
    ):
        pass


def test_a_sync_that_is_not_proven_fails():
    def push(version):
        raise SyncError("weight sync to version 1: tensor x is 1 on worker 0, 2 in the trainer")

    pair = SimpleNamespace(role=SimpleNamespace(layout="1x1x1"), sync=SimpleNamespace(push=push))
    found = verify_sync.verify(pair, Namespace(model="models/x", dtype="float32"))
    assert not found["ok"]
    assert "tensor x is 1 on worker 0, 2 in the trainer" in found["difference"]


@pytest.mark.parametrize(
    "dtype, given, mismatch, ok",
    [
        ("float32", None, 1.0009, True),
        ("float32", None, 1.01, False),
        ("bfloat16", None, 1.01, True),
        ("bfloat16", None, 1.11, False),
        ("float32", 1.2, 1.11, True),
        ("float32", None, float("nan"), False),
    ],
)
def test_the_limit_on_the_mismatch_is_the_types(monkeypatch, dtype, given, mismatch, ok):
    monkeypatch.setattr(verify_sync, "compare_samples", lambda *_: ([], {"mismatch": mismatch}))
    pair = SimpleNamespace(
        role=SimpleNamespace(layout="1x1x1"),
        sync=SimpleNamespace(push=lambda version: {"tensors": 3}),
        pool=SimpleNamespace(version=1),
    )
    arguments = Namespace(model="models/x", dtype=dtype, max_mismatch=given, threshold=0.05)
    assert verify_sync.verify(pair, arguments)["ok"] is ok
