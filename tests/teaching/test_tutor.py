"""A teacher tells strong students from weak ones, and teaches each in its own way."""

from types import SimpleNamespace

import pytest

from grpo_mcore import DiagnosticResult, Tutor
from grpo_mcore.config import ConfigError
from grpo_mcore.data.tokenizer import Tokenizer
from tests.teaching.conftest import GAP, GUIDANCE, SETTINGS
from tests.teaching.conftest import TASK as CARDS

pytestmark = pytest.mark.engine

COINS, BOOKS = "tom has 7 coins.", "tom has 7 books."


@pytest.fixture(scope="module")
def asked(classroom_models, tmp_path_factory) -> SimpleNamespace:
    """What a tutor of each student was asked."""
    found = SimpleNamespace(guidance={})
    settings = SETTINGS | {"output_dir": str(tmp_path_factory.mktemp("tutor"))}
    teacher = classroom_models.teacher
    with Tutor(teacher, classroom_models.weak, settings) as tutor:
        found.stubborn = tutor.diagnostic_probe(CARDS)
        found.clueless = tutor.diagnostic_probe(COINS)
        found.wavering = tutor.diagnostic_probe(BOOKS)
    with Tutor(teacher, classroom_models.strong, settings) as tutor:
        found.strong = tutor.diagnostic_probe(CARDS)
        found.again = tutor.diagnostic_probe(CARDS)
        found.short = tutor.diagnostic_probe(CARDS, max_tokens=2)
        for level in (0.1, 0.5, 0.9):
            result = DiagnosticResult(level, approach=" i would add.")
            found.guidance[result.guidance_form] = [
                tutor.generate_guidance(CARDS, result) for _ in range(2)
            ]
        found.tutorial = tutor.teach(CARDS)
        with pytest.raises(ConfigError) as caught:
            tutor.diagnostic_probe("tom has 7 cards. " * 30)
        found.too_long = str(caught.value)
        found.after_it = tutor.diagnostic_probe(CARDS)
    found.tutor = tutor
    return found


@pytest.mark.seed(82, 83)
def test_agreement_tells_students_apart(asked):
    strong, weak = asked.strong.response_quality, asked.clueless.response_quality
    assert strong["agreement"] > 0.8 and weak["agreement"] < 0.4
    assert asked.clueless.capability_level < 0.3 < 0.7 < asked.strong.capability_level


@pytest.mark.seed(83)
def test_the_students_own_probabilities_tell_students_apart(asked):
    strong, weak = asked.strong.response_quality, asked.clueless.response_quality
    assert strong["likelihood"] > 0.8 and weak["likelihood"] < 0.3


@pytest.mark.seed(83, "A12")
def test_the_teachers_grade_tells_students_apart_that_are_equally_sure(asked):
    strong, weak = asked.strong.response_quality, asked.stubborn.response_quality
    assert min(weak["agreement"], weak["likelihood"]) > 0.6
    assert strong["grade"] > 0.8 and weak["grade"] < 0.4
    assert asked.stubborn.capability_level < 0.7 < asked.strong.capability_level


@pytest.mark.seed(83)
def test_confidence_is_low_in_a_student_that_is_right_now_and_then(asked):
    sure = (asked.strong, asked.stubborn, asked.clueless)
    plans = "".join(asked.wavering.probes)
    assert "add" in plans and "multiply" in plans
    assert 0 <= asked.wavering.confidence_score < 0.5
    assert all(0.7 < result.confidence_score <= 1 for result in sure)
    assert asked.wavering.capability_level < asked.strong.capability_level


@pytest.mark.seed(83)
def test_gaps_are_the_teachers(asked):
    assert asked.strong.identified_gaps == []
    assert asked.stubborn.identified_gaps == [GAP]
    assert asked.clueless.identified_gaps


@pytest.mark.seed(82, 83)
def test_probes_are_counted_limited_and_the_same_every_time(asked, classroom_models):
    tokenizer = Tokenizer(classroom_models.strong)
    assert asked.strong == asked.again == asked.after_it
    assert len(asked.strong.probes) == 5 and asked.strong.approach == " i would add."
    written = sum(len(tokenizer.encode(text)) for text in asked.strong.probes)
    assert asked.strong.probe_tokens == written + 5  # ends
    assert asked.short.probe_tokens <= 5 * 2


@pytest.mark.seed(84, "A12")
def test_guidance_has_three_forms_and_is_what_stands_in_the_tags(asked):
    for form, (first, second) in asked.guidance.items():
        text = GUIDANCE[form].replace("<teaching>", "").replace("</teaching>", "").strip()
        assert first == second == text
    assert len(asked.guidance) == 3


def test_a_tutorial_holds_all_four_texts(asked):
    found = asked.tutorial
    assert found.alone.strip() == "7" and found.diagnosis == asked.strong
    assert found.guidance == asked.guidance["verification"][0]
    assert found.taught


def test_a_task_too_long_for_a_model_is_refused_and_harms_nothing(asked):
    assert asked.too_long.startswith("task: with templates.diagnostic it makes a prompt of ")


@pytest.mark.seed(82, 84)
@pytest.mark.parametrize(
    "ask, kind, message",
    [
        (lambda t: t.diagnostic_probe(3), TypeError, "task=3: must be text"),
        (lambda t: t.diagnostic_probe(" "), ValueError, "task=' ': is empty"),
        (lambda t: t.diagnostic_probe("a", 0), ValueError, "max_tokens=0: must be at least 1"),
        (lambda t: t.generate_guidance(3, DiagnosticResult(0.5)), TypeError, "task=3"),
        (lambda t: t.generate_guidance("a", None), ValueError, "diagnostic=None: give what"),
        (
            lambda t: t.generate_guidance("a", DiagnosticResult(0.5), 9),
            ValueError,
            "max_tokens=9: must be at least 10",
        ),
        (lambda t: t.diagnostic_probe("a"), RuntimeError, "use it in a `with` statement"),
    ],
)
def test_what_cannot_be_asked(asked, ask, kind, message):
    with pytest.raises(kind, match=message):
        ask(asked.tutor)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"templates.hints": "go on"}, "templates.hints: lacks {approach}"),
        ({"template": "a"}, "template: unknown configuration key; did you mean templates"),
        ({"max_probe_tokens": 0}, "max_probe_tokens=0: must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_engines_start(
    classroom_models, change, message
):
    with pytest.raises(ConfigError) as caught:
        Tutor(classroom_models.teacher, classroom_models.strong, SETTINGS | change)
    assert str(caught.value).startswith(message)
