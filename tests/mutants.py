"""Does every claim's test see its claim broken?   python -m tests.mutants [CLAIM …]

Each mutant is an edit, old text -> new text, of a method file. In a copy of the repository the
claim's own test must then fail, and with an assertion. The last line is KILLED/ALL.

--generic [N] also makes edits by rule, all of them (hours) or N drawn with a fixed seed, and lists
those that the method's whole test file and doctests let live: for a person to judge, as some are
equal to the original.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
MUTANTS = {
    "hra": [
        ("H1", "G.diagonal().diag() / 2", "G.diagonal().diag()"),
        (
            "H1",
            "return I - 2 * torch.outer(u, u) / (u @ u)",
            "return I - torch.outer(u, u) / (u @ u)",
        ),
        (
            "H1",
            "length = A.detach().norm(dim=1) * C.detach().norm(dim=1)",
            "length = C.detach().norm(dim=1)",
        ),
        ("H2", "C = gamma(A.T).T @ A", "C = gamma(A.T) @ A"),
        ("H2", "for u in U.T:", "for u in U.T.flip(0):"),
        ("H2", "(x @ A.T.to(x.dtype)) @ C.to(x.dtype)", "(x @ C.T.to(x.dtype)) @ A.to(x.dtype)"),
        ("H3", "Γ = -torch.linalg.solve_triangular", "Γ = torch.linalg.solve_triangular"),
        ("H3", "S = G.triu(1) +", "S = G.tril(-1) +"),
        ("H3", "return Γ + Γ @ (I + S @ Γ)", "return Γ + Γ @ (I - S @ Γ)"),
        ("H4", "return B / sizes(U), U.T", "return B, U.T"),
        ("H4", "return B / sizes(U), U.T", "return B * sizes(U), U.T"),
        ("H5", ".repeat_interleave(2, dim=1)", ".repeat(1, 2)"),
        (
            "H5",
            'draw = equal_pairs if init == "identity" else directions',
            'draw = directions if init == "identity" else equal_pairs',
        ),
        ("H6", "(rows + (rows @ C.T) @ A)", "(rows - (rows @ C.T) @ A)"),
        ("H6", "return A, C * (2 / length)[:, None]", "return A, C * (1 / length)[:, None]"),
        ("H7", ".triu(1).square().sum()", ".triu().square().sum()"),
        ("H7", "return 2 * (Û.T @ Û)", "return (Û.T @ Û)"),
        ("H7", "Û = U / U.norm(dim=0)", "Û = U"),
        ("H8", "return Q * R.detach().diagonal().sign()", "return Q"),
        ("H8", "return orthonormal(self.U) if self.strict else self.U", "return self.U"),
        ("H9", "(rows + (rows @ C.T) @ A)", "(rows + 2 * (rows @ C.T) @ A)"),
        ("H9", "G.diagonal().diag() / 2", "G.diagonal().diag()"),
        ("H10", "nn.Parameter(self.bias.detach().clone())", "nn.Parameter(self.bias.detach())"),
        ("H10", "nn.Parameter(self.weight.detach())", "nn.Parameter(self.base.weight.detach())"),
        ("H10", "(rows + (rows @ C.T) @ A)", "(rows + rows @ (C.T @ A))"),
        ("H11", "A = U.T.contiguous() / sizes(U)[:, None]", "A = U.T.contiguous()"),
        ("H11", "s = U.detach().abs().amax(0) * len(U) ** 0.5", "s = U.detach().norm(dim=0)"),
        ("H11", "Û = U / U.norm(dim=0)", "Û = U / (U.norm(dim=0) + 1e-6)"),
        (
            "H11",
            "return I - 2 * torch.outer(u, u) / (u @ u)",
            "return I - 2 * torch.outer(u, u) / (u @ u + 1e-4)",
        ),
        ("H12", "C = gamma(A.T).T @ A", "C = gamma(A.T).detach().T @ A"),
        ("H12", "G = U.T @ U", "G = U.T @ U.detach()"),
        ("H13", "return A, C * (2 / length)[:, None]", "return A, C"),
        ("H13", "return A, C * (2 / length)[:, None]", "return A, C * (2 / length)"),
        (
            "H13",
            "S = G.triu(1) + G.diagonal().diag() / 2",
            "S = G.triu() + G.diagonal().diag() / 2",
        ),
    ],
    "resora": [
        ("R1", "torch.exp(-beta * d2.clamp", "torch.exp(-2 * beta * d2.clamp"),
        ("R1", "/ (len(B) * len(S))", "/ len(S)"),
        ("R1", "(cosines(B) * cosines(S)).square()", "cosines(B) * cosines(S)"),
        ("R1", "square() / (2 * sigma**2))  # (r", "square() / sigma**2)  # (r"),
        ("R1", "    K = K - K.mean(2, keepdim=True)", "    K = K - K.mean(1, keepdim=True)"),
        ("R1", "R = linear(B, S, center)", "R = linear(B, S)"),
        ("R2", '{"center": level == "feature",', '{"center": True,'),
        ("R2", "/ (len(B) * len(S))", "/ len(B)"),
        ("R3", "return cosines(S).square()", "return cosines(S).abs()"),
        ("R3", "C = S - mean", "C = S + mean"),
        ("R4", "(cosines(B) * cosines(S))", "(cosines(B) * (S.T @ S))"),
        ("R4", "(cosines(B) * cosines(S))", "(cosines(B) * cosines(centered(S)))"),
        ("R5", "V = torch.linalg.svd(T).Vh.T", "V = torch.linalg.svd(T).Vh"),
        (
            "R5",
            "T = centered(x.reshape(-1, x.shape[-1]).to(dtype) @ C.T)",
            "T = x.reshape(-1, x.shape[-1]).to(dtype) @ C.T",
        ),
        ("R5", "C = U @ A.to(dtype)", "C = U.triu(1) @ A.to(dtype)"),
        ("R6", "return length.masked_fill(null, torch.inf)", "return length"),
        ("R6", "rounding = 64 * torch.finfo(S.dtype).eps", "rounding = torch.finfo(S.dtype).tiny"),
        ("R7", "R.triu(1)", "R.triu(0)"),
        ("R7", "/ max(1, pairs)", "/ pairs"),
        ("R7", "values = [0 * S.sum()]", "values = [torch.zeros(())]"),
        ("R8", "/ length[:, None] / length[None, :]", "/ length[:, None] ** 2"),
        ("R8", "(S / lengths(S)).T", "S.T"),
        ("R8", "/ max(1, pairs)", "/ len(R)"),
        ("R9", "torch.expm1(-(z[", "(-(z["),
        ("R9", "mean = S.mean(0)", "mean = S.mean()"),
        ("R10", "torch.randperm(len(S), generator=generator, ", "torch.randperm(len(S), "),
        ("R10", "x = x.detach()", "x = x.detach().div_(2)"),
        ("R11", "squares[None, :] - 2 * inner", "squares[None, :] - inner"),
        ("R11", "inner = (B.T @ B) * (S.T @ S) /", "inner = (B.T @ B).abs() * (S.T @ S) /"),
        ("R12", "return cosines(S).square()", "return cosines(S * B.norm(dim=0)).square()"),
        ("R12", "S = centered(S)\n    z", "S = centered(S * B.norm(dim=0))\n    z"),
        ("R12", "(cosines(B) * cosines(S))", "(cosines(B.detach()) * cosines(S))"),
        ("R13", "torch.expm1(-(z[", "(-(z["),
        (
            "R13",
            "return cosines(K.flatten(1).T, least=0.0)",
            "return cosines(K.flatten(1).T, 0.0).square()",
        ),
    ],
    "eigenlorax": [
        (
            "E1",
            "torch.linalg.solve_triangular(torch.linalg.cholesky(V @ V.T), V, upper=False)",
            "1.0 * V",
        ),
        (
            "E1",
            "max(m, n) * torch.finfo(s.dtype).eps * s[:1]).sum())",
            "max(m, n) * torch.finfo(s.dtype).eps * s[:1]).sum() - 1)",
        ),
        ("E2", ".clamp(min=0).sqrt()", ".clamp(min=0)"),
        (
            "E2",
            "mean = w @ X / (w @ w).clamp(min=1) if center else",
            "mean = w @ X / (w @ w).clamp(min=1) if not center else",
        ),
        ("E3", "X if mean is None else X + mean.to(V).view(V.shape[1:])", "X"),
        ("E3", "X if mean is None else X - mean.to(V).view(V.shape[1:])", "X"),
        ("E4", "self.V_B.double()).T / self.scaling, 0", "self.V_B.double()).T, 0"),
        ("E4", "project(A, self.V_A.double()).T", "-project(A, self.V_A.double()).T"),
        ("E5", "return V[:K].to(dtype), mean", "return V[-K:].to(dtype), mean"),
        (
            "E6",
            "return torch.cat([V, Q[len(V) :].to(V)])",
            "return torch.cat([V, V[:1].expand(p, -1)])",
        ),
        ("E7", "root = len(s), old.count**0.5", "root = len(s), old.count**0.25"),
        ("E7", "values = V, mean, s[:K], dropped + float(", "values = V, mean, s[:K], float("),
        ("E8", "root * mean[None], *rows])", "root * mean[None], *rows[:1]])"),
        ("E9", "x @ (a.T @ A).T, b.T @ B", "x @ (a.T @ A).T, -b.T @ B"),
        ("E9", "torch.addmm(y.view(", "torch.addmm(0 * y.view("),
        ("E9", '("B", "zero") else', '("A", "zero") else'),
        ("E9", "(W.double() + B.double() @ A", "(W.double() - B.double() @ A"),
        ("E9", "return (V_B.T @ b * self.scaling)", "return (V_B.T @ b)"),
        (
            "E10",
            'self.register_buffer(f"V_{side}", V.clone(memory_format=torch.contiguous_format))',
            'self.register_parameter(f"V_{side}", nn.Parameter(V.clone()))',
        ),
        (
            "E10",
            "alpha = std * _normal((tasks, len(V), rank), V",
            "alpha = std * _normal((tasks, len(V), rank + 1), V",
        ),
        (
            "E11",
            "(energy < rule * energy[-1:]).sum()) + 1",
            "(energy < rule * energy[-1:]).sum()) + 2",
        ),
        ("E11", ".quantile(0.5)", ".quantile(0.0)"),
        ("E11", "+ 1.82 * beta", "+ 0.82 * beta"),
        ("E12", "self.alpha_B.index_select(0, task)", "self.alpha_B.index_select(0, task.flip(0))"),
    ],
}


Edit = tuple[int, int, str]  # from, to (characters of the text), and what stands there instead


def tested(folder: Path, name: str, text: str, *tests: str) -> subprocess.CompletedProcess:
    """The run of some tests in a copy of the repository whose method file has this text."""
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", *tests],
        cwd=folder,
        env={**os.environ, "CI": "1", "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    shutil.copy(ROOT / f"{name}.py", folder)
    return done


def killed(folder: Path, name: str, claim: str, old: str, new: str) -> str:
    """ "" if the claim's test kills the mutant with an assertion, else what happened instead."""
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    if text.count(old) != 1:
        return f"the old text occurs {text.count(old)} times"
    changed = text.replace(old, new)
    done = tested(folder, name, changed, f"tests/test_{name}.py", "-k", f"test_{claim}_")
    if done.returncode == 0:
        return "it survived"
    failed = next((x for x in done.stdout.splitlines() if x.startswith("FAILED")), done.stdout)
    return "" if " - assert" in failed or "AssertionError" in failed else failed[-300:]


