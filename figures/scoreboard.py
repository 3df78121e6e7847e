# SPDX-License-Identifier: MIT
"""The project's scoreboard: every cost as a ratio measured side by side, and how costs grow.

python figures/scoreboard.py                     print the committed ratios and draw the curves
python figures/scoreboard.py --measure [--quick]  measure and compare with the committed ones
    --out JSON     where the measurement goes; figures/scoreboard.json updates the committed one

Contenders of a section take turns, round by round, so that what disturbs the machine disturbs them
alike; a ratio is the median over rounds of the quotients within a round. Peak memory is that of
torch's allocations, by its profiler; peers that are not installed are left out.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import eigenlorax
import hra
import resora
from figures import eigenlorax_cost, eigenlorax_serving, hra_cost, plots, resora_cost

HERE = Path(__file__).with_suffix(".json")
FULL = {
    "layer": dict(sizes=[1024], rank=8, rows=512, K=16, tasks=4, rounds=7),
    "step": resora_cost.FULL | dict(layers=4, rounds=9, rank=8),
    "components": dict(adapters=20, modules=6, d=768, r=8, K=32, rounds=5),
    "serving": eigenlorax_serving.FULL | dict(tasks=[64], rounds=11),
    "curves": dict(d=1024, r=8, N=512, K=16, adapters=16, tasks=16, rounds=15, doublings=3),
    "threads": 2,
}
QUICK = {
    "layer": dict(sizes=[32], rank=4, rows=16, K=8, tasks=2, rounds=2),
    "step": resora_cost.QUICK | dict(rounds=2, rank=4),
    "components": dict(adapters=3, modules=2, d=32, r=4, K=8, rounds=2),
    "serving": eigenlorax_serving.QUICK | dict(tasks=[4], rounds=2),
    "curves": dict(d=64, r=4, N=32, K=4, adapters=4, tasks=4, rounds=2, doublings=1),
    "threads": 2,
}


def peak(call: Callable) -> int:
    """The most bytes that a call holds at a time beyond what was there before."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def timed(calls: dict[str, Callable], rounds: int) -> dict[str, dict]:
    """What `ratios` takes for calls that are timed in turn."""
    return {k: own(v) for k, v in eigenlorax_cost.compared(calls, rounds).items()}


def own(row: dict) -> dict:
    """A row of the other cost figures in this one's words."""
    span = row.get("smallest and largest") or row["10 % to 90 %"]
    value = row.get("seconds") or 1 / row["sequences per second"]
    return {"value": value, "ratio": row["time / EigenLoRAx's"], "span": span}


def ratios(section: str, quantity: str, values: dict) -> list[dict]:
    """A row per contender; values: those of `timed`, or numbers, of the reference first."""
    first, reference = next(iter(values)), next(iter(values.values()))
    head = {"section": section, "quantity": quantity, "reference": first}
    rows = []
    for name, found in values.items():
        if not isinstance(found, dict):
            found = {"value": found, "ratio": found / reference, "span": None}
        rows.append(head | {"contender": name} | found)
    return rows


class Identity(nn.Linear):
    """A base that costs nothing, so that what is timed is the adapter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x itself."""
        return x


def recycled(base: nn.Linear, K: int, rank: int, tasks: int = 1) -> nn.Module:
    """EigenLoRAx around a base, on K random components."""
    o, d = base.weight.shape
    pair = torch.randn(o, K), torch.randn(K, d)
    subspace = eigenlorax.recycle([{"q": pair}], k=K)["q"]
    layer = eigenlorax.EigenLoRAxLinear(base, subspace, rank, tasks)
    for alpha in layer.alpha_B:
        nn.init.normal_(alpha, std=K**-0.5)
    return layer.to(base.weight.device)


