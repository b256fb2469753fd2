"""Every setting that cannot work is one line that names it, before a model loads."""

import dataclasses
import json
import shutil

import pytest

from grpo_mcore import device
from grpo_mcore.config import (
    ConfigError,
    DataConfig,
    LoraConfig,
    ModelConfig,
    SFTConfig,
    TeacherGRPOConfig,
)
from grpo_mcore.data.tokenizer import Tokenizer
from grpo_mcore.models.families import read_shape
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.preflight.layouts import batch_misfit, why_not
from grpo_mcore.preflight.teaching_job import TeachingJob, check_job
from tests.data.sentencepiece_model import train_tokenizer

ROWS = [{"question": f"tom has {n} cards. how many?", "answer": str(n)} for n in range(6)]
TEMPLATES = {
    "baseline": "question : {question} answer :",
    "diagnostic": "question : {question} plan :",
    "adaptive": "question : {question} student : {approach} teaching :",
    "with_teaching": "question : {question} teacher : {teaching} answer :",
}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(tiny_models, tmp_path) -> TeacherGRPOConfig:
    """A job that works on any number of processes whose teacher part divides 8."""
    config = TeacherGRPOConfig(
        output_dir=str(tmp_path / "run"),
        teacher=ModelConfig(path=str(tiny_models / "teacher")),
        student=ModelConfig(path=str(tiny_models / "llama")),
        data=DataConfig(train=write_rows(tmp_path / "train.jsonl", ROWS)),
        num_prompts_per_step=4,
        num_generations=4,
        per_device_train_batch_size=2,
        max_completion_length=16,
        max_probe_tokens=8,
        max_answer_tokens=16,
    )
    return change(config, {f"templates.{name}": text for name, text in TEMPLATES.items()})


def change(config: TeacherGRPOConfig, values: dict) -> TeacherGRPOConfig:
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        owner = getattr(config, section) if section else config
        assert hasattr(owner, name), key
        setattr(owner, name, value)
    return config


def job_of(config: TeacherGRPOConfig, world_size: int) -> TeachingJob:
    return check_job(config, world_size)[1]


def refusal(config: TeacherGRPOConfig, world_size: int = 5, **values) -> str:
    """The line with which the changed job is refused ("__" stands for a dot)."""
    change(config, {key.replace("__", "."): value for key, value in values.items()})
    with pytest.raises(ConfigError) as caught:
        check_job(config, world_size)
    message = str(caught.value)
    assert "\n" not in message
    return message


def reshaped(tiny_models, tmp_path, **changes) -> str:
    """A model directory whose config.json says something else."""
    file = tmp_path / "reshaped" / "config.json"
    file.parent.mkdir()
    config = json.loads((tiny_models / "teacher" / "config.json").read_text())
    file.write_text(json.dumps(config | changes))
    return str(file.parent)


def test_good_job_is_described(config):
    change(config, {"layout.teacher": "2x2x1", "layout.student": "1x1x1", "data.eval_size": 2})
    config.data.eval = config.data.train
    job = job_of(config, 5)
    assert job.describe() == (
        "layout: separate: teacher 2x2x1 (TPxPPxDP) with 1 engine, "
        "student 1x1x1 (TPxPPxDP) with 1 engine"
    )
    assert [q.row for q in job.train] == list(range(6)) and [q.row for q in job.eval] == [0, 1]
    assert job.dropped == 0
    assert job.shapes["teacher"].family == "qwen2" and job.shapes["student"].family == "llama"


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16])
def test_auto_layout_is_valid_for_every_number_of_processes(config, world):
    job = job_of(config, world)
    sizes = {name: layout.size for name, layout in job.layouts.items()}
    if job.placement == "colocated":
        assert sizes == {"teacher": world, "student": world}
    else:
        assert sum(sizes.values()) == world
    for name, layout in job.layouts.items():
        assert why_not(layout, job.shapes[name], getattr(config, name)) is None
    teacher = job.layouts["teacher"]
    assert batch_misfit(config, teacher, config.teacher) is None


