"""Draw vit_tune.png from vit_tune.json: the learning rates, chosen on the validation split.

python figures/vit_tune.py [JSON]
The JSON is written by train_vit.py --tune --out figures/vit_tune.json.
"""

import sys
from pathlib import Path

import common


def draw(source: str | Path) -> Path:
    """Draw the figure beside its JSON; returns the path of the PNG."""
    data = common.read_json(source)
    plt = common.plotting()
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, (name, scores) in enumerate(data["validation"].items()):
        rates = sorted(map(float, scores))
        heights = [100 * scores[str(rate)] for rate in rates]
        grey = str(0.7 * (i % 3) / 2)
        axes.plot(rates, heights, "os^D*"[i % 5], linestyle=("-", "--", ":")[i % 3], color=grey)
        axes.lines[-1].set_label(f"{name}: {data['chosen'][name]:g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation accuracy in %, mean of tasks")
    axes.set_title("Each method at the learning rate that validation chose", fontsize="medium")
    figure.legend(loc="outside right", frameon=False, fontsize="small")
    return common.save_figure(figure, source)


if __name__ == "__main__":
    print(draw(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")))
