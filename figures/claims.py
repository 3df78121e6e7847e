# ruff: noqa: E501 (sentences)
"""The README's sentences with measured numbers, made from the committed JSON files.

python -m figures.claims        print them
"""

import statistics
from pathlib import Path

import common
from figures import plots
from resora import METRICS

FOLDER = Path(__file__).parent


def read(name: str) -> dict:
    """figures/NAME.json."""
    return common.read_json(FOLDER / f"{name}.json")


def moderate(data: dict) -> str:
    """The row whose λ, neither 0 nor ∞, is best on the validation split."""
    rows = [f"HRA r=8, λ={lam}" for lam in ("1e-5", "1e-3")]
    return max(rows, key=lambda row: plots.over_seeds(data, row, "validation")[0])


WHERE = {  # how the table calls each results file, and what it says of it once
    "glue_docs": ("docstrings", "RoBERTa of width 64"),
    "vit_cifar": ("CIFAR-100", "DINOv2-S"),
    "vit_digits": ("digits", "ViT of width 64"),
    "vit_hra": ("digits", "ViT of width 64"),
    "vit_resora": ("digits", "ViT of width 64"),
}
CLOSE = {"least": -1.0}
FASTER = {"score": plots.log_loss}
# paper, its claim, what it prints, the results that we have, the rows compared
ASKED = [
    ("HRA", "beats LoRA", "+1.6, GLUE (8 tasks), half its size", [
        ("glue_docs", ["HRA r=8, λ=0"], ["LoRA r=4"], {}),
        ("vit_hra", ["HRA r=8, λ=0"], ["LoRA r=4"], {})]),
    ("HRA", "beats OFT", "+0.3, GLUE (8 tasks)", [
        ("glue_docs", ["HRA r=8, λ=0"], ["OFT"], {}),
        ("vit_hra", ["HRA r=8, λ=0"], ["OFT"], {})]),
    ("HRA", "beats BOFT", "+0.2, GLUE (8 tasks)", [
        ("glue_docs", ["HRA r=8, λ=0"], ["BOFT"], {}),
        ("vit_hra", ["HRA r=8, λ=0"], ["BOFT"], {})]),
    ("HRA", "λ = ∞ costs accuracy against λ = 0", "+1.0, GLUE (8 tasks)", [
        ("glue_docs", ["HRA r=8, λ=0"], ["HRA r=8, λ=∞"], {}),
        ("vit_hra", ["HRA r=8, λ=0"], ["HRA r=8, λ=∞"], {})]),
    ("HRA", "a moderate λ, chosen by validation, beats λ = 0", "-0.1, GLUE (8 tasks); +0.4, MRPC", [
        (name, [moderate(read(name))], ["HRA r=8, λ=0"], {}) for name in ("glue_docs", "vit_hra")]),
    ("ReSoRA", "beats LoRA trained as long", "+0.7, VTAB-1K", [
        ("glue_docs", ["ReSoRA, stage 2"], ["LoRA, stage 2"], {}),
        *(("vit_resora", [f"r={r}, linear, feature"], [f"r={r}, λ=0"], {}) for r in (2, 4, 8))]),
    ("ReSoRA", "feature level beats weight level", "Table 4", [
        ("vit_resora", *([f"r=4, {m}, {level}" for m in METRICS] for level in ("feature", "weight")),
         {})]),
    ("EigenLoRAx", "within a point of LoRA, 96 and 1,536 times smaller", "0.0, GLUE; +1.0, CIFAR-100", [
        ("glue_docs", ["EigenLoRAx"], ["LoRA r=4"], CLOSE),
        ("vit_cifar", ["EigenLoRAx"], ["LoRA r=4"], CLOSE),
        ("vit_digits", ["EigenLoRAx"], ["LoRA r=4"], CLOSE)]),
    ("EigenLoRAx", "beats VeRA", "+5.9, GLUE; +3.9, CIFAR-100", [
        ("glue_docs", ["EigenLoRAx"], ["VeRA"], {}),
        ("vit_cifar", ["EigenLoRAx"], ["VeRA"], {}),
        ("vit_digits", ["EigenLoRAx"], ["VeRA"], {})]),
    ("EigenLoRAx", "converges faster than LoRA", "up to 1.5 times", [
        ("glue_docs", ["EigenLoRAx"], ["LoRA r=4"], FASTER)]),
    ("EigenLoRAx", "recycled beats a random subspace", "+14.7, MRPC; +86.0, STS-B", [
        ("glue_docs", ["EigenLoRAx-AUG"], ["Random subspace"], {}),
        ("vit_cifar", ["EigenLoRAx"], ["Random subspace"], {}),
        ("vit_digits", ["EigenLoRAx"], ["Random subspace"], {})]),
    ("EigenLoRAx", "random weights in the subspace (ZS) beat the base", "+1.3, CIFAR-100", [
        ("vit_cifar", ["EigenLoRAx-ZS"], ["Base"], {}),
        ("vit_digits", ["EigenLoRAx-ZS"], ["Base"], {})]),
]  # fmt: skip


