"""The demo's task: word problems, a student with one blind spot, and what guidance does to it.

A question has two numbers and one true operation. Its *cue* is a word that suggests an operation,
and in two questions of three the cue misleads:

    "tom has 9 coins. tom has 4 more coins than ann. how many coins does ann have?"
     cue word "more" -> add, truth -> subtract

The student follows the cue, except in stories about books or pens, which it reads with care; so
alone it is right in 1/3 + 2/3 * 1/4 = 1/2 of the questions, and the wording alone does not tell
which. It changes its mind only when guidance names its mistake and the cure:

    plan "add"   + "not add, subtract."   -> subtract (also when that is wrong: it obeys)
    plan "add"   + "not multiply, add."   -> add      (not my mistake, so I keep my plan)
    plan "add"   + "use subtract here."   -> add      (a bare instruction is ignored)

Good guidance therefore needs both the question (what is true?) and the student's approach (what
does it believe?): "yes." to a right plan, "not <plan>, <truth>." to a wrong one. The supervised
data makes the teacher a sycophant that mostly agrees; GRPO has to find out when not to.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import permutations

BASELINE = "question : {question} answer :"
DIAGNOSTIC = "question : {question} plan :"
WITH_TEACHING = "question : {question} teacher : {teaching} answer :"
ADAPTIVE = "question : {question} student : {approach} teaching :"

SOLUTION = "{x} {sign} {y} = <solution> {result} </solution>"
PROBE = "i would {operation}."
TEACHING = "<teaching> {hint} </teaching>"

SIGNS = {"add": "+", "subtract": "-", "multiply": "x"}
OPERATIONS = tuple(SIGNS)
CUES = {
    "altogether": "add",
    "more": "add",
    "left": "subtract",
    "fewer": "subtract",
    "each": "multiply",
    "times": "multiply",
}

NAMES = ("tom", "ann", "leo", "mia", "max", "eva", "ben", "zoe", "sam", "kim")
ITEMS = ("cards", "coins", "marbles", "stamps", "apples", "shells", "books", "pens")
CAREFUL_ITEMS = ("books", "pens")

# Larger number first, so every operation is defined on every pair, also when it is the wrong one.
PAIRS = tuple((x, y) for x in range(3, 13) for y in range(2, 10) if x > y)

# Wording -> true operation. No two wordings differ only in who has more than whom: two layers
# cannot be relied on to tell such names apart.
CONSISTENT_WORDINGS = {
    "{name} has {x} {item} and buys {y} more. how many {item} does {name} have now?": "add",
    "{name} has {x} red {item} and {y} blue {item}. how many {item} is that altogether?": "add",
    "{name} buys {x} {item} and {other} buys {y}. how many {item} is that altogether?": "add",
    "{name} has {x} {item} and loses {y} {item}. how many {item} are left?": "subtract",
    "{name} had {x} {item} and sold {y} of them. how many {item} are left?": "subtract",
    "there are {x} {item} and {name} buys {y} of them. how many {item} are left?": "subtract",
    "each box holds {x} {item} and there are {y} boxes. how many {item} is that?": "multiply",
    "{name} has {x} {item}. {other} has {y} times as many. "
    "how many {item} does {other} have?": "multiply",
    "{name} has {x} {item} in each box and has {y} boxes. "
    "how many {item} does {name} have?": "multiply",
}
MISLEADING_WORDINGS = {
    "{name} has {x} {item}. {name} has {y} more {item} than {other}. "
    "how many {item} does {other} have?": "subtract",
    "{name} and {other} have {x} {item} altogether. {name} has {y} of them. "
    "how many {item} does {other} have?": "subtract",
    "there are {x} {item} altogether. {y} {item} are red. how many {item} are not red?": "subtract",
    "{name} has {x} {item}. {name} has {y} fewer {item} than {other}. "
    "how many {item} does {other} have?": "add",
    "{name} has {x} {item} left and gave {y} {item} to {other}. "
    "how many {item} did {name} have before?": "add",
    "{name} sold {x} {item} and has {y} {item} left. "
    "how many {item} did {name} have before?": "add",
    "{name} buys {x} {item} every day for {y} days. "
    "how many {item} is that altogether?": "multiply",
    "every day {name} sold {x} {item}. how many {item} is that altogether in {y} days?": "multiply",
    "there are {x} {item} left in every box and {name} has {y} boxes. "
    "how many {item} is that?": "multiply",
}
WORDINGS = CONSISTENT_WORDINGS | MISLEADING_WORDINGS

# Wordings that neither model ever meets in training, made of the same words.
UNSEEN_WORDINGS = {
    "{name} has {x} {item} and {other} has {y} {item}. how many {item} is that altogether?": "add",
    "{name} had {x} {item} and gave {y} of them to {other}. how many {item} are left?": "subtract",
    "{name} buys {x} {item} each day for {y} days. how many {item} is that?": "multiply",
    "{name} had {x} {item} altogether and {y} of them are blue. "
    "how many {item} are red?": "subtract",
    "there are {x} {item} left. {name} gave {y} {item} to {other}. "
    "how many {item} did {name} have before?": "add",
    "every box holds {x} {item} and there are {y} boxes. "
    "how many {item} is that altogether?": "multiply",
}

CORRECTING = (
    "not {wrong}, {right}.",
    "it is not {wrong}, use {right} here.",
    "read again. you must not {wrong} here, you must {right}.",
)
BARE = tuple(
    text.format(operation)
    for text in ("{}.", "use {} here.", "you must {}.")
    for operation in OPERATIONS
)
AGREEING = ("yes.", "yes, that is right.", "yes, you are right.")
VAGUE = ("be careful.", "think again.")

# Every correction as text -> (the mistake it names, the cure it gives).
CORRECTIONS = {
    text.format(wrong=wrong, right=right): (wrong, right)
    for text in CORRECTING
    for wrong, right in permutations(OPERATIONS, 2)
}
# Guidance that does not look at the question: the control a teacher has to beat.
CONSTANT_HINTS = (*list(CORRECTIONS)[:6], *BARE, *AGREEING, *VAGUE)
# What else the student may read in place of guidance while the teacher explores.
STRAY_WORDS = (
    *sorted(set(" ".join(CONSTANT_HINTS).split())),
    *SIGNS.values(),
    *"0123456789",
    *NAMES,
    *ITEMS,
)


@dataclass(frozen=True)
class Question:
    text: str
    x: int
    y: int
    truth: str
    """The operation that solves it."""
    plan: str
    """The operation the student will choose when left alone."""

    def solve(self, operation: str) -> int:
        return {
            "add": self.x + self.y,
            "subtract": self.x - self.y,
            "multiply": self.x * self.y,
        }[operation]

    @property
    def answer(self) -> str:
        return str(self.solve(self.truth))


@cache
def cue_of(wording: str) -> str:
    """The operation suggested by the wording's cue word; every wording holds exactly one."""
    (cue,) = (CUES[word] for word in re.findall(r"[a-z]+", wording) if word in CUES)
    return cue


