"""What TeacherGRPOTrainer has beside training, under ATLAS's names."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from html import escape
from io import StringIO
from statistics import fmean, pstdev
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grpo_mcore import DiagnosticResult, GRPOConfig, TeacherGRPOConfig, TeacherGRPOTrainer
from grpo_mcore.config import ConfigError, ModelConfig, RolloutConfig, TemplatesConfig
from grpo_mcore.data.questions import Question
from grpo_mcore.data.tokenizer import Tokenizer
from grpo_mcore.rewards import AdaptiveTeachingReward, LikelihoodGainReward
from grpo_mcore.rollout.requests import Completion
from grpo_mcore.teaching.classroom import Classroom
from grpo_mcore.teaching.lesson import Attempt
from grpo_mcore.teaching.student import Finished, LocalStudent
from grpo_mcore.trainers.teacher_grpo import teacher_config
from tests.conftest import name_of
from tests.end_to_end.conftest import records

pytestmark = pytest.mark.engine

ROWS = [{"question": f"tom has {n} cards.", "answer": f"so #### {n}"} for n in range(6)]
LONG_ANSWERS = [ROWS[0], {"question": "how many?", "answer": 60 * "1 4 "}]
LONG_ANSWER = [{"question": "how many?", "answer": 10 * "1 4 "}]
TEMPLATES = TemplatesConfig(
    baseline="alone {question}",
    diagnostic="plan {question}",
    adaptive="teach {question} {approach}",
    with_teaching="taught {question} {teaching}",
    grading="grade {question} {approach}",
    walkthrough="walk {question} {approach}",
    hints="hint {question} {approach}",
    verification="check {question} {approach}",
)


@pytest.fixture(scope="module")
def model(tiny_models) -> str:
    return str(tiny_models / "qwen2")


def by_length(completions, teaching_tokens, solutions, questions, answer, log_extra, **_):
    """What the trainer offers, and a column of the dataset."""
    log_extra("characters", [len(text) for text in completions])
    assert answer[0].startswith("so ####") and questions[0].startswith("tom has")
    assert len(completions) == len(teaching_tokens) == len(solutions)
    return [float(len(text)) for text in completions]


def right(question: str) -> str:
    return f"<solution>{question.split()[2]}</solution>"


@contextmanager
def partly_right() -> Iterator[None]:
    """The student, which is random and always wrong, gets even cards right alone, and when taught
    every second time."""
    attempts, taught_answers = LocalStudent.attempts, LocalStudent.taught_answers

    def attempt(student, questions, keys, references):
        work = attempts(student, questions, keys, references).result()
        alone = [right(q) if int(q.split()[2].strip(".")) % 2 == 0 else "" for q in questions]
        return Finished(replace(work, texts=[*alone, *work.texts[len(questions) :]]))

    def answer(student, questions, teachings, keys, references):
        work = taught_answers(student, questions, teachings, keys, references).result()
        texts = [right(q) if i % 2 else "" for i, q in enumerate(questions)]
        return Finished(replace(work, texts=texts))

    with (
        patch.object(LocalStudent, "attempts", attempt),
        patch.object(LocalStudent, "taught_answers", answer),
    ):
        yield


def settings(directory, **more) -> dict:
    return {
        "output_dir": str(directory),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_probe_tokens": 6,
        "log_completions": 1,
        "learning_rate": 1e-2,
        "templates": TEMPLATES,
        "rollout": RolloutConfig(kv_cache_gib=0.05, deadline_seconds=120),
    } | more


@pytest.fixture(scope="module")
def taught(model, tiny_models, tmp_path_factory) -> SimpleNamespace:
    """A run of two steps in which the reference model teaches, and what was asked after it."""
    directory = tmp_path_factory.mktemp("taught") / "run"
    trainer = TeacherGRPOTrainer(
        model,
        [by_length, LikelihoodGainReward(gain_clip=0.5)],
        GRPOConfig(**settings(directory, max_steps=2, num_generations=2, steps_per_generation=1)),
        ROWS,
        ROWS[:2],
        student_model=AutoModelForCausalLM.from_pretrained(tiny_models / "llama"),
        use_reference_teacher_model=True,
        student_model_init_kwargs={"dtype": "float32"},
        logging_prob=1.0,
        disable_student_offloading=True,
    )
    with redirect_stdout(StringIO()) as output, partly_right():
        trainer.train()
    problems = ["tom has 14 cards.", "how many?"]
    found = SimpleNamespace(
        trainer=trainer,
        directory=directory,
        output=output.getvalue(),
        baselines=trainer._generate_baseline_solutions(problems),
        approaches=trainer._generate_student_approaches(problems),
        scored=trainer._generate_and_score(ROWS[:2]),
        evaluation=trainer.evaluate(ROWS[:1]),
        diagnoses=[trainer.diagnostic_probe(problems[0], max_tokens=6) for _ in range(2)],
        guidance=trainer.generate_guidance(problems[0], DiagnosticResult(0.1), max_tokens=10),
    )
    with pytest.raises(ConfigError) as refused:
        trainer.evaluate(LONG_ANSWERS)
    found.refusal = str(refused.value)
    trainer.close()
    return found


@pytest.mark.seed(15, 16, 18, 20, 81)
def test_a_student_is_an_object_with_settings_of_its_own(taught):
    args = taught.trainer.args
    assert args.student.path.startswith(str(taught.directory / "models" / "student"))
    assert args.student.dtype == "float32" and args.disable_student_offloading
    assert args.teacher.path.endswith("qwen2")
    assert len([r for r in records(taught.directory) if "loss" in r]) == 2


@pytest.mark.seed(17)
def test_the_reference_teaches_while_the_trained_model_learns(taught, model):
    """The second step's samples come from the first model, no longer the trained one."""
    first, second = [r for r in records(taught.directory) if "loss" in r]
    assert first["sampling/max"] < 1e-4 < 1e-2 < second["sampling/max"]
    trained = load_file(taught.directory / "final" / "model.safetensors")
    before = load_file(f"{model}/model.safetensors")
    assert any(not torch.equal(trained[name], before[name]) for name in before)
    verdicts = [line for line in taught.output.splitlines() if line.startswith("sync ok")]
    assert [line.split(", ")[-1] for line in verdicts] == [
        "engine 0 = reference 0",
        "engine 1 = reference 1",
    ]


