"""The configuration of each trainer: every setting, its default and its meaning. Names are
transformers' and TRL's where they have the setting."""

from dataclasses import InitVar, dataclass, field, replace
from typing import Any

from grpo_mcore.config.bounds import LONGEST_WAIT, choice, number
from grpo_mcore.config.foreign import OF_DPO, OF_GRPO, OF_SFT, OF_TRAINING, accepts
from grpo_mcore.config.objective import ObjectiveConfig
from grpo_mcore.config.reward_system import JudgeServerConfig, RewardSystemConfig
from grpo_mcore.config.sections import (
    OVERLONG,
    DataConfig,
    LayoutConfig,
    LoraConfig,
    ModelConfig,
    RolloutConfig,
    TemplatesConfig,
)
from grpo_mcore.errors import ConfigError

FORMULAS = ("seed", "rcl", "docs")
ANSWER_MATCHES = ("text", "math")
EXTRACTIONS = ("strict", "lenient")
SAMPLING_OPTIONS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "bad_words",
    "structured_outputs",
)  # fmt: skip
"""Settings of GroupConfig that say how a token is sampled and what ends a completion."""


@dataclass
class TrainingConfig:
    """What every trainer has: batches, the optimizer and its schedule, evaluation, checkpoints,
    and where results go."""

    output_dir: str = "outputs"
    seed: int = number(42, least=0, most=2**32 - 1)
    num_train_epochs: float = number(3.0, above=0)
    max_steps: int = number(-1, least=-1)
    """Optimizer steps; -1: as many as `num_train_epochs` have."""
    per_device_train_batch_size: int = number(8, least=1)
    """Sequences in a micro-batch of one data parallel rank."""
    max_tokens_per_micro_batch: int | None = number(None, least=1)
    """Tokens of a micro-batch at most, padding included; sequences of similar length go together,
    balanced over data parallel ranks. None: per_device_train_batch_size sequences."""
    gradient_accumulation_steps: int | None = number(None, least=1)
    """Micro-batches of a data parallel rank in an optimizer step; None: as many as the other batch
    sizes say, or else 1 (of GRPO the fewest that make whole groups)."""

    learning_rate: float = number(1e-6, above=0, most=1)
    min_learning_rate: float = number(0.0, least=0, most=1)
    lr_scheduler_type: str = "constant"
    """"constant", "linear" or "cosine", from learning_rate down to min_learning_rate."""
    warmup_steps: float = number(0, least=0)
    """Below 1 a share of all steps."""
    stable_steps: int = number(0, least=0)
    """Steps at full rate before "linear" or "cosine" decay begins (counted after warm-up)."""
    optim: str = "adamw_torch"
    adam_beta1: float = number(0.9, least=0, below=1)
    adam_beta2: float = number(0.95, least=0, below=1)
    adam_epsilon: float = number(1e-8, above=0, most=1)
    weight_decay: float = number(0.0, least=0)
    max_grad_norm: float = number(1.0, least=0)
    """Of all gradients together; 0: no clipping."""
    distributed_optimizer: bool = False
    """Megatron's distributed optimizer: states sharded over data parallel ranks."""
    optimizer_offload_fraction: float = number(0.0, least=0, most=1)
    """Share of the optimizer's states and work kept on the CPU; needs distributed_optimizer."""
    peft_config: LoraConfig | None = None
    """Train adapters of these options only."""

    logging_strategy: str = choice("steps", ("steps", "epoch", "no"))
    logging_steps: int = number(1, least=1)
    """Give callbacks and trackers the metrics every so many steps, as means over these steps;
    metrics.jsonl has every step's."""
    report_to: Any = "none"
    """"tensorboard", "wandb", "mlflow", a list of them, "all" (that are installed) or "none"."""
    run_name: str | None = None
    eval_strategy: str = choice("steps", ("steps", "epoch", "no"))
    """"steps", "epoch" or "no"."""
    eval_steps: int = number(0, least=0)
    """Evaluate every so many steps; 0: before the first and after the last only."""
    save_strategy: str = choice("steps", ("steps", "epoch", "best", "no"))
    """"steps", "epoch", "best" (whenever `metric_for_best_model` is) or "no"."""
    save_steps: int = number(0, least=0)
    """Checkpoint every so many steps; 0: after the last only."""
    async_save: bool = False
    """Write checkpoints beside the next steps, from a copy in host memory. One takes effect in a
    later step, when every rank has written its part; a run that fails before then loses it."""
    save_total_limit: int | None = number(None, least=1)
    """As in transformers: checkpoints kept, the oldest go first. The best is among them and never
    goes; so with 1 there are two where the best is not the newest. None: all."""
    metric_for_best_model: str | None = None
    """A metric as metrics.jsonl names it. The checkpoint after whose step it was best (measured at
    that step) is kept, and named in checkpoints/best_checkpointed_iteration.txt."""
    greater_is_better: bool | None = None
    """None: unless the metric's name ends in "loss"."""
    resume: str | None = None
    """"auto": go on from the newest valid checkpoint in output_dir, if there is one. A path, to a
    folder of checkpoints or to one of them: from that one only. The layout may be another."""
    push_to_hub: bool = False
    """Upload the trained model to `hub_model_id` when training ends."""
    hub_model_id: str | None = None
    hub_private_repo: bool | None = None


