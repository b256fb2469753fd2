"""A sequence-classification model is a reward function."""

import pytest
import torch
import transformers

from grpo_mcore.errors import ConfigError
from grpo_mcore.rewards import RewardCall, as_reward_specs, score

PROMPTS = ["tom has 14 cards.", "how many?", "tom"]
COMPLETIONS = [" he has 14", " 3 and a good many more than that", ""]
CALL = RewardCall(1, PROMPTS, COMPLETIONS, [[0]] * 3)


@pytest.fixture(scope="module")
def expected(reward_model) -> list[float]:
    """Each text's logit, by itself and without padding."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(reward_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(reward_model)
    texts = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]


def rewards_of(functions, call=CALL, **settings) -> torch.Tensor:
    return score(as_reward_specs(functions, **settings), call).rewards


@pytest.mark.seed(3, 8, 41)
def test_a_path_is_loaded_with_its_tokenizer(reward_model, expected):
    specs = as_reward_specs(str(reward_model))
    assert specs[0].name == "tiny-judge" and "model" not in vars(specs[0].function)
    assert score(specs, CALL, timeout=60).rewards[:, 0].tolist() == pytest.approx(expected)
    assert len(set(expected)) == 3


@pytest.mark.seed(3, 41, 73)
def test_an_object_is_evaluated_without_dropout(reward_model, expected):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        reward_model, attention_dropout=0.9
    ).train()
    rewards = rewards_of([lambda **_: [1, 2, 3], model])
    assert rewards[:, 0].tolist() == [1.0, 2.0, 3.0]
    assert rewards[:, 1].tolist() == pytest.approx(expected)


def test_many_texts_are_scored_in_parts(reward_model, expected):
    call = RewardCall(1, PROMPTS * 7, COMPLETIONS * 7, [[0]] * 21)
    assert rewards_of(str(reward_model), call)[:, 0].tolist() == pytest.approx(expected * 7)


@pytest.mark.seed("A14")
def test_conversations_go_through_the_chat_template(reward_model):
    prompts = [[{"role": "user", "content": p}] for p in PROMPTS]
    completions = [[{"role": "assistant", "content": c}] for c in COMPLETIONS]
    chat = RewardCall(1, prompts, completions, [[0]] * 3)
    texts = [f"user: {p}!\nassistant: {c}!\n" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    plain = RewardCall(1, texts, [""] * 3, [[0]] * 3)
    found = rewards_of(str(reward_model), chat, chat_template_kwargs={"mood": "!"})
    torch.testing.assert_close(found, rewards_of(str(reward_model), plain))


@pytest.mark.seed(8, 46)
def test_its_tokenizer_may_be_given_and_pads_with_its_end(reward_model, tmp_path, expected):
    tokenizer = transformers.AutoTokenizer.from_pretrained(reward_model)
    tokenizer.pad_token = None
    model = transformers.AutoModelForSequenceClassification.from_pretrained(reward_model)
    model.save_pretrained(tmp_path)
    rewards = rewards_of(
        [lambda **_: [0, 0, 0], str(tmp_path)], processing_classes=[None, tokenizer]
    )
    assert tokenizer.pad_token == tokenizer.eos_token
    assert rewards[:, 1].tolist() == pytest.approx(expected)


def test_a_path_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"reward_funcs\[1\]=.*/nothing: no model there: "):
        as_reward_specs([lambda **_: [], str(tmp_path / "nothing")])


def test_a_model_without_a_tokenizer_is_refused(reward_model, tmp_path):
    transformers.AutoModelForSequenceClassification.from_pretrained(reward_model).save_pretrained(
        tmp_path
    )
    nameless = transformers.AutoModelForSequenceClassification.from_config(
        transformers.AutoConfig.from_pretrained(reward_model)
    )
    nameless.config._name_or_path = ""
    for model in (str(tmp_path), nameless):
        with pytest.raises(ConfigError, match=r"without a tokenizer .* reward_processing_classes"):
            as_reward_specs(model)


@pytest.mark.seed(41)
def test_a_language_model_is_refused(tiny_models):
    path = str(tiny_models / "teacher")
    with pytest.raises(ConfigError, match=f"{path}: it has num_labels=2; a reward model is one"):
        as_reward_specs(path)


def test_a_checkpoint_without_the_head_is_refused(reward_model, tmp_path):
    config = transformers.AutoConfig.from_pretrained(reward_model)
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(reward_model)
    [spec] = as_reward_specs(str(tmp_path), processing_classes=tokenizer)
    with pytest.raises(ConfigError, match=r"its checkpoint lacks score\.weight"):
        spec.function.model  # noqa: B018
