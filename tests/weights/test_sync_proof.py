"""The proof of a sync names the first tensor that differs."""

from grpo_mcore.rollout.bucket import Receipt
from grpo_mcore.weights.sync import first_difference

SENT = {"embed": "a1", "layer.0": "b2", "layer.1": "c3"}


def receipt(checksums=SENT, not_loaded=()) -> Receipt:
    return Receipt(dict(checksums), list(not_loaded))


def test_all_workers_agree():
    assert first_difference(SENT, [receipt(), receipt()]) is None


def test_no_worker_is_no_proof():
    assert first_difference(SENT, []) == "no worker received anything"


def test_a_parameter_without_weights_is_named():
    found = first_difference(SENT, [receipt(), receipt(not_loaded=["qkv.weight", "z"])])
    assert found == "parameter qkv.weight of worker 1 was given no weights"


def test_first_difference_is_named_with_worker_and_checksums():
    other = receipt(SENT | {"layer.1": "xx", "layer.0": "yy"})
    message = first_difference(SENT, [receipt(), other])
    assert message == "tensor layer.0 is yy on worker 1, b2 in the trainer"


def test_a_tensor_that_never_arrived_is_named():
    received = receipt({name: SENT[name] for name in ("embed", "layer.0")})
    assert first_difference(SENT, [received]) == (
        "tensor layer.1 is missing on worker 0, c3 in the trainer"
    )
