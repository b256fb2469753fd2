"""A sync that lacks something is caught by the engine's own account of what it was given."""

import pytest

from tests.end_to_end.conftest import ROOT, run_script

pytestmark = pytest.mark.engine

SCRIPT = """
import sys
from dataclasses import replace
import torch
from pathlib import Path
from grpo_mcore.config.compose import compose_config
from grpo_mcore.parallel.world import join
from grpo_mcore.models.build import load_model
from grpo_mcore.preflight.teaching_job import check_job
from grpo_mcore.steps.teaching_engines import start_role_engines
from grpo_mcore.rollout.requests import Request
from grpo_mcore.rollout.pool import StaleEngine
from grpo_mcore.weights import sync as sync_module

config = compose_config(Path(sys.argv[1]), "demo", sys.argv[2:])
config, job = check_job(config, 1)
with join(job.layouts, job.placement, 120) as world:
    role = world.roles["teacher"]
    pool = start_role_engines(role, config, job)
    shape = job.shapes["teacher"]
    chunks = load_model(shape, config.teacher, role, 0)
    pool.wait_until_ready()
    sync = sync_module.WeightSync(chunks, shape, role, pool, 16)

    def fails(what):
        try:
            sync.push(1)
        except sync_module.SyncError as error:
            print(what, "->", error)
        try:
            pool.generate([Request([5], 2, 0)])
        except StaleEngine as error:
            print(what, "->", error)

    whole = sync.buckets[0]
    missing = "decoder.layers.1.self_attention.linear_qkv.weight"
    kept = tuple(e for e in whole.entries if missing not in e.names)
    sync.buckets[0] = replace(whole, entries=kept)
    every = sync.slots[0]
    gone = [f"model.layers.1.self_attn.{kind}_proj.weight" for kind in "qkv"]
    sync.slots[0] = [slot for slot in every if slot.name not in gone]
    fails("left out")

    checksums = sync_module.checksums
    def corrupt(tensors):
        sums = checksums(tensors)
        at = next(i for i, s in enumerate(sync.slots[0]) if s.name.endswith("0.mlp.up_proj.weight"))
        tensors[at].view(torch.uint8).view(-1)[0] ^= 1
        return sums
    sync.buckets[0], sync.slots[0] = whole, every
    sync_module.checksums = corrupt
    fails("one bit")
    sync_module.checksums = checksums

    sync.push(2)
    print("proven", len(pool.generate([Request([5], 2, 0)])), pool.version)
    pool.close()
"""


@pytest.fixture(scope="module")
def output(job, tmp_path_factory) -> str:
    script = tmp_path_factory.mktemp("proof") / "script.py"
    script.write_text(SCRIPT)
    overrides = [o for o in job if not o.startswith(("experiment", "data.eval"))]
    overrides += ["data.eval=null", f"output_dir={script.parent / 'run'}"]
    return run_script(script, ROOT / "examples/configs", *overrides)


def test_a_parameter_that_is_left_out_is_named(output):
    assert "left out -> weight sync to version 1: parameter model.layers.1.self_attn.qkv" in output


def test_one_wrong_bit_is_named(output):
    assert "one bit -> weight sync to version 1: tensor model.layers.0.mlp.up_proj.wei" in output


@pytest.mark.seed("A2")
def test_unproven_engines_refuse_to_generate(output):
    assert output.count("the engines hold no proven weights") == 2
    assert "proven 1 2" in output
