"""The check that `make setup` runs before it downloads anything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import check_machine

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 10, 1), (3, 12, 0), (4, 0, 0)])
def test_other_pythons_are_turned_away(version):
    assert f"Python {version[0]}.{version[1]} " in check_machine.python_version(version)


def test_this_machine_passes_what_the_tests_themselves_need():
    assert check_machine.python_version(sys.version_info) is None
    assert check_machine.compiler(os.environ) is None
    assert check_machine.avx2(check_machine.read("/proc/cpuinfo")) is None


def test_python_without_ensurepip_names_the_package():
    sentence = check_machine.venv_module(lambda name: name != "ensurepip")
    assert "python3.11-venv" in sentence


def test_python_without_headers(tmp_path):
    assert str(tmp_path) in check_machine.python_headers(str(tmp_path))
    (tmp_path / "Python.h").touch()
    assert check_machine.python_headers(str(tmp_path)) is None


@pytest.mark.parametrize("name, machine", [("Darwin", "arm64"), ("Linux", "aarch64")])
def test_other_systems_are_turned_away(name, machine):
    assert f"{name} on {machine}" in check_machine.system(name, machine)
    assert check_machine.system("Linux", "x86_64") is None


def test_compiler_is_the_one_torch_will_call(tmp_path):
    clang = tmp_path / "clang++"
    clang.touch(mode=0o755)
    assert "g++" in check_machine.compiler({"PATH": str(tmp_path)})
    assert check_machine.compiler({"PATH": str(tmp_path), "CXX": "clang++"}) is None
    assert check_machine.compiler({}) is not None


def test_lscpu_missing(tmp_path):
    assert "util-linux" in check_machine.lscpu({"PATH": str(tmp_path)})


def test_avx2_is_a_flag_of_its_own():
    old = "model name\t: Old CPU @ 2GHz\nflags\t\t: fpu sse4_2 avx avx2x"
    assert "Old CPU @ 2GHz" in check_machine.avx2(old)
    assert check_machine.avx2(old + " avx2") is None
    assert check_machine.avx2("") is not None


def test_too_little_disk_or_memory_says_how_much_there_is():
    assert "5.5 GiB" in check_machine.disk(5.5 * GIB, "/home")
    assert check_machine.disk(6 * GIB, "/home") is None
    assert "4.0 GiB" in check_machine.memory(4 * GIB)
    assert check_machine.memory(7.7 * GIB) is None


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_setup_stops_at_the_check_before_anything_is_made(tmp_path):
    programs = tmp_path / "bin"  # all that the check looks for, except the compiler
    programs.mkdir()
    (programs / "lscpu").symlink_to(shutil.which("lscpu"))
    venv = tmp_path / "venv"
    run = subprocess.run(
        [shutil.which("make"), "setup", f"VENV={venv}", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        env={"PATH": str(programs)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    said = [line for line in run.stderr.splitlines() if "compiler" in line]
    assert len(said) == 1 and said[0].endswith(".")
    assert not venv.exists()
