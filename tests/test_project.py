"""What holds for the repository as a whole: structure, claims, copied-alone files, figures."""

import ast
import importlib
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from figures import plots
from tests.claims import METHODS, ROOT, claims
from tests.mutants import METHOD, MUTANTS, mutated


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return listed.stdout.split()


# ---------------------------------------------------------------- structure


def test_the_files_are_those_of_the_layout():
    allowed = re.compile(
        r"(hra|resora|eigenlorax|common|train_vit|train_glue)\.py|tests/\w+\.py"
        r"|figures/\w+\.(py|json|png|md)|README\.md|pyproject\.toml|Makefile|LICENSE"
        r"|CITATION\.cff|\.gitignore|\.ci/run"
    )
    assert [f for f in tracked() if not allowed.fullmatch(f)] == []
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_every_figure_has_its_json_and_script():
    files = {Path(f).name for f in tracked() if f.startswith("figures/")}
    for file in files - {"README.md", "counts.md", "errata.md"}:
        stem, _, kind = file.partition(".")
        wanted = {f"{stem}.json"} if kind in ("png", "md") else set()
        assert not (wanted | {f"{plots.script(stem)}.py"}) - files, file


@pytest.mark.parametrize("file", sorted((ROOT / "figures").glob("*.json")), ids=lambda f: f.stem)
def test_a_results_file_is_small_and_names_no_folder_of_a_machine(file):
    text = file.read_text(encoding="utf-8")
    assert len(text) < 2**20
    assert re.findall(r'"(?:/|~/|[A-Z]:\\)[^"]*"', text) == []


@pytest.mark.parametrize("name", METHODS)
def test_a_method_file_imports_torch_and_the_standard_library_only(name):
    imported = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    assert imported - {"torch"} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("helper", ["few", "find_layers", "replace_layers"])
def test_a_repeated_helper_is_the_same_in_every_method_file(helper):
    found = []
    for text in map(source, METHODS):
        nodes = [n for n in ast.parse(text).body if getattr(n, "name", None) == helper]
        found += [ast.get_source_segment(text, node) for node in nodes]
    assert len(found) == len(METHODS)
    assert len(set(found)) == 1


@pytest.mark.parametrize("name", METHODS)
def test_a_method_file_carries_licence_source_and_citation(name):
    first = source(name).splitlines()[:3]
    assert first[0] == "# SPDX-License-Identifier: MIT"
    assert "arXiv" in first[1] and first[2].startswith("# Cite:")


@pytest.mark.parametrize("name", [*METHODS, "common", "train_vit"])
def test_public_things_have_docstrings(name):
    outer = ast.parse(source(name)).body
    classes = [node for node in outer if isinstance(node, ast.ClassDef)]
    for node in [*outer, *(inner for each in classes for inner in each.body)]:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            documented = ast.get_docstring(node) or node.name == "forward"
            assert documented, f"{name}.{node.name}"


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_has_nothing_to_say(arguments):
    pytest.importorskip("ruff", reason="ruff is not installed")
    launch = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "."]
    done = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------- claims


@pytest.mark.parametrize("name", METHODS)
def test_the_tests_of_a_method_are_its_claims_in_order_and_say_what_they_say(name):
    tree = ast.parse((ROOT / "tests" / f"test_{name}.py").read_text(encoding="utf-8"))
    tests = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
    sentences = [" ".join((ast.get_docstring(test) or "").split()) for test in tests]
    found = [(test.name.split("_")[1], text) for test, text in zip(tests, sentences, strict=True)]
    assert found == [*claims(name).items()]


# ---------------------------------------------------------------- copied alone

ALONE = """
    import sys, doctest, importlib.abc

    class Guard(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {others}:
                raise ImportError(name + " is imported")

    sys.meta_path.insert(0, Guard())
    import torch
    from torch import nn
    import {name} as method

    assert doctest.testmod(method).failed == 0
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 3, 16)
    {adapt}
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    assert model(x).requires_grad
    with torch.no_grad():
        trained, evaluated = model.train()(x), model.eval()(x)
        merged = method.merge(model)(x)
    assert torch.isfinite(trained).all()
    for other in (evaluated, merged):
        assert (trained - other).abs().max() < 1e-5, (trained - other).abs().max()
    print("alone")
"""
ADAPT = {
    "hra": 'method.adapt(model, ["linear1", "out_proj"], rank=2)',
    "resora": 'method.adapt(model, ["linear1", "out_proj"], rank=2)',
    "eigenlorax": (
        "pairs = lambda: {n: (torch.randn(m.out_features, 2), torch.randn(2, m.in_features))"
        ' for n, m in model.named_modules() if n.endswith(("linear1", "out_proj"))};'
        " method.adapt(model, method.recycle([pairs(), pairs()]), rank=2)"
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_file_works_copied_alone(name, tmp_path):
    (tmp_path / f"{name}.py").write_text(source(name), encoding="utf-8")
    others = "common train_vit transformers peft accelerate datasets safetensors matplotlib sklearn"
    others = sorted({*others.split(), *METHODS} - {name})
    text = textwrap.dedent(ALONE).format(others=others, name=name, adapt=ADAPT[name])
    launch = [sys.executable, "-c", text]
    done = subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "alone", done.stderr[-2000:]


# ---------------------------------------------------------------- mutants and figures


def test_every_claim_has_two_mutants_or_more_and_they_fit_the_files():
    assert [*MUTANTS] == [claim for name in METHODS for claim in claims(name)]
    for claim, changes in MUTANTS.items():
        assert len(set(changes)) >= 2, claim
        for change in changes:
            mutated(METHOD[claim[0]], change)  # raises if what it changes is not there


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "figures").glob("*.png")))
def test_committed_figures_are_drawn_from_their_json(name, tmp_path):
    """The same pixels but for fonts and antialiasing: mean absolute difference below 2 of 255."""
    import numpy as np
    from PIL import Image

    committed = ROOT / "figures" / f"{name}.json"
    copy = tmp_path / committed.name
    copy.write_bytes(committed.read_bytes())
    drawn = importlib.import_module(f"figures.{plots.script(name)}").draw(copy)
    ours, theirs = (Image.open(p).convert("L") for p in (drawn, committed.with_suffix(".png")))
    assert ours.size == theirs.size
    difference = np.abs(np.asarray(ours, float) - np.asarray(theirs, float))
    assert difference.mean() < 2
    if (table := committed.with_suffix(".md")).exists():
        assert copy.with_suffix(".md").read_text() == table.read_text(encoding="utf-8")
