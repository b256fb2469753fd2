"""The proof of a sync names the first tensor that differs."""

from grpo_mcore.rollout.bucket import Receipt
from grpo_mcore.weights.sync import first_difference, first_without_weights

SENT = {"embed": 0xA1, "layer.0": 0xB2, "layer.1": -1}


def receipt(checksums=SENT, not_loaded=()) -> Receipt:
    return Receipt(dict(checksums), list(not_loaded))


def part(*names: str) -> Receipt:
    return receipt({name: SENT[name] for name in names})


def test_all_workers_agree():
    assert first_difference(SENT, [receipt(), receipt()], shared=False) is None


def test_no_worker_is_no_proof():
    assert first_difference(SENT, [], shared=True) == "no worker received anything"


def test_a_parameter_without_weights_is_named():
    receipts = [receipt(), receipt(not_loaded=["qkv.weight", "z"])]
    found = first_without_weights(receipts)
    assert found == "parameter qkv.weight of worker 1 was given no weights"
    assert first_without_weights(receipts[:1]) is None


def test_first_difference_is_named_with_worker_and_checksums():
    other = receipt(SENT | {"layer.1": 5, "layer.0": 0xCC})
    message = first_difference(SENT, [receipt(), other], shared=False)
    assert message == (
        "tensor layer.0 is 00000000000000cc on worker 1, 00000000000000b2 in the trainer"
    )
    message = first_difference({"layer.1": -1}, [other], shared=True)
    assert message.endswith("is 0000000000000005 on worker 0, ffffffffffffffff in the trainer")


def test_workers_that_read_the_same_bytes_share_the_proof():
    assert first_difference(SENT, [part("embed", "layer.1"), part("layer.0")], shared=True) is None
    message = first_difference(SENT, [part("embed"), part("layer.0")], shared=True)
    assert message.startswith("tensor layer.1 is missing on worker 0")


def test_workers_that_read_bytes_of_their_own_must_each_prove_all():
    message = first_difference(SENT, [receipt(), part("embed", "layer.1")], shared=False)
    assert message.startswith("tensor layer.0 is missing on worker 1")
