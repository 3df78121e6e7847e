"""Exercises: a method file with one body taken out, beside the tests of the claims it serves.

python -m tests.exercise                list the exercises of each method, from easy to hard
python -m tests.exercise NAME           write exercises/NAME/: the file to complete and its tests
python -m tests.exercise NAME --check   run those tests on the file, and say which claims hold
    --folder FOLDER   another place than exercises/
    --force           write over an exercise that is there
"""

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from common import one_line_errors

ROOT = Path(__file__).parents[1]
OWN = """
import {method}

assert {method}.__file__ == {file!r}
hypothesis.settings.register_profile(
    "verdict",
    parent=hypothesis.settings.get_profile("ci"),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # no smaller counterexample
)
hypothesis.settings.load_profile("verdict")
"""


class Exercise(NamedTuple):
    """Where its formula stands (Step: of the docstring), the claims' ids, what else is emptied."""

    source: str
    claims: str
    helper: str = ""  # its body would give the answer away


EXERCISES = {
    "hra.chain": Exercise("Eq. 1, steps 1–2", "H1 H2 H5"),
    "hra.reflect": Exercise("Eq. 2, step 6", "H2 H9 H12"),
    "hra.HRALinear.merge": Exercise("Eq. 5, step 7", "H10"),
    "hra.penalty": Exercise("Eq. 6", "H7 H11"),
    "hra.HRALinear.pair": Exercise("Eq. 5, step 7", "H4 H8"),
    "hra.gram_schmidt": Exercise("Sec. 3.4, λ = ∞", "H8", "_orthonormal"),
    "hra.gamma": Exercise("Eq. 3–4, steps 3–5", "H3 H4 H7 H12", "_gamma"),
    "resora.rbf_kernel": Exercise("RBF kernel, part 1", "R1"),
    "resora.redundancy_dense": Exercise("R, part 1", "R1 R7"),
    "resora.lengths": Exercise("part 2", "R4 R6 R8"),
    "resora.cosines": Exercise("part 2", "R3 R4 R8"),
    "resora.euclidean": Exercise("Eq. 5, part 2", "R1 R11"),
    "resora.linear": Exercise("cross-covariance, part 2", "R1 R3 R12"),
    "resora.nonlinear": Exercise("RBF kernel, part 2", "R1 R9 R13"),
    "resora.regauge": Exercise("the gauge, part 3", "R5"),
    "resora.ReSoRA.penalty": Exercise("L + λ·R, part 5", "R2 R10 R12"),
    "eigenlorax.project": Exercise("Sec. 3.2, step 4", "E3 E4 E5"),
    "eigenlorax.EigenLoRAxLinear.pair": Exercise("Sec. 3.2", "E9"),
    "eigenlorax.EigenLoRAxLinear.set_task": Exercise("zero-shot, step 5", "E4 E7"),
    "eigenlorax.choose_k": Exercise("K, step 2", "E1 E11"),
    "eigenlorax.augment": Exercise("Algorithm 1, P", "E6"),
    "eigenlorax.EigenLoRAxLinear.forward": Exercise("Sec. 3.2", "E9 E12"),
    "eigenlorax.principal_components": Exercise(
        "Algorithm 1, steps 2–3", "E1 E2 E3 E11", "_components"
    ),
    "eigenlorax._grow": Exercise("step 7", "E7 E8"),
}