def test_gains_in_likelihood_are_measured_where_a_reward_asks(taught):
    """Of the final answer in a template, where there is no worked one; by a student of the same
    ranks, whose model stays."""
    rows, steps = records(taught.directory, "completions"), records(taught.directory)
    assert all(math.isfinite(row["likelihood_gain"]) for row in rows)
    assert any(abs(row["likelihood_gain"]) > 1e-3 for row in rows)
    for record in (r for r in steps if "loss" in r):
        assert -0.5 <= record["rewards/LikelihoodGainReward/mean"] <= 0.5
        assert record["time/student_likelihoods"] > 0
    assert "eval_sampled_likelihood_gain" in taught.evaluation


def test_right_answers_of_other_questions_have_to_fit_too(taught):
    assert taught.refusal.startswith("data.reference_column=None: with the reference of row 1 ")


@pytest.mark.seed(19)
def test_all_guidances_are_logged_with_probability_one(taught):
    assert len(records(taught.directory, "completions")) == 2 * 4


def test_lessons_that_changed_the_student_are_kept_with_all_that_was_said(taught):
    lessons = records(taught.directory, "lessons")
    assert [lesson["step"] for lesson in lessons] == [1, 1, 2, 2]
    for lesson in lessons:
        was_right = int(lesson["ground_truth"]) % 2 == 0
        assert lesson["outcome"] == ("degraded" if was_right else "improved")
        assert (lesson["answer"] == right(lesson["question"])) is not was_right
        assert lesson["baselines"] == [right(lesson["question"]) if was_right else ""]
        assert lesson["rewards"]["by_length"] == lesson["characters"]
        assert lesson["reward"] == pytest.approx(sum(lesson["rewards"].values()))
        assert lesson["approach"] and 0 < lesson["guidance_tokens"] <= 8
    kept = [
        row for row in records(taught.directory, "completions") if row["outcome"] != "unchanged"
    ]
    assert kept == lessons