def layers(plan: dict, d: int, device: str, dtype: torch.dtype) -> list[dict]:
    """One adapted Linear against the same with LoRA."""
    import peft

    r, rounds, target = plan["rank"], plan["rounds"], {"target_modules": ["layer"]}
    made = hra_cost.contenders(d, r, device, dtype)
    base = lambda: nn.Linear(d, d, device=device, dtype=dtype).requires_grad_(False)  # noqa: E731
    made = {"LoRA": made.pop("LoRA"), **made, "EigenLoRAx": recycled(base(), plan["K"], r)}
    oft = peft.OFTConfig(r=0, oft_block_size=2 * r, **target)
    boft = peft.BOFTConfig(boft_block_size=r, boft_n_butterfly_factor=2, **target)
    for name, config in (("OFT, PEFT", oft), ("BOFT, PEFT", boft)):
        made[name] = hra_cost.peft_layer(base(), config).to(device)
    x = torch.randn(plan["rows"], d, device=device, dtype=dtype, requires_grad=True)
    g, wait = torch.randn_like(x), torch.cuda.synchronize if x.is_cuda else lambda: None
    train = {k: lambda m=m: hra_cost.seconds(m, x, g) for k, m in made.items()}
    infer = {k: torch.no_grad()(lambda m=m: (m(x), wait())) for k, m in made.items()}
    saved = {k: hra_cost.saved_bytes(m, x)["saved_bytes"] for k, m in made.items()}
    section = f"a Linear, d = o = {d}, r = {r}, {device}"
    return [
        *ratios(section, "forward + backward", timed(train, rounds)),
        *ratios(section, "inference", timed(infer, rounds)),
        *ratios(section, "peak memory", {k: peak(call) for k, call in train.items()}),
        *ratios(section, "saved for backward", saved),
    ]


def steps(plan: dict) -> list[dict]:
    """A training step of a ViT with ReSoRA against the same without."""
    training = resora_cost.Training(plan, plan["rank"])
    calls = {n: lambda n=n: training.seconds(n) for n in ("plain", *resora.METRICS)}
    section = "a ViT's step, {layers} blocks of {hidden}, r = {rank}".format(**plan)
    held = {n: peak(call) for n, call in calls.items()}
    times = ratios(section, "forward + backward", timed(calls, plan["rounds"]))
    return times + ratios(section, "peak memory", held)


def components(plan: dict) -> list[dict]:
    """Components of a folder of adapters, from memory and from disk, against other ways."""
    section, rows = "components of {adapters} adapters, {modules} modules, d = {d}", []
    section = section.format(**plan)
    with tempfile.TemporaryDirectory() as folder:
        folders = eigenlorax_cost.write_adapters(Path(folder), plan, seed=0)
        found = eigenlorax_cost.measure_folder(plan, folders)
        sizes = eigenlorax_cost.measure_disk(plan, folders)
    for where in ("memory", "disk"):
        values = {name: own(row) for name, row in found[where].items()}
        rows += ratios(section, f"from {where}", values)
    held = {"EigenLoRAx": sizes["peak, lazy"], "all adapters loaded": sizes["peak, eager"]}
    return rows + ratios(section, "peak memory", held)


def served(plan: dict) -> list[dict]:
    """A batch of many tasks against PEFT's adapter_names."""
    generator, rows = torch.Generator().manual_seed(0), []
    for d in plan["widths"]:
        for case in eigenlorax_serving.measure_case(plan, d, plan["tasks"][0], generator):
            section = "{tasks} tasks in a batch, d = {d}, {tokens} token(s) each".format(**case)
            values = {name: own(row) for name, row in case["rows"].items()}
            held = {name: row["bytes"] for name, row in case["rows"].items() if row["bytes"]}
            rows += ratios(section, "inference", values)
            rows += ratios(section, "memory beyond the base", held)
    return rows


