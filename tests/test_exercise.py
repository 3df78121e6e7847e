"""Exercises: what is written, what is refused, and that the checks tell right from wrong."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import exercise
from tests.claims import METHODS, ROOT, claims
from tests.exercise import EXERCISES, check, emptied, solution_lines, write, written
from tests.verdict import complaint

NAMES = pytest.mark.parametrize("name", EXERCISES)
SOLUTIONS = {  # what a student may hand in, right and plain; and a slip: (old, new)
    "hra.reflection": (
        "return torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(u, u) / (u @ u)",
        ("2 * ", ""),
    ),
    "hra.chain": (
        "H = reflection(U[:, 0])\n    for u in U.T[1:]: H = H @ reflection(u)\n    return H",
        ("H @ reflection(u)", "reflection(u) @ H"),
    ),
    "hra.penalty": (
        "U = U / U.norm(dim=0); return (torch.eye(len(U.T), dtype=U.dtype) - U.T @ U).norm() ** 2",
        ("** 2", "** 2 / 2"),
    ),
    "hra.HRALinear.pair": (
        "U = self.normals(); return self.base.weight @ U @ gamma(U), U.T",
        ("gamma(U)", "gamma(U).T"),
    ),
    "hra.reflect": ("A, C = factors(U, x.dtype); return x + (x @ A.T) @ C", ("A, C =", "C, A =")),
    "hra.orthonormal": (
        "Q, R = torch.linalg.qr(U / sizes(U)); return Q * R.diagonal().sign()",
        ("Q * R.diagonal().sign()", "U / U.norm(dim=0)"),
    ),
    "hra.gamma": (
        "G = U.T @ U; return -torch.linalg.inv(G.triu(1) + G.diagonal().diag() / 2)",
        (" / 2", ""),
    ),
    "resora.cosine_maps": (
        "return torch.nn.functional.cosine_similarity(G.flatten(), H.flatten(), 0) ** 2",
        (" ** 2", ""),
    ),
    "resora.linear_maps": (
        "mean = float(center); G, H = G - mean * G.mean(0), H - mean * H.mean(0);"
        " return (G.T @ H).square().sum() / ((G.T @ G).norm() * (H.T @ H).norm())",
        ("G - mean * G.mean(0), H - mean * H.mean(0)", "G, H"),
    ),
    "resora.cosine": (
        "B, S = B / B.norm(dim=0), S / S.norm(dim=0); return ((B.T @ B) * (S.T @ S)).square()",
        (".square()", ""),
    ),
    "resora.linear": (
        "S = S - float(center) * S.mean(0); S = S / S.norm(dim=0); return (S.T @ S).square()",
        (" - float(center) * S.mean(0)", ""),
    ),
    "resora.euclidean": (
        "h = (B.T @ B) * (S.T @ S); d = h.diagonal();"
        " return torch.exp(-beta * (d[:, None] + d - 2 * h) / (len(B) * len(S)))",
        ("(len(B) * len(S))", "len(S)"),
    ),
    "resora.rbf_kernel": (
        "v = H.var(0, correction=0).sum();"
        " K = torch.exp((H[:, None] - H).square().sum(2) / (-2 * v * sigma**2));"
        " return K - K.mean(0) - K.mean(1)[:, None] + K.mean()",
        (" - K.mean(1)[:, None] + K.mean()", ""),
    ),
    "resora.nonlinear": (
        "z = ((S - S.mean(0)) / S.std(0, correction=0)).T;"
        " K = torch.exp((z[:, :, None] - z[:, None]).square() / (-2 * sigma**2));"
        " K = K - K.mean(1, True) - K.mean(2, True) + K.mean((1, 2), True);"
        " K = K.flatten(1) / K.flatten(1).norm(dim=1, keepdim=True); return K @ K.T",
        ("-2 * sigma", "-sigma"),
    ),
    "resora.regauge": (
        "Q, U = torch.linalg.qr(B); C = U @ A; T = C.T if x is None else x.flatten(0, -2) @ C.T;"
        " T = T if x is None else T - T.mean(0);"
        " V = torch.linalg.svd(T, full_matrices=True).Vh.T; p = (0, B.shape[1] - len(C));"
        " return F.pad(Q @ V, p), F.pad(V.T @ C, (0, 0, *p))",
        ("T - T.mean(0)", "T"),
    ),
    "eigenlorax.Components.project": (
        "return (rows.to(self.V) - self.mean) @ self.V.T",
        (" - self.mean", ""),
    ),
    "eigenlorax.EigenLoRAxLinear.pair": (
        "return self.scaling * self.V_B.T @ alpha_B, alpha_A.T @ self.V_A",
        ("self.scaling * ", ""),
    ),
    "eigenlorax.EigenLoRAxLinear.set_task": (
        "r = len(A); self.alpha_B[task].zero_(); self.alpha_A[task][:, :r] = self.V_A @ A.T;"
        " self.alpha_B[task][:, :r] = self.V_B @ B / self.scaling",
        ("self.alpha_B[task].zero_();", ""),
    ),
    "eigenlorax.augment": (
        "noise = torch.randn(p, n, generator=generator, dtype=V.dtype);"
        " Q = torch.linalg.qr(torch.cat([V, noise]).T).Q; return torch.cat([V, Q.T[K:]])",
        ("qr(torch.cat([V, noise])", "qr(torch.cat([V.flip(1), noise])"),
    ),
    "eigenlorax.EigenLoRAxLinear.delta_per_sample": (
        "return torch.einsum('b...d,kd,bkr,blr,lo->b...o',"
        " x, self.V_A, alpha_A, s_alpha_B, self.V_B)",
        (" s_alpha_B", " self.scaling * s_alpha_B"),
    ),
    "eigenlorax.by_gram": (
        "squares, E = torch.linalg.eigh(X.T @ X); sigma = squares.flip(0).clamp(min=0).sqrt();"
        " sigma = sigma[: min(X.shape)]; K = choose_k(sigma[: min(free)].float(), k, free);"
        " return sigma[:K], E.flip(1)[:, :K].T",
        ("E.flip(1)", "E"),
    ),
    "eigenlorax.append": (
        "s = old.singular_values; X = torch.cat([s[:, None] * old.V[: len(s)], rows.to(old.V)]);"
        " new = principal_components(X, None, False); energy = old.energy + energy_of(rows);"
        " K = choose_k(new.singular_values, k, X.shape, energy);"
        " return Components(new.V[:K], new.singular_values[:K], new.mean, energy)",
        ("old.energy + energy_of(rows)", "new.energy"),
    ),
    "eigenlorax.choose_k": (
        "s2 = sigma.double().square(); rank = int((sigma > 1e-12 * sigma[0]).sum());"
        " enough = 0.999999999999 * (rule if isinstance(rule, float) else 1) * s2.sum();"
        " omega = noise_threshold(shape) * sigma.double().quantile(0.5);"
        " return (rank if rule is None else rule if type(rule) is int"
        " else int((sigma > omega).sum()) if rule == 'gavish-donoho'"
        " else int((s2.cumsum(0) < enough).sum()) + 1)",
        ("enough).sum()) + 1", "enough).sum())"),
    ),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder of its own for each test, where it writes exercises/."""
    monkeypatch.chdir(tmp_path)


