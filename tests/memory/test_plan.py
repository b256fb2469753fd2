"""`grpo-mcore plan` on the demo's configuration and on the recipes' shapes."""

import json
import shutil
import sys

import pytest

from grpo_mcore import cli
from grpo_mcore.config import ConfigError
from grpo_mcore.config.record import write_config
from grpo_mcore.memory.advice import excess
from grpo_mcore.memory.devices import GIB, find_device
from grpo_mcore.memory.show import Plan
from grpo_mcore.plan import CONFIGS, compose, make_plan

PUBLISHED = {
    "Qwen2.5-7B-Instruct": ("qwen2", 3584, 28, 28, 4, 18944, 152064, False),
    "Qwen2.5-1.5B-Instruct": ("qwen2", 1536, 28, 12, 2, 8960, 151936, True),
    "Llama-3.1-70B-Instruct": ("llama", 8192, 80, 64, 8, 28672, 128256, False),
    "Llama-3.1-8B-Instruct": ("llama", 4096, 32, 32, 8, 14336, 128256, False),
}
NAMED = ["teacher.path=t", "student.path=s", "data.train=d"]
NAMES = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size", "tie_word_embeddings",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories with nothing but a config.json of the published sizes."""
    root = tmp_path_factory.mktemp("published")
    for name, sizes in PUBLISHED.items():
        shape = dict(zip(NAMES, sizes, strict=True)) | {"max_position_embeddings": 32768}
        (root / "models" / name).mkdir(parents=True)
        (root / "models" / name / "config.json").write_text(json.dumps(shape))
    return root


@pytest.fixture
def planned(models, monkeypatch):
    """Plans an experiment with overrides."""

    def plan(name: str, *overrides: str, processes: int = 8, memory: str = "h100_80gb") -> Plan:
        monkeypatch.chdir(models)
        config = compose(name, list(overrides))
        return make_plan(config, find_device("--device-memory", memory), processes)

    return plan


def place(plan: Plan, name: str) -> dict:
    return next(place for place in plan.job.places() if place.name == name).phases


def gib(plan: Plan, name: str, phase: str, item: str) -> float:
    return place(plan, name)[phase][item] / GIB


def test_the_7b_recipe_fits_a_node(planned):
    plan = planned("gsm8k_qwen2.5")
    assert plan.fits and not plan.remedies and plan.micro_batch >= 4
    assert plan.job.placement == "separate"
    assert str(plan.job.layouts["teacher"]) == "2x1x2"
    # 7.6 billion parameters over two tensor parallel ranks, in bfloat16; gradients in float32.
    weights = gib(plan, "teacher device", "update", "weights")
    assert weights == pytest.approx(7.616e9 / 2 * 2 / GIB, rel=0.001)
    assert gib(plan, "teacher device", "update", "gradients") == pytest.approx(2 * weights)
    assert gib(plan, "teacher device", "update", "optimizer") == pytest.approx(3 * weights)
    assert gib(plan, "student device", "generate", "engine weights") == pytest.approx(
        1.544e9 * 2 / GIB, rel=0.001
    )
    assert "KV cache" in place(plan, "teacher device")["generate"]
    assert "KV cache" not in place(plan, "teacher device")["update"]


def test_the_70b_recipe_fits_eight_nodes(planned):
    plan = planned("gsm8k_llama3.1_70b", processes=64)
    assert plan.fits and plan.micro_batch >= 4
    assert {role: str(layout) for role, layout in plan.job.layouts.items()} == {
        "teacher": "8x4x1", "student": "1x1x32",
    }  # fmt: skip
    assert plan.job.sequences_cached("teacher") > 64


def test_both_placements(planned):
    plan = planned("gsm8k_qwen2.5", "layout=colocated")
    (only,) = plan.job.places()
    assert (only.name, only.count, plan.fits) == ("device", 8, True)
    stays = planned("gsm8k_qwen2.5", "layout=colocated", "disable_student_offloading=true")
    awake = place(stays, "device")["update"]["KV cache"]
    assert awake > 0 and "KV cache" not in only.phases["update"]


def test_a_policy_that_makes_room(planned):
    """Its reference stays; at the sync its weights are there to be read."""
    stays, leaves = (
        place(
            planned("gsm8k_qwen2.5", "beta=0.1", f"rollout.offload_policy={makes_room}"),
            "teacher device",
        )
        for makes_room in ("false", "true")
    )
    gone = {"gradients", "optimizer"}
    assert stays["sync"].keys() - leaves["sync"].keys() == gone
    assert stays["generate"].keys() - leaves["generate"].keys() == gone | {"weights"}
    assert leaves["generate"]["reference model"] == leaves["sync"]["weights"] > 0
    assert leaves["update"] == stays["update"]


