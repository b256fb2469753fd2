"""GRPOTrainer in one process: how updates use samples, where samples come from, and resuming."""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import peft
import pytest
import torch
import transformers
from datasets import Dataset, IterableDataset

from grpo_mcore.config import ConfigError
from grpo_mcore.errors import MismatchError
from grpo_mcore.objectives.advantages import group_advantages
from grpo_mcore.rewards import RewardError
from grpo_mcore.rollout.pool import RolloutPool
from grpo_mcore.steps.update import GRPOUpdate
from grpo_mcore.weights.sync import SyncError, WeightSync, _Link
from tests.end_to_end.conftest import records
from tests.objectives.trl_oracle import QUIET, loss_of, make_trainer
from tests.trainers.grpo_jobs import (
    CHATS,
    ROWS,
    Judge,
    SharedEngine,
    add_numbers,
    job,
    rollout,
    text_reward,
    trainer_of,
    write_chat_model,
)

pytestmark = pytest.mark.engine

TIMES = ("time/", "step_time", "train_runtime")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_chat_model(directory)
    return directory


@pytest.fixture(scope="module", autouse=True)
def engine():
    engine = SharedEngine()
    yield engine
    engine.close()


@pytest.fixture
def train(model, tmp_path):
    """Trains with settings; returns the trainer. `makes_room` is rollout.offload_policy, which is
    for GPUs, so that a config that has it is refused here."""

    def run(reward=text_reward, name="run", resume=None, output=None, makes_room=False, **settings):
        names = (
            "train_dataset", "eval_dataset", "peft_config", "tools", "environment", "rollout_func",
            "compute_metrics",
        )  # fmt: skip
        others = {key: settings.pop(key) for key in names if key in settings}
        trainer = trainer_of(job(model, output or tmp_path / name, **settings), reward, **others)
        trainer.args.rollout.offload_policy = makes_room
        trainer.train(resume)
        return trainer

    return run


@pytest.fixture
def seen(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """What the loss was given for each micro-batch, with the "step", from 0."""
    parts, real_call, real_loss = [], GRPOUpdate.__call__, GRPOUpdate.loss
    steps = itertools.count()
    step = None

    def update(self, batch):
        nonlocal step
        step = next(steps)
        return real_call(self, batch)

    def loss(self, log_probs, entropy, part):
        kept = {name: value.detach().clone() for name, value in part.items()}
        both = {"log_probs": log_probs.detach().clone(), "entropy": entropy.detach().clone()}
        parts.append(kept | both | {"step": step})
        return real_loss(self, log_probs, entropy, part)

    monkeypatch.setattr(GRPOUpdate, "__call__", update)
    monkeypatch.setattr(GRPOUpdate, "loss", loss)
    return parts


def steps_of(trainer) -> list[dict]:
    return [row for row in records(Path(trainer.args.output_dir)) if "grad_norm" in row]


def completions_of(trainer) -> list[dict]:
    return records(Path(trainer.args.output_dir), "completions")


def timeless(rows: list[dict], *others: str) -> list[dict]:
    """Without times, and what begins as `others` do."""
    return [{k: v for k, v in row.items() if not k.startswith((*TIMES, *others))} for row in rows]


def rows_of(parts: list[dict]) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for part in parts for row in part["tokens"]]


# How updates use samples.


CYCLE = {
    "num_prompts_per_step": None,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "vllm_importance_sampling_correction": False,
}
"""8 samples a generation, 4 a step; steps 0 and 1 use each once, steps 2 and 3 again."""


