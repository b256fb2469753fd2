"""SFT and DPO compute what transformers computes, at any layout, and have what trainers have."""

import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import IntervalStrategy

from grpo_mcore import DPOTrainer, SFTConfig, SFTTrainer
from grpo_mcore.callbacks import Callback
from grpo_mcore.config import ConfigError
from grpo_mcore.trainers.sft import SFTSession
from tests.end_to_end.conftest import records, run_command, run_script
from tests.trainers.offline_reference import CHATS, HELD_OUT, PAIRS, ROWS, TEMPLATE
from tests.trainers.offline_worker import DPO_LAYOUTS, dpo_config, rows_of, sft_config

pytestmark = pytest.mark.cores(4)

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def model(tiny_models) -> str:
    return str(tiny_models / "qwen2")


@pytest.fixture(scope="module")
def other(tiny_models, model) -> str:
    """A model of the same shape."""
    directory = tiny_models / "qwen2_other"
    directory.mkdir()
    for file in Path(model).iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    weights = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for tensor in weights.values():
        tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return str(directory)


@pytest.fixture(scope="module")
def spread(model, other, tmp_path_factory) -> Path:
    """What the worker's runs over four processes left."""
    directory = tmp_path_factory.mktemp("spread")
    run_script(HERE / "offline_worker.py", model, other, directory, ranks=4)
    return directory


@pytest.fixture(scope="module")
def adapted(model, tmp_path_factory) -> Path:
    """What a run left that trained adapters."""
    directory = tmp_path_factory.mktemp("adapted") / "run"
    SFTTrainer(
        args=sft_config(model, directory, learning_rate=1e-2),
        train_dataset=ROWS,
        eval_dataset=HELD_OUT,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
    ).train()
    return directory


