"""Draw glue_docs.png and .md from glue_docs.json: what each row reaches on the docstrings' tasks.

python -m figures.glue_docs [JSON]      The JSON is written by train_glue.py --out.
"""

import sys
from pathlib import Path

import common
from figures import plots


def draw(source: str | Path) -> Path:
    """Draw the figure and write the table beside their JSON; returns the path of the PNG."""
    data = common.read_json(source)
    where = f"GLUE, {Path(data['config']['backbone']).name}"
    if "corpus" in data:
        where = f"docstrings of Python {data['corpus']['python']}"
    title = f"{where}: {data['config']['train'] or 'all'} training rows a task"
    return plots.draw_bars(source, "test score × 100", title)


if __name__ == "__main__":
    print(draw(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")))
