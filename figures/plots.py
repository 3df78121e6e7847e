"""One look for all figures; the tables of results files."""

import textwrap
from pathlib import Path

import pandas as pd
from tabulate import tabulate

import common

# ---------------------------------------------------------------- tables


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


def over_seeds(data: dict, row: str, field: str = "test") -> tuple[float, float]:
    """Mean and standard deviation over seeds of a field's mean over tasks."""
    (found,) = summary([run for run in data["runs"] if run["row"] == row], field)
    return found["mean"], found["std"]


def percent(row: dict) -> str:
    """Mean ± std over seeds of a row of `summary`, in per cent; of one seed, no spread."""
    spread = "(n = 1)" if row.get("seeds") == 1 else f"± {100 * row['std']:.1f}"
    return f"{100 * row['mean']:.1f} {spread}"


def markdown(rows: list[list[str]], heads: list[str], left: int = 1) -> str:
    """A Markdown table of strings; all but the first `left` columns are flush right."""
    sides = ["left" if i < left else "right" for i in range(len(heads))]
    return tabulate(rows, heads, "pipe", colalign=sides, disable_numparse=True)


def as_table(rows: list[dict]) -> str:
    """The rows of `summary` as a Markdown table, scores in per cent."""
    lines = []
    for row in rows:
        scores = [f"{100 * score:.1f}" for score in row["tasks"].values()]
        lines.append([row["row"], f"{row['trainable']:,}", *scores, percent(row)])
    return markdown(lines, ["", "trainable", *rows[0]["tasks"], "mean ± std"])


# ---------------------------------------------------------------- the look

WIDTH = 8.3  # inches; a README shows a picture at about 830 pixels, so that 10 points are 14 pixels
LOOK = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.92",
    "figure.titlesize": 11,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def plotting():
    """matplotlib.pyplot, drawing to files, in this look."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(LOOK)
    return pyplot


def canvas(height: float, rows: int = 1, columns: int = 1, **options):
    """(figure, axes): as wide as a README; height in inches."""
    size = (WIDTH, height)
    return plotting().subplots(rows, columns, figsize=size, layout="constrained", **options)


def headline(figure, text: str) -> None:
    """What a figure says, above it."""
    figure.suptitle(textwrap.fill(text, 92), x=0.01, ha="left")


def save_figure(figure, source: str | Path) -> Path:
    """Save a figure as PNG beside the JSON it was drawn from; returns its path."""
    target = Path(source).with_suffix(".png")
    with common.replacing(target) as temporary:
        figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})
    plotting().close(figure)
    return target


def colour(method: str) -> str:
    """A method's colour, by its key in METHODS or by how its row's name begins; grey if none."""
    if method in common.METHODS:
        return common.METHODS[method].colour
    known = [entry for entry in common.METHODS.values() if method.startswith(entry.name)]
    return known[0].colour if known else "0.4"


def ink(shade: str) -> tuple[float, ...]:
    """A colour, darker: yellow is no colour for letters."""
    from matplotlib.colors import to_rgb

    return tuple(0.7 * part for part in to_rgb(shade))


def name_lines(axis, lines: list[tuple[str, float, str]], gap: float = 0.09) -> None:
    """Write each line's name at the right of the axis, at its last height, in its colour.

    lines: (name, height, colour); names are moved until `gap` of the axis is between them. The
    limits of the axis are final by now.
    """
    to_axis = axis.transData + axis.transAxes.inverted()
    places = sorted((to_axis.transform((1, y))[1], name, shade) for name, y, shade in lines)
    heights, lowest, highest = [], -1.0, 1.0
    for place, *_ in places:
        lowest = max(place, lowest + gap)
        heights.append(lowest)
    for i in reversed(range(len(heights))):  # down again, where they have left the axis
        highest = min(heights[i], highest)
        heights[i] = highest
        highest -= gap
    for height, (_, name, shade) in zip(heights, places, strict=True):
        beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        axis.annotate(name, (1, height), xycoords="axes fraction", color=ink(shade), **beside)


def dot(axis, place: float, middle: float, span: list[float], shade: str, **style) -> None:
    """A dot at `middle` on line `place`, and its range."""
    axis.plot(span, [place, place], color=shade, linewidth=2, alpha=0.6)
    axis.plot(middle, place, "o", color=shade, markersize=7, markeredgecolor="0.2", **style)


def name_rows(axis, names: list[str], values: list[str]) -> None:
    """The rows' names at the left, from the top down, and their values at the right."""
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    for place, value in enumerate(values):
        beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        axis.annotate(value, (1, place), xycoords=axis.get_yaxis_transform(), **beside)


def script(name: str) -> str:
    """The script that draws figures/NAME.png: NAME.py, or runs.py where there is none."""
    return name if Path(__file__).with_name(f"{name}.py").exists() else "runs"
