"""Exercises: what is written, what is refused, and that the checks tell right from wrong."""

import ast
import re
import subprocess
import sys

import pytest

from tests import exercise
from tests.exercise import EXERCISES, ROOT, body_lines, check, claim_tests, sentences, write

NAMES = pytest.mark.parametrize("name", EXERCISES)

WRONG = {  # a body that a student might hand in
    "hra.chain": "return torch.eye(len(U), dtype=U.dtype)",
    "hra.reflect": "return x + x @ U @ (U @ gamma(U).T).T",
    "hra.HRALinear.merge": "return self.base",
    "hra.penalty": "return (torch.eye(U.shape[1]) - U.T @ U).square().sum()",
    "hra.HRALinear.pair": "return self.base.weight @ self.U, self.U.T",
    "hra.gram_schmidt": "return U / U.norm(dim=0)",
    "hra.gamma": "return -2 * torch.eye(U.shape[1], dtype=U.dtype)",
    "resora.rbf_kernel": "return torch.exp(-torch.cdist(H, H).square() / (2 * sigma**2))",
    "resora.redundancy_dense": "return S.new_zeros(())",
    "resora.lengths": "return X.norm(dim=0)",
    "resora.cosines": "return X.T @ X / X.norm(dim=0)",
    "resora.euclidean": "return torch.exp(-beta * (B.T @ B) * (S.T @ S))",
    "resora.linear": "return (S.T @ S).square() / S.square().sum(0).square()",
    "resora.nonlinear": "return linear(B, S)",
    "resora.regauge": "return B, A",
    "resora.ReSoRA.penalty": "return sum(layer.A.sum() for layer in self.layers.values()) * 0",
    "eigenlorax.project": "return rows @ V.T",
    "eigenlorax.EigenLoRAxLinear.pair": (
        "return self.V_B.T @ self.alpha_B[0], self.alpha_A[0].T @ self.V_A"
    ),
    "eigenlorax.EigenLoRAxLinear.set_task": "self.alpha_A[task] = (A @ self.V_A.T).T",
    "eigenlorax.choose_k": "return len(singular_values)",
    "eigenlorax.augment": "return torch.cat([V, _normal((p, V.shape[1]), V, generator)])",
    "eigenlorax.EigenLoRAxLinear.forward": (
        "return self.base(x) + x @ self.V_A.T @ self.alpha_A[0] @ self.alpha_B[0].T @ self.V_B"
    ),
    "eigenlorax.principal_components": (
        'return _components(_finite(rows, "rows"), torch.ones(len(rows)), k, False)'
    ),
    "eigenlorax._grow": (
        "V, mean, s = _components(torch.cat([*rows]), torch.ones(sum(map(len, rows))), old.k,"
        ' old.center); return {f"V_{side}": V, f"mean_{side}": mean,'
        ' f"singular_values_{side}": s[: len(V)]}'
    ),
}


def source(name):
    return (ROOT / f"{name.partition('.')[0]}.py").read_text(encoding="utf-8")


def emptied_names(name):
    """The function of an exercise, then its helper if it has one."""
    return [name.partition(".")[2], *filter(None, [EXERCISES[name].helper])]


def solve(name, text, wrong=None):
    """The exercise's text with the original bodies, or with a wrong one in its function."""
    original = source(name)
    for function in emptied_names(name):
        body = original.split("\n")[body_lines(original, function)]
        if wrong and function == name.partition(".")[2]:
            body = [re.match(" *", body[0])[0] + wrong]
        lines = text.split("\n")
        lines[body_lines(text, function)] = body
        text = "\n".join(lines)
    return text


def test_there_are_four_or_more_exercises_per_method_and_each_claim_is_real():
    for method in ("hra", "resora", "eigenlorax"):
        own = [name for name in EXERCISES if name.startswith(f"{method}.")]
        assert len(own) >= 4
        for name in own:
            assert EXERCISES[name].claims.split()
            assert set(EXERCISES[name].claims.split()) <= sentences(method).keys()
    assert WRONG.keys() == EXERCISES.keys()


@pytest.mark.parametrize("method", ["hra", "resora", "eigenlorax"])
def test_every_claim_has_its_sentence(method):
    claims = re.findall(r"^ +([HRE]\d+)  ", source(method), flags=re.M)
    assert [*sentences(method)] == claims
    assert all(len(sentence.split()) > 3 for sentence in sentences(method).values())


