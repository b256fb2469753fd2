"""From evidence to a diagnosis."""

import re

import pytest

from grpo_mcore.teaching.diagnosis import (
    REPORT,
    DiagnosticResult,
    Grading,
    agreement,
    capability,
    diagnose,
    likelihood,
    read_gaps,
    similarity,
    typical,
)


@pytest.mark.parametrize(
    "text, other, expected",
    [
        ("add the numbers", "add the numbers", 1.0),
        ("Add, then stop.", "add then stop", 6 / 8),  # two signs more
        ("police killed the gunman", "police kill the gunman", 6 / 8),
        ("the gunman police killed", "police killed the gunman", 4 / 8),
        ("一加二", "一加三", 4 / 6),
        ("add", "", 0.0),
        ("", "", 0.0),
    ],
)
def test_similarity_is_the_f1_of_the_longest_common_subsequence(text, other, expected):
    assert similarity(text, other) == similarity(other, text) == pytest.approx(expected)


def test_agreement_is_over_pairs_and_the_typical_text_is_nearest_to_all():
    texts = ["divide by two", "add the numbers", "add both numbers"]
    assert agreement(texts) == pytest.approx((0 + 0 + 2 / 3) / 3)
    assert typical(texts) == "add the numbers"
    assert agreement(["", ""]) == 0.0


def test_likelihood_does_not_fall_with_length():
    assert likelihood([[-1.0], [-1.0] * 9]) == pytest.approx(likelihood([[-1.0]]))
    assert likelihood([[0.0, 0.0]]) == 1.0


def test_no_evidence_makes_up_for_another():
    assert capability(1.0, 1.0, 1.0) == 1.0
    for missing in ("agreement", "likelihood", "grade"):
        evidence = {"agreement": 0.9, "likelihood": 0.9, "grade": 0.9}
        assert capability(**evidence | {missing: 0.0}) == 0.0
        assert capability(**evidence | {missing: 0.5}) < capability(**evidence)


def diagnosed(*gradings: dict[int, float]) -> DiagnosticResult:
    count = len(gradings)
    return diagnose(["add"] * count, [[0.0, 0.0]] * count, [*map(Grading, gradings)], ["signs"])


def test_grades_count_by_their_probabilities():
    result = diagnosed({5: 0.75, 1: 0.25}, {5: 0.3})  # of the second 0.7 was not seen
    assert result.response_quality["grade"] == pytest.approx((0.75 + 1) / 2)
    assert result.capability_level == pytest.approx(0.875**0.5)
    assert result.probe_tokens == 4 and result.approach == "add"
    assert result.identified_gaps == ["signs"]


def test_confidence_falls_with_the_spread_of_grades():
    assert diagnosed({3: 0.5}, {3: 0.9}).confidence_score == 1.0
    assert diagnosed({5: 0.5, 1: 0.5}, {5: 0.5, 1: 0.5}).confidence_score == 0.0
    assert diagnosed({1: 1.0}, {5: 1.0}).confidence_score == 0.0
    assert diagnosed({3: 1.0}, {4: 1.0}).confidence_score == pytest.approx(0.75)


@pytest.mark.seed(84)
@pytest.mark.parametrize(
    "level, form",
    [
        (0.0, "walkthrough"), (0.2999, "walkthrough"), (0.3, "hints"), (0.5, "hints"),
        (0.7, "hints"), (0.7001, "verification"), (1.0, "verification"),
    ],
)  # fmt: skip
def test_both_boundaries_belong_to_hints(level, form):
    assert DiagnosticResult(level).guidance_form == form


def test_reports_below_the_best_grade_name_gaps():
    for report in ("5", "1\n- signs", "4\n- signs\n- units"):
        assert re.fullmatch(REPORT, report)
    for report in ("4", "5\n- signs", "6", "3\n-signs", "1\n- " + "x" * 81):
        assert not re.fullmatch(REPORT, report)


def test_of_a_report_that_was_cut_off_the_last_gap_is_left_out():
    assert read_gaps("5", True) == []
    assert read_gaps("2\n- signs\n- units", True) == ["signs", "units"]
    assert read_gaps("2\n- signs\n- uni", False) == ["signs"]
    assert read_gaps("2\n- sig", False) == ["sig"]
    assert read_gaps("2\n- sig\n-", False) == ["sig"]
    assert read_gaps("2", False) == read_gaps("2\n- ", False) == []