def _read(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


def definition(tree: ast.AST, name: str) -> ast.FunctionDef:
    """The definition of "function" or "Class.method"."""
    for part in name.split("."):
        tree = next(node for node in tree.body if getattr(node, "name", None) == part)
    return tree


def body_lines(text: str, name: str) -> slice:
    """Which lines (from 0) of a module's text are the body of name, less its docstring."""
    node = definition(ast.parse(text), name)
    first = node.body[0]
    documented = ast.get_docstring(node) is not None
    return slice(first.end_lineno if documented else first.lineno - 1, node.end_lineno)


def emptied(text: str, name: str) -> str:
    """The module's text with nothing but the docstring and a NotImplementedError in name."""
    lines = text.split("\n")
    indent = " " * definition(ast.parse(text), name).body[0].col_offset
    lines[body_lines(text, name)] = [f'{indent}raise NotImplementedError("your code")']
    return "\n".join(lines)


def claim_tests(method: str, claims: str) -> str:
    """tests/test_METHOD.py, cut down to the tests of these claims and what they use."""
    text = _read(f"tests/test_{method}.py")
    statements = ast.parse(text).body
    wanted = tuple(f"test_{claim}_" for claim in claims.split())
    kept = [s for s in statements if getattr(s, "name", "").startswith(wanted)]
    for statement in kept:  # which grows
        used = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        kept += [s for s in statements if s not in kept and used & _names(s)]
    lines, blocks = text.split("\n"), [f'"""{method}.py: the claims {claims}."""\n']
    for statement in sorted(kept, key=lambda s: s.lineno):
        first = min(s.lineno for s in [statement, *getattr(statement, "decorator_list", [])])
        gap = "\n\n" if isinstance(statement, ast.FunctionDef) else ""
        blocks.append(gap + "\n".join(lines[first - 1 : statement.end_lineno]))
    return "\n".join(blocks) + "\n"


def _names(statement: ast.stmt) -> set[str]:
    """What a statement of a module binds."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
    nodes = ast.walk(statement) if isinstance(statement, ast.Assign) else ()
    stored = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return stored | {getattr(statement, "name", "")} - {""}


def sentences(method: str) -> dict[str, str]:
    """{claim: its sentence} in the method file's docstring."""
    docstring = ast.get_docstring(ast.parse(_read(f"{method}.py")))
    found = re.findall(r"^ +([HRE]\d+)  (\S.*(?:\n {6}.*)*)", docstring, flags=re.M)
    return {claim: " ".join(sentence.split()) for claim, sentence in found}


def write(name: str, folder: Path, force: bool = False) -> Path:
    """Write folder/NAME/ with METHOD.py, its tests and conftest.py; return METHOD.py's path.

    Raises ValueError if one of the files is there, unless force.
    """
    method, _, function = name.partition(".")
    text = emptied(_read(f"{method}.py"), function)
    if helper := EXERCISES[name].helper:
        text = emptied(text, helper)
    files = {
        f"{method}.py": text,
        f"test_{method}.py": claim_tests(method, EXERCISES[name].claims),
        "conftest.py": _read("tests/conftest.py"),
    }
    place = folder / name
    there = [str(place / file) for file in files if (place / file).exists()]
    if there and not force:
        raise ValueError(f"found {there[0]}, want a new place (--folder) or --force to overwrite")
    place.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (place / file).write_text(content, encoding="utf-8", newline="")
    return place / f"{method}.py"


def check(name: str, file: Path) -> dict[str, bool]:
    """{claim: does it hold?} of an exercise, by this repository's tests on a copy of the file.

    Raises ValueError if there is no such file, or it cannot be imported.
    """
    if not file.is_file():
        raise ValueError(f"found no {file}, want what python -m tests.exercise {name} writes")
    method, claims = name.partition(".")[0], EXERCISES[name].claims
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary).resolve()
        (place / file.name).write_bytes(file.read_bytes())
        (place / f"test_{method}.py").write_text(claim_tests(method, claims), encoding="utf-8")
        own = OWN.format(method=method, file=str(place / file.name))
        (place / "conftest.py").write_text(_read("tests/conftest.py") + own, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=xml"],
            cwd=place,
            env={**os.environ, "CI": "1"},
            capture_output=True,
            text=True,
        )
        if not (place / "xml").exists():
            reasons = [x[2:].strip() for x in done.stderr.splitlines() if x.startswith("E ")]
            reason = (reasons or [done.stderr.strip() or "an exit"])[-1]
            raise ValueError(f"{file}: found {reason}, want to import it")
        cases = list(ElementTree.parse(place / "xml").iter("testcase"))
    found = {}
    for claim in claims.split():
        own = [case for case in cases if case.get("name").startswith(f"test_{claim}_")]
        found[claim] = bool(own) and all(case.find("*") is None for case in own)
    return found


def table() -> str:
    """One line per exercise: name, place in the paper, claims."""
    return "\n".join(f"{name:37} {e.source:23} {e.claims}" for name, e in EXERCISES.items())


def listing() -> str:
    """README's list: a line per method, from easy to hard, with the place in its paper."""
    found = {}
    for name, e in EXERCISES.items():
        method, _, function = name.partition(".")
        found.setdefault(method, []).append(f"`{function}` ({e.source})")
    return "\n".join(f"- {method}: {', '.join(names)}" for method, names in found.items())


def main() -> None:
    """List, write or check."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.exercise",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", metavar="NAME")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("exercises"))
    parser.add_argument("--force", action="store_true")
    options = parser.parse_args()
    name = options.name
    if name is None:
        print(table())
        return
    if name not in EXERCISES:
        raise ValueError(f"NAME: found {name!r}, want one of {', '.join(EXERCISES)}")
    method, _, function = name.partition(".")
    if not options.check:
        file = write(name, options.folder, options.force)
        wanted = " and ".join(filter(None, (function, EXERCISES[name].helper)))
        print(f"{file}: write the body of {wanted} ({EXERCISES[name].source}), then --check")
        return
    found = check(name, options.folder / name / f"{method}.py")
    for claim, holds in found.items():
        print(f"{claim:4} {'holds' if holds else 'does not hold':14} {sentences(method)[claim]}")
    print(f"{sum(found.values())} of {len(found)} claims hold")
    sys.exit(not all(found.values()))


if __name__ == "__main__":
    one_line_errors(main)