@QUIET
@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "dapo"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"loss_type": "dr_grpo", "delta": 1.1},
        {"loss_type": "cispo", "epsilon_high": 5.0, "off_policy_mask_threshold": 1e-3},
    ],
)
def test_updates_of_a_cycle_are_trls(train, seen, settings):
    shared = {"beta": 0.1, "max_completion_length": 8} | settings
    trainer = train(max_steps=4, **CYCLE, **shared)
    length = max(part["tokens"].shape[1] for part in seen)
    used = [[row + (0,) * (length - len(row)) for row in rows_of([part])] for part in seen]
    generation = {row for rows in used for row in rows}
    assert len(generation) == 8 and [part["step"] for part in seen] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {*used[0], *used[1], *used[2], *used[3]} == generation
    assert used[4:] == used[:4]
    tokens = sum(part["mask"].sum() for part in seen[:4])

    oracle = make_trainer(
        gradient_accumulation_steps=2, steps_per_generation=4, num_iterations=2, **shared
    )
    for step, metrics in enumerate(steps_of(trainer)):
        parts, loss = [part for part in seen if part["step"] == step], 0.0
        for part in parts:
            columns = {
                "old_per_token_logps": part["old"],
                "ref_per_token_logps": part["reference"],
                "sampling_per_token_logps": part["rollout"],
            }
            given = (part[name] for name in ("log_probs", "advantages", "mask", "entropy"))
            loss += loss_of(oracle, *given, tokens, **columns)
        assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-6)
        # The policy before the generation's updates sampled; only the first is of that policy.
        drift = max(((p["log_probs"] - p["old"]) * p["mask"]).abs().max() for p in parts)
        assert drift < 1e-5 if step == 0 else drift > 1e-3
        for part in parts:
            assert ((part["old"] - part["rollout"]) * part["mask"]).abs().max() < 1e-4
    assert "reward" in steps_of(trainer)[0] and "reward" not in steps_of(trainer)[1]


def test_a_step_of_two_generations(train, seen):
    """Three micro-batches a generation, two a step: the second step straddles two."""
    trainer = train(
        max_steps=3,
        num_prompts_per_step=None,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=3,
        loss_type="dapo",
    )
    assert ["reward" in row for row in steps_of(trainer)] == [True, True, False]
    assert [len(rows_of([p for p in seen if p["step"] == step])) for step in range(3)] == [8] * 3
    old = [((p["log_probs"] - p["old"]) * p["mask"]).abs().max().item() for p in seen]
    # (generation, part): (0, 0) (0, 1) | (0, 2) (1, 0) | (1, 1) (1, 2)
    assert old[0] < 1e-5 and old[1] < 1e-5 and old[3] < 1e-5
    assert old[2] > 1e-3 and old[4] > 1e-3 and old[5] > 1e-3
    for first in (0, 3):
        tokens = sum(part["mask"].sum().item() for part in seen[first : first + 3])
        for part in seen[first : first + 3]:
            assert part["tokens_per_update"].tolist() == [tokens * 2 / 3] * 4


def test_a_step_of_two_whole_generations_measures_both(train):
    once = train(name="once", num_prompts_per_step=4)
    twice = train(num_prompts_per_step=None, gradient_accumulation_steps=8, steps_per_generation=4)
    samples = completions_of(twice)
    assert len(samples) == 16
    rewards = torch.tensor([row["reward"] for row in samples])
    [found], [expected] = steps_of(twice), steps_of(once)
    assert found["reward"] == pytest.approx(rewards.mean().item())
    assert found["completions/max_length"] == 8.0
    assert found.keys() == expected.keys()


# What the objective's options change.


@pytest.mark.seed(51)
def test_a_users_function_completes_a_generation(train, engine):
    """Restarts before it and after it are not in a row."""
    train()  # so that there is an engine
    engine.pool.restarts = [2]
    train(rollout_func=rollout, name="own")
    assert engine.pool.restarts == [0]


def test_samples_of_a_users_function(train, seen):
    asked = []

    def reward(prompts, completions, place, answer, **_):
        asked.append((place, answer))
        return [float(p % 3) for p in place]

    trainer = train(reward, rollout_func=rollout)
    [(place, answer)] = asked
    assert place == [0, 1, 2, 3] * 2 and len(set(answer)) == 2
    assert torch.cat([part["mask"].sum(1) for part in seen]).tolist() == [4.0] * 8
    [metrics] = steps_of(trainer)
    assert metrics["completions/mean_length"] == 4
    assert metrics["completions/clipped_ratio"] == 0.5


