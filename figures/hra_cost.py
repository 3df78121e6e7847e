# SPDX-License-Identifier: MIT
"""Draw hra_cost.png from hra_cost.json: what a training step costs behind one adapted Linear.

python figures/hra_cost.py                draw
python figures/hra_cost.py --measure      measure first (minutes to an hour), then draw
    --quick        tiny sizes, to see that it runs
    --out JSON     another file than hra_cost.json

All contenders of a size are timed in turn, round by round, so that what disturbs the machine
disturbs them alike; a ratio is the median over rounds of the quotients within a round.
"""

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from torch import nn

import hra

FULL = {"sizes": [768, 2048, 4096], "ranks": [8, 32], "rows": 512, "rounds": 11, "seed": 0}
QUICK = {"sizes": [32, 48, 64], "ranks": [4, 8], "rows": 16, "rounds": 3, "seed": 0}
CONTENDERS = ["base alone", "LoRA", "HRA, ours", "HRA, PEFT", "literal chain"]
LOOKS = dict(zip(CONTENDERS, ["0.6 o :", "0 s --", "0 D -", "0.35 ^ -.", "0.6 v -"], strict=True))
CHAIN_FLOPS = 1e12  # the chain's 6·r·d³ flops beyond this are not waited for
SLOW, FEW = 5.0, 3  # a contender that takes longer than SLOW seconds runs in the first FEW rounds


class Chain(nn.Module):
    """x (W H₁…H_r)ᵀ with every H_i a dense d×d matrix."""

    def __init__(self, base: nn.Linear, r: int) -> None:
        super().__init__()
        self.base, self.U = (
            base,
            nn.Parameter(torch.randn(base.in_features, r, device=base.weight.device)),
        )

    def forward(self, x):
        H = hra.chain(self.U).to(x.dtype)
        return nn.functional.linear(x, self.base.weight @ H, self.base.bias)


def peft_layer(base: nn.Linear, config) -> nn.Module:
    """The base inside PEFT's layer for `config`."""
    from peft import inject_adapter_in_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return inject_adapter_in_model(config, nn.ModuleDict({"layer": base}))["layer"]


def lora(base: nn.Linear, r: int) -> tuple[nn.Module, str]:
    """resora's LoRALinear, or PEFT's LoRA if this file travels without resora.py."""
    try:
        from resora import LoRALinear
    except ImportError:
        from peft import LoraConfig

        return peft_layer(base, LoraConfig(r=r, target_modules=["layer"])), "peft.LoraConfig"
    return LoRALinear(base, r), "resora.LoRALinear"