@NAMES
def test_the_body_is_gone_and_nothing_else(name, tmp_path):
    file = write(name, tmp_path)
    text = file.read_bytes().decode()
    assert file == tmp_path / name / f"{name.partition('.')[0]}.py"
    assert text.count('raise NotImplementedError("your code")') == len(emptied_names(name))
    assert solve(name, text) == (ROOT / file.name).read_bytes().decode()
    for function in emptied_names(name):
        old, new = (exercise.definition(ast.parse(t), function) for t in (source(name), text))
        assert ast.get_docstring(new) == ast.get_docstring(old)
        rest = new.body[ast.get_docstring(new) is not None :]
        assert list(map(ast.unparse, rest)) == ["raise NotImplementedError('your code')"]


@NAMES
def test_the_tests_beside_it_are_those_of_its_claims_and_need_no_more_than_is_there(name):
    method, claims = name.partition(".")[0], EXERCISES[name].claims.split()
    text = claim_tests(method, EXERCISES[name].claims)
    whole = (ROOT / "tests" / f"test_{method}.py").read_text(encoding="utf-8")
    functions = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]
    assert [m[1] for n in functions if (m := re.match(r"test_(.+?)_", n.name))] == claims
    assert all(ast.get_source_segment(text, n) in whole for n in functions)
    imports = [n for n in ast.parse(text).body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not {"peft", "transformers"} & {a.name for n in imports for a in n.names}
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "-"],
        input=text,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["exercise.py", *map(str, arguments)])
    exercise.main()


def test_the_list_has_every_exercise_with_its_claims(monkeypatch, capsys):
    run(monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*EXERCISES]
    for line, wanted in zip(lines, EXERCISES.values(), strict=True):
        assert wanted.source in line and line.endswith(wanted.claims)


def test_the_default_folder_is_exercises_here(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "hra.gamma")
    names = {file.name for file in (tmp_path / "exercises" / "hra.gamma").iterdir()}
    assert names == {"hra.py", "test_hra.py", "conftest.py"}
    assert "write the body of gamma (Eq. 3–4)" in capsys.readouterr().out


def test_a_students_file_is_kept_unless_forced(tmp_path):
    file = write("hra.gamma", tmp_path)
    empty = file.read_text(encoding="utf-8")
    file.write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="hra.gamma/hra.py, want a new place .* or --force"):
        write("hra.gamma", tmp_path)
    file.rename(file.with_name("test_hra.py"))  # nor are the tests, in which one may write
    with pytest.raises(ValueError, match="test_hra.py, want"):
        write("hra.gamma", tmp_path)
    assert not file.exists()
    assert write("hra.gamma", tmp_path, force=True).read_text(encoding="utf-8") == empty


def test_what_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="found 'hra.delta', want one of hra.chain, "):
        run(monkeypatch, "hra.delta")
    with pytest.raises(ValueError, match=r"found no .*hra.py, want what python -m tests.exercise"):
        run(monkeypatch, "hra.gamma", "--check", "--folder", tmp_path)
    file = write("hra.gamma", tmp_path)
    file.write_text("x = (", encoding="utf-8")
    with pytest.raises(ValueError, match="found SyntaxError: .*, want to import it"):
        check("hra.gamma", file)


def test_the_check_says_which_claims_hold(monkeypatch, tmp_path, capsys):
    file = write("resora.redundancy_dense", tmp_path)
    text = solve("resora.redundancy_dense", file.read_text(encoding="utf-8"), "return S.sum() * 0")
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "resora.redundancy_dense", "--check", "--folder", tmp_path)
    assert ended.value.code
    assert capsys.readouterr().out.splitlines() == [
        f"R1   does not hold  {sentences('resora')['R1']}",
        f"R7   holds          {sentences('resora')['R7']}",
        "1 of 2 claims hold",
    ]


@pytest.mark.slow
@NAMES
def test_the_original_body_passes_and_a_wrong_one_fails(name, tmp_path):
    file = write(name, tmp_path)
    text = file.read_text(encoding="utf-8")
    file.write_text(solve(name, text), encoding="utf-8")
    assert check(name, file) == dict.fromkeys(EXERCISES[name].claims.split(), True)
    file.write_text(solve(name, text, WRONG[name]), encoding="utf-8")
    assert not all(check(name, file).values())
