"""Draw vit_ablation.png and .md from vit_ablation.json: EigenLoRAx against K, r, adapters, noise.

python -m figures.vit_ablation [JSON]
The JSON is written by train_vit.py --table eigenlorax-ablation --out figures/vit_ablation.json.
"""

import re
import sys
from pathlib import Path

import common
from figures import plots
from figures.plots import over_seeds


def table(data: dict) -> str:
    """Every row as a Markdown table: test accuracy in per cent, mean ± std over seeds."""
    lines = ["| | trained | accuracy |", "|---|---:|---:|"]
    for row in data["rows"]:
        accuracy = f"{100 * row['mean']:.1f} ± {100 * row['std']:.1f}"
        lines.append(f"| {row['row']} | {row['trainable']:,} | {accuracy} |")
    return "\n".join(lines) + "\n"


def draw(source: str | Path) -> Path:
    """Draw the figure and write the table beside their JSON; returns the path of the PNG."""
    data = common.read_json(source)
    Path(source).with_suffix(".md").write_text(table(data), encoding="utf-8")
    rows = {r["row"]: r for r in data["rows"]}
    plt = plots.plotting()
    figure, panels = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    (by_k, by_count), (by_noise, curves) = panels

    def series(axes, pattern: str, label: str, style: str, split: str = "test") -> None:
        found = {n: re.fullmatch(pattern, n) for n in rows}
        points = sorted((float(m[1]), *over_seeds(data, n, split)) for n, m in found.items() if m)
        axes.errorbar(
            [x for x, _, _ in points],
            [100 * mean for _, mean, _ in points],
            yerr=[100 * std for _, _, std in points],
            fmt=style,
            color="0.5" if "--" in style else "black",
            capsize=2,
            label=label,
        )

    series(by_k, r"K=(\d+)", "recycled", "o-")
    series(by_k, r"K=(\d+)", "recycled, validation", "x:", "validation")
    series(by_k, r"K=(\d+), random", "random subspace", "s--")
    by_k.axhline(100 * rows["LoRA r=4"]["mean"], color="0.5", linestyle=":", label="LoRA r=4")
    by_k.set(xlabel="K, principal components (r = 4)", title="Recycled against random subspace")
    series(by_count, r"(\d) recycled", "recycled alone, K = 4n", "o-")
    series(by_count, r"(\d) recycled, augmented", "augmented to K = 20", "s--")
    by_count.set(
        xlabel="n, recycled adapters", title="Few adapters, with and without pseudo-components"
    )
    series(by_noise, r"noise (\d+) %", "K = 16", "o-")
    by_noise.axhline(100 * rows["K=16"]["mean"], color="0.5", linestyle=":", label="no noise")
    by_noise.set(
        xlabel="noise added to the adapters in % of their rms", title="Noise in the adapters"
    )
    for name, style in {"LoRA r=4": "k-", "PiSSA r=4": "k--", "VeRA": "k:", "K=16": "k-."}.items():
        runs = [run["losses"] for run in data["runs"] if run["row"] == name]
        mean = [sum(step) / len(step) for step in zip(*runs, strict=True)]
        label = "EigenLoRAx, K = 16" if name == "K=16" else name
        curves.plot(range(1, len(mean) + 1), mean, style, label=label)
    curves.set(xlabel="epoch", ylabel="training loss", yscale="log", title="Convergence")
    for axes in (by_k, by_count, by_noise):
        axes.set_ylabel("test accuracy in %, mean ± std")
    for axes in panels.flat:
        axes.legend(frameon=False)
        axes.set_title(axes.get_title(), fontsize="medium")
    return plots.save_figure(figure, source)


if __name__ == "__main__":
    print(draw(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")))