def adapters(s: dict, generator: torch.Generator) -> dict[str, tuple[Callable, float]]:
    """{what: (call, its flops by formula, to a factor)} at sizes s = {d, r, N, K, …}."""
    d, r, N, K, T = (s[k] for k in ("d", "r", "N", "K", "tasks"))
    m, n = s["adapters"] * r, min(N, 128)
    x = torch.randn(N, d, generator=generator).requires_grad_()
    base = lambda: Identity(d, d, bias=False)  # noqa: E731
    eigen, mixed = recycled(base(), K, r), recycled(base(), K, r, T)
    tokens = torch.randn(T, 32, d, generator=generator).requires_grad_()
    B, S = torch.randn(d, r), torch.randn(N, r, generator=generator).requires_grad_()
    stack = torch.randn(m, d, generator=generator)

    def both(call: Callable, *inputs) -> Callable:
        g = torch.ones_like(call(*inputs))
        return lambda: call(*inputs).backward(g)

    return {
        "HRA": (both(hra.HRALinear(base(), r, "random"), x), N * d * r + d * r**2 + r**3),
        "LoRA": (both(resora.LoRALinear(base(), r), x), N * d * r),
        "EigenLoRAx": (both(eigen, x), min(N * K, (N + K) * r) * d),
        "EigenLoRAx, 32 tokens a task": (both(mixed, tokens, torch.arange(T)), T * d * K),
        "R linear": (both(resora.redundancy, B, S, "linear"), N * r**2 + 2 * N * r),
        "R nonlinear": (both(resora.redundancy, B, S, "nonlinear"), r**2 * n**2 + 3 * r * n**2),
        "components": (
            lambda: eigenlorax.principal_components(stack, min(K, m), center=False),
            2 * m**2 * d + 9 * m**3,
        ),
    }


CURVES = {  # size: the costs that depend on it
    "d": ("HRA", "LoRA", "EigenLoRAx", "components"),
    "r": ("HRA", "LoRA", "R linear", "R nonlinear"),
    "N": ("HRA", "LoRA", "EigenLoRAx", "R linear", "R nonlinear"),
    "K": ("EigenLoRAx, 32 tokens a task",),
    "adapters": ("components",),
    "tasks": ("EigenLoRAx, 32 tokens a task",),
}
LABELS = {"d": "d = o", "r": "rank r", "N": "N, rows of x", "K": "K, components"}
LABELS |= {"adapters": "adapters of rank 8", "tasks": "tasks in a batch"}


def curves(plan: dict) -> list[dict]:
    """Seconds, the fewest of all rounds, and flops by formula, as each size is doubled."""
    found, generator = [], torch.Generator().manual_seed(0)
    for size, names in CURVES.items():
        for k in range(-1, plan["doublings"] + 1):
            x = round(plan[size] * 2**k)
            made = adapters(plan | {size: x}, generator)
            seconds = dict.fromkeys(names, math.inf)
            for name in plan["rounds"] * names:
                start = time.perf_counter()
                made[name][0]()
                seconds[name] = min(seconds[name], time.perf_counter() - start)
            about = {"size": size, "x": x}
            found += [
                about | {"curve": n, "work": made[n][1], "seconds": seconds[n]} for n in names
            ]
    return found


def slopes(points: list[dict]) -> tuple[float, float]:
    """Exponents over the last doubling of a curve: measured, and of the formula."""
    (x0, t0, w0), (x1, t1, w1) = ((p["x"], p["seconds"], p["work"]) for p in points[-2:])
    return math.log(t1 / t0, x1 / x0), math.log(w1 / w0, x1 / x0)


def fitted(points: list[dict]) -> list[float]:
    """Seconds as a constant plus a factor times the formula, by least squares of relative errors.

    The constant is what does not grow with this size: the start of some hundred operations, and
    reading x and writing y, which takes longer than products with so few columns.
    """
    t, w = (torch.tensor([p[k] for p in points], dtype=torch.float64) for k in ("seconds", "work"))
    columns = torch.stack([1 / t, w / w.mean() / t], 1)
    a, b = torch.linalg.lstsq(columns, torch.ones(len(t), 1, dtype=t.dtype)).solution[:, 0].tolist()
    if min(a, b) < 0:  # the other alone
        keep = columns[:, int(b > 0)]
        a, b = (x * float(keep.sum() / keep.square().sum()) for x in (float(b <= 0), float(b > 0)))
    return (a + b * w / w.mean()).tolist()


