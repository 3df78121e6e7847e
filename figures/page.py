"""The measured parts of figures/README.md, made from the committed JSON files.

python -m figures.page        make them anew

A part stands between <!-- SCRIPT.FUNCTION NAME --> and <!-- end -->, and is what
figures/SCRIPT.py's FUNCTION says of NAME.json.
"""

import re
from importlib import import_module
from pathlib import Path

import common

PAGE = Path(__file__).with_name("README.md")
PART = re.compile(r"<!-- (\w+)\.(\w+) (\w+) -->\n.*?<!-- end -->", re.S)


def part(found: re.Match) -> str:
    """A part with its text made anew."""
    script, function, name = found.groups()
    say = getattr(import_module(f"figures.{script}"), function)
    text = say(common.read_json(PAGE.with_name(f"{name}.json")))
    return f"<!-- {script}.{function} {name} -->\n\n{text}\n\n<!-- end -->"


def filled(page: str) -> str:
    """The page with every part made anew."""
    return PART.sub(part, page)


if __name__ == "__main__":
    with common.replacing(PAGE) as temporary:
        temporary.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
