"""Templates filled, and what counts of a model's text."""

import re

_FIELD = re.compile(r"\{(\w+)\}")
_CLOSING_TAG = re.compile(r"</(\w+)>")
_BOXED_OR_BRACE = re.compile(r"(\\boxed\s*\{)|[{}]")
_ANSWER_IS = re.compile(r"answer\s*(?:is|:)\s*:?\s*([^\n]+)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def fill(template: str, **fields: str) -> str:
    """Replaces each {name} among `fields`. All other braces, in the template and in the fields'
    own text, stay as they are."""
    return _FIELD.sub(lambda m: fields.get(m[1], m[0]), template)


def fill_between_tags(template: str, **fields: str) -> str:
    """As `fill`, of texts that may be hostile: none can close a tag of the template and go on as if
    it were the template. Where one tries, a backslash stands before the slash."""
    if not (tags := _CLOSING_TAG.findall(template)):
        return fill(template, **fields)
    closing = re.compile(rf"<(?=\s*/\s*(?:{'|'.join(tags)})\s*>)", re.IGNORECASE)
    return fill(template, **{name: closing.sub(r"<\\", text) for name, text in fields.items()})


def fields_of(template: str) -> set[str]:
    """Names in braces in `template`."""
    return set(_FIELD.findall(template))


def extract_solution(text: str) -> str:
    """What stands between the last <solution> tags; "" without them."""
    for before in reversed(text.split("</solution>")[:-1]):
        _, opening, inner = before.partition("<solution>")
        if opening:
            return inner.strip()
    return ""


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
    open_braces: list[int | None] = []  # where a box's content begins; None of other braces
    last, found = -1, ""
    for brace in _BOXED_OR_BRACE.finditer(text):
        if brace[0] != "}":
            open_braces.append(brace.end() if brace[1] else None)
            continue
        start = open_braces.pop() if open_braces else None
        if start is not None and start > last:
            last, found = start, text[start : brace.start()].strip()
    return found


def extract_teaching(text: str) -> str:
    """What stands between the first <teaching> tags; the whole text without them."""
    inner, closing, _ = text.partition("<teaching>")[2].partition("</teaching>")
    return (inner if closing else text).strip()


def is_correct(solution: str, ground_truth: str) -> float:
    """1.0 where both are the same text, case and surrounding blanks aside, else 0.0."""
    return float(solution.strip().lower() == ground_truth.strip().lower())
