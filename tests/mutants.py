"""Does every claim's test see its claim broken?   python -m tests.mutants [CLAIM …]

Each mutant is an edit, old text -> new text, of a method file. In a copy of the repository the
claim's own test must then fail, and with an assertion. The last line is KILLED/ALL.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MUTANTS = {
    "hra": [
        ("H1", "torch.diag(G.diagonal() / 2)", "torch.diag(G.diagonal() / 3)"),
        ("H1", "(I - 2 * torch.outer(u, u) / (u @ u))", "(I - 2 * torch.outer(u, u))"),
        ("H2", "return A, _gamma(A).T @ A", "return A, _gamma(A) @ A"),
        ("H2", "for u in _rows(U)[0]:", "for u in _rows(U)[0].flip(0):"),
        ("H3", "return _gamma(A).triu() / s / s.T", "return _gamma(A).triu() / s"),
        (
            "H3",
            "S = G.triu() - torch.diag(G.diagonal() / 2)",
            "S = G.tril() - torch.diag(G.diagonal() / 2)",
        ),
        (
            "H4",
            "A, C = self.U.T.to(W.dtype), C / _rows(self.U, W.dtype)[1]",
            "A, C = self.U.T.to(W.dtype), C",
        ),
        (
            "H4",
            "return _full_precision(torch.matmul)(W, C.T), A",
            "return _full_precision(torch.matmul)(W, -C.T), A",
        ),
        ("H5", ".repeat_interleave(copies, dim=1)", ".repeat(1, copies)"),
        ("H5", "copies = 2 if init", "copies = 1 if init"),
        ("H6", "rows @ A.T, C).view(X.shape)", "rows @ A.T, C / 2).view(X.shape)"),
        ("H6", "return -X - X @ (I - S @ X)", "return X + X @ (I - S @ X)"),
        ("H1", "return -X - X @ (I - S @ X)", "return -X"),
        ("H7", ".triu(1).square().sum()", ".triu(0).square().sum()"),
        ("H7", "return 2 * (G / n / n[:, None])", "return 2 * (G / n)"),
        ("H7", "return 2 * (G / n / n[:, None])", "return (G / n / n[:, None])"),
        ("H8", "return Q, -2 * Q", "return Q, -Q"),
        ("H8", "R.detach().diagonal().sign()", "R.detach().diagonal().abs().sign()"),
        ("H9", "return A, _gamma(A).T @ A", "return A, 2 * _gamma(A).T @ A"),
        (
            "H10",
            "nn.Parameter(bias.detach().clone(), requires_grad=False)",
            "nn.Parameter(2 * bias.detach(), requires_grad=False)",
        ),
        (
            "H10",
            "nn.Parameter(bias.detach().clone(), requires_grad=False)",
            "nn.Parameter(bias.detach(), requires_grad=False)",
        ),
        ("H10", "_full_precision(_plus)(W, C, A)", "(W + W @ (C.T @ A))"),
        ("H11", "    return A / s, s\n", "    return A, torch.ones_like(s)\n"),
        ("H11", "n = G.diagonal().sqrt()", "n = G.diagonal().add(1e-6).sqrt()"),
        ("H12", "return A, _gamma(A).T @ A", "return A, _gamma(A).detach().T @ A"),
        ("H12", "G = A @ A.T\n    S =", "G = A @ A.T.detach()\n    S ="),
    ],
    "resora": [
        (
            "R1",
            "R = (_cosines(_gram(B)) * _cosines(_gram(S))).square()",
            "R = _cosines(_gram(B)) * _cosines(_gram(S))",
        ),
        ("R1", "R = torch.exp(-beta * (g[", "R = torch.exp(-2 * beta * (g["),
        ("R1", "- 2 * _gram(rows.mT)", "- _gram(rows.mT)"),
        ("R1", "(sigma * 2**0.5)", "sigma"),
        ("R1", "C, floor = _centered(S) if center else (S, EPS**2)", "C, floor = _centered(S)"),
        ("R2", "S = A.T if self.level", "S = A.T * 2 if self.level"),
        ("R2", '{"center": level == "feature",', '{"center": True,'),
        ("R3", "    return S - mean, (64", "    return S - mean / 2, (64"),
        (
            "R4",
            "R = (_cosines(_gram(B)) * _cosines(_gram(S))).square()",
            "R = (_cosines(_gram(B)) * _cosines(_gram(_centered(S)[0]))).square()",
        ),
        (
            "R5",
            "V = torch.linalg.svd(torch.linalg.qr(T)[1])[2].T",
            "V = torch.linalg.svd(torch.linalg.qr(T)[1])[2]",
        ),
        (
            "R5",
            "T = C.T if x is None else _centered(x.reshape(-1, x.shape[-1]).to(dtype) @ C.T)[0]",
            "T = C.T if x is None else x.reshape(-1, x.shape[-1]).to(dtype) @ C.T",
        ),
        ("R5", "C = R @ A.to(dtype)", "C = R.triu(1) @ A.to(dtype)"),
        ("R6", "return g.masked_fill(g <= floor, torch.inf).sqrt()", "return g.sqrt()"),
        ("R6", "(64 * torch.finfo(", "(0 * torch.finfo("),
        ("R7", "R.triu(1)", "R.triu(0)"),
        ("R8", "return G / n[..., :, None] / n[..., None, :]", "return G / n[..., :, None] ** 2"),
        ("R8", "z = (C / _lengths(_gram(C), floor)[..., None, :]).mT", "z = C.mT"),
        ("R9", ".square().neg_().expm1_()", ".square().neg_()"),
        (
            "R10",
            "torch.randperm(X.shape[-2], generator=generator, device=generator.device)",
            "torch.randperm(X.shape[-2])",
        ),
        (
            "R10",
            "x = x.detach() if self.detach_input else x",
            "x = x.detach().mul_(2) if self.detach_input else x",
        ),
        ("R11", "g[..., None, :] - 2 * h", "g[..., None, :] - h"),
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
        ("E2", "eigenvalues.flip(0).clamp(min=0).sqrt()", "eigenvalues.flip(0).clamp(min=0)"),
        (
            "E2",
            "mean, count = w @ X / (w @ w) * center,",
            "mean, count = w @ X / (w @ w) * (1 - center),",
        ),
        ("E3", "return alpha @ V if mean is None else alpha @ V + mean", "return alpha @ V"),
        ("E3", "else rows.to(V) - mean) @ V.T", "else rows.to(V)) @ V.T"),
        ("E4", "project(B.T / self.scaling, self.V_B).T", "project(B.T, self.V_B).T"),
        ("E4", "project(A, self.V_A).T", "-project(A, self.V_A).T"),
        ("E5", "return V[:K].to(dtype), mean", "return V[-K:].to(dtype), mean"),
        ("E6", "return torch.cat([V, Q[len(V) :].to(V)])", "return torch.cat([V, P.to(V)])"),
        ("E7", "root = len(s), old.count**0.5", "root = len(s), old.count**0.25"),
        ("E7", "values = V, mean, s[:K], dropped + float(", "values = V, mean, s[:K], float("),
        ("E8", "root * mean[None], *rows])", "root * mean[None], *rows[:1]])"),
        (
            "E9",
            "return y + x @ (a.T @ V_A).T @ (b.T @ V_B)",
            "return y - x @ (a.T @ V_A).T @ (b.T @ V_B)",
        ),
        ("E9", "return y + x @ V_A.T @ a @ b.T @ V_B", "return x @ V_A.T @ a @ b.T @ V_B"),
        ("E9", '("B", "zero") else', '("A", "zero") else'),
        ("E9", "(W.to(B.dtype) + B @ A)", "(W.to(B.dtype) - B @ A)"),
        ("E9", "return self.V_B.T @ b * self.scaling, a.T", "return self.V_B.T @ b, a.T"),
        (
            "E10",
            'self.register_buffer(f"V_{side}", V)',
            'self.register_parameter(f"V_{side}", nn.Parameter(V))',
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
        ("E11", "s.quantile(0.5)", "s.quantile(0.0)"),
        ("E11", "+ 1.82 * beta", "+ 0.82 * beta"),
        ("E12", "self.alpha_B.index_select(0, task)", "self.alpha_B.index_select(0, task.flip(0))"),
    ],
}


def killed(folder: Path, name: str, claim: str, old: str, new: str) -> str:
    """ "" if the claim's test kills the mutant with an assertion, else what happened instead."""
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    if text.count(old) != 1:
        return f"the old text occurs {text.count(old)} times"
    (folder / f"{name}.py").write_text(text.replace(old, new), encoding="utf-8")
    test = [f"tests/test_{name}.py", "-k", f"test_{claim}_"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", *test],
        cwd=folder,
        env={**os.environ, "CI": "1", "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    shutil.copy(ROOT / f"{name}.py", folder)
    if done.returncode == 0:
        return "it survived"
    failed = next((x for x in done.stdout.splitlines() if x.startswith("FAILED")), done.stdout)
    return "" if " - assert" in failed or "AssertionError" in failed else failed[-300:]


def main() -> None:
    """Run all mutants, or those of the claims named on the command line."""
    chosen = [(n, *m) for n, ms in MUTANTS.items() for m in ms if m[0] in (sys.argv[1:] or [m[0]])]
    dead = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".*", "runs", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for name, claim, old, new in chosen:
            fate = killed(copy, name, claim, old, new)
            dead += not fate
            print(f"{claim:4} {'killed' if not fate else fate}: {old!r} -> {new!r}", flush=True)
    print(f"{dead}/{len(chosen)}")
    sys.exit(dead != len(chosen))


if __name__ == "__main__":
    main()
