"""The gain in likelihood of the right answer: what the student's own model says of it is what
transformers says, in both placements, and a run is trained on it.

Teacher and student are of different families, with tokenizers and chat templates of their own."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer, LlamaTokenizer

from examples.demo import problems
from examples.demo.tokenizer import build_tokenizer
from grpo_mcore.data.text import extract_teaching
from grpo_mcore.data.tokenizer import Tokenizer
from tests.conftest import write_family_model
from tests.data.sentencepiece_model import train_tokenizer
from tests.end_to_end.conftest import records, run_command, run_script

pytestmark = [pytest.mark.cores(4), pytest.mark.engine]

HERE = Path(__file__).parent
BASELINE = "{question} answer :"
WITH_TEACHING = "{question} teacher : {teaching} answer :"
OF_TEACHER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OF_STUDENT = (
    "{{ bos_token }}{% for m in messages %}[INST] {{ m.content | trim }} [/INST]{% endfor %}"
)
STEPS, LONGEST_TEACHING = 2, 12
PLACEMENTS = {
    "separate": (2, ["layout.teacher=1x1x1", "layout.student=1x1x1"]),
    "colocated": (1, []),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> SimpleNamespace:
    """A Qwen3 that teaches, a Llama with a SentencePiece tokenizer, and their questions, of which
    the first has no worked answer."""
    root = tmp_path_factory.mktemp("pair")
    teacher, student = build_tokenizer(), root / "sentencepiece"
    student.mkdir()
    train_tokenizer(student)
    write_family_model(root / "teacher", "Qwen3Config", max_position_embeddings=512)
    teacher.chat_template = OF_TEACHER
    teacher.save_pretrained(root / "teacher")
    inner = LlamaTokenizer.from_pretrained(student)
    inner.chat_template = OF_STUDENT
    write_family_model(
        root / "student",
        "LlamaConfig",
        max_position_embeddings=512,
        num_hidden_layers=4,
        vocab_size=334,
        bos_token_id=inner.bos_token_id,
        eos_token_id=inner.eos_token_id,
        pad_token_id=None,
    )
    for file in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        (root / "student" / file).unlink(missing_ok=True)
    inner.save_pretrained(root / "student")
    rows = [problems.rl_row(question) for question in problems.train_questions(0, 8)]
    rows[0]["solution"] = None
    data = root / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SimpleNamespace(teacher=root / "teacher", student=root / "student", data=data, rows=rows)


def run(pair, output: Path, processes: int, *overrides: str) -> Path:
    settings = {
        "prepare": "null", "teacher.path": pair.teacher, "student.path": pair.student,
        "data.train": pair.data, "data.eval": "null", "data.reference_column": "solution",
        "rewards": "[adaptive,likelihood_gain]", "reward_weights": "[1,0.5]",
        "templates.baseline": f"'{BASELINE}'", "templates.with_teaching": f"'{WITH_TEACHING}'",
        "num_prompts_per_step": 4, "num_generations": 2, "per_device_train_batch_size": 8,
        "max_completion_length": LONGEST_TEACHING, "max_answer_tokens": 8, "log_completions": 8,
        "max_steps": STEPS, "shuffle_dataset": "false", "save_steps": 1,
        "rollout.kv_cache_gib": 0.05, "rollout.deadline_seconds": 240, "output_dir": output,
    }  # fmt: skip
    worker = HERE / "likelihood_worker.py"
    settings = [f"{k}={v}" for k, v in settings.items()]
    run_script(worker, *settings, *overrides, ranks=processes if processes > 1 else 0)
    return output


def run_at(placement: str, pair, output: Path, *overrides: str) -> Path:
    processes, layout = PLACEMENTS[placement]
    return run(pair, output, processes, f"layout.placement={placement}", *layout, *overrides)


@pytest.fixture(scope="module")
def finished(pair, tmp_path_factory) -> Path:
    """A run whose student has ranks of its own, which are asked through the mailbox."""
    return run_at("separate", pair, tmp_path_factory.mktemp("runs") / "run")


def lessons_of(directory: Path) -> list[dict]:
    rows = records(directory, "completions")
    assert len(rows) == STEPS * 8
    return rows


def with_reference(pair, rows: list[dict]) -> list[tuple[dict, str]]:
    """Lessons with the worked answers of their questions, where there are any."""
    solutions = {row["question"]: row["solution"] for row in pair.rows}
    return [(row, s) for row in rows if (s := solutions[row["question"]]) is not None]


@pytest.fixture(scope="module")
def said(pair, finished, tmp_path_factory) -> list[tuple]:
    """What transformers says: [prompt's tokens, completion's tokens, log-likelihood] without and
    with the teaching of each lesson, by turns."""
    tokenizer, turns = Tokenizer(str(pair.student)), []
    for row, solution in with_reference(pair, lessons_of(finished)):
        # Guidance may be longer in the student's tokens than in the teacher's.
        taught = tokenizer.truncate(extract_teaching(row["guidance"]), LONGEST_TEACHING)
        turns.append((BASELINE.replace("{question}", row["question"]), solution))
        prompt = WITH_TEACHING.replace("{question}", row["question"])
        turns.append((prompt.replace("{teaching}", taught), solution))
    file = tmp_path_factory.mktemp("reference") / "turns.json"
    file.write_text(json.dumps(turns))
    output = run_command([sys.executable, HERE / "likelihood_reference.py", pair.student, file])
    return json.loads(output.split("found ", 1)[1].splitlines()[0])


def test_gains_are_those_of_transformers(pair, finished, said):
    rows = lessons_of(finished)
    gains = [row["likelihood_gain"] for row, _ in with_reference(pair, rows)]
    values = [log_likelihood for *_, log_likelihood in said]
    expected = [taught - alone for alone, taught in zip(values[::2], values[1::2], strict=True)]
    assert gains == pytest.approx(expected, abs=1e-4)
    assert max(map(abs, gains)) > 0.01
    assert [row["likelihood_gain"] for row in rows].count(None) == len(rows) - len(gains) == 2


def test_a_run_is_trained_on_both_rewards(pair, finished):
    tokenizer = Tokenizer(str(pair.student))
    for record in records(finished):
        rows = [row for row in lessons_of(finished) if row["step"] == record["step"]]
        gains = []
        for row, solution in with_reference(pair, rows):
            gains.append(row["likelihood_gain"] / (len(tokenizer.encode(solution)) + 1))  # its end
            assert row["reward"] == pytest.approx(0.5 * gains[-1], abs=1e-6)
        mean = sum(gains) / len(gains)
        assert record["rewards/LikelihoodGainReward/mean"] == pytest.approx(mean, abs=1e-6)
        assert record["likelihood_gain"] == pytest.approx(mean, abs=1e-6)
        assert record["rewards/AdaptiveTeachingReward/mean"] == 0  # of a random student
        assert record["time/student_likelihoods"] > 0
        assert record["grad_norm"] > 1e-3
    first, second = [record["time/student_hidden_share"] for record in records(finished)]
    assert first == 0 < second <= 1


def test_attempts_are_saved_with_their_likelihoods(finished):
    state = json.loads((finished / "checkpoints" / "iter_0000001" / "state.json").read_text())
    attempts = state["trainer"]["attempts"]["step 1"]
    assert all(value < 0 for value in attempts["work"]["log_likelihoods"])
    assert len(attempts["work"]["log_likelihoods"]) == len(attempts["references"]) == 4


@pytest.mark.seed("A11")
def test_each_is_asked_in_its_own_chat_template(pair, finished):
    """Its own only, once, whatever the other has written in."""
    asked = {
        role: [
            AutoTokenizer.from_pretrained(getattr(pair, role)).decode(prompt)
            for call in records(finished, f"asked-{role}-0")
            for prompt in call
        ]
        for role in ("teacher", "student")
    }
    assert len(asked["teacher"]) == STEPS * 8
    assert len(asked["student"]) == STEPS * (4 + 4 + 8)
    for text in asked["teacher"]:
        assert text.startswith("<|im_start|>user\nquestion : ")
        assert text.endswith(" teaching :<|im_end|>\n<|im_start|>assistant\n")
        assert text.count("<|im_start|>") == 2 and "INST" not in text
    for text in asked["student"]:
        assert text.startswith("<s>") and text.endswith(" [/INST]")
        assert text.count("[INST]") == text.count("[/INST]") == text.count("<s>") == 1
        assert "<|im" not in text


def test_a_model_spread_over_ranks_says_the_same(pair, said, tmp_path):
    """At each layout of two, with micro-batches of so many sequences or tokens; five prompts, which
    no number of ranks divides."""
    file = tmp_path / "said.json"
    file.write_text(json.dumps(said[:5]))
    output = run_script(HERE / "layouts_worker.py", pair.student, file, ranks=2)
    lines = [line for line in output.splitlines() if line.startswith("difference")]
    assert len(lines) == 6
    for line in lines:
        *_, difference, count = line.split()
        assert float(difference) < 1e-4 and count == "5"


@pytest.mark.slow
def test_a_colocated_student_says_the_same(pair, finished, tmp_path):
    colocated = run_at("colocated", pair, tmp_path / "run")
    assert without_gains(colocated)[0] == without_gains(finished)[0]
    assert without_gains(colocated)[1] == pytest.approx(without_gains(finished)[1], abs=1e-6)


def without_gains(directory: Path) -> tuple[list[dict], list[float]]:
    """The lessons, and apart from them what follows from likelihoods: gains and rewards."""
    rows = records(directory, "completions")
    values = [row.pop(name) for row in rows for name in ("likelihood_gain", "reward")]
    values += [row["rewards"].pop("LikelihoodGainReward") for row in rows]
    return rows, [value for value in values if value is not None]


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_resumed_run_is_the_same(pair, tmp_path, placement):
    whole = run_at(placement, pair, tmp_path / "whole")
    first = whole / "checkpoints" / "iter_0000001"
    part = run_at(placement, pair, tmp_path / "part", f"resume={first}")

    def second(directory: Path) -> list:
        steps = [r for r in records(directory) if r["step"] == STEPS]
        texts = [r for r in records(directory, "completions") if r["step"] == STEPS]
        return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in steps + texts]

    assert second(part) == second(whole) and len(second(whole)) == 1 + 8
    weights = [directory / "final" / "model.safetensors" for directory in (part, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["layout.student=2x1x1", "rollout.student_tensor_parallel=2"],
        ["layout.student=1x1x2", "rollout.student_engines=2"],
    ],
    ids=["tensor parallel", "two engines"],
)
def test_a_student_spread_over_ranks_and_engines_says_the_same(pair, finished, tmp_path, options):
    separate = ["layout.placement=separate", "layout.teacher=1x1x1"]
    spread = run(pair, tmp_path / "run", 3, *separate, *options)
    assert without_gains(spread)[0] == without_gains(finished)[0]
    assert without_gains(spread)[1] == pytest.approx(without_gains(finished)[1], abs=1e-4)
