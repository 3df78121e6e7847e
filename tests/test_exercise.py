"""Exercises: what is written, what is refused, and that the checks tell right from wrong."""

import ast
import subprocess
import sys

import pytest

from tests import exercise
from tests.claims import METHODS, ROOT, claims
from tests.exercise import EXERCISES, check, emptied, solution_lines, write, written
from tests.verdict import complaint

NAMES = pytest.mark.parametrize("name", EXERCISES)
SOLUTIONS = {  # what a student may hand in: right and plain; with a plausible slip
    "hra.reflection": (
        "return torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(u, u) / (u @ u)",
        "return torch.eye(len(u), dtype=u.dtype) - torch.outer(u, u) / (u @ u)",
    ),
    "hra.chain": (
        "H = reflection(U[:, 0])\n    for u in U.T[1:]: H = H @ reflection(u)\n    return H",
        "H = reflection(U[:, 0])\n    for u in U.T[1:]: H = reflection(u) @ H\n    return H",
    ),
    "hra.penalty": (
        "U = U / U.norm(dim=0); return (torch.eye(len(U.T), dtype=U.dtype) - U.T @ U).norm() ** 2",
        "U = U / U.norm(dim=0); return (U.T @ U).triu(1).square().sum()",
    ),
    "hra.HRALinear.pair": (
        "U = self.normals(); return self.base.weight @ U @ gamma(U), U.T",
        "U = self.normals(); return self.base.weight @ U @ gamma(U).T, U.T",
    ),
    "hra.reflect": (
        "A, C = factors(U, x.dtype); return x + (x @ A.T) @ C",
        "A, C = factors(U, x.dtype); return x + (x @ C.T) @ A",
    ),
    "hra.orthonormal": (
        "Q, R = torch.linalg.qr(U / sizes(U)); return Q * R.diagonal().sign()",
        "return U / U.norm(dim=0)",
    ),
    "hra.gamma": (
        "G = U.T @ U; return -torch.linalg.inv(G.triu(1) + G.diagonal().diag() / 2)",
        "G = U.T @ U; return -torch.linalg.inv(G.triu())",
    ),
    "resora.cosine_maps": (
        "return torch.nn.functional.cosine_similarity(G.flatten(), H.flatten(), 0) ** 2",
        "return torch.nn.functional.cosine_similarity(G, H).square().mean()",
    ),
    "resora.linear_maps": (
        "mean = float(center); G, H = G - mean * G.mean(0), H - mean * H.mean(0);"
        " return (G.T @ H).square().sum() / ((G.T @ G).norm() * (H.T @ H).norm())",
        "return (G.T @ H).square().sum() / ((G.T @ G).norm() * (H.T @ H).norm())",
    ),
    "resora.cosine": (
        "B, S = B / B.norm(dim=0), S / S.norm(dim=0); return ((B.T @ B) * (S.T @ S)).square()",
        "B, S = B / B.norm(dim=0), S / S.norm(dim=0); return (B.T @ B) * (S.T @ S)",
    ),
    "resora.linear": (
        "S = S - float(center) * S.mean(0); S = S / S.norm(dim=0); return (S.T @ S).square()",
        "S = S / S.norm(dim=0); return (S.T @ S).square()",
    ),
    "resora.euclidean": (
        "h = (B.T @ B) * (S.T @ S); d = h.diagonal();"
        " return torch.exp(-beta * (d[:, None] + d - 2 * h) / (len(B) * len(S)))",
        "h = (B.T @ B) * (S.T @ S); d = h.diagonal();"
        " return torch.exp(-beta * (d[:, None] + d - 2 * h) / len(S))",
    ),
    "resora.rbf_kernel": (
        "v = H.var(0, correction=0).sum();"
        " K = torch.exp((H[:, None] - H).square().sum(2) / (-2 * v * sigma**2));"
        " return K - K.mean(0) - K.mean(1)[:, None] + K.mean()",
        "v = H.var(0, correction=0).sum();"
        " K = torch.exp((H[:, None] - H).square().sum(2) / (-2 * v * sigma**2));"
        " return K - K.mean(0)",
    ),
    "resora.nonlinear": (
        "z = ((S - S.mean(0)) / S.std(0, correction=0)).T;"
        " K = torch.exp((z[:, :, None] - z[:, None]).square() / (-2 * sigma**2));"
        " K = K - K.mean(1, True) - K.mean(2, True) + K.mean((1, 2), True);"
        " K = K.flatten(1) / K.flatten(1).norm(dim=1, keepdim=True); return K @ K.T",
        "z = ((S - S.mean(0)) / S.std(0, correction=0)).T;"
        " K = torch.exp((z[:, :, None] - z[:, None]).square() / (-sigma**2));"
        " K = K - K.mean(1, True) - K.mean(2, True) + K.mean((1, 2), True);"
        " K = K.flatten(1) / K.flatten(1).norm(dim=1, keepdim=True); return K @ K.T",
    ),
    "resora.regauge": (
        "Q, U = torch.linalg.qr(B); C = U @ A; T = C.T if x is None else x.flatten(0, -2) @ C.T;"
        " T = T if x is None else T - T.mean(0);"
        " V = torch.linalg.svd(T, full_matrices=True).Vh.T; p = (0, B.shape[1] - len(C));"
        " return F.pad(Q @ V, p), F.pad(V.T @ C, (0, 0, *p))",
        "Q, U = torch.linalg.qr(B); C = U @ A; T = C.T if x is None else x.flatten(0, -2) @ C.T;"
        " V = torch.linalg.svd(T, full_matrices=True).Vh.T; p = (0, B.shape[1] - len(C));"
        " return F.pad(Q @ V, p), F.pad(V.T @ C, (0, 0, *p))",
    ),
    "eigenlorax.Components.project": (
        "return (rows.to(self.V) - self.mean) @ self.V.T",
        "return rows.to(self.V) @ self.V.T",
    ),
    "eigenlorax.EigenLoRAxLinear.pair": (
        "return self.scaling * self.V_B.T @ alpha_B, alpha_A.T @ self.V_A",
        "return self.V_B.T @ alpha_B, alpha_A.T @ self.V_A",
    ),
    "eigenlorax.EigenLoRAxLinear.set_task": (
        "r = len(A); self.alpha_B[task].zero_(); self.alpha_A[task][:, :r] = self.V_A @ A.T;"
        " self.alpha_B[task][:, :r] = self.V_B @ B / self.scaling",
        "r = len(A); self.alpha_A[task][:, :r] = self.V_A @ A.T;"
        " self.alpha_B[task][:, :r] = self.V_B @ B / self.scaling",
    ),
    "eigenlorax.augment": (
        "noise = torch.randn(p, n, generator=generator, dtype=V.dtype);"
        " Q = torch.linalg.qr(torch.cat([V, noise]).T).Q; return torch.cat([V, Q.T[K:]])",
        "noise = torch.randn(p, n, generator=generator, dtype=V.dtype);"
        " return torch.cat([V, torch.linalg.qr(noise.T).Q.T])",
    ),
    "eigenlorax.EigenLoRAxLinear.delta_per_sample": (
        "return torch.einsum('b...d,kd,bkr,blr,lo->b...o',"
        " x, self.V_A, alpha_A, s_alpha_B, self.V_B)",
        "return torch.einsum('b...d,kd,bkr,blr,lo->b...o',"
        " x, self.V_A, alpha_A, self.scaling * s_alpha_B, self.V_B)",
    ),
    "eigenlorax.by_gram": (
        "squares, E = torch.linalg.eigh(X.T @ X); sigma = squares.flip(0).clamp(min=0).sqrt();"
        " sigma = sigma[: min(X.shape)]; K = choose_k(sigma[: min(free)].float(), k, free);"
        " return sigma[:K], E.flip(1)[:, :K].T",
        "squares, E = torch.linalg.eigh(X.T @ X); sigma = squares.flip(0).clamp(min=0).sqrt();"
        " sigma = sigma[: min(X.shape)]; K = choose_k(sigma[: min(free)].float(), k, free);"
        " return sigma[:K], E[:, :K].T",
    ),
    "eigenlorax.append": (
        "s = old.singular_values; X = torch.cat([s[:, None] * old.V[: len(s)], rows.to(old.V)]);"
        " new = principal_components(X, None, False); energy = old.energy + energy_of(rows);"
        " K = choose_k(new.singular_values, k, X.shape, energy);"
        " return Components(new.V[:K], new.singular_values[:K], new.mean, energy)",
        "s = old.singular_values; X = torch.cat([s[:, None] * old.V[: len(s)], rows.to(old.V)]);"
        " new = principal_components(X, k, False); return new",
    ),
    "eigenlorax.choose_k": (
        "s2 = sigma.double().square(); rank = int((sigma > 1e-12 * sigma[0]).sum());"
        " enough = 0.999999999999 * (rule if isinstance(rule, float) else 1) * s2.sum();"
        " omega = noise_threshold(shape) * sigma.double().quantile(0.5);"
        " return (rank if rule is None else rule if type(rule) is int"
        " else int((sigma > omega).sum()) if rule == 'gavish-donoho'"
        " else int((s2.cumsum(0) < enough).sum()) + 1)",
        "s2 = sigma.double().square(); rank = int((sigma > 1e-12 * sigma[0]).sum());"
        " enough = (rule if isinstance(rule, float) else 1) * s2.sum();"
        " omega = noise_threshold(shape) * sigma.double().quantile(0.5);"
        " return (rank if rule is None else rule if type(rule) is int"
        " else int((sigma > omega).sum()) if rule == 'gavish-donoho'"
        " else int((s2.cumsum(0) < enough).sum()))",
    ),
}


