"""The choice of layers and FP8 recipes, from facts of a device that need not be here."""

import ast
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core import fp8_utils
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from grpo_mcore import device
from grpo_mcore.config import ConfigError, ModelConfig
from grpo_mcore.models.families import FAMILIES, read_shape
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.models.transformer_engine import (
    RECIPES,
    DeviceFacts,
    check_fp8_sizes,
    check_layers,
    fp8_misfit,
    gather_fields,
    length_multiple,
    optimizer_fields,
    read_facts,
    read_weight,
    share_scales,
    transformer_fields,
    uses_transformer_engine,
    write_weight,
)
from grpo_mcore.parallel.grid import Layout
from tests.conftest import FAMILY_MODELS

ROOT = Path(__file__).resolve().parents[2]
HALF_INSTALLED = 'raise RuntimeError("cudnn shared object not found")'
CPU = DeviceFacts(fault="it needs an NVIDIA GPU, none is here")
HOPPER = DeviceFacts((9, 0), (12, 9), (2, 11))
BLACKWELL = DeviceFacts((10, 0), (13, 0), (2, 11))
WITHOUT = DeviceFacts((9, 0), (12, 9), None, "it is not installed")
SHAPE = ModelShape(
    family="llama", hidden=512, ffn=1024, layers=4, heads=8, groups=4, head_dim=64, vocab=1000,
    positions=128, norm_eps=1e-6, rope_base=1e4, tied=False,
)  # fmt: skip


def model(**settings) -> ModelConfig:
    return ModelConfig("there", **{"dtype": "bfloat16"} | settings)


def refusal(facts: DeviceFacts, **settings) -> str:
    with pytest.raises(ConfigError) as caught:
        check_layers("teacher", model(**settings), facts)
    return str(caught.value)


@pytest.mark.parametrize(
    "layers, facts, fused",
    [
        ("auto", CPU, False),
        ("auto", HOPPER, True),
        ("local", CPU, False),
        ("local", HOPPER, False),
        ("local", WITHOUT, False),
        ("transformer_engine", HOPPER, True),
    ],
)
def test_layers_by_device(layers, facts, fused):
    check_layers("teacher", model(layers=layers), facts)
    assert uses_transformer_engine(model(layers=layers), facts) is fused
    impl = transformer_fields(model(layers=layers), facts)["transformer_impl"]
    assert impl == ("transformer_engine" if fused else "local")


def test_transformer_engine_without_a_gpu():
    assert refusal(CPU, layers="transformer_engine") == (
        "teacher.layers=transformer_engine: Transformer Engine cannot be used: it needs an NVIDIA "
        "GPU, none is here; choose teacher.layers=local"
    )


@pytest.mark.parametrize("layers", ["auto", "transformer_engine"])
@pytest.mark.parametrize(
    "facts, fault",
    [
        (WITHOUT, "it is not installed"),
        (replace(WITHOUT, fault="it cannot be imported: cudnn"), "it cannot be imported: cudnn"),
        (replace(HOPPER, transformer_engine=(2, 8)), "it is 2.8, older than 2.9"),
    ],
)
def test_transformer_engine_that_cannot_be_used_on_a_gpu(layers, facts, fault):
    assert refusal(facts, layers=layers) == (
        f"teacher.layers={layers}: Transformer Engine cannot be used: {fault}; install it whole "
        "(requirements/README.md) or choose teacher.layers=local"
    )


@pytest.mark.parametrize(
    "capability, cuda, runs",
    [
        ((8, 0), (12, 9), []),
        ((8, 9), (12, 9), ["delayed", "tensorwise"]),
        ((9, 0), (12, 8), ["delayed", "tensorwise"]),
        ((9, 0), (12, 9), ["delayed", "tensorwise", "blockwise"]),
        ((10, 0), (13, 0), ["delayed", "tensorwise", "blockwise", "mxfp8"]),
        ((12, 0), (13, 0), ["delayed", "tensorwise", "blockwise"]),
    ],
)
def test_recipes_by_architecture_and_cuda(capability, cuda, runs):
    facts = DeviceFacts(capability, cuda, (2, 11))
    for recipe in RECIPES:
        if recipe in runs:
            check_layers("teacher", model(fp8=recipe), facts)
        else:
            message = refusal(facts, fp8=recipe)
            assert message.startswith(f"teacher.fp8={recipe}: needs ")
            assert message.endswith(
                f"; choose one of {', '.join(runs)}" if runs else "; no FP8 recipe runs here"
            )


