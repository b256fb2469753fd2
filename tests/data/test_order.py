"""Batches by number alone, in the structure of TRL's RepeatSampler."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.utils import RepeatSampler

from grpo_mcore.data.order import GenerationCycle, Order
from grpo_mcore.errors import ConfigError


def repeat_sampler(rows, generations, batch_size, repeats):
    """Distinct questions of each batch RepeatSampler gives the loader in an epoch."""
    flat = list(RepeatSampler(rows, generations, batch_size, repeats, shuffle=False))
    size = batch_size * generations
    loaded = [flat[start : start + size] for start in range(0, len(flat), size)]
    assert all(len(set(batch[g : g + generations])) == 1 for batch in loaded for g in (0,))
    return [batch[::generations] for batch in loaded]


@given(
    size=st.integers(1, 30),
    batch_size=st.integers(1, 8),
    per_generation=st.integers(1, 3),
    iterations=st.integers(1, 3),
)
def test_an_epoch_is_that_of_repeat_sampler(size, batch_size, per_generation, iterations):
    cycle = GenerationCycle(1, per_generation, iterations)
    expected = repeat_sampler(range(size), 2, batch_size, cycle.micro_steps)
    if size < batch_size:
        assert expected == []
        with pytest.raises(ConfigError, match=f"has {size} rows, fewer than the {batch_size}"):
            Order(size, batch_size, 0, shuffle=False, drop_last=True)
        return
    order = Order(size, batch_size, 0, shuffle=False, drop_last=True)
    steps = cycle.steps(1, order.batches(1))
    assert [order.rows(cycle.parts(step)[0][0]) for step in range(steps)] == expected
    assert order.rows(order.batches(1)) == order.rows(0)  # the next epoch


@given(
    size=st.integers(1, 20),
    batch_size=st.integers(1, 25),
    seed=st.integers(0, 3),
    drop_last=st.booleans(),
)
def test_each_epoch_has_every_row_once_in_an_order_of_its_own(size, batch_size, seed, drop_last):
    if drop_last and size < batch_size:
        return
    order = Order(size, batch_size, seed, drop_last=drop_last)
    seen = [row for batch in range(4 * size) for row in order.rows(batch)]
    epoch = order.batches(1) * batch_size if drop_last else size
    epochs = [seen[start : start + epoch] for start in range(0, 3 * epoch, epoch)]
    assert all(len(set(rows)) == epoch for rows in epochs)
    if epoch > 6:
        assert epochs[0] != epochs[1] != epochs[2]
    assert [order.rows(batch) for batch in (3, 1)] == [
        seen[3 * batch_size : 4 * batch_size], seen[batch_size : 2 * batch_size],
    ]  # fmt: skip


def test_seeds_differ():
    assert Order(20, 5, 0).rows(0) != Order(20, 5, 1).rows(0)


@pytest.mark.parametrize(
    "epochs, drop_last, batches",
    [(1, False, 3), (3, False, 8), (0.5, False, 2), (1, True, 2), (3, True, 6), (0.5, True, 1)],
)
def test_epochs_as_batches_of_four_of_ten_rows(epochs, drop_last, batches):
    assert Order(10, 4, 0, drop_last=drop_last).batches(epochs) == batches


def test_a_stream_comes_in_its_own_order_and_has_no_epochs_to_count():
    order = Order(None, 3, 0, drop_last=True)
    assert order.rows(2) == [6, 7, 8]
    with pytest.raises(ConfigError, match="max_steps: must be set"):
        order.batches(1)


@given(
    accumulation=st.integers(1, 6),
    per_generation=st.integers(1, 4),
    iterations=st.integers(1, 3),
    epochs=st.sampled_from([0.3, 1, 2, 2.5]),
    generations=st.integers(1, 5),
)
def test_generations_are_used_as_trl_does(
    accumulation, per_generation, iterations, epochs, generations
):
    cycle = GenerationCycle(accumulation, per_generation, iterations)
    found = [part for step in range(10) for part in cycle.parts(step)]
    generation, buffered = -1, None
    for micro_step, part in enumerate(found):  # GRPOTrainer._prepare_inputs
        if micro_step % (per_generation * iterations) == 0:
            generation += 1
            buffered = [(generation, place) for place in range(per_generation)]
        assert part == buffered[micro_step % per_generation]

    loader = generations * per_generation * iterations
    # Trainer.set_initial_training_values
    updates = max(loader // accumulation + int(loader % accumulation > 0), 1)
    assert cycle.steps(epochs, generations) == -(-epochs * updates // 1)
