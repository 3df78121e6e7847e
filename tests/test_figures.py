"""figures/: what is measured, quickly; the page is its JSON's; the look of each figure."""

import importlib
import math
import re
import subprocess
import sys

import pandas as pd
import pytest
import torch

import common
import train_glue
import train_vit
from figures import adapters, costs, page, plots, runs
from tests.claims import ROOT

FIGURES = ROOT / "figures"


# ---------------------------------------------------------------- the page


def text() -> str:
    return page.PAGE.read_text(encoding="utf-8")


def test_the_page_is_what_the_committed_results_say():
    assert page.filled(text()) == text()


def test_the_page_has_no_measured_number_but_those_it_is_given():
    prose = re.sub(r"```.*?```", "", page.PART.sub("", text()), flags=re.S)
    assert re.findall(r"\d+\.\d+|\d+ %|± ?\d", prose) == []


def test_the_page_shows_every_figure_and_its_links_resolve():
    links = re.findall(r"\]\(([^)]+)\)", text())
    assert [link for link in links if not (FIGURES / link).exists()] == []
    drawn = {path.name for path in FIGURES.glob("*.png")}
    assert drawn <= set(links)


def test_a_part_of_the_page_is_made_anew():
    name = "costs.said_hra costs"
    made = page.filled(f"before\n<!-- {name} -->\n\nold\n\n<!-- end -->\nafter")
    said = costs.said_hra(common.read_json(FIGURES / "costs.json"))
    assert made == f"before\n<!-- {name} -->\n\n{said}\n\n<!-- end -->\nafter"


# ---------------------------------------------------------------- costs


def test_calls_take_turns_and_the_first_round_is_not_counted(monkeypatch):
    made, clock = [], [0.0]
    monkeypatch.setattr(costs.time, "perf_counter", lambda: clock[0])

    def call(name: str):
        made.append(name)
        clock[0] += len(made)

    found = costs.timed({"a": lambda: call("a"), "b": lambda: call("b")}, rounds=3)
    assert "".join(made) == "ab" + "ba" + "ab" + "ba"
    assert found == {"a": [4.0, 5.0, 8.0], "b": [3.0, 6.0, 7.0]}


def test_a_ratio_is_the_median_of_the_quotients_within_a_round():
    seconds = {"x": [1.0, 2.0, 4.0], "y": [3.0, 4.0, 20.0]}
    x, y = costs.compared("case", seconds, "x")
    assert (x["ratio"], x["range"]) == (1.0, [1.0, 1.0])
    assert (y["ratio"], y["range"], y["seconds"]) == (3.0, [2.0, 5.0], 4.0)
    twenty = {"x": [1.0] * 20, "y": [float(i) for i in range(20)]}
    assert costs.compared("case", twenty, "x")[1]["range"] == [2.0, 17.0]


def test_what_is_saved_for_backward_is_counted_once_and_without_parameters():
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)
    assert costs.saved(layer, x) == 4 * 4 * 8  # x: the weight is a parameter
    squared = torch.nn.Sequential(layer, torch.nn.Tanh(), torch.nn.Tanh())
    assert costs.saved(squared, x) == 3 * 4 * 4 * 8  # x and both outputs


def test_the_board_compares_with_the_committed_ratios():
    row = {"case": "c", "contender": "us", "reference": "they", "ratio": 1.5}
    row["range"] = [1.25, 1.75]
    before = {"p": {"rows": [{**row, "ratio": 1.4}, {**row, "contender": "they"}]}}
    table = costs.beside({"p": {"rows": [row, {**row, "contender": "more"}]}}, before)
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert cells[0] == ["p", "c", "us / they", "1.50", "1.25", "1.75", "1.40"]
    assert cells[1][-1] == "new"


def test_everything_is_measured_by_the_command_that_make_bench_calls(tmp_path):
    out = tmp_path / "costs.json"
    launch = [sys.executable, "-m", "figures.costs", "--measure", "--quick", "--out", str(out)]
    done = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    data, committed = common.read_json(out), common.read_json(costs.HERE)
    for part, measured in data.items():
        assert measured["plan"] == costs.QUICK[part]
        assert committed[part]["plan"] == costs.FULL[part]
        rows = measured["rows"]
        assert all(0 < row.get("ratio", 1) < math.inf for row in rows)
        assert all(row["ratio"] == 1 for row in rows if row["contender"] == row.get("reference"))
        known = {row["contender"] for row in committed[part]["rows"]}
        assert known - {row["contender"] for row in rows} <= {"vlora", "lorashare"}
    assert out.with_suffix(".png").exists() and "committed" in done.stdout


# ---------------------------------------------------------------- real adapters