def table() -> str:
    """The papers' claims beside what was measured here, as a Markdown table."""
    lines = ["| paper | claim | it prints | here: difference, 95 % interval |", "|---|---|---|---|"]
    for paper, claim, printed, results in ASKED:
        cells = []
        for name, rows, others, options in results:
            data = read(name)
            _, difference, said = plots.judge(data, claim, rows, others, **options)
            where = WHERE[name][0]
            if name == "vit_resora":
                where += f", {rows[0].partition(',')[0]}"
            if options == CLOSE:
                size = {r["row"]: r["trainable"] for r in data["rows"]}
                where += f", {size[others[0]] / size[rows[0]]:.0f} times smaller"
            cells.append(
                f"{where}: {difference}, **{said}**".replace("supported here", "supported")
            )
        lines.append(f"| {paper} | {claim} | {printed} | {'<br>'.join(cells)} |")
    return "\n".join(lines)


def settings() -> str:
    """What the table's names stand for: model, tasks, training rows and seeds."""
    found = {}
    for name in dict.fromkeys(name for *_, results in ASKED for name, *_ in results):
        runs = read(name)["runs"]
        tasks, seeds = (len({run[key] for run in runs}) for key in ("task", "seed"))
        found.setdefault((*WHERE[name], tasks), set()).add(seeds)
    return "; ".join(
        f"{where}: {model}, {tasks} tasks × {' or '.join(map(str, sorted(seeds)))} seeds"
        for (where, model, tasks), seeds in found.items()
    )


def scores(name: str, *rows: str) -> str:
    """Mean ± std over seeds of a results file's rows, × 100, with their trained numbers."""
    data = read(name)
    size, found = {r["row"]: r["trainable"] for r in data["rows"]}, []
    for row in rows:
        mean, std = plots.over_seeds(data, row, "test")
        found.append(f"{row} {100 * mean:.1f} ± {100 * std:.1f} ({size[row]:,})")
    return "; ".join(found) + "."


EIGENLORAX = ("Full", "LoRA r=4", "VeRA", "EigenLoRAx", "Random subspace", "Base")


def digits() -> str:
    """EigenLoRAx's Table 1 on digits."""
    return scores("vit_digits", *EIGENLORAX)


def cifar() -> str:
    """EigenLoRAx's Table 1 on CIFAR-100."""
    setting = (
        "{classes} classes a task, {images} images of each at {image_size} pixels, {epochs} epochs:"
    )
    found = scores("vit_cifar", *EIGENLORAX, "LoRA r=1", "EigenLoRAx-ZS")
    return f"{setting.format(**read('vit_cifar')['config'])} {found}"


def docs() -> str:
    """The language tables on docstrings."""
    return scores("glue_docs", *EIGENLORAX, "HRA r=8, λ=0", "PiSSA r=4")


def hra() -> str:
    """HRA beside LoRA, OFT and BOFT, and what the penalty costs."""
    data = read("vit_hra")

    def score(row: str, field: str = "test") -> str:
        mean, std = plots.over_seeds(data, row, field)
        return f"{100 * mean:.1f} ± {100 * std:.1f}"

    kept = [score(f"HRA r=8, λ={lam}", "source") for lam in ("0", "1e-1")]
    return (
        f"At about 4,096 trained numbers HRA r=8 (λ = 0) reaches {score('HRA r=8, λ=0')} %,"
        f" LoRA r=4 {score('LoRA r=4')}, OFT {score('OFT')}, BOFT {score('BOFT')}."
        f" With λ = 0.1 the adapted trunk keeps {kept[1]} % of the upright digits instead of"
        f" {kept[0]}."
    )


