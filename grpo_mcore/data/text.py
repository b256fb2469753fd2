"""Templates filled, and what counts of a model's text."""

import re

_FIELD = re.compile(r"\{(\w+)\}")
_SOLUTION = re.compile(r"<solution>(.*?)</solution>", re.DOTALL)
_TEACHING = re.compile(r"<teaching>(.*?)</teaching>", re.DOTALL)


def fill(template: str, **fields: str) -> str:
    """Replaces each {name} among `fields`. All other braces, in the template and in the fields'
    own text, stay as they are."""
    return _FIELD.sub(lambda m: fields.get(m[1], m[0]), template)


def fields_of(template: str) -> set[str]:
    """Names in braces in `template`."""
    return set(_FIELD.findall(template))


def extract_solution(text: str) -> str:
    """What stands between the last <solution> tags; "" without them."""
    found = _SOLUTION.findall(text)
    return found[-1].strip() if found else ""


def extract_teaching(text: str) -> str:
    """What stands between the first <teaching> tags; the whole text without them."""
    found = _TEACHING.search(text)
    return (found[1] if found else text).strip()


def is_correct(solution: str, ground_truth: str) -> float:
    """1.0 where both are the same text, case and surrounding blanks aside, else 0.0."""
    return float(solution.strip().lower() == ground_truth.strip().lower())
