"""Exercises: a method file with one body taken out, beside the tests of its claims.

python -m tests.exercise                list the exercises of each method, from easy to hard
python -m tests.exercise NAME           write exercises/NAME/: the file to complete and its tests
python -m tests.exercise NAME --check   run the function's example, then the tests of its claims
"""

import ast
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.certificate import spelled  # noqa: F401  registers the error handler of this name
from tests.claims import ROOT, claims

COMPANIONS = ("__init__.py", "conftest.py", "checks.py", "certificate.py", "verdict.py")
EMPTY = 'raise NotImplementedError("your code")'


class Exercise(NamedTuple):
    """What a student should know, and what judges."""

    source: str  # where the formula stands in the paper, or here
    minutes: int
    claims: str  # their ids
    hint: str
    keep: int = 0  # so many statements at the head of the body stay: they check the arguments


EXERCISES = {
    "hra.reflection": Exercise(
        "Eq. 1", 5, "H1 H2", "The part of x along u is (uuᵀ/‖u‖²) x. Take it away twice."
    ),
    "hra.chain": Exercise("Eq. 1", 5, "H1 H2", "Multiply on the right, from the first column on."),
    "hra.penalty": Exercise(
        "Eq. 6", 10, "H7", "Only the angles count: bring the columns to length 1 first."
    ),
    "hra.HRALinear.pair": Exercise(
        "Eq. 5", 10, "H4", "B = W U Γ and A = Uᵀ, with U the `normals` and Γ their `gamma`."
    ),
    "hra.reflect": Exercise(
        "Eq. 2, 5", 10, "H2 H12", "x Hᵀ, where H = I + CᵀA. Multiply by the thin matrices only.", 1
    ),
    "hra.orthonormal": Exercise(
        "Sec. 3.4, λ = ∞", 15, "H8", "QR has the same columns as Gram–Schmidt, up to their signs."
    ),
    "hra.gamma": Exercise(
        "Eq. 3, 4", 20, "H3 H4 H7", "S holds UᵀU above its diagonal and half of its diagonal."
    ),
    "resora.cosine_maps": Exercise("cosine", 5, "R1", "Each map is one vector of N·o numbers."),
    "resora.linear_maps": Exercise(
        "linear", 10, "R1", "The means over the tokens go first. Which norm is the matrix norm?"
    ),
    "resora.cosine": Exercise(
        "cosine", 10, "R1 R4 R8", "⟨ΔHᵢ, ΔHⱼ⟩ = (BᵀB)ᵢⱼ·(SᵀS)ᵢⱼ: two small Gram matrices."
    ),
    "resora.linear": Exercise(
        "linear", 10, "R1 R3", "It is the squared correlation of the codes; `center` may be off."
    ),
    "resora.euclidean": Exercise(
        "Eq. 5", 15, "R1 R11", "‖G − H‖² = ‖G‖² + ‖H‖² − 2⟨G, H⟩, and the mean is over N·o."
    ),
    "resora.rbf_kernel": Exercise(
        "nonlinear", 15, "R1", "To centre a kernel, both means go, and the mean of all comes back."
    ),
    "resora.nonlinear": Exercise(
        "nonlinear", 25, "R1 R8 R9", "‖Bᵢ‖ cancels, so r kernels of the standardised codes do."
    ),
    "resora.regauge": Exercise(
        "this file, part 3", 25, "R5", "QR of B, then the right singular vectors of the codes.", 2
    ),
    "eigenlorax.Components.project": Exercise(
        "Algorithm 1", 5, "E3 E5", "VVᵀ = I makes least squares a single product. Mind the mean."
    ),
    "eigenlorax.EigenLoRAxLinear.pair": Exercise(
        "Sec. 3.2", 5, "E9", "B = s·V_Bᵀ α_B and A = α_Aᵀ V_A.", 3
    ),
    "eigenlorax.EigenLoRAxLinear.set_task": Exercise(
        "Table 4, zero-shot", 10, "E4", "The task may have had columns before. What of them?", 1
    ),
    "eigenlorax.augment": Exercise(
        "Algorithm 1, P", 10, "E6", "QR of V with noise below it is a stable Gram–Schmidt.", 2
    ),
    "eigenlorax.EigenLoRAxLinear.delta_per_sample": Exercise(
        "Sec. 3.2", 15, "E12", "Samples share V; between the two products each has its own α.", 2
    ),
    "eigenlorax.by_gram": Exercise(
        "Algorithm 1", 20, "E1 E2 E3", "XXᵀ = U Σ² Uᵀ, XᵀX = Vᵀ Σ² V; take the smaller one."
    ),
    "eigenlorax.append": Exercise(
        "adapters to come", 20, "E7", "The rows ΣV stand for all that came before."
    ),
    "eigenlorax.choose_k": Exercise(
        "Algorithm 1, K", 25, "E11", "Sum the σ²; the first K whose sum is enough. ω is there.", 3
    ),
}


