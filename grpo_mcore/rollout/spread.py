"""Which engine answers which request."""

from collections.abc import Sequence

from grpo_mcore.rollout.requests import Request


def spread(requests: Sequence[Request], replicas: int) -> list[list[int]]:
    """Deals requests so that the expected work of all engines is alike: the prompts of most work
    first, each to the engine that has least so far.

    Work is counted in tokens, a prompt's and those its completions may have. All samples of a
    prompt go to one engine, which computes the prompt once; of fewer prompts than engines, each is
    given to several.

    Returns:
        For each replica the numbers of its requests, in the order it is given them.
    """
    samples: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        samples.setdefault(tuple(request.prompt), []).append(number)
    parts = -(-replicas // max(1, len(samples)))
    dealt = (numbers[part::parts] for numbers in samples.values() for part in range(parts))

    def work(group: list[int]) -> int:
        completions = sum(requests[number].max_tokens for number in group)
        return len(requests[group[0]].prompt) + completions

    shares: list[list[int]] = [[] for _ in range(replicas)]
    loads = [0] * replicas
    for group in sorted(filter(None, dealt), key=work, reverse=True):
        least = loads.index(min(loads))
        shares[least] += group
        loads[least] += work(group)
    return shares
