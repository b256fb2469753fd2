"""Where a parameter lies in Megatron's checkpoints."""

from grpo_mcore.checkpoint.torch_dist import Slot, checkpoint_slots


def test_layers_are_stacked():
    slots = checkpoint_slots(
        [
            "embedding.word_embeddings.weight",
            "decoder.layers.0.mlp.linear_fc2.weight",
            "decoder.layers.1.mlp.linear_fc2.weight",
            "decoder.final_layernorm.weight",
        ]
    )
    assert list(slots.values()) == [
        Slot("embedding.word_embeddings.weight"),
        Slot("decoder.layers.mlp.linear_fc2.weight", (0,), (2,)),
        Slot("decoder.layers.mlp.linear_fc2.weight", (1,), (2,)),
        Slot("decoder.final_layernorm.weight"),
    ]


def test_experts_are_stacked_in_their_layer():
    names = [
        f"decoder.layers.{n}.mlp.experts.{e}.linear_fc1.weight" for n in range(3) for e in range(4)
    ]
    slot = checkpoint_slots(names)["decoder.layers.2.mlp.experts.3.linear_fc1.weight"]
    assert slot == Slot("decoder.layers.mlp.experts.experts.linear_fc1.weight", (2, 3), (3, 4))


def test_layers_that_differ_keep_their_numbers():
    slots = checkpoint_slots(
        [
            "decoder.layers.0.mlp.linear_fc1.weight",
            "decoder.layers.1.mlp.experts.0.linear_fc1.weight",
            "decoder.layers.1.mlp.experts.1.linear_fc1.weight",
        ]
    )
    assert list(slots.values()) == [
        Slot("decoder.layers.0.mlp.linear_fc1.weight"),
        Slot("decoder.layers.1.mlp.experts.experts.linear_fc1.weight", (0,), (2,)),
        Slot("decoder.layers.1.mlp.experts.experts.linear_fc1.weight", (1,), (2,)),
    ]