def test_auto_layout_keeps_to_what_was_asked_for(config):
    layouts = job_of(change(config, {"layout.teacher": "2x2x1"}), 6).layouts
    assert layouts["teacher"] == Layout(2, 2, 1) and layouts["student"].size == 2
    layouts = job_of(change(config, {"layout.placement": "colocated"}), 4).layouts
    assert layouts["teacher"] == Layout(2, 2, 1) and layouts["student"].size == 4


@pytest.mark.parametrize(
    "world, layouts, parts",
    [
        (4, ("2x2x1", "1x1x1"), ("layout.teacher=2x2x1", "4 processes", "4 + 1 = 5")),
        (7, ("2x2x1", "1x1x1"), ("7 processes", "4 + 1 = 5")),
        (3, ("2x2x1", "auto"), ("layout.teacher=2x2x1", "3 processes")),
    ],
)
def test_world_size_that_does_not_fit_the_layout(config, world, layouts, parts):
    teacher, student = layouts
    message = refusal(config, world, layout__teacher=teacher, layout__student=student)
    assert all(part in message for part in parts), message


def test_colocated_roles_of_different_sizes(config):
    message = refusal(
        config, 4, layout__placement="colocated", layout__teacher="2x2x1", layout__student="1x1x2"
    )
    assert "layout.placement=colocated" in message and "4 and 2" in message


@pytest.mark.parametrize("text", ["2x2", "two", "0x1x1"])
def test_layout_that_is_none(config, text):
    assert refusal(config, layout__student=text).startswith(f"layout.student={text}: expected")


@pytest.mark.parametrize(
    "layout, reason",
    [
        ("3x1x1", "4 attention heads do not divide by tensor parallel 3"),
        ("4x1x1", "2 key-value heads do not divide by tensor parallel 4"),
        ("1x4x1", "2 layers are fewer than 4 pipeline stages"),
        ("1x1x3", "16 sequences do not divide by 6"),
        ("1x1x16", "16 sequences do not divide by 32"),
    ],
)
def test_layout_that_does_not_divide_the_teacher(config, layout, reason):
    message = refusal(config, layout__teacher=layout)
    assert message.startswith(f"layout.teacher={layout}: ") and reason in message


def test_layout_that_does_not_divide_the_student(config):
    message = refusal(config, layout__student="1x3x1")
    assert message == "layout.student=1x3x1: 2 layers are fewer than 3 pipeline stages"


@pytest.mark.parametrize(
    "layout, sizes, settings, reason",
    [
        (Layout(2, 1, 1), {"ffn": 255}, {}, "size 255 does not divide"),
        (Layout(2, 1, 1), {"experts": 4, "dense_ffn": 33}, {}, "size 33 does not divide"),
        (Layout(4, 1, 1), {"groups": 2}, {}, "2 key-value heads do not divide by tensor"),
        (Layout(1, 1, 2), {}, {"virtual_pipeline": 2}, "needs more than one pipeline stage"),
        (Layout(1, 2, 1), {"layers": 6}, {"virtual_pipeline": 2}, "6 layers do not divide by 2"),
        (Layout(1, 16, 1), {"layers": 28}, {}, "stages would be 7, 1, ..., 7"),
        (Layout(1, 1, 2), {"experts": 4}, {"expert_parallel": 4}, "data parallel 2 does not"),
        (Layout(2, 1, 1), {"experts": 4}, {}, "needs sequence_parallel=true"),
        (
            Layout(1, 2, 2),
            {"experts": 4, "layers": 4, "dense_layers": (2, 3)},
            {"expert_parallel": 2},
            "stage 2 of 2 would have dense layers only",
        ),
    ],
)
def test_layout_a_model_cannot_have(tiny_models, layout, sizes, settings, reason):
    shape = read_shape("teacher.path", str(tiny_models / "teacher"))
    model = ModelConfig(**settings)
    assert reason in why_not(layout, dataclasses.replace(shape, **sizes), model)


