"""What exact components cost: draws eigenlorax_cost.png from eigenlorax_cost.json.

python -m figures.eigenlorax_cost                     draw
python -m figures.eigenlorax_cost --measure [--quick]  measure first (on a quiet machine)

Three measurements: a usual folder of adapters against vlora and lorashare (extra bench; skipped,
and said so, where they are not installed) and against plain decompositions; one large stack
against the randomised SVD that the authors use for hundreds of adapters; peak memory with
adapters read from disk one module at a time, or all at once.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import common
from eigenlorax import lora_pairs, principal_components, recycle
from figures import plots

FULL = {
    "folder": dict(adapters=20, modules=24, d=768, r=8, K=32, rounds=7),
    "stack": dict(m=8000, n=4096, K=256, niter=40, rounds=1),
    "disk": dict(adapters=200, modules=24, d=768, r=8, K=32),
}
QUICK = {
    "folder": dict(adapters=4, modules=2, d=64, r=4, K=8, rounds=3),
    "stack": dict(m=300, n=200, K=16, niter=40, rounds=2),
    "disk": dict(adapters=10, modules=4, d=64, r=4, K=8),
}


def write_adapters(folder: Path, case: dict, seed: int) -> list[Path]:
    """White-noise LoRAs on square Linears, as PEFT saves them."""
    generator = torch.Generator().manual_seed(seed)
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
                key = f"base_model.model.{name}.lora_{side}.weight"
                state[key] = torch.randn(shape, generator=generator)
        save_file(state, target / "adapter_model.safetensors")
        common.write_json(target / "adapter_config.json", config)
        folders.append(target)
    return folders


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def compared(calls: dict[str, Callable], rounds: int) -> dict:
    """Median seconds and median ratio to the first call, in turns so that all share the noise."""
    for call in calls.values():
        call() if rounds > 1 else None  # the first call pays for start-up
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    own = seconds[next(iter(calls))]
    rows = {}
    for name, times in seconds.items():
        ratios = sorted(t / o for t, o in zip(times, own, strict=True))
        rows[name] = {
            "seconds": statistics.median(times),
            "time / EigenLoRAx's": statistics.median(ratios),
            "smallest and largest": [ratios[0], ratios[-1]],
        }
    return rows


def measure_folder(case: dict, folders: list[Path]) -> dict:
    """All modules of one folder of adapters: from memory, and from disk where a peer reads it."""
    K, states = case["K"], [load_file(f / "adapter_model.safetensors") for f in folders]
    pairs = [lora_pairs(state) for state in states]

    def each(decompose: Callable) -> Callable:
        def call() -> None:
            for name in pairs[0]:
                for side in (0, 1):
                    rows = torch.cat([(p[name][0].T, p[name][1])[side] for p in pairs])
                    decompose(rows)

        return call

    memory = {
        "EigenLoRAx": lambda: recycle(pairs, k=K),
        "linalg.svd float32": each(lambda X: torch.linalg.svd(X, full_matrices=False)),
        "linalg.svd float64": each(lambda X: torch.linalg.svd(X.double(), full_matrices=False)),
        "svd_lowrank niter=40": each(lambda X: torch.svd_lowrank(X, q=K, niter=40)),
    }
    if installed("vlora"):
        from vlora import LoRAWeights, SharedSubspace

        names = list(pairs[0])
        theirs = [
            LoRAWeights(names, {n: p[n][1] for n in names}, {n: p[n][0] for n in names}, case["r"])
            for p in pairs
        ]
        # one sample per adapter there, so there are at most that many components
        most = min(K, len(pairs))
        memory["vlora"] = lambda: SharedSubspace.from_adapters(theirs, num_components=most)
    disk = {"EigenLoRAx": lambda: recycle(map(common.LazyAdapter, folders), k=K)}
    if installed("lorashare"):
        from lorashare import SHAREModel

        paths = {folder.name: str(folder) for folder in folders}
        disk["lorashare"] = lambda: SHAREModel.from_adapters(paths, num_components=K)
    peers = {"vlora": "vlora-dev", "lorashare": "lorashare"}
    return {
        "memory": compared(memory, case["rounds"]),
        "disk": compared(disk, case["rounds"]),
        "peers": {n: version(p) if installed(n) else "not installed" for n, p in peers.items()},
    }


def measure_stack(case: dict, seed: int) -> dict:
    """One stack with a decaying spectrum: seconds, energy captured, orthonormality."""
    generator, K = torch.Generator().manual_seed(seed), case["K"]
    decay = torch.arange(1, case["n"] + 1).rsqrt()
    rows = torch.randn(case["m"], case["n"], generator=generator) * decay
    found = {}

    def ours() -> None:
        found["EigenLoRAx"] = principal_components(rows, K, center=False).V

    def randomised() -> None:
        torch.manual_seed(seed)
        niter = case["niter"]
        found["svd_lowrank niter=40"] = torch.svd_lowrank(rows, q=K, niter=niter)[2].T

    def plain() -> None:
        found["linalg.svd float32"] = torch.linalg.svd(rows, full_matrices=False)[2][:K]

    calls = {"EigenLoRAx": ours, "svd_lowrank niter=40": randomised, "linalg.svd float32": plain}
    timed, X = compared(calls, case["rounds"]), rows.double()
    for name, V in found.items():
        V = V.double()
        timed[name]["energy captured"] = float((X @ V.T).square().sum() / X.square().sum())
        timed[name]["|VVᵀ − I|"] = float((V @ V.T - torch.eye(K, dtype=V.dtype)).abs().max())
    return timed


def peak(how: str, folder: Path, K: int) -> None:
    """Print the bytes by which this process grew at its peak while it recycled a folder. Linux."""
    recycle([{"q": (torch.ones(8, 2), torch.randn(2, 8))}])  # pay for start-up first
    folders = sorted(folder.iterdir())
    if how == "lazy":
        adapters = [common.LazyAdapter(f) for f in folders]

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(x for x in lines if x.startswith(field)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    if how == "eager":
        adapters = [lora_pairs(load_file(f / "adapter_model.safetensors")) for f in folders]
    recycle(adapters, k=K)
    print(status("VmHWM") - before)


def measure_disk(case: dict, folders: list[Path]) -> dict:
    m, d, K = case["adapters"] * case["r"], case["d"], case["K"]
    sizes = {
        "one module's stack, A and B": 4 * 2 * m * d,
        "result": 4 * case["modules"] * 2 * (K * d + d + K),
        "all adapters": sum((f / "adapter_model.safetensors").stat().st_size for f in folders),
    }
    for how in ("lazy", "eager"):
        command = [sys.executable, "-m", "figures.eigenlorax_cost", "--peak", how]
        command += [str(folders[0].parent), "--K", str(K)]
        root = Path(__file__).parents[1]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
        sizes[f"peak, {how}"] = int(done.stdout)
    return sizes


def measure(setting: dict, seed: int) -> dict:
    result = {}
    for part, run in (("folder", measure_folder), ("disk", measure_disk)):
        with tempfile.TemporaryDirectory() as folder:
            result[part] = run(setting[part], write_adapters(Path(folder), setting[part], seed))
    result["stack"] = measure_stack(setting["stack"], seed)
    setting = setting | {"seed": seed, "threads": torch.get_num_threads(), "dtype": "float32"}
    return {"setting": setting, "environment": common.environment(), "results": result}


def draw(source: Path) -> Path:
    """Draw the figure beside its JSON; returns the path of the PNG."""
    report = common.read_json(source)
    found, setting = report["results"], report["setting"]
    figure, axes = plots.plotting().subplots(2, 2, figsize=(11, 6), layout="constrained")
    titles = {
        "memory": "{adapters} adapters, {modules} modules, d = {d}, r = {r}, K = {K}, from memory",
        "disk": "the same, from disk",
        "stack": "one stack of {m} × {n}, K = {K}",
    }
    bars = {"memory": found["folder"]["memory"], "disk": found["folder"]["disk"]}
    bars["stack"] = found["stack"]
    for axis, (name, rows) in zip(axes.flat, bars.items(), strict=False):
        axis.barh(list(rows), [row["seconds"] for row in rows.values()], color="0.6")
        for i, row in enumerate(rows.values()):
            low, high = row["smallest and largest"]
            ratio = row["time / EigenLoRAx's"]
            label = f" {ratio:.2f}× ({low:.2f}–{high:.2f})"
            if "energy captured" in row:
                label += f", energy {row['energy captured']:.7f}"
            axis.text(0, i, label, va="center")
        axis.invert_yaxis()
        axis.set_xlabel("seconds, median")
        case = setting["stack" if name == "stack" else "folder"]
        axis.set_title(titles[name].format(**case), fontsize="medium")
    figure.suptitle(
        "In the bars: time / EigenLoRAx's, median (smallest–largest)", fontsize="medium"
    )
    sizes, last = found["disk"], axes.flat[3]
    last.barh(list(sizes), [size / 2**20 for size in sizes.values()], color="0.6")
    last.invert_yaxis()
    last.set_xlabel("MiB")
    last.set_title(
        "{adapters} adapters on disk: peak memory".format(**setting["disk"]), fontsize="medium"
    )
    return plots.save_figure(figure, source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="measure first")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--peak", nargs=2, metavar=("HOW", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--K", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        return peak(options.peak[0], Path(options.peak[1]), options.K)
    if options.measure:
        common.write_json(options.json, measure(QUICK if options.quick else FULL, options.seed))
    print(draw(options.json))


if __name__ == "__main__":
    main()
