"""Draw glue_minilm.png and .md from glue_minilm.json: EigenLoRAx's and HRA's tables on real GLUE.

python -m figures.glue_minilm [JSON]
The JSON is written by train_glue.py --backbone MINILM --data GLUE --train 320 --evaluate 200
--mixed-precision bf16 --table all --out figures/glue_minilm.json.
"""

import statistics
import sys
from pathlib import Path

import common
from figures import plots
from figures.plots import over_seeds

LAMBDAS = ["0", "1e-5", "1e-3", "∞"]
# Trained numbers and mean over our six tasks: EigenLoRAx, Tables 2 and 3 (RoBERTa-base), and HRA,
# Table 2 (DeBERTa-v3-base, every Linear layer), whose own means are over eight.
PAPERS = {
    "Full": "125M: 83.8",
    "LoRA r=32": "1.2M: 83.7",
    "LoRA r=8": "HRA's, 1.33M: 87.6",
    "VeRA": "25K: 77.7",
    "PiSSA r=32": "1.2M: 82.7",
    "EigenLoRAx": "12K: 83.7",
    "EigenLoRAx-init": "1.2M: 83.5",
    "EigenLoRAx-AUG": "24K: MRPC 83.1, STS-B 85.3",
    "EigenLoRAx + random": "24K: MRPC 68.4, STS-B 0.1",
    "Random subspace": "24K: MRPC 68.4, STS-B −0.7",
    "OFT": "0.79M: 89.3",
    "BOFT": "0.75M: 89.5",
    "HRA r=8, λ=0": "0.66M: 89.8",
    "HRA r=8, λ=1e-5": "0.66M: 89.8",
    "HRA r=8, λ=∞": "0.66M: 88.6",
}


def table(data: dict) -> str:
    """README's Markdown table, with what the papers print for their own backbones."""
    first, rule, *lines = plots.as_table(data["rows"]).splitlines()
    out = [f"{first} papers: size, mean |", f"{rule} --- |"]
    for r, line in zip(data["rows"], lines, strict=True):
        out.append(f"{line} {PAPERS.get(r['row'], '')} |")
    return "\n".join(out)


def moderate(data: dict) -> str:
    """The row whose λ, neither 0 nor ∞, is best on the validation split."""
    rows = [f"HRA r=8, λ={lam}" for lam in LAMBDAS[1:-1]]
    return max(rows, key=lambda row: over_seeds(data, row, "validation")[0])


def claims(data: dict) -> list[tuple[str, str, str]]:
    """Each claim of the papers, the paired difference, and what it says."""
    size = {r["row"]: r["trainable"] for r in data["rows"]}
    asked = []  # the claim, the rows compared, and what `plots.judge` needs beyond
    ours = ["EigenLoRAx"]
    for other in ("LoRA r=32", "LoRA r=8"):
        times = f"{size[other] / size['EigenLoRAx']:.0f}× fewer trained numbers"
        claim = f"EigenLoRAx is within a point of {other} with {times}"
        asked.append((claim, ours, [other], plots.points, -1.0))
    for other in ("LoRA r=32", "LoRA r=8", "VeRA", "PiSSA r=32"):
        asked.append((f"EigenLoRAx converges faster than {other}", ours, [other], plots.log_loss))
    for other in ("EigenLoRAx + random", "Random subspace"):
        asked.append((f"EigenLoRAx-AUG is above {other}", ["EigenLoRAx-AUG"], [other]))
    hra = "HRA r=8, λ=0"
    for other in ("LoRA r=8", "OFT", "BOFT"):
        claim = f"{hra} ({size[hra]:,}) is above {other} ({size[other]:,})"
        asked.append((claim, [hra], [other]))
    best = moderate(data)
    for other in (hra, "HRA r=8, λ=∞"):
        claim = f"a moderate λ helps: {best}, chosen by validation, is above {other}"
        asked.append((claim, [best], [other]))
    claim = "ReSoRA's second stage is above LoRA's"
    asked.append((claim, ["ReSoRA, stage 2"], ["LoRA, stage 2"]))
    return [plots.judge(data, *question) for question in asked]


def verdicts(data: dict) -> str:
    """`claims` as a Markdown table."""
    return plots.claims_table(claims(data))


def curve(data: dict, row: str) -> list[float]:
    """Training loss after each epoch, in units of LoRA r=32's first, mean over tasks and seeds."""
    runs = {(r["row"], r["task"], r["seed"]): r["losses"] for r in data["runs"]}
    scaled = [
        [x / runs["LoRA r=32", task, seed][0] for x in losses]
        for (name, task, seed), losses in runs.items()
        if name == row
    ]
    return [statistics.fmean(epoch) for epoch in zip(*scaled, strict=True)]


def draw(source: str | Path) -> Path:
    """Draw the figure and write the tables beside their JSON; returns the path of the PNG."""
    data = common.read_json(source)
    text = f"{table(data)}\n\n{verdicts(data)}\n"
    Path(source).with_suffix(".md").write_text(text, encoding="utf-8")
    plt = plots.plotting()
    figure, panels = plt.subplot_mosaic(
        [["rows", "losses"], ["rows", "lambdas"]], figsize=(13, 8), layout="constrained"
    )
    rows, losses, lambdas = (panels[name] for name in ("rows", "losses", "lambdas"))
    plots.bars(rows, data["rows"])
    rows.tick_params(axis="y", labelsize="small")
    rows.set_title("Score × 100: mean ± std over seeds; strokes: the tasks", fontsize="medium")

    styles = {"LoRA r=32": "k--", "LoRA r=8": "k-.", "VeRA": "k:", "PiSSA r=32": "k-"}
    for name, style in styles.items():
        losses.plot(curve(data, name), style, label=name, linewidth=1)
    losses.plot(curve(data, "EigenLoRAx"), "o-", color="0.45", label="EigenLoRAx", linewidth=2)
    losses.xaxis.get_major_locator().set_params(integer=True)
    losses.set(xlabel="epoch, from 0", ylabel="training loss / LoRA r=32's first")
    losses.set_title("Convergence: mean over tasks and seeds", fontsize="medium")
    losses.legend(frameon=False, fontsize="small")

    plots.sweep(lambdas, data, {value: f"HRA r=8, λ={value}" for value in LAMBDAS}, "LoRA r=8")
    lambdas.set_xlabel("λ, weight of the penalty")
    lambdas.set_title("HRA r=8 against λ", fontsize="medium")
    return plots.save_figure(figure, source)


if __name__ == "__main__":
    print(draw(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")))