SWAPPED = {"triu": "tril", "tril": "triu", "max": "min", "min": "max", "amax": "amin"}
COMPARED = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">")}


def generic(text: str) -> list[Edit]:
    """Edits of a module's code by rule: signs, transposes, terms, constants, factors, names, <."""
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)

    def place(line: int, column: int) -> int:
        """Characters, where ast counts the bytes of a line."""
        start, end = starts[line - 1 : line + 1]
        return start + len(text[start:end].encode()[:column].decode())

    def span(node: ast.AST) -> tuple[int, int]:
        return place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)

    def source(node: ast.AST) -> str:
        return text[slice(*span(node))]

    def operator(left: ast.AST, right: ast.AST, old: str, new: str) -> Edit:
        at = text.index(old, span(left)[1], span(right)[0])
        return at, at + len(old), new

    def edits(node: ast.AST, parent: ast.AST) -> Iterator[Edit]:
        start, end = span(node) if hasattr(node, "col_offset") else (0, 0)
        match node:
            case ast.BinOp(left, ast.Add() | ast.Sub() as op, right):
                plus = isinstance(op, ast.Add)
                yield operator(left, right, *("+-" if plus else "-+"))
                yield start, end, f"({source(left)})"
                yield start, end, f"({'' if plus else '-'}({source(right)}))"
            case ast.BinOp(left, ast.MatMult(), right):
                for side in (left, right):
                    if isinstance(side, ast.Name):
                        yield span(side)[1], span(side)[1], ".mT"
            case ast.UnaryOp(op=ast.USub()):
                yield start, start + 1, ""
            case ast.Attribute(attr="T" | "mT"):
                yield text.rindex(".", start, end), end, ""
            case ast.Attribute(attr=name) if name in SWAPPED:
                yield end - len(name), end, SWAPPED[name]
            case ast.Name(id=name) | ast.keyword(arg=name) if name in SWAPPED:
                yield start, start + len(name), SWAPPED[name]
            case ast.Constant(value=int() as value) if not isinstance(value, bool):
                yield start, end, str(value + 1)
                if value == 2 and isinstance(parent, ast.BinOp):
                    yield start, end, "1"
            case ast.Constant(value=0.5):
                yield start, end, "1.0"
            case ast.Compare(left, operators, rights):
                for sides, op in zip(pairwise([left, *rights]), operators, strict=True):
                    if type(op) in COMPARED:
                        yield operator(*sides, *COMPARED[type(op)])

    found, queue = [], [(ast.parse(text), None)]
    for node, parent in queue:  # which grows
        found += edits(node, parent)
        children = () if isinstance(node, ast.JoinedStr) else ast.iter_child_nodes(node)
        queue += [(child, node) for child in children]
    return sorted(found)


