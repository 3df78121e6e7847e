"""Tables of runs: draws NAME.png from any results file that train_vit.py or train_glue.py wrote.

python -m figures.runs [JSON …]      by default vit_….json and glue_….json beside this file

A results file with a sweep is drawn as lines, one with chosen learning rates or λ as small panels,
ReSoRA's as differences to its control, and any other as a dot for each row.
"""

import statistics
import sys
from pathlib import Path

import pandas as pd

import common
from figures import plots
from resora import METRICS

# ---------------------------------------------------------------- what is in a file

OLD = "; of the code before version 2"  # whose results do not name their backbone's weights


def where(data: dict) -> str:
    """The data, the number of seeds, and what the reader must know of old results."""
    name = {"docs": "docstrings"}.get(data["config"]["data"], data["config"]["data"])
    old = "" if "weights" in data else OLD
    return f"{name}, seeds: {len({run['seed'] for run in data['runs']})}{old}"


def colours(data: dict) -> dict[str, str]:
    """The colour of each row: its method's."""
    return {run["row"]: plots.colour(run.get("method", run["row"])) for run in data["runs"]}


def table(data: dict) -> str:
    """Every row by task, folded away."""
    rows = plots.as_table(data["rows"])
    return f"<details><summary>Every row, by task ({where(data)})</summary>\n\n{rows}\n\n</details>"


# ---------------------------------------------------------------- a dot for each row


def equals(data: dict) -> str:
    """The rows that train as much as EigenLoRAx, best first: what a figure is easily silent of."""
    size = {row["row"]: row["trainable"] for row in data["rows"]}.get("EigenLoRAx")
    alike = [row for row in data["rows"] if row["trainable"] == size]
    if not alike:
        return where(data)
    alike.sort(key=lambda row: -row["mean"])
    found = ", ".join(f"{row['row']} {100 * row['mean']:.1f}" for row in alike)
    return f"With {size:,} trained numbers: {found}"


def draw_dots(data: dict):
    """A dot for each row: mean over tasks and seeds; strokes: the tasks."""
    rows, shades = data["rows"], colours(data)
    figure, axis = plots.canvas(0.26 * len(rows) + 1.3)
    for place, row in enumerate(rows):
        mean, spread, shade = 100 * row["mean"], 100 * row["std"], shades[row["row"]]
        tasks = [100 * score for score in row["tasks"].values()]
        axis.plot(tasks, [place] * len(tasks), "|", color=shade, markersize=9)
        plots.dot(axis, place, mean, [mean - spread, mean + spread], shade)
    names = [f"{row['row']}  ({row['trainable']:,})" for row in rows]
    plots.name_rows(axis, names, [plots.percent(row) for row in rows])
    axis.set_xlabel(
        "test score × 100 (dot: mean; line: ± std over seeds; strokes: the tasks)\n"
        f"{where(data)}; in brackets: trained numbers, head apart"
    )
    plots.headline(figure, equals(data))
    return figure


# ---------------------------------------------------------------- sweeps


def numbered(pattern: str, values) -> dict[str, str]:
    """{value: the row that is called like it}."""
    return {str(value): pattern.format(value) for value in values}


LAMBDAS = ("0", "1e-6", "1e-5", "1e-4", "1e-3", "1e-2", "1e-1", "∞")
HRA = {f"HRA r={r}": numbered(f"HRA r={r}, λ={{}}", LAMBDAS) for r in (8, 4, 2)}
SIZES, FEW = (1, 2, 4, 8, 12, 16, 20), (1, 2, 3, 4)
BY_K = {"recycled": numbered("K={}", SIZES), "random": numbered("K={}, random", SIZES)}
BY_RANK = {"1": "K=16, r=1", "2": "K=16, r=2", "4": "K=16", "8": "K=16, r=8"}
BY_COUNT = {"recycled": numbered("{} recycled", FEW)}
BY_COUNT["augmented to 20"] = numbered("{} recycled, augmented", FEW)
BY_NOISE = {"0": "K=16", **numbered("noise {} %", (5, 15, 30, 100))}
NEW, OLD_TASK = ("test", "the new task: score × 100"), ("source", "the old task: score × 100")
SWEEPS = {  # table: [(what varies, (field, title), {line: {value: row}})]
    "hra": [("λ", NEW, HRA), ("λ", OLD_TASK, HRA)],
    "eigenlorax-ablation": [
        ("K, components, at r = 4", NEW, BY_K),
        ("r, rank, at K = 16", NEW, {"recycled": BY_RANK}),
        ("n, recycled adapters, K = 4·n", NEW, BY_COUNT),
        ("noise in the adapters, in % of their rms", NEW, {"recycled": BY_NOISE}),
    ],
}
BESIDE = {
    "hra": ("LoRA r=1", "LoRA r=2", "LoRA r=4", "OFT", "BOFT"),
    "eigenlorax-ablation": ("LoRA r=4", "VeRA"),
}
DASHES = ("-", "--", ":")