def test_recipe_for_another_architecture_says_which():
    assert refusal(HOPPER, fp8="mxfp8") == (
        "teacher.fp8=mxfp8: needs compute capability 10.0 or above and below 12.0, this GPU has "
        "9.0; choose one of delayed, tensorwise, blockwise"
    )
    assert "needs CUDA 12.9, torch was built for 12.8" in refusal(
        replace(HOPPER, cuda=(12, 8)), fp8="blockwise"
    )


@pytest.mark.parametrize(
    "facts, settings, message",
    [
        (CPU, {"fp8": "delayed"}, "teacher.fp8=delayed: FP8 needs an NVIDIA GPU, none is here"),
        (
            HOPPER,
            {"fp8": "delayed", "layers": "local"},
            "teacher.fp8=delayed: only the layers of Transformer Engine compute in FP8, not "
            "teacher.layers=local; choose auto",
        ),
        (
            HOPPER,
            {"fp8": "tensorwise", "dtype": "float32"},
            "teacher.fp8=tensorwise: needs teacher.dtype=bfloat16, not float32",
        ),
        (
            HOPPER,
            {"fp8_param": True},
            "teacher.fp8_param=true: has no meaning without teacher.fp8; choose one of delayed, "
            "tensorwise, blockwise, mxfp8",
        ),
        (
            HOPPER,
            {"bf16_layers_at_end": 2},
            "teacher.bf16_layers_at_end=2: has no meaning without teacher.fp8; choose one of "
            "delayed, tensorwise, blockwise, mxfp8",
        ),
        (
            HOPPER,
            {"fp8": "delayed", "fp8_param": True},
            "teacher.fp8_param=true: fp8=delayed takes its scales from earlier steps, and none "
            "precedes the reading of the weights; choose another recipe",
        ),
        (
            HOPPER,
            {"fp8": "delayed", "bf16_layers_at_start": 1},
            "teacher.bf16_layers_at_start=1: fp8=delayed scales all layers together; choose "
            "another recipe",
        ),
    ],
)
def test_fp8_that_cannot_be(facts, settings, message):
    assert refusal(facts, **settings) == message


def test_fp8_without_usable_transformer_engine_names_the_fault():
    assert "cannot be used: it is not installed" in refusal(WITHOUT, fp8="delayed")


@pytest.mark.parametrize(
    "recipe, changes, tensor, reason",
    [
        ("tensorwise", {"hidden": 520}, 1, "hidden size 520 on a rank does not divide by 16"),
        ("delayed", {"ffn": 1032}, 1, "feed-forward size 1032 on a rank does not divide by 16"),
        ("blockwise", {"ffn": 1056}, 4, "feed-forward size 264 on a rank does not divide by 16"),
        ("mxfp8", {"ffn": 1072}, 1, "feed-forward size 1072 on a rank does not divide by 32"),
        ("mxfp8", {"head_dim": 48}, 8, "width of attention 48 on a rank does not divide by 32"),
        (
            "mxfp8",
            {"heads": 2, "groups": 1, "head_dim": 72},
            1,
            "width of attention 144 on a rank does not divide by 32",
        ),
        (
            "tensorwise",
            {"heads": 2, "groups": 1, "head_dim": 8},
            1,
            None,
        ),
        (
            "tensorwise",
            {"heads": 3, "groups": 3, "head_dim": 16, "experts": 4, "dense_ffn": 40},
            1,
            "feed-forward size of dense layers 40 on a rank does not divide by 16",
        ),
    ],
)
def test_sizes_that_fp8_cannot_multiply(recipe, changes, tensor, reason):
    shape = replace(SHAPE, **changes)
    assert fp8_misfit(model(), shape, Layout(tensor)) is None
    found = fp8_misfit(model(fp8=recipe), shape, Layout(tensor))
    assert found is None if reason is None else found.startswith(reason)


