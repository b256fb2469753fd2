"""The preference loss against TRL's own DPOTrainer, given tensors in place of a model's outputs."""

import copy
import tempfile
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_mcore.objectives.dpo import dpo_loss, sequence_log_probs
from grpo_mcore.objectives.metrics import combine
from tests.objectives.trl_oracle import EXAMPLES, QUIET, TOLERANCE, parts_of_a_trainer

pytest.importorskip("trl")
pytestmark = QUIET


@pytest.fixture(scope="module")
def trainer():
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    made = DPOTrainer(
        **parts_of_a_trainer()
        | {"train_dataset": Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])},
        ref_model=copy.deepcopy(parts_of_a_trainer()["model"]),
        args=DPOConfig(
            output_dir=tempfile.gettempdir(),  # nothing is written
            use_cpu=True,
            bf16=False,
            report_to=[],
        ),
    )
    made.model.train()
    made.precompute_ref_logps = True
    return made


def trl_loss(trainer, log_probs, mask, reference, loss_type, beta, label_smoothing):
    """TRL's loss of pairs, the chosen ones first."""
    trainer.loss_types, trainer.loss_weights = [loss_type], [1.0]
    trainer.beta, trainer.label_smoothing = beta, label_smoothing
    nothing = torch.zeros_like(mask)
    outputs = SimpleNamespace(
        log_probs=log_probs * mask, entropy=nothing, mean_logits=nothing, is_top1=mask > 0
    )
    chosen, rejected = reference.chunk(2)
    inputs = {
        "input_ids": torch.zeros(len(mask), mask.shape[1] + 1, dtype=torch.long),
        "attention_mask": torch.ones(len(mask), mask.shape[1] + 1, dtype=torch.long),
        "completion_mask": torch.cat([torch.zeros(len(mask), 1), mask], 1).long(),
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    model = trainer.model
    trainer.model = SimpleNamespace(training=True)
    try:
        return trainer._compute_loss(lambda **_: outputs, inputs, return_outputs=False)
    finally:
        trainer.model = model


@pytest.mark.seed(63)
@settings(EXAMPLES, max_examples=100)
@given(
    seed=st.integers(0, 2**32),
    pairs=st.integers(1, 4),
    beta=st.floats(0.01, 2),
    label_smoothing=st.just(0.0) | st.floats(0.01, 0.49),
)
def test_loss_gradients_and_metrics(trainer, seed, pairs, beta, label_smoothing):
    generator = torch.Generator().manual_seed(seed)
    log_probs = -torch.randn(2 * pairs, 6, generator=generator, dtype=torch.float64).exp()
    log_probs.requires_grad_()
    ends = torch.randint(1, 7, (2 * pairs, 1), generator=generator)
    mask = (torch.arange(6) < ends).double()
    reference = -3 * torch.rand(2 * pairs, generator=generator, dtype=torch.float64)

    trainer._metrics["train"].clear()
    if label_smoothing:
        # TRL's "sigmoid" forgets label smoothing. Its "aot" has it and sorts the pairs of a batch,
        # which changes nothing where there is one.
        alone = [torch.tensor([pair, pair + pairs]) for pair in range(pairs)]
        losses = [
            trl_loss(trainer, log_probs[i], mask[i], reference[i], "aot", beta, label_smoothing)
            for i in alone
        ]
        expected = torch.stack(losses).mean()
    else:
        expected = trl_loss(trainer, log_probs, mask, reference, "sigmoid", beta, 0.0)

    sums = sequence_log_probs(log_probs, mask).chunk(2)
    weights = torch.full((pairs,), 1 / pairs, dtype=torch.float64)
    loss, metrics = dpo_loss(*sums, *reference.chunk(2), weights, beta, label_smoothing)
    assert (loss - expected).abs() <= TOLERANCE
    ours, theirs = (torch.autograd.grad(value, log_probs)[0] for value in (loss, expected))
    assert (ours - theirs).abs().max() <= TOLERANCE

    found = combine([{name: value.tolist() for name, value in metrics.items()}])
    assert found.pop("loss") == pytest.approx(loss.item(), abs=TOLERANCE)
    for name, value in found.items():
        values = trainer._metrics["train"][name]
        assert value == pytest.approx(sum(values) / len(values), abs=1e-6), name
