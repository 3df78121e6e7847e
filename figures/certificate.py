"""The claims and how closely each was seen to hold: certificate.md from certificate.json.

python -m figures.certificate             write certificate.md from certificate.json
python -m figures.certificate --measure   first run the claims' tests: a minute
"""

import os
import re
import sys
from pathlib import Path

import pytest

import common
from tests import certificate
from tests.claims import METHODS, ROOT

TOP = """\
# Certificate

Every claim of the three method files and the worst error that its test saw, as a share of the bound
that the test allows: "exact" is no error at all, "tight" more than 90 % of the bound, "loose" less
than 1 %, "-" a claim without numbers. Every tight and loose bound was looked at: H9 and R13 say how
far something can go, and their tests go there, so that the bound is the claim itself. `pytest`
prints the same for the claims that it runs, on other examples each time;
`python -m figures.certificate --measure` made this page.
"""


def measure() -> dict:
    """Run the claims' tests, on the same examples each time. Raises ValueError if one fails."""
    os.environ["CI"] = "1"  # as tests/conftest.py reads it
    if pytest.main(["-q", *(str(ROOT / "tests" / f"test_{name}.py") for name in METHODS)]):
        raise ValueError("found a failing claim; want all to hold")
    return {"environment": common.environment(), "claims": certificate.rows()}


def page(data: dict) -> str:
    """certificate.md."""
    about = ", ".join(f"{name} {value}" for name, value in data["environment"].items())
    lines = [TOP, f"{about}.", "", "| claim | worst error | comparisons | sentence |"]
    lines.append("|---|---:|---:|---|")
    for row in data["claims"]:
        number = " ".join(certificate.share(row)).strip()
        sentence = re.sub(r"([|_*<])", r"\\\1", row["sentence"])
        lines.append(f"| {row['claim']} | {number} | {row['compared']:,} | {sentence} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure if asked to, and write the page."""
    source = Path(__file__).with_suffix(".json")
    if "--measure" in sys.argv[1:]:
        common.write_json(source, measure())
    text = page(common.read_json(source))
    source.with_suffix(".md").write_text(text, encoding="utf-8")
    print(source.with_suffix(".md"))


if __name__ == "__main__":
    common.one_line_errors(main)
