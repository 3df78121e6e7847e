"""What the methods cost beside their alternatives: draws costs.png from costs.json.

python -m figures.costs                          draw
python -m figures.costs --measure hra resora …   measure these parts first, on a quiet machine; the
                       parts: hra, resora, folder, disk, stack, serving; all if none is named
    --quick            tiny sizes, to see that it runs
    --out JSON         another file than costs.json, with whose ratios it is then compared

Calls that are compared take turns, round by round, so that what disturbs the machine disturbs them
alike. A ratio is the median over rounds of the quotients within a round, and its range leaves out
the lowest and the highest tenth of them.
"""

import argparse
import copy
import importlib.util
import itertools
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

import common
import eigenlorax
import hra
import resora
from figures import plots

HERE = Path(__file__).with_suffix(".json")
FULL = {
    "hra": dict(sizes=[768, 4096], ranks=[8, 32], rows=512, rounds=11),
    "resora": dict(hidden=384, layers=12, heads=6, image=224, batch=8, r=4, rounds=9),
    "folder": dict(adapters=20, modules=24, d=768, r=8, K=32, rounds=7),
    "disk": dict(adapters=200, modules=24, d=768, r=8, K=32),
    "stack": dict(m=8000, n=4096, K=256, rounds=1),
    "serving": dict(widths=[384, 768], layers=8, r=8, K=16, tasks=64, tokens=[1, 32], rounds=15),
}
QUICK = {
    "hra": dict(sizes=[32, 64], ranks=[4], rows=16, rounds=3),
    "resora": dict(hidden=32, layers=2, heads=2, image=32, batch=4, r=4, rounds=3),
    "folder": dict(adapters=4, modules=2, d=64, r=4, K=8, rounds=3),
    "disk": dict(adapters=10, modules=4, d=64, r=4, K=8),
    "stack": dict(m=300, n=200, K=16, rounds=2),
    "serving": dict(widths=[64], layers=2, r=4, K=8, tasks=4, tokens=[1, 4], rounds=3),
}
NOISE = 0.05  # in the constructed adapters that are served

# ---------------------------------------------------------------- comparing