def test_sizes_that_fit_no_layout_are_refused_before_one_is_chosen():
    check_fp8_sizes("teacher", model(fp8="mxfp8"), SHAPE)
    with pytest.raises(ConfigError, match=r"^teacher\.fp8=mxfp8: hidden size 528 on a rank"):
        check_fp8_sizes("teacher", model(fp8="mxfp8"), replace(SHAPE, hidden=528))


def test_blocks_gathered_by_sequence_parallelism_are_whole():
    shape = replace(SHAPE, hidden=576)
    blockwise = model(fp8="blockwise")
    split = replace(blockwise, sequence_parallel=True)
    assert fp8_misfit(blockwise, shape, Layout(2)) is None
    assert fp8_misfit(split, shape, Layout(1)) is None
    assert fp8_misfit(split, shape, Layout(2)).startswith("hidden size 576 does not divide by 128")


@pytest.mark.parametrize(
    "start, end, pipeline, reason",
    [
        (1, 1, 2, None),
        (2, 0, 2, None),
        (3, 0, 1, None),
        (3, 0, 2, "bf16_layers_at_start=3: a pipeline stage has 2 layers"),
        (0, 5, 1, "bf16_layers_at_end=5: a pipeline stage has 4 layers"),
        (2, 2, 1, "bf16_layers_at_start=2 and bf16_layers_at_end=2 leave none of 4 layers"),
    ],
)
def test_layers_left_in_bf16(start, end, pipeline, reason):
    asked = model(fp8="tensorwise", bf16_layers_at_start=start, bf16_layers_at_end=end)
    assert fp8_misfit(asked, SHAPE, Layout(1, pipeline)) == reason
    if reason is None:
        config = megatrons_config(asked, pipeline_model_parallel_size=pipeline)
        kept = [fp8_utils.is_first_last_bf16_layer(config, n) for n in range(4)]
        assert kept == [n < start or n >= 4 - end for n in range(4)]


def megatrons_config(asked: ModelConfig, **settings) -> TransformerConfig:
    return TransformerConfig(
        num_layers=4,
        hidden_size=512,
        num_attention_heads=8,
        bf16=True,
        pipeline_dtype=torch.bfloat16,
        **settings,
        **transformer_fields(asked, BLACKWELL),
    )


@pytest.mark.parametrize(
    "recipe, number_format",
    [("delayed", "hybrid"), ("tensorwise", "hybrid"), ("blockwise", "e4m3"), ("mxfp8", "e4m3")],
)
def test_megatron_takes_every_recipe(recipe, number_format):
    config = megatrons_config(model(fp8=recipe))
    assert (config.fp8, config.fp8_recipe) == (number_format, recipe)
    assert not config.fp8_param and not config.first_last_layers_bf16
    assert config.transformer_impl == "transformer_engine"
    assert megatrons_config(model()).fp8 is None


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_fp8_parameters_are_asked_for_in_all_three_places(recipe):
    asked = model(fp8=recipe, fp8_param=True)
    assert megatrons_config(asked).fp8_param
    gathering = DistributedDataParallelConfig(**gather_fields(asked))
    optimizer = OptimizerConfig(**optimizer_fields(asked))
    assert gathering.fp8_param_gather and optimizer.fp8_recipe == recipe
    for config in (gathering, optimizer):
        assert config.reuse_grad_buf_for_mxfp8_param_ag is (recipe == "mxfp8")


def test_without_fp8_parameters_nothing_is_asked_for():
    for asked in (model(), model(fp8="mxfp8")):
        assert DistributedDataParallelConfig(**gather_fields(asked)) == (
            DistributedDataParallelConfig()
        )
        assert OptimizerConfig(**optimizer_fields(asked)) == OptimizerConfig()


