# SPDX-License-Identifier: MIT
"""Draw resora_cost.png from resora_cost.json: what ReSoRA adds to a training step of a transformer.

python -m figures.resora_cost                draw
python -m figures.resora_cost --measure      measure first (ten minutes on two cores), then draw
    --quick        tiny sizes, to see that it runs
    --out JSON     another file than resora_cost.json

The model is a ViT-S of random weights with LoRALinear on query and value. A step is forward, the
penalty, backward, AdamW. The contenders of a rank are timed in turn, round by round, so that what
disturbs the machine disturbs them alike; a ratio is the median over rounds of the quotients to the
plain step of the same round. The materialised penalty is run, forward and backward, on one layer,
since all would take minutes; its time and memory are multiplied by the number of layers. Peak
memory is that of a fresh process for each contender (on CUDA: of the allocator).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from common import environment, one_line_errors, read_json, targets_of, write_json
from figures.plots import plotting, save_figure
from resora import METRICS, LoRALinear, ReSoRA, adapt, redundancy_dense

ROOT = Path(__file__).parents[1]
FULL = {
    "hidden": 384,
    "layers": 12,
    "heads": 6,
    "image": 224,
    "patch": 16,
    "batch": 8,
    "ranks": [2, 4, 8, 16],
    "rounds": 9,
    "dense_rounds": 2,
    "seed": 0,
    "threads": min(2, os.cpu_count() or 1),
}
QUICK = FULL | {
    "hidden": 32,
    "layers": 2,
    "heads": 2,
    "image": 32,
    "batch": 4,
    "ranks": [2, 4],
    "rounds": 3,
    "dense_rounds": 2,
}
DENSE = "materialised"
CONTENDERS = ["plain", *METRICS, *(f"{metric}, {DENSE}" for metric in METRICS)]
LOOKS = dict(zip(METRICS, ["0.55 o", "0.35 s", "0.0 D", "0.2 ^"], strict=True))


class Dense:
    """redundancy_dense of one layer of `model`, with ReSoRA's interface."""

    def __init__(self, model: nn.Module, metric: str) -> None:
        self.layer = next(m for m in model.modules() if isinstance(m, LoRALinear))
        self.metric = metric
        self.handle = self.layer.register_forward_pre_hook(self.record)

    def record(self, layer: nn.Module, args: tuple) -> None:
        self.x = args[0].detach().flatten(0, -2)

    def penalty(self) -> torch.Tensor:
        B, A = self.layer.pair()
        return redundancy_dense(B, self.x @ A.T, self.metric)

    def remove(self) -> None:
        self.handle.remove()
        del self.x


class Training:
    """A model and its step."""

    def __init__(self, plan: dict, r: int) -> None:
        from transformers import ViTConfig, ViTForImageClassification

        torch.manual_seed(plan["seed"])
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        config = ViTConfig(
            hidden_size=plan["hidden"],
            num_hidden_layers=plan["layers"],
            num_attention_heads=plan["heads"],
            intermediate_size=4 * plan["hidden"],
            image_size=plan["image"],
            patch_size=plan["patch"],
            num_labels=10,
        )
        self.model = ViTForImageClassification(config).to(self.device).train()
        modules = adapt(self.model, targets_of(self.model), rank=r)
        for m in modules.values():
            nn.init.normal_(m.B, std=0.02)  # as in the second stage, where B is not zero
        self.count = len(modules)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])
        shape = plan["batch"], 3, plan["image"], plan["image"]
        self.images = torch.randn(shape, device=self.device)
        self.labels = torch.randint(0, 10, shape[:1], device=self.device)

    def added(self, metric: str) -> float:
        """What the materialised penalty of every layer would add to a step: one layer's, scaled."""
        regularizer = Dense(self.model, metric)
        with torch.no_grad():
            self.model(pixel_values=self.images)
        self.synchronize()
        start = time.perf_counter()
        regularizer.penalty().backward()
        self.synchronize()
        elapsed = time.perf_counter() - start
        self.optimizer.zero_grad()
        regularizer.remove()
        return self.count * elapsed

    def seconds(self, contender: str) -> float:
        """One step."""
        metric, _, dense = contender.partition(", ")
        regularizer = None
        if metric != "plain":
            regularizer = (Dense if dense else ReSoRA)(self.model, metric)
        self.synchronize()
        start = time.perf_counter()
        loss = self.model(pixel_values=self.images, labels=self.labels).loss
        if regularizer:
            loss = loss + 0.1 * regularizer.penalty()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.synchronize()
        elapsed = time.perf_counter() - start
        if regularizer:
            regularizer.remove()
        return elapsed

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def peak_bytes(plan: dict, r: int, contender: str) -> int:
    """Of a step in this process, which has done nothing else."""
    torch.set_num_threads(plan["threads"])
    training = Training(plan, r)
    training.seconds(contender)
    if training.device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would report the parent's peak if that is larger
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def peak_in_new_process(plan: dict, r: int, contender: str) -> int:
    arguments = ["-m", "figures.resora_cost", "--peak", json.dumps([plan, r, contender])]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def measure_rank(plan: dict, r: int) -> list[dict]:
    """One row per contender."""
    training = Training(plan, r)
    times = {name: [] for name in CONTENDERS}
    closed = [name for name in CONTENDERS if DENSE not in name]
    for name in closed:
        training.seconds(name)  # warm-up
    for k in range(plan["rounds"]):
        turn = k % len(closed)  # nobody is always the first
        for name in closed[turn:] + closed[:turn]:
            times[name].append(training.seconds(name))
    for name in set(CONTENDERS) - set(closed):
        plain = times["plain"][: plan["dense_rounds"]]
        times[name] = [step + training.added(name.partition(", ")[0]) for step in plain]
    peaks = {name: peak_in_new_process(plan, r, name) for name in CONTENDERS}
    rows = []
    for name in CONTENDERS:
        pairs = list(zip(times[name], times["plain"], strict=False))
        scale = training.count if DENSE in name else 1  # one layer at a time is materialised
        ratios = [a / b for a, b in pairs]
        row = {"rank": r, "contender": name, "seconds": times[name]}
        row["times_plain"] = statistics.median(ratios)
        row["times_plain_range"] = [min(ratios), max(ratios)]
        row["peak_bytes"] = peaks[name]
        row["extra_bytes"] = scale * (peaks[name] - peaks["plain"])
        rows.append(row)
    return rows


