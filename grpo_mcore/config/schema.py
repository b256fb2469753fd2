"""Every setting, its default and its meaning. Field names are TRL's where TRL has the setting."""

from dataclasses import dataclass, field

from grpo_mcore.config.objective import ObjectiveConfig


@dataclass
class ModelConfig:
    """A model in a Hugging Face directory (config.json and safetensors, sharded or not)."""

    path: str = "???"
    dtype: str = "float32"
    """"float32" or "bfloat16"; of weights in training and in the engine."""
    layers: str = "auto"
    """"transformer_engine" (a GPU), "local" (Megatron's own) or "auto": the first on a GPU."""
    fp8: str | None = None
    """FP8 recipe of the training layers ("delayed", "tensorwise", "blockwise", "mxfp8"); GPU."""
    fp8_param: bool = False
    """Hold the layers' matrices in FP8 too; needs distributed_optimizer."""
    bf16_layers_at_start: int = 0
    """First layers that compute in bfloat16 all the same."""
    bf16_layers_at_end: int = 0
    """Last layers that do."""
    sequence_parallel: bool = False
    """Megatron's sequence parallelism over the tensor parallel ranks."""
    expert_parallel: int = 1
    """Ranks that each hold a part of the experts; divides the layout's data parallel size."""
    virtual_pipeline: int = 1
    """Parts of the model each pipeline stage holds (the interleaved schedule, if above 1)."""
    recompute: str | None = None
    """Recompute activations in the backward pass: "full" (one layer at a time) or "selective"
    (of attention, what lies between its projections)."""


@dataclass
class LoraConfig:
    """Low-rank adapters, in PEFT's words."""

    r: int = 8
    """Rank."""
    lora_alpha: float = 8
    """What adapters add is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Of what adapters are given, in training."""
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj; or all-linear."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    path: str | None = None
    """Directory of an adapter in PEFT's format to go on from, with options of its own."""


@dataclass
class LayoutConfig:
    """Who runs where. Layouts are "TPxPPxDP"."""

    placement: str = "auto"
    """"separate" (disjoint ranks), "colocated" (both roles on all ranks), or "auto"."""
    teacher: str = "auto"
    student: str = "auto"


@dataclass
class DataConfig:
    """Questions and answers."""

    train: str = "???"
    """A .jsonl, .json or .parquet path, or the name of a dataset for datasets.load_dataset."""
    eval: str | None = None
    """Held-out set of the same kind; None: no evaluation."""
    subset: str | None = None
    """Second argument of load_dataset, such as "main" for openai/gsm8k."""
    train_split: str = "train"
    eval_split: str = "test"
    question_column: str = "question"
    answer_column: str = "answer"
    """The final answer as text; of "... #### 42" only what follows the mark counts."""
    eval_size: int = 0
    """Use only the first so many held-out rows; 0: all."""
    overlong: str = "error"
    """A question too long for a model: "error" names the row, "drop" drops and counts."""


@dataclass
class TemplatesConfig:
    """Prompts, in the words of the ATLAS documents. Fields in braces are replaced by name; other
    braces are left alone."""

    baseline: str = (
        "{question}\n\nSolve this step by step and put your final answer inside "
        "<solution> and </solution>."
    )
    diagnostic: str = (
        "{question}\n\nBefore solving, name the kind of problem, the key steps you would take and "
        "what could go wrong. Be brief and do not solve it."
    )
    adaptive: str = (
        "A student is about to solve this problem:\n{question}\n\nThe student's plan:\n{approach}"
        "\n\nThink about what this student needs inside <thinking> and </thinking>. Then write "
        "guidance for the student inside <teaching> and </teaching>: short if the plan is right, "
        "step by step if it is wrong. Never state the answer."
    )
    with_teaching: str = (
        "{question}\n\nA teacher's guidance:\n{teaching}\n\nSolve this step by step, using the "
        "guidance, and put your final answer inside <solution> and </solution>."
    )


@dataclass
class RolloutConfig:
    """The vLLM engines."""

    teacher_engines: int = 0
    """Engines of the teacher; 0: one on CPU, one for every `teacher_tensor_parallel` GPUs."""
    student_engines: int = 0
    teacher_tensor_parallel: int = 1
    """Tensor parallel size of each engine, independent of the training layout."""
    student_tensor_parallel: int = 1
    gpu_memory_utilization: float = 0.5
    kv_cache_gib: float = 0.25
    """Key-value cache of each engine on CPU."""
    max_num_seqs: int = 256
    """Requests an engine works on at once."""
    bucket_megabytes: int = 256
    """Weights move to the engines in buckets of at most this size (or one tensor)."""
    deadline_seconds: float = 1800.0
    """Longest wait for an engine or for another rank before the run stops with the reason."""


