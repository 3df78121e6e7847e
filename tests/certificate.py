"""The certificate: a line for every claim whose test ran, printed at the end of pytest.

A claim's test is named test_H1_…, its docstring is the sentence, and its comparisons are those that
checks.py noted. conftest.py calls `note` after each stage of a test, and `lines` at the end.
"""

import codecs
import re
import textwrap
import unicodedata

from tests.checks import NOTES

HEAD = "worst error in % of its bound (tight: > 90, loose: < 1), comparisons, claim"
WORDS = {"passed": "pass", "failed": "FAIL", "skipped": "skip"}
SPELLED = {"‖": "||", "≤": "<=", "≥": ">=", "−": "-", "→": "->", "√": "sqrt", "∞": "inf"}

TESTS: dict[str, tuple[str, str]] = {}  # a test's id: its claim's id and sentence
OUTCOMES: dict[str, str] = {}  # a test's id: passed, failed or skipped


def note(test: str, docstring: str | None, outcome: str) -> None:
    """Remember the outcome of one stage of a test, if the test is a claim's."""
    claim = re.search(r"::test_([A-Z]\d+)_", test)
    if claim:
        TESTS[test] = claim[1], " ".join((docstring or "").split())
        OUTCOMES[test] = worst_of(OUTCOMES.get(test, outcome), outcome)


def worst_of(*outcomes: str) -> str:
    """failed if one is, else skipped if one is, else passed."""
    return next(kind for kind in ("failed", "skipped", "passed") if kind in outcomes)


def rows() -> list[dict]:
    """What is known of each claim, in the order in which they ran."""
    found = {}
    for test, (claim, sentence) in TESTS.items():
        row = {"claim": claim, "sentence": sentence, "outcome": "passed", "worst": 0, "compared": 0}
        row = found.setdefault(claim, row)
        row["outcome"] = worst_of(row["outcome"], OUTCOMES[test])
        row["worst"] = max([row["worst"], *NOTES[test]])
        row["compared"] += len(NOTES[test])
    return list(found.values())


def share(row: dict) -> tuple[str, str]:
    """The worst error in per cent of its bound, and what is to be looked at, if anything."""
    worst = row["worst"]
    if worst == 0:
        return "exact" if row["compared"] else "-", ""
    if worst < 0.01:
        return f"{100 * worst:.2g}%", "loose"
    if worst > 10:
        return "> 1000%", ""
    return f"{worst:.1%}", "tight" if 0.9 < worst <= 1 else ""


def lines(width: int, encoding: str) -> list[str]:
    """The certificate's lines in letters of this encoding, each at most `width` wide."""
    found = []
    for row in rows():
        number, flag = share(row)
        start = f"{row['claim']:3} {WORDS[row['outcome']]} {number:>7} {flag:5} "
        start += f"{row['compared']:>7,} "
        sentence = row["sentence"].encode(encoding, "spelled").decode(encoding)
        room = max(20, width - len(start))
        found.append((start + textwrap.shorten(sentence, room, placeholder=" ...")).rstrip())
    return [HEAD, *found] if found else []


def spelled(error: UnicodeEncodeError) -> tuple[str, int]:
    """What is written where an encoding lacks letters: alpha for α, <= for ≤, 1 for ₁, T for ᵀ."""
    found = ""
    for letter in error.object[error.start : error.end]:
        *greek, word = unicodedata.name(letter, "?").split()
        if "GREEK" in greek:
            found += word.lower() if letter.islower() else word.title()
        else:
            plain = unicodedata.normalize("NFKD", letter)
            plain = "".join(SPELLED.get(part, part) for part in plain)
            found += plain.encode("ascii", "ignore").decode() or "?"
    return found, error.end


codecs.register_error("spelled", spelled)