def measure(target: Path, plan: dict) -> None:
    """Write the JSON after each rank, whole or not at all."""
    torch.set_num_threads(plan["threads"])
    where = environment() | {"threads": torch.get_num_threads(), "load_before": os.getloadavg()}
    result = {"environment": where, "plan": plan, "results": []}
    for r in plan["ranks"]:
        result["results"] += measure_rank(plan, r)
        write_json(target, result)


def draw(source: Path) -> Path:
    """Draw the figure beside its JSON; returns the path of the PNG."""
    data = read_json(source)
    results, plan = data["results"], data["plan"]
    ranks = sorted({row["rank"] for row in results})
    rows = {(row["contender"], row["rank"]): row for row in results}
    figure, (left, right) = plotting().subplots(1, 2, figsize=(10, 4.8), layout="constrained")
    for metric, look in LOOKS.items():
        grey, marker = look.split()
        for name, line, fill in ((metric, "-", None), (f"{metric}, {DENSE}", ":", "white")):
            mine = [rows[name, r] for r in ranks]
            style = {"color": grey, "marker": marker, "linestyle": line, "label": name}
            style["markerfacecolor"] = fill or grey
            extra = [100 * (row["times_plain"] - 1) for row in mine]
            ends = [[100 * (end - 1) for end in row["times_plain_range"]] for row in mine]
            low = [m - a for m, (a, _) in zip(extra, ends, strict=True)]
            high = [b - m for m, (_, b) in zip(extra, ends, strict=True)]
            left.errorbar(ranks, extra, yerr=[low, high], capsize=2, **style)
            right.plot(ranks, [row["extra_bytes"] / 2**20 for row in mine], **style)
    left.set_yscale("symlog", linthresh=10)
    right.set_yscale("symlog", linthresh=10)
    left.set_ylabel("added to the time of a step in %\n(median; bars: least, most)")
    right.set_ylabel("added to the peak memory in MiB")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ranks, [str(r) for r in ranks])
        axis.set_xlabel("rank r")
        axis.grid(color="0.9")
        axis.axhline(0, color="0.7", linewidth=0.8)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    r = 8 if 8 in ranks else ranks[-1]
    closed = 100 * (rows["linear", r]["times_plain"] - 1)
    dense = rows[f"linear, {DENSE}", r]["times_plain"]
    figure.suptitle(
        f"In closed form, linear changes a step by {closed:+.1f} %; materialised, a step takes"
        f" {dense:.0f}× (r = {r}, {plan['layers']} blocks, d = {plan['hidden']},"
        f" batch {plan['batch']})",
        fontsize="medium",
    )
    return save_figure(figure, source)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="measure first")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    default = Path(__file__).with_suffix(".json")
    parser.add_argument("--out", type=Path, default=default, metavar="JSON")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak_bytes(*json.loads(options.peak)))
        return
    if options.measure:
        measure(options.out, QUICK if options.quick else FULL)
    print(draw(options.out))


if __name__ == "__main__":
    one_line_errors(main)
