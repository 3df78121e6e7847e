"""Many tasks in one batch: draws eigenlorax_serving.png from eigenlorax_serving.json.

python -m figures.eigenlorax_serving                     draw
python -m figures.eigenlorax_serving --measure [--quick]  measure first (on a quiet machine)

A stack of adapted Linears and nothing else, so that what is compared is the adapters: one
sequence for each task, through EigenLoRAx with one index per sequence, through PEFT's LoRA with
adapter_names, and through one merged copy of the layers per task.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path

import peft
import torch
from torch import nn

import common
from eigenlorax import adapt, recycle, serving, set_task, to_bank
from figures import plots

FULL = dict(widths=[384, 768], layers=8, rank=8, K=16, noise=0.05, rounds=15)
FULL |= dict(tasks=[1, 8, 64], tokens=[1, 32])
QUICK = FULL | dict(widths=[64, 128], layers=2, rank=4, K=8, tasks=[1, 4], tokens=[1, 4], rounds=3)


def adapters(setting: dict, d: int, tasks: int, generator: torch.Generator) -> list[dict]:
    """LoRAs whose factors lie in a shared subspace of K directions, plus white noise."""
    r, K, out = setting["rank"], setting["K"], [{} for _ in range(tasks)]
    for name in map(str, range(setting["layers"])):
        shared = [torch.linalg.qr(torch.randn(d, K, generator=generator)).Q for _ in "BA"]
        for adapter in out:
            parts = []
            for V in shared:
                part = V @ torch.randn(K, r, generator=generator)
                rest = torch.randn(d, r, generator=generator)
                parts.append((part + setting["noise"] * part.norm() / rest.norm() * rest) / K**0.5)
            adapter[name] = parts[0], parts[1].T.contiguous()
    return out


def ours(base: nn.Module, pairs: list[dict], setting: dict):
    """(call, bytes held beyond the base, relative error of the mean ΔW)."""
    subspaces = recycle(pairs, k=min(setting["K"], setting["rank"] * len(pairs)))
    model = copy.deepcopy(base)
    layers = adapt(model, subspaces, setting["rank"], tasks=len(pairs))
    wrong = []
    for task, adapter in enumerate(pairs):
        set_task(layers, task, adapter)
        for name, (B, A) in adapter.items():
            B_0, A_0 = layers[name].pair(task)
            wrong.append(float((B @ A - B_0 @ A_0).norm() / (B @ A).norm()))
    held = sum(tensor.numel() for tensor in to_bank(layers).values())
    serving(layers, torch.arange(len(pairs))).__enter__()  # one block for all calls, as on a server
    return model, 4 * held, sum(wrong) / len(wrong)


def peft_lora(base: nn.Module, pairs: list[dict], setting: dict):
    """The same tasks as PEFT adapters t0, t1 …"""
    r = setting["rank"]
    config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=list(pairs[0]))
    model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name="t0")
    for task in range(1, len(pairs)):
        model.add_adapter(f"t{task}", config)
    held = 0
    for task, adapter in enumerate(pairs):
        for name, (B, A) in adapter.items():
            lora = model.base_model.model.get_submodule(name)
            with torch.no_grad():
                lora.lora_A[f"t{task}"].weight.copy_(A)
                lora.lora_B[f"t{task}"].weight.copy_(B)
            held += A.numel() + B.numel()
    names = [f"t{task}" for task in range(len(pairs))]
    model.eval()
    return (lambda x: model(x, adapter_names=names)), 4 * held, 0.0


def merged(base: nn.Module, pairs: list[dict], setting: dict):
    """One merged copy of the layers per task."""
    models = []
    for adapter in pairs:
        model = copy.deepcopy(base)
        for name, (B, A) in adapter.items():
            model.get_submodule(name).weight.data += B @ A
        models.append(model)
    held = sum(B.shape[0] * A.shape[1] for adapter in pairs for B, A in adapter.values())
    return (
        (lambda x: torch.cat([m(x[i : i + 1]) for i, m in enumerate(models)])),
        4 * held,
        0.0,
    )


CONTENDERS = {
    "EigenLoRAx": ours,
    "PEFT adapter_names": peft_lora,
    "merged copies": merged,
    "base, no adapter": lambda base, *_: (base, 0, 1.0),
}


@torch.no_grad()
def measure_case(setting: dict, d: int, tasks: int, generator: torch.Generator) -> list[dict]:
    """One case for each number of tokens."""
    base = nn.Sequential(*(nn.Linear(d, d) for _ in range(setting["layers"]))).eval()
    pairs = adapters(setting, d, tasks, generator)
    built = {name: make(base, pairs, setting) for name, make in CONTENDERS.items()}
    cases = []
    for tokens in setting["tokens"]:
        x = torch.randn(tasks, tokens, d, generator=generator)
        seconds: dict[str, list[float]] = {name: [] for name in built}
        wanted = built["merged copies"][0](x)
        error = {n: float((b[0](x) - wanted).norm() / wanted.norm()) for n, b in built.items()}
        for _ in range(setting["rounds"]):  # in turns, so that a busy machine hits all alike
            for name, (call, _, _) in built.items():
                start = time.perf_counter()
                call(x)
                seconds[name].append(time.perf_counter() - start)
        rows = {}
        for name, (_, held, wrong) in built.items():
            times = zip(seconds[name], seconds["EigenLoRAx"], strict=True)
            ratios = sorted(t / own for t, own in times)
            rows[name] = {
                "bytes": held,
                "sequences per second": tasks / statistics.median(seconds[name]),
                "time / EigenLoRAx's": statistics.median(ratios),
                "10 % to 90 %": [ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]],
                "relative error of ΔW": wrong,
                "relative error of the output": error[name],
            }
        cases.append({"d": d, "tasks": tasks, "tokens": tokens, "rows": rows})
    return cases


def measure(setting: dict, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    sizes = [(d, tasks) for d in setting["widths"] for tasks in setting["tasks"]]
    cases = [case for size in sizes for case in measure_case(setting, *size, generator)]
    setting = setting | {"seed": seed, "threads": torch.get_num_threads(), "dtype": "float32"}
    return {"setting": setting, "environment": common.environment(), "cases": cases}


def draw(source: Path) -> Path:
    """Draw the figure beside its JSON; returns the path of the PNG."""
    result = common.read_json(source)
    setting, cases = result["setting"], {}
    for case in result["cases"]:
        cases.setdefault((case["d"], case["tokens"]), []).append(case)
    panels = [(d, n) for d in setting["widths"] for n in setting["tokens"]]
    figure, axes = plots.plotting().subplots(
        1, 1 + len(panels), figsize=(3.4 * (1 + len(panels)), 3.8), layout="constrained"
    )
    for axis, panel in zip(axes, [panels[-1], *panels], strict=True):
        memory, (d, tokens) = axis is axes[0], panel
        for name, marker in zip(CONTENDERS, "os^x", strict=True):
            key, scale = ("bytes", 2**-20) if memory else ("sequences per second", 1)
            values = [case["rows"][name][key] * scale for case in cases[panel]]
            line = "k:" if name.startswith("base") else "k-"
            if values[0]:
                axis.plot(setting["tasks"], values, f"{line}{marker}", label=name)
        last = cases[panel][-1]["rows"]  # the largest number of tasks
        own, theirs = last["EigenLoRAx"], last["PEFT adapter_names"]
        peft_time, base_time = (
            last[name]["time / EigenLoRAx's"] for name in ("PEFT adapter_names", "base, no adapter")
        )
        axis.set_title(
            f"d = {d}, memory: {theirs['bytes'] / own['bytes']:.1f}× less than LoRA,\n"
            f"relative error of ΔW {own['relative error of ΔW']:.3f}"
            if memory
            else f"d = {d}, {tokens} token(s) a sequence:\n"
            f"{peft_time:.1f}× PEFT's speed; the base alone {peft_time / base_time:.1f}×",
            fontsize="small",
        )
        axis.set_ylabel("MiB held beyond the base" if memory else "sequences per second")
        axis.set(xscale="log", yscale="log", xlabel="tasks = sequences in the batch")
        axis.legend(fontsize="x-small")
    return plots.save_figure(figure, source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="measure first")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        result = measure(QUICK if options.quick else FULL, options.seed)
        common.write_json(options.json, result)
    print(draw(options.json))


if __name__ == "__main__":
    main()
