"""What every kind of engine does alike: a child process of the rank, and a vLLM server."""

import math
import re
from dataclasses import replace

import pytest
import torch

from grpo_mcore.rollout.engine import EngineError
from grpo_mcore.rollout.pool import StaleEngine
from grpo_mcore.rollout.requests import Completion, Request, RequestError, request_seed
from grpo_mcore.rollout.spread import spread
from grpo_mcore.weights import sync as sync_module
from grpo_mcore.weights.sync import SyncError
from tests.rollout.conftest import MAX_MODEL_LEN

pytestmark = pytest.mark.engine

WORDS = ("what is two and three ?", "a train leaves at nine", "seven times eight", "why ?")


@pytest.fixture(scope="module")
def prompts(rig) -> list[list[int]]:
    return [rig.tokenizer(text)["input_ids"] for text in WORDS]


def sampled(prompts, copies: int = 2, **settings) -> list[Request]:
    repeated = [prompt for prompt in prompts for _ in range(copies)]
    return [
        Request(prompt, 4 + i % 5, request_seed("contract", i), **settings)
        for i, prompt in enumerate(repeated)
    ]


def same(left: list[Completion], right: list[Completion]) -> None:
    """Batches of other sizes may round log-probabilities otherwise."""
    assert [(c.tokens, c.finished) for c in left] == [(c.tokens, c.finished) for c in right]
    for a, b in zip(left, right, strict=True):
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-4)


def expected_log_probs(rig, request: Request, tokens: list[int]) -> list[float]:
    """By transformers, from the files of the model."""
    from transformers import (
        AutoModelForCausalLM,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopPLogitsWarper,
    )

    model = AutoModelForCausalLM.from_pretrained(rig.path, dtype=torch.float32)
    ids = torch.tensor([request.prompt + tokens])
    with torch.no_grad():
        logits = model(ids).logits[0]
    found = []
    for place in range(len(request.prompt), ids.shape[1]):
        row = logits[place - 1 : place]
        for process in (
            RepetitionPenaltyLogitsProcessor(request.repetition_penalty),
            TemperatureLogitsWarper(request.temperature),
            MinPLogitsWarper(request.min_p),
            TopPLogitsWarper(request.top_p),
        ):
            row = process(ids[:, :place], row)
        found.append(row.log_softmax(-1)[0, ids[0, place]].item())
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_results_depend_on_a_requests_seed_only(rig, prompts, temperature):
    requests = sampled(prompts, temperature=temperature)
    whole = rig.pool.generate(requests)
    assert [len(c.tokens) for c in whole if not c.finished] == [
        r.max_tokens for r, c in zip(requests, whole, strict=True) if not c.finished
    ]
    same(rig.pool.generate(requests[5:6]), whole[5:6])
    # As two engines would share them.
    shares = spread(requests, 2)
    parts = [rig.pool.generate([requests[i] for i in share]) for share in shares]
    for share, part in zip(shares, parts, strict=True):
        same(part, [whole[i] for i in share])


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_p": 0.5}, {"min_p": 0.3}, {"repetition_penalty": 1.7}],
    ids=lambda settings: " ".join(settings) or "temperature",
)
def test_log_probs_are_those_of_what_is_sampled_from(rig, prompts, settings):
    """That a token is left out shows: its log-probability would be minus infinity."""
    requests = sampled(prompts, 4, temperature=0.7, **settings)
    for request, completion in zip(requests, rig.pool.generate(requests), strict=True):
        expected = expected_log_probs(rig, request, completion.tokens)
        assert completion.log_probs == pytest.approx(expected, abs=1e-4)


def test_left_out_tokens_count_in_no_log_prob(rig, prompts):
    (completion,) = rig.pool.generate([Request(prompts[0], 6, 3, top_k=1)])
    assert completion.log_probs == pytest.approx([0.0] * len(completion.tokens), abs=1e-6)


def test_a_stop_text_ends_a_completion(rig, prompts):
    plain = Request(prompts[1], 24, 5)
    (free,) = rig.pool.generate([plain])
    texts = [rig.tokenizer.decode(free.tokens[:n], skip_special_tokens=True) for n in range(25)]
    end = next(n for n in range(8, 24) if texts[n].strip() != texts[n - 1].strip())
    stop = texts[end][-3:]
    first = next(n for n in range(25) if stop in texts[n])
    (ended,) = rig.pool.generate([replace(plain, stop=[stop])])
    assert ended.finished
    assert ended.tokens == free.tokens[:first]
    assert ended.log_probs == pytest.approx(free.log_probs[:first], abs=1e-4)


