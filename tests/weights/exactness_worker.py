"""Gives engines weights twice, and has them compare what they hold with what is exported.

    torchrun --nproc-per-node N exactness_worker.py MODELS OUTPUT CASES...

A case is FAMILY:LAYOUT:ENGINE_TP or, to train adapters only, FAMILY:LAYOUT:ENGINE_TP:lora; its
settings of the model come from FAMILY_MODELS. Rank 0 writes what was found to OUTPUT as JSON: case
-> by worker, the tensors that differ and those that were compared; how many each sync sent; and the
tensors that were exported.
"""

import json
import sys
from pathlib import Path

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
from grpo_mcore.weights.export import export_model
from grpo_mcore.weights.sync import WeightSync
from tests.conftest import FAMILY_MODELS


def main() -> None:
    models, output, *cases = sys.argv[1:]
    found = {case: run(Path(models), Path(output).parent, *case.split(":")) for case in cases}
    if found[cases[0]]:
        Path(output).write_text(json.dumps(found))


def run(
    models: Path, directory: Path, family: str, layout: str, engine_tp: str, *lora: str
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
        pool = RolloutPool(role, spec, 1, rollout, directory / "logs")
        chunks = load_model(shape, model, role, 0)
        if lora:
            add_adapters(chunks, shape, role, LoraConfig(), seed=0)
        pool.wait_until_ready()
        sync = WeightSync(chunks, shape, role, pool, 1)
        sent = []
        for version in (1, 2):
            with torch.no_grad():
                for parameter in (p for p in chunks.parameters() if p.requires_grad):
                    parameter.add_(0.01)
            sent.append(sync.push(version)["tensors"])
        exported = directory / f"{family}-{layout}-{engine_tp}"
        export_model(chunks, shape, role, exported, path)
        if pool.engine:
            compared = pool.engine.call("ask_workers", "compare", str(exported))
            names = []
            for file in exported.glob("*.safetensors"):
                with safe_open(file, "pt") as opened:
                    names += opened.keys()
        pool.close()
    return {"workers": compared, "sent": sent, "exported": sorted(names)} if pool.engine else None


if __name__ == "__main__":
    main()
