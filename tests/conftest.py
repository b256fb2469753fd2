"""Models small enough to be made anew for every test session."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from filelock import FileLock

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 24,
}
FOUR_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
FAMILY_MODELS = {
    "llama": ("LlamaConfig", {}, "2x1x2", {"sequence_parallel": True}),
    "llama_tied": (
        "LlamaConfig", {"tie_word_embeddings": True}, "2x2x1", {"recompute": "full"},
    ),
    "llama3": (
        "LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "num_hidden_layers": 5},
        "1x4x1", {"recompute": "selective"},
    ),
    "mistral": (
        "MistralConfig", {"sliding_window": 5, "num_hidden_layers": 4},
        "2x2x1", {"virtual_pipeline": 2, "sequence_parallel": True},
    ),
    "mixtral": (
        "MixtralConfig", {"num_local_experts": 4, "sliding_window": 7},
        "2x1x2", {"expert_parallel": 2, "sequence_parallel": True},
    ),
    "qwen2": ("Qwen2Config", {}, "2x2x1", {}),
    "qwen2_tied": (
        "Qwen2Config",
        {"tie_word_embeddings": True, "num_hidden_layers": 4, "max_position_embeddings": 256},
        "1x2x2", {"virtual_pipeline": 2},
    ),
    "qwen3": (
        "Qwen3Config", {"hidden_size": 96},
        "2x2x1", {"sequence_parallel": True, "recompute": "selective"},
    ),
    "qwen3_tied": (
        "Qwen3Config", {"hidden_size": 96, "tie_word_embeddings": True},
        "2x2x1", {"sequence_parallel": True},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig", {**FOUR_EXPERTS, "hidden_size": 96, "norm_topk_prob": True},
        "1x1x4", {"expert_parallel": 2},
    ),
    "qwen3_moe_mixed": (
        "Qwen3MoeConfig",
        {
            **FOUR_EXPERTS, "norm_topk_prob": False, "mlp_only_layers": [1],
            "num_hidden_layers": 4, "tie_word_embeddings": True,
        },
        "1x2x2", {"expert_parallel": 2, "virtual_pipeline": 2},
    ),
}  # fmt: skip
"""Name -> transformers' configuration class, what it has otherwise than `write_family_model` gives
all, and a layout of four processes, with settings, that is awkward for it. Every family is there,
and every odd shape: a vocabulary that nothing divides, 5 layers, tied embeddings, windows shorter
than the text, heads together wider than the hidden states (where hidden_size is 96)."""


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> Path:
    """A directory of random models with the demo's tokenizer: `teacher` (the demo's own) and those
    of FAMILY_MODELS."""
    from examples.demo.models import write_random_model

    def make(root: Path) -> None:
        write_random_model(root / "teacher", seed=0)
        for name, (config, changes, *_) in FAMILY_MODELS.items():
            write_family_model(root / name, config, **changes)

    return made_once(tmp_path_factory, "models", make)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The directory `name` as `make` fills it, once for all processes of pytest-xdist."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    directory = shared / name
    with FileLock(f"{directory}.lock"):
        if not directory.exists():
            make(work := shared / f"{name}.partial")
            work.rename(directory)
    return directory


def write_family_model(directory: Path, config_class: str, **changes) -> None:
    """A random model whose configuration has `changes`. Its biases and norms are random too, so
    that no mistake hides behind zeros and ones."""
    import torch
    import transformers

    from examples.demo.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer) + 1,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 160,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "dtype": torch.float32,
    }
    config = getattr(transformers, config_class)(**sizes | changes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def name_of(value: object) -> str:
    """A parameter's name, the same in every process: without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # of pytest-xdist, whose workers share the servers
        from tests.forked import start_servers

        for server in start_servers():
            config.add_cleanup(server.end)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes most goes first, so that lanes end together."""

    def weight(item: pytest.Item) -> tuple[int, bool]:
        cores = item.get_closest_marker("cores")
        return -cores.args[0] if cores else 0, item.get_closest_marker("engine") is None

    if not config.pluginmanager.hasplugin("randomly"):
        items.sort(key=weight)


@pytest.fixture(scope="module", autouse=True)
def forked_engines(request) -> Iterator[None]:
    """Engines are forked from a process that has imported vLLM, but for modules marked
    `real_engines`. Modules start what they are marked for only."""
    from grpo_mcore.rollout import engine
    from tests import forked

    marks = {mark.name: mark for mark in request.node.iter_markers()}
    forked.cores = marks["cores"].args[0] if "cores" in marks else 1
    forked.are_real = "real_engines" in marks
    if forked.are_real:
        engine.start_guarded = forked.REALLY
    elif "engine" in marks:
        engine.start_guarded = forked.start_guarded
    else:
        engine.start_guarded = forked.refuse
    yield
    engine.start_guarded = forked.REALLY


@pytest.fixture(scope="module", autouse=True)
def leave_nothing() -> Iterator[None]:
    """Neither a trainer that a module leaves open, nor the address of the world it has joined,
    nor what accelerate has made of that, shall be there for the next one."""
    with patch.dict(os.environ):
        yield
        trainers = sys.modules.get("grpo_mcore.trainers.base")
        if trainers and trainers.BaseTrainer._open:
            trainers.BaseTrainer._open.close()
        if accelerate := sys.modules.get("accelerate.state"):
            accelerate.AcceleratorState._reset_state(reset_partial_state=True)
    distributed = sys.modules.get("torch.distributed")
    assert not (distributed and distributed.is_initialized()), "the module leaves a world open"


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory) -> Path:
    """The directory of a random sequence classifier with one label, whose tokenizer has a chat
    template."""
    import torch
    import transformers

    from examples.demo.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ mood }}\n{% endfor %}"
    )
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer) + 1,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )

    def make(directory: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            transformers.Qwen2ForSequenceClassification(config).save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    return made_once(tmp_path_factory, "tiny-judge", make)


@pytest.fixture(scope="session")
def judge_model(tmp_path_factory) -> Path:
    """The directory of a random model with a chat template and room for a judge's prompt."""
    from transformers import AutoTokenizer

    def make(directory: Path) -> None:
        write_family_model(directory, "Qwen2Config", max_position_embeddings=8192)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        )
        tokenizer.save_pretrained(directory)

    return made_once(tmp_path_factory, "judge", make)
