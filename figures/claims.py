# SPDX-License-Identifier: MIT
"""What of the papers' claims held: estimates, intervals, outcomes, a forest plot.

python -m figures.claims [JSON]      print the table, and draw claims.png once a claim has run

claims.json holds the plan, which was committed before any of its runs. A claim is a contrast, the
weights of rows in a sum that is above 0 if the claim holds, in points of accuracy; below `margin`
a difference counts as none. `train_vit.py --table claims --out figures/claims.json` adds the runs
of a data set.

The unit is the task. A contrast is averaged over a task's seeds, then over the tasks of a data set,
then over the data sets. Where rows recycle adapters of the other tasks, the tasks of a data set
depend on each other, and the variance of their mean takes Nadeau and Bengio's correction, which was
derived for cross-validation: here it is a heuristic.
"""

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy import stats

import common
from figures import plots

PLAN = Path(__file__).with_suffix(".json")
LEVEL, POWER = 0.05, 0.8
LEAST_TASKS = 5  # of all data sets together

# ---------------------------------------------------------------- the file


def known_runs(path: str | Path, name: str, setting: Mapping) -> dict[str, dict]:
    """{key: run} of a data set in a file of claims.

    Raises ValueError if they were made in another setting than this one.
    """
    if not Path(path).exists():
        return {}
    found = common.read_json(path)["sets"].get(name)
    if found is None:
        return {}
    wanted = json.loads(json.dumps(setting))  # as a file has it
    if found["config"] != wanted:
        raise ValueError(f"{path} has {name} with {found['config']}; wanted {wanted}")
    return found["runs"]


def keep(path: str | Path, name: str, found: Mapping) -> None:
    """Write what was found on a data set into a file of claims, beside the plan."""
    data = {**common.read_json(PLAN), "sets": {}}
    if Path(path).exists():
        data = common.read_json(path)
    data["sets"][name] = found
    common.write_json(path, data)


# ---------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error and the degrees of freedom of that."""

    mean: float
    error: float
    degrees: int

    def interval(self) -> tuple[float, float]:
        """The 95 % interval by Student's t."""
        half = stats.t.ppf(1 - LEVEL / 2, self.degrees) * self.error
        return self.mean - half, self.mean + half

    def p(self) -> float:
        """The two-sided probability of a mean so far from 0 if the truth is 0."""
        if self.error == 0:
            return float(self.mean == 0)
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.degrees))

    def smallest(self) -> float:
        """The smallest difference that a test at 5 % sees in 80 % of such experiments, about."""
        quantiles = stats.t.ppf([1 - LEVEL / 2, POWER], self.degrees)
        return float(quantiles.sum()) * self.error


def estimate(sets: Sequence[Sequence[float]], dependent: bool) -> Estimate:
    """The mean over data sets of the means of their tasks' differences.

    SE² = Σ_d c_d·s_d²/D² with s_d² the variance between the n_d tasks of data set d of D, and c_d =
    1/n_d, or 1/n_d + 1/(n_d − 1) where the tasks are dependent.
    """
    variance, degrees = 0.0, 0
    for values in sets:
        n = len(values)
        c = 1 / n + 1 / (n - 1) if dependent else 1 / n
        variance += c * statistics.variance(values) / len(sets) ** 2
        degrees += n - 1
    mean = statistics.fmean(statistics.fmean(values) for values in sets)
    return Estimate(mean, math.sqrt(variance), degrees)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p of each of several tests."""
    adjusted, largest = [0.0] * len(ps), 0.0
    order = sorted(range(len(ps)), key=ps.__getitem__)
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def outcome(found: Estimate, adjusted: float, margin: float) -> str:
    """One of four; `adjusted` is Holm's p. An interval within the margin is none of the others."""
    low, high = found.interval()
    if -margin < low and high < margin:
        return "no difference beyond the margin"
    if adjusted < LEVEL:
        return "supported" if found.mean > 0 else "contradicted"
    return "undecided"


# ---------------------------------------------------------------- from runs to claims


def scores(runs: Mapping[str, dict], field: str, seeds: int) -> dict[tuple[str, str], float]:
    """{(row, task): the field in per cent, mean over seeds}, where all seeds have run."""
    found = {}
    for run in runs.values():
        if field in run and run["seed"] < seeds:  # the others only tuned
            found.setdefault((run["row"], run["task"]), []).append(100 * run[field])
    return {key: statistics.fmean(values) for key, values in found.items() if len(values) == seeds}


def tasks_of(part: Mapping) -> list[str]:
    """The names of a data set's tasks."""
    return [f"subset {i + 1}" for i in range(part["config"]["subsets"])]


def dropped(part: Mapping, seeds: int) -> list[str]:
    """The tasks on which neither full training nor LoRA is above the probe, on validation."""
    found = scores(part["runs"], "validation", seeds)
    lost = []
    for task in tasks_of(part):
        floor = found.get(("Probe", task), -math.inf)
        best = max(found.get((row, task), math.inf) for row in ("Full", "LoRA r=4"))
        if best <= floor:
            lost.append(task)
    return lost


