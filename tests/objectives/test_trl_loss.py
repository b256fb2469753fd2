"""Loss, gradients and metrics against TRL's own `_compute_loss` on random tensors."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_mcore.config.objective import (
    IMPORTANCE_SAMPLING_LEVELS,
    LOSS_TYPES,
    ObjectiveConfig,
    check_objective,
)
from grpo_mcore.objectives.entropy import EntropyController, entropy_bonus, high_entropy_mask
from grpo_mcore.objectives.grpo import grpo_loss
from grpo_mcore.objectives.metrics import combine
from grpo_mcore.objectives.weights import equal_weights, token_weights
from tests.objectives.trl_oracle import EXAMPLES, QUIET, TOLERANCE, loss_of, make_trainer

pytest.importorskip("trl")
pytestmark = QUIET


def number(least, most):
    return st.floats(least, most)


@st.composite
def objectives(draw) -> ObjectiveConfig:
    """Any objective that TRL has, too."""
    loss_type = draw(st.sampled_from(LOSS_TYPES))
    config = ObjectiveConfig(
        loss_type=loss_type,
        importance_sampling_level=draw(st.sampled_from(IMPORTANCE_SAMPLING_LEVELS)),
        epsilon=draw(number(0.05, 0.5)),
        epsilon_high=draw(number(0.05, 2) if loss_type == "cispo" else st.none() | number(0, 1)),
        delta=draw(st.none() | number(1.1, 3)),
        sapo_temperature_pos=draw(number(0.2, 3)),
        sapo_temperature_neg=draw(number(0.2, 3)),
        vespo_k_pos=draw(number(0.5, 4)),
        vespo_lambda_pos=draw(number(0.5, 4)),
        vespo_k_neg=draw(number(0.5, 4)),
        vespo_lambda_neg=draw(number(0.5, 4)),
        beta=draw(st.just(0.0) | number(0.01, 0.5)),
        use_bias_correction_kl=draw(st.booleans()),
        entropy_coef=draw(st.just(0.0) | number(0.01, 0.5)),
        top_entropy_quantile=draw(st.sampled_from([1.0, 0.8, 0.5, 0.2, 0.0])),
        off_policy_mask_threshold=draw(st.none() | number(0.01, 0.3)),
        vllm_importance_sampling_mode="token_mask",
    )
    check_objective(config)
    return config


def draw_batch(seed: int, rows: int) -> dict[str, torch.Tensor]:
    """Random tensors of `rows` sequences of up to 7 tokens, some without any."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale=1.0):
        return scale * torch.randn(rows, 7, generator=generator, dtype=torch.float64)

    ends = torch.randint(0, 8, (rows, 1), generator=generator)
    tools = torch.rand(rows, 7, generator=generator) < 0.15
    mask = (torch.arange(7) < ends) & ~tools
    log_probs = -normal().exp()
    old = log_probs + normal(0.3)
    sampling = old + normal(0.1)
    sampling[torch.rand(rows, 7, generator=generator) < 0.05] = torch.nan
    return {
        "mask": mask.double(),
        "log_probs": log_probs,
        "old_log_probs": old,
        "ref_log_probs": log_probs + normal(0.3),
        "sampling_log_probs": sampling,
        # TRL takes the quantile in float32
        "entropies": normal().abs().float().double(),
        "advantages": normal()[:, 0].where(normal()[:, 0] < 1, 0.0),
        "advantages_by_token": normal().where(normal() < 1, 0.0),
        "token_ratio": normal(0.3).exp().where(normal() < 1, 0.0).where(mask, 1.0),
        "sequence_ratio": normal(0.3)[:, :1].exp().where(normal()[:, :1] < 1, 0.0),
    }


def trl_settings(config: ObjectiveConfig) -> dict:
    """The fields of GRPOConfig with the same names."""
    from trl import GRPOConfig

    names = {field.name for field in fields(GRPOConfig)}
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name in names}


TRL_NAMES = {
    "old_log_probs": "old_per_token_logps",
    "ref_log_probs": "ref_per_token_logps",
    "sampling_log_probs": "sampling_per_token_logps",
}
NOT_OF_THE_LOSS = {"entropy", "entropy_coef", "policy_loss"}


