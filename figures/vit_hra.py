"""Draw vit_hra.png and vit_hra.md from vit_hra.json: HRA's capacity against its regularity.

python -m figures.vit_hra [JSON]
The JSON is written by train_vit.py --table hra --out figures/vit_hra.json.
"""

import sys
from pathlib import Path

import common
from figures import plots
from figures.plots import over_seeds

LAMBDAS = ["0", "1e-6", "1e-5", "1e-4", "1e-3", "1e-2", "1e-1", "∞"]


def table(data: dict) -> str:
    """Every row as a Markdown table: accuracies in per cent, mean ± std over seeds."""
    lines = ["| | trained | new task | source task | ‖I − ÛᵀÛ‖_F |", "|---|---:|---:|---:|---:|"]
    for row in data["rows"]:
        name = row["row"]
        new, kept = (over_seeds(data, name, field) for field in ("test", "source"))
        cells = [name, f"{row['trainable']:,}"]
        cells += [f"{100 * mean:.1f} ± {100 * std:.1f}" for mean, std in (new, kept)]
        hra = name.startswith("HRA")
        cells.append(f"{over_seeds(data, name, 'orthogonality')[0]:.2f}" if hra else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(source: str | Path) -> Path:
    """Draw the figure and write the table beside their JSON; returns the path of the PNG."""
    data = common.read_json(source)
    Path(source).with_suffix(".md").write_text(table(data), encoding="utf-8")
    plt = plots.plotting()
    figure, (new, kept, skew) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    rows = {r["row"] for r in data["rows"]}

    panels = {new: ("test", 100), kept: ("source", 100), skew: ("orthogonality", 1)}
    for axes, (field, unit) in panels.items():
        for r, style in {2: "o:", 4: "s--", 8: "D-"}.items():
            points = [over_seeds(data, f"HRA r={r}, λ={lam}", field) for lam in LAMBDAS]
            axes.errorbar(
                range(len(LAMBDAS)),
                [unit * mean for mean, _ in points],
                yerr=[unit * std for _, std in points],
                fmt=style,
                color=str(0.6 - 0.075 * r),
                capsize=2,
                label=f"HRA r={r}",
            )
        for name, style in {"LoRA r=4": "-.", "OFT": (0, (1, 3)), "BOFT": (0, (5, 5))}.items():
            if field != "orthogonality" and name in rows:
                height = unit * over_seeds(data, name, field)[0]
                axes.axhline(height, color="black", linewidth=0.8, linestyle=style, label=name)
        axes.set_xticks(range(len(LAMBDAS)), LAMBDAS)
        axes.set_xlabel("λ, weight of the penalty")
    new.set(title="Capacity: the new task", ylabel="test accuracy in %, mean ± std")
    kept.set(title="Regularity: the source task", ylabel="accuracy kept in %, mean ± std")
    skew.set(title="Distance from orthogonal columns", ylabel="‖I − ÛᵀÛ‖_F, mean over layers")
    handles, labels = new.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right", frameon=False, fontsize="small")
    return plots.save_figure(figure, source)


if __name__ == "__main__":
    print(draw(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")))