def differences(data: Mapping, weights: Mapping, field: str) -> dict[str, list[float]] | None:
    """{data set: the contrast of each task that is left}; None until all have run, or too few."""
    sets = {}
    for name in data["plan"]["sets"]:
        part = data["sets"].get(name)
        if part is None:
            return None
        found = scores(part["runs"], field, data["plan"]["seeds"])
        sets[name] = []
        for task in tasks_of(part):
            if task in dropped(part, data["plan"]["seeds"]):
                continue
            terms = [weight * found.get((row, task), math.nan) for row, weight in weights.items()]
            sets[name].append(sum(terms))
    values = [value for some in sets.values() for value in some]
    enough = len(values) >= LEAST_TASKS and all(len(some) > 1 for some in sets.values())
    return sets if enough and all(map(math.isfinite, values)) else None


def verdicts(data: Mapping) -> list[dict]:
    """For each claim of the plan: its estimates, and its outcome or why there is none."""
    found, ps = [], []
    for claim in data["plan"]["claims"]:
        sets = differences(data, claim["weights"], claim["field"])
        pooled, p = None, 1.0
        if sets:
            pooled = estimate([*sets.values()], claim["dependent"])
            p = pooled.p()
        found.append({**claim, "sets": sets, "pooled": pooled, "outcome": "not run"})
        ps.append(p)
    outcomes = {}
    for line, p in zip(found, holm(ps), strict=True):
        if line["pooled"]:
            line["outcome"] = outcome(line["pooled"], p, data["plan"]["margin"])
        outcomes[line["claim"]] = line["outcome"]
        if outcomes.get(line.get("after"), "supported") not in ("supported", "not run"):
            line["outcome"] = "not asked: there is no gain to explain"
    return found


def spelled(found: Estimate) -> str:
    """An estimate and its interval."""
    low, high = found.interval()
    return f"{found.mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def table(data: Mapping) -> str:
    """The outcomes as a Markdown table."""
    lines = []
    for line in verdicts(data):
        cells = [line["paper"], line["claim"], line["printed"]]
        pooled = line["pooled"]
        if pooled:
            cells += [spelled(pooled), second(data, line), f"{pooled.smallest():.1f}"]
        else:
            cells += ["", "", ""]
        lines.append([*cells, line["outcome"]])
    heads = ["paper", "claim", "it prints", "here: points, 95 %", "with converged probes"]
    return plots.markdown(lines, [*heads, "smallest seen", "outcome"], left=7)


def second(data: Mapping, line: Mapping) -> str:
    """The estimate of a claim about accuracy by the second score."""
    if line["field"] != "test":
        return ""
    sets = differences(data, line["weights"], "probe")
    return spelled(estimate([*sets.values()], line["dependent"])) if sets else ""


def draw(source: str | Path) -> Path:
    """Draw claims × data sets, and their pool, beside the JSON; returns the path of the PNG."""
    data = common.read_json(source)
    lines = [line for line in verdicts(data) if line["pooled"]]
    names = data["plan"]["sets"]
    plt = plots.plotting()
    figure, axes = plt.subplots(figsize=(10, 0.5 * len(lines) + 1.5), layout="constrained")
    colours = ("#0072B2", "#D55E00", "#009E73", "black")
    for i, line in enumerate(lines):
        parts = [estimate([line["sets"][name]], line["dependent"]) for name in names]
        for j, found in enumerate([*parts, line["pooled"]]):
            height = i + 0.18 * (j - 1.5)
            axes.plot(found.interval(), [height] * 2, color=colours[j])
            axes.plot(found.mean, height, "oooD"[j], color=colours[j], markersize=5)
        axes.annotate(line["outcome"], (1.01, i), xycoords=("axes fraction", "data"), va="center")
    for name, colour in zip([*names, "mean of the three"], colours, strict=True):
        axes.plot([], [], "o-", color=colour, label=name)
    axes.axvline(0, color="0.5", linewidth=0.8)
    margin = data["plan"]["margin"]
    axes.axvspan(-margin, margin, color="0.92")
    axes.set_yticks(range(len(lines)), [f"{line['paper']}: {line['claim']}" for line in lines])
    axes.invert_yaxis()
    axes.set_xlabel("points of accuracy for the claim, 95 % interval; grey: the margin")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return plots.save_figure(figure, source)


def main() -> None:
    """Print the table of a file of claims, and draw it if there is something to draw."""
    source = Path(sys.argv[1] if len(sys.argv) > 1 else PLAN)
    data = common.read_json(source)
    print(table(data))
    if any(line["pooled"] for line in verdicts(data)):
        print(draw(source))


if __name__ == "__main__":
    main()
