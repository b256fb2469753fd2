"""Can this machine run the CPU set-up? `python tools/check_machine.py [VENV]`, before any download.

Standard library only, and nothing Python 3.6 cannot parse: an old Python has to be able to run this
to be told that it is old. A check returns None, or one sentence: what is wrong, what was found, and
what is needed.
"""

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig

GIB = 2**30


def python_version(version):
    # The lock is tested on 3.11 alone; its wheels are built for one minor version of Python.
    if tuple(version[:2]) != (3, 11):
        found = f"{version[0]}.{version[1]}"
        return f"This is Python {found} but the pinned packages need 3.11: make PYTHON=/path/to/it."


def venv_module(find_spec):
    if not (find_spec("venv") and find_spec("ensurepip")):
        return (
            "This Python has no venv or ensurepip module and one virtual environment is to be made:"
            " install python3.11-venv."
        )


def python_headers(include):
    if not os.path.exists(os.path.join(include, "Python.h")):
        return (
            f"There is no Python.h in {include} and compiling vLLM's sampler needs it:"
            " install python3.11-dev (python3.11-devel on Fedora)."
        )


def system(name, machine):
    if (name, machine) != ("Linux", "x86_64"):
        return f"This is {name} on {machine} but the pinned wheels need Linux on x86_64."


def compiler(env):
    # torch.compile, with which vLLM builds its sampler, calls $CXX or g++ and looks for no other.
    name = env.get("CXX", "g++")
    if not shutil.which(name, path=env.get("PATH", "")):
        return (
            f"The C++ compiler {name} is not on PATH and vLLM's sampler is compiled with one:"
            " install g++ (gcc-c++ on Fedora) or set CXX."
        )


def lscpu(env):
    if not shutil.which("lscpu", path=env.get("PATH", "")):
        return "lscpu is not on PATH and vLLM reads the CPU's cores from it: install util-linux."


def avx2(cpuinfo):
    if "avx2" not in cpuinfo.split():
        model = [
            line.split(":")[-1].strip() for line in cpuinfo.splitlines() if "model name" in line
        ]
        found = model[0] if model else "CPU"
        return f"This {found} does not report AVX2 but the CPU build of vLLM needs it."


def disk(free, folder):
    if free < 6 * GIB:
        return f"{folder} has {free / GIB:.1f} GiB of free disk but the set-up needs 6 GiB."


def memory(total):
    # A machine sold as 8 GiB shows a little less.
    if total < 7.5 * GIB:
        return f"This machine has {total / GIB:.1f} GiB of memory but 8 GiB are needed."


def read(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def main(venv=".venv"):
    home = os.path.abspath(venv)
    while not os.path.isdir(home):
        home = os.path.dirname(home)
    ready = os.path.exists(os.path.join(venv, ".ready"))
    problems = [
        python_version(sys.version_info),
        venv_module(importlib.util.find_spec),
        python_headers(sysconfig.get_paths()["include"]),
        system(platform.system(), platform.machine()),
        compiler(os.environ),
        lscpu(os.environ),
        avx2(read("/proc/cpuinfo")),
        None if ready else disk(shutil.disk_usage(home).free, home),
        memory(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
    ]
    problems = [problem for problem in problems if problem]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
