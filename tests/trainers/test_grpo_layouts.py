"""The same prompts and seeds give the same run of GRPOTrainer at every layout."""

from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.conftest import records, run_script
from tests.trainers.grpo_worker import (
    AFTER_REFUSAL,
    AGAIN,
    FAILURES,
    LAYOUTS,
    REFUSED,
    RESUMED,
    SAMPLES,
    SAVED,
    SAVED_STEP,
)

pytestmark = [pytest.mark.cores(4), pytest.mark.engine]

LOCAL = ("time/", "sync/", "step_time")
"""Metrics that may differ."""


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """What the worker wrote; it ends with an error."""
    directory = tmp_path_factory.mktemp("layouts")
    worker = Path(__file__).with_name("grpo_worker.py")
    printed = run_script(worker, directory, ranks=4, fails=True, timeout=400)
    assert (directory / "engine.pid").exists(), printed[:6000]
    return directory


def steps_of(directory: Path) -> list[dict]:
    """The metrics of its steps."""
    return [
        {name: value for name, value in row.items() if not name.startswith(LOCAL)}
        for row in records(directory)
        if "grad_norm" in row
    ]


def assert_same(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected) > 0
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "1x1x1"])
def test_a_run_is_the_same_at(output, name):
    texts = [records(output / case, "completions") for case in ("1x1x1", name)]
    assert len(texts[0]) == 16
    assert [row["completion"] for row in texts[1]] == [row["completion"] for row in texts[0]]
    assert_same(steps_of(output / name), steps_of(output / "1x1x1"))


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_within_a_generation_is_the_same_at(output, name):
    assert_same(steps_of(output / name), steps_of(output / "1x1x1")[SAVED_STEP:])


@pytest.mark.parametrize("name", RESUMED)
def test_samples_left_over_are_saved_as_they_were_loaded(output, name):
    """Whichever pipeline stage has them."""
    first, again = (
        load_file(output / folder / f"iter_{SAVED_STEP:07d}" / "tensors.safetensors")
        for folder in (f"{SAVED}/checkpoints", f"{name}/{AGAIN}")
    )
    assert {"1/old", "1/reference"} <= again.keys() == first.keys()
    for entry, tensor in first.items():  # a layout may add padding
        cut = again[entry][tuple(map(slice, tensor.shape))]
        assert torch.equal(cut, tensor), entry
        assert again[entry].count_nonzero() == tensor.count_nonzero(), entry


def test_a_loss_that_is_refused_leaves_the_trained_model(output):
    saved, final = (
        load_file(output / REFUSED / folder / "model.safetensors")
        for folder in (AFTER_REFUSAL, "final")
    )
    assert saved.keys() == final.keys()
    assert all(torch.equal(saved[name], final[name]) for name in final)


@pytest.mark.parametrize("name", SAMPLES)
def test_data_parallel_ranks_have_the_same_samples(output, name):
    single, double = (output / f"{layout} {name}" for layout in ("1x1x1", "1x1x2"))
    assert records(double, "completions") == records(single, "completions")
    assert_same(steps_of(double), steps_of(single))


@pytest.mark.parametrize("name", FAILURES)
def test_every_rank_is_told_of_an_error(output, name):
    errors = [file.read_text() for file in sorted(output.glob(f"{name}.*.txt"))]
    if "rollout" in name:
        assert errors == ["LookupError: no samples today"] * 2
    else:
        what = "reward function reward_that_fails failed at step 1: LookupError: no reward today"
        assert errors == [f"RewardError: {what}"] * 4


def test_no_engine_outlives_an_error(output):
    with suppress(psutil.NoSuchProcess):  # gone before its trainer, or soon after
        psutil.Process(int((output / "engine.pid").read_text())).wait(timeout=20)
