"""Draw vit_cifar.png and .md from vit_cifar.json: EigenLoRAx's Table 1 on CIFAR-100's classes.

python -m figures.vit_cifar [JSON]
The JSON is written by train_vit.py --backbone … --data … --out figures/vit_cifar.json.
"""

import sys
from pathlib import Path

import common
from figures import plots


def claims(data: dict) -> list[tuple[str, str, str]]:
    """Each claim of the paper, the paired difference, and what it says."""
    size = {r["row"]: r["trainable"] for r in data["rows"]}
    times = f"{size['LoRA r=4'] / size['EigenLoRAx']:.0f}× fewer trained numbers"
    name, ours = f"EigenLoRAx ({size['EigenLoRAx']:,})", ["EigenLoRAx"]
    close = f"EigenLoRAx is within a point of LoRA r=4 with {times}"
    claims = [plots.judge(data, close, ours, ["LoRA r=4"], least=-1.0)]
    for other in ("LoRA r=1", "VeRA", "Random subspace"):
        claim = f"{name} is above {other} ({size[other]:,})"
        claims.append(plots.judge(data, claim, ours, [other]))
    claim = "EigenLoRAx-ZS is above the base"
    return [*claims, plots.judge(data, claim, ["EigenLoRAx-ZS"], ["Base"])]


def verdicts(data: dict) -> str:
    """`claims` as a Markdown table."""
    return plots.claims_table(claims(data))


def draw(source: str | Path) -> Path:
    """Draw the figure and write the tables beside their JSON; returns the path of the PNG."""
    data = common.read_json(source)
    setting = data["config"]
    title = (
        f"CIFAR-100, {setting['classes']} classes × {setting['images']} images a task,"
        f" {setting['image_size']} px, {Path(setting['backbone']).name}"
    )
    return plots.draw_bars(source, "test accuracy in %", title, f"\n{verdicts(data)}\n")


if __name__ == "__main__":
    print(draw(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")))