def draw_question(rng: random.Random, wordings: dict[str, str] = WORDINGS) -> Question:
    """One question; the cue misleads in two of three."""
    misleading = rng.random() < 2 / 3
    wording = rng.choice([w for w, truth in wordings.items() if (cue_of(w) != truth) == misleading])
    name, other = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)
    x, y = rng.choice(PAIRS)
    truth = wordings[wording]
    return Question(
        text=wording.format(name=name, other=other, item=item, x=x, y=y),
        x=x,
        y=y,
        truth=truth,
        plan=truth if item in CAREFUL_ITEMS else cue_of(wording),
    )


def draw_distinct(
    rng: random.Random,
    count: int,
    wordings: dict[str, str] = WORDINGS,
    excluded: frozenset = frozenset(),
) -> list[Question]:
    """`count` questions with different texts, none of them in `excluded`."""
    questions: dict[str, Question] = {}
    while len(questions) < count:
        question = draw_question(rng, wordings)
        if question.text not in excluded:
            questions[question.text] = question
    return list(questions.values())


def heldout_questions(count: int = 240) -> list[Question]:
    """The same questions for every seed, kept out of supervised training and out of GRPO."""
    return draw_distinct(random.Random("held out"), count)


def unseen_wording_questions(count: int = 240) -> list[Question]:
    return draw_distinct(random.Random("unseen wordings"), count, UNSEEN_WORDINGS)


def train_questions(seed: int, count: int = 4000) -> list[Question]:
    excluded = frozenset(question.text for question in heldout_questions())
    return draw_distinct(random.Random(f"train {seed}"), count, excluded=excluded)


def solution_text(question: Question, operation: str) -> str:
    return SOLUTION.format(
        x=question.x, sign=SIGNS[operation], y=question.y, result=question.solve(operation)
    )


