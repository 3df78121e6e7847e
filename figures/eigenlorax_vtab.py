"""What recycled real adapters share: draws eigenlorax_vtab.png from eigenlorax_vtab.json.

python -m figures.eigenlorax_vtab                          draw
python -m figures.eigenlorax_vtab --measure --adapters DIR  measure every PEFT LoRA folder in DIR
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

import common
from eigenlorax import principal_components
from figures import plots

SIDES = {"A": 1, "B": 0}  # which half of the pair (B, A), turned so that its vectors are rows


def vectors(pair, side: str) -> torch.Tensor:
    """The rows of A (r, d), or the columns of B (r, o)."""
    matrix = pair[SIDES[side]]
    return matrix if side == "A" else matrix.T


def control(rows: list[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
    """White noise in place of every adapter, scaled to the adapter's norm."""
    noise = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in rows]
    return [z * (x.norm() / z.norm()) for x, z in zip(rows, noise, strict=True)]


def energies(rows: list[torch.Tensor], ks: list[int]) -> dict:
    """Of one module and side: spectrum, held-out energy and reconstruction error at each K."""
    X = torch.cat(rows)
    plain, centred = (principal_components(X, center=center) for center in (False, True))
    s = plain.singular_values
    error = {"uncentred": [], "centred, mean restored": [], "centred, mean dropped": []}
    for K in ks:
        a, b = replace(plain, V=plain.V[:K]), replace(centred, V=centred.V[:K])
        restored = b.reconstruct(b.project(X))
        left = {
            "uncentred": X - a.reconstruct(a.project(X)),
            "centred, mean restored": X - restored,
            "centred, mean dropped": X - (restored - b.mean),
        }
        for name, rest in left.items():
            error[name].append(float(rest.norm() / X.norm()))
    held_out = []
    for i, x in enumerate(rows):
        others = principal_components(torch.cat(rows[:i] + rows[i + 1 :]), center=False)
        part = others.project(x).square().sum(0).cumsum(0) / x.square().sum()
        held_out.append([float(part[K - 1]) for K in ks])
    spectrum = (s.square().cumsum(0) / s.square().sum()).tolist()
    return {"spectrum": spectrum, "error": error, "held_out": held_out}


def cosines(rows: list[torch.Tensor]) -> list[float]:
    """The cosine of every pair of adapters, each taken as one long vector."""
    units = torch.stack([x.flatten() / x.norm() for x in rows])
    return (units @ units.T)[tuple(torch.triu_indices(len(rows), len(rows), 1))].tolist()


def mean_of(results: list[dict]) -> dict:
    """The mean over modules of equal dicts of (lists of) lists of numbers."""
    if isinstance(results[0], dict):
        return {key: mean_of([r[key] for r in results]) for key in results[0]}
    return torch.tensor(results, dtype=torch.float64).mean(0).tolist()


def measure(folder: Path, modules: int | None, seed: int) -> dict:
    adapters = {child.name: common.LazyAdapter(child) for child in sorted(folder.iterdir())}
    names = sorted(set.intersection(*(set(a) for a in adapters.values())))[:modules]
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for side in SIDES:
        kinds: dict[str, list] = {"real": [], "control": []}
        alike = {"real": [], "control": []}
        for name in names:
            rows = [vectors(adapter[name], side) for adapter in adapters.values()]
            size = sum(len(x) for x in rows)
            ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512) if k < size - 1]
            for kind, sample in (("real", rows), ("control", control(rows, generator))):
                kinds[kind].append(energies(sample, ks))
                alike[kind] += cosines(sample)
        found[side] = {kind: mean_of(results) for kind, results in kinds.items()} | {"ks": ks}
        for kind, values in alike.items():
            found[side][kind]["cosine"] = {
                "mean": sum(values) / len(values),
                "largest absolute": max(map(abs, values)),
            }
    setting = {"adapters": list(adapters), "modules": len(names), "seed": seed}
    setting |= {"threads": torch.get_num_threads()}
    return {"setting": setting, "environment": common.environment(), "sides": found}


def draw(source: Path) -> Path:
    """Draw the figure beside its JSON; returns the path of the PNG."""
    result = common.read_json(source)
    figure, axes = plots.plotting().subplots(
        2, 3, figsize=(12, 6.5), layout="constrained", sharey="col"
    )
    tasks = result["setting"]["adapters"]
    for line, (side, found) in zip(axes, result["sides"].items(), strict=True):
        ks, (spectrum, held_out, error) = found["ks"], line
        for kind, style in (("real", "-"), ("control", ":")):
            here = found[kind]
            part = here["spectrum"]
            spectrum.plot(range(1, len(part) + 1), part, f"k{style}", label=kind)
            median = torch.tensor(here["held_out"]).median(0).values
            held_out.plot(ks, median, f"k{style}", linewidth=2, label=f"{kind}, median task")
        for task in found["real"]["held_out"]:
            held_out.plot(ks, task, color="0.7", linewidth=0.7, zorder=0)
        for (name, values), style in zip(found["real"]["error"].items(), "-:.", strict=True):
            error.plot(ks, values, f"k{style}", label=name)
        cosine = found["real"]["cosine"]
        spectrum.set_title(
            f"{side}: energy in K components\ncosines between tasks: mean {cosine['mean']:.3f},"
            f" |largest| {cosine['largest absolute']:.2f}",
            fontsize="medium",
        )
        held_out.set_title(f"{side}: a task in the components of the others", fontsize="medium")
        error.set_title(f"{side}: relative error of all adapters", fontsize="medium")
        spectrum.set_ylabel("fraction of Σσ²")
        held_out.set_ylabel("fraction of the task's squared norm")
        error.set_ylabel("norm of the rest / norm")
        for axis in line:
            axis.set_xscale("log", base=2)
            axis.set_xlabel("K, principal components")
            axis.set_ylim(0, 1.02)
            axis.legend(fontsize="small")
    where = f"{result['setting']['modules']} modules, {len(tasks)} adapters"
    figure.suptitle(f"Mean over {where}; control: white noise of each adapter's norm")
    return plots.save_figure(figure, source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="measure first")
    parser.add_argument("--adapters", type=Path, help="folder of PEFT LoRA folders")
    parser.add_argument("--quick", action="store_true", help="two modules only")
    parser.add_argument("--seed", type=int, default=0, help="of the random control")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    if options.measure:
        if not options.adapters:
            parser.error("--measure needs --adapters FOLDER")
        result = measure(options.adapters, 2 if options.quick else None, options.seed)
        common.write_json(options.json, result)
    print(draw(options.json))


if __name__ == "__main__":
    main()
