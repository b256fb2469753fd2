"""Does an engine get the trainer's weights, and say the same with them?

    python tools/verify_sync.py MODEL
    torchrun --nproc-per-node 4 tools/verify_sync.py MODEL --layout 2x2x1 --engine-tensor-parallel 2

Loads MODEL (a Hugging Face directory, or a run's checkpoint) in training's form, syncs it into an
engine, with checksums of every tensor on both sides, has the engine sample completions, and
compares their log-probabilities token by token. Exit code 1: a tensor differs, or the mismatch
(mean of exp(|trainer - engine|)) is above --max-mismatch.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from grpo_mcore import device
from grpo_mcore.launch import one_line_errors

device.prepare()
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo_mcore.objectives.agreement import agreement  # noqa: E402
from grpo_mcore.objectives.metrics import combine  # noqa: E402
from grpo_mcore.rollout.requests import Request  # noqa: E402
from grpo_mcore.training.batch import align, pad_batch  # noqa: E402
from grpo_mcore.training.pipeline import compute_log_probs  # noqa: E402
from grpo_mcore.weights.sync import SyncError  # noqa: E402
from tools.pair import Pair, open_pair, pair_parser  # noqa: E402

VERSION = 1
MAX_MISMATCH = {"float32": 1.001, "bfloat16": 1.1}
"""Well above what rounding gives, which is 1.000001 in float32."""


def main() -> None:
    parser = pair_parser(__doc__.splitlines()[0], Path("outputs/verify_sync.json"))
    parser.add_argument("--max-tokens", type=int, default=32, help="of each completion")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument(
        "--max-mismatch", type=float, help="by default, by --dtype: " + str(MAX_MISMATCH)
    )
    parser.add_argument(
        "--threshold", type=float, default=0.05, help="nats; the first token beyond it is shown"
    )
    arguments = parser.parse_args()
    if arguments.max_tokens < 1 or arguments.temperature <= 0:
        parser.error("--max-tokens must be at least 1, --temperature above 0")
    with one_line_errors(), open_pair(arguments, arguments.max_tokens) as pair:
        found = verify(pair, arguments)
        if pair.role.rank == 0:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(found, indent=2) + "\n")
            show(found)
            print(f"written: {arguments.output}")
    sys.exit(not found["ok"])


def verify(pair: Pair, arguments: Namespace) -> dict:
    """Syncs, samples and compares. Returns the findings, on every rank."""
    found = {"model": arguments.model, "layout": str(pair.role.layout), "dtype": arguments.dtype}
    try:
        found |= pair.sync.push(VERSION)
    except SyncError as error:
        return found | {"difference": str(error), "ok": False}
    found |= {"difference": None, "engine_version": pair.pool.version, "trainer_version": VERSION}
    samples, metrics = compare_samples(pair, arguments)
    limit = arguments.max_mismatch or MAX_MISMATCH[arguments.dtype]
    ok = metrics["mismatch"] <= limit
    limits = {"max_mismatch": limit, "threshold": arguments.threshold}
    return found | limits | {"samples": samples, "all": metrics, "ok": ok}


def compare_samples(pair: Pair, arguments: Namespace) -> tuple[list[dict], dict[str, float]]:
    """What each sample's log-probabilities say, and those of all together."""
    layout, prompts = pair.role.layout, pair.prompts
    unit = layout.data * (layout.pipeline if len(pair.chunks) > 1 else 1)
    count = -(-len(prompts) // unit) * unit  # every data parallel rank has as many
    requests = [
        Request(
            prompts[i % len(prompts)], arguments.max_tokens, i, temperature=arguments.temperature
        )
        for i in range(count)
    ]
    completions = pair.pool.generate(requests)
    tokens = [completion.tokens for completion in completions]
    batch = pad_batch([r.prompt for r in requests], tokens, pair.split.length_multiple)
    mask = batch["mask"]
    engine = align([completion.log_probs for completion in completions], mask)
    trainer, _ = compute_log_probs(
        pair.chunks, pair.split, batch, pair.shape.vocab, arguments.temperature
    )
    trainer = trainer.clone()
    dist.all_reduce(trainer, group=pair.role.groups.pp)  # zeros but on the last stage
    samples = []
    for row, request in enumerate(requests):
        one = slice(row, row + 1)
        outlier = first_beyond(
            arguments.threshold, tokens[row], trainer[row], engine[row], mask[row]
        )
        if outlier:
            outlier["text"] = pair.tokenizer.inner.decode([outlier["token"]])
        samples.append(
            {
                "prompt": pair.tokenizer.inner.decode(request.prompt),
                "tokens": len(tokens[row]),
                **measure(trainer[one], engine[one], mask[one]),
                "first_beyond": outlier,
            }
        )
    return samples, measure(trainer, engine, mask)


def first_beyond(
    threshold: float, tokens: list[int], trainer: Tensor, engine: Tensor, mask: Tensor
) -> dict | None:
    """The first of a completion's `tokens` whose log-probabilities differ by more than `threshold`.

    Args:
        trainer, engine, mask: [tokens of prompt and completion].
    """
    pairs = zip(tokens, trainer[mask > 0].tolist(), engine[mask > 0].tolist(), strict=True)
    for position, (token, ours, theirs) in enumerate(pairs):
        if not abs(ours - theirs) <= threshold:
            return {"position": position, "token": token, "trainer": ours, "engine": theirs}
    return None


def measure(trainer: Tensor, engine: Tensor, mask: Tensor) -> dict[str, float]:
    return combine([{k: v.tolist() for k, v in agreement(trainer, engine, mask).items()}])


def show(found: dict) -> None:
    if found["difference"]:
        print(found["difference"])
        return
    print(
        f"{found['tensors']} tensors, {found['bytes'] / 2**20:.1f} MiB: 0 differ; "
        f"engine {found['engine_version']} = trainer {found['trainer_version']}"
    )
    print(
        f"{'sample':>8s}{'tokens':>8s}{'max |d|':>11s}{'mean e^|d|':>12s}{'k3':>11s}  first beyond"
    )
    rows = [(str(n), sample) for n, sample in enumerate(found["samples"])]
    total = {"tokens": sum(s["tokens"] for s in found["samples"]), "first_beyond": None}
    for name, row in [*rows, ("all", found["all"] | total)]:
        line = f"{name:>8s}{row['tokens']:8d}{row['max']:11.2e}"
        line += f"{row['mismatch']:#12.7g}{row['rollout_kl']:11.2e}"
        if outlier := row["first_beyond"]:
            line += (
                f"  token {outlier['position']} {outlier['text']!r}: "
                f"{outlier['trainer']:.4f}, engine {outlier['engine']:.4f}"
            )
        print(line)
    if not found["ok"]:
        print(f"mismatch {found['all']['mismatch']:#.7g} is above {found['max_mismatch']}")


if __name__ == "__main__":
    main()
