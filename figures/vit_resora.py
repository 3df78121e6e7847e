"""Draw vit_resora.png and .md from vit_resora.json: ReSoRA's second stage beside its controls.

python -m figures.vit_resora [JSON]
The JSON is written by train_vit.py --table resora --out figures/vit_resora.json.
"""

import sys
from pathlib import Path

import common
from figures import plots
from resora import METRICS

RANKS = (2, 4, 8)


def claims(data: dict) -> list[tuple[str, str, str]]:
    """What was asked, the paired difference, and what it says."""
    levels, others = ("feature", "weight"), [m for m in METRICS if m != "linear"]
    asked = [
        ("R on the second stage beats the same epochs without", "linear, feature", ["λ=0"]),
        ("linear is the best metric", "linear, feature", [f"{m}, feature" for m in others]),
        ("control: re-gauging by SVD beats doing nothing", "re-gauged", ["λ=0"]),
        ("open: two stages beat one with a warm-up of λ", "linear, feature", ["linear, one stage"]),
    ]
    lines = [
        (f"{q}, r={r}", [f"r={r}, {a}"], [f"r={r}, {b}" for b in bs])
        for q, a, bs in asked
        for r in RANKS
    ]
    both = [[f"r=4, {m}, {level}" for m in METRICS] for level in levels]
    lines.insert(len(RANKS), ("feature level beats weight level (four metrics), r=4", *both))
    return [plots.judge(data, *line) for line in lines]


def verdicts(data: dict) -> str:
    """`claims` as a Markdown table."""
    return plots.claims_table(claims(data)) + "\n"


def draw(source: str | Path) -> Path:
    """Draw the figure and write the table beside their JSON; returns the path of the PNG."""
    data = common.read_json(source)
    Path(source).with_suffix(".md").write_text(verdicts(data), encoding="utf-8")
    plt = plots.plotting()
    figure = plt.figure(figsize=(11, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 2))
    panels = top.subplots(1, len(RANKS), sharex=True)
    for axes, rank in zip(panels, RANKS, strict=True):
        names = [r["row"] for r in data["rows"] if r["row"].startswith(f"r={rank}, ")]
        names = [n for n in names if not n.endswith(("stage 1", "λ=0"))]
        for i, name in enumerate(names):
            mean, low, high = plots.gain(data, [name], [f"r={rank}, λ=0"], plots.points)
            axes.plot([low, high], [i, i], "k-")
            axes.plot(mean, i, "ko")
        axes.axvline(0, color="0.6", linewidth=0.8)
        axes.set_yticks(range(len(names)), [n.partition(", ")[2] for n in names])
        axes.invert_yaxis()
        axes.set_title(f"r = {rank}", fontsize="medium")
        axes.set_xlabel("points more than with λ = 0")
    top.suptitle("Second stage with ReSoRA against the same epochs without: mean, 95 % interval")
    arms = {"stage 1": "before", "λ=0": "λ = 0", "linear, feature": "linear metric"}
    layers = len(data["correlations"]["r=4, λ=0"])
    grid = bottom.subplots(len(arms), layers, squeeze=False)
    for row, (arm, label) in zip(grid, arms.items(), strict=True):
        for i, (axes, matrix) in enumerate(
            zip(row, data["correlations"][f"r=4, {arm}"], strict=True)
        ):
            image = axes.imshow(matrix, cmap="gray_r", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            if i == 0:
                axes.set_ylabel(label, rotation=0, ha="right", va="center")
            if label == "linear metric":
                axes.set_xlabel(
                    f"layer {i // 2}, {'query' if i % 2 == 0 else 'value'}", fontsize="small"
                )
    bottom.colorbar(image, ax=grid, label="squared correlation")
    bottom.suptitle("Squared correlation of the codes, r = 4: components against components")
    return plots.save_figure(figure, source)


if __name__ == "__main__":
    print(draw(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")))
