"""Does every claim's test see its claim broken?   python -m tests.mutants [CLAIM …]

A mutant is a plausible slip: a sign, a factor, a transpose, one too many, a lost gradient. It is a
wrong function put in the place of the right one before the tests import it, or, where that cannot
say it, an edit of the method file's text in memory. The claim's own test must then fail, and with
an assertion. The last line is KILLED/ALL.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import hypothesis
import pytest

from tests.claims import METHODS, ROOT

# {claim: its mutants}. "name = expression" binds a name of the method file anew, within which `was`
# is what the name meant. (old, new) is an edit of the text, where old stands once.
Change = str | tuple[str, str]
MUTANTS: dict[str, list[Change]] = {
    "H1": [
        "gamma = lambda U: -was(U)",
        "gamma = lambda U: -torch.linalg.inv((U.T @ U).triu())",
        "reflection = lambda u: (torch.eye(len(u), dtype=u.dtype) + was(u)) / 2",
    ],
    "H2": [
        "reflect = lambda x, U: was(x, U.flip(1))",
        "chain = lambda U: was(U).T",
        "gamma = lambda U: was(U).T",
    ],
    "H3": [
        "gamma = lambda U: was(U).T",
        "gamma = lambda U: was(U / U.norm(dim=0))",
        "gamma = lambda U: was(U) / 2",
    ],
    "H4": [
        "HRALinear.pair = lambda self: (-was(self)[0], was(self)[1])",
        "HRALinear.pair = lambda self: (was(self)[0] * sizes(self.U), was(self)[1])",
    ],
    "H5": [
        "equal_pairs = lambda d, r, *rest: directions(d, r // 2, *rest).repeat(1, 2)",
        "equal_pairs = lambda d, r, *rest: directions(d, r, *rest)",
        "penalty = lambda U: was(U) + (U[:, 0] - U[:, 1]).sum()",
    ],
    "H6": [
        "gamma = lambda U: -was(U)",
        "HRALinear.weight = property(lambda self: (self.base.weight + was.fget(self)) / 2)",
    ],
    "H7": [
        "penalty = lambda U: (torch.eye(len(U.T), dtype=U.dtype) - U.T @ U).square().sum()",
        "penalty = lambda U: was(U[:, 1:])",
        "gamma = lambda U: was(U) / 2",
    ],
    "H8": [
        "orthonormal = lambda U: U / U.norm(dim=0)",
        "gram_schmidt = lambda U: orthonormal(U)",
    ],
    "H9": [
        "factors = lambda U, *dtype: (was(U, *dtype)[0], 2 * was(U, *dtype)[1])",
        "factors = lambda U, *dtype: (was(U, *dtype)[0], was(U, *dtype)[1] / 2)",
    ],
    "H10": [
        "HRALinear.bias = property(lambda self: None)",
        "HRALinear.weight = property(lambda self: self.base.weight)",
        ("(rows + (rows @ C.T) @ A)", "(rows + rows @ (C.T @ A))"),
        ("nn.Parameter(self.bias.detach().clone())", "nn.Parameter(self.bias.detach())"),
    ],
    "H11": [
        "sizes = lambda U: torch.ones_like(U[0])",
        "reflection = lambda u: was(u / u.norm() + 1e-3)",
        "penalty = lambda U: 2 * (U.T @ U).triu(1).square().sum()",
    ],
    "H12": [
        "factors = lambda U, *dtype: (was(U, *dtype)[0], was(U, *dtype)[1].detach())",
        "gamma = lambda U: was(U.detach())",
    ],
    "H13": [
        "factors = lambda U, *dtype: (was(U, *dtype)[0], -was(U, *dtype)[1])",
        "factors = lambda U, *dtype: (was(U, *dtype)[0], was(U.flip(1), *dtype)[1].flip(0))",
        ("return A, C * (2 / product)[:, None]", "return A, C"),
    ],
    "R1": [
        "euclidean = lambda B, S, beta: was(B, S, 2 * beta)",
        "cosine = lambda B, S: was(B, S).sqrt()",
        "linear = lambda B, S, center: was(B, S)",
        "nonlinear = lambda B, S, sigma: was(B, S, sigma * 2**0.5)",
        "linear_maps = lambda G, H, center: was(G, H)",
        "lengths = lambda X: was(X).detach()",
    ],
    "R2": [
        "codes = lambda inputs, A: 2 * was(inputs, A)",
        ('{"center": level == "feature",', '{"center": True,'),
    ],
    "R3": [
        "centered = lambda S: S",
        "linear = lambda B, S, center: was(B, S, center).sqrt()",
        "linear = lambda B, S, center: was(B, S, center) + 0 * B.sum()",
    ],
    "R4": [
        "cosine = lambda B, S: was(B, centered(S))",
        "cosine = lambda B, S: was(B, S).sqrt()",
    ],
    "R5": [
        "regauge = lambda B, A, x=None: was(B, A)",
        ("V = torch.linalg.svd(T).Vh.T", "V = torch.linalg.svd(T).Vh"),
        ("T = centered(x.reshape(-1, x.shape[-1]).to(dtype) @ C.T)", "T = x.flatten(0, -2) @ C.T"),
        "regauge = lambda B, A, x=None: (was(B, A, x)[0], -was(B, A, x)[1])",
    ],
    "R6": [
        "lengths = lambda X: X.norm(dim=0)",
        "centered = lambda S: S - S.mean(0)",
    ],
    "R7": [
        ("max(1, pairs)", "pairs"),
        ("R.triu(1).sum()", "R.triu().sum()"),
        ("max(1, len(values) - 1)", "(len(values) - 1)"),
    ],
    "R8": [
        "cosine = lambda B, S: cosines(B) * cosines(S)",
        "linear = lambda B, S, center: (S.T @ S).square()",
        "lengths = lambda X: torch.ones_like(X[0])",
    ],
    "R9": [
        "nonlinear = lambda B, S, sigma: linear(B, S)",
        "nonlinear = lambda B, S, sigma: was(B, S, 10 * sigma)",
        ("torch.expm1(-(z[", "(-(z["),
    ],
    "R10": [
        "draw_tokens = lambda S, samples, generator: was(S, samples, torch.default_generator)",
        "codes = lambda inputs, A: was([x.mul_(2) for x in inputs], A)",
    ],
    "R11": [
        "euclidean = lambda B, S, beta: was(B, S, beta / len(B))",
        "euclidean = lambda B, S, beta: was(B, S - S.mean(0), beta)",
    ],
    "R12": [
        "linear = lambda B, S, center: was(B, S, center) + 0 * B.sum()",
        "nonlinear = lambda B, S, sigma: was(B, S * B.norm(dim=0), sigma)",
        "cosine = lambda B, S: was(B.detach(), S)",
    ],
    "R13": [
        "nonlinear = lambda B, S, sigma: linear(B, S)",
        "nonlinear = lambda B, S, sigma: was(B, S, 4 * sigma)",
    ],
    "E1": [
        "by_gram = lambda X, *rule: (was(X, *rule)[0], (X @ was(X, *rule)[1].T).T @ X)",
        "choose_k = lambda s, rule, *rest: was(s, None, *rest) if rule is None else rule",
        ("sigma[:1]).sum())\n    if rule is None", "sigma[:1]).sum()) - 1\n    if rule is None"),
    ],
    "E2": [
        "by_gram = lambda X, *rule: (was(X, *rule)[0].square(), was(X, *rule)[1])",
        "by_svd = lambda X, *rule: (was(X, *rule)[0] / len(X) ** 0.5, was(X, *rule)[1])",
        "by_gram = lambda X, *rule: was(X.float(), *rule)",
    ],
    "E3": [
        "energy_of = lambda X: was(X) ** 0.5",
        "Components.project = lambda self, rows: rows.to(self.V) @ self.V.T",
        "Components.reconstruct = lambda self, coefficients: coefficients @ self.V",
    ],
    "E4": [
        "EigenLoRAxLinear.set_task = lambda self, i, B, A: was(self, i, B * self.scaling, A)",
        "EigenLoRAxLinear.set_task = lambda self, i, B, A: was(self, i, B, -A)",
        "EigenLoRAxLinear.set_task = lambda self, i, B, A: was(self, i, B, A.flip(0))",
        "EigenLoRAxLinear.set_task = lambda self, i, B, A: ("
        "self.alpha_A[i].data[:, : len(A)].copy_(self.V_A @ A.T), "
        "self.alpha_B[i].data[:, : len(A)].copy_(self.V_B @ B / self.scaling))",
    ],
    "E5": [
        "Components.reconstruct = lambda self, coefficients: was(self, coefficients) / 2",
        "choose_k = lambda s, rule, *rest: was(s, rule, *rest) - (rule is None)",
    ],
    "E6": [
        "augment = lambda V, p, g=None: torch.cat([V, normal((p, V.shape[1]), V, g)])",
        "augment = lambda V, p, g=None: torch.cat([V, was(V[:1], p, g)[1:]])",
        "augment = lambda V, p, g=None: was(V, p, g) * V.shape[1] ** 0.5",
    ],
    "E7": [
        "append = lambda old, rows, k: was(old, rows[1:], k)",
        "energy_of = lambda X: was(X) / 2",
        ("old.energy + energy_of(rows)", "float(sigma.square().sum()) + energy_of(rows)"),
        ("sigma[:, None] * old.V[: len(sigma)]", "old.V[: len(sigma)]"),
    ],
    "E8": [
        "stacks = lambda all: ((n, A, B / B.norm(dim=1)[:, None]) for n, A, B in was(all))",
        "stacks = lambda all: ((n, A / A.norm(dim=1)[:, None], B) for n, A, B in was(all))",
    ],
    "E9": [
        "EigenLoRAxLinear.pair = lambda self, i=None: (was(self, i)[0], -was(self, i)[1])",
        "EigenLoRAxLinear.weight_of = lambda self, i=None: 2 * self.base.weight - was(self, i)",
        ("return self.scaling * self.V_B.T @ alpha_B", "return self.V_B.T @ alpha_B"),
        ('if init == "zero":', 'if init == "random":'),
    ],
    "E10": [
        "EigenLoRAxLinear.__init__ = lambda self, base, subspace, r, *rest: "
        "was(self, base, subspace, r + 1, *rest)",
        ('self.register_buffer("V_A", subspace', "self.V_A = nn.Parameter(subspace"),
    ],
    "E11": [
        "noise_threshold = lambda shape: was((0, 1))",
        "noise_threshold = lambda shape: was(shape) - 1",
        ("(held < rule * whole).sum()) + 1", "(held < rule * whole).sum()) + 2"),
    ],
    "E12": [
        "EigenLoRAxLinear.gather = lambda self, ids: was(self, ids.flip(0))",
        "EigenLoRAxLinear.gather = lambda self, ids: (was(self, ids)[0], was(self, ids)[1].abs())",
    ],
    "E13": [
        "EigenLoRAxLinear.gather = lambda self, ids: [torch.stack([*a])[ids] for a in "
        "(self.alpha_A, self.alpha_B)]",
        "EigenLoRAxLinear.pair = lambda self, i=None: (was(self, i)[0] + "
        "0 * sum(a.sum() for a in self.alpha_B), was(self, i)[1])",
    ],
}
METHOD = {name[0].upper(): name for name in METHODS}


def mutated(method: str, change: Change) -> ModuleType:
    """The method's module with a mutant in it. Raises if the mutant does not fit the file."""
    file = ROOT / f"{method}.py"
    text = file.read_text(encoding="utf-8")
    if not isinstance(change, str):
        old, new = change
        if text.count(old) != 1:
            raise ValueError(f"the old text occurs {text.count(old)} times: {old!r}")
        text = text.replace(old, new)
    module = ModuleType(method)
    module.__file__ = str(file)
    exec(compile(text, file, "exec"), vars(module))
    if isinstance(change, str):
        module.was = eval(change.partition(" = ")[0], vars(module))
        exec(change, vars(module))
    return module