def shown(name: str, text: str, edit: Edit) -> str:
    """file:line, the old and the new text of the lines that an edit changes."""
    start, end, new = edit
    first, last = text.rfind("\n", 0, start) + 1, text.find("\n", end)
    old, new = text[first:last].strip(), (text[first:start] + new + text[end:last]).strip()
    return f"{name}.py:{text.count(chr(10), 0, start) + 1}: {old!r} -> {new!r}"


def survivors(folder: Path, sample: int) -> None:
    """Print the edits by rule that live, of `sample` drawn ones or, for 0, of all."""
    texts = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in MUTANTS}
    edits = [(name, edit) for name, text in texts.items() for edit in generic(text)]
    drawn = random.Random(0).sample(edits, min(sample, len(edits))) if sample else edits
    whole = {name: (f"tests/test_{name}.py", f"{name}.py") for name in texts}
    for name in sorted({name for name, _ in drawn}):
        if tested(folder, name, texts[name], *whole[name]).returncode:
            print(f"{name}.py fails as it is: nothing that follows about it counts")
    alive = 0
    for name, (start, end, new) in drawn:
        text = texts[name]
        changed = text[:start] + new + text[end:]
        if tested(folder, name, changed, *whole[name]).returncode == 0:
            alive += 1
            print("survived", shown(name, text, (start, end, new)), flush=True)
    print(f"by rule: {alive} of {len(drawn)} survived, {len(edits)} in all")


def main() -> None:
    """Run all mutants, or those of the claims named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("claims", nargs="*", metavar="CLAIM")
    parser.add_argument("--generic", nargs="?", type=int, const=0, metavar="N")
    options = parser.parse_args()
    chosen = [
        (n, *m) for n, ms in MUTANTS.items() for m in ms if m[0] in (options.claims or [m[0]])
    ]
    if not chosen:
        parser.error(f"found {options.claims}, want claims such as H1")
    dead = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".*", "runs", "exercises", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for name, claim, old, new in chosen:
            fate = killed(copy, name, claim, old, new)
            dead += not fate
            print(f"{claim:4} {'killed' if not fate else fate}: {old!r} -> {new!r}", flush=True)
        if options.generic is not None:
            survivors(copy, options.generic)
    print(f"{dead}/{len(chosen)}")
    sys.exit(dead != len(chosen))


if __name__ == "__main__":
    main()
