"""One look for all figures; the statistics and Markdown tables of results files.

python -m figures.plots JSON      draw any results file of the scripts: JSON's name with .png, .md
"""

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from tabulate import tabulate

import common

# ---------------------------------------------------------------- statistics


def summary(runs: list[dict], split: str = "test") -> list[dict]:
    """One entry per row: size, score per task (mean over seeds), mean ± std over seeds."""
    frame, rows = pd.DataFrame(runs), []
    for name, mine in frame.groupby("row", sort=False):
        by_seed = mine.groupby("seed")[split].mean()
        rows.append(
            {
                "row": name,
                "trainable": int(mine["trainable"].iloc[0]),
                "tasks": mine.groupby("task", sort=False)[split].mean().to_dict(),
                "mean": float(by_seed.mean()),
                "std": float(by_seed.std()) if len(by_seed) > 1 else 0.0,
                "seeds": len(by_seed),
            }
        )
    return rows


def over_seeds(data: dict, row: str, field: str) -> tuple[float, float]:
    """Mean and standard deviation over seeds of a field's mean over tasks."""
    runs = [run for run in data["runs"] if run["row"] == row]
    (found,) = summary(runs, field)
    return found["mean"], found["std"]


def points(run: dict) -> float:
    """The test score of a run, × 100."""
    return 100 * run["test"]


def log_loss(run: dict) -> float:
    """Minus the logarithm of a run's training loss, mean over its epochs: higher is faster."""
    return -math.log(np.mean(run["losses"]))


def paired(data: dict, rows: list[str], others: list[str], score: Callable) -> pd.Series:
    """Mean `score` of `rows` minus that of `others`, for every task and seed."""
    scored = [{**run, "score": score(run)} for run in data["runs"]]
    runs = pd.DataFrame(scored, columns=["row", "task", "seed", "score"])
    pairs = ["task", "seed"]
    ours = runs[runs["row"].isin(rows)].groupby(pairs, sort=False)["score"].mean()
    theirs = runs[runs["row"].isin(others)].groupby(pairs, sort=False)["score"].mean()
    if set(ours.index) != set(theirs.index):
        raise ValueError(f"found runs of {rows} that have no pair among {others}, or the reverse")
    return ours - theirs.reindex(ours.index)


def bootstrap(differences: pd.Series) -> tuple[float, float, float]:
    """The mean of paired differences and its 95 % percentile bootstrap interval."""
    values = differences.to_numpy()
    found = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=0)
    low, high = found.confidence_interval
    return float(values.mean()), float(low), float(high)


def gain(
    data: dict, rows: list[str], others: list[str], score: Callable[[dict], float]
) -> tuple[float, float, float]:
    """Mean `score` of `rows` minus that of `others`, paired by task and seed; its 95 % interval."""
    return bootstrap(paired(data, rows, others, score))


def verdict(differences: pd.Series, least: float = 0.0) -> str:
    """What paired differences say of the claim that their mean is above `least`."""
    tasks = differences.index.get_level_values("task").nunique()
    seeds = differences.index.get_level_values("seed").nunique()
    if tasks < 5 or seeds < 2:
        return f"no verdict: {tasks} tasks, {seeds} seed(s)"
    _, low, high = bootstrap(differences)
    if low > least:
        return "supported here"
    return "not supported here" if high < least else "undecided"


def judge(
    data: dict,
    claim: str,
    rows: list[str],
    others: list[str],
    score: Callable[[dict], float] = points,
    least: float = 0.0,
) -> tuple[str, str, str]:
    """The claim that `rows` beat `others` by more than `least`: (claim, difference, verdict).

    The difference, with its 95 % interval, is in points, or for `log_loss` in per cent.
    """
    differences = paired(data, rows, others, score)
    (mean, low, high), unit = bootstrap(differences), "points"
    if score is log_loss:
        mean, low, high = (100 * (math.exp(-x) - 1) for x in (mean, high, low))
        unit = "% training loss (− is faster)"
    found = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] {unit}"
    return claim, found, verdict(differences, least)


# ---------------------------------------------------------------- tables


def markdown(rows: list[list[str]], heads: list[str], left: int = 1) -> str:
    """A Markdown table of strings; all but the first `left` columns are flush right."""
    sides = ["left" if i < left else "right" for i in range(len(heads))]
    return tabulate(rows, heads, "pipe", colalign=sides, disable_numparse=True)


def claims_table(claims: list[tuple[str, str, str]]) -> str:
    """What `judge` returned for each claim, as a Markdown table."""
    return markdown(claims, ["claim", "difference, 95 % interval", "verdict"], left=3)


