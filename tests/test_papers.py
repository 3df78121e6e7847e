"""figures/counts.md, errata.md and papers.md: numbers, counterexamples, proofs and commands."""

import ast
import doctest
import importlib
import re
import shlex
import statistics
import subprocess
import sys
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import eigenlorax
from figures import papers

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "figures"
DATA = common.read_json(FIGURES / "papers.json")
COUNTS, ERRATA, CONTENTS = (
    (FIGURES / f"{name}.md").read_text(encoding="utf-8") for name in ("counts", "errata", "papers")
)
HEAVY = re.compile("mflops|table1|llama|mistral|deberta|break_even|held")

# ---------------------------------------------------------------- counts.md


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
    assert papers.page(DATA) == COUNTS


def test_no_cell_breaks_its_row_and_mismatches_come_first():
    for cell in DATA["cells"]:
        assert cell["why"] and cell["how"] and cell["what"]
        assert not re.search(r"[|\n`]", "".join(v for v in cell.values() if isinstance(v, str)))
    first, rest = COUNTS.split("## What is equal, or open")
    assert "| not equal |" in first and "| equal |" not in first
    assert "| equal |" in rest and "| not equal |" not in rest


@pytest.mark.slow
def test_a_line_of_python_runs_as_it_stands():
    (line,) = re.findall(r"`(python -c .*?)`", COUNTS)
    done = subprocess.run(
        [sys.executable, *shlex.split(line)[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "36864", done.stderr[-2000:]


# ---------------------------------------------------------------- errata.md


def table_rows(page: str) -> list[list[str]]:
    """The cells of every line of a page's Markdown tables, heads and rules left out."""
    lines = re.findall(r"^\| (.+) \|$", page, flags=re.M)
    return [line.split(" | ") for line in lines if line.split(" | ")[0] not in ("where", "there")]


def test_every_test_named_in_the_errata_exists():
    defined = set()
    for file in (ROOT / "tests").glob("test_*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        defined |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert set(re.findall(r"`(test_\w+)`", ERRATA)) <= defined
    for where, _, _, test in table_rows(ERRATA):  # four cells
        assert test == "no test" or test.startswith("`test_"), where


def test_the_counterexamples_to_theorem_3_6_run():
    found = doctest.testfile(str(FIGURES / "errata.md"), module_relative=False)
    assert found.failed == 0 and found.attempted > 15


def sides(X: np.ndarray, stack: np.ndarray, C: np.ndarray, K: int, sample: int) -> dict:
    """{part of errata.md: (left side, right side)} for R(W) = mean over rows x of ‖(W − W*)x‖²/2.

    X (N, n) are all inputs there are, and the last `sample` of them those that R̂ knows.
    """
    rows = torch.from_numpy(stack)
    V = eigenlorax.principal_components(rows, K, center=False).V.numpy()
    W = C @ stack
    everything, seen = (x.T @ x / len(x) for x in (X, X[-sample:]))

    def risk(M: np.ndarray, covariance: np.ndarray) -> float:
        return ((M - W) @ covariance * (M - W)).sum() / 2

    def least(covariance: np.ndarray) -> np.ndarray:
        """The α whose αV has the least risk."""
        return np.linalg.solve(V @ covariance @ V.T, V @ covariance @ W.T).T

    def square(M: np.ndarray) -> float:
        return np.square(M).sum()

    sigma = np.linalg.svd(stack, compute_uv=False)
    tau = np.linalg.norm(C, 2) ** 2 * square(sigma[K:])
    L = np.linalg.eigvalsh(everything)[-1]
    mu = np.linalg.eigvalsh(V @ everything @ V.T)[0]
    nearest, inside, found = W @ V.T, least(everything), least(seen)
    D = sum(abs(risk(α @ V, everything) - risk(α @ V, seen)) for α in (found, inside))
    assert square(W - found @ V) == pytest.approx(square(nearest - found) + square(W - nearest @ V))
    together = np.sqrt(L * tau / mu) + np.sqrt(2 * D / mu)
    slope = (inside @ V - W) @ everything  # of R at α°V, where it need not be 0
    step = W - inside @ V
    return {
        "a": (square(W - nearest @ V), tau),
        "c": (risk(W, everything) - risk(inside @ V, everything) - (slope * step).sum(),
              L / 2 * square(step)),
        "best": (risk(nearest @ V, everything), L / 2 * tau),
        "d": (square(nearest - inside), L / mu * tau),
        "e": (square(found - inside), 2 / mu * D),
        "together": (np.sqrt(square(nearest - found)), together),
    }  # fmt: skip


def test_what_holds_in_the_place_of_theorem_3_6():
    """On 200 random tasks; and an example for each bound uses nine tenths of it, or more."""
    draw = np.random.default_rng(0)
    for _ in range(200):
        n, K = draw.integers(3, 9), 2
        X = draw.normal(size=(40, n)) * draw.uniform(0.3, 3, size=n)
        stack, C = draw.normal(size=(12, n)), draw.normal(size=(3, 12))
        for part, (left, right) in sides(X, stack, C, K, sample=10).items():
            assert np.isfinite([left, right]).all()
            assert left <= right * (1 + 1000 * np.finfo(float).eps), part
    stack, C = np.diag([2.0, 1.0]), np.array([[0.0, 1.0]])  # V = (1, 0), W* = (0, 1), τ = 1
    even = np.eye(2)
    skewed = np.linalg.cholesky([[0.01, 0.0999], [0.0999, 1.0]]).T  # steep across the subspace
    flat = np.array([*[[1.0, 0.0]] * 999, [1e-3, 1.0]])  # the sample hardly knows α
    tight = {"a c best": (even, 2), "d together": (skewed, 2), "e together": (flat, 1)}
    for parts, (X, sample) in tight.items():
        found = sides(X, stack, C, 1, sample)
        for part in parts.split():
            left, right = found[part]
            assert 0.9 * right < left <= right * (1 + 1000 * np.finfo(float).eps), part


# ---------------------------------------------------------------- papers.md


def test_no_table_and_no_figure_is_missing():
    _, eigen, reflections, resora = CONTENTS.split("\n## ")
    wanted = {eigen: (15, 14), reflections: (7, 4), resora: (6, 4)}
    for part, (tables, figures) in wanted.items():
        cells = " ".join(row[0] for row in table_rows(part))
        for kind, count in (("Table", tables), ("Figure", figures)):
            lists = " ".join(re.findall(rf"{kind}s? ([\d, to]+)", cells))
            spans = re.findall(r"(\d+)(?: to (\d+))?", lists)
            found = {i for a, b in spans for i in range(int(a), int(b or a) + 1)}
            assert found == {*range(1, count + 1)}, (part.splitlines()[0], kind)


def test_the_commands_of_the_contents_are_understood():
    commands = re.findall(r"`python (.+?)`", CONTENTS)
    assert len(commands) > 10
    for command in commands:
        name, *arguments = shlex.split(command.removeprefix("-m figures."))
        if "-m figures." in command:
            assert (FIGURES / f"{name}.py").exists(), command
        else:
            script = importlib.import_module(name.removesuffix(".py"))
            script.complete(common.parse(script.Config, script.PRESETS, arguments))


def test_the_variance_that_components_of_real_adapters_hold():
    data = common.read_json(FIGURES / "adapters.json")
    needed, seen, left_out = [], [], []
    for side in "AB":
        ks, real = data["sides"][side]["ks"], data["sides"][side]["real"]
        needed += [sum(held < share for held in real["spectrum"]) + 1 for share in (0.5, 0.8)]
        seen.append(100 * real["spectrum"][64 - 1])
        left_out.append(100 * statistics.median(held[ks.index(64)] for held in real["held_out"]))
    A, A_most, B, B_most = needed
    assert (
        f"{A} to {A_most} of 448 for A, {B} to {B_most} for B; 64, which hold {seen[0]:.0f} % and"
        f" {seen[1]:.0f} % of all, hold {left_out[0]:.0f} % and {left_out[1]:.0f} % of an adapter"
    ) in CONTENTS
