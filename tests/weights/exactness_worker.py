"""Gives engines weights twice, and has them compare what they hold with what is exported.

    torchrun --nproc-per-node N exactness_worker.py MODELS OUTPUT CASES...

A case is FAMILY:LAYOUT:ENGINE_TP and, to train adapters only, ":lora" or, to have two engines on as
many sites, ":sites"; its settings of the model come from FAMILY_MODELS. Rank 0 writes what was
found to OUTPUT as JSON: case -> by worker, the tensors that differ and those that were compared;
how many each sync sent; and the tensors that were exported.
"""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors import safe_open

from grpo_mcore.config import LoraConfig, ModelConfig, RolloutConfig
from grpo_mcore.models.build import load_model
from grpo_mcore.models.families import read_shape
from grpo_mcore.models.lora import add_adapters
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.world import join
from grpo_mcore.rollout.pool import RolloutPool
from grpo_mcore.rollout.spec import EngineSpec
from grpo_mcore.weights import sync as sync_module
from grpo_mcore.weights.export import export_model
from grpo_mcore.weights.sync import WeightSync
from tests.conftest import FAMILY_MODELS


def main() -> None:
    models, output, *cases = sys.argv[1:]
    found = {case: run(Path(models), Path(output).parent, *case.split(":")) for case in cases}
    if found[cases[0]]:
        Path(output).write_text(json.dumps(found))


def run(
    models: Path, directory: Path, family: str, layout: str, engine_tp: str, option: str = ""
) -> dict | None:
    path, settings = str(models / family), dict(FAMILY_MODELS[family][3])
    tensor, pipeline, data = map(int, layout.split("x"))
    if pipeline == 1:
        settings.pop("virtual_pipeline", None)
    experts = min(settings.pop("expert_parallel", 1), data)
    model = ModelConfig(path=path, expert_parallel=experts, **settings)
    rollout = RolloutConfig(kv_cache_gib=0.05, deadline_seconds=240)
    shape = read_shape("model.path", path)
    with join({"policy": Layout(tensor, pipeline, data, experts)}, "colocated", 240) as world:
        role = world.roles["policy"]
        spec = EngineSpec(
            path,
            "float32",
            128,
            [0],
            int(engine_tp),
            worker_extension="tests.weights.reading_receiver.ReadingReceiver",
        )
        engines = 2 if option == "sites" else 1
        host = f"host {role.rank * engines // role.layout.size}"
        pool = RolloutPool(role, spec, engines, rollout, directory / "logs")
        chunks = load_model(shape, model, role, 0)
        if option == "lora":
            add_adapters(chunks, shape, role, LoraConfig(), seed=0)
        pool.wait_until_ready()
        with patch.object(sync_module, "host_id", lambda: host):
            sync = WeightSync(chunks, shape, role, pool, 1)
        sent = []
        for version in (1, 2):
            with torch.no_grad():
                for parameter in (p for p in chunks.parameters() if p.requires_grad):
                    parameter.add_(0.01)
            sent.append(sync.push(version)["tensors"])
        exported = directory / f"{family}-{layout}-{engine_tp}"
        export_model(chunks, shape, role, exported, path)
        compared = pool.engine and pool.engine.call("ask_workers", "compare", str(exported))
        workers = [worker for found in role.all_gather(compared) for worker in found or []]
        if role.rank == 0:
            names = []
            for file in exported.glob("*.safetensors"):
                with safe_open(file, "pt") as opened:
                    names += opened.keys()
        pool.close()
    if role.rank == 0:
        return {"workers": workers, "sent": sent, "exported": sorted(names)}
    return None


if __name__ == "__main__":
    main()