def solved(name: str, slip: bool) -> str:
    """The text of the exercise with its solution, or with the slip, in the place that was empty."""
    body, change = SOLUTIONS[name]
    return emptied(name).replace(exercise.EMPTY, body.replace(*change) if slip else body)


def test_there_are_four_or_more_exercises_per_method_and_their_claims_are_real():
    assert [*SOLUTIONS] == [*EXERCISES]
    for method in METHODS:
        own = [e for name, e in EXERCISES.items() if name.startswith(f"{method}.")]
        assert len(own) >= 4
        assert [e.minutes for e in own] == sorted(e.minutes for e in own)
        for e in own:
            assert e.claims.split() and set(e.claims.split()) <= claims(method).keys()
            assert 5 <= e.minutes <= 30 and e.hint.endswith((".", "?"))


@NAMES
def test_the_solution_is_gone_and_nothing_else(name):
    method, _, function = name.partition(".")
    assert not any(part.startswith("_") for part in function.split("."))
    original = (ROOT / f"{method}.py").read_text(encoding="utf-8")
    file = write(name)
    text = file.read_text(encoding="utf-8")
    assert text.count(exercise.EMPTY) == 1
    lines = text.split("\n")
    place = solution_lines(name)
    lines[place.start : place.start + 1] = original.split("\n")[place]
    assert "\n".join(lines) == original and written(original, name)
    kept = exercise.body_of(exercise.definition(text, function))[:-1]
    assert len(kept) == EXERCISES[name].keep
    if kept:  # they end with what looks at the arguments
        last = ast.unparse(kept[-1])
        assert any(word in last for word in ("raise", "return", "check", "refuse", "one_task"))
    for body in (exercise.EMPTY, "pass", "..."):
        file.write_text(text.replace(exercise.EMPTY, body), encoding="utf-8")
        with pytest.raises(ValueError, match=r"not written yet: .*, line \d+$"):
            check(name, file)


