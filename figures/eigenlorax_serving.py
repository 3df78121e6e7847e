"""Many tasks in one batch: draws eigenlorax_serving.png from eigenlorax_serving.json.

python figures/eigenlorax_serving.py                     draw
python figures/eigenlorax_serving.py --measure [--quick]  measure first (on a quiet machine)

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
from eigenlorax import adapt, recycle, serving

FULL = dict(d=768, layers=8, rank=8, K=16, noise=0.05, tasks=[1, 8, 64], tokens=[1, 32], rounds=15)
QUICK = dict(d=128, layers=2, rank=4, K=8, noise=0.05, tasks=[1, 4], tokens=[1, 4], rounds=3)


def adapters(setting: dict, tasks: int, generator: torch.Generator) -> list[dict]:
    """LoRAs whose factors lie in a shared subspace of K directions, plus white noise."""
    d, r, K, out = setting["d"], setting["rank"], setting["K"], [{} for _ in range(tasks)]
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
    modules = adapt(model, subspaces, setting["rank"], tasks=len(pairs))
    wrong = []
    for task, adapter in enumerate(pairs):
        for name, (B, A) in adapter.items():
            modules[name].set_task(task, B, A)
            B_0, A_0 = modules[name].pair(task)
            wrong.append(float((B @ A - B_0 @ A_0).norm() / (B @ A).norm()))
    held = sum(t.numel() for m in modules.values() for t in (m.V_A, m.V_B, m.alpha_A, m.alpha_B))
    ids = torch.arange(len(pairs))

    def call(x: torch.Tensor) -> torch.Tensor:
        with serving(modules, ids):
            return model(x)

    return call, 4 * held, sum(wrong) / len(wrong)


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


CONTENDERS = {"EigenLoRAx": ours, "PEFT adapter_names": peft_lora, "merged copies": merged}


@torch.no_grad()
def measure(setting: dict, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    d = setting["d"]
    base = nn.Sequential(*(nn.Linear(d, d) for _ in range(setting["layers"]))).eval()
    cases = []
    for tasks in setting["tasks"]:
        pairs = adapters(setting, tasks, generator)
        built = {name: make(base, pairs, setting) for name, make in CONTENDERS.items()}
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
            cases.append({"tasks": tasks, "tokens": tokens, "rows": rows})
    setting = setting | {"seed": seed, "threads": torch.get_num_threads(), "dtype": "float32"}
    return {"setting": setting, "environment": common.environment(), "cases": cases}


def draw(source: Path) -> Path:
    """Draw the figure beside its JSON; returns the path of the PNG."""
    result = common.read_json(source)
    cases, tokens = result["cases"], result["setting"]["tokens"]
    size = 4 * (len(tokens) + 1), 3.6
    figure, (memory, *speeds) = common.plotting().subplots(
        1, len(tokens) + 1, figsize=size, layout="constrained"
    )
    for name, marker in zip(cases[0]["rows"], "os^", strict=True):
        for axis, n in zip([memory, *speeds], [tokens[0], *tokens], strict=True):
            chosen = [case for case in cases if case["tokens"] == n]
            key = "bytes" if axis is memory else "sequences per second"
            scale = 2**-20 if axis is memory else 1
            values = [case["rows"][name][key] * scale for case in chosen]
            axis.plot([case["tasks"] for case in chosen], values, f"k-{marker}", label=name)
    last = {case["tokens"]: case for case in cases}  # the largest number of tasks
    theirs = last[tokens[0]]["rows"]["PEFT adapter_names"]
    own = last[tokens[0]]["rows"]["EigenLoRAx"]
    memory.set_title(
        f"memory: {theirs['bytes'] / own['bytes']:.1f}× less than LoRA,\n"
        f"relative error of ΔW {own['relative error of ΔW']:.3f}",
        fontsize="medium",
    )
    memory.set_ylabel("MiB held beyond the base")
    for axis, n in zip(speeds, tokens, strict=True):
        times = last[n]["rows"]["PEFT adapter_names"]["time / EigenLoRAx's"]
        axis.set_title(f"{n} token(s) per sequence:\n{times:.1f}× PEFT's speed", fontsize="medium")
        axis.set_ylabel("sequences per second")
    for axis in (memory, *speeds):
        axis.set(xscale="log", yscale="log", xlabel="tasks = sequences in the batch")
        axis.legend(fontsize="small")
    return common.save_figure(figure, source)


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
