# SPDX-License-Identifier: MIT
"""Draw hra_drift.png from hra_drift.json: how far r reflections are from orthogonal, in each dtype.

python figures/hra_drift.py                draw
python figures/hra_drift.py --measure      measure first (minutes), then draw
    --quick        tiny sizes, to see that it runs
    --out JSON     another file than hra_drift.json

Three ways to H: ours (reflect on the identity), one reflection after the other in the same dtype,
and torch.linalg.householder_product on columns it can represent (unit lower trapezoidal; fp32 and
fp64 only). Each H is taken as computed and max|HᵀH − I| of it is taken in float64.
"""

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt

import hra

FULL = {"d": 512, "ranks": [2**k for k in range(10)], "seeds": [0, 1, 2], "rounds": 5}
QUICK = {"d": 16, "ranks": [1, 4, 16], "seeds": [0, 1], "rounds": 2}
DTYPES = ["float64", "float32", "float16", "bfloat16"]
METHODS = {
    "ours": ("0", "-", "D"),
    "one by one": ("0.5", "--", "o"),
    "householder_product": ("0.7", ":", "^"),
}


def one_by_one(U: torch.Tensor) -> torch.Tensor:
    """H₁…H_r by r rank-one updates, all in U's dtype."""
    H = torch.eye(len(U), dtype=U.dtype)
    for u in (U / U.norm(dim=0)).T:
        H = H - torch.outer(2 * (H @ u), u)
    return H


def columns(method: str, d: int, r: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """U (d, r), Gaussian; for torch's function its part below a diagonal of ones."""
    U = torch.randn(d, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if method == "householder_product":
        U = U.tril(-1) + torch.eye(d, r, dtype=torch.float64)
    return U.to(dtype)


def product(method: str, U: torch.Tensor) -> torch.Tensor:
    """H, or for torch's function its first r columns."""
    if method == "ours":
        return hra.reflect(torch.eye(len(U), dtype=U.dtype), U).T
    if method == "one by one":
        return one_by_one(U)
    return torch.linalg.householder_product(U, 2 / U.square().sum(0))


def measure_one(method: str, dtype: str, r: int, plan: dict) -> dict | None:
    """Drift per seed, and the seconds of forward and backward of Σ|H| per round."""
    if method == "householder_product" and dtype in ("float16", "bfloat16"):
        return None
    drift, seconds = [], []
    for seed in plan["seeds"]:
        U = columns(method, plan["d"], r, seed, getattr(torch, dtype))
        H = product(method, U).double()
        drift.append((H.T @ H - torch.eye(H.shape[1], dtype=H.dtype)).abs().max().item())
    for _ in range(plan["rounds"] if dtype == "float32" else 0):
        start = time.perf_counter()
        product(method, U.requires_grad_()).abs().sum().backward()
        seconds.append(time.perf_counter() - start)
    found = {"method": method, "dtype": dtype, "r": r, "drift": drift}
    return found | (
        {"seconds": seconds, "median_seconds": statistics.median(seconds)} if seconds else {}
    )


def measure(target: Path, plan: dict) -> None:
    """Write the JSON, whole or not at all."""
    versions = {name: version(name) for name in ("torch",)}
    environment = {
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    } | versions
    runs = [(m, t, r) for t in DTYPES for r in plan["ranks"] for m in METHODS]
    found = [measure_one(*run, plan) for run in runs]
    result = {"environment": environment, "plan": plan, "results": [f for f in found if f]}
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, target)


def draw(source: Path) -> Path:
    """Draw the figure beside its JSON; returns the path of the PNG."""
    data = json.loads(source.read_text(encoding="utf-8"))
    d, ranks = data["plan"]["d"], data["plan"]["ranks"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5), layout="constrained")
    for method, (grey, line, marker) in METHODS.items():
        style = {"color": grey, "linestyle": line, "marker": marker, "markersize": 4}
        for dtype in DTYPES:
            rows = [w for w in data["results"] if (w["method"], w["dtype"]) == (method, dtype)]
            if not rows:
                continue
            r, middle = (
                [w["r"] for w in rows],
                [max(statistics.median(w["drift"]), 1e-17) for w in rows],
            )
            left.plot(r, middle, label=method if dtype == "float64" else None, **style)
            left.fill_between(
                r,
                [max(min(w["drift"]), 1e-17) for w in rows],
                [max(w["drift"]) for w in rows],
                color=grey,
                alpha=0.2,
            )
            if method == "ours":
                left.annotate(
                    dtype,
                    (r[0], middle[0]),
                    xytext=(0, -11),
                    textcoords="offset points",
                    fontsize="small",
                )
            if dtype == "float32":
                right.plot(r, [w["median_seconds"] for w in rows], label=method, **style)
    bound = 10 * d * torch.finfo(torch.float32).eps
    left.axhline(bound, color="0.3", linewidth=0.8)
    left.annotate(
        "10·d·eps of float32",
        (ranks[-1], bound),
        ha="right",
        xytext=(0, 3),
        textcoords="offset points",
        fontsize="small",
    )
    ours = [w for w in data["results"] if (w["method"], w["dtype"]) == ("ours", "float32")]
    worst = max(max(w["drift"]) for w in ours)
    left.set_ylabel("max|HᵀH − I| (line: median of seeds, band: all)")
    right.set_ylabel("forward + backward of Σ|H| in s, float32 (median)")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("r, reflections")
        axis.set_xticks(ranks, [str(r) for r in ranks])
        axis.legend(fontsize="small")
        axis.grid(color="0.92")
    figure.suptitle(
        f"{ranks[-1]} reflections in float32 stay orthogonal to {worst / bound:.1%} of 10·d·eps"
        f" (d = {d})"
    )
    target = source.with_suffix(".png")
    figure.savefig(target, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="measure first")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_suffix(".json"), metavar="JSON"
    )
    options = parser.parse_args()
    if options.measure:
        measure(options.out, QUICK if options.quick else FULL)
    print(draw(options.out))