@settings(EXAMPLES, max_examples=300)
@given(
    config=objectives(),
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 5),
    old=st.booleans(),
    sampling=st.booleans(),
    ratio=st.sampled_from([None, "token_ratio", "sequence_ratio"]),
    by_token=st.booleans(),
)
def test_of_a_micro_batch(config, seed, rows, old, sampling, ratio, by_token):
    batch = draw_batch(seed, rows)
    mask = batch["mask"]
    advantages = batch["advantages_by_token" if by_token else "advantages"]
    columns = {}
    if old:
        columns["old_log_probs"] = batch["old_log_probs"]
    if sampling:
        columns["sampling_log_probs"] = batch["sampling_log_probs"]
    if config.beta:
        columns["ref_log_probs"] = batch["ref_log_probs"]
    if ratio and not (config.loss_type == "vespo" and ratio == "sequence_ratio"):
        columns["importance_sampling_ratio"] = batch[ratio]

    trainer = make_trainer(**trl_settings(config))
    inputs = [batch[name].clone().requires_grad_() for name in ("log_probs", "entropies")]
    theirs = {TRL_NAMES.get(name, name): column for name, column in columns.items()}
    expected = loss_of(trainer, inputs[0], advantages, mask, inputs[1], mask.sum(), **theirs)

    entropy_mask = None
    if config.top_entropy_quantile < 1:
        entropy_mask = high_entropy_mask(batch["entropies"], mask, config.top_entropy_quantile)
    weights = token_weights(mask, config.loss_type, trainer.max_completion_length)
    loss, metrics = grpo_loss(
        inputs[0], advantages, weights, config, entropy_mask=entropy_mask, **columns
    )
    bonus_weights = equal_weights(mask if entropy_mask is None else entropy_mask)
    loss = loss - entropy_bonus(inputs[1], bonus_weights, config.entropy_coef)

    same(loss, expected, inputs)
    if config.delta is None and mask.any(1).all():  # else we differ: docs/objectives.md
        found = combine([{name: value.tolist() for name, value in metrics.items()}])
        for name, (value,) in trainer._metrics["train"].items():
            if name not in NOT_OF_THE_LOSS:
                assert found.pop(name) == pytest.approx(value, abs=1e-6), name
        assert found.keys() == {"loss"}


@pytest.mark.seed(39)
@settings(EXAMPLES, max_examples=100)
@given(
    loss_type=st.sampled_from([name for name in LOSS_TYPES if name != "bnpo"]),
    level=st.sampled_from(IMPORTANCE_SAMPLING_LEVELS),
    seed=st.integers(0, 2**32),
    ranks=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    updates=st.integers(1, 3),
)
def test_of_an_update(loss_type, level, seed, ranks, accumulation, updates):
    """TRL's mean over ranks of what accumulates over micro-batches of 2 sequences, where a batch of
    samples serves several updates; this is the first of them."""
    parts = ranks * accumulation
    batch = draw_batch(seed, 2 * parts * updates)
    tokens = batch["mask"].sum()
    batch = {name: tensor[: 2 * parts] for name, tensor in batch.items()}
    log_probs = batch["log_probs"].clone().requires_grad_()
    config = ObjectiveConfig(
        loss_type=loss_type, importance_sampling_level=level, epsilon_high=0.3, beta=0.1
    )
    trainer = make_trainer(
        ranks=ranks,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation * updates,
        **trl_settings(config),
    )
    expected = 0.0
    for rows in torch.arange(2 * parts).split(2):
        columns = {
            theirs: batch[ours][rows]
            for ours, theirs in TRL_NAMES.items()
            if ours != "sampling_log_probs"
        }
        expected = expected + loss_of(
            trainer,
            log_probs[rows],
            batch["advantages"][rows],
            batch["mask"][rows],
            batch["entropies"][rows],
            tokens,
            **columns,
        )
    weights = token_weights(
        batch["mask"], loss_type, trainer.max_completion_length, tokens / updates
    )
    loss, _ = grpo_loss(
        log_probs,
        batch["advantages"],
        weights,
        config,
        old_log_probs=batch["old_log_probs"],
        ref_log_probs=batch["ref_log_probs"],
    )
    same(loss, expected / ranks, [log_probs])


def test_adaptive_entropy():
    """The coefficient that TRL applies to an update, seen in the gradient, and moves after it."""
    config = ObjectiveConfig(
        loss_type="grpo",
        beta=0.0,
        use_adaptive_entropy=True,
        entropy_coef=0.1,
        entropy_coef_delta=0.04,
        entropy_coef_max=0.15,
        entropy_target=0.5,
    )
    trainer, controller = make_trainer(**trl_settings(config)), EntropyController(config)
    batch = draw_batch(0, 4)
    mask, weights = batch["mask"], equal_weights(batch["mask"])
    for scale in (0.2, 0.1, 0.3, 5.0, 5.0, 5.0, 5.0, 5.0, 0.1, 0.1):
        entropies = (scale * batch["entropies"]).requires_grad_()
        loss = loss_of(
            trainer, batch["log_probs"], batch["advantages"], mask, entropies, mask.sum()
        )
        (gradient,) = torch.autograd.grad(loss, entropies)
        torch.testing.assert_close(gradient, -controller.applied * weights)
        controller.update(entropies[mask > 0].mean().item())
        assert controller.coef == pytest.approx(trainer.entropy_coef)


def test_cispo_without_a_cap_scales_everything_down_in_trl():
    """Which is why `check_objective` refuses it."""
    batch = draw_batch(0, 4)
    inputs = batch["log_probs"], batch["advantages"], batch["mask"]
    losses = [
        loss_of(make_trainer(loss_type="cispo", **cap), *inputs, batch["entropies"], 20).item()
        for cap in ({}, {"epsilon_high": 5.0})
    ]
    assert losses[0] == pytest.approx(0.2 * losses[1])


def same(loss, expected, inputs):
    """Loss and gradients agree."""
    assert (loss - expected).abs() <= TOLERANCE
    gradients, wanted = (
        torch.autograd.grad(value, inputs, materialize_grads=True) for value in (loss, expected)
    )
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE
