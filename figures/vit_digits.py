"""Draw vit_digits.png and .md from vit_digits.json: what each row of EigenLoRAx's Table 1 reaches.

python -m figures.vit_digits [JSON]      The JSON is written by train_vit.py --out.
"""

import sys
from pathlib import Path

import common
from figures import plots


def draw(source: str | Path) -> Path:
    """Draw the figure and write the table beside their JSON; returns the path of the PNG."""
    rows = {r["row"]: r for r in common.read_json(source)["rows"]}
    ours, lora = rows["EigenLoRAx"], rows["LoRA r=4"]
    title = (
        f"EigenLoRAx: {100 * ours['mean']:.1f} % with {ours['trainable']:,} trained numbers;"
        f" LoRA r=4: {100 * lora['mean']:.1f} % with {lora['trainable']:,}"
    )
    return plots.draw_bars(source, "test accuracy in %", title)


if __name__ == "__main__":
    print(draw(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")))