def contenders(d: int, r: int, device: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """{name: module}, each with a base of its own values but the same shape."""
    from peft import HRAConfig

    def base():
        return nn.Linear(d, d, device=device, dtype=dtype).requires_grad_(False)

    found = {
        "base alone": base(),
        "LoRA": lora(base(), r)[0],
        "HRA, ours": hra.HRALinear(base(), r, "random"),
        "HRA, PEFT": peft_layer(
            base(), HRAConfig(r=r, init_weights=False, target_modules=["layer"])
        ).to(device),
    }
    if 6 * r * d**3 <= CHAIN_FLOPS:
        found["literal chain"] = Chain(base(), r)
    return found


def saved_bytes(module: nn.Module, x: torch.Tensor) -> dict[str, int]:
    """Bytes kept for backward, each storage once: without and with the module's parameters."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept, alive = {}, []

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        alive.append(t)  # an address must not be used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    return {
        "saved_bytes": sum(n for at, n in kept.items() if at not in own),
        "saved_bytes_with_parameters": sum(kept.values()),
    }


def seconds(step, x: torch.Tensor, g: torch.Tensor) -> float:
    """One forward and backward."""
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(x).backward(g)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_size(
    d: int, r: int, device: str, dtype: torch.dtype, compiled: bool, plan: dict
) -> list:
    """One row per contender."""
    torch.manual_seed(plan["seed"])
    modules = contenders(d, r, device, dtype)
    x = torch.randn(plan["rows"], d, device=device, dtype=dtype, requires_grad=True)
    g = torch.randn(plan["rows"], d, device=device, dtype=dtype)
    rows = {name: saved_bytes(m, x) for name, m in modules.items()}
    steps = {name: torch.compile(m) if compiled else m for name, m in modules.items()}
    for name, step in steps.items():  # warm-up: allocations, kernels, compilation
        for _ in range(3 if compiled else 1):
            rows[name]["warm_up"] = seconds(step, x, g)
    times = {name: [] for name in steps}
    for k in range(plan["rounds"]):
        for name, step in steps.items():
            if k < FEW or rows[name]["warm_up"] < SLOW:
                times[name].append(seconds(step, x, g))
    setting = {"device": device, "dtype": str(dtype).removeprefix("torch."), "compiled": compiled}
    for name, row in rows.items():
        quotients = [a / b for a, b in zip(times[name], times["LoRA"], strict=False)]
        row |= setting | {"contender": name, "d": d, "r": r, "rows": plan["rows"]}
        row |= {"seconds": times[name], "median_seconds": statistics.median(times[name])}
        row["times_lora"] = statistics.median(quotients)
        row["times_lora_range"] = [min(quotients), max(quotients)]
        del row["warm_up"]
    return list(rows.values())


def environment() -> dict:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if "model name" in line
        ]
        cpu = names[0] if names else cpu
    found = {"cpu": cpu, "threads": torch.get_num_threads(), "python": platform.python_version()}
    found |= {name: version(name) for name in ("torch", "peft", "transformers")}
    found["load_before"] = os.getloadavg() if hasattr(os, "getloadavg") else None
    found["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found


def measure(target: Path, plan: dict) -> None:
    """Write the JSON: after each size, and whole or not at all."""
    settings = [("cpu", torch.float32, False)]
    if torch.cuda.is_available():
        settings += [("cuda", torch.bfloat16, False), ("cuda", torch.bfloat16, True)]
    where = lora(nn.Linear(2, 2), 1)[1]
    result = {"environment": environment(), "plan": plan, "lora": where, "results": []}
    for device, dtype, compiled in settings:
        for d in plan["sizes"]:
            for r in plan["ranks"]:
                result["results"] += measure_size(d, r, device, dtype, compiled, plan)
                temporary = target.with_suffix(".tmp")
                temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                os.replace(temporary, target)


def draw(source: Path) -> Path:
    """Draw the figure beside its JSON; returns the path of the PNG."""
    data = json.loads(source.read_text(encoding="utf-8"))
    results, plan = data["results"], data["plan"]
    first = {key: results[0][key] for key in ("device", "dtype", "compiled")}
    rows = [row for row in results if all(row[k] == v for k, v in first.items())]
    ranks = sorted({row["r"] for row in rows})
    figure, axes = plt.subplots(
        2, len(ranks), figsize=(9, 6.5), sharex=True, sharey="row", layout="constrained"
    )
    for column, r in zip(axes.T, ranks, strict=True):
        for name, look in LOOKS.items():
            grey, marker, line = look.split()
            mine = sorted(
                (row for row in rows if row["r"] == r and row["contender"] == name),
                key=lambda w: w["d"],
            )
            style = {"color": grey, "marker": marker, "linestyle": line, "label": name}
            d = [row["d"] for row in mine]
            middle = [row["median_seconds"] for row in mine]
            low = [m - min(row["seconds"]) for m, row in zip(middle, mine, strict=True)]
            high = [max(row["seconds"]) - m for m, row in zip(middle, mine, strict=True)]
            column[0].errorbar(d, middle, yerr=[low, high], capsize=3, **style)
            if name != "base alone":  # which keeps nothing but its frozen weight
                column[1].plot(d, [row["saved_bytes"] / 2**20 for row in mine], **style)
        column[0].set_title(f"r = {r}", fontsize="medium")
        column[1].set_xlabel("d = o")
        for axis in column:
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xticks(plan["sizes"], [str(d) for d in plan["sizes"]])
            axis.minorticks_off()
            axis.grid(color="0.9")
    axes[0, 0].set_ylabel("forward + backward in s\n(median; bars: fastest, slowest)")
    axes[1, 0].set_ylabel("saved for backward in MiB\n(parameters left out)")
    axes[0, 0].legend(fontsize="small")
    big = {
        row["contender"]: row
        for row in rows
        if row["d"] == plan["sizes"][-1] and row["r"] == ranks[0]
    }
    ours, peft = big["HRA, ours"]["times_lora"], big["HRA, PEFT"]["times_lora"]
    figure.suptitle(
        f"HRA takes {ours:.2f}× LoRA's time, PEFT's HRA {peft:.0f}×"
        f" (d = {plan['sizes'][-1]}, r = {ranks[0]}, {plan['rows']} rows,"
        f" {first['dtype']}, {first['device'].upper()})"
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
