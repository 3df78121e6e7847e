"""The papers' recomputed numbers: every cell against the code, the printed value and the page."""

import ast
import re
import shlex
import subprocess
import sys
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest

import common
from figures import papers

ROOT = Path(__file__).parents[1]
DATA = common.read_json(ROOT / "figures" / "papers.json")
PAGE = (ROOT / "figures" / "papers.md").read_text(encoding="utf-8")
HEAVY = re.compile("mflops|table1|llama|mistral|deberta|break_even|held")


@pytest.mark.parametrize("heavy", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_cell_is_recomputed(heavy):
    cells = [c for c in DATA["cells"] if bool(HEAVY.search(c["how"])) == heavy]
    assert len(cells) > 20
    for found, wanted in zip(papers.measure({"cells": cells})["cells"], cells, strict=True):
        found["ours"] = pytest.approx(found["ours"], abs=1e-5) if found["ours"] else found["ours"]
        assert found["ours"] == wanted["ours"], wanted["what"]
        assert found["verdict"] == wanted["verdict"], wanted["what"]


def test_a_verdict_is_the_comparison_with_the_printed_number():
    """Again, with decimal arithmetic and nothing of papers.py's."""
    seen = set()
    for cell in DATA["cells"]:
        printed = re.fullmatch(r"(-?[\d,]+)(\.\d+)?([KM]?)(%|×| GB| MB)?", cell["paper"])
        if not cell["paper"]:
            wanted = "not printed"
        elif not printed or isinstance(cell["ours"], list | None):
            wanted = "not reproducible"
        else:
            number = Decimal((printed[1] + (printed[2] or "")).replace(",", ""))
            ours = Decimal(str(cell["ours"])) / {"K": 1_000, "M": 1_000_000, "": 1}[printed[3]]
            close = [ours.quantize(number, rule) for rule in (ROUND_HALF_UP, ROUND_DOWN)]
            wanted = "equal" if number in close else "not equal"
        assert cell["verdict"] == wanted, (cell["what"], cell["paper"], cell["ours"])
        seen.add(wanted)
    assert seen == {"equal", "not equal", "not reproducible", "not printed"}


@pytest.mark.parametrize(
    ("printed", "value", "wanted"),
    [
        ("25K", 24_576, True),  # rounded
        ("24K", 24_576, True),  # cut off
        ("23K", 24_576, False),
        ("26K", 24_576, False),
        ("36K", 36_864, True),
        ("96", 96, True),
        ("96", 97, False),
        ("1.2M", 1_179_648, True),
        ("9,437,184", 9_437_185, False),
        ("33,730.2", 33_730.247424, True),
        ("33,730.2", 33_730.3, False),
        ("-1.79%", -1.785, True),
        ("-1.79%", -1.78, False),
        ("4.6 GB", 4.56, True),
        ("261 MB", 257.7, False),
    ],
)
def test_equal_is_the_printed_number_rounded_or_cut(printed, value, wanted):
    assert papers.shows(printed, value) == wanted
    assert papers.verdict(printed, value) == ("equal" if wanted else "not equal")


def test_the_page_is_made_from_the_json():
    assert papers.page(DATA) == PAGE


def test_no_cell_and_no_erratum_breaks_its_row():
    """No bar within a field, no line break, and every cell says why."""
    for item in DATA["cells"] + DATA["errata"]:
        for field, value in item.items():
            assert not isinstance(value, str) or not re.search(r"[|\n`]", value), (field, value)
    assert all(cell["why"] and cell["how"] and cell["what"] for cell in DATA["cells"])
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    heads = {line.count("|") for line in rows if line.startswith("| where")}
    assert {line.count("|") for line in rows} == heads == {5, 8}


def test_every_test_named_in_the_errata_exists():
    defined = set()
    for file in (ROOT / "tests").glob("test_*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        defined |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for erratum in DATA["errata"]:
        named = re.findall(r"test_\w+", erratum["test"])
        assert set(named) <= defined, erratum["what"]
        assert named or erratum["test"] == "no test", erratum["what"]


@pytest.mark.slow
def test_a_line_of_python_runs_as_it_stands():
    (line,) = re.findall(r"`(python -c .*?)`", PAGE)
    done = subprocess.run(
        [sys.executable, *shlex.split(line)[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "36864", done.stderr[-2000:]
