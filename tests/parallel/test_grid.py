"""The rank grid against Megatron's own enumeration and against counting by hand."""

from itertools import chain, combinations, product

import pytest
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.parallel_state import RankGenerator

from grpo_mcore.config import ConfigError
from grpo_mcore.parallel.grid import Layout

SHORT = {"tensor": "tp", "data": "dp", "pipeline": "pp"}
LAYOUTS = [Layout(*sizes) for sizes in product((1, 2, 3), (1, 2, 4), (1, 2, 3))]


def subsets(names):
    return chain.from_iterable(combinations(names, n) for n in range(len(names) + 1))


def canonical(rank_sets):
    return sorted(sorted(ranks) for ranks in rank_sets)


def test_parse_and_print_are_inverse():
    layout = Layout.parse("layout.teacher", "2x4x3")
    assert (layout.tensor, layout.pipeline, layout.data) == (2, 4, 3)
    assert str(layout) == "2x4x3"
    assert (layout.size, layout.model_ranks) == (24, 8)


@pytest.mark.parametrize(
    "text", ["", "2x2", "2x2x1x1", "0x1x1", "2x-1x1", "axbxc", "2 x 2 x 1", "auto"]
)
def test_parse_refuses(text):
    with pytest.raises(ConfigError, match=r"layout\.teacher=.*TPxPPxDP"):
        Layout.parse("layout.teacher", text)


def test_ranks_are_numbered_tensor_then_data_then_pipeline():
    layout = Layout(tensor=2, pipeline=2, data=2)
    assert canonical(layout.ranks_along("tensor")) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert canonical(layout.ranks_along("data")) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert canonical(layout.ranks_along("pipeline")) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert canonical(layout.ranks_along()) == [[rank] for rank in range(8)]
    assert layout.ranks_along("tensor", "data", "pipeline") == [list(range(8))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rank_sets_share_every_other_coordinate(layout):
    places = {
        layout.rank(t, p, 0, d): {"tensor": t, "pipeline": p, "data": d}
        for t in range(layout.tensor)
        for p in range(layout.pipeline)
        for d in range(layout.data)
    }
    assert sorted(places) == list(range(layout.size))
    for along in subsets(SHORT):
        fixed = [name for name in SHORT if name not in along]
        together = {}
        for rank, place in places.items():
            together.setdefault(tuple(place[name] for name in fixed), []).append(rank)
        assert canonical(layout.ranks_along(*along)) == canonical(together.values())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rank_sets_are_megatrons(layout, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(layout.size))
    grid = HyperCommGrid([layout.tensor, layout.data, layout.pipeline], ["tp", "dp", "pp"])
    generator = RankGenerator(
        layout.tensor, 1, layout.data, layout.pipeline, 1, order="tp-cp-ep-dp-pp"
    )
    for along in subsets(SHORT):
        if along:
            ours = canonical(layout.ranks_along(*along))
            names = [SHORT[name] for name in along]
            assert ours == canonical(grid.get_rank_enum(names))
            assert ours == canonical(generator.get_ranks("-".join(names)))


@pytest.mark.parametrize("expert", [1, 2, 4])
def test_expert_rank_sets_are_megatrons(expert, monkeypatch):
    layout = Layout(tensor=2, pipeline=2, data=4, expert=expert)
    monkeypatch.setenv("WORLD_SIZE", str(layout.size))
    generator = RankGenerator(2, expert, 4 // expert, 2, 1, order="tp-cp-ep-dp-pp")
    names = {"tensor": "tp", "expert": "ep", "replica": "dp", "pipeline": "pp"}
    for along in subsets(names):
        if along:
            theirs = generator.get_ranks("-".join(names[name] for name in along))
            assert canonical(layout.ranks_along(*along)) == canonical(theirs)
    assert canonical(layout.ranks_along("data")) == canonical(
        layout.ranks_along("expert", "replica")
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_pipeline_ranks_are_listed_first_stage_first(layout):
    for ranks in layout.ranks_along("pipeline"):
        stages = [rank // (layout.tensor * layout.data) for rank in ranks]
        assert stages == list(range(layout.pipeline))
