"""Draw glance.png from glance.json: what each of the three methods freezes, trains and multiplies.

python -m figures.glance [JSON]
"""

import sys
from pathlib import Path

import common
from figures import plots


def draw(source: str | Path) -> Path:
    """Draw the figure beside its JSON; returns the path of the PNG."""
    data = common.read_json(source)
    plt = plots.plotting()
    size = (12, 3.2)
    figure, panels = plt.subplots(1, len(data["panels"]), figsize=size, layout="constrained")
    for axes, panel in zip(panels, data["panels"], strict=True):
        for block in panel["blocks"]:
            (x, y, width, height), kind = block["at"], data["kinds"][block["kind"]]
            axes.add_patch(plt.Rectangle((x, y), width, height, edgecolor="black", **kind["looks"]))
            color = "white" if kind["looks"]["facecolor"] == "0.25" else "black"
            middle = x + width / 2, y + height / 2
            back = {"facecolor": kind["looks"]["facecolor"], "edgecolor": "none", "pad": 1}
            axes.text(*middle, block["label"], ha="center", va="center", color=color, bbox=back)
            shape = {"ha": "center", "va": "bottom", "fontsize": "small"}
            axes.text(x + width / 2, y + height + 0.06, block.get("shape", ""), **shape)
        for x, y, sign in panel["signs"]:
            axes.text(x, y, sign, ha="center", va="center", fontsize="x-large")
        axes.text(0, -0.35, panel["caption"], va="top", fontsize="small")
        axes.set(xlim=(-0.1, panel["width"]), ylim=(-1.5, 3.3), aspect="equal")
        axes.set_title(panel["title"], fontsize="medium", loc="left")
        axes.axis("off")
    handles = [
        plt.Rectangle((0, 0), 1, 1, edgecolor="black", label=kind["meaning"], **kind["looks"])
        for kind in data["kinds"].values()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return plots.save_figure(figure, source)


if __name__ == "__main__":
    print(draw(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")))