@pytest.mark.parametrize(
    "settings, tensor, multiple",
    [
        ({}, 4, 1),
        ({"sequence_parallel": True}, 4, 4),
        ({"fp8": "delayed"}, 4, 16),
        ({"fp8": "mxfp8"}, 1, 32),
        ({"fp8": "tensorwise", "sequence_parallel": True}, 4, 64),
        ({"fp8": "blockwise", "sequence_parallel": True}, 2, 256),
        ({"fp8": "blockwise", "sequence_parallel": True}, 1, 16),
    ],
)
def test_lengths_give_every_rank_whole_products(settings, tensor, multiple):
    assert length_multiple(model(**settings), Layout(tensor)) == multiple


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_fused_norms_are_the_same_tensors_under_the_names_megatron_gives(tiny_models, name):
    shape = read_shape("model.path", str(tiny_models / name))
    local, fused = (FAMILIES[shape.family].rules(shape, norms) for norms in (False, True))
    assert list(fused.values()) == list(local.values())
    # Megatron's own map between the two, which it has for checkpoints.
    renamed = get_gpt_layer_local_spec().submodules.sharded_state_dict_keys_map
    assert set(renamed) == {"input_layernorm.", "pre_mlp_layernorm."}
    expected = []
    for parameter in local:
        layer, rest = _split_layer(parameter)
        prefix = next((p for p in renamed if rest.startswith(p)), None)
        if prefix and not (prefix == "pre_mlp_layernorm." and shape.has_experts(layer)):
            parameter = parameter.replace(prefix, renamed[prefix])
        expected.append(parameter)
    assert list(fused) == expected
    assert sum(a != b for a, b in zip(local, fused, strict=True)) == shape.layers + sum(
        not shape.has_experts(n) for n in range(shape.layers)
    )


def test_every_family_has_a_model_here(tiny_models):
    models = (str(tiny_models / name) for name in FAMILY_MODELS)
    assert {read_shape("model.path", path).family for path in models} == set(FAMILIES)


def test_delayed_scales_are_shared_by_the_ranks_of_the_same_layers(monkeypatch):
    monkeypatch.setattr(fp8_utils, "parallel_state", None, raising=False)
    group = object()
    share_scales(SimpleNamespace(tp_dp_cp=group))
    answers = fp8_utils.parallel_state
    assert answers.model_parallel_is_initialized()
    found = answers.get_amax_reduction_group(with_context_parallel=True, tp_only_amax_red=False)
    assert found is group


def test_megatron_asks_for_nothing_else_where_it_chooses_that_group():
    source = ast.parse(Path(find_spec(fp8_utils.__name__).origin).read_text())
    asked = {
        node.attr
        for node in ast.walk(source)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "parallel_state"
    }
    assert asked == {"model_parallel_is_initialized", "get_amax_reduction_group"}


def test_weights_are_read_as_they_were_written():
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    values = torch.tensor([1.0, -2.0, 3.0], dtype=torch.bfloat16)
    write_weight(parameter, values)
    assert torch.equal(read_weight(parameter), values)


def test_the_optimizer_starts_from_the_weights_and_not_from_what_preceded_them():
    parameter = torch.nn.Parameter(torch.zeros(3))
    first = torch.full((3,), 7.0)
    parameter.get_high_precision_init_val = lambda: first
    write_weight(parameter, torch.tensor([1.0, 2.0, 3.0]))
    assert first.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.skipif(device.is_cuda(), reason="there is a GPU")
def test_facts_of_a_machine_without_a_gpu():
    assert read_facts().capability is None and read_facts().transformer_engine is None
    assert read_facts().fault == "it needs an NVIDIA GPU, none is here"


@pytest.mark.parametrize(
    "contents, has_gpu, fault",
    [
        (None, True, "it is not installed"),
        (HALF_INSTALLED, True, "it cannot be imported: cudnn shared object not found"),
        (HALF_INSTALLED, False, "it needs an NVIDIA GPU, none is here"),
        ("", True, "it cannot be imported: No module named 'transformer_engine.pytorch'"),
    ],
)
def test_half_installed_transformer_engine_leaves_megatron_alone(
    tmp_path, contents, has_gpu, fault
):
    if contents is not None:
        (tmp_path / "transformer_engine").mkdir()
        (tmp_path / "transformer_engine" / "__init__.py").write_text(contents)
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from grpo_mcore import device
here = device.is_cuda
device.is_cuda = lambda: {has_gpu}
fault = device._admit_transformer_engine()
device.is_cuda = here
device.prepare()
import megatron.core.fp8_utils
print(fault)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == fault


def _split_layer(parameter: str) -> tuple[int, str]:
    """The number of a parameter's layer, and its name within; (-1, "") outside the layers."""
    head, _, rest = parameter.partition("decoder.layers.")
    number, _, name = rest.partition(".")
    return (int(number), name) if rest and not head else (-1, "")
