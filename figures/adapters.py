"""What recycled real adapters share: draws adapters.png from adapters.json.

python -m figures.adapters                           draw
python -m figures.adapters --measure --adapters DIR  measure every PEFT LoRA folder in DIR first
"""

import argparse
import statistics
from pathlib import Path

import torch
from torch import Tensor

import common
from eigenlorax import Components, principal_components
from figures import plots

HERE = Path(__file__).with_suffix(".json")


def vectors(pair: tuple[Tensor, Tensor], side: str) -> Tensor:
    """The rows of A (r, d), or the columns of B (r, o)."""
    B, A = pair
    return A if side == "A" else B.T


def noise_like(rows: list[Tensor]) -> list[Tensor]:
    """White noise in place of every adapter, scaled to the adapter's norm."""
    noise = [torch.randn(x.shape, dtype=x.dtype) for x in rows]
    return [z * (x.norm() / z.norm()) for x, z in zip(rows, noise, strict=True)]


def held(components: Components, X: Tensor) -> Tensor:
    """The part of ‖X‖² that the first 1, 2, … components hold."""
    return components.project(X).square().sum(0).cumsum(0) / X.square().sum()


def energies(rows: list[Tensor], ks: list[int]) -> dict[str, Tensor]:
    """Of one module and side: what K components hold of all adapters, and of each from the others.

    error is ‖X − X VᵀV‖ / ‖X‖ of all adapters at each K.
    """
    X, at = torch.cat(rows), torch.tensor(ks) - 1
    seen = held(principal_components(X, center=False), X)
    held_out = []
    for i, x in enumerate(rows):
        others = principal_components(torch.cat(rows[:i] + rows[i + 1 :]), center=False)
        held_out.append(held(others, x)[at])
    error = (1 - seen[at]).clamp(min=0).sqrt()
    return {"spectrum": seen, "error": error, "held_out": torch.stack(held_out)}


def cosines(rows: list[Tensor]) -> Tensor:
    """The cosine of every pair of adapters, each taken as one long vector."""
    units = torch.stack([x.flatten() / x.norm() for x in rows])
    return (units @ units.T)[tuple(torch.triu_indices(len(rows), len(rows), 1))]


def mean_of(results: list[dict[str, Tensor]]) -> dict[str, list]:
    """The mean over modules."""
    return {key: torch.stack([r[key] for r in results]).mean(0).tolist() for key in results[0]}


def measure(folder: Path) -> dict:
    """Every adapter in a folder, module by module."""
    torch.manual_seed(0)  # of the noise
    adapters = {child.name: common.LazyAdapter(child) for child in sorted(folder.iterdir())}
    names = sorted(set.intersection(*(set(adapter) for adapter in adapters.values())))
    sides = {}
    for side in "AB":
        found, alike = {"real": [], "control": []}, {"real": [], "control": []}
        for name in names:
            rows = [vectors(adapter[name], side) for adapter in adapters.values()]
            ks = [2**i for i in range(10) if 2**i < sum(map(len, rows))]
            for kind, sample in (("real", rows), ("control", noise_like(rows))):
                found[kind].append(energies(sample, ks))
                alike[kind].append(cosines(sample))
        sides[side] = {kind: mean_of(results) for kind, results in found.items()} | {"ks": ks}
        for kind, values in alike.items():
            every = torch.cat(values)
            cosine = {"mean": every.mean().item(), "largest absolute": every.abs().max().item()}
            sides[side][kind]["cosine"] = cosine
    setting = {"adapters": list(adapters), "modules": len(names), "seed": 0}
    return {"setting": setting, "environment": common.environment(), "sides": sides}


def left_out(kind: dict, ks: list[int], K: int) -> float:
    """What K components hold of an adapter that they were not made from: the median adapter's."""
    return statistics.median(adapter[ks.index(K)] for adapter in kind["held_out"])


def draw(source: str | Path) -> Path:
    """Draw the figure beside its JSON; returns the path of the PNG."""
    data = common.read_json(source)
    figure, axes = plots.canvas(3.9, 1, 2, sharey=True)
    shade = plots.colour("eigenlorax")
    for axis, (side, found) in zip(axes, data["sides"].items(), strict=True):
        ks, real, noise = found["ks"], found["real"], found["control"]
        seen = [100 * real["spectrum"][k - 1] for k in ks]
        out, none = ([100 * left_out(kind, ks, k) for k in ks] for kind in (real, noise))
        axis.plot(ks, seen, "--", color="0.4")
        for adapter in real["held_out"]:
            axis.plot(ks, [100 * x for x in adapter], color=shade, linewidth=0.6, alpha=0.5)
        axis.plot(ks, out, color=shade, linewidth=2.5)
        axis.plot(ks, none, ":", color="0.4")
        axis.set(xscale="log", ylim=(0, 102), xlabel="K, components")
        axis.set_title(
            f"{side}: cosines of two adapters up to {real['cosine']['largest absolute']:.2f}"
        )
        axis.set_xticks(ks[::2], [str(k) for k in ks[::2]])
        axis.minorticks_off()
        ends = ("all, seen", seen, "0.4"), ("left out", out, shade), ("noise", none, "0.4")
        plots.name_lines(axis, [(name, line[-1], colour) for name, line, colour in ends])
    axes[0].set_ylabel("part of ‖A‖² or ‖B‖² held, in %")
    A = data["sides"]["A"]
    few = f"{100 * A['real']['spectrum'][3]:.0f} % of all adapters' A"
    fewer = f"{100 * left_out(A['real'], A['ks'], 4):.0f} % of one that was left out"
    plots.headline(figure, f"4 components hold {few}, and {fewer}")
    return plots.save_figure(figure, source)


def said(data: dict) -> str:
    """What is shared, in a few sentences."""
    A, B = (side["real"] for side in data["sides"].values())
    ks, noise = data["sides"]["A"]["ks"], data["sides"]["A"]["control"]
    few, many, cosine = 4, ks[-1], A["cosine"]
    held = {k: 100 * left_out(A, ks, k) for k in (few, many)}
    error = [side["error"][ks.index(16)] for side in (A, B)]
    return (
        f"{few} components of A hold {100 * A['spectrum'][few - 1]:.0f} % of the energy of all"
        f" {len(A['held_out'])} adapters, and {held[few]:.0f} % of one left out (median). {many}"
        f" components hold {held[many]:.0f} % of it, where white noise has"
        f" {100 * left_out(noise, ks, many):.0f} %. At K = 16 the relative error of the adapters"
        f" themselves is {error[0]:.2f} for A and {error[1]:.2f} for B. The cosine of two adapters'"
        f" A is {cosine['mean']:.2f} on average and reaches {cosine['largest absolute']:.2f}."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="measure first")
    parser.add_argument("--adapters", type=Path, help="folder of PEFT LoRA folders")
    options = parser.parse_args()
    if options.measure:
        common.write_json(HERE, measure(options.adapters))
    print(draw(HERE))
