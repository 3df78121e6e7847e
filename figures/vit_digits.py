"""Draw vit_digits.png from vit_digits.json: what each row of EigenLoRAx's Table 1 reaches.

python figures/vit_digits.py [JSON]      The JSON is written by train_vit.py --out.
"""

import sys
from pathlib import Path

import common


def draw(source: str | Path) -> Path:
    """Draw the figure beside its JSON; returns the path of the PNG."""
    rows = common.read_json(source)["rows"]
    plt = common.plotting()
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(rows) + 1.2), layout="constrained")
    axes.barh(
        range(len(rows)),
        [100 * r["mean"] for r in rows],
        xerr=[100 * r["std"] for r in rows],
        color=["0.45" if "EigenLoRAx" in r["row"] else "0.8" for r in rows],
        capsize=3,
    )
    for i, r in enumerate(rows):
        scores = [100 * score for score in r["tasks"].values()]
        axes.plot(scores, [i] * len(scores), "|", color="black", markersize=8)
    axes.set_yticks(range(len(rows)), [f"{r['row']}  ({r['trainable']:,})" for r in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("test accuracy in % (bar: mean ± std over seeds; strokes: the tasks)")
    axes.set_ylabel("method (trained numbers, head apart)")
    named = {r["row"]: r for r in rows}
    ours, lora = named["EigenLoRAx"], named["LoRA r=4"]
    axes.set_title(
        f"EigenLoRAx: {100 * ours['mean']:.1f} % with {ours['trainable']:,} trained numbers;"
        f" LoRA r=4: {100 * lora['mean']:.1f} % with {lora['trainable']:,}",
        fontsize="medium",
        loc="right",
    )
    return common.save_figure(figure, source)


if __name__ == "__main__":
    print(draw(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")))