@pytest.mark.parametrize(
    "fault, message",
    [
        (lambda given: given.pop("logprobs"), "has to return a dictionary with prompt_ids, comp"),
        (lambda given: given["logprobs"].pop(), "7 logprobs for 8 prompts"),
        (lambda given: given["logprobs"][3].pop(), "completion 3 has 5 tokens and 4 logprobs"),
        (lambda given: given["env_mask"][0].pop(), "completion 0 has 5 tokens and 4 env_mask"),
        (lambda given: given["completion_ids"].__setitem__(2, []), "completion 2 has no tokens"),
    ],
)
def test_samples_that_cannot_be_are_refused(train, fault, message):
    def faulty(prompts, trainer):
        given = rollout(prompts, trainer)
        fault(given)
        return given

    with pytest.raises(RewardError, match=f"^rollout_func: {message}"):
        train(rollout_func=faulty)


def test_truncated_completions_leave_the_loss_only(train, seen):
    train(rollout_func=rollout, mask_truncated_completions=True)
    tokens = torch.cat([part["mask"].sum(1) for part in seen])
    advantages = torch.cat([part["advantages"] for part in seen])
    assert tokens.tolist() == [0, 4] * 4
    assert advantages.view(2, 4).sum(1).abs().max() < 1e-5 and (advantages != 0).any()


def test_kl_in_the_reward(train, seen):
    settings = {"use_kl_in_reward": True, "kl_estimator": "k1", "beta": 0.5, "max_steps": 2}
    trainer = train(**settings)
    rewards = torch.tensor([row["reward"] for row in completions_of(trainer)][8:])
    parts = [part for part in seen if part["step"] == 1]
    kl = torch.cat([((p["log_probs"] - p["reference"]) * p["mask"]).sum(1) for p in parts])
    assert kl.abs().max() > 0.01
    expected = group_advantages(rewards - 0.5 * kl, 4)
    found = torch.cat([part["advantages"] for part in parts])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert "kl" not in steps_of(trainer)[1]


def test_high_entropy_tokens_and_adaptive_entropy(train, seen):
    trainer = train(
        top_entropy_quantile=0.5, use_adaptive_entropy=True, entropy_coef=0.1, entropy_target=10.0,
        entropy_coef_delta=0.05, max_steps=3,
    )  # fmt: skip
    parts = [part for part in seen if part["step"] == 0]
    mask = torch.cat([part["mask"][part["mask"] > 0] for part in parts]).bool()
    kept = torch.cat([part["entropy_mask"][part["mask"] > 0] for part in parts])
    entropy = torch.cat([part["entropy"][part["mask"] > 0] for part in parts])
    assert abs(kept.sum() - len(mask) / 2) <= 1
    assert entropy[kept].min() >= entropy[~kept].max() - 1e-5
    coefficients = [row["entropy_coef"] for row in steps_of(trainer)]
    assert coefficients == pytest.approx([0.0, 0.15, 0.2])
    plain = train(name="plain")
    assert steps_of(trainer)[0]["grad_norm"] < 0.9 * steps_of(plain)[0]["grad_norm"]


def test_off_policy_sequences_leave_the_policy_term(train):
    settings = {"num_iterations": 2, "max_steps": 2, "beta": 0.0}
    plain = steps_of(train(name="plain", **settings))
    masked = steps_of(train(off_policy_mask_threshold=1e-4, **settings))
    assert masked[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-4)
    assert masked[1]["grad_norm"] < plain[1]["grad_norm"] * 0.95


def parameters(chunks) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in chunks.parameters()]


def test_a_moving_reference(train):
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.75}
    first = train(name="first", max_steps=1, **settings)
    initial = parameters(first._session.update.reference.chunks)
    second = train(name="second", max_steps=2, **settings)
    policy = parameters(second._session.policy.chunks)
    mixed = parameters(second._session.update.reference.chunks)
    third = train(name="third", max_steps=3, **settings)
    for was, now, moved, later in zip(
        initial, policy, mixed, parameters(third._session.update.reference.chunks), strict=True
    ):
        torch.testing.assert_close(moved, 0.25 * was + 0.75 * now)
        assert torch.equal(moved, later)
    assert any(not torch.equal(was, now) for was, now in zip(initial, mixed, strict=True))