@pytest.fixture(scope="module")
def expected(model, other, adapted, tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("reference") / "found.pt"
    worker = HERE / "offline_reference.py"
    run_command([sys.executable, worker, model, other, output, adapted / "final"])
    return torch.load(output)


def steps(directory: Path) -> list[dict]:
    """The records of steps, without times."""
    rows = [row for row in records(directory) if "loss" in row]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def evaluations(directory: Path) -> list[dict]:
    return [row for row in records(directory) if "eval_loss" in row]


def close(found: dict, expected: dict) -> bool:
    return {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5, rel=1e-5)


@pytest.mark.seed(62)
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("layout", ["1x1x1", "2x2x1"])
def test_first_step_of_sft_is_transformers(spread, expected, model, tmp_path, layout, packing):
    directory = spread / f"sft-{packing}"
    if layout == "1x1x1":
        directory = tmp_path / "run"
        args = sft_config(model, directory, **rows_of(packing))
        SFTTrainer(args=args, train_dataset=ROWS, eval_dataset=HELD_OUT).train()
    first, second = steps(directory)
    assert close(first, expected["completions"])
    assert (first["num_tokens"], second["num_tokens"]) == (128, 256)
    assert evaluations(directory)[0]["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)


def test_micro_batches_of_a_token_budget(expected, model, tmp_path):
    args = sft_config(model, tmp_path / "run", max_tokens_per_micro_batch=40, max_steps=1)
    SFTTrainer(args=args, train_dataset=ROWS, eval_dataset=HELD_OUT).train()
    assert close(steps(tmp_path / "run")[0], expected["completions"])
    found = evaluations(tmp_path / "run")[0]["eval_loss"]
    assert found == pytest.approx(expected["eval_loss"], abs=1e-5)


@pytest.mark.seed(62)
def test_loss_on_what_the_assistant_says(expected, model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    args = sft_config(model, tmp_path / "run", assistant_only_loss=True, max_steps=1)
    SFTTrainer(args=args, train_dataset=CHATS, processing_class=tokenizer).train()
    assert close(steps(tmp_path / "run")[0], expected["chats"])


@pytest.mark.seed(63)
@pytest.mark.parametrize("streamed", [False, True])
def test_first_step_of_dpo_is_the_published_one(expected, model, other, tmp_path, streamed):
    rows = Dataset.from_list(PAIRS).to_iterable_dataset() if streamed else PAIRS
    args = dpo_config(model, tmp_path / "run", batch_size=8, max_steps=1)
    DPOTrainer(None, other, args, train_dataset=rows).train()
    assert close(steps(tmp_path / "run")[0], expected["dpo"])


@pytest.mark.seed(63)
def test_dpo_at_other_layouts(spread, model, other, tmp_path):
    alone = tmp_path / "run"
    args = dpo_config(model, alone)
    DPOTrainer(None, other, args, train_dataset=PAIRS, eval_dataset=PAIRS[:5]).train()
    assert {"eval_rewards/margins", "eval_logps/chosen"} <= evaluations(alone)[0].keys()
    for layout in DPO_LAYOUTS:
        for rows in (steps, evaluations):
            for found, same in zip(rows(spread / layout), rows(alone), strict=True):
                assert found == pytest.approx(same, abs=1e-5, rel=1e-5), layout


@pytest.mark.seed(63)
@pytest.mark.parametrize("adapters", [False, True])
def test_dpo_comes_to_prefer_what_was_chosen(model, tmp_path, adapters):
    args = dpo_config(model, tmp_path / "run", max_steps=12)
    options = LoraConfig(r=4, target_modules="all-linear") if adapters else None
    trainer = DPOTrainer(
        args=args, train_dataset=PAIRS, eval_dataset=PAIRS[:3], peft_config=options
    )
    trainer.train()
    first, *_, last = steps(tmp_path / "run")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert last["rewards/accuracies"] == 1 and last["loss"] < 0.5
    before, after = evaluations(tmp_path / "run")
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert after["eval_rewards/accuracies"] == 1 and after["eval_rewards/margins"] > 0.5
    given = trainer.evaluate({"seen": PAIRS[:3]})  # with the reference loaded again
    assert given["eval_seen_loss"] == pytest.approx(after["eval_loss"], abs=1e-6)


@pytest.mark.seed(52, 62, 63)
@pytest.mark.parametrize("algorithm", ["sft", "adapters", "dpo"])
def test_a_resumed_run_goes_on_exactly(model, tmp_path, algorithm):
    def trainer(name: str, max_steps: int):
        options = None
        if algorithm == "adapters":
            options = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1)
        kind, config, rows = SFTTrainer, sft_config, ROWS
        if algorithm == "dpo":
            kind, config, rows = DPOTrainer, dpo_config, PAIRS
        args = config(model, tmp_path / name, max_steps=max_steps, batch_size=2)
        return kind(args=args, train_dataset=rows, peft_config=options)

    trainer("straight", 4).train()
    trainer("parted", 2).train()
    trainer("parted", 4).train(resume_from_checkpoint=True)
    assert steps(tmp_path / "parted") == steps(tmp_path / "straight")
    assert len({row["loss"] for row in steps(tmp_path / "parted")}) == 4


@pytest.mark.seed(49)
def test_adapters_load_with_peft(expected, adapted):
    trained = evaluations(adapted)[-1]["eval_loss"]
    assert trained == pytest.approx(expected["adapted"], abs=1e-5)
    assert expected["adapted"] < expected["eval_loss"] - 0.01


@pytest.mark.seed(53, 61, 62, 65, 66, 67)
def test_fit_with_callbacks_then_the_saved_model(model, tmp_path):
    seen = []

    class Watch(Callback):
        def on_step_end(self, trainer, step, metrics):
            seen.append((step, trainer.current_step, metrics["loss"]))

        def on_epoch_end(self, trainer, epoch, metrics):
            seen.append(epoch)

    args = sft_config(model, tmp_path / "run", batch_size=4, save_strategy="no")
    trainer = SFTTrainer(args)
    assert trainer.config["batch_size"] == 4
    result = trainer.fit(ROWS, max_epochs=1, callbacks=[Watch()])
    assert (result.total_steps, result.total_epochs, trainer.current_step) == (2, 1, 2)
    losses = [row["loss"] for row in steps(tmp_path / "run")]
    assert seen == [(1, 1, losses[0]), (2, 2, losses[1]), 0]
    found = trainer.evaluate(HELD_OUT)
    assert {"eval_loss", "eval_entropy"} == found.keys()
    trainer.save_model(tmp_path / "saved")
    again = SFTTrainer(tmp_path / "saved", sft_config("???", tmp_path / "again"))
    with pytest.raises(ConfigError, match="train_dataset=None: give a dataset"):
        again.evaluate(HELD_OUT)
    again = SFTTrainer(
        tmp_path / "saved", sft_config("???", tmp_path / "again"), train_dataset=ROWS
    )
    assert again.evaluate(HELD_OUT) == pytest.approx(found, abs=1e-6)
    again.close()


def test_a_path_and_an_enumeration_are_saved_with_a_checkpoint(model, tmp_path):
    def trainer(max_steps: int) -> SFTTrainer:
        args = sft_config(model, tmp_path / "run", max_steps=max_steps, save_steps=1)
        args.output_dir, args.save_strategy = tmp_path / "run", IntervalStrategy.STEPS
        return SFTTrainer(args=args, train_dataset=ROWS)

    trainer(1).train()
    saved = tmp_path / "run" / "checkpoints" / "iter_0000001" / "config.yaml"
    text = yaml.safe_load(saved.read_text())
    assert (text["output_dir"], text["save_strategy"]) == (str(tmp_path / "run"), "steps")
    assert trainer(2).train(resume_from_checkpoint=True).global_step == 2


def test_an_error_that_can_be_mended_leaves_the_trained_model(model, tmp_path):
    args = sft_config(model, tmp_path / "run", save_strategy="no", max_steps=1)
    trainer = SFTTrainer(args=args, train_dataset=ROWS)
    trainer.train()
    with pytest.raises(ConfigError, match="eval_dataset=None: there is nothing to evaluate on"):
        trainer.evaluate()
    with pytest.raises(ConfigError, match="has no column"):
        trainer.evaluate([{"question": "how many?"}])
    trainer.save_model(tmp_path / "saved")
    weights = [d / "model.safetensors" for d in (tmp_path / "saved", tmp_path / "run" / "final")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    trainer.close()


def test_an_evaluation_that_a_callback_asks_for_is_amid_training(model, tmp_path, monkeypatch):
    """Others, who work for the trained model's ranks, rest after the whole of it."""
    events = []
    monkeypatch.setattr(SFTSession, "rest", lambda session: events.append("rest"))

    class Evaluates(Callback):
        def on_step_end(self, trainer, step, metrics):
            trainer.evaluate()
            events.append(step)

        def on_train_end(self, trainer, result):
            trainer.evaluate()
            events.append("end")

    args = sft_config(model, tmp_path / "run", save_strategy="no", eval_strategy="no")
    trainer = SFTTrainer(
        args=args, train_dataset=ROWS, eval_dataset=HELD_OUT, callbacks=[Evaluates()]
    )
    assert trainer.train().global_step == 2
    assert [row["step"] for row in evaluations(tmp_path / "run")] == [1, 2, 2]
    assert events == [1, 2, "end", "rest"]
    trainer.evaluate()
    assert events[4:] == ["rest"]
    trainer.close()


def test_a_run_begins_where_there_was_an_evaluation_only(model, tmp_path):
    def trainer() -> SFTTrainer:
        args = sft_config(model, tmp_path / "run", max_steps=1, eval_strategy="no")
        return SFTTrainer(args=args, train_dataset=ROWS, eval_dataset=HELD_OUT)

    first = trainer()
    first.evaluate()
    first.close()
    again = trainer()
    again.evaluate()
    assert again.fit().total_steps == 1
    assert [row["step"] for row in steps(tmp_path / "run")] == [1]
    with pytest.raises(ConfigError, match="holds an earlier run"):
        trainer().train()


def test_a_model_is_saved_among_files_of_the_users(model, tmp_path):
    """Twice, where an earlier model of several files was."""
    folder = tmp_path / "mine"
    folder.mkdir()
    kept = ("model_mine.safetensors", "model-of-mine.safetensors", "notes.txt")
    stale = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
    for name in (*kept, *stale):
        (folder / name).write_text("of the user's")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = {"default": TEMPLATE, "other": "{{ messages }}"}
    args = sft_config(model, tmp_path / "run", max_steps=1, save_strategy="no")
    trainer = SFTTrainer(args=args, train_dataset=ROWS, processing_class=tokenizer)
    trainer.train()
    for _ in range(2):
        trainer.save_model(folder)
    trainer.close()
    assert [(folder / name).read_text() for name in kept] == ["of the user's"] * 3
    assert not any((folder / name).exists() for name in stale)
    assert list((folder / "additional_chat_templates").iterdir())
    assert not list(folder.glob(".*"))
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    AutoModelForCausalLM.from_pretrained(folder)


def test_no_model_is_saved_where_adapters_are(adapted, model, tmp_path):
    folder = shutil.copytree(adapted / "final", tmp_path / "adapters")
    (folder / "model.safetensors").write_text("of the user's")
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    args = sft_config(model, tmp_path / "run")
    trainer = SFTTrainer(args=args, train_dataset=ROWS)
    with pytest.raises(ConfigError, match="adapters: holds adapters, which transformers would"):
        trainer.save_model(folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()} == before


def test_pushing_to_the_hub_leaves_nothing_behind_on_any_rank(spread):
    directory = spread / "sft-False"
    assert (directory / "pushed.txt").read_text() == "org/mine main End of training"
    assert not list(directory.glob(".*"))


def test_a_stream_is_read_as_far_as_needed(model, tmp_path):
    for name, rows in (
        ("table", ROWS),
        ("stream", Dataset.from_list(ROWS).to_iterable_dataset()),
    ):
        args = sft_config(model, tmp_path / name, batch_size=4, max_steps=3, shuffle_dataset=False)
        SFTTrainer(args=args, train_dataset=rows).train()
    assert steps(tmp_path / "stream") == steps(tmp_path / "table")


@pytest.mark.seed(62, 63)
def test_nemos_faces(model, tmp_path):
    sft = SFTTrainer.from_pretrained(model, output_dir=str(tmp_path), max_sequence_length=64)
    assert (sft.args.batch_size, sft.args.learning_rate, sft.args.max_length) == (32, 2e-5, 64)
    dpo = DPOTrainer.from_pretrained(model, output_dir=str(tmp_path), beta=0.2, batch_size=4)
    assert (dpo.args.batch_size, dpo.args.learning_rate, dpo.args.max_length) == (4, 1e-6, 512)
    assert dpo.args.beta == 0.2
    dpo = DPOTrainer(
        {
            "policy": {"model_name": model, "train_global_batch_size": 16},
            "dpo": {"reference_policy_kl_penalty": 0.5, "max_num_steps": 7},
        }
    )
    assert (dpo.args.batch_size, dpo.args.beta, dpo.args.max_steps) == (16, 0.5, 7)


def test_arguments_under_two_names(model):
    with pytest.raises(TypeError, match="args and config are two names"):
        SFTTrainer(model, SFTConfig(), config=SFTConfig())
    with pytest.raises(TypeError, match="processing_class and tokenizer are two names"):
        DPOTrainer(model, processing_class=1, tokenizer=2)
    with pytest.raises(TypeError, match="model is a whole configuration"):
        SFTTrainer(SFTConfig(), SFTConfig())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"beta": 0}, "beta=0: must be above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5: must be at least 0 and below 0.5"),
        ({"max_tokens_per_micro_batch": 64}, "max_tokens_per_micro_batch=64: would tear pairs"),
        ({"metric_for_best_model": "eval_loss"}, "eval_loss: needs eval_dataset, there is none"),
        ({"max_length": 0}, "max_length=0: must be at least 1"),
        ({"max_length": 2}, "max_length=2: every prompt of train_dataset is as long"),
    ],
)
def test_settings_of_dpo_that_cannot_work(model, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        DPOTrainer(args=dpo_config(model, tmp_path, **settings), train_dataset=PAIRS)


def test_models_and_data_that_cannot_work(tiny_models, model, other, tmp_path):
    args = dpo_config(model, tmp_path)
    with pytest.raises(ConfigError, match="ref_model: with peft_config the reference is"):
        DPOTrainer(None, other, args, train_dataset=PAIRS, peft_config=LoraConfig())
    with pytest.raises(ConfigError, match="is not of the shape of the model that is trained"):
        DPOTrainer(None, tiny_models / "llama", args, train_dataset=PAIRS)
    with pytest.raises(ConfigError, match="train_dataset: has no column chosen"):
        DPOTrainer(args=args, train_dataset=ROWS)
    with pytest.raises(ConfigError, match="eval_dataset: is a stream"):
        rows = Dataset.from_list(PAIRS).to_iterable_dataset()
        DPOTrainer(args=args, train_dataset=PAIRS, eval_dataset=rows)
    with pytest.raises(ConfigError, match=r"args=SFTConfig: give a grpo_mcore\.DPOConfig"):
        DPOTrainer(args=sft_config(model, tmp_path), train_dataset=PAIRS)
    with pytest.raises(ConfigError, match="has layers with a sliding window"):
        window = sft_config(str(tiny_models / "mistral"), tmp_path, packing=True)
        SFTTrainer(args=window, train_dataset=ROWS)
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl: no such file"):
        SFTTrainer(sft_config(model, tmp_path, train="nowhere.jsonl"))
