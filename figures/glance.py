"""What each of the three methods freezes, trains and multiplies: draws glance.png from glance.json.

python -m figures.glance
"""

from pathlib import Path

import common
from figures import plots


def draw_block(axis, block: dict, looks: dict) -> None:
    """A matrix as a rectangle: its name in it, its shape above it."""
    x, y, width, height = block["at"]
    light = "black" if looks["facecolor"] != "0.25" else "white"
    axis.add_patch(plots.plotting().Rectangle((x, y), width, height, edgecolor="black", **looks))
    back = {"facecolor": looks["facecolor"], "edgecolor": "none", "pad": 1}
    middle = {"ha": "center", "va": "center", "fontsize": 12, "color": light, "bbox": back}
    axis.text(x + width / 2, y + height / 2, block["label"], **middle)
    axis.text(x + width / 2, y + height + 0.08, block["shape"], ha="center", va="bottom")


def draw(source: str | Path) -> Path:
    """Draw the figure beside its JSON; returns the path of the PNG."""
    data = common.read_json(source)
    figure, axes = plots.canvas(4.9, 2, 2)
    for axis, panel in zip(axes.flat, data["panels"], strict=False):
        for block in panel["blocks"]:
            draw_block(axis, block, data["kinds"][block["kind"]]["looks"])
        for x, y, sign in panel["signs"]:
            axis.text(x, y, sign, ha="center", va="center", fontsize=16)
        axis.text(0, 0.1, panel["caption"], va="top")
        axis.set(xlim=(-0.1, 8.8), ylim=(-1.1, 3.3), aspect="equal")
        axis.set_title(panel["title"], fontsize=12)
        axis.axis("off")
    axes[1, 1].axis("off")
    handles = [
        plots.plotting().Rectangle(
            (0, 0), 1, 1, edgecolor="black", label=kind["meaning"], **kind["looks"]
        )
        for kind in data["kinds"].values()
    ]
    axes[1, 1].legend(handles=handles, loc="center left", fontsize=11)
    return plots.save_figure(figure, source)


if __name__ == "__main__":
    print(draw(Path(__file__).with_suffix(".json")))
