"""The settings of RIMReward: its judges, the models that judge, and when the large one is asked."""

from dataclasses import dataclass, field

from grpo_mcore.config.bounds import LONGEST_WAIT, choice, number, numbers

JUDGES = ("accuracy", "helpfulness", "process", "diagnostic")
FIELDS = ("question", "ground_truth", "plan", "baseline", "teaching", "answer")
"""What a judge's prompt may hold, in braces."""

_CASE = """

<question>
{question}
</question>
<reference_answer>
{ground_truth}
</reference_answer>
<student_plan>
{plan}
</student_plan>
<answer_before>
{baseline}
</answer_before>
<teaching>
{teaching}
</teaching>
<answer_after>
{answer}
</answer_after>"""
ACCURACY = (
    "Judge how right the student's answer is after the teaching. Compare its final result with the "
    "reference answer, which is right; other notations of the same value are right too. 1 is "
    "right, 0 is wrong or missing; in between only where parts of several results are right."
    + _CASE
)
HELPFULNESS = (
    "Judge how much the teaching helped: compare the answers before and after. 1 is a wrong answer "
    "made right, or a right one made plainly clearer; 0.5 is no difference; 0 is a right answer "
    "made wrong, or teaching that misleads. Teaching that gives the result away instead of leading "
    "to it is worth 0.3 at most." + _CASE
)
PROCESS = (
    "Judge the student's reasoning after the teaching, step by step: does each step follow, are "
    "they complete, and do they lead to the stated result? 1 is sound throughout, 0 is no "
    "reasoning or a broken one. A right result without reasons is worth 0.3 at most." + _CASE
)
DIAGNOSTIC = (
    "Judge whether the teaching meets what this student needs. The plan and the answer before show "
    "what the student can and cannot do. 1 is teaching that names the real gap and is as long as "
    "the gap deserves; 0 is teaching that misses it, explains what was understood, or could have "
    "been written without reading the plan." + _CASE
)


@dataclass
class JudgeConfig:
    enabled: bool = True
    weight: float = number(1.0, above=0)
    """In the mean over the judges that have given a score."""
    prompt: str = ""
    """What the judge is asked. {question}, {ground_truth}, {plan} and {baseline} (the student's
    before teaching), {teaching} and {answer} (the student's after) are replaced; other braces are
    left alone."""


@dataclass
class JudgesConfig:
    accuracy: JudgeConfig = field(default_factory=lambda: JudgeConfig(prompt=ACCURACY))
    helpfulness: JudgeConfig = field(default_factory=lambda: JudgeConfig(prompt=HELPFULNESS))
    process: JudgeConfig = field(default_factory=lambda: JudgeConfig(prompt=PROCESS))
    diagnostic: JudgeConfig = field(default_factory=lambda: JudgeConfig(prompt=DIAGNOSTIC))


@dataclass
class JudgeModelConfig:
    """A model behind an OpenAI-compatible endpoint."""

    base_url: str | None = None
    """Such as http://host:8000/v1. None: where the small model is; of that one: the run's own
    judge (`judge.path`)."""
    model: str | None = None
    """The endpoint's name of it; None: the first that the endpoint lists, or of a large model
    without a base_url the small one."""
    api_key_env: str | None = None
    """The environment variable that holds the endpoint's key; None: it asks for none."""
    max_tokens: int = number(1024, least=1)
    """Of one verdict."""
    structured_outputs: bool = True
    """Send the verdict's JSON schema as `response_format`. Verdicts are checked in any case."""


@dataclass
class ConsistencyConfig:
    """What scores of different judges may not say of the same teaching; null leaves a rule out. A
    rule counts where both of its judges have given a score."""

    process_above_accuracy: float | None = number(0.1, least=0, most=1)
    """The process score is at most the accuracy score plus this."""
    weak_process: float | None = number(0.5, least=0, most=1)
    """Where the process score is below this, helpfulness is at most `weak_process_helpfulness`."""
    weak_process_helpfulness: float = number(0.5, least=0, most=1)
    helpfulness_above_diagnostic: float | None = number(0.1, least=0, most=1)
    """The helpfulness score is at most the diagnostic score plus this."""


@dataclass
class RewardSystemConfig:
    """RIMReward: several judges of each teaching, in two tiers."""

    judges: JudgesConfig = field(default_factory=JudgesConfig)
    small: JudgeModelConfig = field(default_factory=JudgeModelConfig)
    """The first tier: asked once for each temperature; the most certain verdict counts."""
    large: JudgeModelConfig = field(default_factory=JudgeModelConfig)
    """The second tier: shown all verdicts of the first, where these disagree or are unsure."""
    temperatures: list[float] = numbers([0.2, 0.5, 0.8], least=0, most=2)
    """Of the small model's verdicts."""
    large_temperature: float = number(0.3, least=0, most=2)
    variance_threshold: float = number(0.15, least=0, most=1)
    """The large model is asked where the standard deviation of the scores (over n, whatever the
    name, which is ATLAS's) is above this,"""
    uncertainty_threshold: float = number(0.3, least=0, most=1)
    """or the highest uncertainty above this, or no verdict is valid."""
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    max_workers: int = number(8, least=1)
    """Requests under way at once, over all samples, judges and temperatures."""
    timeout: float = number(60.0, above=0, most=LONGEST_WAIT)
    """Seconds for one attempt at a request; all attempts and the pauses between them together have
    (max_retries + 1) times as many."""
    max_retries: int = number(2, least=0)
    """Further attempts after a broken connection, a timeout, or status 408, 409, 429 or 5xx."""
    cache: str | None = None
    """SQLite file of verdicts, by all that the request says, so not by the URL; several runs may
    share it."""


@dataclass
class JudgeServerConfig:
    """The run's own judge: a model that it serves to RIMReward with vLLM. With separate roles it
    has `tensor_parallel` ranks of its own, the last; on a CPU colocated roles may have one too."""

    path: str | None = None
    """A directory with a model that vLLM knows and a tokenizer with a chat template; None: none."""
    dtype: str = choice("auto", ("auto", "float32", "bfloat16", "float16"))
    """vLLM's --dtype; "auto": the model's own."""
    tensor_parallel: int = number(1, least=1)
    max_model_len: int | None = number(None, least=1)
    """Tokens of a prompt and its verdict at most; None: the model's own context."""