@dataclass
class _ModelTrainingConfig(TrainingConfig):
    """Of trainers that train one model, in transformers' spelling of its settings too."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Its path is the trainer's argument `model`, if that is given."""
    layout: str = "auto"
    """TPxPPxDP, such as 2x1x4; "auto": what fits the model, most of it data parallel."""
    lr_scheduler_type: str = "linear"
    adam_beta2: float = number(0.999, least=0, below=1)

    bf16: InitVar[bool | None] = None
    """True: `model.dtype` is "bfloat16"; False: "float32"."""
    gradient_checkpointing: InitVar[bool | None] = None
    """True: `model.recompute` is "full"; False: None."""
    model_init_kwargs: InitVar[dict | None] = None
    """Of from_pretrained's arguments: `dtype` (or `torch_dtype`) and `revision`."""
    warmup_ratio: InitVar[float | None] = None
    """`warmup_steps` below 1."""
    revision: str | None = None
    """Of a model at the hub."""

    def __post_init__(self, bf16, gradient_checkpointing, model_init_kwargs, warmup_ratio):
        """
        Raises:
            ConfigError: for an unknown entry of `model_init_kwargs`.
        """
        kwargs = dict(model_init_kwargs or {})
        self.revision = kwargs.pop("revision", self.revision)
        settings: dict[str, Any] = {}
        if bf16 is not None:
            settings["dtype"] = "bfloat16" if bf16 else "float32"
        if gradient_checkpointing is not None:
            settings["recompute"] = "full" if gradient_checkpointing else None
        for name in ("dtype", "torch_dtype"):
            if name in kwargs:
                settings["dtype"] = str(kwargs.pop(name)).removeprefix("torch.")
        for name, value in kwargs.items():
            raise ConfigError(
                f"model_init_kwargs.{name}={value}: choose from dtype, torch_dtype, revision"
            )
        self.model = replace(self.model, **settings)
        if warmup_ratio is not None:
            self.warmup_steps = warmup_ratio
        # transformers' word for what 0 is here
        self.eval_steps, self.save_steps = self.eval_steps or 0, self.save_steps or 0


@dataclass
class _OfflineConfig(_ModelTrainingConfig):
    """Of trainers that learn from what the dataset has, without sampling."""

    train: str | None = None
    """Dataset of a trainer that is given none: a path or a name, as `data.train`."""
    batch_size: int | None = number(None, least=1)
    """Rows of the dataset in an optimizer step; None: per_device_train_batch_size x data parallel
    ranks x gradient_accumulation_steps."""
    max_length: int | None = number(1024, least=1)
    """Tokens of a sequence at most, what exceeds it is cut off; None: the model's context."""
    shuffle_dataset: bool = True
    deadline_seconds: float = number(1800.0, above=0, most=LONGEST_WAIT)
    """Longest wait for another rank before the run stops with the reason."""


@accepts(OF_TRAINING | OF_SFT)
@dataclass
class SFTConfig(_OfflineConfig):
    """Supervised fine-tuning."""

    learning_rate: float = number(2e-5, above=0, most=1)
    completion_only_loss: bool | None = None
    """No loss on prompts; None: where the dataset has prompts and completions."""
    assistant_only_loss: bool = False
    """Loss only on what the chat template marks as the assistant's."""
    packing: bool = False
    """Join sequences to rows of `max_length`; they do not attend to one another."""
    dataset_text_field: str = "text"


@accepts(OF_TRAINING | OF_DPO)
@dataclass
class DPOConfig(_OfflineConfig):
    """Direct preference optimisation. A batch's rows are pairs: two sequences each."""

    beta: float = number(0.1, above=0)
    label_smoothing: float = number(0.0, least=0, below=0.5)
    """The probability that a pair is the wrong way round."""


