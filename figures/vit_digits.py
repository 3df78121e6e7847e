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
    common.bars(axes, rows)
    axes.set_xlim(0, 100)
    axes.set_xlabel("test accuracy in % (bar: mean ± std over seeds; strokes: the tasks)")
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
