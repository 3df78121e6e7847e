# SPDX-License-Identifier: MIT
"""Errors against float64, and drift: draws numerics.png from numerics.json.

python -m figures.numerics               draw
python -m figures.numerics --measure     measure first (a minute), then draw

An error is max|found − wanted| / max|wanted|, the worst over sizes and seeds; `wanted` is the
float64 oracle on the numbers as the dtype holds them. Bounds are in units of the dtype's eps. Drift
is max|HᵀH − I| of an HRA layer in float32 while AdamW trains it; and, for each method, the error of
merge() in rounds of training and merging.
"""

import argparse
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import common
import eigenlorax
import hra
import resora
from figures import plots

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FULL = {"sizes": [64, 256, 768], "r": 8, "seeds": 5, "steps": 10_000, "rounds": 20, "between": 50}
QUICK = {"sizes": [64], "r": 4, "seeds": 2, "steps": 200, "rounds": 3, "between": 20}


def bound(quantity: str, dtype: torch.dtype, d: int) -> float:
    """In eps of the dtype that the answer comes in.

    4·√d for sums of d terms in float32. In half: 16 for a product of three matrices, each rounded,
    and 1 for what is rounded once. 256 for R of kernels, differences of differences.
    """
    if dtype != torch.float32:
        return 16.0 if quantity == "forward" else 1.0
    return 256.0 if quantity == "R nonlinear" else 4 * math.sqrt(d)


def layers(d: int, r: int, seed: int, dtype: torch.dtype) -> Iterator[tuple[str, nn.Module]]:
    """(method, layer) on a d × d base in a dtype, with parameters drawn at ordinary sizes."""
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator)

    def base() -> nn.Linear:
        """A Linear of unit gain."""
        linear = nn.Linear(d, d, dtype=dtype)
        with torch.no_grad():
            linear.weight.copy_(normal(d, d) / d**0.5)
            linear.bias.copy_(normal(d))
        return linear

    yield "HRA", hra.HRALinear(base(), r, "random", generator=generator)
    yield "HRA strict", hra.HRALinear(base(), r, "random", True, generator)
    lora = resora.LoRALinear(base(), r, generator=generator)
    lora.B.data = normal(d, r) / r**0.5
    yield "ReSoRA's LoRA", lora
    pairs = [{"q": (normal(d, r), normal(r, d) / d**0.5)} for _ in range(3)]
    subspace = eigenlorax.recycle(pairs)["q"]
    yield "EigenLoRAx", eigenlorax.EigenLoRAxLinear(base(), subspace, r, init="random")


def weight_of(layer: nn.Module) -> Tensor:
    """W' (o, d) in float64 by the slow way."""
    W = layer.base.weight.detach().double()
    if isinstance(layer, hra.HRALinear):
        U = layer.U.detach().double()
        return W @ hra.chain(hra.gram_schmidt(U) if layer.strict else U)
    if isinstance(layer, resora.LoRALinear):
        return W + layer.scaling * layer.B.detach().double() @ layer.A.detach().double()
    V_A, V_B, a, b = (
        X.detach().double() for X in (layer.V_A, layer.V_B, layer.alpha_A[0], layer.alpha_B[0])
    )
    return W + layer.scaling * V_B.T @ b @ a.T @ V_A


def error(found: Tensor, wanted: Tensor, size: float | None = None) -> tuple[float, torch.dtype]:
    """max|found − wanted| / max|wanted|, or / size; and the dtype that was found."""
    worst = (found.detach().double() - wanted).abs().max()
    return (worst / (size or wanted.abs().max())).item(), found.dtype


