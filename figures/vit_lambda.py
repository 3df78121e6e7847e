"""Draw vit_lambda.png from vit_lambda.json: ReSoRA's λ, chosen on the validation split.

python -m figures.vit_lambda [JSON]
The JSON is written by train_vit.py --table resora-lambda --out figures/vit_lambda.json.
"""

import statistics
import sys
from pathlib import Path

import common
from figures import plots

LAMBDAS = ("0.001", "0.01", "0.1", "1")


def validation(data: dict, row: str) -> float:
    """Mean accuracy of a row on the validation split."""
    return statistics.fmean(r["validation"] for r in data["runs"] if r["row"] == row)


def chosen(data: dict) -> dict[tuple[str, str], float]:
    """{(metric, level): the λ of the best validation accuracy}; the smallest of equals."""
    best = {}
    for r in data["rows"]:
        if "λ=0" != r["row"].rpartition(", ")[2] and r["row"].count(", ") == 3:
            _, metric, level, lam = r["row"].split(", ")
            found = validation(data, r["row"]), -float(lam.removeprefix("λ="))
            best[metric, level] = max(best.get((metric, level), (0.0, 0.0)), found)
    return {key: -lam for key, (_, lam) in best.items()}


def draw(source: str | Path) -> Path:
    """Draw the figure beside its JSON; returns the path of the PNG."""
    data = common.read_json(source)
    plt = plots.plotting()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, (metric, level) in enumerate(sorted(chosen(data))):
        heights = [100 * validation(data, f"r=4, {metric}, {level}, λ={x}") for x in LAMBDAS]
        style = ("-" if level == "feature" else "--", "os^D"[i // 2], str(0.2 * (i // 2)))
        axes.plot(
            LAMBDAS,
            heights,
            linestyle=style[0],
            marker=style[1],
            color=style[2],
            label=f"{metric}, {level}",
        )
    axes.axhline(100 * validation(data, "r=4, λ=0"), color="0.5", linestyle=":", label="λ = 0")
    axes.set(xlabel="λ", ylabel="validation accuracy in %")
    axes.set_title("λ of the second stage, r = 4: mean over tasks and seeds", fontsize="medium")
    axes.legend(frameon=False, fontsize="small", ncols=2)
    return plots.save_figure(figure, source)


if __name__ == "__main__":
    print(draw(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")))