@dataclass
class GroupConfig(ObjectiveConfig):
    """What trainers have that compare samples of a group: sampling, and how samples are used."""

    num_prompts_per_step: int | None = number(None, least=1)
    """Prompts of an optimizer step. With `num_generations` samples each they are
    per_device_train_batch_size x data parallel ranks x gradient_accumulation_steps sequences; None:
    what these make."""
    num_generations: int = number(8, least=2)
    """Completions sampled for each prompt."""
    max_completion_length: int = number(256, least=1)
    temperature: float = number(1.0, above=0)
    top_p: float = number(1.0, above=0, most=1)
    """Below 1 (or top_k above 0, or min_p) the engine's log-probabilities are those of the tokens
    left in, and `sampling/*` shows them apart from the trainer's, which are over all tokens."""
    top_k: int = number(0, least=0)
    min_p: float | None = number(None, least=0, most=1)
    repetition_penalty: float = number(1.0, above=0)
    stop: list[str] | None = None
    """Texts that end a completion; it holds the tokens that spell them, and is finished."""
    bad_words: list[str] | None = None
    """Texts that are never sampled."""
    structured_outputs: Any = None
    """What completions have to obey, as a dictionary of what vLLM's StructuredOutputsParams takes:
    one of json (a schema), regex, choice (a list of texts) and grammar. With it, or bad_words, the
    engine's log-probabilities are those of the tokens left in."""
    steps_per_generation: int | None = number(None, least=1)
    """Micro-batches made of one generation's samples; None: gradient_accumulation_steps."""
    generation_batch_size: int | None = number(None, least=1)
    """Or else the samples of a generation, over all data parallel ranks."""
    num_iterations: int = number(1, least=1)
    """How often each generation's samples are used."""
    shuffle_dataset: bool = True

    use_dynamic_sampling: bool = False
    """Replace groups whose rewards are all the same by further prompts' (arXiv:2503.14476)."""
    dynamic_sampling_max_gen_batches: int = number(10, least=1)
    """Generations tried for a batch at most; what is lacking then are groups without spread."""

    sync_ref_model: bool = False
    """Move the reference model towards the policy (TR-DPO, arXiv:2404.09656)."""
    ref_model_mixup_alpha: float = number(0.6, least=0, most=1)
    """The policy's share in reference <- alpha * policy + (1 - alpha) * reference."""
    ref_model_sync_steps: int = number(512, least=1)

    reward_timeout: float | None = number(None, above=0, most=LONGEST_WAIT)
    """Seconds each reward function may take for a step's samples; None: any time."""
    log_completions: Any = number(4, least=0)
    """Completions a step written to completions.jsonl; true: all."""


@dataclass
class TeachingConfig:
    """What only TeacherGRPOTrainer uses; GRPOConfig has it too, as in ATLAS."""

    baseline_samples: int = number(1, least=1)
    """Unaided answers averaged for each question (sampled ones, if above 1)."""
    max_probe_tokens: int = number(500, least=1)
    max_answer_tokens: int | None = number(None, least=1)
    """Tokens of one answer of the student; None: max_completion_length."""
    student_temperature: float = number(0.0, least=0)
    degradation_penalty_multiplier: float = number(2.0, least=0)
    efficiency_weight: float = number(1.0, least=0)
    formula: str = choice("seed", FORMULAS)
    """Of AdaptiveTeachingReward: "seed", "rcl" or "docs"."""
    answer_match: str = choice("text", ANSWER_MATCHES)
    """A solution is right where it is the ground truth as "text", or as mathematics: "math"."""
    extraction: str = choice("strict", EXTRACTIONS)
    """An answer's solution is what its <solution> tags hold ("strict"), or also what a box holds,
    and of what the tags hold the answer alone ("lenient")."""
    gain_per_token: bool = True
    """LikelihoodGainReward is a mean over the reference's tokens; False: the sum over them."""
    gain_clip: float | None = number(None, above=0)
    """It is kept within -gain_clip and gain_clip; None: as it is."""
    disable_student_offloading: bool = False
    """Keep the student's engine in GPU memory while a colocated teacher works."""
    templates: TemplatesConfig = field(default_factory=TemplatesConfig)