def quantities(d: int, r: int, seed: int, dtype: torch.dtype) -> Iterator[tuple[str, str, tuple]]:
    """(method, quantity, (error, dtype)) of one size and seed."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(32, d, generator=generator).to(dtype)
    for method, layer in layers(d, r, seed, dtype):
        W = weight_of(layer)
        y = x.double() @ W.T + layer.bias.double()
        yield method, "forward", error(layer(x), y)
        yield method, "merged weight", error(layer.merge().weight, W)
        if method == "HRA":
            U = layer.U.detach().to(dtype)
            gram = torch.nn.functional.normalize(U.double(), dim=0)
            wanted = (gram.T @ gram - torch.eye(r)).square().sum()
            yield method, "penalty", error(hra.penalty(U), wanted)
    B, S = (torch.randn(n, r, generator=generator).to(dtype) for n in (d, 4 * d))
    for metric in resora.METRICS:  # each in 0..1, so that the error is absolute
        wanted = resora.redundancy(B.double(), S.double(), metric)
        yield "ReSoRA", f"R {metric}", error(resora.redundancy(B, S, metric), wanted, 1.0)
    rows = torch.randn(3 * r, d, generator=generator).to(dtype)
    V = eigenlorax.principal_components(rows, center=False).V
    X = rows.double()
    found, kind = error((X @ V.double().T) @ V.double(), X)[0], V.dtype
    yield "EigenLoRAx", "components", (found, kind)


def train(layer: nn.Module, steps: int, generator: torch.Generator, seen=lambda step: None) -> None:
    """AdamW towards ever new random outputs."""
    parameters = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0, fused=True)
    dtype = layer.base.weight.dtype
    for step in range(steps):
        x, y = (torch.randn(8, layer.in_features, generator=generator).to(dtype) for _ in "xy")
        (layer(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen(step + 1)


def drifts(plan: dict) -> dict[str, dict[int, float]]:
    """{kind: {step: max|HᵀH − I|}} of HRA layers in float32 that are trained for long."""
    d, every, found = plan["sizes"][0], plan["steps"] // 10, {}
    kinds = {
        "identity": ("identity", False),
        "random": ("random", False),
        "strict": ("random", True),
    }
    for kind, options in kinds.items():
        generator = torch.Generator().manual_seed(0)
        layer = hra.HRALinear(nn.Linear(d, d), plan["r"], *options, generator)
        eye, found[kind] = torch.eye(d), {}

        def look(step: int, layer=layer, kind=kind, eye=eye) -> None:
            """Keep the drift of every tenth part."""
            if step % every == 0:
                H = hra.reflect(eye, layer.normals()).T.detach().double()
                found[kind][step] = (H.T @ H - eye).abs().max().item()

        train(layer, plan["steps"], generator, look)
    return found


def rounds(plan: dict) -> list[dict]:
    """Train, merge, compare, train on: the error of each merge against float64."""
    d, found = plan["sizes"][0], []
    for dtype in DTYPES:
        for method, layer in layers(d, plan["r"], 0, DTYPES[dtype]):
            generator, before = torch.Generator().manual_seed(0), layer.base.weight.clone()
            errors = []
            for _ in range(plan["rounds"]):
                train(layer, plan["between"], generator)
                errors.append(error(layer.merge().weight, weight_of(layer))[0])
            kept = torch.equal(before, layer.base.weight)
            found.append({"method": method, "dtype": dtype, "errors": errors, "base kept": kept})
    return found


def measure(plan: dict) -> dict:
    """All of it; the worst of each quantity is kept, with its bound."""
    worst = {}
    for dtype, kind in DTYPES.items():
        for d in plan["sizes"]:
            for seed in range(plan["seeds"]):
                for method, quantity, (found, answer) in quantities(d, plan["r"], seed, kind):
                    key, limit = (method, quantity, dtype), bound(quantity, answer, d)
                    in_eps = found / torch.finfo(answer).eps
                    if key not in worst or not in_eps / limit <= worst[key]["share"]:
                        about = {"d": d, "error": found, "in_eps": in_eps, "bound_in_eps": limit}
                        worst[key] = {**about, "share": in_eps / limit}
    names = ("method", "quantity", "dtype")
    table = [dict(zip(names, key, strict=True)) | value for key, value in worst.items()]
    d = plan["sizes"][0]
    return {
        "environment": common.environment(),
        "plan": plan,
        "errors": table,
        "drift": {"bound": 10 * d * torch.finfo(torch.float32).eps, "found": drifts(plan)},
        "rounds": rounds(plan),
    }


def said(data: dict) -> str:
    """The errors as a table, folded away."""
    rows = {}
    for cell in data["errors"]:
        shown = "{error:.1e} ({in_eps:.2f} of {bound_in_eps:.0f} eps)".format(**cell)
        rows.setdefault((cell["method"], cell["quantity"]), []).append(shown)
    table = plots.markdown([[*key, *cells] for key, cells in rows.items()], ["", "", *DTYPES], 2)
    return f"<details><summary>Every error, and its bound</summary>\n\n{table}\n\n</details>"


MARKERS = dict(zip(DTYPES, "Do^", strict=True))


def draw_errors(axis, cells: list[dict]) -> None:
    """Each quantity's worst error as a share of its bound."""
    names = list(dict.fromkeys(f"{c['method']}: {c['quantity']}" for c in cells))
    for dtype, marker in MARKERS.items():
        mine = [c for c in cells if c["dtype"] == dtype]
        places = [names.index(f"{c['method']}: {c['quantity']}") for c in mine]
        shares = [max(c["share"], 1e-4) for c in mine]
        axis.plot(shares, places, marker, label=dtype, color="0.2", fillstyle="none")
    axis.axvline(1, color="0.2", linewidth=0.8)
    axis.set(xscale="log", xlim=(None, 2), xlabel="worst error / its bound")
    plots.name_rows(axis, names, [])
    axis.legend(loc="upper left", bbox_to_anchor=(0.05, 0.95))
    worst = max(c["share"] for c in cells)
    axis.set_title(f"No error against float64 is above {100 * worst:.0f} % of its bound")


