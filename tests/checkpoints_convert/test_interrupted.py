"""Conversions that are stopped or run out of disk leave nothing, and the next one works."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from checkpoints_convert import hf_to_megatron, megatron_to_hf
from grpo_mcore.models.expected import hf_sizes
from grpo_mcore.models.families import read_shape
from grpo_mcore.models.hf_files import SINGLE
from tests.end_to_end.conftest import ROOT, clean_environment

FILE_LIMIT = 100_000


@pytest.fixture(scope="module")
def large(tiny_models, tmp_path_factory) -> Path:
    """A model of 1.6 GB of zeros that takes no room: long enough to be interrupted in."""
    directory = tmp_path_factory.mktemp("large") / "model"
    shutil.copytree(tiny_models / "llama", directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8}
    (directory / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, size in hf_sizes(read_shape("large", str(directory))).items():
        start, end = end, end + 4 * torch.Size(size).numel()
        header[name] = {"dtype": "F32", "shape": size, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (directory / SINGLE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return directory


def start(module: str, *arguments, limit: int = resource.RLIM_INFINITY) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", f"checkpoints_convert.{module}", *map(str, arguments)],
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_stopped_conversion_leaves_nothing_that_looks_complete(large, tiny_models, tmp_path, name):
    output = tmp_path / "output"
    process = start("hf_to_megatron", "--hf", large, "--output", output)
    data = output.with_name(".output.being-written") / "iter_0000000" / "__0_0.distcp"
    while not data.exists() or not data.stat().st_size:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not output.exists()
    if name == "SIGINT":
        assert not list(tmp_path.iterdir())
    hf_to_megatron.convert(tiny_models / "llama", output, None, check=True)
    megatron_to_hf.convert(output, tmp_path / "back", None, check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"output", "back"}


@pytest.mark.parametrize("module", ["hf_to_megatron", "megatron_to_hf"])
def test_full_disk_is_one_line_and_leaves_nothing(tiny_models, converted, tmp_path, module):
    source = {"hf_to_megatron": tiny_models / "llama", "megatron_to_hf": converted / "llama"}
    option = "--" + module.partition("_to_")[0]
    output = tmp_path / "output"
    command = (module, option, source[module], "--output", output)
    process = start(*command, limit=FILE_LIMIT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said.splitlines()[-1] == f"error: {output}: was not written: [Errno 27] File too large"
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())
