"""What the five documents that this API follows say, row by row, what was chosen where they differ,
and what is done otherwise than in ATLAS's code. A test that shows a row says so:
`@pytest.mark.seed(35)`, `@pytest.mark.seed("A1")`."""

from dataclasses import dataclass

DOCUMENTS = {
    "ATLAS reference": range(1, 39),
    "TRL": range(39, 56),
    "NeMo RL": range(56, 70),
    "Unsloth": range(70, 76),
    "ATLAS overview": range(76, 88),
    "What ATLAS's code does": [f"A{number}" for number in range(1, 16)],
}
"""Document -> its rows. ATLAS's code was read at Arc-Computer/RCL 329500a and Arc-Computer/ATLAS
1cf1883, 2025."""


@dataclass(frozen=True)
class Row:
    """What a document says of one name.

    Attributes:
        choice: what holds here, where documents, or a document and its own code, differ.
    """

    name: str
    semantics: str
    choice: str = ""


_BOTH_TOKENIZERS = "`processing_class` and `tokenizer` are one; both given: TypeError"
_BOTH_CONFIGS = "`args` and `config` are one; both given: TypeError"
_REWARD_ARGUMENTS = "`reward_funcs`, `reward_fn` and `reward_model` add to one list"

ROWS = {
    1: Row("`GRPOTrainer`", "GRPO with a KL term against a reference model"),
    2: Row("`model`", "a path, a hub id or a model object"),
    3: Row(
        "`reward_funcs`",
        "a function of prompts and completions, a reward model (object or id), or a list of them",
        _REWARD_ARGUMENTS,
    ),
    4: Row("`args`", "a `GRPOConfig`; a default one where it is None", _BOTH_CONFIGS),
    5: Row("`train_dataset`", "a dataset or a stream, with at least a column `prompt`"),
    6: Row("`eval_dataset`", "the same, or a dictionary of them"),
    7: Row("`processing_class`", "the tokenizer; the model's own by default", _BOTH_TOKENIZERS),
    8: Row("`reward_processing_classes`", "a tokenizer, or a list of one a reward function"),
    9: Row("`callbacks`", "a list of transformers' callbacks", "NeMo RL's too, in the same list"),
    10: Row(
        "`optimizers`",
        "(optimizer, schedule), (None, None) by default",
        "the settings of an AdamW and the function of a LambdaLR count; others are refused",
    ),
    11: Row("`peft_config`", "adapters to train in place of the weights"),
    12: Row("`train()`", "runs the training", "returns a TrainOutput; `fit()` a TrainingResult"),
    13: Row(
        "`_generate_and_score`",
        "prompts as text, completion ids and normalised advantages of a batch",
    ),
    14: Row(
        "`compute_loss`",
        "-advantage x log-probability + beta x KL",
        "`loss_type` chooses the policy term; beta is 0.04 everywhere",
    ),
    15: Row("`TeacherGRPOTrainer`", "GRPO of a teacher in the two-pass protocol"),
    16: Row(
        "`student_model`",
        "the student, a path or an object; None: the reference model",
        "objects are accepted, which ATLAS's own code refuses",
    ),
    17: Row("`use_reference_teacher_model`", "the reference model teaches, not the trained one"),
    18: Row("`student_model_init_kwargs`", "arguments for loading the student"),
    19: Row("`logging_prob`", "how often completions are logged, 0 by default"),
    20: Row("`disable_student_offloading`", "keeps the student on the device"),
    21: Row(
        "`max_probe_tokens`",
        "longest probe, 500; 50 in the example",
        "500 in training, 50 by default in `diagnostic_probe`",
    ),
    22: Row("`student_diagnostic_template`", "the probe's prompt"),
    23: Row("`teacher_adaptive_template`", "the teacher's prompt"),
    24: Row("`student_with_teaching_template`", "the student's prompt with the teaching"),
    25: Row("`student_baseline_template`", "the student's prompt without it"),
    26: Row("`_generate_baseline_solutions`", "the student's extracted answers, alone"),
    27: Row("`_generate_student_approaches`", "the probes' texts"),
    28: Row(
        "`_extract_solutions_from_responses`",
        "what is between `<solution>` tags, empty where there are none",
        "as here by default; `extraction=lenient` has the order of ATLAS's own code",
    ),
    29: Row("`AdaptiveTeachingReward`", "rewards help and punishes harm, unequally"),
    30: Row(
        "`student_model`, `teacher_model`, `tokenizer`",
        "None until linked with a trainer",
        "accepted; a trainer gives its teacher's tokenizer and tells the teaching's tokens",
    ),
    31: Row("`degradation_penalty_multiplier`", "weight of harm, 2.0"),
    32: Row("`efficiency_weight`", "weight of the bonus for brevity, 1.0"),
    33: Row(
        "`evaluate_student_performance`", "1.0 where answer and truth agree but for case, else 0.0"
    ),
    34: Row(
        "`AdaptiveTeachingReward(...)(prompts, completions, **columns)`",
        "one number a completion, from ground truths, baselines and solutions",
    ),
    35: Row(
        "reward formula",
        "d < 0: -m abs(d); else d (1 + w 100 / (100 + teaching tokens)); no change is 0",
        "this by default; `formula` has two others; tokens are those of the extracted teaching",
    ),
    36: Row("`GRPOConfig` in the example", "its eleven keys, the two of the reward among them"),
    37: Row("a reward function of one's own", "(prompts, completions, **kwargs) -> numbers"),
    38: Row("import paths", "the classes by name", "`grpo_mcore.*`; the classes keep their names"),
    39: Row("`GRPOTrainer`", "GRPO as TRL has it"),
    40: Row("`model`", "a path, a hub id or an object; causal language models only"),
    41: Row(
        "`reward_funcs`",
        "rewards are summed by weight; functions get all columns and `trainer_state`; None leaves "
        "a function out for a sample",
        "the call style is read off the signature",
    ),
    42: Row("`args`", "a `GRPOConfig` or None", _BOTH_CONFIGS),
    43: Row(
        "`train_dataset`",
        "prompts as text or as conversations",
        "further columns are passed to the reward functions",
    ),
    44: Row("`eval_dataset`", "the same, or a dictionary of them"),
    45: Row(
        "`processing_class`",
        "the tokenizer; its end token pads where it has none for it",
        _BOTH_TOKENIZERS,
    ),
    46: Row("`reward_processing_classes`", "as many as reward functions, ignored for functions"),
    47: Row("`callbacks`", "called beside the default ones; `remove_callback`"),
    48: Row("`optimizers`", "AdamW and a schedule with warm-up by default"),
    49: Row("`peft_config`", "the base model without adapters is the reference"),
    50: Row("`tools`", "functions with types and docstrings that the model may call"),
    51: Row("`rollout_func`", "generates in place of the engine; further fields go to the rewards"),
    52: Row(
        "`train(resume_from_checkpoint=...)`",
        "a path, or True for the last checkpoint; model, optimizer and schedule go on",
    ),
    53: Row("`save_model`", "a directory for `from_pretrained`, written by one process"),
    54: Row("`push_to_hub`", "uploads to `hub_model_id`, blocking or not"),
    55: Row("`accuracy_reward`", "1 where the answer is mathematically equal to the solution"),
    56: Row("`GRPOTrainer`", "GRPO as NeMo RL has it"),
    57: Row("`GRPOTrainer.from_pretrained`", "model, prompts, generations, rate, length, TP size"),
    58: Row("`normalize_rewards`", "divides by the group's deviation; True"),
    59: Row(
        "`use_leave_one_out_baseline`",
        "the baseline is the mean of the group's others; True",
        "the default in NeMo RL's faces only",
    ),
    60: Row("`GRPOTrainer(config)`", "a dictionary with sections `policy` and `grpo`"),
    61: Row(
        "`fit`",
        "dataset, `reward_fn(prompt, response)` or environment, bounds, callbacks",
        "sets what it is given, then runs `train()`",
    ),
    62: Row("`SFTTrainer`", "fine-tuning on demonstrations; no reward function"),
    63: Row("`DPOTrainer`", "preference optimisation; beta is the KL coefficient"),
    64: Row("`BaseTrainer`", "`fit`, `save_checkpoint`, `load_checkpoint`"),
    65: Row("`config`, `current_step`", "the settings as a dictionary, and the step"),
    66: Row("`TrainingResult`", "metrics, best checkpoint, steps, epochs"),
    67: Row("`Callback`", "five hooks, of training, steps and epochs"),
    68: Row(
        "`create_trainer`, `list_algorithms`, `get_algorithm`",
        "trainers by name, sorted",
        "`teacher_grpo` is in the list too",
    ),
    69: Row("linked pages", "`train()`, `EnvironmentInterface`, the configuration; names only"),
    70: Row(
        "`GRPOTrainer`",
        "GRPO as Unsloth has it, of a model with adapters",
        "a `PeftModel` is refused: pass the base model and `peft_config`",
    ),
    71: Row(
        "`tokenizer`, `reward_model`, `reward_fn`, `num_generations`",
        "arguments of the constructor",
        f"{_REWARD_ARGUMENTS}; `num_generations` overrides the configuration's 8",
    ),
    72: Row("`reward_fn`", "(responses, ground_truths) -> numbers, without prompts"),
    73: Row("`reward_model`", "a model in place of a function"),
    74: Row("`train()`", "returns a TrainOutput"),
    75: Row(
        "configuration in the example",
        '1 x 8 samples in groups of 4, and `optim="adamw_8bit"`',
        "a batch counts data parallel ranks only; AdamW's states are float32, with a warning",
    ),
    76: Row(
        "`GRPOTrainer`",
        "with `config`, `ref_model`, `tokenizer`, `reward_model`, `compute_metrics`",
        f"`ref_model` None: the model as it was; {_BOTH_CONFIGS}",
    ),
    77: Row("features", "several rewards by weight, vLLM, recomputation, offloading"),
    78: Row("`on_epoch_begin`", "a method of a trainer's subclass"),
    79: Row(
        "`on_step_end`",
        "likewise; `current_rewards` and `current_kl` are there to log",
        "metrics have TRL's names, and those of ATLAS as aliases",
    ),
    80: Row("`on_evaluate`", "likewise, with the metrics"),
    81: Row("`TeacherGRPOTrainer`", "takes `student_model`; trainer and teacher in one"),
    82: Row(
        "`diagnostic_probe`",
        "a DiagnosticResult of a task; its errors by type",
        "`max_tokens` (50) is of each of its probes; training's are `max_probe_tokens` (500)",
    ),
    83: Row(
        "`DiagnosticResult`",
        "capability, confidence, gaps, quality, tokens",
        "from evidence: docs/teaching.md",
    ),
    84: Row(
        "`generate_guidance`",
        "long, middling or short guidance by capability",
        "levels of exactly 0.3 and 0.7 are middling",
    ),
    85: Row(
        "`RIMReward`",
        "a reward, and each judge's scores, principles and rationales",
        "the dictionary comes with `return_info_dict=True`; a judge that fails is None, not 0",
    ),
    86: Row(
        "`rim_rewards`, `rim_explanations`",
        "what the judges said, logged apart",
        "`rim_rewards/<judge>` are metrics, `rim_explanations` a column of the completions",
    ),
    87: Row(
        "`interpretation.yaml`, `interpretation_offline.yaml`",
        "judges by Hydra override",
        "`reward_system=interpretation_offline`, with `rewards=[rim]`",
    ),
    "A1": Row(
        "the loss's prompt",
        "samples from the adaptive prompt; loss, KL and reference see the bare question",
        "one prompt, the adaptive one, for all of them",
    ),
    "A2": Row(
        "the teacher's engine",
        "keeps the weights it started with",
        "is given every step's weights, and proves it before it generates",
    ),
    "A3": Row(
        "the student's engine",
        "a push of weights would go to it as well",
        "belongs to the student's role; nothing is sent to it after the start",
    ),
    "A4": Row(
        "the first step",
        "raises NameError: an import in a branch hides the module",
        "runs, at every layout",
    ),
    "A5": Row(
        "templates left out",
        "None: the first prompt raises AttributeError",
        "have defaults, and one without its fields is refused before anything loads",
    ),
    "A6": Row(
        "the judges' prompts",
        "JSON braces in a format string: KeyError for all four",
        "fields are replaced by name; other braces stay",
    ),
    "A7": Row(
        "what judges are given",
        "the teacher's text as the student's answer; plan and traces empty",
        "question, plan, answers before and after, the teaching, the ground truth",
    ),
    "A8": Row(
        "`rim_rewards`, `rim_explanations`",
        "logged by no code",
        "metrics of every step, and beside the completions",
    ),
    "A9": Row(
        "the judges' YAML",
        "rules, limits and model settings are read by nothing",
        "every key is used or refused",
    ),
    "A10": Row(
        "a judge that fails",
        "gives 0, as bad teaching does",
        "gives nothing: it is left out of the mean, and counted",
    ),
    "A11": Row(
        "the student's text",
        "goes through the teacher's tokenizer and chat template",
        "has the student's own",
    ),
    "A12": Row(
        "`diagnostic_probe`, `generate_guidance`",
        "are in the documents only",
        "are methods of trainer and Tutor",
    ),
    "A13": Row("evaluation", "raises NotADirectoryError", "teaches the held-out questions"),
    "A14": Row(
        "slips",
        "a condition without its brackets, a missing import in the reward model's branch, a "
        "launcher that kills every process on the GPUs",
        "reward models with chat templates work; a run ends its own processes, and all of them",
    ),
    "A15": Row(
        "braces in text",
        "str.format: a brace in a template raises",
        "are text wherever they stand",
    ),
}

NOT_YET: dict[int | str, str] = {}
"""Row -> what is missing where no test shows it, or tests show a part of it."""
