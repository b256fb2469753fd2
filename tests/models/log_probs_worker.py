"""Sharded log-probabilities against the unsharded ones, on four ranks and in pairs of them.

torchrun --nproc-per-node 4 log_probs_worker.py
"""

import torch
import torch.distributed as dist

from grpo_mcore.models.log_probs import log_probs_and_entropy

POSITIONS, TEMPERATURE = 11, 0.7


def check(group: dist.ProcessGroup, vocab: int, chunk: int) -> None:
    """Fails unless this rank's part is the unsharded result. All ranks draw the same numbers."""
    width = -(-vocab // group.size())
    generator = torch.Generator().manual_seed(vocab)
    logits = 9 * torch.randn(POSITIONS, width * group.size(), generator=generator).double()
    targets = torch.randint(vocab, (POSITIONS,), generator=generator)
    weights = torch.randn(POSITIONS, generator=generator).double()

    whole = logits[:, :vocab].clone().requires_grad_()
    table = torch.log_softmax(whole / TEMPERATURE, dim=-1)
    expected = table.gather(1, targets[:, None]).squeeze(1)
    expected_entropy = -(table.exp() * table).sum(-1)
    (expected * weights + expected_entropy * weights.flip(0)).sum().backward()
    slope = torch.nn.functional.pad(whole.grad, (0, logits.shape[1] - vocab))

    mine = slice(group.rank() * width, (group.rank() + 1) * width)
    shard = logits[:, mine].clone().requires_grad_()
    found, entropy = log_probs_and_entropy(shard, targets, vocab, TEMPERATURE, group, chunk)
    (found * weights + entropy * weights.flip(0)).sum().backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=1e-12)
    torch.testing.assert_close(shard.grad, slope[:, mine], rtol=0, atol=1e-12)


def main() -> None:
    dist.init_process_group("gloo")
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for vocab in (16, 13, 5):  # of 5, the fourth rank holds nothing but padding
        for chunk in (2048, 4):
            check(dist.group.WORLD, vocab, chunk)
            check(pairs[dist.get_rank() // 2], vocab, chunk)
    dist.destroy_process_group()
    print("agreed")


if __name__ == "__main__":
    main()