def test_components_hold_what_adapters_share_and_no_more():
    torch.manual_seed(0)
    shared = torch.linalg.qr(torch.randn(32, 4)).Q.T
    alike = [torch.randn(2, 4) @ shared for _ in range(6)]
    found = adapters.energies(alike, [1, 4])
    eps = torch.finfo(torch.float32).eps
    assert torch.isfinite(found["spectrum"]).all()
    assert found["held_out"].shape == (6, 2)
    assert (1 - found["held_out"][:, 1]).abs().max() < 64 * eps
    assert found["error"][1] < (64 * eps) ** 0.5
    noise = adapters.noise_like(alike)
    assert all(torch.isclose(z.norm(), x.norm()) for z, x in zip(noise, alike, strict=True))
    assert adapters.energies(noise, [4])["held_out"].max() < 0.9
    assert torch.allclose(adapters.cosines([alike[0], -2 * alike[0]]), torch.tensor([-1.0]))


# ---------------------------------------------------------------- runs


def made_up(config, rows: list[dict], tasks: list[str], **more) -> dict:
    """Results of every row of a table, with what its figure may ask for."""
    found = []
    for spec in common.specify(
        rows, dict.fromkeys((r.get("rate", r["row"]) for r in rows), 0.1), tasks, [0, 1]
    ):
        score = (len(found) % 7 + 1) / 10
        result = {"trainable": 7, "losses": [1.0], "validation": score, "test": score}
        found.append({**spec, **result, "source": score, "orthogonality": 1.0})
    settings = {"data": config.data, "table": config.table, "rows": []}
    return {"config": settings, "rows": plots.summary(found), "runs": found, **more}


@pytest.mark.parametrize("script", [train_vit, train_glue], ids=lambda s: s.__name__)
@pytest.mark.parametrize(
    "table", ["eigenlorax", "eigenlorax-ablation", "hra", "resora", "resora-lambda", "all", "noise"]
)
def test_every_table_of_the_scripts_is_drawn(script, table, tmp_path):
    if table not in script.TABLES:
        pytest.skip("a table of the other script")
    config = script.complete(script.Config(table=table, jobs=1))
    rows, _ = script.rows_and_rates(config)
    eye = [[[1.0, 0.0], [0.0, 1.0]]]
    more = {"correlations": dict.fromkeys((r["row"] for r in rows), eye)}
    if (script, table) != (train_vit, "resora"):
        more = {}
    file = tmp_path / "a.json"
    common.write_json(file, made_up(config, rows, ["a", "b"], **more))
    assert runs.draw(file).exists()
    rows = common.read_json(file)["rows"]
    assert plots.as_table(rows) in runs.table(common.read_json(file))


def test_the_best_value_is_the_smallest_of_equals_and_edges_are_named():
    assert runs.best({0.1: 0.5, 1.0: 0.7, 10.0: 0.7}) == 1.0
    scores = {"LoRA": {"0.1": 0.9, "1": 0.2}, "HRA": {"0.1": 0.1, "1": 0.2, "3": 0.1}}
    scores["OFT"] = {"0.1": 0.2, "1": 0.9}
    said = runs.said_choices({"validation": scores})
    assert said == "Chosen at an edge of the grid: LoRA; OFT."


def test_a_difference_is_paired_by_task():
    rows = [("r", "x", 0, 0.5), ("r", "x", 1, 0.7), ("r", "y", 0, 0.9), ("r", "y", 1, 0.9)]
    rows += [("c", "x", 0, 0.4), ("c", "x", 1, 0.4), ("c", "y", 0, 1.0), ("c", "y", 1, 0.9)]
    found = pd.DataFrame(rows, columns=["row", "task", "seed", "test"]).to_dict("records")
    wanted = {"x": pytest.approx(20.0), "y": pytest.approx(-5.0)}
    assert runs.differences({"runs": found}, "r", "c") == wanted


def test_tables_of_digits_have_one_backbone_or_say_that_they_are_old():
    found = {}
    for file in sorted(FIGURES.glob("vit_*.json")):
        data = common.read_json(file)
        if "runs" in data and data["config"]["data"] == "digits":
            found[file.name] = data.get("weights")
            assert (runs.OLD in runs.where(data)) == (found[file.name] is None)
    assert len(set(found.values()) - {None}) == 1, found


# ---------------------------------------------------------------- the look


def test_names_of_lines_are_moved_apart_in_their_order():
    figure, axis = plots.canvas(3)
    axis.set_ylim(0, 10)
    lines = [("b", 5.0, "red"), ("a", 5.0, "red"), ("c", 9.5, "red"), ("d", 9.6, "red")]
    plots.name_lines(axis, lines, gap=0.2)
    heights = {t.get_text(): round(t.xy[1], 6) for t in axis.texts}
    assert heights == {"a": 0.4, "b": 0.6, "c": 0.8, "d": 1.0}
    plots.plotting().close(figure)


@pytest.mark.parametrize("name", sorted(path.stem for path in FIGURES.glob("*.png")))
def test_a_figure_is_as_wide_as_a_readme_and_has_its_script(name):
    from PIL import Image

    with Image.open(FIGURES / f"{name}.png") as image:
        assert image.width == round(150 * plots.WIDTH)
    assert hasattr(importlib.import_module(f"figures.{plots.script(name)}"), "draw")


def test_a_method_has_one_colour_by_its_key_and_by_its_rows_name():
    for key, method in common.METHODS.items():
        assert plots.colour(key) == plots.colour(f"{method.name} r=8") == method.colour
    assert plots.colour("nobody") == "0.4"
