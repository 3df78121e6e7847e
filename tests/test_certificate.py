"""The certificate that ends pytest, on a suite of a few claims, and how claims are read."""

import os
import shutil
import subprocess
import sys

import pytest

import common
from figures import certificate as figure
from tests.claims import METHODS, ROOT, claims, claims_in

HEAD = """
from hypothesis import given, settings, strategies as st
import pytest
from tests.checks import close, exactly, within, normal

def test_other():
    within(0.5, 1.0)
"""
MANY = "‖x‖ ≤ 1 for α₁,\n    and so on, in many more words than a narrow terminal has room for."
TESTS = [  # a test's name, its docstring and its body
    ("H1_half", MANY, "within(0.25, 1.0); close(0.5, 1.0, 1.0)"),
    ("H3_bits", "No error.", "exactly(normal(0, 3), normal(0, 3))"),
    ("H4_used_up", "Tight.", "within(0.95, 1.0)"),
    ("H5_not_used", "Loose.", "within(1e-9, 1.0)"),
    ("H6_wrong", "False.", "within(3.0, 2.0)"),
    ("H7_skipped", "Not seen.", 'pytest.skip("no data")'),
    ("H8_infinite", "Nor this.", 'within(float("nan"), 2.0)'),
    ("H9_words", "Without numbers.", "assert True"),
]
DRAWN = '''
@settings(max_examples=20, database=None)
@given(st.integers(0, 9))
@pytest.mark.parametrize("kind", ["a b", "c"])
def test_H10_drawn(kind, n):
    """Ten numbers, twice."""
    within(0.1 * n, 1.0)
'''


def certificate_of(folder, *options, encoding="utf-8") -> list[str]:
    """The certificate's lines at the end of pytest in a folder with these tests."""
    (folder / "tests").mkdir()
    for file in ("__init__.py", "conftest.py", "checks.py", "certificate.py"):
        shutil.copy(ROOT / "tests" / file, folder / "tests")
    plain = [f'def test_{name}():\n    """{doc}"""\n    {body}\n' for name, doc, body in TESTS]
    text = "\n".join([HEAD, *plain, DRAWN])
    (folder / "tests" / "test_tiny.py").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/test_tiny.py", *options],
        cwd=folder,
        env={**os.environ, "COLUMNS": "70", "PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    lines = done.stdout.decode(encoding).partition(" certificate ---")[2].splitlines()
    return [line for line in lines if line[:1] == "H"]


def test_each_claim_has_a_line_with_its_worst_error(tmp_path):
    found = certificate_of(tmp_path)
    assert found[0] == "H1  pass   50.0%             2 ‖x‖ ≤ 1 for α₁, and so on, in many ..."
    assert [line.split() for line in found[1:-1]] == [
        ["H3", "pass", "exact", "1", "No", "error."],
        ["H4", "pass", "95.0%", "tight", "1", "Tight."],
        ["H5", "pass", "1e-07%", "loose", "1", "Loose."],
        ["H6", "FAIL", "150.0%", "1", "False."],
        ["H7", "skip", "-", "0", "Not", "seen."],
        ["H8", "FAIL", "-", "0", "Nor", "this."],
        ["H9", "pass", "-", "0", "Without", "numbers."],
    ]
    assert found[1].index("No error") == found[2].index("Tight") == found[0].index("‖x‖")
    assert found[-1].split() == ["H10", "pass", "90.0%", "20", "Ten", "numbers,", "twice."]


def test_a_terminal_without_the_letters_gets_others(tmp_path):
    found = certificate_of(tmp_path, "-k", "H1_", encoding="cp1252")
    assert found == ["H1  pass   50.0%             2 ||x|| <= 1 for alpha1, and so on, ..."]
    spelled = "‖ΔW·Γ⁻¹‖ ≤ √2·α₁ᵀ → ½ \x07".encode("ascii", "spelled").decode()
    assert spelled == "||DeltaW?Gamma-1|| <= sqrt2?alpha1T -> 12 \x07"


def test_it_is_printed_after_an_early_end_and_only_of_claims_that_ran(tmp_path):
    options = "-x", "-p", "no:cacheprovider", "-k", "H5 or H6 or H7 or other"
    assert [line[:8] for line in certificate_of(tmp_path, *options)] == ["H5  pass", "H6  FAIL"]


def test_the_committed_certificate_is_of_the_claims_as_they_are():
    source = ROOT / "figures" / "certificate.json"
    data = common.read_json(source)
    assert source.with_suffix(".md").read_text(encoding="utf-8") == figure.page(data)
    found = {row["claim"]: row["sentence"] for row in data["claims"]}
    assert found == {k: v for name in METHODS for k, v in claims(name).items()}
    assert {row["outcome"] for row in data["claims"]} == {"passed"}


def test_the_page_shows_what_was_measured():
    row = {"claim": "H1", "sentence": "|x|_F ≤ 1", "outcome": "passed", "compared": 1234}
    page = figure.page({"environment": {"torch": "2"}, "claims": [row | {"worst": 0.95}]})
    assert "\ntorch 2.\n" in page
    assert page.endswith("\n| H1 | 95.0% tight | 1,234 | \\|x\\|\\_F ≤ 1 |\n")


# ---------------------------------------------------------------- how claims are read

MODULE = '''
def f():
    """Do it.

    Claim 2. The second,
    on two lines: A = B.

    >>> 1
    1
    """

class C:
    """Of claim 1.

    Claim 3. x² ≥ 0
    Claim 4. 1 > 0
    """

    def g(self):
        """Claim 1. The first."""
'''


def test_claims_are_paragraphs_of_docstrings_in_the_order_of_their_numbers():
    found = [*claims_in(MODULE, "H").items()]
    second = "The second, on two lines: A = B."
    assert found == [("H1", "The first."), ("H2", second), ("H3", "x² ≥ 0"), ("H4", "1 > 0")]


@pytest.mark.parametrize("new", ["Claim 2.", "Claim 5.", "claim 3.", "See Claim 3.", "Claim 3:"])
def test_a_claim_that_is_missing_or_there_twice_is_refused(new):
    with pytest.raises(ValueError, match=r"found the claims \[1, 2.*\]; want each of 1, 2, … once"):
        claims_in(MODULE.replace("Claim 3.", new), "H")
    with pytest.raises(ValueError, match=r"found the claims \[\]"):
        claims_in("x = 1", "H")
