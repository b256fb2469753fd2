"""The proof of a sync names the first tensor that differs."""

from grpo_mcore.weights.sync import first_difference

SENT = {"embed": "a1", "layer.0": "b2", "layer.1": "c3"}


def test_all_workers_agree():
    assert first_difference(SENT, [dict(SENT), dict(SENT)]) is None
    assert first_difference(SENT, []) is None


def test_first_difference_is_named_with_worker_and_checksums():
    received = [dict(SENT), SENT | {"layer.1": "xx", "layer.0": "yy"}]
    message = first_difference(SENT, received)
    assert message == "tensor layer.0 is yy on worker 1, b2 in the trainer"


def test_a_tensor_that_never_arrived_is_named():
    received = {name: SENT[name] for name in ("embed", "layer.0")}
    assert first_difference(SENT, [received]) == (
        "tensor layer.1 is missing on worker 0, c3 in the trainer"
    )