def draw_curves(axis, data: dict, field: str, curves: dict[str, dict[str, str]]) -> list[tuple]:
    """A line for each curve: mean over tasks and seeds; returns what `name_lines` takes."""
    shades, ends = colours(data), []
    places = [x for curve in curves.values() for x, row in curve.items() if row in shades]
    places = list(dict.fromkeys(places))
    for (name, rows), dash in zip(curves.items(), DASHES, strict=False):
        rows = {x: row for x, row in rows.items() if row in shades}
        heights = [100 * plots.over_seeds(data, row, field)[0] for row in rows.values()]
        shade = shades[next(iter(rows.values()))]
        axis.plot([places.index(x) for x in rows], heights, f"o{dash}", color=shade, markersize=4)
        ends.append((name, heights[-1], shade))
    axis.set_xticks(range(len(places)), places)
    return ends


def draw_sweeps(data: dict, panels: list[tuple], beside: tuple[str, ...]):
    """A panel for each thing that varies; rows that do not vary are horizontal lines."""
    panels = [panel for panel in panels if panel[1][0] in data["runs"][0]]
    columns, lines = min(2, len(panels)), (len(panels) + 1) // 2
    share = "row" if len({measured for _, measured, _ in panels}) == 1 else "none"
    figure, axes = plots.canvas(2.9 * lines + 0.3, lines, columns, sharey=share, squeeze=False)
    names, shades = [], colours(data)
    beside = [row for row in beside if row in shades]  # each script has its own
    for axis, (varied, (field, title), curves) in zip(axes.flat, panels, strict=True):
        ends = draw_curves(axis, data, field, curves)
        for row in beside:
            height = 100 * plots.over_seeds(data, row, field)[0]
            axis.axhline(height, color=shades[row], linewidth=1)
            ends.append((row, height, shades[row]))
        axis.set(xlabel=varied, title=title)
        names.append(ends)
    for axis, ends in zip(axes.flat, names, strict=True):  # now that the limits are final
        plots.name_lines(axis, ends)
    plots.headline(figure, f"Mean over tasks: {where(data)}")
    return figure


# ---------------------------------------------------------------- what validation chose


def choices(data: dict) -> dict[str, dict[float, float]]:
    """{row: {learning rate, or λ: validation score}}."""
    if "validation" in data:
        return {
            row: {float(rate): score for rate, score in scores.items()}
            for row, scores in data["validation"].items()
        }
    found = {}
    for row in data["rows"]:
        name, _, lam = row["row"].removeprefix("r=4, ").rpartition(", λ=")
        if name:
            score = plots.over_seeds(data, row["row"], "validation")[0]
            found.setdefault(name, {})[float(lam)] = score
    return found


def best(scores: dict[float, float]) -> float:
    """The value of the best score; the smallest of equals."""
    return min(scores, key=lambda value: (-scores[value], value))


def at_edge(scores: dict[float, float]) -> bool:
    """Whether the best value is the first or the last of those that were tried."""
    return best(scores) in (min(scores), max(scores))


