"""What each of the three methods does, one claim a panel: draws lecture.png from lecture.json.

python -m figures.lecture             draw
python -m figures.lecture --measure   compute first (seconds), then draw

mirrors   x, H₂x and H₁H₂x in the plane, by `reflect`, and the mirrors, which are at right angles to
          u₁ and u₂.
gauge     one LoRA of rank 2, written as (B G⁻¹, G A) for two families of G that start at the pair
          of `regauge`, orthonormal columns of B and uncorrelated codes: turns, which keep the first
          (angle < 0), and turns between uncorrelated codes of equal size, which keep the second
          (angle > 0). ΔW is the same everywhere.
energy    adapters whose A reads `shared` directions that they have in common, plus noise; the part
          of ‖A‖² of one adapter that K components of the others hold, K random directions, and the
          same for adapters without common directions. Mean, least and most over the draws.
"""

import argparse
import math
import statistics
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

import common
from eigenlorax import augment, principal_components
from figures import adapters, plots
from hra import reflect
from resora import METRICS, redundancy, regauge

PLAN = {
    "mirrors": {"degrees": [75, 20], "x": -10},
    "gauge": {"o": 16, "d": 16, "N": 2000, "sizes": [0.4, 0.1], "mean": 3.0, "step": 3},
    "energy": {"d": 64, "r": 4, "adapters": 12, "shared": 8, "noise": 0.1, "most": 32, "draws": 20},
}


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Gaussian numbers in float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def turn(degrees: float) -> Tensor:
    """The (2, 2) matrix of a turn."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def mirrors(plan: dict) -> dict:
    """The three points of length 1; mirror i lies at degrees[i], x at plan["x"] degrees."""
    x = turn(plan["x"])[:, 0]
    U = torch.stack([turn(angle + 90)[:, 0] for angle in plan["degrees"]], 1)  # (2, 2)
    points = [x, reflect(x, U[:, 1:]), reflect(x, U)]
    return {"points": [[round(v, 6) for v in point.tolist()] for point in points]}


def gauge(plan: dict) -> dict:
    """{"degrees": …, "change": the most that ΔW differs by, metric: its values}."""
    g = torch.Generator().manual_seed(0)
    first, second = (augment(normal(g, 0, plan[side]), 2, g) for side in "od")  # (2, o), (2, d)
    x = normal(g, plan["N"], plan["d"]) + plan["mean"] * second[0]
    A = torch.tensor(plan["sizes"], dtype=torch.float64).diag() @ second
    B, A = regauge(first.T, plan["o"] ** 0.5 * A, x)
    even = (x @ A.T).std(0).diag()
    found = {"degrees": list(range(-90, 91, plan["step"])), "change": 0.0}
    found |= {metric: [] for metric in METRICS}
    for degrees in found["degrees"]:
        G = turn(degrees) if degrees < 0 else turn(degrees) @ even.inverse()
        B_G, A_G = B @ G.inverse(), G @ A
        found["change"] = max(found["change"], (B_G @ A_G - B @ A).abs().max().item())
        for metric in METRICS:
            found[metric].append(round(redundancy(B_G, x @ A_G.T, metric).item(), 6))
    return found


def energy(plan: dict) -> dict:
    """{row: {"mean", "least" and "most": the % that K = 0, 1, … components hold}}."""
    d, r, shared = plan["d"], plan["r"], plan["shared"]
    found = {"recycled components": [], "random directions": [], "recycled, nothing shared": []}
    for draw in range(plan["draws"]):
        g = torch.Generator().manual_seed(draw)
        basis = augment(torch.zeros(0, d, dtype=torch.float64), shared, g)
        size = plan["adapters"], r
        noise = plan["noise"] * normal(g, *size, d)
        alike, apart = normal(g, *size, shared) @ basis + noise, normal(g, *size, d)
        others = [principal_components(A[1:].flatten(0, 1), center=False).V for A in (alike, apart)]
        bases = (alike, others[0]), (alike, augment(basis[:0], d, g)), (apart, others[1])
        for row, (A, V) in zip(found.values(), bases, strict=True):
            held = (A[0] @ V.T).square().sum(0).cumsum(0) / A[0].square().sum()
            row.append([0.0, *(100 * held[: plan["most"]]).tolist()])
    kinds = {"mean": statistics.fmean, "least": min, "most": max}
    return {
        row: {
            kind: [round(f(at_K), 4) for at_K in zip(*draws, strict=True)]
            for kind, f in kinds.items()
        }
        for row, draws in found.items()
    }


def measure(target: Path) -> None:
    """Write the JSON, whole or not at all."""
    found = {f.__name__: f(PLAN[f.__name__]) for f in (mirrors, gauge, energy)}
    common.write_json(target, {"environment": common.environment(), "plan": PLAN} | found)


def draw_mirrors(axis, plan: dict, found: dict) -> None:
    """x, its image in the second mirror, and the image of that in the first."""
    for name, degrees in zip("12", plan["degrees"], strict=True):
        x, y = (1.3 * turn(degrees)[:, 0]).tolist()
        axis.plot([-x, x], [-y, y], color="0.6", linestyle="--", linewidth=1.2)
        axis.text(x, y + 0.06, f"mirror {name}", ha="center")
    circle = [turn(degrees)[:, 0].tolist() for degrees in range(361)]
    axis.plot(*zip(*circle, strict=True), color="0.8", linewidth=0.8)
    points, shade = found["points"], plots.colour("hra")
    for start, end in pairwise(points):
        axis.plot(*zip(start, end, strict=True), color="0.3", linestyle=":", linewidth=1.5)
    for point, name in zip(points, ("x", "H₂x", "H₁H₂x"), strict=True):
        arrow = {"arrowstyle": "-|>", "color": shade, "shrinkA": 0, "shrinkB": 0, "linewidth": 2}
        axis.annotate("", point, (0, 0), arrowprops=arrow)
        axis.text(*(1.2 * coordinate for coordinate in point), name, ha="center", va="center")
    between = plan["degrees"][0] - plan["degrees"][1]
    axis.set_title(f"HRA: two mirrors turn x by {2 * between}°,\ntwice the {between}° between them")
    axis.set(xlabel="first input", ylabel="second input", aspect="equal")
    axis.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), xticks=(-1, 0, 1), yticks=(-1, 0, 1))


DASHES = {"euclidean": "-", "cosine": "--", "linear": "-", "nonlinear": ":"}


def draw_gauge(axis, found: dict) -> None:
    """The four redundancies against the angle."""
    for metric, dash in DASHES.items():
        shade = plots.colour("resora") if "linear" in metric else "0.2"
        axis.plot(found["degrees"], found[metric], dash, color=shade, label=metric)
    axis.axvline(0, color="0.7", linewidth=0.8)
    for x, text in ((-45, "B stays\northonormal"), (45, "codes stay\nuncorrelated")):
        axis.text(x, 1.1, text, ha="center", va="center")
    axis.set_title("ReSoRA: ΔW is the same everywhere;\neach metric is blind to half the turns")
    axis.set(xlabel="turn of the two components, in degrees", ylabel="redundancy R")
    axis.set(xlim=(-90, 90), ylim=(-0.02, 1.2), xticks=range(-90, 91, 45))
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def draw_energy(axis, plan: dict, found: dict) -> None:
    """What K directions hold of A of an adapter that they were not made from."""
    real = common.read_json(Path(__file__).with_name("adapters.json"))["sides"]["A"]
    ks = [k for k in real["ks"] if k <= plan["most"]]
    median = [100 * adapters.left_out(real["real"], real["ks"], k) for k in ks]
    ends, recycled = [], plots.colour("eigenlorax")
    looks = (recycled, "-"), (plots.colour("random"), "--"), ("0.4", ":")
    for (row, held), (shade, dash) in zip(found.items(), looks, strict=True):
        axis.plot(held["mean"], dash, color=shade)
        K = range(len(held["mean"]))
        axis.fill_between(K, held["least"], held["most"], color=shade, alpha=0.15, linewidth=0)
        ends.append((row, held["mean"][-1], shade))
    axis.plot(ks, median, "o-", color="black")
    ends.append(("of real adapters", median[-1], "black"))
    K = plan["shared"]
    axis.axvline(K, color="0.7", linewidth=0.8)
    ours, real = found["recycled components"]["mean"][K], median[ks.index(K)]
    axis.set_title(
        f"EigenLoRAx, constructed adapters that share {K} directions: {K} components of the"
        f" others\nhold {ours:.0f} % of a new one; of a real adapter they hold {real:.0f} %"
    )
    axis.set(xlabel="K, components of the other adapters", ylabel="part of ‖A‖² held, in %")
    axis.set(xlim=(0, plan["most"]), ylim=(0, 102), xticks=range(0, plan["most"] + 1, 8))
    plots.name_lines(axis, ends)


def draw(source: str | Path) -> Path:
    """Draw the figure beside its JSON; returns the path of the PNG."""
    data = common.read_json(source)
    figure = plots.plotting().figure(figsize=(plots.WIDTH, 7.6), layout="constrained")
    axes = figure.subplot_mosaic([["mirrors", "gauge"], ["energy", "energy"]])
    draw_mirrors(axes["mirrors"], data["plan"]["mirrors"], data["mirrors"])
    draw_gauge(axes["gauge"], data["gauge"])
    draw_energy(axes["energy"], data["plan"]["energy"], data["energy"])
    return plots.save_figure(figure, source)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="compute first")
    here = Path(__file__).with_suffix(".json")
    if parser.parse_args().measure:
        measure(here)
    print(draw(here))