def elapsed(call: Callable) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def timed(calls: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """The seconds of each call in each round, after a first round that is not counted."""
    names, seconds = list(calls), {name: [] for name in calls}
    for i in range(rounds + 1):
        turn = i % len(names)  # nobody is always the first
        for name in names[turn:] + names[:turn]:
            seconds[name].append(elapsed(calls[name]))
    return {name: times[1:] for name, times in seconds.items()}


def compared(case: str, seconds: dict[str, list[float]], reference: str) -> list[dict]:
    """A row for each call: its median seconds, and its ratio to the reference with a range."""
    rows = []
    for name, times in seconds.items():
        quotients = sorted(a / b for a, b in zip(times, seconds[reference], strict=False))
        tenth = len(quotients) // 10
        rows.append(
            {
                "case": case,
                "contender": name,
                "reference": reference,
                "seconds": statistics.median(times),
                "ratio": statistics.median(quotients),
                "range": [quotients[tenth], quotients[-1 - tenth]],
            }
        )
    return rows


# ---------------------------------------------------------------- HRA: one adapted Linear


def adapted(d: int, r: int) -> dict[str, nn.Module]:
    """One Linear in every way that is compared."""
    from peft import HRAConfig, inject_adapter_in_model

    def base() -> nn.Linear:
        """Frozen, with its own values but the same shape."""
        return nn.Linear(d, d).requires_grad_(False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = HRAConfig(r=r, init_weights=False, target_modules=["layer"])
        theirs = inject_adapter_in_model(config, nn.ModuleDict({"layer": base()}))["layer"]
    return {
        "base alone": base(),
        "LoRA": resora.LoRALinear(base(), r),
        "HRA, ours": hra.HRALinear(base(), r, "random"),
        "HRA, PEFT": theirs,
    }


def saved(module: nn.Module, x: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for backward, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept, alive = {}, []

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        alive.append(t)  # an address must not be used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    return sum(size for place, size in kept.items() if place not in own)


def there_and_back(module: nn.Module, x: torch.Tensor, g: torch.Tensor) -> None:
    """Forward, and backward from the gradient g."""
    module(x).backward(g)


def measure_hra(plan: dict) -> list[dict]:
    """Forward and backward of one Linear against the same with LoRA."""
    rows = []
    for d, r in itertools.product(plan["sizes"], plan["ranks"]):
        modules = adapted(d, r)
        x, g = torch.randn(2, plan["rows"], d)
        x.requires_grad_()
        calls = {name: partial(there_and_back, m, x, g) for name, m in modules.items()}
        found = compared(f"d = {d}, r = {r}", timed(calls, plan["rounds"]), "LoRA")
        for row in found:
            row["bytes"] = saved(modules[row["contender"]], x)
        rows += found
    return rows


# ---------------------------------------------------------------- ReSoRA: a training step


class Training:
    """A ViT of random weights with LoRA on query and value, and its training step."""

    def __init__(self, plan: dict):
        config = common.transformers.ViTConfig(
            hidden_size=plan["hidden"],
            num_hidden_layers=plan["layers"],
            num_attention_heads=plan["heads"],
            intermediate_size=4 * plan["hidden"],
            image_size=plan["image"],
            patch_size=16,
            num_labels=10,
        )
        self.model = common.transformers.ViTForImageClassification(config).train()
        self.layers = resora.adapt(self.model, common.targets_of(self.model), plan["r"])
        for layer in self.layers.values():
            nn.init.normal_(layer.B, std=0.02)  # as in the second stage, where B is not zero
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained)
        self.images = torch.randn(plan["batch"], 3, plan["image"], plan["image"])
        self.labels = torch.randint(0, 10, (plan["batch"],))

    def step(self, metric: str | None = None) -> None:
        """Forward, the penalty of a metric if there is one, backward, AdamW."""
        regulariser = resora.ReSoRA(self.model, metric) if metric else None
        loss = self.model(pixel_values=self.images, labels=self.labels).loss
        if regulariser:
            loss = loss + 0.1 * regulariser.penalty()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if regulariser:
            regulariser.remove()

    def literal(self, metric: str) -> float:
        """Seconds that the penalty by its definition would add: one layer's, times the layers."""
        layer, inputs = next(iter(self.layers.values())), []
        hook = layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        with torch.no_grad():
            self.model(pixel_values=self.images)
        hook.remove()
        B, A = layer.pair()
        codes = inputs[0].flatten(0, -2) @ A.T
        seconds = elapsed(lambda: resora.redundancy_dense(B, codes, metric).backward())
        self.optimizer.zero_grad()
        return len(self.layers) * seconds


def measure_resora(plan: dict) -> list[dict]:
    """A training step with each metric against the same step without."""
    training = Training(plan)
    calls = {metric: partial(training.step, metric) for metric in resora.METRICS}
    seconds = timed({"without": training.step, **calls}, plan["rounds"])
    for metric in resora.METRICS:
        some = seconds["without"][:2]
        seconds[f"{metric}, literal"] = [step + training.literal(metric) for step in some]
    return compared(f"r = {plan['r']}", seconds, "without")


# ---------------------------------------------------------------- EigenLoRAx: components


def write_adapters(folder: Path, case: dict) -> list[Path]:
    """White-noise LoRAs on square Linears, as PEFT saves them."""
    names = [f"layer.{i // 2}.{('query', 'value')[i % 2]}" for i in range(case["modules"])]
    config = {"peft_type": "LORA", "r": case["r"], "lora_alpha": case["r"], "bias": "none"}
    config |= {"base_model_name_or_path": "none", "target_modules": ["query", "value"]}
    folders = []
    for i in range(case["adapters"]):
        target = folder / f"adapter{i:03d}"
        target.mkdir(parents=True)
        state = {}
        for name in names:
            for side, shape in (("A", (case["r"], case["d"])), ("B", (case["d"], case["r"]))):
                state[f"base_model.model.{name}.lora_{side}.weight"] = torch.randn(shape)
        common.save_file(state, target / "adapter_model.safetensors")
        common.write_json(target / "adapter_config.json", config)
        folders.append(target)
    return folders


def loaded(folder: Path) -> dict:
    """All pairs (B, A) of an adapter, read at once."""
    return eigenlorax.lora_pairs(common.load_file(folder / "adapter_model.safetensors"))


def installed(name: str) -> bool:
    """Whether a peer is there; `pip install '.[bench]'` brings them."""
    return importlib.util.find_spec(name) is not None


def from_memory(case: dict, pairs: list[dict]) -> dict[str, Callable]:
    """Ways to the components of adapters that are in memory."""

    def each(decompose: Callable) -> Callable:
        """One decomposition of every module's rows, of A and of B."""

        def call() -> None:
            for name in pairs[0]:
                decompose(torch.cat([pair[name][1] for pair in pairs]))
                decompose(torch.cat([pair[name][0].T for pair in pairs]))

        return call

    K = case["K"]
    calls = {
        "EigenLoRAx": lambda: eigenlorax.recycle(pairs, k=K),
        "linalg.svd float32": each(lambda X: torch.linalg.svd(X, full_matrices=False)),
        "svd_lowrank niter=40": each(lambda X: torch.svd_lowrank(X, q=K, niter=40)),
    }
    if installed("vlora"):
        from vlora import LoRAWeights, SharedSubspace

        names = list(pairs[0])
        theirs = []
        for pair in pairs:
            A, B = ({name: pair[name][side] for name in names} for side in (1, 0))
            theirs.append(LoRAWeights(names, A, B, case["r"]))
        most = min(K, len(pairs))  # an adapter is one sample there
        calls["vlora"] = lambda: SharedSubspace.from_adapters(theirs, num_components=most)
    return calls


def from_disk(case: dict, folders: list[Path]) -> dict[str, Callable]:
    """Ways to the components of adapters in folders."""
    K = case["K"]
    calls = {"EigenLoRAx": lambda: eigenlorax.recycle(map(common.LazyAdapter, folders), k=K)}
    if installed("lorashare"):
        from lorashare import SHAREModel

        paths = {folder.name: str(folder) for folder in folders}
        calls["lorashare"] = lambda: SHAREModel.from_adapters(paths, num_components=K)
    return calls


def peak(read: Callable, folders: list[Path], K: int) -> int:
    """Bytes by which a process grows at its peak while it reads and recycles folders. Linux."""
    eigenlorax.recycle([{"q": (torch.ones(8, 2), torch.randn(2, 8))}])  # pays for start-up

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(x for x in lines if x.startswith(field)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    eigenlorax.recycle([read(folder) for folder in folders], k=K)
    return status("VmHWM") - before


def measure_stack(case: dict) -> list[dict]:
    """One stack with a decaying spectrum: seconds, and the energy that the components hold."""
    m, n, K = case["m"], case["n"], case["K"]
    X = torch.randn(m, n) * torch.arange(1, n + 1).rsqrt()
    ways = {
        "EigenLoRAx": lambda: eigenlorax.principal_components(X, K, center=False).V,
        "svd_lowrank niter=40": lambda: torch.svd_lowrank(X, q=K, niter=40)[2].T,
        "linalg.svd float32": lambda: torch.linalg.svd(X, full_matrices=False)[2][:K],
    }
    found = {}
    calls = {name: lambda n=name, w=way: found.update({n: w()}) for name, way in ways.items()}
    rows = compared(f"K = {K}", timed(calls, case["rounds"]), "EigenLoRAx")
    for row in rows:
        V = found[row["contender"]].double()
        row["energy"] = float((X.double() @ V.T).square().sum() / X.double().square().sum())
    return rows


def measure_folder(case: dict) -> list[dict]:
    """Components of a folder of adapters."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folders = write_adapters(Path(place), case)
        ways = {"memory": from_memory(case, [loaded(f) for f in folders])}
        ways["disk"] = from_disk(case, folders)
        for where, calls in ways.items():
            rows += compared(f"from {where}", timed(calls, case["rounds"]), "EigenLoRAx")
    return rows


def measure_disk(case: dict) -> list[dict]:
    """What memory it takes to recycle a large folder, each time in a process of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folders = write_adapters(Path(place), case)
        for how, read in {"a module at a time": common.LazyAdapter, "all at once": loaded}.items():
            with multiprocessing.get_context("spawn").Pool(1) as fresh:
                size = fresh.apply(peak, (read, folders, case["K"]))
            rows.append({"case": how, "contender": "EigenLoRAx", "bytes": size})
    return rows


# ---------------------------------------------------------------- EigenLoRAx: serving


def constructed(plan: dict, d: int) -> list[dict]:
    """LoRAs whose factors lie in a shared subspace of K directions, plus white noise."""
    r, K, adapters = plan["r"], plan["K"], [{} for _ in range(plan["tasks"])]
    for name in map(str, range(plan["layers"])):
        shared = [torch.linalg.qr(torch.randn(d, K)).Q for _ in "BA"]
        for adapter in adapters:
            parts = []
            for V in shared:
                part, rest = V @ torch.randn(K, r), torch.randn(d, r)
                noise = NOISE * part.norm() / rest.norm() * rest
                parts.append((part + noise) / K**0.5)
            adapter[name] = parts[0], parts[1].T.contiguous()
    return adapters


def ours(base: nn.Module, pairs: list[dict], plan: dict) -> tuple[Callable, int, float]:
    """EigenLoRAx with every task: (call, bytes beyond the base, mean relative error of ΔW)."""
    K = min(plan["K"], plan["r"] * len(pairs))
    model = copy.deepcopy(base)
    layers = eigenlorax.adapt(model, eigenlorax.recycle(pairs, k=K), plan["r"], tasks=len(pairs))
    wrong = []
    for task, adapter in enumerate(pairs):
        eigenlorax.set_task(layers, task, adapter)
        for name, (B, A) in adapter.items():
            B_0, A_0 = layers[name].pair(task)
            wrong.append(float((B @ A - B_0 @ A_0).norm() / (B @ A).norm()))
    held = sum(tensor.numel() for tensor in eigenlorax.to_bank(layers).values())
    block = eigenlorax.serving(layers, torch.arange(len(pairs)))
    block.__enter__()  # one block for all calls, as on a server
    return model, 4 * held, statistics.fmean(wrong)


def peft_lora(base: nn.Module, pairs: list[dict], plan: dict) -> tuple[Callable, int, float]:
    """The same tasks as PEFT's LoRA, each sequence with the name of its adapter."""
    from peft import LoraConfig, get_peft_model

    r = plan["r"]
    config = LoraConfig(r=r, lora_alpha=r, target_modules=list(pairs[0]))
    names = [f"t{task}" for task in range(len(pairs))]
    model = get_peft_model(copy.deepcopy(base), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    held = 0
    for task, adapter in zip(names, pairs, strict=True):
        for name, (B, A) in adapter.items():
            lora = model.base_model.model.get_submodule(name)
            lora.lora_A[task].weight.data.copy_(A)
            lora.lora_B[task].weight.data.copy_(B)
            held += A.numel() + B.numel()
    model.eval()
    return (lambda x: model(x, adapter_names=names)), 4 * held, 0.0


def alone(base: nn.Module, pairs: list[dict], plan: dict) -> tuple[Callable, int, float]:
    """The layers without any adapter."""
    return base, 0, 1.0


LORA = "PEFT's LoRA"
WAYS = {"EigenLoRAx": ours, LORA: peft_lora, "base alone": alone}


@torch.no_grad()
def measure_serving(plan: dict) -> list[dict]:
    """A batch of one sequence for each task, through a stack of Linears and their adapters."""
    rows = []
    for d in plan["widths"]:
        base = nn.Sequential(*(nn.Linear(d, d) for _ in range(plan["layers"]))).eval()
        pairs = constructed(plan, d)
        made = {name: way(base, pairs, plan) for name, way in WAYS.items()}
        for tokens in plan["tokens"]:
            x = torch.randn(plan["tasks"], tokens, d)
            calls = {name: partial(call, x) for name, (call, *_) in made.items()}
            found = compared(
                f"d = {d}, tokens: {tokens}", timed(calls, plan["rounds"]), "EigenLoRAx"
            )
            for row in found:
                _, row["bytes"], row["error"] = made[row["contender"]]
            rows += found
    return rows


# ---------------------------------------------------------------- what is said of them

MEASURES = {
    "hra": measure_hra,
    "resora": measure_resora,
    "folder": measure_folder,
    "disk": measure_disk,
    "stack": measure_stack,
    "serving": measure_serving,
}


def measure(plan: dict) -> dict[str, dict]:
    """{part: what it was measured on, how, and its rows}; each part from the same seed."""
    torch.set_num_threads(2)
    peers = {"vlora": "vlora-dev", "lorashare": "lorashare"}
    found = {name: version(p) if installed(name) else "not installed" for name, p in peers.items()}
    where = common.environment() | {"threads": torch.get_num_threads()} | found
    parts = {}
    for part, case in plan.items():
        torch.manual_seed(0)
        parts[part] = {"environment": where, "plan": case, "rows": MEASURES[part](case)}
    return parts


def cases(data: dict, part: str) -> dict[str, dict[str, dict]]:
    """{case: {contender: row}} of a part."""
    found = {}
    for row in data[part]["rows"]:
        found.setdefault(row["case"], {})[row["contender"]] = row
    return found


def ratios(data: dict) -> dict[tuple[str, str, str], dict]:
    """{(part, case, "contender / reference"): row} of all that is compared with another."""
    found = {}
    for part in data:
        for row in data[part]["rows"]:
            other = row.get("reference", row["contender"])
            if other != row["contender"]:
                found[part, row["case"], f"{row['contender']} / {other}"] = row
    return found


def board(data: dict) -> list[list[str]]:
    """Every ratio of time: part, case, of what, ratio, and its range."""
    lines = []
    for key, row in ratios(data).items():
        lines.append([*key, *(f"{x:.2f}" for x in (row["ratio"], *row["range"]))])
    return lines


HEADS = ["", "", "time of", "ratio", "from", "to"]


def beside(data: dict, committed: dict) -> str:
    """The board as a table, with the committed ratios in a column of their own."""
    before = {tuple(line[:3]): line[3] for line in board(committed)}
    lines = [[*line, before.get(tuple(line[:3]), "new")] for line in board(data)]
    return plots.markdown(lines, [*HEADS, "committed"], left=3)


TITLES = {
    "hra": "A Linear, {rows} rows, forward and backward: times LoRA's",
    "resora": "A training step of a ViT, {layers} blocks of {hidden}: times the one without R",
    "folder": "Components of {adapters} adapters, {modules} modules of {d}: times EigenLoRAx's",
    "stack": "Components of one stack of {m} × {n}: times EigenLoRAx's",
    "serving": "{tasks} tasks in a batch, through {layers} Linears: times EigenLoRAx's",
}
OURS = {"HRA, ours": "hra", **dict.fromkeys(resora.METRICS, "resora")}


def draw(source: str | Path) -> Path:
    """Draw the figure beside its JSON; returns the path of the PNG."""
    data = common.read_json(source)
    compared_rows = ratios(data).items()
    panels = {part: [row for key, row in compared_rows if key[0] == part] for part in TITLES}
    lines = [len(rows) for rows in panels.values()]
    height = 0.24 * sum(lines) + 0.8 * len(lines)
    figure, axes = plots.canvas(height, len(lines), height_ratios=lines, sharex=True)
    for axis, (part, rows) in zip(axes, panels.items(), strict=True):
        names, values = [], []
        for place, row in enumerate(rows):
            shade = plots.colour(OURS[row["contender"]]) if row["contender"] in OURS else "0.6"
            plots.dot(axis, place, row["ratio"], row["range"], shade)
            if row.get("bytes"):
                reference = cases(data, part)[row["case"]][row["reference"]]
                memory = row["bytes"] / reference["bytes"]
                axis.plot(memory, place, "s", color="0.2", markersize=6, fillstyle="none")
            names.append(f"{row['case']}: {row['contender']}")
            values.append(f"{row['ratio']:.2f}" if row["ratio"] < 10 else f"{row['ratio']:.0f}")
        plots.name_rows(axis, names, values)
        axis.axvline(1, color="0.2", linewidth=0.8)
        axis.set(xscale="log", title=TITLES[part].format(**data[part]["plan"]))
        axis.xaxis.set_major_formatter("{x:g}")
    axes[-1].set_xlabel("● time: median and range      □ memory      (less ← 1 → more)")
    return plots.save_figure(figure, source)


def every(data: dict) -> str:
    """The board as a table, folded away."""
    table = plots.markdown(board(data), HEADS, left=3)
    return f"<details><summary>Every ratio of time</summary>\n\n{table}\n\n</details>"


def said_hra(data: dict) -> str:
    """HRA's largest layer in a few sentences."""
    *_, (name, rows), _ = cases(data, "hra").items()
    ours, theirs = rows["HRA, ours"], rows["HRA, PEFT"]
    memory = [row["bytes"] / rows["LoRA"]["bytes"] for row in (ours, theirs)]
    every = {case: rows["HRA, ours"]["ratio"] for case, rows in cases(data, "hra").items()}
    worst = max(every, key=every.get)
    return (
        f"At {name}, forward and backward take {ours['ratio']:.2f} times LoRA's time and keep"
        f" {memory[0]:.2f} times its bytes for backward; PEFT's HRA takes {theirs['ratio']:.0f}"
        f" times the time and keeps {memory[1]:.0f} times the bytes. The worst case measured is"
        f" {worst}, with {every[worst]:.2f} times LoRA's time."
    )


def said_resora(data: dict) -> str:
    """ReSoRA's step in a few sentences."""
    (rows,) = cases(data, "resora").values()
    spans = [rows[metric]["range"] for metric in resora.METRICS]
    added = [f"{metric} {100 * (rows[metric]['ratio'] - 1):+.0f} %" for metric in resora.METRICS]
    return (
        f"Time added to a step: {', '.join(added)}. The rounds themselves differ by up to"
        f" {100 * max(high - low for low, high in spans):.0f} points. With the feature maps of the"
        f" definition written out, linear makes a step {rows['linear, literal']['ratio']:.0f} times"
        " as long."
    )


def said_components(data: dict) -> str:
    """EigenLoRAx's components in a few sentences."""
    memory, disk = cases(data, "folder").values()
    (stack,) = cases(data, "stack").values()
    one, every = (f"{row['bytes'] / 2**20:.0f} MiB" for row in data["disk"]["rows"])
    low, high = memory["vlora"]["range"]
    random, exact = stack["svd_lowrank niter=40"], stack["EigenLoRAx"]
    return (
        f"For 20 adapters in memory, a full SVD takes {memory['linalg.svd float32']['ratio']:.1f}"
        f" times as long, and vlora {memory['vlora']['ratio']:.1f} times ({low:.1f} to {high:.1f}):"
        " a tie, though it takes one vector of a module from each adapter, and not r. From disk"
        f" lorashare takes {disk['lorashare']['ratio']:.1f} times as long. For one large stack, the"
        f" randomised SVD that the authors use takes {random['ratio']:.1f} times as long, and holds"
        f" {100 * random['energy']:.3f} % of the energy instead of {100 * exact['energy']:.3f} %."
        f" Recycling 200 adapters takes {one} at its peak"
        f" if they are read one module at a time, and {every} if all are read at once."
    )


def said_serving(data: dict) -> str:
    """64 tasks in a batch, and what real adapters would lose."""
    narrow, _, wide, _ = cases(data, "serving").values()
    memory = wide[LORA]["bytes"] / wide["EigenLoRAx"]["bytes"]
    real = common.read_json(HERE.with_name("adapters.json"))["sides"]
    A, B = (side["real"]["error"][side["ks"].index(16)] for side in real.values())
    return (
        f"With a token for each of 64 tasks, PEFT's LoRA takes {narrow[LORA]['ratio']:.1f} times as"
        f" long at d = 384 and {wide[LORA]['ratio']:.1f} times at d = 768. EigenLoRAx's adapters"
        f" take {memory:.0f} times less memory, with a relative error of"
        f" {wide['EigenLoRAx']['error']:.2f} in ΔW. Those adapters are constructed: their factors"
        f" share 16 directions, but for noise. Real adapters share less: 16 components leave"
        f" {A:.2f} of the norm of A and {B:.2f} of the norm of B behind (the next section)."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", nargs="*", choices=FULL, metavar="PART")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE, metavar="JSON")
    options = parser.parse_args()
    committed = common.read_json(HERE)
    if options.measure is not None:
        common.check_writable(options.out)
        plan = QUICK if options.quick else FULL
        asked = {part: plan[part] for part in options.measure or plan}
        before = common.read_json(options.out) if options.out.exists() else {}
        common.write_json(options.out, before | measure(asked))
    data = common.read_json(options.out)
    print(beside(data, committed))
    if data.keys() == committed.keys():
        print(draw(options.out))
