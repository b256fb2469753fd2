"""`layout=auto` finds something valid whenever something valid is there."""

import pytest

from grpo_mcore.parallel.auto_layout import fit_role, fit_roles, layouts_of_size
from grpo_mcore.parallel.grid import Layout

WORLDS = range(1, 17)


def anything(layout: Layout) -> bool:
    return True


@pytest.mark.parametrize("size", WORLDS)
def test_layouts_of_size_are_all_there_once_least_split_first(size):
    found = list(layouts_of_size(size))
    expected = {
        Layout(t, p, d)
        for t in range(1, size + 1)
        for p in range(1, size + 1)
        for d in range(1, size + 1)
        if t * p * d == size
    }
    assert set(found) == expected and len(found) == len(expected)
    assert [f.model_ranks for f in found] == sorted(f.model_ranks for f in found)


def test_tensor_is_split_before_pipeline():
    assert fit_role(4, lambda layout: layout.model_ranks == 4) == Layout(4, 1, 1)
    assert fit_role(4, lambda layout: layout.tensor <= 2 and layout.data == 1) == Layout(2, 2, 1)
    assert fit_role(4, lambda layout: False) is None


@pytest.mark.parametrize("world", WORLDS)
def test_every_world_is_used_whole(world):
    placement, teacher, student = fit_roles(world, "auto", anything, anything)
    if world == 1:
        assert (placement, teacher, student) == ("colocated", Layout(), Layout())
    else:
        assert placement == "separate"
        assert teacher.size + student.size == world
        assert student.size == max(1, world // 4)


@pytest.mark.parametrize("world", WORLDS)
def test_colocated_roles_both_have_all_ranks(world):
    placement, teacher, student = fit_roles(world, "colocated", anything, anything)
    assert placement == "colocated" and teacher.size == student.size == world


@pytest.mark.parametrize("world", WORLDS)
def test_teacher_on_a_power_of_two_leaves_the_rest_to_the_student(world):
    def teacher_fits(layout):
        return layout.size & (layout.size - 1) == 0

    found = fit_roles(world, "auto", teacher_fits, anything)
    assert found is not None
    placement, teacher, student = found
    assert teacher_fits(teacher)
    assert placement == "colocated" or teacher.size + student.size == world


def test_nothing_acceptable_is_none():
    assert fit_roles(4, "auto", lambda layout: False, anything) is None
    assert fit_roles(4, "colocated", anything, lambda layout: False) is None
    assert fit_roles(1, "separate", anything, anything) is None