def draw_drift(axis, drift: dict) -> None:
    """How far HRA's H is from orthogonal while it is trained."""
    ends = [("bound", drift["bound"], "0.2")]
    for (kind, found), dash in zip(drift["found"].items(), ("-", "--", ":"), strict=True):
        heights = list(found.values())
        axis.plot([int(step) for step in found], heights, dash, color=plots.colour("hra"))
        ends.append((kind, heights[-1], plots.colour("hra")))
    axis.axhline(drift["bound"], color="0.2", linewidth=0.8)
    axis.set_xticks([0, 5000, 10000])
    axis.set(yscale="log", xlabel="steps of AdamW", title="HRA in training: max|HᵀH − I|")
    plots.name_lines(axis, ends)


def draw_rounds(axis, rounds: list[dict]) -> None:
    """The error of each merge, in eps of the dtype."""
    ends = []
    for row in rounds:
        errors = [error / torch.finfo(DTYPES[row["dtype"]]).eps for error in row["errors"]]
        turns = range(1, len(errors) + 1)
        style = {"marker": MARKERS[row["dtype"]], "fillstyle": "none", "alpha": 0.7}
        shade = plots.colour(row["method"])
        axis.plot(turns, errors, color=shade, linewidth=1, **style)
        if row["dtype"] == "float32":  # the largest of the three
            ends.append((row["method"], errors[-1], shade))
    axis.set(ylim=(0, None), xlabel="round of training and merging")
    axis.set_title("Merged again: error of W' in eps")
    plots.name_lines(axis, ends)


def draw(source: str | Path) -> Path:
    """Draw the figure beside the JSON; returns the path of the PNG."""
    data = common.read_json(source)
    figure = plots.plotting().figure(figsize=(plots.WIDTH, 7.2), layout="constrained")
    axes = figure.subplot_mosaic([["errors", "errors"], ["drift", "rounds"]], height_ratios=[3, 2])
    draw_errors(axes["errors"], data["errors"])
    draw_drift(axes["drift"], data["drift"])
    draw_rounds(axes["rounds"], data["rounds"])
    return plots.save_figure(figure, source)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="measure first")
    target = Path(__file__).with_suffix(".json")
    if parser.parse_args().measure:
        common.write_json(target, measure(FULL))
    print(draw(target))
