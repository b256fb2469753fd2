"""The bridge from Megatron to the CPU replaces only what is there, refuses what it cannot serve."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from grpo_mcore import device

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(device.is_cuda(), reason="the bridge serves machines without a GPU")


def run(program: str) -> str:
    """Runs `program` in a fresh interpreter and returns the last line of its output or error."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return (done.stdout + done.stderr).strip().splitlines()[-1]


def test_every_name_replaced_in_torch_is_torchs_own():
    program = """
import torch
from grpo_mcore import device
spaces = (torch, torch.cuda, torch.Tensor)
before = [dict(vars(space)) for space in spaces]
inherited = [set(dir(space)) for space in spaces]
device._answer_for_cuda()
for space, old, known in zip(spaces, before, inherited):
    replaced = {name for name, value in vars(space).items() if old.get(name) is not value}
    assert replaced, space
    assert replaced <= known, replaced - known
print("all there")
"""
    assert run(program) == "all there"


def test_torchs_own_choice_of_a_device_still_holds():
    """Where it did not, transformers loaded models with whatever lay in memory as buffers."""
    program = """
from grpo_mcore import device
device.prepare()
import torch
with torch.device("meta"):
    print(torch.tensor([]).device, torch.zeros(1).device, torch.arange(2, device="cuda").device)
"""
    assert run(program) == "meta meta cpu"


def test_every_name_replaced_in_megatron_is_defined_and_used_there():
    device.prepare()
    from megatron.core.tensor_parallel import random

    source = ast.parse(Path(find_spec(random.__name__).origin).read_text())
    defined = {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
    used = {
        node.id
        for node in ast.walk(source)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    replaced = {
        name
        for name, value in vars(random).items()
        if getattr(value, "__module__", None) == device.__name__
    }
    assert len(replaced) == 2
    assert replaced <= defined & used


def test_cuda_is_answered_by_the_cpu():
    device.prepare()
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.empty_like(torch.ones(2), device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch.ones(1).cuda().device.type == "cpu"
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.cuda.current_device() == torch.device("cpu")
    assert device.torch_device() == torch.device("cpu")


def test_other_series_of_megatron_is_refused(monkeypatch):
    monkeypatch.setattr(device, "version", lambda package: "0.17.2")
    monkeypatch.setattr(device, "_prepared", False)
    with pytest.raises(RuntimeError, match=r"megatron-core 0\.17\.2 is installed; .* 0\.16\.x"):
        device.prepare()


def test_megatron_imported_first_is_refused():
    program = "import megatron.core\nfrom grpo_mcore import device\ndevice.prepare()"
    assert run(program) == (
        "RuntimeError: import grpo_mcore before megatron.core on a machine without a GPU"
    )


def test_megatron_finds_the_process_ready_whoever_imports_it():
    program = "import grpo_mcore, torch, megatron.core.utils\nprint(torch.ones(1).type())"
    assert run(program) == "torch.cuda.FloatTensor"


def test_what_precedes_a_job_loads_neither_megatron_nor_vllm():
    program = """
import sys
import grpo_mcore.config, grpo_mcore.models.shape, grpo_mcore.launch, grpo_mcore.plan
import grpo_mcore.checkpoint.start, grpo_mcore.preflight.grpo_job
import grpo_mcore.preflight.offline_job, grpo_mcore.preflight.teaching_job
print([name for name in ("megatron", "vllm") if name in sys.modules])
"""
    assert run(program) == "[]"


def test_settings_and_the_command_load_no_torch():
    program = """
import sys, grpo_mcore.config, grpo_mcore.cli
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    assert run(program) == "[]"