@pytest.mark.slow
@NAMES
def test_a_plain_solution_passes_and_a_slip_fails_with_a_number(name):
    right, wrong = (exercise.run(name, solved(name, slip)) for slip in (False, True))
    assert not any(right.values()), right
    assert any("off by" in said for said in wrong.values()), wrong


def test_the_list_says_what_one_should_know_in_a_terminal_of_windows():
    launch = [sys.executable, "-m", "tests.exercise"]
    settings = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(launch, cwd=ROOT, env=settings, capture_output=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.decode("cp1252")
    assert "S holds UTU above" in said
    wanted = [[name, e.source, e.minutes, "min", e.claims, e.hint] for name, e in EXERCISES.items()]
    text = " ".join(str(word) for words in wanted for word in words)
    assert said.split() == text.encode("cp1252", "spelled").decode("cp1252").split()


def test_a_student_writes_and_checks(capsys):
    exercise.main(["resora.cosine_maps"])
    assert "write the body of cosine_maps" in capsys.readouterr().out
    place = Path("exercises", "resora.cosine_maps")
    assert {file.name for file in place.iterdir()} == {"resora.py", "tests"}
    text = solved("resora.cosine_maps", slip=True)
    (place / "resora.py").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="True"):
        exercise.main(["resora.cosine_maps", "--check"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"R1       FAILS  {claims('resora')['R1']}"
    assert "seed=0, N=3, o=" in said[1] and ": off by 0." in said[1]
    assert said[2:] == [f"hint: {EXERCISES['resora.cosine_maps'].hint}", "0 of 1 hold"]


def test_what_is_refused():
    def refused(message: str, *arguments: str) -> None:
        with pytest.raises(ValueError, match=message):
            exercise.main([*arguments])

    refused(r"found 'hra.delta'; want NAME or NAME --check of hra.reflection, ", "hra.delta")
    refused(r"found 'hra.gamma --chekc'; want NAME or", "hra.gamma", "--chekc")
    refused(r"found no .*hra.py; want what python -m tests.exer", "hra.gamma", "--check")
    file = write("hra.gamma")
    for text, message in (
        ("x = 1\ny = (", r"hra.py, line 2: SyntaxError: '\(' was never closed"),
        ("x = 1", "found no definition of gamma; want it as it was"),
    ):
        file.write_text(text, encoding="utf-8")
        refused(message, "hra.gamma", "--check")
    refused("found exercises.hra.gamma; want to write it anew: move it away first", "hra.gamma")
    assert file.read_text(encoding="utf-8") == "x = 1"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return Upsilon", "line 2: NameError: name 'Upsilon' is not defined"),
        ("raise NotImplementedError", "not written yet"),
        ("assert U == 2, 'off by 1, allowed 0'", "line 2: off by 1, allowed 0"),
    ],
)
def test_an_error_comes_with_its_line(body, said, tmp_path):
    space = {}
    exec(compile(f"def gamma(U):\n    {body}", tmp_path.resolve() / "hra.py", "exec"), space)
    with pytest.raises(BaseException) as raised:
        space["gamma"](1)
    assert complaint(raised.value) == said