def read(file: str) -> str:
    """The text of a file of this repository."""
    return (ROOT / file).read_text(encoding="utf-8")


def definition(text: str, name: str) -> ast.FunctionDef:
    """The definition of "function" or "Class.method". Raises ValueError if there is none."""
    node = ast.parse(text)
    for part in name.split("."):
        inner = [child for child in node.body if getattr(child, "name", None) == part]
        if not inner:
            raise ValueError(f"found no definition of {name}; want it as it was")
        node = inner[-1]
    return node


def body_of(node: ast.FunctionDef) -> list[ast.stmt]:
    """The statements of a function after its docstring."""
    return node.body[1:] if ast.get_docstring(node) is not None else node.body


def solution_lines(name: str) -> slice:
    """Which lines (from 0) of the method file are the solution of an exercise."""
    method, _, function = name.partition(".")
    node = definition(read(f"{method}.py"), function)
    solution = body_of(node)[EXERCISES[name].keep :]
    return slice(solution[0].lineno - 1, node.end_lineno)


def emptied(name: str) -> str:
    """The method file's text with a NotImplementedError where the solution was."""
    lines = read(f"{name.partition('.')[0]}.py").split("\n")
    place = solution_lines(name)
    first = lines[place.start]
    lines[place] = [first[: -len(first.lstrip())] + EMPTY]
    return "\n".join(lines)


def written(text: str, name: str) -> bool:
    """Whether the body has more than what was kept, pass, `...` and the NotImplementedError."""
    method, _, function = name.partition(".")
    kept = body_of(definition(read(f"{method}.py"), function))[: EXERCISES[name].keep]
    nothing = [ast.unparse(part) for part in [*kept, *ast.parse(f"{EMPTY}\npass\n...").body]]
    return not all(ast.unparse(part) in nothing for part in body_of(definition(text, function)))


def lay_out(place: Path, method: str, text: str) -> Path:
    """Write METHOD.py with this text, and beside it what its claims' tests need."""
    (place / "tests").mkdir(parents=True, exist_ok=True)
    for file in (*COMPANIONS, f"test_{method}.py"):
        (place / "tests" / file).write_text(read(f"tests/{file}"), encoding="utf-8")
    (place / f"{method}.py").write_text(text, encoding="utf-8")
    return place / f"{method}.py"


def write(name: str) -> Path:
    """Write exercises/NAME/, return the path of METHOD.py. ValueError if it is there already."""
    place = Path("exercises", name)
    if place.exists():
        raise ValueError(f"found {place}; want to write it anew: move it away first")
    return lay_out(place, name.partition(".")[0], emptied(name))