def measure(plan: dict) -> dict:
    """Everything, on this machine."""
    torch.set_num_threads(plan["threads"])
    torch.manual_seed(0)
    rows, settings = [], [("cpu", torch.float32, plan["layer"]["sizes"])]
    if torch.cuda.is_available():
        settings.append(("cuda", torch.bfloat16, [4 * d for d in plan["layer"]["sizes"]]))
    for device, dtype, sizes in settings:
        for d in sizes:
            rows += layers(plan["layer"], d, device, dtype)
    rows += steps(plan["step"]) + components(plan["components"]) + served(plan["serving"])
    where = common.environment() | {"threads": torch.get_num_threads()}
    return {"environment": where, "plan": plan, "rows": rows, "curves": curves(plan["curves"])}


def table(data: dict, committed: dict | None = None) -> str:
    """The rows as Markdown, with the committed ratio beside each if there is another board."""
    key = lambda row: (row["section"], row["quantity"], row["contender"])  # noqa: E731
    before = {key(row): f"{row['ratio']:.2f}" for row in (committed or {"rows": []})["rows"]}
    where = "{device}, {threads} threads, torch {torch}, peft {peft}".format(**data["environment"])
    lines = [["what", "", "", "ratio", "least to most", "committed"], ["---"] * 3 + ["---:"] * 3]
    for row in data["rows"]:
        if row["contender"] != row["reference"]:
            span = "{:.2f} to {:.2f}".format(*row["span"]) if row["span"] else ""
            name = f"{row['contender']} / {row['reference']}"
            numbers = [f"{row['ratio']:.2f}", span, before.get(key(row), "new")]
            lines.append([row["section"], row["quantity"], name, *numbers])
    width = 6 if committed else 5
    return "\n".join([where, "", *(f"| {' | '.join(line[:width])} |" for line in lines)])


def draw(source: Path) -> Path:
    """Draw the curves beside their JSON, write the table as Markdown; returns the PNG's path."""
    data = common.read_json(source)
    with common.replacing(source.with_suffix(".md")) as temporary:
        temporary.write_text(table(data) + "\n", encoding="utf-8")
    figure, axes = plots.plotting().subplots(2, 3, figsize=(12, 7), layout="constrained")
    off = []
    for axis, (size, names) in zip(axes.flat, CURVES.items(), strict=True):
        for name, look in zip(names, ("0.0 o", "0.35 s", "0.55 ^", "0.7 D", "0.2 v"), strict=False):
            points = [p for p in data["curves"] if (p["size"], p["curve"]) == (size, name)]
            x, seconds, model = (
                [p["x"] for p in points],
                [p["seconds"] for p in points],
                fitted(points),
            )
            off += [max(t / m, m / t) for t, m in zip(seconds, model, strict=True)]
            grey, marker = look.split()
            axis.plot(x, model, "--", color=grey, linewidth=0.8)
            axis.plot(x, seconds, marker, color=grey)
            axis.lines[-1].set_label("{}: {:.2f} ({:.2f})".format(name, *slopes(points)))
        axis.set(xscale="log", yscale="log", xlabel=LABELS[size], ylabel="seconds")
        axis.set_xticks(x, [str(v) for v in x])
        axis.xaxis.minorticks_off()
        axis.legend(fontsize="x-small").set_title("last exponent (the formula's)", {"size": 7})
    figure.suptitle(
        "Every cost is a constant plus a multiple of its formula (dashed):"
        f" the points are within a factor of {max(off):.1f}",
        fontsize="medium",
    )
    return plots.save_figure(figure, source)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="measure first")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--out", type=Path, metavar="JSON")
    options = parser.parse_args()
    committed = common.read_json(HERE) if HERE.exists() else None
    out = options.out or (Path("runs/scoreboard.json") if options.measure else HERE)
    if options.measure:
        common.check_writable(out)
        common.write_json(out, measure(QUICK if options.quick else FULL))
    print(table(common.read_json(out), committed))
    print(draw(out))


if __name__ == "__main__":
    common.one_line_errors(main)
