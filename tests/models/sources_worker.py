"""Two ranks ask for the directory of the same model object, rank 0 later than the other.

torchrun --nproc-per-node 2 sources_worker.py MODEL DIRECTORY OUTPUT
"""

import os
import sys
import time
from pathlib import Path

from transformers import AutoModelForCausalLM

from grpo_mcore.models.sources import local_model

source, directory, output = sys.argv[1:]
rank = os.environ["RANK"]
model = AutoModelForCausalLM.from_pretrained(source)
if rank == "0":
    deadline = time.monotonic() + 120
    while not (Path(output) / "asked 1").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # the other is waiting by now
(Path(output) / f"asked {rank}").touch()
found = local_model("model", model, Path(directory))
AutoModelForCausalLM.from_pretrained(found)  # it is whole
(Path(output) / f"found {rank}").write_text(found)