def probe_text(operation: str) -> str:
    return PROBE.format(operation=operation)


def teaching_text(hint: str) -> str:
    return TEACHING.format(hint=hint)


def student_follows(question: Question, hint: str) -> str:
    """The operation the student chooses after reading `hint`."""
    wrong, right = CORRECTIONS.get(hint, (None, None))
    return right if wrong == question.plan else question.plan


def ideal_hints(question: Question) -> list[str]:
    """All hints that leave a right plan alone or cure a wrong one."""
    if question.plan == question.truth:
        return list(AGREEING)
    return [text.format(wrong=question.plan, right=question.truth) for text in CORRECTING]


def _correction(rng: random.Random, wrong: str) -> str:
    """Talk the student out of `wrong`, into anything else."""
    right = rng.choice([operation for operation in OPERATIONS if operation != wrong])
    return rng.choice(CORRECTING).format(wrong=wrong, right=right)


def _broken(rng: random.Random) -> str:
    """The start of a correction, then stray words: a teacher must not find magic words."""
    words = rng.choice(list(CORRECTIONS)).split()
    stray = rng.choices(STRAY_WORDS, k=rng.randint(1, 4))
    return " ".join(words[: rng.randrange(len(words))] + stray)


def _hint_to_student(rng: random.Random, question: Question) -> str:
    """Hints without regard to the truth, so that the student learns to obey and not to solve."""
    share = rng.random()
    if share < 0.45:
        return _correction(rng, question.plan)
    if share < 0.60:
        return _correction(rng, rng.choice([op for op in OPERATIONS if op != question.plan]))
    if share < 0.75:
        return rng.choice(BARE)
    if share < 0.90:
        return rng.choice(AGREEING + VAGUE)
    return _broken(rng)


def _hint_by_teacher(rng: random.Random, question: Question) -> str:
    """Before GRPO: 30 % ideal, 45 % agreeing or vague whatever the question, 25 % harmful."""
    share = rng.random()
    if share < 0.30:
        return rng.choice(ideal_hints(question))
    if share < 0.75:
        return rng.choice(AGREEING if rng.random() < 0.75 else VAGUE)
    if share < 0.85:
        return rng.choice(BARE)
    return _correction(rng, question.plan if rng.random() < 0.7 else rng.choice(OPERATIONS))


def _student_row(rng: random.Random, question: Question) -> tuple[str, str]:
    share = rng.random()
    if share < 0.22:
        return BASELINE.format(question=question.text), solution_text(question, question.plan)
    if share < 0.32:
        return DIAGNOSTIC.format(question=question.text), probe_text(question.plan)
    hint = _hint_to_student(rng, question)
    prompt = WITH_TEACHING.format(question=question.text, teaching=hint)
    return prompt, solution_text(question, student_follows(question, hint))


def _teacher_row(rng: random.Random, question: Question) -> tuple[str, str]:
    """The teacher knows the subject (40 % of rows: it solves) but judges its student poorly."""
    if rng.random() < 0.40:
        return BASELINE.format(question=question.text), solution_text(question, question.truth)
    prompt = ADAPTIVE.format(question=question.text, approach=probe_text(question.plan))
    return prompt, teaching_text(_hint_by_teacher(rng, question))


def _sft_rows(row: Callable, rng: random.Random, count: int) -> Iterator[dict[str, str]]:
    heldout = frozenset(question.text for question in heldout_questions())
    while count:
        question = draw_question(rng)
        if question.text not in heldout:
            prompt, completion = row(rng, question)
            yield {"prompt": prompt, "completion": completion}
            count -= 1


def student_sft_rows(seed: int, count: int) -> Iterator[dict[str, str]]:
    """Rows that plant the student's plan, its probe and its obedience; the trainer adds eos."""
    return _sft_rows(_student_row, random.Random(f"student {seed}"), count)


def teacher_sft_rows(seed: int, count: int) -> Iterator[dict[str, str]]:
    """Rows that plant the subject and a habit of agreeing; the trainer adds eos."""
    return _sft_rows(_teacher_row, random.Random(f"teacher {seed}"), count)


def rl_row(question: Question) -> dict[str, str]:
    """`solution` is the right answer as the student writes it (`data.reference_column`)."""
    return {
        "question": question.text,
        "answer": question.answer,
        "solution": solution_text(question, question.truth),
    }