def test_bad_words_are_not_sampled(rig, prompts):
    requests = [Request(prompts[2], 20, seed) for seed in range(8)]
    used = {token for c in rig.pool.generate(requests) for token in c.tokens}
    words = {token: rig.tokenizer.decode([token]) for token in used}
    bad = {
        token: word
        for token, word in words.items()
        if word.isalpha() and rig.tokenizer(word)["input_ids"] == [token]
    }
    assert len(bad) > 5
    held = rig.pool.generate([replace(r, bad_words=list(bad.values())) for r in requests])
    assert not bad.keys() & {token for c in held for token in c.tokens}


@pytest.mark.parametrize(
    "structure, pattern",
    [
        ({"regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"json": {"enum": ["left", "right"]}}, '"left"|"right"'),
        ({"grammar": 'root ::= "a" "b"'}, "ab"),
    ],
    ids=["regex", "choice", "json", "grammar"],
)
def test_completions_obey_a_structure(rig, prompts, structure, pattern):
    requests = [Request(prompts[0], 20, seed, structured_outputs=structure) for seed in range(3)]
    for completion in rig.pool.generate(requests):
        text = rig.tokenizer.decode(completion.tokens, skip_special_tokens=True)
        assert completion.finished and re.fullmatch(pattern, text)
        assert all(math.isfinite(value) for value in completion.log_probs)


def test_what_cannot_fit_is_refused_before_it_is_sent(rig, prompts):
    fine = Request(prompts[0], 4, 0)
    tokens = len(prompts[0])
    with pytest.raises(RequestError) as caught:
        rig.pool.submit([fine, Request(prompts[0], MAX_MODEL_LEN + 1 - tokens, 0)])
    assert str(caught.value) == (
        f"policy: request 1 has {tokens} prompt tokens and asks for max_tokens="
        f"{MAX_MODEL_LEN + 1 - tokens}; together that is over max_model_len={MAX_MODEL_LEN} of its "
        "engine"
    )
    with pytest.raises(RequestError, match="policy: request 0 has an empty prompt"):
        rig.pool.submit([Request([], 4, 0)])
    assert rig.pool.generate([Request(prompts[0], MAX_MODEL_LEN - tokens, 0)])


def test_an_engines_own_error_is_raised(rig):
    with pytest.raises(EngineError, match=r"structured|regex|grammar"):
        rig.pool.engine.call("generate", [Request([5], 4, 0, structured_outputs={"regex": "("})])
    assert rig.pool.generate([Request([5], 4, 0)])


def test_a_sync_brings_the_trainers_weights(rig, prompts):
    """And leaves none of what those before have computed of a prompt."""
    request = Request((prompts[0] * 20)[:140], 12, 0, temperature=0.0)
    norms = [p for name, p in rig.chunks.named_parameters() if "norm" in name]
    completions = []
    for version in (2, 3):
        with torch.no_grad():
            for norm in norms:
                norm.neg_()
        assert rig.sync.push(version)["tensors"] > 20
        assert rig.pool.version == version
        completions += rig.pool.generate([request])
    other, own = completions
    expected = expected_log_probs(rig, replace(request, temperature=1.0), own.tokens)
    assert own.log_probs == pytest.approx(expected, abs=1e-4)
    assert other.log_probs != pytest.approx(own.log_probs, abs=1e-3)


def test_an_engine_is_told_once_what_lies_where(rig, prompts, monkeypatch):
    told, honest = [], sync_module._Link.submit

    def listen(link, method, *arguments):
        if method == "begin_sync":
            told.append(arguments)
        honest(link, method, *arguments)

    monkeypatch.setattr(sync_module._Link, "submit", listen)
    rig.pool.versions = [-1]  # as after a sleep that has dropped the weights
    rig.sync.push(3)
    assert told == [(None,)]
    assert rig.pool.generate([Request(prompts[0], 4, 0)])


def test_a_bucket_that_changes_on_its_way_is_found(rig, prompts, monkeypatch):
    honest = sync_module._Link.submit

    def corrupt(link, method, *arguments):
        if method == "receive_bucket":
            number, place = arguments
            hit = next((s for s in rig.sync.slots[number] if "layers.1.mlp.down" in s.name), None)
            if hit:
                rig.sync.buffers[place][hit.offset] ^= 1
        honest(link, method, *arguments)

    monkeypatch.setattr(sync_module._Link, "submit", corrupt)
    with pytest.raises(SyncError, match=r"tensor model\.layers\.1\.mlp\.down_proj\.weight is"):
        rig.sync.push(4)
    monkeypatch.undo()
    with pytest.raises(StaleEngine):
        rig.pool.submit([Request(prompts[0], 4, 0)])
    rig.sync.push(4)
    assert rig.pool.generate([Request(prompts[0], 4, 0)])
