"""figures/scoreboard.py: what it measures, quickly, and that its table is its JSON's."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from figures import scoreboard

ROOT = Path(__file__).parents[1]


def test_the_committed_table_is_that_of_the_committed_measurement():
    data = json.loads((ROOT / "figures" / "scoreboard.json").read_text())
    assert (ROOT / "figures" / "scoreboard.md").read_text() == scoreboard.table(data) + "\n"


def test_peak_memory_counts_what_is_held_at_a_time():
    def call():
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + 1  # 8,000
        del a
        return b + 1  # 8,000

    assert 8000 <= scoreboard.peak(call) <= 8000 + 2 * 64  # allocations are aligned


@pytest.mark.parametrize("constant, factor", [(2.0, 3.0), (0.0, 3.0), (2.0, 0.0)])
def test_a_cost_that_is_a_constant_plus_its_formula_is_found_to_be_that(constant, factor):
    points = [{"x": x, "work": x**2, "seconds": constant + factor * x**2} for x in (1, 2, 4, 8)]
    wanted = [p["seconds"] for p in points]
    assert scoreboard.fitted(points) == pytest.approx(wanted, rel=1e-9)
    assert scoreboard.slopes(points)[1] == pytest.approx(2)


def test_a_board_is_compared_with_the_committed_one():
    row = dict(section="a", quantity="b", contender="c", reference="d", ratio=2.0, span=[1.0, 3.0])
    where = dict(device="D", threads=1, torch="T", peft="P")
    now = {"environment": where, "rows": [row, row | {"contender": "e"}]}
    found = scoreboard.table(now, {"rows": [row | {"ratio": 4.0}]})
    assert "| a | b | c / d | 2.00 | 1.00 to 3.00 | 4.00 |" in found
    assert "| a | b | e / d | 2.00 | 1.00 to 3.00 | new |" in found


@pytest.mark.slow
def test_a_quick_board_has_every_ratio_and_every_curve(tmp_path):
    out = tmp_path / "board.json"
    launch = [sys.executable, "figures/scoreboard.py", "--measure", "--quick", "--out", str(out)]
    done = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    data = json.loads(out.read_text())
    for row in data["rows"]:
        assert 0 <= row["ratio"] < math.inf
        assert row["contender"] != row["reference"] or row["ratio"] == 1
    found = {(row["quantity"], row["contender"]) for row in data["rows"]}
    names = {"LoRA", "HRA, ours", "HRA, PEFT", "literal chain", "EigenLoRAx"}
    names |= {"OFT, PEFT", "BOFT, PEFT", "base alone"}
    for quantity in ("forward + backward", "inference", "peak memory", "saved for backward"):
        assert {(quantity, name) for name in names} <= found
    assert {("forward + backward", m) for m in scoreboard.resora.METRICS} <= found
    assert {("from memory", "linalg.svd float32"), ("inference", "PEFT adapter_names")} <= found
    assert {(p["size"], p["curve"]) for p in data["curves"]} == {
        (size, name) for size, names in scoreboard.CURVES.items() for name in names
    }
    assert all(p["seconds"] > 0 < p["work"] for p in data["curves"])
    assert scoreboard.table(data) in out.with_suffix(".md").read_text()
    assert data["environment"]["device"] in done.stdout and out.with_suffix(".png").exists()
