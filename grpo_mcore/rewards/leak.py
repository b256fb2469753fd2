"""Whether a teaching gives the answer away, so that the student only has to copy it."""

import re
from collections.abc import Sequence
from fractions import Fraction

from grpo_mcore.data.text import last_boxed

_NUMBER = re.compile(
    r"(?<![\w.])-?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?"
    r"(?!\d|[.,/]\d|(?:st|nd|rd|th)\b)"
)
"""Not an ordinal; a unit may follow at once, as in 12km/h."""
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_STEP_NUMBER = re.compile(r"^[ \t]*\(?\d+[.):](?=\s)|\bstep\s+\d+", re.IGNORECASE | re.MULTILINE)
_QUANTITY = re.compile(rf"[$€£]?\s*({_NUMBER.pattern})(?:\s*%|(?:\s+[^\W\d_]+){{0,2}})")
_ANNOUNCED = re.compile(
    r"(?:answer|solution|result)\s*(?:is|:|=)\s*(.+?)(?=[.!?,;](?!\d)|\n|$)"
    r"|\\boxed\s*\{([^{}]+)\}|<solution>([^<]+)</solution>",
    re.IGNORECASE | re.DOTALL,
)
_TOKEN = re.compile(r"\w+|[^\w\s.,;:!?\"'`*$]")
_UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_VALUES = {word: number for number, word in enumerate(_UNITS)}
_VALUES |= {word: 10 * number for number, word in enumerate(_TENS, 2)}
_SMALL = rf"(?:(?:{'|'.join(_TENS)})(?:[\s-]+(?:{'|'.join(_UNITS[1:10])}))?|(?:{'|'.join(_UNITS)}))"
_HUNDREDS = rf"(?:{_SMALL}\s+hundred(?:\s+(?:and\s+)?{_SMALL})?|{_SMALL})"
_SPELLED = re.compile(
    rf"\b{_HUNDREDS}(?:\s+thousand(?:\s+(?:and\s+)?{_HUNDREDS})?)?\b", re.IGNORECASE
)
PROSE_NUMBERS = 10
"""Spelled numbers up to this one are taken for prose ("two ways")."""
MOST_DIGITS = 100
"""A text of digits without end is not read: Python refuses to make a number of thousands."""
PROSE_WORDS = {
    "all", "and", "any", "both", "down", "even", "false", "less", "more", "most", "neither",
    "never", "none", "not", "odd", "one", "same", "some", "the", "true", "yes",
}  # fmt: skip
"""Answers that ordinary prose has anyway, beside words of at most two letters."""


def leaks_answer(teaching: str, question: str, answer: str) -> bool:
    """Whether `teaching` holds the right answer. It does where it

    - announces it ("the answer is", "answer:", a box, <solution> tags), or
    - holds the number it is, however written (1,000 is 1000.0, forty-two is 42, 1/2 is 0.5), or
      else its words in their order, and the question does not.

    Not counted are numbers of steps ("1.", "step 2"), spelled numbers up to ten in the teaching,
    and, unless announced, answers such as yes, no and single letters, which any text has.
    """
    number, words = _number_of(answer), _words(answer)
    if not words:
        return False
    announced = [found[found.lastindex] for found in _ANNOUNCED.finditer(teaching)]
    for said in [*announced, last_boxed(teaching)]:
        if _words(said) == words or (number is not None and _number_of(said) == number):
            return True
    if number is not None:
        return number in numbers_in(teaching) - numbers_in(question, least_spelled=0)
    if len(words) == 1 and (len(words[0]) <= 2 or words[0] in PROSE_WORDS):
        return False
    return _holds(_words(teaching), words) and not _holds(_words(question), words)


def leak_penalty(
    teachings: Sequence[str], questions: Sequence[str], ground_truths: Sequence[str], **_
) -> list[float]:
    """-1.0 where a teaching gives the answer away, else 0.0: a reward beside others, with a weight
    of its own."""
    columns = zip(teachings, questions, ground_truths, strict=True)
    return [-float(leaks_answer(*sample)) for sample in columns]


def numbers_in(text: str, least_spelled: int = PROSE_NUMBERS + 1) -> set[Fraction]:
    """The values of all numbers in `text`, but for those of its steps and for spelled ones below
    `least_spelled`. A division that leaves no remainder is a calculation: its two numbers count,
    its value does not."""
    text = _FRACTION.sub(r" \1/\2 ", _STEP_NUMBER.sub(" ", text))
    values: set[Fraction] = set()
    for found in _NUMBER.finditer(text):
        value = _value(found[0])
        is_calculation = "/" in found[0] and (value is None or value.denominator == 1)
        parts = found[0].split("/") if is_calculation else [found[0]]
        values |= {number for part in parts if (number := _value(part)) is not None}
    spelled = {_value_of_words(found[0]) for found in _SPELLED.finditer(text)}
    return values | {Fraction(value) for value in spelled if value >= least_spelled}


def _number_of(answer: str) -> Fraction | None:
    """The number an answer is, units aside; None where it is something else."""
    answer = _FRACTION.sub(r"\1/\2", answer).strip().strip("$.").strip()
    if quantity := _QUANTITY.fullmatch(answer):
        return _value(quantity[1])
    if _SPELLED.fullmatch(answer):
        return Fraction(_value_of_words(answer))
    return None


def _value(digits: str) -> Fraction | None:
    """None for a division by zero, and for what is too long to be a number."""
    if len(digits) > MOST_DIGITS:
        return None
    numerator, _, denominator = re.sub(r"[,\s]", "", digits).partition("/")
    if denominator and not int(denominator):
        return None
    return Fraction(numerator) / int(denominator or 1)


def _value_of_words(spelled: str) -> int:
    total, part = 0, 0
    for word in re.findall(r"[a-z]+", spelled.lower()):
        if word == "hundred":
            part *= 100
        elif word == "thousand":
            total, part = 1000 * part, 0
        elif word != "and":
            part += _VALUES[word]
    return total + part


def _words(text: str) -> list[str]:
    return _TOKEN.findall(text.lower())


def _holds(text: list[str], part: list[str]) -> bool:
    return any(text[i : i + len(part)] == part for i in range(len(text) - len(part) + 1))