def test_a_reference_that_cannot_move_is_refused(model, tmp_path):
    with pytest.raises(ConfigError, match=r"^sync_ref_model=True: needs beta above 0"):
        trainer_of(job(model, tmp_path, sync_ref_model=True, beta=0.0))
    with pytest.raises(ConfigError, match=r"^sync_ref_model=True: with peft_config the reference"):
        trainer_of(job(model, tmp_path, sync_ref_model=True), peft_config=peft.LoraConfig())


# Dynamic sampling.


def odd_reward(prompts, completions, answer, **_) -> list[float]:
    """Flat for prompts of even numbers."""
    rewards = text_reward(prompts, completions)
    return [r if n % 2 else 1.0 for r, n in zip(rewards, answer, strict=True)]


def test_flat_groups_are_replaced(train):
    trainer = train(odd_reward, use_dynamic_sampling=True, max_steps=3, save_strategy="steps",
                    save_steps=2)  # fmt: skip
    metrics = steps_of(trainer)
    assert all(row["frac_reward_zero_std"] == 0 for row in metrics)
    assert len({row["prompt"] for row in completions_of(trainer)}) == 6
    numbers = {int(row["prompt"].split()[2]) for row in completions_of(trainer)}
    assert all(number % 2 for number in numbers)
    assert max(row["dynamic_sampling/batches"] for row in metrics) > 1
    assert sum(row["dynamic_sampling/replaced"] for row in metrics) > 0
    taken = 6 + sum(row["dynamic_sampling/replaced"] for row in metrics)
    assert trainer._session.generations.cursor == taken

    checkpoint = Path(trainer.args.output_dir) / "checkpoints" / "iter_0000002"
    resumed = train(odd_reward, name="resumed", resume=str(checkpoint), use_dynamic_sampling=True,
                    max_steps=3)  # fmt: skip
    assert timeless(steps_of(resumed)) == timeless(metrics[2:])
    assert resumed._session.generations.cursor == taken


def test_replacing_is_bounded(train):
    def reward(prompts, completions, **_):
        return [1.0] * len(prompts)

    settings = {"use_dynamic_sampling": True, "dynamic_sampling_max_gen_batches": 3}
    [metrics] = steps_of(train(reward, **settings))
    assert metrics["dynamic_sampling/batches"] == 3
    assert metrics["dynamic_sampling/replaced"] == 4
    assert metrics["frac_reward_zero_std"] == 1


# Agreement with the engine.


def verdicts(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("sync ")]


def test_each_steps_record_and_verdict_say_how_engine_and_trainer_agree(train, seen, capsys):
    rows = steps_of(train(max_steps=2))
    assert len(rows) == 2
    for step, row in enumerate(rows):
        parts = [part for part in seen if part["step"] == step]
        gaps = [(p["log_probs"] - p["rollout"])[p["mask"] > 0].double() for p in parts]
        gap = torch.cat(gaps)
        for name in ("", "at_0-15/"):  # completions are of 8 tokens at most
            found = {key: row[f"sampling/{name}{key}"] for key in ("mismatch", "max", "ess")}
            assert found["mismatch"] == pytest.approx(gap.abs().exp().mean().item(), abs=1e-12)
            assert found["max"] == gap.abs().max().item() < 1e-4
            size = gap.exp().sum() ** 2 / gap.exp().square().sum()
            assert found["ess"] == pytest.approx(size.item() / len(gap), abs=1e-12)
        assert row["sampling/mismatch_warning"] == 0
    tensors = int(rows[0]["sync/tensors"])
    assert verdicts(capsys) == [
        f"sync ok: 0 of {tensors} tensors differ, mismatch 1.0000, engine {n} = trainer {n}"
        for n in (0, 1)
    ]