@pytest.mark.parametrize(
    "overrides, helps",
    [
        (["rollout.gpu_memory_utilization=0.6"], {"rollout.gpu_memory_utilization"}),
        (["layout.teacher=2x1x2", "layout.student=1x1x4", "distributed_optimizer=false",
          "rollout.gpu_memory_utilization=0.35"], {"layout.teacher"}),
        (["teacher.recompute=null", "per_device_train_batch_size=64"],
         {"teacher.recompute", "per_device_train_batch_size"}),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_what_helps(planned, overrides, helps):
    plan = planned("gsm8k_qwen2.5", *overrides)
    assert not plan.fits and excess(plan.remedied) == 0
    assert {key for key, _ in plan.remedies} & helps
    again = planned(
        "gsm8k_qwen2.5", *overrides,
        *(f"{key}={str(value).lower()}" for key, value in plan.remedies),
    )  # fmt: skip
    assert again.fits


REWARDS = sorted(file.stem for file in (CONFIGS / "reward").glob("*.yaml"))
JUDGED = ["reward=rim", "judge.path=models/Qwen2.5-1.5B-Instruct"]


@pytest.mark.parametrize(
    "experiment, processes", [("gsm8k_qwen2.5", 9), ("gsm8k_llama3.1_70b", 65)]
)
@pytest.mark.parametrize("reward", REWARDS)
def test_every_reward_of_the_recipes(planned, experiment, processes, reward):
    judge = JUDGED[1:] if reward == "rim" else []
    plan = planned(experiment, f"reward={reward}", *judge, processes=processes - (not judge))
    assert plan.fits and ("judge device" in {p.name for p in plan.job.places()}) == bool(judge)


def test_the_runs_own_judge(planned):
    plan = planned("gsm8k_qwen2.5", *JUDGED, processes=9)
    judge = place(plan, "judge device")["generate"]
    # 1.5 billion parameters in two bytes, and as vLLM does, all of its share of the device.
    assert judge["engine weights"] == pytest.approx(1.544e9 * 2, rel=0.001)
    assert judge["engine weights"] + judge["KV cache"] == pytest.approx(0.3 * 79 * GIB)
    assert "judge has room for 23.8 sequences of 32768 tokens" in plan.as_text()
    assert plan.job.layouts["student"].size == 4
    two = planned("gsm8k_qwen2.5", *JUDGED, "judge.tensor_parallel=2", processes=10)
    assert [p.count for p in two.job.places() if p.name == "judge device"] == [2]
    assert place(two, "judge device")["generate"]["engine weights"] < 0.6 * judge["engine weights"]


def test_a_judge_whose_context_does_not_fit_is_told_a_shorter_one(planned):
    plan = planned(
        "gsm8k_qwen2.5", "reward=rim", "judge.path=models/Llama-3.1-8B-Instruct", processes=9,
        memory="60",
    )  # fmt: skip
    assert "judge.max_model_len" in dict(plan.remedies)


def test_a_judge_beside_colocated_roles(planned):
    with pytest.raises(ConfigError, match=r"judge.path=.*: needs GPUs of its own"):
        planned("gsm8k_qwen2.5", "layout=colocated", *JUDGED)
    judged = planned("gsm8k_qwen2.5", "layout=colocated", *JUDGED, memory="cpu", processes=1)
    engines = [p.name for p in judged.job.places() if "engine" in p.name]
    assert engines == ["teacher engine", "student engine", "judge engine"]


def test_rewards_without_their_judge(planned):
    with pytest.raises(ConfigError, match=r"reward_system.small.base_url=None: give the URL"):
        planned("gsm8k_qwen2.5", "reward=rim")


def test_the_students_own_model_is_kept_for_log_likelihoods(planned):
    plain, kept = (
        place(planned("gsm8k_qwen2.5", f"reward={reward}"), "student device")["generate"]
        for reward in ("adaptive", "adaptive_likelihood")
    )
    assert kept["weights"] == pytest.approx(1.544e9 * 2, rel=0.001) and "weights" not in plain
    # Logits of 4 sequences of 1536 tokens in bfloat16, and as much again or three float32 chunks.
    logits = 4 * 1536 * 151936 * 2
    assert kept["logits"] == pytest.approx(logits + 3 * 2048 * 151936 * 4, rel=0.01)
    assert kept["KV cache"] == plain["KV cache"]


@pytest.mark.parametrize("memory, name", [("h100_80gb", "device"), ("cpu", "teacher rank")])
def test_a_colocated_student_that_is_kept(planned, memory, name):
    """It leaves a GPU while the teacher trains, unless told to stay; on a CPU it stays."""
    likely = ["layout=colocated", "reward=adaptive_likelihood"]
    plain, kept, stays = (
        place(planned("gsm8k_qwen2.5", *options, processes=8, memory=memory), name)
        for options in (likely[:1], likely, [*likely, "disable_student_offloading=true"])
    )
    student = 1.544e9 * 2
    assert kept["generate"]["weights"] - plain["generate"]["weights"] == pytest.approx(
        student, 0.001
    )
    leaves = memory != "cpu"
    assert (kept["update"]["weights"] == plain["update"]["weights"]) == leaves
    assert stays["update"]["weights"] - plain["update"]["weights"] == pytest.approx(student, 0.001)


def test_too_few_devices_are_too_few(planned):
    plan = planned(
        "gsm8k_llama3.1_70b",
        "layout.teacher=1x1x1",
        "layout.student=1x1x1",
        "rollout.teacher_tensor_parallel=1",
        processes=2,
    )
    assert not plan.fits and plan.micro_batch is None
    assert excess(plan.remedied) > 0 and "more devices" in plan.as_text()


def test_a_larger_micro_batch_takes_more(planned):
    small, large = (planned("gsm8k_qwen2.5", f"per_device_train_batch_size={n}") for n in (2, 16))
    for name in ("activations", "logits"):
        assert gib(large, "teacher device", "update", name) > 2 * gib(
            small, "teacher device", "update", name
        )
    assert large.micro_batch == small.micro_batch


def test_layout_auto_has_room(planned):
    """With half of the memory a model is split further."""
    whole, half = (
        planned("gsm8k_qwen2.5", "layout=auto", memory=memory).job.layouts["teacher"]
        for memory in ("160", "60")
    )
    assert half.model_ranks > whole.model_ranks


def test_the_demo_on_a_cpu(tmp_path, tiny_models, monkeypatch, capsys):
    output = tmp_path / "plans" / "demo.json"
    arguments = [
        "plan", "demo", "layout=demo", "--json", str(output), "--device-memory", "cpu",
        f"teacher.path={tiny_models / 'qwen3_tied'}", f"student.path={tiny_models / 'llama'}",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["grpo-mcore", *arguments])
    cli.main()
    shown = capsys.readouterr().out
    assert "separate: teacher 2x2x1 (TPxPPxDP) with 1 engine" in shown
    found = json.loads(output.read_text())
    places = {place["name"]: place for place in found["places"]}
    assert {name: place["count"] for name, place in places.items()} == {
        "teacher rank": 4, "student rank": 1, "teacher engine": 1, "student engine": 1,
    }  # fmt: skip
    assert {*places["teacher rank"]["phases"]} == {
        "init", "generate", "log-probs", "update", "sync",
    }  # fmt: skip
    assert found["fits"] is None and found["largest_micro_batch"] is None
    for place in places.values():
        for phase, items in place["phases"].items():
            assert f"{sum(items.values()) / GIB:.2f}" in shown, (place["name"], phase)


def test_a_file_of_settings(planned, tmp_path):
    """Such as the config.yaml of a run: every setting, or only those that are not the defaults."""
    recipe = planned("gsm8k_qwen2.5", "beta=0")
    write_config(tmp_path, recipe.job.config)
    file = str(tmp_path / "config.yaml")
    assert planned(file).job.places() == recipe.job.places()
    (tmp_path / "some.yaml").write_text("betta: 1\n")
    with pytest.raises(ConfigError, match="betta: unknown configuration key"):
        compose(str(tmp_path / "some.yaml"), [])
    (tmp_path / "some.yaml").write_text("teacher: {dtype: bfloat16}\nmax_steps: 5\n")
    found = compose(str(tmp_path / "some.yaml"), ["student.path=there", "beta=0.5"])
    assert (found.teacher.dtype, found.student.path, found.beta) == ("bfloat16", "there", 0.5)
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"config=.*list.yaml: must be a YAML file of settings"):
        compose(str(tmp_path / "list.yaml"), [])


def test_a_file_of_an_experiment(tmp_path):
    shutil.copytree(CONFIGS, tmp_path / "configs")
    file = tmp_path / "configs/experiment/mine.yaml"
    file.write_text("# @package _global_\ndefaults:\n  - override /trainer: demo\nbeta: 0.25\n")
    config = compose(str(file), ["max_steps=3", *NAMED])
    assert (config.beta, config.max_steps, config.max_probe_tokens) == (0.25, 3, 8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nope"], "experiment=nope: choose one of custom"),
        (["nope.yaml"], "config=nope.yaml: [Errno 2] No such file"),
        (["gsm8k_qwen2.5", "--processes", "0"], "--processes=0: must be at least 1"),
        (
            ["gsm8k_qwen2.5", "teacher.dtype=int3", "--device-memory", "80"],
            "teacher.dtype=int3: choose one of float32, bfloat16",
        ),
        (["gsm8k_qwen2.5", "--device-memory", "tpu"], "--device-memory=tpu: give the GiB"),
        (["custom", "teacher.path=a", "student.path=b", "data.train=c"], "teacher.path=a: no conf"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grpo-mcore", "plan", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