def test_metrics_of_teaching_are_of_all_samples(taught):
    tokenizer = taught.trainer.job.tokenizers["teacher"]
    for step in (1, 2):
        (metrics,) = [r for r in records(taught.directory) if r["step"] == step and "loss" in r]
        rows = [r for r in records(taught.directory, "completions") if r["step"] == step]
        assert len(rows) == 4
        share = {
            name: sum(r["outcome"] == name for r in rows) / 4 for name in ("improved", "degraded")
        }
        tokens = [row["teaching_tokens"] for row in rows]
        assert metrics["student_accuracy"] == 0.5
        assert metrics["baseline_accuracy"] == 2 * share["degraded"]
        assert metrics["accuracy_delta"] == share["improved"] - share["degraded"]
        assert metrics["improvement_rate"] == share["improved"]
        assert metrics["degradation_rate"] == share["degraded"]
        assert metrics["leak_rate"] == sum(row["leaks"] for row in rows) / 4
        assert metrics["teaching_length_mean"] == fmean(tokens)
        assert metrics["teaching_length_std"] == pstdev(tokens)
        approaches = [tokenizer.encode(row["approach"]) for row in rows]
        assert metrics["student_approach_length"] == fmean(map(len, approaches))
        assert metrics["token_efficiency"] == pytest.approx(
            metrics["reward"] / (fmean(tokens) / 100)
        )
        assert metrics["completion_length"] == fmean(row["guidance_tokens"] for row in rows)
        rewards = [metrics[f"rewards/{name}"] for name in ("by_length", "LikelihoodGainReward")]
        assert metrics["reward"] == pytest.approx(sum(rewards))
        assert "kl" in metrics


def test_a_run_leaves_its_settings_and_a_report(taught):
    kept = yaml.safe_load((taught.directory / "config.yaml").read_text())
    assert kept["templates"]["baseline"] == "alone {question}"
    report = (taught.directory / "report.html").read_text()
    assert "max_probe_tokens: 6" in report
    for lesson in records(taught.directory, "lessons"):
        assert escape(lesson["teaching"]) in report


@pytest.mark.seed(30)
def test_a_trainer_gives_its_reward_the_teachers_tokenizer(model, tmp_path):
    reward = AdaptiveTeachingReward(formula="rcl")
    trainer = TeacherGRPOTrainer(model, reward, GRPOConfig(**settings(tmp_path)), ROWS)
    assert reward.tokenizer is trainer.job.tokenizers["teacher"].inner


@pytest.mark.seed(21, 22, 23, 24, 25, "A5")
def test_limits_and_templates_are_attributes(taught):
    trainer = taught.trainer
    assert trainer.max_probe_tokens == 6
    assert TeacherGRPOConfig().max_probe_tokens == 500
    assert trainer.student_diagnostic_template == "plan {question}"
    assert trainer.teacher_adaptive_template == "teach {question} {approach}"
    assert trainer.student_with_teaching_template == "taught {question} {teaching}"
    assert trainer.student_baseline_template == "alone {question}"


@pytest.mark.seed(26, 27, 28)
def test_the_students_solutions_and_approaches(taught):
    assert taught.baselines == ["", ""]  # a random student knows no tags
    tokenizer = taught.trainer.job.tokenizers["student"]
    assert all(0 < len(tokenizer.encode(text)) <= 6 for text in taught.approaches)
    texts = ["so <solution> 4 </solution>", "4", "<solution>1</solution><solution>2</solution>"]
    assert taught.trainer._extract_solutions_from_responses(texts) == ["4", "", "2"]


@pytest.mark.seed(82, 83, 84, "A12")
def test_a_trainer_diagnoses_its_student_and_guides_it(taught):
    first, second = taught.diagnoses
    assert first == second
    assert len(first.probes) == 5 and 5 <= first.probe_tokens <= 5 * 6
    assert first.response_quality["likelihood"] < 0.1  # a random student is sure of nothing
    assert first.capability_level < 0.3
    assert isinstance(taught.guidance, str)


@pytest.mark.seed(13, "A1")
def test_guidances_are_sampled_from_the_adaptive_prompt(taught):
    prompts, completions, advantages = taught.scored
    assert all(text.startswith("teach tom has") for text in prompts)
    assert len(prompts) == len(completions) == len(advantages) == 4


@pytest.mark.seed("A13")
def test_evaluation_on_other_questions(taught):
    assert "eval_greedy_student_accuracy" in taught.evaluation


@pytest.mark.seed(16)
def test_without_a_student_the_reference_is_taught(model, tiny_models, tmp_path):
    args = GRPOConfig(**settings(tmp_path))
    assert TeacherGRPOTrainer(model, args=args, train_dataset=ROWS).args.student.path == model
    other = str(tiny_models / "qwen2_tied")
    trainer = TeacherGRPOTrainer(model, args=args, ref_model=other)
    assert trainer.args.student.path == other