def solved(name, body):
    """The text of the exercise with a body in the place of the NotImplementedError."""
    return emptied(name).replace(exercise.EMPTY, body)


def test_there_are_four_or_more_exercises_per_method_and_their_claims_are_real():
    assert [*SOLUTIONS] == [*EXERCISES]
    for method in METHODS:
        own = {name: e for name, e in EXERCISES.items() if name.startswith(f"{method}.")}
        assert len(own) >= 4
        assert [e.minutes for e in own.values()] == sorted(e.minutes for e in own.values())
        for e in own.values():
            assert e.claims.split() and set(e.claims.split()) <= claims(method).keys()
            assert 5 <= e.minutes <= 30 and e.hint.endswith((".", "?"))


@NAMES
def test_the_solution_is_gone_and_nothing_else(name, tmp_path):
    method, _, function = name.partition(".")
    assert not any(part.startswith("_") for part in function.split("."))
    original = (ROOT / f"{method}.py").read_text(encoding="utf-8")
    text = write(name, tmp_path).read_text(encoding="utf-8")
    assert text.count(exercise.EMPTY) == 1
    lines = text.split("\n")
    place = solution_lines(name)
    lines[place.start : place.start + 1] = original.split("\n")[place]
    assert "\n".join(lines) == original
    kept = exercise.body_of(exercise.definition(text, function))[:-1]
    assert len(kept) == EXERCISES[name].keep
    if kept:  # they end with what looks at the arguments
        last = ast.unparse(kept[-1])
        assert any(word in last for word in ("raise", "return", "check", "refuse", "one_task"))
    assert not written(text, name) and written(original, name)