def test_verdicts_name_the_versions_that_sampled(train, capsys):
    """Four updates on each generation; one of them resumed amid it."""
    settings = CYCLE | {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    whole = train(name="whole", **settings)
    said = verdicts(capsys)
    versions = [line.partition("engine ")[2] for line in said]
    assert versions == ["0 = trainer 0"] * 4 + ["4 = trainer 4"] * 2
    checkpoint = Path(whole.args.output_dir) / "checkpoints" / "iter_0000003"
    train(name="resumed", resume=str(checkpoint), **settings)
    assert verdicts(capsys) == said[3:]


def test_verdicts_are_of_engines_that_sleep_by_then(train, capsys, monkeypatch):
    def sleep(pool) -> None:
        pool.versions = [-1]

    monkeypatch.setattr(RolloutPool, "sleep", sleep)
    train(max_steps=2)
    versions = [line.partition("engine ")[2] for line in verdicts(capsys)]
    assert versions == ["0 = trainer 0", "1 = trainer 1"]


def test_disagreement_is_told_once_and_recorded(train, capsys):
    """What the function says of its samples is made up."""
    rows = steps_of(train(rollout_func=rollout, max_steps=2))
    assert [row["sampling/mismatch_warning"] for row in rows] == [1, 1]
    output = capsys.readouterr().out
    assert output.count("warning: step 1: sampling/mismatch is") == 1
    assert output.count("above rollout.mismatch_warn=1.1") == 1
    assert output.count("sync in doubt: 0 of ") == 2


def test_a_run_stops_above_its_limit_and_keeps_the_record(train, tmp_path):
    limits = {"mismatch_warn": None, "mismatch_stop": 1.12}
    with pytest.raises(
        MismatchError, match=r"^step 1: sampling/mismatch is .* above rollout\.mism"
    ):
        train(rollout_func=rollout, rollout=limits)
    [row] = records(tmp_path / "run")
    assert row["sampling/mismatch"] > 1.12


@contextmanager
def corrupted(sync: int) -> Iterator[None]:
    """A weight changes on its way in the sync of this number, of which the first is before the
    run."""
    submit, stream, begun = _Link.submit, WeightSync._send_weights, []

    def send_weights(sync, *arguments):
        begun.append(sync)
        return stream(sync, *arguments)

    def corrupt(link, method, *arguments):
        if method == "receive_bucket" and len(begun) == sync:
            number, place = arguments
            for slot in begun[-1].slots[number]:
                if slot.name == "model.layers.2.mlp.down_proj.weight":
                    begun[-1].buffers[place][slot.offset + 7] ^= 1
        submit(link, method, *arguments)

    counting = patch.object(WeightSync, "_send_weights", send_weights)
    with counting, patch.object(_Link, "submit", corrupt):
        yield


@pytest.mark.parametrize("makes_room", [False, True])
def test_a_run_stops_at_a_weight_that_changed_on_its_way(train, tmp_path, makes_room):
    """In the sync after the second step, which is kept; its evaluation is made up for."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 100}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": ROWS[:2]}
    train(name="whole", **settings)
    with corrupted(3), pytest.raises(SyncError) as raised:
        train(makes_room=makes_room, **settings)
    first, last = str(raised.value).splitlines()
    assert "tensor model.layers.2.mlp.down_proj.weight is" in first
    assert last == "step 2 is saved; resume=auto goes on from it"
    train(resume="auto", **settings)
    rows, whole = (timeless(records(tmp_path / name), "sync/") for name in ("run", "whole"))
    assert rows == whole


def test_a_weight_that_changed_after_the_last_step_is_told_once_the_model_is_saved(train, tmp_path):
    with corrupted(3), pytest.raises(SyncError, match=r"tensor model\.layers\.2\.mlp\.down_proj"):
        train(max_steps=2)
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_truncated_sampling_has_no_limit(train, capsys):
    train(top_k=2, vllm_importance_sampling_correction=False)
    output = capsys.readouterr().out
    assert "rollout.mismatch_warn=1.1 is off with top_k=2: the engine's log-probabilities" in output
    assert "sync ok: 0 of " in output and "warning: step" not in output


def test_a_policy_that_makes_room_for_its_engines_trains_the_same(train, monkeypatch):
    found, settings = {"push": [], "submit": []}, {"max_steps": 3, "beta": 0.1}
    push, submit, parameters = WeightSync.push, RolloutPool.submit, []

    def look(name) -> None:
        held = parameters[0].untyped_storage(), parameters[0].main_grad.untyped_storage()
        found[name].append([bool(storage.nbytes()) for storage in held])

    def pushed(sync, *arguments):
        parameters[:] = sync.chunks.parameters()
        look("push")
        return push(sync, *arguments)

    def submitted(*arguments):
        look("submit")
        return submit(*arguments)

    monkeypatch.setattr(WeightSync, "push", pushed)
    monkeypatch.setattr(RolloutPool, "submit", submitted)
    runs = []
    for makes_room in (False, True):
        for each in found.values():
            each.clear()
        trainer = train(name=f"makes room {makes_room}", makes_room=makes_room, **settings)
        runs.append(timeless(steps_of(trainer)))
    # Whether there were parameters, and gradients; the first sync is before the run.
    assert found == {"push": [[True, True]] + [[True, False]] * 2, "submit": [[False, False]] * 3}
    # It is given the engines when they are to sample: not after the last step, nor in the first.
    sent = [{k: row.pop(k) for k in list(row) if k.startswith("sync/")} for row in runs[0]]
    assert [{k: row.pop(k) for k in sent[0] if k in row} for row in runs[1]] == [{}, *sent[:2]]
    assert runs[0] == runs[1]


# Resuming.


RESUMED = {
    "cycle, adaptive entropy, moving reference": CYCLE
    | {
        "beta": 0.1,
        "use_adaptive_entropy": True,
        "entropy_coef": 0.1,
        "entropy_target": 10.0,
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "vllm_importance_sampling_correction": True,
    },
    "a step of two generations": {
        "num_prompts_per_step": None,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 3,
    },
    "dropout of adapters": {
        "num_iterations": 2,
        "peft_config": peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3),
    },
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_within_a_generation_is_the_same(train, name):
    settings = RESUMED[name] | {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    whole = train(name="whole", **settings)
    for step in (1, 3):
        checkpoint = Path(whole.args.output_dir) / "checkpoints" / f"iter_000000{step}"
        resumed = train(name=f"from {step}", resume=str(checkpoint), **settings)
        assert timeless(steps_of(resumed)) == timeless(steps_of(whole)[step:])
        final = [Path(t.args.output_dir) / "final" for t in (whole, resumed)]
        files = [next(d.glob("*.safetensors")).read_bytes() for d in final]
        assert files[0] == files[1]


def test_samples_left_over_are_used_as_they_were_meant_or_not_at_all(train):
    settings = {"num_iterations": 2, "beta": 0.1, "save_strategy": "steps", "save_steps": 1}
    whole = train(name="whole", max_steps=2, **settings)
    within, after = (
        str(Path(whole.args.output_dir) / "checkpoints" / f"iter_000000{step}") for step in (1, 2)
    )
    for change, named in (
        ({"num_iterations": 1}, "num_iterations=1: .* has num_iterations=2"),
        ({"beta": 0.0}, "beta above 0=False: .* has beta above 0=True"),
        ({"num_generations": 2}, "num_generations=2: .* has num_generations=4"),
        ({"num_prompts_per_step": 4}, "sequences of a generation=16: .* a generation=8"),
    ):
        with pytest.raises(ConfigError, match=f"^{named}"):
            train(name="refused", resume=within, max_steps=2, **settings | change)
    # The same sequences in other micro-batches, and another use of samples to come.
    same = train(name="same", resume=within, max_steps=2, per_device_train_batch_size=4, **settings)
    [found], [expected] = timeless(steps_of(same)), timeless(steps_of(whole)[1:])
    assert found == pytest.approx(expected, abs=1e-5, rel=1e-5)
    later = train(name="later", resume=after, max_steps=3, **settings | {"num_iterations": 1})
    assert [row["step"] for row in steps_of(later)] == [3]


def test_all_tokens_of_prompts_and_completions_are_counted(train, seen):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole = train(name="whole", **settings)
    steps = [sum(p["lengths"].sum().item() for p in seen if p["step"] == n) for n in range(3)]
    counts = [row["num_tokens"] for row in steps_of(whole)]
    assert counts == list(itertools.accumulate(steps))
    checkpoint = Path(whole.args.output_dir) / "checkpoints" / "iter_0000002"
    resumed = train(name="resumed", resume=str(checkpoint), **settings)
    assert [row["num_tokens"] for row in steps_of(resumed)] == counts[2:]


# Adapters.


def test_adapters(train, model, seen):
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
    trainer = train(peft_config=config, max_steps=3, learning_rate=1e-2)
    metrics = steps_of(trainer)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert metrics[2]["kl"] > 1e-3
    assert all(row["sampling/max"] < 1e-4 for row in metrics)
    final = Path(trainer.args.output_dir) / "final"
    assert not (final / "model.safetensors").exists()
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, final).eval()
    last = next(part for part in seen if part["step"] == 2)
    policy, _ = trainer._session.policy.log_probs({n: last[n] for n in ("tokens", "lengths")})
    with torch.no_grad():
        trained = hf_log_probs(adapted, last["tokens"])
        with adapted.disable_adapter():
            untrained = hf_log_probs(adapted, last["tokens"])
    masked = last["mask"] > 0
    torch.testing.assert_close(policy[masked], trained[masked], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(last["reference"][masked], untrained[masked], atol=1e-4, rtol=1e-4)
    assert (trained - untrained)[masked].abs().max() > 1e-2


def hf_log_probs(model, tokens: torch.Tensor) -> torch.Tensor:
    found = model(tokens).logits.log_softmax(-1).gather(2, tokens.roll(-1, 1)[..., None])
    return found.squeeze(2)


# Tools and environments.


@pytest.mark.seed(61, 69)
def test_an_environment(train, seen):
    trainer = train(
        [], environment=Judge, train_dataset=CHATS, max_completion_length=48,
        max_tool_calling_iterations=1, max_prompt_length=100,
    )  # fmt: skip
    [metrics] = steps_of(trainer)
    samples = completions_of(trainer)
    assert 1 < metrics["turns/mean"] <= 2
    assert metrics["rewards/Judge/mean"] == pytest.approx(metrics["reward"], rel=1e-5)
    assert metrics["sampling/max"] < 1e-4
    assert all(row["prompt"][-1]["content"].endswith(" think.") for row in samples)
    conversations = [row["completion"] for row in samples]
    assert {len(turns) for turns in conversations} == {1, 3} or {3} == {*map(len, conversations)}
    # Between the first sampled token and the last are those of the environment.
    for part in seen:
        for row, mask in zip(part["tokens"], part["mask"].bool(), strict=True):
            places = mask.nonzero()[:, 0]
            whole = row[places[0] + 1 : places[-1] + 2]
            if len(places) < len(whole):
                assert "and now?" in trainer.job.tokenizer.decode(whole.tolist())
    assert any(p["mask"].sum() < 2 * 48 for p in seen)


def test_a_conversation_keeps_to_the_sequence_length(train, seen):
    train([], environment=Judge, train_dataset=CHATS, max_sequence_length=100)
    lengths = torch.cat([part["lengths"] for part in seen])
    assert 90 < lengths.max() <= 100


@pytest.mark.seed(50)
def test_tools(train, seen, engine):
    """Half of the first turns are made to call a tool; what follows its answer is sampled."""
    with engine.calling_tools():
        trainer = train(
            tools=[add_numbers], train_dataset=CHATS, max_completion_length=150,
            vllm_importance_sampling_correction=False,
        )  # fmt: skip
    [metrics] = steps_of(trainer)
    assert metrics["tools/call_frequency"] == 0.5 and metrics["tools/failure_frequency"] == 0
    conversations = [row["completion"] for row in completions_of(trainer)]
    for conversation in conversations[::2]:
        assert conversation[1] == {"role": "tool", "name": "add_numbers", "content": "7"}
        assert conversation[2]["role"] == "assistant"
    prompt = trainer.job.tokenizer.decode(seen[0]["tokens"][0].tolist())
    assert "Adds two numbers." in prompt


# Rewards that fail.


def fails(prompts, completions, **_):
    raise KeyError("no such answer")


def gives_nan(prompts, completions, **_):
    return [float("nan")] * len(prompts)


def takes_long(prompts, completions, **_):
    import time

    time.sleep(5)
    return [0.0] * len(prompts)


@pytest.mark.parametrize(
    "reward, message",
    [
        (fails, "reward function fails failed at step 1: KeyError: 'no such answer'"),
        (gives_nan, "reward function gives_nan returned nan"),
        (takes_long, "reward function takes_long took more than 0.2 s at step 1"),
    ],
)
def test_a_reward_that_fails_ends_the_run(train, reward, message):
    with pytest.raises(RewardError, match=message):
        train(reward, reward_timeout=0.2)


def test_samples_without_a_reward(train, seen):
    def reward(prompts, completions, **_):
        return [None if n % 4 == 0 else float(n) for n in range(len(prompts))]

    trainer = train(reward)
    assert steps_of(trainer)[0]["reward"] == pytest.approx((1 + 2 + 3 + 5 + 6 + 7) / 6)
    advantages = torch.cat([part["advantages"] for part in seen])
    assert advantages.view(2, 4)[1].tolist() == pytest.approx([0, -1, 0, 1], abs=1e-3)


# Data.


def test_datasets_of_every_kind_give_the_same(train, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {"shuffle_dataset": False, "max_steps": 2}
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    kinds = {"list": ROWS, "table": Dataset.from_list(ROWS), "path": str(file), "stream": stream}
    found = {n: train(name=n, train_dataset=d, **settings) for n, d in kinds.items()}
    expected = timeless(steps_of(found["list"]))
    for trainer in found.values():
        assert [
            {k: v for k, v in row.items() if k != "epoch"} for row in timeless(steps_of(trainer))
        ] == [{k: v for k, v in row.items() if k != "epoch"} for row in expected]
    prompts = [row["prompt"] for row in completions_of(found["stream"])][::4]
    assert prompts == [row["prompt"] for row in ROWS[:4]]


def test_a_stream_is_shuffled_and_needs_a_number_of_steps(train, model, tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    prompts = [row["prompt"] for row in completions_of(train(train_dataset=stream))][::4]
    assert prompts != [row["prompt"] for row in ROWS[:2]]
    with pytest.raises(ConfigError, match=r"^max_steps=-1: must be set, as train_dataset is a str"):
        trainer_of(job(model, tmp_path, max_steps=-1), train_dataset=stream)


def test_overlong_prompts(train, model, tmp_path):
    rows = [{"prompt": "tom " * 20}, *({"prompt": f"ann has {n} pens."} for n in range(4))]
    settings = {"max_prompt_length": 12, "shuffle_dataset": False}
    with pytest.raises(ConfigError, match=r"^train_dataset: row 0 has a prompt of .* tokens, more"):
        train(train_dataset=rows, **settings)
    trainer = train(name="kept", train_dataset=rows, overlong="drop", **settings)
    assert trainer.job.train_size == 4
    assert completions_of(trainer)[0]["prompt"] == "ann has 0 pens."


def test_a_sequence_is_cut_off(train, seen):
    trainer = train(max_sequence_length=20, max_completion_length=18)
    assert torch.cat([part["lengths"] for part in seen]).max() == 20
    assert steps_of(trainer)[0]["completions/clipped_ratio"] > 0


# Evaluation.


def test_evaluation_has_its_own_number_of_samples(train):
    def measure(prediction):
        assert len(prediction.predictions) == len(prediction.label_ids) == 9
        return {"mean_answer": sum(prediction.label_ids) / 9}

    trainer = train(eval_dataset=ROWS[:3], num_generations_eval=3, compute_metrics=measure)
    [before, after] = [r for r in records(Path(trainer.args.output_dir)) if "eval_reward" in r]
    assert before["eval_mean_answer"] == after["eval_mean_answer"] == 1
    assert before["eval_reward"] != after["eval_reward"]


def test_what_is_too_long_for_the_engine_is_refused(train):
    trainer = train(train_dataset=ROWS)
    longer = [{"prompt": "tom has " + "2 " * 20, "answer": 2}]
    with pytest.raises(
        ConfigError, match=r"row 0 needs 5. tokens of the engine, which was started"
    ):
        trainer.evaluate(longer)