@pytest.mark.parametrize(
    "arguments, config, message",
    [
        ({"logging_prob": 2}, {}, "logging_prob=2: must be between 0 and 1"),
        (
            {"student_model_init_kwargs": {"dtyp": "float32"}},
            {},
            "student_model_init_kwargs.dtyp=float32: choose from",
        ),
        ({"student_model": "nowhere"}, {}, "student=nowhere: no directory"),
        (
            {"use_reference_teacher_model": True},
            {"beta": 0.0},
            "use_reference_teacher_model=True: there is no reference model",
        ),
        (
            {"use_reference_teacher_model": True},
            {"rollout": RolloutConfig(mismatch_stop=2.0)},
            "rollout.mismatch_stop=2.0: leave it out with use_reference_teacher_model=True",
        ),
        ({}, {"formula": "rlc"}, "formula=rlc: choose one of seed, rcl, docs"),
        ({}, {"answer_match": "maths"}, "answer_match=maths: choose one of text, math"),
        ({}, {"extraction": "loose"}, "extraction=loose: choose one of strict, lenient"),
        ({"tools": [len]}, {}, "tools: a teacher answers in one turn"),
        ({}, {"max_sequence_length": 9}, "max_sequence_length=9: is of no use to Teacher"),
        ({"train_dataset": [{"question": "a"}]}, {}, "train_dataset has no such column"),
        (
            {"train_dataset": ROWS, "reward_funcs": lambda prompts, completions, wish: []},
            {},
            "wish",
        ),
        (
            {"train_dataset": LONG_ANSWERS, "reward_funcs": LikelihoodGainReward()},
            {},
            "data.reference_column=None: with the reference of row 1 student.path's context of 128",
        ),
        (
            {"train_dataset": LONG_ANSWER, "reward_funcs": LikelihoodGainReward()},
            {"templates": replace(TEMPLATES, baseline=24 * "alone " + "{question}")},
            "data.reference_column=None: with the reference of row 0 student.path's context of 128",
        ),
    ],
    ids=name_of,
)
def test_what_cannot_work_is_refused_by_name(model, tmp_path, arguments, config, message):
    with pytest.raises(ConfigError) as caught:
        TeacherGRPOTrainer(
            model,
            args=GRPOConfig(**settings(tmp_path, **config)),
            **{"train_dataset": ROWS, "student_model": model} | arguments,
        )
    assert message in str(caught.value)


def test_the_teachers_engines_are_those_of_the_policy_in_grpos_settings():
    rollout = teacher_config(GRPOConfig(vllm_tensor_parallel_size=2)).rollout
    assert rollout.teacher_tensor_parallel == 2
    rollout = teacher_config(GRPOConfig(rollout=RolloutConfig(policy_engines=3))).rollout
    assert rollout.teacher_engines == 3


def test_guidances_are_sampled_with_all_settings_of_sampling(model):
    """All but greedy ones, which have none to choose from."""
    asked = []

    def generate(requests):
        asked.extend(requests)
        return [Completion([5], [-1.0], True) for _ in requests]

    sampling = {
        "top_p": 0.9, "top_k": 7, "min_p": 0.05, "repetition_penalty": 1.2, "stop": ["."],
        "bad_words": ["no"], "structured_outputs": {"regex": "[a-z. ]*"},
    }  # fmt: skip
    config = TeacherGRPOConfig(teacher=ModelConfig(path=model), templates=TEMPLATES, **sampling)
    classroom = Classroom(None, generate, Tokenizer(model), config)
    attempts = [Attempt(Question(0, "how many?", "4", {}), ["4"], "count")]
    for temperature in (0.7, 0.0):
        classroom.guide(attempts, "step 0", 1, temperature)
    found = [{name: getattr(request, name) for name in sampling} for request in asked]
    all_tokens = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
    assert found == [sampling, sampling | all_tokens]


def test_settings_of_its_own_configuration(model, tmp_path):
    config = TeacherGRPOConfig(
        teacher=ModelConfig(path=model), student=ModelConfig(path=model), output_dir=str(tmp_path)
    )
    for trainer in (TeacherGRPOTrainer(config), TeacherGRPOTrainer(args=config)):
        assert trainer.args.num_prompts_per_step == 16
    with pytest.raises(ConfigError, match=r"teacher.path=.*qwen2: model=nowhere is another"):
        TeacherGRPOTrainer("nowhere", args=config)
