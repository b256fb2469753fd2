"""The sections of a configuration: models, layouts, data, templates, engines."""

from dataclasses import dataclass, field

from grpo_mcore.config.bounds import LONGEST_WAIT, choice, number

DTYPES = ("float32", "bfloat16")
LAYERS = ("auto", "transformer_engine", "local")
FP8_RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
OVERLONG = ("error", "drop")


@dataclass
class ModelConfig:
    """A model in a Hugging Face directory (config.json and safetensors, sharded or not)."""

    path: str = "???"
    dtype: str = choice("float32", DTYPES)
    """"float32" or "bfloat16"; of weights in training and in the engine."""
    layers: str = choice("auto", LAYERS)
    """"transformer_engine" (a GPU), "local" (Megatron's own) or "auto": the first on a GPU."""
    fp8: str | None = choice(None, FP8_RECIPES)
    """FP8 recipe of the training layers ("delayed", "tensorwise", "blockwise", "mxfp8"); GPU."""
    fp8_param: bool = False
    """Hold the layers' matrices in FP8 too; needs distributed_optimizer."""
    bf16_layers_at_start: int = number(0, least=0)
    """First layers that compute in bfloat16 all the same."""
    bf16_layers_at_end: int = number(0, least=0)
    """Last layers that do."""
    sequence_parallel: bool = False
    """Megatron's sequence parallelism over the tensor parallel ranks."""
    expert_parallel: int = number(1, least=1)
    """Ranks that each hold a part of the experts; divides the layout's data parallel size."""
    virtual_pipeline: int = number(1, least=1)
    """Parts of the model each pipeline stage holds (the interleaved schedule, if above 1)."""
    recompute: str | None = choice(None, ("full", "selective"))
    """Recompute activations in the backward pass: "full" (one layer at a time) or "selective"
    (of attention, what lies between its projections)."""


@dataclass
class LoraConfig:
    """Low-rank adapters, in PEFT's words."""

    r: int = number(8, least=1)
    """Rank."""
    lora_alpha: float = number(8, above=0)
    """What adapters add is scaled by lora_alpha / r."""
    lora_dropout: float = number(0.0, least=0, below=1)
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

    placement: str = choice("auto", ("auto", "separate", "colocated"))
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
    reference_column: str | None = None
    """A worked answer as text, for LikelihoodGainReward; None: the final answer, in
    `templates.reference`. A row may have none."""
    eval_size: int = number(0, least=0)
    """Use only the first so many held-out rows; 0: all."""
    overlong: str = choice("error", OVERLONG)
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
    grading: str = (
        "A student is about to solve this problem:\n{question}\n\nThe student's plan:\n"
        "{approach}\n\nGrade the plan from 1 (leads nowhere) to 5 (leads to the right answer "
        "and lacks nothing). Write the grade alone on the first line. Below 5, write under it what "
        "the student does not know or overlooks: one gap a line, each line beginning with '- '."
    )
    """What the teacher grades an approach by; its answer is held to this form."""
    walkthrough: str = (
        "A student is about to solve this problem:\n{question}\n\nThe student's plan:\n"
        "{approach}\n\nWhat the student lacks:\n{gaps}\n\nThis student cannot solve the problem "
        "alone. Inside <teaching> and </teaching> go through the solution step by step and give "
        "the reason for each step; leave only the last one to the student. Never state the answer."
    )
    """Guidance for a capability below 0.3."""
    hints: str = (
        "A student is about to solve this problem:\n{question}\n\nThe student's plan:\n"
        "{approach}\n\nWhat the student lacks:\n{gaps}\n\nThis student is on the way. Inside "
        "<teaching> and </teaching> give two or three hints that lead on from the plan, and do no "
        "step for the student. Never state the answer."
    )
    """From 0.3 to 0.7."""
    verification: str = (
        "A student is about to solve this problem:\n{question}\n\nThe student's plan:\n"
        "{approach}\n\nThis student can solve the problem. Inside <teaching> and </teaching> "
        "confirm the plan in a sentence, and name one thing to check at the end. Never state the "
        "answer."
    )
    """Above 0.7."""
    reference: str = "<solution>{answer}</solution>"
    """The right answer as the student would write it, whose likelihood teaching is to raise."""


@dataclass
class RolloutConfig:
    """The vLLM engines."""

    engine: str = choice("local", ("local", "server"))
    """"local": child processes of the ranks, on their devices. "server": vLLM servers that run
    elsewhere (examples/serve_engine.sh), one URL for each engine of a role in `*_servers`."""
    policy_servers: list[str] = field(default_factory=list)
    teacher_servers: list[str] = field(default_factory=list)
    student_servers: list[str] = field(default_factory=list)
    server_transport: str = choice("http", ("http",))
    """How weights go to servers. (An NCCL broadcast that one side leaves would hang the other.)"""
    policy_engines: int = number(0, least=0)
    """Engines of GRPO's policy; 0: one on CPU, one for every `policy_tensor_parallel` GPUs."""
    policy_tensor_parallel: int = number(1, least=1)
    """Tensor parallel size of each engine, independent of the training layout."""
    teacher_engines: int = number(0, least=0)
    teacher_tensor_parallel: int = number(1, least=1)
    student_engines: int = number(0, least=0)
    student_tensor_parallel: int = number(1, least=1)
    gpu_memory_utilization: float = number(0.5, above=0, most=1)
    kv_cache_gib: float = number(0.25, above=0)
    """Key-value cache of each engine on CPU."""
    max_num_seqs: int = number(256, least=1)
    """Requests an engine works on at once."""
    bucket_megabytes: int = number(256, least=1)
    """Weights move to the engines in buckets of at most this size (or one tensor)."""
    quantization: str | None = choice(None, ("fp8",))
    """"fp8": engines hold the weights in FP8, with a scale for each tensor, and are given them in
    bfloat16; GPU."""
    offload_policy: bool = False
    """Take gradients and optimizer off the device before the engines are given the weights, and the
    trainer's parameters while they generate; GPU."""
    max_engine_restarts: int = number(3, least=0)
    """An engine that fails is started again, given the weights, and asked for what it has not
    finished; after so many times without a completed generation, be it a `rollout_func`'s, the run
    saves and stops."""
    mismatch_warn: float | None = number(1.1, least=1)
    """Warn where `sampling/mismatch`, the mean of exp(|log p_trainer - log p_engine|), is above it.
    1.1 is a chosen bound, well above what rounding in bfloat16 gives; an FP8 engine, of which
    nothing was measured here, may need a higher one. A weight that was not synced, or a module that
    computes something else, gives more."""
    mismatch_stop: float | None = number(None, least=1)
    """Stop the run there."""
    lora_sync: str = choice("merged", ("merged", "adapters"))
    """What engines are sent when adapters are trained: "merged" (the layers that they change) or
    "adapters" (these alone, which vLLM computes with; more work at each token)."""
    deadline_seconds: float = number(1800.0, above=0, most=LONGEST_WAIT)
    """Longest wait for another rank, or silence of an engine, before that counts as a failure."""
    start_seconds: float | None = number(None, above=0, most=LONGEST_WAIT)
    """The engine's while it starts; None: deadline_seconds, which is the most that it can be."""
    generate_seconds: float | None = number(None, above=0, most=LONGEST_WAIT)
    """The engine's while it generates, which a local one speaks of every few seconds, and a server
    whenever it has finished a completion: for servers, more than the longest completion takes."""
    sync_seconds: float | None = number(None, above=0, most=LONGEST_WAIT)
    """The engine's while it is given weights, falls asleep or wakes."""