def test_experts_that_no_layout_can_spread(config, tiny_models):
    message = refusal(config, student__expert_parallel=2)
    assert message == "student.expert_parallel=2: the model has no experts"
    config.student.path = str(tiny_models / "mixtral")
    message = refusal(config, student__expert_parallel=3)
    assert message == "student.expert_parallel=3: 4 experts do not divide by it"


def test_no_automatic_layout_says_what_was_wished(config):
    message = refusal(config, 2, teacher__virtual_pipeline=2)
    assert message.endswith("fits the memory and allows teacher.virtual_pipeline=2")


def test_experts_count_once_in_the_memory(config, tiny_models, monkeypatch):
    """Where expert parallelism spreads them, a device need not hold all."""
    change(config, {"teacher.path": str(tiny_models / "mixtral"), "layout.student": "1x1x1"})
    shape = read_shape("teacher.path", config.teacher.path)
    dense = shape.parameters - shape.expert_parameters
    needed = 20 * (dense + shape.expert_parameters / 4)
    monkeypatch.setattr(device, "total_memory", lambda: int(1.6 * needed))
    assert job_of(config, 5).layouts["teacher"].model_ranks > 1
    config.teacher.expert_parallel = 4
    assert job_of(config, 5).layouts["teacher"] == Layout(1, 1, 4, expert=4)


def test_layers_need_not_divide_by_the_stages(tiny_models):
    shape = read_shape("teacher.path", str(tiny_models / "llama3"))
    assert shape.layers == 5
    assert all(why_not(Layout(1, stages, 1), shape, ModelConfig()) is None for stages in (2, 3, 4))


def test_a_virtual_pipeline_needs_micro_batches_for_every_stage():
    layout = Layout(1, 2, 1)
    split = ModelConfig(virtual_pipeline=2)

    def misfit(rows: int, model: ModelConfig) -> str | None:
        return batch_misfit(
            SFTConfig(batch_size=rows, per_device_train_batch_size=2), layout, model
        )

    assert "3 micro-batches do not divide by 2" in misfit(6, split)
    assert misfit(8, split) is None
    assert misfit(6, ModelConfig()) is None


def test_expert_parallel_is_part_of_the_layout(config, tiny_models):
    change(config, {"teacher.path": str(tiny_models / "mixtral"), "teacher.expert_parallel": 2})
    job = job_of(config, 3)
    assert job.layouts["teacher"] == Layout(1, 1, 2, expert=2)
    assert "teacher 1x1x2 EP 2 (TPxPPxDP) with 1 engine" in job.describe()


def test_no_automatic_layout_for_an_odd_batch(config):
    message = refusal(config, 8, layout__student="1x1x1", num_prompts_per_step=1)
    assert "8 processes" in message and "no layout of this size divides" in message


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_missing_model(config, tmp_path, role):
    message = refusal(config, **{f"{role}__path": str(tmp_path / "none")})
    assert message.startswith(f"{role}.path={tmp_path}/none: no config.json")


def test_model_without_a_tokenizer(config, tiny_models, tmp_path):
    path = reshaped(tiny_models, tmp_path)
    assert refusal(config, teacher__path=path).startswith(f"teacher.path={path}: no weights there")
    shutil.copy(tiny_models / "teacher" / "model.safetensors", path)
    assert refusal(config, teacher__path=path).startswith(f"teacher.path={path}: no tokenizer ")