def inside(method: str, change: Change, *tests: str) -> int:
    """pytest's exit code, in a process of its own, where the method's module is the mutant."""
    sys.modules[method] = mutated(method, change)
    phases = hypothesis.Phase.explicit, hypothesis.Phase.generate
    options = dict(deadline=None, derandomize=True, max_examples=50, phases=phases)
    hypothesis.settings.register_profile("mutants", report_multiple_bugs=False, **options)
    return pytest.main(["-q", "-x", "--tb=line", "--hypothesis-profile=mutants", *tests])


INSIDE = (
    "import json, sys; from tests.mutants import inside; sys.exit(inside(*json.load(sys.stdin)))"
)


def tested(method: str, change: Change, *tests: str) -> str:
    """The empty text if these tests pass on the mutant, else what pytest says of the failed one."""
    done = subprocess.run(
        [sys.executable, "-c", INSIDE],
        input=json.dumps([method, change, *tests]),
        cwd=ROOT,
        env={**os.environ, "CI": "1", "PYTHONUTF8": "1"},  # with CI pytest cuts no line
        capture_output=True,
        encoding="utf-8",
    )
    if done.returncode == 0:
        return ""
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if failed else (done.stdout + done.stderr)[-500:]


def verdict(claim: str, change: Change) -> tuple[bool, str]:
    """Whether the claim's test kills this mutant with an assertion, and a line that says so."""
    method = METHOD[claim[0]]
    failed = tested(method, change, f"tests/test_{method}.py", "-k", f"test_{claim}_")
    reason = failed.partition(" - ")[2] or failed
    dead = reason.startswith(("assert", "AssertionError", "Failed: DID NOT RAISE"))
    fate = "killed" if dead else "not killed" if failed else "survived"
    shown = change if isinstance(change, str) else " -> ".join(map(repr, change))
    return dead, f"{claim:4}{fate}  {shown}  [{reason.removeprefix('AssertionError: ')}]"


def main() -> None:
    """Run all mutants, or those of the claims named on the command line."""
    claims = sys.argv[1:] or [*MUTANTS]
    unknown = set(claims) - set(MUTANTS)
    if unknown:
        sys.exit(f"found {', '.join(sorted(unknown))}; want claims such as H1")
    sys.stdout.reconfigure(errors="backslashreplace")
    for method in sorted({METHOD[claim[0]] for claim in claims}):
        failed = tested(method, "__file__ = was", f"tests/test_{method}.py")
        if failed:
            sys.exit(f"{method}.py fails as it is: {failed}")
    chosen = [(claim, change) for claim in claims for change in MUTANTS[claim]]
    dead = 0
    with ThreadPoolExecutor(2) as pool:
        for killed, line in pool.map(verdict, *zip(*chosen, strict=True)):
            dead += killed
            print(line, flush=True)
    print(f"{dead}/{len(chosen)}")
    sys.exit(dead != len(chosen))


if __name__ == "__main__":
    main()