@accepts(OF_TRAINING | OF_GRPO)
@dataclass
class GRPOConfig(_ModelTrainingConfig, GroupConfig, TeachingConfig):
    """Group relative policy optimisation on a reward."""

    max_completion_length: int = number(512, least=1)
    max_prompt_length: int | None = number(None, least=1)
    """Tokens of a prompt at most; None: any number the model has room for."""
    max_sequence_length: int | None = number(None, least=1)
    """Tokens of prompt and completion together at most; completions are cut off there."""
    overlong: str = choice("error", OVERLONG)
    """A prompt too long: "error" names the row, "drop" leaves it out."""
    num_generations_eval: int | None = number(None, least=1)
    """Completions of each prompt in evaluations; None: num_generations."""
    chat_template_kwargs: dict | None = None
    max_tool_calling_iterations: int | None = number(None, least=1)
    """How often tools or an environment answer in a conversation at most; None: any number."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    use_vllm: InitVar[bool] = True
    vllm_mode: InitVar[str] = "colocate"
    vllm_gpu_memory_utilization: InitVar[float | None] = None
    """`rollout.gpu_memory_utilization`."""
    vllm_tensor_parallel_size: InitVar[int | None] = None
    """`rollout.policy_tensor_parallel`."""
    vllm_max_model_length: InitVar[int | None] = None
    """`max_sequence_length`."""
    vllm_structured_outputs_regex: InitVar[str | None] = None
    """`structured_outputs.regex`."""
    generation_kwargs: InitVar[dict | None] = None
    """Further values for temperature, top_p, top_k, min_p, repetition_penalty, stop, bad_words and
    structured_outputs, which go before their own."""
    num_completions_to_print: InitVar[int | None] = None
    """`log_completions`."""

    def __post_init__(
        self,
        bf16,
        gradient_checkpointing,
        model_init_kwargs,
        warmup_ratio,
        use_vllm,
        vllm_mode,
        vllm_gpu_memory_utilization,
        vllm_tensor_parallel_size,
        vllm_max_model_length,
        vllm_structured_outputs_regex,
        generation_kwargs,
        num_completions_to_print,
    ):
        """
        Raises:
            ConfigError: for rollouts by transformers or by TRL's servers, or an unknown entry of
                `generation_kwargs`.
        """
        super().__post_init__(bf16, gradient_checkpointing, model_init_kwargs, warmup_ratio)
        if not use_vllm:
            raise ConfigError("use_vllm=False: completions are sampled by vLLM only; leave it out")
        if vllm_mode != "colocate":
            raise ConfigError(
                f"vllm_mode={vllm_mode}: choose colocate; for vLLM servers, which are not TRL's, "
                "set rollout.engine=server and rollout.policy_servers"
            )
        settings = {
            "gpu_memory_utilization": vllm_gpu_memory_utilization,
            "policy_tensor_parallel": vllm_tensor_parallel_size,
        }
        given = {name: value for name, value in settings.items() if value is not None}
        self.rollout = replace(self.rollout, **given)
        if vllm_max_model_length is not None:
            self.max_sequence_length = vllm_max_model_length
        if vllm_structured_outputs_regex is not None:
            self.structured_outputs = {"regex": vllm_structured_outputs_regex}
        for name, value in (generation_kwargs or {}).items():
            if name not in SAMPLING_OPTIONS:
                raise ConfigError(
                    f"generation_kwargs.{name}={value}: choose from {', '.join(SAMPLING_OPTIONS)}"
                )
            setattr(self, name, value)
        if num_completions_to_print is not None:
            self.log_completions = num_completions_to_print
        self.top_k = self.top_k or 0
        if isinstance(self.scale_rewards, bool):  # as TRL had it first
            self.scale_rewards = "group" if self.scale_rewards else "none"


@dataclass
class TeacherGRPOConfig(TrainingConfig, GroupConfig, TeachingConfig):
    """Adaptive teaching: GRPO trains a teacher on how much its guidance helps a frozen student."""

    teacher: ModelConfig = field(default_factory=ModelConfig)
    student: ModelConfig = field(default_factory=ModelConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    num_prompts_per_step: int | None = number(16, least=1)
    rewards: list[str] = field(default_factory=lambda: ["adaptive"])
    """Where the trainer is given no `reward_funcs`: "adaptive" (AdaptiveTeachingReward),
    "likelihood_gain" (LikelihoodGainReward), "rim" (RIMReward), "leak_penalty" (-1 where a teaching
    gives the answer away) or "package.module:function", weighed by `reward_weights`."""
    reward_system: RewardSystemConfig = field(default_factory=RewardSystemConfig)
    """Of "rim"."""
    judge: JudgeServerConfig = field(default_factory=JudgeServerConfig)

    # As in ATLAS, which corrects neither.
    use_bias_correction_kl: bool = False
    vllm_importance_sampling_correction: bool = False

    prepare: str | None = None
    """"package.module:function", called with this configuration before the job: makes the
    models and data the experiment names, where they are missing."""


def trained_section(config: TrainingConfig) -> str:
    """The section of the model that is trained."""
    return "teacher" if hasattr(config, "teacher") else "model"


def trained_model(config: TrainingConfig) -> ModelConfig:
    return getattr(config, trained_section(config))