@NAMES
def test_a_body_without_code_is_not_written_yet(name, tmp_path):
    file = write(name, tmp_path)
    for body in (exercise.EMPTY, "pass", "..."):
        file.write_text(solved(name, body), encoding="utf-8")
        with pytest.raises(ValueError, match=r"not written yet: .*, line \d+$"):
            check(name, file)


@pytest.mark.slow
@NAMES
def test_a_plain_solution_passes_and_a_slip_fails_with_a_number(name):
    right, slip = (exercise.run(name, solved(name, body)) for body in SOLUTIONS[name])
    assert not any(right.values()), right
    assert any("off by" in wrong for wrong in slip.values()), slip


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["exercise.py", *map(str, arguments)])
    exercise.main()


def test_the_list_has_every_exercise_with_what_one_should_know(monkeypatch, capsys):
    run(monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    for name, e in EXERCISES.items():
        at = next(i for i, line in enumerate(lines) if line.split()[0] == name)
        assert lines[at].split(None, 1)[1].startswith(e.source)
        assert f" {e.minutes} min " in lines[at] and lines[at].endswith(e.claims)
        assert lines[at + 1].strip() == e.hint


def test_a_student_writes_and_checks(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "resora.cosine_maps")
    assert "write the body of cosine_maps" in capsys.readouterr().out
    place = tmp_path / "exercises" / "resora.cosine_maps"
    assert {file.name for file in place.iterdir()} == {"resora.py", "tests"}
    slip = SOLUTIONS["resora.cosine_maps"][1]
    (place / "resora.py").write_text(solved("resora.cosine_maps", slip), encoding="utf-8")
    with pytest.raises(SystemExit, match="True"):
        run(monkeypatch, "resora.cosine_maps", "--check")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"R1       FAILS  {claims('resora')['R1']}"
    assert "seed=0, N=3, o=" in said[1] and ": off by 0." in said[1]
    assert said[2:] == [f"hint: {EXERCISES['resora.cosine_maps'].hint}", "0 of 1 hold"]


def test_a_students_file_is_kept_unless_forced(tmp_path):
    file = write("hra.gamma", tmp_path)
    file.write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="found .*hra.gamma; want a new place .* or --force"):
        write("hra.gamma", tmp_path)
    assert file.read_text(encoding="utf-8") == "mine"
    assert write("hra.gamma", tmp_path, force=True).read_text("utf-8") == emptied("hra.gamma")


def test_what_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="found 'hra.delta'; want one of hra.reflection, "):
        run(monkeypatch, "hra.delta")
    with pytest.raises(ValueError, match=r"found no .*hra.py; want what python -m tests.exercise"):
        run(monkeypatch, "hra.gamma", "--check", "--folder", tmp_path)
    file = write("hra.gamma", tmp_path)
    file.write_text("x = 1\ny = (", encoding="utf-8")
    with pytest.raises(ValueError, match=r"hra.py, line 2: SyntaxError: '\(' was never closed"):
        check("hra.gamma", file)
    file.write_text("x = 1", encoding="utf-8")
    with pytest.raises(ValueError, match="found no definition of gamma; want it as it was"):
        check("hra.gamma", file)


@pytest.mark.parametrize(
    "body, said",
    [
        ("return Upsilon", "line 2: NameError: name 'Upsilon' is not defined"),
        ("raise NotImplementedError", "not written yet"),
        ("assert U == 2, 'off by 1, allowed 0'", "line 2: off by 1, allowed 0"),
    ],
)
def test_an_error_comes_with_its_line(body, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(compile(f"def gamma(U):\n    {body}", tmp_path.resolve() / "hra.py", "exec"), space)
    with pytest.raises(BaseException) as raised:
        space["gamma"](1)
    assert complaint(raised.value) == said


def test_a_terminal_of_windows_shows_the_list():
    done = subprocess.run(
        [sys.executable, "-m", "tests.exercise"],
        cwd=ROOT,
        env={**exercise.os.environ, "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert "S holds UTU above" in done.stdout.decode("cp1252")
