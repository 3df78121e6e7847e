# SPDX-License-Identifier: MIT
"""Draw resora_sees.png from resora_sees.json: what each redundancy metric can and cannot see.

python -m figures.resora_sees                draw
python -m figures.resora_sees --measure      compute first (seconds), then draw
    --quick        two draws, to see that it runs
    --out JSON     another file than resora_sees.json

A row is one pair of components ΔH₁ = s₁ B₁ᵀ and ΔH₂ = s₂ B₂ᵀ (or r of them, where x and A matter)
with one thing changed. A column is a metric; the last is the cosine per token, which claim R4 is
about. A number is the mean over draws of the redundancy.
"""

import argparse
import statistics
from pathlib import Path

import torch

from common import environment, one_line_errors, read_json, write_json
from figures.plots import plotting, save_figure
from resora import METRICS, redundancy, regauge

PLAN = {"r": 4, "o": 64, "d": 64, "N": 1000, "draws": 50, "seed": 0}
COLUMNS = (*METRICS, "cosine per token")


def situations(plan: dict, draw: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{what was changed: (B (o, r), codes S (N, r))}; rows of ΔH_i have an rms length near √o."""
    g = torch.Generator().manual_seed(1_000_000 * plan["seed"] + draw)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    r, N = plan["r"], plan["N"]
    B, A, x = normal(plan["o"], r), normal(r, plan["d"]) / plan["d"] ** 0.5, normal(N, plan["d"])
    S = x @ A.T
    tangled = torch.eye(r, dtype=torch.float64) + 0.9 * (1 - torch.eye(r, dtype=torch.float64))
    mixed = B @ tangled, torch.linalg.solve(tangled, A)  # the same B A
    no_x, on_x = regauge(*mixed), regauge(*mixed, x)
    s = normal(N // 2, 1)
    s = torch.cat([s, -s])  # symmetric about 0
    return {
        "nothing in common": (B, S),
        "same B, other codes": (B[:, :1].expand(-1, r), S),
        "other B, same codes": (B, S[:, :1].expand(-1, r)),
        "same B, same codes": (B[:, :1].expand(-1, r), S[:, :1].expand(-1, r)),
        "codes with a common mean": (B, S + 3),
        "components × 3": (3 * B, S),
        "B = 0, the start": (0 * B, S),
        "same B A, mixed components": (mixed[0], x @ mixed[1].T),
        "same B A, regauge(B, A)": (no_x[0], x @ no_x[1].T),
        "same B A, regauge(B, A, x)": (on_x[0], x @ on_x[1].T),
        "s₂ = s₁² − 1": (B[:, :2], torch.cat([s, s.square() - 1], 1)),
    }


def values(B: torch.Tensor, S: torch.Tensor) -> list[float]:
    """One number per column."""
    per_token = torch.vmap(lambda token: redundancy(B, token[None], "cosine"))(S).mean()
    return [*(redundancy(B, S, metric).item() for metric in METRICS), per_token.item()]


def measure(target: Path, plan: dict) -> None:
    """Write the JSON, whole or not at all."""
    draws = [
        {name: values(B, S) for name, (B, S) in situations(plan, k).items()}
        for k in range(plan["draws"])
    ]
    rows = []
    for name in draws[0]:
        columns = list(zip(*(draw[name] for draw in draws), strict=True))
        mean, spread = map(statistics.fmean, columns), map(statistics.stdev, columns)
        rows.append({"changed": name, "mean": list(mean), "standard_deviation": list(spread)})
    result = {"environment": environment(), "plan": plan, "columns": COLUMNS, "rows": rows}
    write_json(target, result)


def draw(source: Path) -> Path:
    """Draw the figure beside its JSON; returns the path of the PNG."""
    data = read_json(source)
    names, columns = [row["changed"] for row in data["rows"]], data["columns"]
    means = [row["mean"] for row in data["rows"]]
    figure, axis = plotting().subplots(figsize=(8.5, 5.6), layout="constrained")
    image = axis.imshow(means, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(means):
        for j, value in enumerate(row):
            color = "white" if value > 0.55 else "black"
            text = "0" if value < 5e-7 else f"{value:.2g}" if value >= 0.001 else "< 0.001"
            axis.text(j, i, text, ha="center", va="center", color=color)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(names)), names)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.set_xticks([k - 0.5 for k in range(1, len(columns))], minor=True)
    axis.set_yticks([k - 0.5 for k in range(1, len(names))], minor=True)
    axis.grid(which="minor", color="0.7", linewidth=0.5)
    axis.tick_params(which="minor", length=0)
    plan = data["plan"]
    sizes = f"r = {plan['r']}, N = {plan['N']}, o = {plan['o']}, {plan['draws']} draws"
    figure.colorbar(image, label="redundancy, mean over pairs (no unit)")
    axis.set_xlabel(f"{sizes}; 0 is below 5e−7")
    figure.suptitle("linear and nonlinear see only the codes, the cosine per token only B")
    return save_figure(figure, source)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="compute first")
    parser.add_argument("--quick", action="store_true", help="two draws")
    default = Path(__file__).with_suffix(".json")
    parser.add_argument("--out", type=Path, default=default, metavar="JSON")
    options = parser.parse_args()
    if options.measure:
        measure(options.out, PLAN | ({"draws": 2} if options.quick else {}))
    print(draw(options.out))


if __name__ == "__main__":
    one_line_errors(main)