def as_table(rows: list[dict]) -> str:
    """The rows of `summary` as a Markdown table, scores in per cent."""
    lines = []
    for r in rows:
        scores = [f"{100 * score:.1f}" for score in r["tasks"].values()]
        spread = "(n = 1)" if r.get("seeds") == 1 else f"± {100 * r['std']:.1f}"
        last = f"{100 * r['mean']:.1f} {spread}"
        lines.append([r["row"], f"{r['trainable']:,}", *scores, last])
    return markdown(lines, ["", "trainable", *rows[0]["tasks"], "mean ± std"])


# ---------------------------------------------------------------- drawing


def plotting():
    """matplotlib.pyplot, drawing to files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure, source: str | Path) -> Path:
    """Save a figure as PNG beside the JSON it was drawn from; returns its path."""
    target = Path(source).with_suffix(".png")
    with common.replacing(target) as temporary:
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})
    plotting().close(figure)
    return target


def bars(axes, rows: list[dict], colours: list[str] | None = None) -> None:
    """A bar per row of `summary`: mean ± std over seeds, and a stroke per task.

    colours: of the bars; by default dark for ours.
    """
    ours = ("EigenLoRAx", "HRA", "ReSoRA")
    dark = ["0.45" if any(name in r["row"] for name in ours) else "0.8" for r in rows]
    axes.barh(
        range(len(rows)),
        [100 * r["mean"] for r in rows],
        xerr=[100 * r["std"] for r in rows],
        color=colours or dark,
        capsize=3,
    )
    for i, r in enumerate(rows):
        scores = [100 * score for score in r["tasks"].values()]
        axes.plot(scores, [i] * len(scores), "|", color="black", markersize=8)
    axes.set_yticks(range(len(rows)), [f"{r['row']}  ({r['trainable']:,})" for r in rows])
    axes.invert_yaxis()
    axes.set_ylabel("method (trained numbers, head apart)")


def sweep(axes, data: dict, rows: Mapping[str, str], lora: str) -> None:
    """HRA's score at each {value: row}, mean ± std over seeds; lines for LoRA, OFT and BOFT."""
    found = [over_seeds(data, row, "test") for row in rows.values()]
    means, stds = ([100 * x for x in values] for values in zip(*found, strict=True))
    axes.errorbar(range(len(rows)), means, stds, fmt="D-", color="0.45", capsize=2, label="HRA")
    for other, style in {lora: "-.", "OFT": (0, (1, 3)), "BOFT": (0, (5, 5))}.items():
        height = 100 * over_seeds(data, other, "test")[0]
        axes.axhline(height, color="black", linewidth=0.8, linestyle=style, label=other)
    axes.set_xticks(range(len(rows)), rows)
    axes.set_ylabel("score × 100, mean ± std")
    axes.legend(frameon=False, fontsize="small")


def draw_bars(
    source: str | Path, label: str, title: str, more: str = "", colours: list[str] | None = None
) -> Path:
    """Draw a results file's rows as `bars` over `label`, write them, then `more`, as Markdown.

    Both go beside the file; returns the path of the PNG.
    """
    rows = common.read_json(source)["rows"]
    Path(source).with_suffix(".md").write_text(f"{as_table(rows)}\n{more}", encoding="utf-8")
    figure, axes = plotting().subplots(figsize=(8, 0.42 * len(rows) + 1.2), layout="constrained")
    bars(axes, rows, colours)
    axes.set_xlabel(f"{label} (bar: mean ± std over seeds; strokes: the tasks)")
    axes.set_title(title, fontsize="medium", loc="right")
    return save_figure(figure, source)


def draw_rates(source: str | Path) -> Path:
    """Draw what `tune` wrote: validation score against learning rate, a line per row."""
    data = common.read_json(source)
    plt = plotting()
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, (name, scores) in enumerate(data["validation"].items()):
        rates = sorted(map(float, scores))
        heights = [100 * scores[str(rate)] for rate in rates]
        grey = str(0.7 * (i % 3) / 2)
        axes.plot(rates, heights, "os^D*"[i % 5], linestyle=("-", "--", ":")[i % 3], color=grey)
        axes.lines[-1].set_label(f"{name}: {data['chosen'][name]:g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation score in %, mean of tasks")
    axes.set_title("Each method at the learning rate that validation chose", fontsize="medium")
    figure.legend(loc="outside right", frameon=False, fontsize="small")
    return save_figure(figure, source)


def draw(source: str | Path) -> Path:
    """Draw any results file: a bar per row, in its method's colour."""
    data = common.read_json(source)
    methods = {run["row"]: run["method"] for run in data["runs"]}
    known = {key: method.colour for key, method in common.METHODS.items()}
    colours = [known.get(methods[r["row"]], "0.8") for r in data["rows"]]
    seeds = len({run["seed"] for run in data["runs"]})
    where = Path(data["config"]["data"]).name
    return draw_bars(source, "test score × 100", f"{where}, n = {seeds} seed(s)", colours=colours)


if __name__ == "__main__":
    print(draw(sys.argv[1]))
