"""What the tools say of the sync's cost."""

import json
import sys

import pytest

from tests.end_to_end.conftest import ROOT, run_command
from tools.estimate_weight_sync import Case, Model, cost

pytestmark = [pytest.mark.cores(4), pytest.mark.engine]


def test_the_documents_table_on_paper_is_the_tools():
    table = run_command([sys.executable, ROOT / "tools/estimate_weight_sync.py"])
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) > 10
    assert "\n".join(rows) in (ROOT / "docs/weight_sync.md").read_text()


def test_two_stages_of_two_by_hand():
    """100 GB at 1 GB/s of network, 10 of NVLink and 100 of memory: a stage has 50 GB, a rank of it
    25, and is given the other stage's 25 by the network; of all 100 it lacks half, by NVLink."""
    found = cost(Case(Model("m", 50e9, 0.0), 4, 2, 2), 10e9, 1e9, 100e9)
    assert (found.network, found.nvlink) == pytest.approx((25e9, 50e9))
    gather, load = 25 + 5 + 2, 3
    assert found.seconds == pytest.approx(gather + load * (256 << 20) / 100e9)


@pytest.mark.slow
def test_a_row_is_measured(tmp_path):
    options = ["--models", "30M", "--layouts", "1x1x1", "--engine-tp", "1", "--repeats", "2"]
    output = tmp_path / "rows.json"
    run_command([sys.executable, ROOT / "tools/bench_weight_sync.py", *options, "--output", output])
    (row,) = json.loads(output.read_text())["rows"]
    assert 50e6 < row["bytes"] < 70e6
    assert 0 < row["memcpy_seconds"] < row["seconds"] and 0 <= row["other"] < 1
