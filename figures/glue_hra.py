"""Draw glue_hra.png and .md from glue_hra.json: HRA on language tasks, against λ and against r.

python -m figures.glue_hra [JSON]
The JSON is written by train_glue.py --table hra --seeds 5 --out figures/glue_hra.json. The paper's
Figure 3 is MRPC against λ, with DeBERTa-v3-base and every Linear layer; Figure 4 has LLaMA2-7B.
"""

import sys
from pathlib import Path

import common
from figures import plots

LAMBDAS = ["0", "1e-5", "1e-3", "1e-1", "∞"]


def draw(source: str | Path) -> Path:
    """Draw the figure and write the table beside their JSON; returns the path of the PNG."""
    data = common.read_json(source)
    text = f"{plots.as_table(data['rows'])}\n"
    Path(source).with_suffix(".md").write_text(text, encoding="utf-8")
    lora = data["rows"][0]["row"]
    panels = {
        "HRA r=8 against λ, weight of the penalty": {x: f"HRA r=8, λ={x}" for x in LAMBDAS},
        "HRA, λ=0, against r, number of reflections": {x: f"HRA r={x}, λ=0" for x in "248"},
    }
    figure, axes = plots.plotting().subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        plots.sweep(axis, data, rows, lora)
        axis.set_xlabel(title)
    where = "docstrings" if "corpus" in data else f"GLUE, {Path(data['config']['backbone']).name}"
    figure.suptitle(f"Mean of six tasks: {where}", fontsize="medium")
    return plots.save_figure(figure, source)


if __name__ == "__main__":
    print(draw(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")))
