"""Templates filled, and what counts of a model's text."""

import re

_FIELD = re.compile(r"\{(\w+)\}")
_SOLUTION = re.compile(r"<solution>(.*?)</solution>", re.DOTALL)
_BOXED = re.compile(r"\\boxed\s*\{")
_ANSWER_IS = re.compile(r"answer\s*(?:is|:)\s*:?\s*([^\n]+)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
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


def extract_solution_leniently(text: str) -> str:
    r"""The solution of a student that is careless of its form, in the order of ATLAS's trainer: the
    last \boxed{}; else, between the last <solution> tags, what follows "answer is", or the last
    number, or all there is; "" without either."""
    if boxed := last_boxed(text):
        return boxed
    inner = extract_solution(text)
    if announced := _ANSWER_IS.findall(inner):
        return announced[-1].strip().rstrip(".")
    numbers = _NUMBER.findall(inner)
    return numbers[-1].rstrip(",") if numbers else inner


def last_boxed(text: str) -> str:
    r"""What the last whole \boxed{} holds, braces within it included; "" without one."""
    found = ""
    for opening in _BOXED.finditer(text):
        depth = 1
        for end in range(opening.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                found = text[opening.end() : end].strip()
                break
    return found


def extract_teaching(text: str) -> str:
    """What stands between the first <teaching> tags; the whole text without them."""
    found = _TEACHING.search(text)
    return (found[1] if found else text).strip()


def is_correct(solution: str, ground_truth: str) -> float:
    """1.0 where both are the same text, case and surrounding blanks aside, else 0.0."""
    return float(solution.strip().lower() == ground_truth.strip().lower())