@dataclass
class TrainingConfig:
    """What every trainer has: the optimizer, its schedule, and where results go."""

    output_dir: str = "outputs"
    seed: int = 42
    max_steps: int = 100
    learning_rate: float = 1e-6
    min_learning_rate: float = 0.0
    lr_scheduler_type: str = "constant"
    """"constant", "linear" or "cosine", from learning_rate down to min_learning_rate."""
    warmup_steps: int = 0
    stable_steps: int = 0
    """Steps at full rate before "linear" or "cosine" decay begins (counted after warm-up)."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    distributed_optimizer: bool = False
    """Megatron's distributed optimizer: states sharded over data parallel ranks."""
    optimizer_offload_fraction: float = 0.0
    """Share of the optimizer's states and work kept on the CPU; needs distributed_optimizer."""
    per_device_train_batch_size: int = 8
    """Sequences in a micro-batch of one data parallel rank."""
    max_tokens_per_micro_batch: int | None = None
    """Tokens of a micro-batch at most, padding included; sequences of similar length go together,
    balanced over data parallel ranks. None: per_device_train_batch_size sequences."""


@dataclass
class SFTConfig(TrainingConfig):
    """Supervised fine-tuning on (prompt, completion) rows; loss on the completion."""

    model: ModelConfig = field(default_factory=ModelConfig)
    layout: str = "1x1x1"
    """TPxPPxDP."""
    train: str = "???"
    """JSONL of {"prompt", "completion"} rows, taken in order and from the start again."""
    batch_size: int = 64
    learning_rate: float = 2e-5


@dataclass
class TeacherGRPOConfig(TrainingConfig, ObjectiveConfig):
    """Adaptive teaching: GRPO trains a teacher on how much its guidance helps a frozen student."""

    teacher: ModelConfig = field(default_factory=ModelConfig)
    student: ModelConfig = field(default_factory=ModelConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    templates: TemplatesConfig = field(default_factory=TemplatesConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    num_prompts_per_step: int = 16
    num_generations: int = 8
    """Guidances sampled for each question."""
    baseline_samples: int = 1
    """Unaided answers averaged for each question (sampled ones, if above 1)."""
    max_completion_length: int = 256
    """Tokens of one guidance."""
    max_probe_tokens: int = 500
    max_answer_tokens: int = 256
    """Tokens of one answer of the student."""
    temperature: float = 1.0
    top_p: float = 1.0
    """Below 1 (or top_k above 0) the engine's log-probabilities are those of the tokens left in,
    and `sampling/*` shows them apart from the trainer's, which are over all tokens."""
    top_k: int = 0
    student_temperature: float = 0.0

    # As in ATLAS, which corrects neither.
    use_bias_correction_kl: bool = False
    vllm_importance_sampling_correction: bool = False

    reward_timeout: float | None = None
    """Seconds each reward function may take for a step's samples; None: any time."""
    degradation_penalty_multiplier: float = 2.0
    efficiency_weight: float = 1.0

    disable_student_offloading: bool = False
    """Keep the student's engine in GPU memory while a colocated teacher works."""

    eval_steps: int = 0
    """Evaluate every so many steps; 0: before the first and after the last only."""
    save_steps: int = 0
    """Checkpoint every so many steps; 0: after the last only."""
    async_save: bool = False
    """Write checkpoints beside the next steps, from a copy in host memory. One takes effect in a
    later step, when every rank has written its part; a run that fails before then loses it."""
    save_total_limit: int | None = None
    """As in transformers: checkpoints kept, the oldest go first. The best is among them and never
    goes; so with 1 there are two where the best is not the newest. None: all."""
    metric_for_best_model: str | None = None
    """A metric as metrics.jsonl names it. The checkpoint after whose step it was best (measured at
    that step) is kept, and named in checkpoints/best_checkpointed_iteration.txt."""
    greater_is_better: bool = True
    resume: str | None = None
    """"auto": go on from the newest valid checkpoint in output_dir, if there is one. A path, to a
    folder of checkpoints or to one of them: from that one only. The layout may be another."""
    log_completions: int = 4
    """Guidances a step written to completions.jsonl."""
    prepare: str | None = None
    """"package.module:function", called with this configuration before the job: makes the
    models and data the experiment names, where they are missing."""
