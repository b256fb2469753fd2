"""Which engine answers which request."""

from hypothesis import given
from hypothesis import strategies as st

from grpo_mcore.rollout.requests import Request
from grpo_mcore.rollout.spread import spread


def requests_of(*groups: tuple[int, int, int]) -> list[Request]:
    """Args:
    groups: of samples of one prompt: how many, the prompt's tokens, and max_tokens.
    """
    return [
        Request([number + 1] * tokens, max_tokens, 0)
        for number, (samples, tokens, max_tokens) in enumerate(groups)
        for _ in range(samples)
    ]


def test_prompts_of_most_work_go_first_and_to_the_engine_with_least():
    requests = requests_of((1, 5, 10), (1, 50, 50), (1, 5, 60), (1, 5, 20))
    assert spread(requests, 2) == [[1], [2, 3, 0]]


def test_a_prompts_samples_stay_together():
    assert spread(requests_of((4, 5, 10), (4, 5, 10), (4, 6, 10)), 2) == [
        [8, 9, 10, 11],
        [0, 1, 2, 3, 4, 5, 6, 7],
    ]


def test_few_prompts_are_given_to_several_engines():
    assert spread(requests_of((6, 5, 10)), 3) == [[0, 3], [1, 4], [2, 5]]
    assert spread(requests_of((1, 5, 10)), 3) == [[0], [], []]
    assert spread([], 2) == [[], []]


GROUP = st.tuples(st.integers(1, 6), st.integers(1, 90), st.integers(1, 90))


@given(st.lists(GROUP, max_size=12), st.integers(1, 5))
def test_every_request_goes_to_one_engine_and_no_engine_has_much_more(groups, replicas):
    requests = requests_of(*groups)
    shares = spread(requests, replicas)
    assert len(shares) == replicas
    assert sorted(number for share in shares for number in share) == [*range(len(requests))]
    if len(groups) >= replicas:
        work = [tokens + samples * most for samples, tokens, most in groups]
        loads = [
            sum(work[group] for group in {requests[number].prompt[0] - 1 for number in share})
            for share in shares
        ]
        assert max(loads) <= min(loads) + max(work, default=0)