def test_sentencepiece_tokenizer(config, tiny_models, tmp_path):
    path = tmp_path / "llama"
    path.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_models / "llama" / name, path)
    theirs = train_tokenizer(path)
    config.student.path = str(path)
    text = ROWS[0]["question"]
    assert job_of(config, 2).tokenizers["student"].encode(text) == theirs.encode(text)
    (path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    message = refusal(config)
    assert message.startswith(f"student.path={path}: no tokenizer that loads: ")


def test_model_path_never_given(config):
    assert refusal(config, teacher__path=ModelConfig().path).startswith("teacher.path=")


def test_weights_of_another_shape(config, tiny_models, tmp_path):
    path = reshaped(tiny_models, tmp_path, intermediate_size=96)
    shutil.copy(tiny_models / "teacher" / "model.safetensors", path)
    message = refusal(config, teacher__path=path)
    assert message.startswith(f"teacher.path={path}: tensor model.layers.0.mlp.gate_proj.weight is")
    assert "by config.json it is [96, " in message


def test_unsupported_family(config, tiny_models, tmp_path):
    path = reshaped(tiny_models, tmp_path, model_type="mamba")
    assert "'mamba' is not supported; supported: llama" in refusal(config, student__path=path)


def test_data_that_cannot_be_used(config, tmp_path):
    assert "data.train=" in refusal(config, data__train=str(tmp_path / "none.jsonl"))
    empty = write_rows(tmp_path / "empty.jsonl", [])
    assert refusal(config, data__train=empty) == f"data.train={empty}: the dataset is empty"


def test_held_out_data_that_cannot_be_used(config, tmp_path):
    assert "data.eval=" in refusal(config, data__eval=str(tmp_path / "none.jsonl"))


def test_missing_column(config):
    message = refusal(config, data__answer_column="label")
    assert message.startswith("data.answer_column=label: ")
    assert message.endswith("it has question, answer")


def test_question_too_long_names_its_row(config, tmp_path):
    long = {"question": "tom has cards. " * 40, "answer": "1"}
    path = write_rows(tmp_path / "long.jsonl", [*ROWS[:3], long, *ROWS[3:]])
    message = refusal(config, data__train=path)
    assert message.startswith("data.train: row 3 is too long: teacher.path's context of 128 ")
    assert "data.overlong=drop" in message


def test_question_too_long_is_dropped_and_counted_on_request(config, tmp_path):
    long = {"question": "tom has cards. " * 40, "answer": "1"}
    path = write_rows(tmp_path / "long.jsonl", [long, *ROWS, long])
    change(config, {"data.train": path, "data.eval": path, "data.overlong": "drop"})
    job = job_of(config, 2)
    assert [q.row for q in job.train] == [q.row for q in job.eval] == [1, 2, 3, 4, 5, 6]
    assert job.dropped == 4
    path = write_rows(tmp_path / "only_long.jsonl", [long])
    assert refusal(config, data__train=path).startswith("data.overlong=drop: every question of ")


def test_lengths_leave_room_for_the_longest_prompt_and_completion(config, tiny_models):
    def tokens(template, **fields):
        text = TEMPLATES[template].format(question=ROWS[0]["question"], **fields)
        return len(Tokenizer(str(tiny_models / "teacher")).encode(text))

    joints = 2
    lengths = job_of(config, 2).lengths
    assert lengths.teacher == tokens("adaptive", approach="") + joints + 8 + 16
    assert lengths.student == tokens("with_teaching", teaching="") + joints + 16 + 16
    change(config, {"max_completion_length": 1, "max_probe_tokens": 60})
    assert job_of(config, 2).lengths.student == tokens("diagnostic") + 60


def test_completions_longer_than_the_context(config):
    message = refusal(config, max_completion_length=128)
    assert "row 0 is too long" in message and "max_*_tokens" in message


@pytest.mark.parametrize(
    "key, value, least",
    [
        ("num_generations", 1, 2),
        ("num_prompts_per_step", 0, 1),
        ("per_device_train_batch_size", 0, 1),
        ("max_completion_length", 0, 1),
        ("baseline_samples", 0, 1),
        ("beta", -0.1, 0),
        ("epsilon", -0.2, 0),
        ("warmup_steps", -1, 0),
        ("eval_steps", -1, 0),
        ("top_k", -1, 0),
        ("data.eval_size", -1, 0),
        ("save_total_limit", 0, 1),
        ("rollout.bucket_megabytes", 0, 1),
        ("rollout.max_num_seqs", 0, 1),
        ("teacher.bf16_layers_at_start", -1, 0),
        ("teacher.bf16_layers_at_end", -2, 0),
    ],
)
def test_number_too_small(config, key, value, least):
    message = refusal(config, **{key.replace(".", "__"): value})
    assert message == f"{key}={value}: must be at least {least}"


def test_no_steps(config):
    assert refusal(config, max_steps=0).startswith("max_steps=0: must be at least 1, or -1")


def test_limits_on_the_mismatch_are_checked(config):
    message = refusal(config, rollout__mismatch_stop=1.05)
    assert message == "rollout.mismatch_stop=1.05: must be at least rollout.mismatch_warn=1.1"


@pytest.mark.parametrize(
    "key, value, known",
    [
        ("loss_type", "ppo", "grpo, bnpo, dr_grpo, dapo, luspo, cispo, sapo, vespo"),
        ("scale_rewards", "rank", "group, batch, none"),
        ("lr_scheduler_type", "step", "linear, cosine, constant, constant_with_warmup"),
        ("layout.placement", "mixed", "auto, separate, colocated"),
        ("data.overlong", "cut", "error, drop"),
        ("teacher.dtype", "float16", "float32, bfloat16"),
        ("student.fp8", "e4m3", "delayed, tensorwise, blockwise, mxfp8"),
        ("teacher.layers", "fused", "auto, transformer_engine, local"),
        ("rollout.lora_sync", "merge", "merged, adapters"),
    ],
)
def test_word_that_is_no_choice(config, key, value, known):
    message = refusal(config, **{key.replace(".", "__"): value})
    assert message == f"{key}={value}: choose one of {known}"


@pytest.mark.parametrize(
    "key, value",
    [
        ("temperature", 0.0),
        ("learning_rate", 0.0),
        ("min_learning_rate", 1.0),
        ("top_p", 0.0),
        ("top_p", 1.5),
    ],
)
def test_number_out_of_its_range(config, key, value):
    assert refusal(config, **{key: value}).startswith(f"{key}={value}: must be ")


def test_the_best_by_an_evaluation_that_there_is_none_of(config):
    message = refusal(config, metric_for_best_model="eval_accuracy")
    assert message == "metric_for_best_model=eval_accuracy: needs data.eval, there is none"


def test_several_baselines_of_a_greedy_student(config):
    message = refusal(config, baseline_samples=4)
    assert message.startswith("baseline_samples=4: ") and "student_temperature" in message
    assert check_job(change(config, {"student_temperature": 0.7}), 2)


@pytest.mark.skipif(device.is_cuda(), reason="there is a GPU")
def test_fp8_without_a_gpu(config):
    message = refusal(config, teacher__fp8="blockwise")
    assert message.startswith("teacher.fp8=blockwise: FP8 needs an NVIDIA GPU")


@pytest.mark.skipif(device.is_cuda(), reason="there is a GPU")
def test_transformer_engine_and_offloading_without_a_gpu(config):
    message = refusal(config, teacher__layers="transformer_engine")
    assert message.startswith("teacher.layers=transformer_engine: Transformer Engine cannot be ")
    config.teacher.layers = "local"
    message = refusal(config, optimizer_offload_fraction=0.5)
    assert message.startswith("optimizer_offload_fraction=0.5: there is no GPU to offload from")


@pytest.mark.seed(22, 23, 24, 25)
@pytest.mark.parametrize(
    "name, text, missing",
    [
        ("baseline", "solve it", "{question}"),
        ("adaptive", "{question} {plan}", "{approach}"),
        ("with_teaching", "{teaching}", "{question}"),
    ],
)
def test_template_without_a_field(config, name, text, missing):
    message = refusal(config, **{f"templates__{name}": text})
    assert message == f"templates.{name}: lacks {missing}"


@pytest.mark.parametrize(
    "key, value, parts",
    [
        ("rollout.teacher_engines", 3, ("must divide the role's 4 ranks",)),
        ("rollout.teacher_engines", 8, ("at most 4",)),
        ("rollout.student_engines", -1, ("at least 0",)),
        ("rollout.teacher_tensor_parallel", 3, ("4 attention heads do not divide",)),
        ("rollout.student_tensor_parallel", 0, ("at least 1",)),
    ],
)
@pytest.mark.skipif(device.is_cuda(), reason="counts engines as on a CPU")
def test_engines_that_do_not_divide(config, key, value, parts):
    change(config, {"layout.teacher": "2x2x1", "layout.student": "1x1x1"})
    message = refusal(config, **{key.replace(".", "__"): value})
    assert message.startswith(f"{key}={value}: ")
    assert all(part in message for part in parts), message


def test_adapters_that_engines_cannot_be_sent(config):
    config.rollout.lora_sync = "adapters"
    message = "rollout.lora_sync=adapters: there are no adapters; give peft_config"
    assert refusal(config) == message
    message = refusal(config, peft_config=LoraConfig(r=513))
    assert message.startswith("peft_config.r=513: vLLM takes at most 512")


def test_a_time_limit_of_nothing(config):
    assert refusal(config, reward_timeout=0.0) == "reward_timeout=0.0: must be above 0"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"stop": ["a", ""]}, "stop=['a', '']: must be a list of texts, none of them empty"),
        ({"stop": "end"}, "stop='end': must be a list of texts, none of them empty"),
        ({"bad_words": [" "]}, "bad_words=[' ']: vLLM leaves out what is nothing but spaces"),
        ({"structured_outputs": "a+"}, "structured_outputs=a+: must be a dictionary, such as"),
        ({"structured_outputs": {}}, "structured_outputs={}: give one of json, regex, choice, gr"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "structured_outputs={'regex': 'a', 'choice': ['b']}: give one of json",
        ),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs={'regexp': 'a'}: give one"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs={'regex': '('}: missing )"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs={'json': '{'}: Expecting"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs={'choice': []}: choice must"),
        (
            {"bad_words": ["no"], "vllm_importance_sampling_correction": True},
            "bad_words=['no']: the engine's log-probabilities are then those of the tokens left in",
        ),
        (
            {"structured_outputs": {"regex": "a"}, "vllm_importance_sampling_correction": True},
            "structured_outputs={'regex': 'a'}: the engine's log-probabilities are then",
        ),
        ({"rollout__engine": "remote"}, "rollout.engine=remote: choose one of local, server"),
        ({"rollout__engine": "server"}, "rollout.teacher_servers=[]: rollout.engine=server needs"),
    ],
)
def test_sampling_and_engines_that_cannot_be(config, values, message):
    assert refusal(config, **values).startswith(message)


def test_sampling_in_words(config):
    change(config, {"stop": ["\n"], "bad_words": ["no"], "structured_outputs": {"regex": "a+"}})
    assert job_of(config, 2)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("max_engine_restarts", -1, "must be at least 0"),
        ("start_seconds", 0.0, "must be above 0"),
        ("generate_seconds", 2000.0, "must be at most rollout.deadline_seconds=1800.0"),
        ("sync_seconds", -1.0, "must be above 0"),
        ("quantization", "int3", "choose one of fp8"),
    ],
)
def test_settings_of_engines(config, key, value, message):
    found = refusal(config, **{f"rollout__{key}": value})
    assert found.startswith(f"rollout.{key}={value}: {message}")


@pytest.mark.skipif(device.is_cuda(), reason="there is a GPU")
@pytest.mark.parametrize("key, value", [("quantization", "fp8"), ("offload_policy", True)])
def test_settings_of_engines_on_gpus(config, key, value):
    found = refusal(config, **{f"rollout__{key}": value})
    assert found.startswith(f"rollout.{key}={value}: ") and "GPU" in found
