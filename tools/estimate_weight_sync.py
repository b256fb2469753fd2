"""What one weight sync costs on GPUs, on paper.

    python tools/estimate_weight_sync.py [--nvlink 450] [--network 50] [--memory 3350]

Speeds are gigabytes a second: of NVLink in one direction, of a GPU's own network card (400 Gb/s are
50), and of its memory.

Every GPU has a worker of an engine that reads whole Hugging Face tensors from a buffer of its own
device, so every GPU is given all M bytes, whatever its engine keeps of them. With TP t, PP p and,
for the part x of the bytes that are experts, EP e, a rank receives

    over the pipeline     (p - 1) / p * ((1 - x) M / t + x M / (t e))
    from its TP group     (t - 1) / t * (1 - x) M
    from its TP x EP one  (t e - 1) / (t e) * x M

TP groups lie within a node of 8, whose NVLink carries what they exchange; stages lie on different
nodes. A TP x EP group of n nodes takes (n - 1) / n of its bytes into each node once, over all 8
cards together, and the rest of the exchange goes over NVLink. Data parallel replicas do all this
at once, on links of their own. The trainer's memory writes M and sums it up; the worker sums up,
reads and writes at most M. Both overlap, but for a bucket:

    seconds = max(network + nvlink + 2 M / memory, 3 M / memory) + first bucket
"""

import argparse
from dataclasses import dataclass

NODE = 8
GIGA = 1e9
BYTES_A_PARAMETER = 2
WHOLE_BYTES_A_PARAMETER = 6
"""bfloat16 weights and float32 gradients, which every data parallel replica has."""
SHARED_BYTES_A_PARAMETER = 12
"""float32 master weights and both moments of Adam, which replicas share out (Megatron's distributed
optimizer)."""
BUCKET_BYTES = 256 << 20


@dataclass(frozen=True)
class Model:
    name: str
    parameters: float
    experts: float
    """Part of the parameters that are experts."""


@dataclass(frozen=True)
class Case:
    model: Model
    gpus: int
    tensor: int
    pipeline: int
    expert: int = 1


@dataclass(frozen=True)
class Cost:
    """Bytes that one GPU receives over each link, and seconds."""

    network: float
    nvlink: float
    seconds: float


DENSE8, DENSE70 = Model("8B", 8.0e9, 0.0), Model("70B", 70.6e9, 0.0)
MIXTURE = Model("671B-A37B", 671e9, 0.975)
CASES = (
    Case(DENSE8, 8, 1, 1),
    Case(DENSE8, 64, 2, 1),
    Case(DENSE8, 1024, 2, 1),
    Case(DENSE70, 8, 8, 1),
    Case(DENSE70, 64, 8, 2),
    Case(DENSE70, 1024, 8, 4),
    Case(MIXTURE, 8, 1, 1, 8),
    Case(MIXTURE, 64, 1, 8, 8),
    Case(MIXTURE, 1024, 1, 16, 64),
)


def cost(case: Case, nvlink: float, network: float, memory: float) -> Cost:
    """What a sync of `case` costs.

    Args:
        nvlink, network, memory: bytes a second.
    """
    t, p, e = case.tensor, case.pipeline, case.expert
    whole = case.model.parameters * BYTES_A_PARAMETER
    experts = whole * case.model.experts
    dense = whole - experts
    nodes = max(1, t * e // NODE)
    over_network = (p - 1) / p * (dense / t + experts / (t * e))
    over_network += (nodes - 1) / nodes * experts / NODE
    over_nvlink = (t - 1) / t * dense + (t * e - 1) / (t * e) * experts
    gather = over_network / network + over_nvlink / nvlink + 2 * whole / memory
    load = 3 * whole / memory
    first = min(BUCKET_BYTES / whole, 1.0) * min(gather, load)
    return Cost(over_network, over_nvlink, max(gather, load) + first)


def training_bytes(case: Case) -> float:
    """What training takes of one GPU, without activations."""
    shards = case.tensor * case.pipeline
    experts = case.model.parameters * case.model.experts
    dense = case.model.parameters - experts
    whole = dense / shards + experts / (shards * case.expert)
    return WHOLE_BYTES_A_PARAMETER * whole + (
        SHARED_BYTES_A_PARAMETER * case.model.parameters / case.gpus
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nvlink", type=float, default=450.0)
    parser.add_argument("--network", type=float, default=50.0)
    parser.add_argument("--memory", type=float, default=3350.0)
    speeds = {name: value * GIGA for name, value in vars(parser.parse_args()).items()}
    titles = (
        "model",
        "GPUs",
        "TP",
        "PP",
        "EP",
        "DP",
        "training GB",
        "network GB",
        "NVLink GB",
        "s",
    )
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for case in CASES:
        found = cost(case, **speeds)
        data = case.gpus // case.tensor // case.pipeline
        cells = (
            *(case.model.name, case.gpus, case.tensor, case.pipeline, case.expert, data),
            f"{training_bytes(case) / GIGA:.0f}",
            f"{found.network / GIGA:.1f}",
            f"{found.nvlink / GIGA:.1f}",
            f"{found.seconds:.2f}",
        )
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
