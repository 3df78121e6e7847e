"""Print glue_gate.json as Markdown: is training above what the frozen model knows already?

python -m figures.glue_gate [JSON]
The JSON is written by train_glue.py --table gate --backbone MINILM --data GLUE --train 2500
--seeds 1 --out figures/glue_gate.json.

A table of methods says nothing where training itself fails, so this gate stands before one. A task
passes if every trained row is above the better of two floors on the reported set: the larger class
(or mean), and a converged linear model of the frozen model's mean-pooled outputs, u of one text and
|u − v|, u·v of two. Five tasks of six have to pass. The rule was fixed before the runs.
"""

import sys
from pathlib import Path

import common
from figures import plots

WANTED = 5


def passed(data: dict) -> list[str]:
    """The tasks on which every trained row is above the better floor."""
    floors = {run["row"] for run in data["runs"] if run["method"] == "floor"}
    good = []
    for task in data["rows"][0]["tasks"]:
        scores = {r["row"]: r["tasks"][task] for r in data["rows"]}
        floor = max(scores.pop(name) for name in floors)
        if min(scores.values()) > floor:
            good.append(task)
    return good


def verdicts(data: dict) -> str:
    """The scores × 100, a line for each task, and what they say."""
    good, names = passed(data), [r["row"] for r in data["rows"]]
    lines = []
    for task in data["rows"][0]["tasks"]:
        scores = [f"{100 * r['tasks'][task]:.1f}" for r in data["rows"]]
        lines.append([task, *scores, "yes" if task in good else "no"])
    table = plots.markdown(lines, ["task", *names, "passes"])
    outcome = "open" if len(good) >= WANTED else "shut"
    return f"{table}\n\n{len(good)} tasks pass; wanted {WANTED}: the gate is {outcome}."


def draw(source: str | Path) -> Path:
    """Write `verdicts` beside the JSON; returns the path."""
    target = Path(source).with_suffix(".md")
    target.write_text(f"{verdicts(common.read_json(source))}\n", encoding="utf-8")
    return target


if __name__ == "__main__":
    print(draw(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")))
