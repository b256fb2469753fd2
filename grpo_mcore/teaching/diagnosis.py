"""What a student can do, from three kinds of evidence: how far its sampled probes agree, how likely
it finds them itself, and what grades the teacher gives them.

docs/teaching.md says how each field of a DiagnosticResult comes about.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

LOW, HIGH = 0.3, 0.7
"""Levels between which, both included, a student is given hints."""
GRADES = (1, 2, 3, 4, 5)
MOST_GAPS = 4
GRADE = "[1-5]"
REPORT = rf"5|[1-4](\n- [^\n]{{3,80}}){{1,{MOST_GAPS}}}"
"""What a grade of the teacher has to be, and its report: a grade, and below the best one a gap a
line."""
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")
"""A word, a sign, or a character of the scripts that set no blanks between words."""


@dataclass(frozen=True)
class DiagnosticResult:
    """A student's capability on one task.

    Attributes:
        capability_level: 0 to 1, `capability` of the three metrics in `response_quality`.
        confidence_score: 0 to 1, how closely the teacher's grades lie together.
        identified_gaps: what the student lacks, in the teacher's words; [] where it finds nothing.
        response_quality: `agreement`, `likelihood` and `grade`, each 0 to 1.
        probe_tokens: sampled in all probes together.
        approach: the probe that is most like all others.
        probes: the texts of all.
    """

    capability_level: float
    confidence_score: float = 1.0
    identified_gaps: list[str] = field(default_factory=list)
    response_quality: dict[str, float] = field(default_factory=dict)
    probe_tokens: int = 0
    approach: str = ""
    probes: list[str] = field(default_factory=list)

    @property
    def guidance_form(self) -> str:
        """Which template guidance follows: "walkthrough" below 0.3, "verification" above 0.7,
        "hints" between, at 0.3 and at 0.7."""
        if self.capability_level < LOW:
            return "walkthrough"
        return "verification" if self.capability_level > HIGH else "hints"


@dataclass(frozen=True)
class Grading:
    """Grades the teacher was seen to give one probe, with their probabilities, which need not add
    up to 1: it was not seen to give all."""

    probabilities: dict[int, float]

    def moment(self, power: int) -> float:
        """The mean of level ** power, level being the grade brought to 0 to 1."""
        total = sum(self.probabilities.values())
        return sum(p * level(grade) ** power for grade, p in self.probabilities.items()) / total


def level(grade: int) -> float:
    """A grade brought to 0 to 1."""
    return (grade - GRADES[0]) / (GRADES[-1] - GRADES[0])


def diagnose(
    texts: Sequence[str],
    log_probs: Sequence[Sequence[float]],
    gradings: Sequence[Grading],
    gaps: Sequence[str],
) -> DiagnosticResult:
    """The result of several probes: their texts, their tokens' log-probabilities, and how the
    teacher grades each."""
    grade = fmean(g.moment(1) for g in gradings)
    quality = {
        "agreement": agreement(texts),
        "likelihood": likelihood(log_probs),
        "grade": grade,
    }
    variance = max(0.0, fmean(g.moment(2) for g in gradings) - grade**2)
    return DiagnosticResult(
        capability(**quality),
        1 - 2 * math.sqrt(variance),  # no values in 0 to 1 have a deviation above 1/2
        list(gaps),
        quality,
        sum(map(len, log_probs)),
        typical(texts),
        list(texts),
    )


def capability(agreement: float, likelihood: float, grade: float) -> float:
    """The geometric mean of the student's own evidence and the teacher's, of equal weight: who is
    sure of a plan that the teacher rejects is as weak as who is unsure of a good one.
    (Opinions pooled by their logarithms: Genest and Zidek 1986, Statistical Science 1.)"""
    return grade**0.5 * agreement**0.25 * likelihood**0.25


def agreement(texts: Sequence[str]) -> float:
    """The mean similarity over all pairs of two or more texts: 1 where all say the same. (Lexical
    similarity of samples as a measure of certainty: Fomicheva et al. 2020, arXiv:2005.10608.)"""
    return fmean(
        similarity(text, other)
        for number, text in enumerate(texts)
        for other in texts[number + 1 :]
    )


def likelihood(log_probs: Sequence[Sequence[float]]) -> float:
    """The geometric mean of the probabilities of each text's tokens, averaged over texts: long ones
    are not less likely for their length. (Malinin and Gales 2021, arXiv:2002.07650.)"""
    return fmean(math.exp(fmean(tokens)) for tokens in log_probs)


def typical(texts: Sequence[str]) -> str:
    """The text most similar to all; of equals the first."""
    return max(texts, key=lambda text: sum(similarity(text, other) for other in texts))


def similarity(text: str, other: str) -> float:
    """ROUGE-L: the F1 of the longest common subsequence of words (Lin 2004, "ROUGE: A Package for
    Automatic Evaluation of Summaries"). 0 where there are no words."""
    words, others = _WORD.findall(text.lower()), _WORD.findall(other.lower())
    if not words or not others:
        return 0.0
    lengths = [0] * (len(others) + 1)
    for word in words:
        diagonal = 0
        for place, candidate in enumerate(others, start=1):
            above = lengths[place]
            longer = diagonal + 1 if word == candidate else max(above, lengths[place - 1])
            diagonal, lengths[place] = above, longer
    return 2 * lengths[-1] / (len(words) + len(others))


def read_gaps(report: str, is_whole: bool) -> list[str]:
    """The gaps of a report that obeys REPORT. Of one that was cut off, the last counts only where
    there is no other."""
    gaps = [line[2:].strip() for line in report.split("\n")[1:] if line.startswith("- ")]
    return [gap for gap in (gaps if is_whole or len(gaps) < 2 else gaps[:-1]) if gap]
