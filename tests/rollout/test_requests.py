"""Seeds of requests, and how completions end."""

from itertools import product

import pytest

from grpo_mcore.rollout.requests import ended_itself, request_seed


def test_seed_is_the_same_in_every_run_and_version():
    assert request_seed(42, "step 3", 1, "guidance") == 4244314046454430243


def test_seeds_of_a_run_are_all_different_and_fit_a_signed_integer():
    keys = product(range(2), range(10), range(16), ("baseline", "probe", "taught", "guidance"))
    seeds = [request_seed(seed, f"step {step}", i, name) for seed, step, i, name in keys]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_numbers_and_their_text_are_the_same_key():
    assert request_seed(1, "2") == request_seed("1", 2) != request_seed("12")


def test_what_vllm_gives_up_is_no_sample():
    assert ended_itself("stop") and not ended_itself("length")
    for reason in ("abort", "error", None):
        with pytest.raises(RuntimeError, match=f"given up \\({reason}\\)"):
            ended_itself(reason)