def run(name: str, text: str) -> dict[str, str]:
    """{"example" and each claim: "" or what is wrong}; the cases are drawn, and reduced."""
    method, _, function = name.partition(".")
    tests = [f"test_{claim}_" for claim in EXERCISES[name].claims.split()]
    documented = ast.get_docstring(definition(text, function)) or ""
    named = {"example": name} if ">>>" in documented else {}
    named |= {test.split("_")[1]: test for test in tests}
    places = [f"{method}.py::{name}"] * ("example" in named) + [f"tests/test_{method}.py"]
    options = ["-q", "-p", "tests.verdict", "--doctest-modules", "-m", "not slow"]
    with tempfile.TemporaryDirectory() as temporary:
        lay_out(Path(temporary), method, text)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, "-k", " or ".join(named.values()), *places],
            cwd=temporary,
            env={**os.environ, "CI": "1"},
            capture_output=True,
        )
        if not (Path(temporary) / "verdict.json").exists():
            raise ValueError(f"pytest: {done.stdout + done.stderr}")
        verdicts = json.loads((Path(temporary) / "verdict.json").read_text(encoding="utf-8"))
    found = {}
    for label, start in named.items():
        own = [verdict for test, verdict in verdicts.items() if test.startswith(start)]
        wrong = [verdict for verdict in own or [*verdicts.values(), "no test ran"] if verdict]
        found[label] = wrong[0] if wrong else ""
    return found


def check(name: str, file: Path) -> dict[str, str]:
    """{"example" and each claim: "" or what is wrong} of an exercise.

    Raises ValueError if there is no such file, or no Python in it, or nothing written.
    """
    if not file.is_file():
        raise ValueError(f"found no {file}; want what python -m tests.exercise {name} writes")
    text = file.read_text(encoding="utf-8")
    try:
        compile(text, file, "exec")
    except SyntaxError as error:
        raise ValueError(f"{file}, line {error.lineno}: SyntaxError: {error.msg}") from None
    if not written(text, name):
        raise ValueError(f"not written yet: {file}, line {solution_lines(name).start + 1}")
    return run(name, text)


def table() -> str:
    """Two lines per exercise: name, place in the paper, minutes, claims; and a hint."""
    line = "{name:36} {e.source:24} {e.minutes:3} min  {e.claims}\n    {e.hint}"
    return "\n".join(line.format(name=name, e=e) for name, e in EXERCISES.items())


def listing() -> str:
    """README's list: a line per method, from easy to hard, with the place in its paper."""
    found = {}
    for name, e in EXERCISES.items():
        method, _, function = name.partition(".")
        found.setdefault(method, []).append(f"`{function}` ({e.source}, {e.minutes} min)")
    return "\n".join(f"- {method}: {', '.join(names)}" for method, names in found.items())


def report(name: str, found: dict[str, str]) -> str:
    """What `check` found, for people."""
    sentences = {"example": "the example of its docstring"} | claims(name.partition(".")[0])
    lines = []
    for label, wrong in found.items():
        lines.append(f"{label:8} {'FAILS' if wrong else 'holds'}  {sentences[label]}")
        lines += [f"{'':16}{wrong}"] if wrong else []
    held = sum(not wrong for wrong in found.values())
    lines += [f"hint: {EXERCISES[name].hint}"] if held < len(found) else []
    return "\n".join([*lines, f"{held} of {len(found)} hold"])


def main(arguments: list[str]) -> None:
    """List, write or check."""
    sys.stdout.reconfigure(errors="spelled")  # a terminal need not know the papers' letters
    if not arguments:
        print(table())
        return
    name, *rest = arguments
    if name not in EXERCISES or rest not in ([], ["--check"]):
        found = " ".join(arguments)
        raise ValueError(f"found {found!r}; want NAME or NAME --check of {', '.join(EXERCISES)}")
    method, _, function = name.partition(".")
    if rest:
        found = check(name, Path("exercises", name, f"{method}.py"))
        print(report(name, found))
        sys.exit(any(found.values()))
    e = EXERCISES[name]
    print(f"{write(name)}: write the body of {function} ({e.source}, about {e.minutes} minutes).")
    print(f"Hint: {e.hint}\nThen: python -m tests.exercise {name} --check")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"exercise: {error}")