def draw_choices(data: dict):
    """A small panel for each row: its scores, the best circled, and flagged at an edge."""
    found, columns = choices(data), 4
    lines = -(-len(found) // columns)
    figure, axes = plots.canvas(1.75 * lines + 0.6, lines, columns, sharex=True, sharey=True)
    for i, (axis, (name, scores)) in enumerate(zip(axes.flat, found.items(), strict=False)):
        x, chosen = sorted(scores), best(scores)
        shade = plots.colour(name if "validation" in data else "resora")
        axis.plot(x, [100 * scores[value] for value in x], "o-", color=shade)
        ring = {"color": "black", "markersize": 13, "fillstyle": "none", "clip_on": False}
        axis.plot(chosen, 100 * scores[chosen], "o", **ring)
        axis.set_title(f"{name}\n{chosen:g}{' (edge)' * at_edge(scores)}")
        axis.set(xscale="log")
        axis.tick_params(labelbottom=i >= len(found) - columns)
    for axis in axes.flat[len(found) :]:
        axis.remove()
    what = "learning rate" if "validation" in data else "λ"
    figure.supxlabel(what, fontsize=10)
    figure.supylabel("validation score × 100", fontsize=10)
    edges = sum(map(at_edge, found.values()))
    text = f"{edges} of {len(found)} chosen values are at an edge of their grid"
    plots.headline(figure, text if "weights" in data else text + OLD)
    return figure


def said_choices(data: dict) -> str:
    """What was chosen at an edge of its grid."""
    edges = [name for name, scores in choices(data).items() if at_edge(scores)]
    return f"Chosen at an edge of the grid: {'; '.join(edges) or 'nothing'}."


# ---------------------------------------------------------------- ReSoRA beside its control


def differences(data: dict, row: str, control: str) -> dict[str, float]:
    """{task: points that a row has more than its control}, paired by seed, mean over seeds."""
    frame = pd.DataFrame(data["runs"])
    ours, theirs = (
        frame[frame["row"] == name].groupby("task", sort=False)["test"].mean()
        for name in (row, control)
    )
    return (100 * (ours - theirs)).to_dict()


def draw_differences(data: dict):
    """A panel for each rank: the points that each second stage has more than the one without R."""
    ranks = sorted({run["rank"] for run in data["runs"]})
    kinds = ["re-gauged", "linear, one stage"]
    kinds += [f"{metric}, {level}" for metric in METRICS for level in ("feature", "weight")]
    known = {row["row"] for row in data["rows"]}
    figure, axes = plots.canvas(3.8, 1, len(ranks), sharey=True, sharex=True)
    for axis, r in zip(axes, ranks, strict=True):
        for place, kind in enumerate(kinds):
            if f"r={r}, {kind}" in known:
                found = differences(data, f"r={r}, {kind}", f"r={r}, λ=0").values()
                mean = statistics.fmean(found)
                shade = "0.6" if kind == "re-gauged" else plots.colour("resora")
                axis.plot(list(found), [place] * len(found), "|", color=shade, markersize=9)
                plots.dot(axis, place, mean, [mean, mean], shade)
        axis.axvline(0, color="0.2", linewidth=0.8)
        plots.name_rows(axis, kinds, [])
        axis.set_title(f"r = {r}")
    figure.supxlabel(
        "points more than the second stage with λ = 0 (dot: mean; strokes: the tasks)", fontsize=10
    )
    plots.headline(
        figure, f"ReSoRA's second stage against the same epochs without R: {where(data)}"
    )
    return figure


def repeated(data: dict, row: str) -> float:
    """Mean squared correlation of two components' codes, over layers."""
    found = []
    for matrix in data["correlations"][row]:
        found += [v for i, line in enumerate(matrix) for j, v in enumerate(line) if i != j]
    return statistics.fmean(found)


def said_resora(data: dict) -> str:
    """What the linear metric does at r = 4."""
    gains = []
    for r in (2, 4, 8):
        gain = differences(data, f"r={r}, linear, feature", f"r={r}, λ=0").values()
        gains.append(f"{statistics.fmean(gain):+.1f} at r = {r}")
    before, after = (repeated(data, f"r=4, {arm}") for arm in ("λ=0", "linear, feature"))
    return (
        f"Mean difference of the linear metric to λ = 0, in points: {', '.join(gains)}. The squared"
        f" correlation of two components' codes is {after:.3f} with it and {before:.3f} without"
        f" (r = 4)."
    )


# ---------------------------------------------------------------- any of them


def draw(source: str | Path) -> Path:
    """Draw the figure beside its JSON; returns the path of the PNG."""
    data = common.read_json(source)
    name = "" if data["config"].get("rows") else data["config"].get("table")
    if "validation" in data or name == "resora-lambda":
        figure = draw_choices(data)
    elif name in SWEEPS:
        figure = draw_sweeps(data, SWEEPS[name], BESIDE[name])
    elif "correlations" in data:
        figure = draw_differences(data)
    else:
        figure = draw_dots(data)
    return plots.save_figure(figure, source)


if __name__ == "__main__":
    here = Path(__file__).parent
    for file in sys.argv[1:] or sorted([*here.glob("vit_*.json"), *here.glob("glue_*.json")]):
        print(draw(file))