def vtab() -> str:
    """How much of a real adapter lies in the components of others."""
    A = read("eigenlorax_vtab")["sides"]["A"]
    few, many = A["ks"].index(4), A["ks"].index(384)
    real, noise = A["real"], A["control"]
    held = [[statistics.median(task[i] for task in kind["held_out"]) for kind in (real, noise)]
            for i in (few, many)]  # fmt: skip
    return (
        f"4 components of A hold {100 * real['spectrum'][3]:.0f} % of the energy of all 14 adapters"
        f" and {100 * held[0][0]:.0f} % of one left out (median); 384 components"
        f" {100 * held[1][0]:.0f} %, where white noise has {100 * held[1][1]:.0f} %. Cosines between"
        f" the tasks' A average {real['cosine']['mean']:.2f} and reach"
        f" {real['cosine']['largest absolute']:.2f}: part of what looks shared is a shared start."
    )


def cost() -> str:
    """Ratios measured side by side, as a list."""
    rows = {x["contender"]: x for x in read("hra_cost")["results"] if (x["d"], x["r"]) == (4096, 8)}
    saved = {name: x["saved_bytes"] / rows["LoRA"]["saved_bytes"] for name, x in rows.items()}
    ours, peft = rows["HRA, ours"]["times_lora"], rows["HRA, PEFT"]["times_lora"]
    steps = {(x["rank"], x["contender"]): x["times_plain"] for x in read("resora_cost")["results"]}
    added = lambda name, r=8: f"{round(100 * (steps[r, name] - 1)) + 0:+d} %"  # noqa: E731
    asked = [
        x for x in read("resora_cost")["results"] if x["rank"] == 8 and x["contender"] in METRICS
    ]
    spread = 100 * max(high - low for low, high in (x["times_plain_range"] for x in asked))
    folder = read("eigenlorax_cost")["results"]
    ratio = lambda part, name: format(part[name]["time / EigenLoRAx's"], ".1f")  # noqa: E731
    cases = {
        (c["d"], c["tasks"], c["tokens"]): c["rows"] for c in read("eigenlorax_serving")["cases"]
    }
    served = {key: rows["PEFT adapter_names"]["time / EigenLoRAx's"] for key, rows in cases.items()}
    alone = cases[768, 64, 1]["base, no adapter"]["time / EigenLoRAx's"]
    big = cases[768, 64, 1]
    memory = big["PEFT adapter_names"]["bytes"] / big["EigenLoRAx"]["bytes"]
    disk = {name: size / 2**20 for name, size in folder["disk"].items()}
    return "\n".join(
        [
            f"- HRA r=8, a layer with d = o = 4096, forward and backward: {ours:.2f} times LoRA's time"
            f" and {saved['HRA, ours']:.2f} times its saved memory; PEFT's HRA {peft:.0f} times and"
            f" {saved['HRA, PEFT']:.0f} times ([figure](figures/hra_cost.png)).",
            f"- ReSoRA, a training step of a ViT-S, r=8: euclidean {added('euclidean')}, cosine"
            f" {added('cosine')}, linear {added('linear')}, nonlinear {added('nonlinear')}; computed"
            f" literally, linear takes {steps[8, 'linear, materialised']:.0f} times as long. The"
            f" rounds spread by up to {spread:.0f} points ([figure](figures/resora_cost.png)).",
            f"- EigenLoRAx, components of 20 adapters: vlora takes {ratio(folder['folder']['memory'], 'vlora')}"
            f" times as long (for 20 vectors a module, not 160), lorashare, from disk,"
            f" {ratio(folder['folder']['disk'], 'lorashare')} times; a stack of 8,000 × 4,096:"
            f" svd_lowrank with 40 iterations {ratio(folder['stack'], 'svd_lowrank niter=40')} times"
            f" and less exact. Recycling 200 adapters from disk takes {disk['peak, lazy']:.0f} MiB at"
            f" its peak, {disk['peak, eager']:.0f} if all are loaded ([figure](figures/eigenlorax_cost.png)).",
            f"- EigenLoRAx, 64 tasks in a batch, a token each: {served[384, 64, 1]:.1f} times PEFT's speed"
            f" at d = 384, {served[768, 64, 1]:.1f} at d = 768, where the base alone would be at"
            f" {served[768, 64, 1] / alone:.1f}; with 32 tokens {served[384, 64, 32]:.1f} and"
            f" {served[768, 64, 32]:.1f}. The adapters take {memory:.0f} times less memory at a"
            f" relative error of {big['EigenLoRAx']['relative error of ΔW']:.2f} in ΔW"
            f" ([figure](figures/eigenlorax_serving.png)).",
        ]
    )


if __name__ == "__main__":
    print(table(), settings(), digits(), cifar(), docs(), hra(), vtab(), cost(), sep="\n\n")
