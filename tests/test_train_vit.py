"""train_vit.py: the data, the protocol, and what a run leaves behind."""

import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import common
import train_vit
from figures import plots
from figures import runs as tables
from tests.test_common import command

ROOT = Path(__file__).parents[1]
REAL = os.environ.get("REFERENCE_DATA")
VIEWS = list(train_vit.VIEWS)


def config(**options) -> train_vit.Config:
    return train_vit.complete(train_vit.Config(jobs=1, **options))


def specs_of(config: train_vit.Config, table, *names: str, task: str = "mirror") -> list[dict]:
    """The runs of some rows of a table on one task with seed 0; without a task, on all."""
    rows = {r["row"]: r for r in table(config)}
    preset = train_vit.LEARNING_RATES[train_vit.preset(config)]
    chosen, rates = common.rows_and_rates(config, [rows[name] for name in names], {}, preset)
    return common.specify(chosen, rates, [task] if task else VIEWS, [0])


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "no/model", "--data", "no/data"], "data 'no/data': found neither"),
        (["--data", "FAKE", "--backbone", "no/model"], "backbone 'no/model': wanted a folder with"),
    ],
)
def test_what_is_not_there_is_one_line(monkeypatch, tmp_path, fake_data, arguments, message):
    sizes = ["--subsets", "2", "--classes", "2", "--image-size", "4", "--runs", str(tmp_path)]
    arguments = [str(fake_data) if word == "FAKE" else word for word in arguments]
    line = command(monkeypatch, train_vit, *arguments, *sizes)
    assert line.startswith(f"train_vit.py: error: {message}"), line
    assert not list(tmp_path.rglob("vit_*.json"))


def test_what_the_user_says_goes_before_presets_and_quick():
    assert config(quick=True).seeds == 1 and config(quick=True, seeds=3).seeds == 3
    assert config(quick=True).epochs < config().epochs and config().seeds == 3
    paper = config(backbone="x", data="y")
    assert (paper.batch_size, paper.components, paper.image_size) == (128, 2, 224)
    assert config(backbone="x", data="y", batch_size=8).batch_size == 8
    claims = config(backbone="x", data="y", table="claims")
    assert (claims.batch_size, claims.epochs, claims.image_size) == (32, 6, 56)
    rates = train_vit.rows_and_rates(config(lr="LoRA r=4=0.5; HRA r=8, λ=0=0.25"))[1]
    assert (rates["LoRA r=4"], rates["HRA r=8, λ=0"]) == (0.5, 0.25)


def test_edited_or_other_data_and_backbones_begin_anew(tmp_path):
    for kind in ("backbone", "data", "other"):
        (tmp_path / kind).mkdir()
    asked = config(backbone=f"{tmp_path}/backbone", data=f"{tmp_path}/data", runs=str(tmp_path))
    seen = [train_vit.prepare(asked)[1].folder]
    for kind in ("backbone", "data"):
        (tmp_path / kind / "file").write_text("edited")
        seen.append(train_vit.prepare(asked)[1].folder)
    seen.append(train_vit.prepare(replace(asked, backbone=f"{tmp_path}/other"))[1].folder)
    assert len(set(seen)) == 4
    assert train_vit.prepare(asked)[1].folder == seen[-2]


# ---------------------------------------------------------------- the data


def test_digits_are_split_once_and_a_seed_draws_three_hundred_to_train():
    from sklearn.datasets import load_digits

    parts = train_vit.digits()
    assert [len(parts[s][1]) for s in ("train", "validation", "test")] == [1000, 297, 500]
    together = torch.cat([images.flatten(1) for images, _ in parts.values()])
    whole = torch.from_numpy(load_digits().images).mul(15).to(torch.uint8).flatten(1)
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, whole.tolist()))
    one, again, other = (train_vit.load(config(), "mirror", seed) for seed in (1, 1, 2))
    same = [torch.equal(one[split].images, other[split].images) for split in one]
    assert dict(zip(one, same, strict=True)) == {"train": False, "validation": True, "test": True}
    assert len(one["train"]) == 300 and torch.equal(one["train"].images, again["train"].images)


@pytest.mark.parametrize("name", VIEWS)
def test_views_move_pixels_and_lose_nothing(name):
    images = train_vit.digits()["test"][0]
    seen = train_vit.view(images, name)
    assert seen.dtype == torch.uint8 and seen.shape == images.shape
    assert not torch.equal(seen, images)
    pixels = 240 - images if name == "invert" else images
    assert torch.equal(seen.flatten(1).sort().values, pixels.flatten(1).sort().values)


@pytest.fixture(scope="module")
def fake_data(tmp_path_factory) -> Path:
    """Six classes in the hub's layout. Grey level: the class; a stripe on the left: the image."""
    import datasets
    from PIL import Image

    folder = tmp_path_factory.mktemp("data")
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=6)}
    for split, n in (("train", 60), ("test", 24)):
        images = [Image.new("L", (4, 4), 40 * (i % 6)) for i in range(n)]
        for i, image in enumerate(images):
            image.paste(i, (0, 0, 1, 4))
        columns = {"image": images, "label": [i % 6 for i in range(n)]}
        rows = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
        rows.to_parquet(folder / f"{split}.parquet")
    return folder


SMALL = dict(backbone="x", subsets=3, classes=2, image_size=4)


def test_data_that_is_not_as_it_should_be_is_named(fake_data, tmp_path):
    base = config(data=str(fake_data), **SMALL)
    for change, message in (
        ({"classes": 3}, "found 6 classes in .*; wanted 3 × 3"),
        ({"label": "kind"}, r"found the class columns \['label'\]; wanted kind"),
    ):
        with pytest.raises(ValueError, match=message):
            train_vit.load(replace(base, **change), "subset 1", 0)
    for split in ("train", "validation", "test"):
        source = "train" if split == "train" else "test"
        (tmp_path / f"{split}.parquet").write_bytes((fake_data / f"{source}.parquet").read_bytes())
    base = replace(base, data=str(tmp_path))
    assert len(train_vit.load(base, "subset 1", 0)["test"]) == 8  # validation is not taken for it
    for split in ("validation", "test"):
        (tmp_path / f"{split}.parquet").unlink()
    train_vit.image_data.cache_clear()
    with pytest.raises(ValueError, match=r"has the splits \['train'\]; wanted train and test"):
        train_vit.load(base, "subset 1", 0)


def test_tasks_are_a_partition_of_the_classes_and_a_seed_draws_their_images(fake_data):
    base = config(data=str(fake_data), images=5, validation=3, **SMALL)
    classes, drawn = {}, {}
    for seed in (0, 1):
        classes[seed] = []
        for name in train_vit.task_names(base):
            task = train_vit.load(base, name, seed)
            assert [len(task[s]) for s in ("train", "validation", "test")] == [10, 6, 8]
            pixels = torch.cat([part.images[:, 0, 0] for part in task.values()])  # (24, 4)
            labels = torch.cat([part.labels for part in task.values()])
            pairs = set(zip(pixels[:, 3].tolist(), labels.tolist(), strict=True))
            assert len(pairs) == 2 and {label for _, label in pairs} == {0, 1}
            classes[seed].append(sorted(grey for grey, _ in pairs))
            drawn[seed] = pixels[:16, 0].tolist()  # the numbers of training and validation images
            assert len(set(drawn[seed])) == 16
    assert sorted(grey for pair in classes[0] for grey in pair) == [0, 40, 80, 120, 160, 200]
    assert classes[0] == classes[1] and set(drawn[0]) != set(drawn[1])
    plain = train_vit.load(replace(base, images=0, validation=0), "subset 1", 0)
    assert [len(plain[s]) for s in ("train", "validation")] == [18, 2]
    assert type(plain["train"]) is train_vit.Mirrored
    assert type(plain["test"]) is common.ImageTask


def test_training_images_are_mirrored_at_random_and_a_probe_sees_none():
    torch.manual_seed(0)
    images = torch.arange(2, dtype=torch.uint8).expand(64, 1, 1, 2)
    task = train_vit.Mirrored(images, torch.zeros(64), [0.0], [1 / 255])
    seen = [x["pixel_values"].flatten().tolist() for x in task.__getitems__([*range(64)])]
    assert 16 < seen.count([1.0, 0.0]) < 48 and seen.count([0.0, 1.0]) > 16
    head = torch.nn.Linear(2, 2)
    model = torch.nn.ModuleDict({"head": head})
    model.forward = lambda pixel_values: head(pixel_values.flatten(1))
    assert train_vit.features(model, head, task).tolist() == [[0.0, 1.0]] * 64


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A backbone and the LoRA adapters of all views with seed 0, after one epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_vit.PRETRAINING, "epochs", 1)
        base = config(epochs=1, seeds=1, runs=str(tmp_path_factory.mktemp("runs")))
        backbone, results = train_vit.prepare(base)
    specs = specs_of(base, train_vit.eigenlorax_rows, "LoRA r=4", task="")
    train_vit.finish(specs, base, backbone, results)
    return results, backbone, base


def made(shared, table, *names: str) -> dict[str, dict]:
    """{row: the result of its run on the mirrored digits}."""
    results, backbone, base = shared
    runs = train_vit.finish(specs_of(base, table, *names), base, backbone, results)
    return {run["row"]: run for run in runs}


def starts(monkeypatch) -> list[dict]:
    """What each training from now on starts from: the parameters that require grad, by name."""
    seen, train = [], common.train

    def spy(model, *arguments, **options):
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        seen.append({n: p.detach().clone() for n, p in trained})
        return train(model, *arguments, **options)

    monkeypatch.setattr(common, "train", spy)
    return seen


def left(shared, table, name: str) -> dict:
    """What the run of a row on the mirrored digits left for a second stage to start from."""
    (spec,) = specs_of(shared[2], table, name)
    return load_file(common.adapter_folder(shared[0].folder, spec) / "state.safetensors")


def test_one_backbone_is_made_for_all_tables_and_lengths(shared, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(common, "train", lambda *a, **options: asked.append(options))
    tables = ({}, {"table": "hra", "epochs": 3}, {"rows": ("lora",), "quick": True})
    asking = [config(runs=str(tmp_path), **table) for table in tables]
    assert len({train_vit.digits_backbone(one) for one in asking}) == 1 == len(asked)
    assert asked[0]["epochs"] == 30 and len(common.hash_of(shared[1])) == 16


def test_adapters_are_recycled_from_the_other_tasks_only(shared, monkeypatch):
    opened, lazy = [], common.LazyAdapter
    monkeypatch.setattr(common, "LazyAdapter", lambda folder: opened.append(folder) or lazy(folder))
    specs = specs_of(shared[2], train_vit.eigenlorax_rows, "LoRA r=4", task="")
    folders = {s["task"]: common.adapter_folder(shared[0].folder, s) for s in specs}
    for name in ("EigenLoRAx", "EigenLoRAx-AUG"):
        opened.clear()
        run = made(shared, train_vit.eigenlorax_rows, name)[name]
        assert run["trainable"] == 4 * 2 * 2 * 16 * 4 == 1024
        assert set(opened) == set(folders.values()) - {folders["mirror"]} and len(opened) == 5


def test_more_components_than_directions_is_an_error_that_counts_them(shared):
    results, backbone, base = shared
    specs = specs_of(replace(base, components=21), train_vit.eigenlorax_rows, "EigenLoRAx")
    with pytest.raises(ValueError, match=r"\b21\b.*\b20\b|\b20\b.*\b21\b"):
        train_vit.finish(specs, base, backbone, results)
    assert results.get(specs[0]) is None


def test_frozen_random_and_noisy_rows(shared):
    found = made(shared, train_vit.eigenlorax_rows, "EigenLoRAx-ZS", "Random subspace")
    assert [run["trainable"] for run in found.values()] == [0, 1024]
    found = made(shared, train_vit.ablation_rows, "noise 100 %", "K=16, r=2", "K=16")
    assert [run["trainable"] for run in found.values()] == [1024, 512, 1024]
    assert found["noise 100 %"]["losses"] != found["K=16"]["losses"]


def test_recipes_train_components_too_and_go_on_from_coefficients(shared, monkeypatch):
    coefficients, components = 8 * 2 * 16 * 4, 8 * 2 * 16 * 64
    sizes = {  # dependants first: they are made last
        "coefficients, then components too": coefficients + components,
        "coefficients twice as long": coefficients,
        "4 free directions added": 8 * 2 * (20 * 4 + 4 * 64),
        "components trained too": coefficients + components,
        "K=16": coefficients,
    }
    began = starts(monkeypatch)
    runs = made(shared, train_vit.ablation_rows, *sizes)
    assert {name: run["trainable"] for name, run in runs.items()} == sizes
    kept = left(shared, train_vit.ablation_rows, "K=16")
    assert len(kept) == 8 * 2 + 2  # with the head
    for later in began[-2:]:
        assert kept.keys() <= later.keys()
        assert all(torch.equal(later[name], kept[name]) for name in kept)


def test_hra_and_resora_rows_report_what_their_figures_need(shared, monkeypatch):
    (run,) = made(shared, train_vit.hra_rows, "HRA r=4, λ=1e-1").values()
    assert run["trainable"] == 4 * 2 * 64 * 4 and 0 < run["orthogonality"] < 4
    assert 0 <= run["source"] <= 1
    table = train_vit.resora_rows
    made(shared, table, "r=2, stage 1")
    kept = left(shared, table, "r=2, stage 1")
    began = starts(monkeypatch)
    (second,) = made(shared, table, "r=2, linear, feature").values()
    assert kept.keys() == began[0].keys() and len(kept) == 8 * 2 + 2  # with the head
    assert all(torch.equal(began[0][name], kept[name]) for name in kept)
    assert len(second["correlations"]) == 8
    for matrix in second["correlations"].values():
        assert [matrix[i][i] for i in range(2)] == [1.0, 1.0] and 0 <= matrix[0][1] <= 1
    made(shared, table, "r=2, re-gauged")
    check_gauge(before=kept, after=began[-1])
    (once,) = made(shared, table, "r=2, linear, one stage").values()
    assert len(once["losses"]) == 2


def check_gauge(before: dict, after: dict) -> None:
    """ΔW of every layer is as it was; the rows of A are orthogonal, and were not."""
    for name in [name for name in before if name.endswith(".B")]:
        twin = name.removesuffix("B") + "A"
        B, A, old_B, old_A = (start[n] for start in (after, before) for n in (name, twin))
        assert (B @ A - old_B @ old_A).abs().max() < 64 * torch.finfo(torch.float32).eps
        assert abs((A @ A.T)[0, 1]) < 1e-5 < abs((old_A @ old_A.T)[0, 1])


def test_correlations_of_a_row_are_the_mean_of_its_runs():
    eye = [[1.0, 0.0], [0.0, 1.0]]
    runs = [{"row": "a", "correlations": {"0": [[1.0, x], [x, 1.0]], "1": eye}} for x in (0.2, 0.8)]
    means = train_vit.mean_correlations([*runs, {"row": "b"}])
    assert means == {"a": [[[1.0, 0.5], [0.5, 1.0]], eye]}
    assert runs == [{"row": "a"}] * 2


def test_mixed_precision_reaches_the_runs(shared):
    import accelerate

    _, backbone, base = shared
    losses = []
    for precision in ("bf16", "no"):
        accelerate.state.AcceleratorState._reset_state(True)
        asked = replace(base, mixed_precision=precision)
        (spec,) = specs_of(asked, train_vit.eigenlorax_rows, "Base")
        run = train_vit.run(spec, config=asked, backbone=backbone, folder=Path(asked.runs))
        losses += run["losses"]
    assert 0 < abs(losses[0] - losses[1]) < 0.05  # eight bits of mantissa on a loss of about 2


def test_an_interrupted_table_continues_and_ends_the_same(shared, monkeypatch):
    """Stopped by Ctrl-C, and killed between a run's adapter and its result."""
    results, backbone, base = shared
    specs = specs_of(base, train_vit.eigenlorax_rows, "LoRA r=4", task="")[:4]
    before, done = [results.get(spec) for spec in specs], []
    for spec in specs:
        results.file(spec).unlink()
    work = train_vit.run

    def stops(spec, **options):
        if len(done) == 2:
            raise KeyboardInterrupt
        return spying(done, work)(spec, **options)

    monkeypatch.setattr(train_vit, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        train_vit.finish(specs, base, backbone, results)
    monkeypatch.setattr(train_vit, "run", spying(done, work))
    finished = train_vit.finish(specs, base, backbone, results)
    assert done == specs  # each was run once: the first two were not run again
    assert [{**s, **r} for s, r in zip(specs, before, strict=True)] == finished
    assert len(common.LazyAdapter(common.adapter_folder(results.folder, specs[0]))) == 8


def spying(seen: list, work):
    """`work`, which notes the runs that it makes."""

    def spy(spec, **options):
        seen.append(spec)
        return work(spec, **options)

    return spy


# ---------------------------------------------------------------- the table of claims


def test_a_probe_is_the_logistic_regression_that_scikit_learn_finds():
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    X = torch.randn(90, 5, dtype=torch.float64, generator=generator)
    X[:, :3] += 2 * torch.eye(3)[labels]
    X[:, 3] = 100 + 30 * X[:, 3]
    weight, bias = train_vit.converged_probe(X, labels, 0.1, 3)
    Z = (X - X.mean(0)) / X.std(0)
    peer = LogisticRegression(C=1 / (0.1 * 90), tol=1e-10, max_iter=10_000).fit(Z, labels)
    wanted = torch.from_numpy(peer.predict_log_proba(Z))
    found = (X @ weight.T + bias).log_softmax(1)
    assert torch.isfinite(found).all()
    assert (found - wanted).abs().max() < 1e-4  # both stop at gradients of about 1e-6


@pytest.fixture(scope="module")
def ledger(shared):
    """The runs of the table of claims on digits, an epoch each, in a file beside the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_vit, "digits_backbone", lambda config: Path(shared[1]))
        return train_vit.Ledger(replace(shared[2], table="claims"))


RATES = {name: {"lr": 1e-3} for name, option, _ in train_vit.QUESTIONS if option == "lr"}


def claimed(ledger, *names: str, seed: int = 0) -> list[dict]:
    return ledger.make(train_vit.specs_of(RATES, ["mirror"], [seed], *names))


def test_heads_start_from_the_probe_of_the_features_that_a_row_starts_with(ledger, monkeypatch):
    began = starts(monkeypatch)
    (probe,) = claimed(ledger, "Probe")
    (start,) = began
    frozen = train_vit.frozen_probe(ledger.config, ledger.backbone, "mirror", 0)
    assert torch.equal(start["classifier.weight"], frozen[0].float())
    assert abs(probe["test"] - probe["probe"]) < 1 / 500 and probe["trainable"] == 0
    rows = ("LoRA r=4", "HRA λ=0", "HRA λ=∞", "EigenLoRAx from the mean")
    heads = {}
    for name in rows:
        began.clear()
        claimed(ledger, name)
        (heads[name],) = [p for n, p in began[-1].items() if n.endswith("classifier.weight")]
    same = [torch.equal(head, frozen[0].float()) for head in heads.values()]
    assert same == [True, True, False, False]


def begun(monkeypatch, ledger, name: str) -> torch.nn.Module:
    """The model of a row on the mirrored digits, as it was when its training began."""
    seen, train = [], common.train

    def spy(model, *arguments, **options):
        seen.append(copy.deepcopy(model))
        return train(model, *arguments, **options)

    (spec,) = train_vit.specs_of(RATES, ["mirror"], [0], name)
    with monkeypatch.context() as patch:
        patch.setattr(common, "train", spy)
        train_vit.run(spec, ledger.config, ledger.backbone, ledger.results.folder)
    return seen[-1]


def test_rows_start_from_the_mean_of_the_others_or_from_their_own_first_stage(ledger, monkeypatch):
    specs, pairs = train_vit.specs_of(RATES, VIEWS, [0], "LoRA r=4"), {}
    ledger.make(specs)
    for spec in specs:
        adapter = common.LazyAdapter(common.adapter_folder(ledger.results.folder, spec))
        layer = [*adapter][-1]
        pairs[spec["task"]] = adapter[layer]
    B, A = pairs.pop("mirror")
    plain = begun(monkeypatch, ledger, "HRA λ=0").get_submodule(layer).base.weight
    merged = begun(monkeypatch, ledger, "Mean adapter").get_submodule(layer).weight
    mean = sum(B @ A for B, A in pairs.values()) / 5
    assert mean.abs().max() > 1e-4
    close = dict(rtol=0, atol=16 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(merged - plain, mean, **close)
    found = begun(monkeypatch, ledger, "EigenLoRAx from the mean").get_submodule(layer)
    U, S, V = torch.linalg.svd(mean)
    best = U[:, :4] * S[:4] @ V[:4]
    P, Q = (W.T @ W for W in (found.V_B, found.V_A))
    torch.testing.assert_close(found.weight - plain, P @ best @ Q, **close)
    again = begun(monkeypatch, ledger, "LoRA, second stage").get_submodule(layer)
    assert torch.equal(again.B, B) and torch.equal(again.A, A)
    gauged = begun(monkeypatch, ledger, "Re-gauged, second stage").get_submodule(layer)
    torch.testing.assert_close(gauged.B @ gauged.A, B @ A, **close)
    assert not torch.allclose(gauged.A, A)


def test_choosing_climbs_past_the_ends_of_its_grid_and_keeps_what_it_chose(monkeypatch):
    """Validation is best at a rate of 1e-5, below the five, and at λ = 0, which has no lower."""
    asked = []

    class Peaks:
        tasks = VIEWS

        def make(self, specs, tuning):
            asked.extend(specs)
            height = -abs(math.log10(specs[0]["lr"]) + 5) - specs[0]["lam"]
            return [{"validation": height}]

    row = "ReSoRA, second stage"
    monkeypatch.setattr(train_vit, "QUESTIONS", ((row, "lr", 3e-4), (row, "lam", 0.0)))
    assert train_vit.choose(Peaks()) == {row: {"lr": 1e-5, "lam": 0.0}}
    assert {spec["lr"] for spec in asked if spec["lam"] == 1.0} >= {3e-6, 1e-5, 3e-4, 3e-2}
    assert {spec["lam"] for spec in asked} == {0.0, 0.01, 0.1, 1.0, 10.0}
    assert {(spec["task"], spec["seed"]) for spec in asked} == {("rotate 90°", 100)}


def test_a_file_of_claims_saves_its_runs_but_for_adapters_that_others_need(ledger, monkeypatch):
    first = claimed(ledger, "Random subspace", "LoRA r=4")
    runs = str(Path(ledger.config.runs) / "empty")
    elsewhere = replace(ledger.config, runs=runs, out=str(ledger.out))
    monkeypatch.setattr(train_vit, "digits_backbone", lambda config: Path(ledger.backbone))
    fresh = train_vit.Ledger(elsewhere)
    made = []
    monkeypatch.setattr(train_vit, "run", spying(made, train_vit.run))
    assert claimed(fresh, "Random subspace", "LoRA r=4") == first and not made
    claimed(fresh, "LoRA, second stage")
    assert [spec["row"] for spec in made] == ["LoRA r=4", "LoRA, second stage"]


def test_the_committed_lambdas_and_rates_are_those_that_validation_chose():
    committed = json.loads((ROOT / "figures" / "vit_lambda.json").read_text())
    scores = tables.choices(committed).items()
    best = {tuple(name.split(", ")): tables.best(found) for name, found in scores}
    assert best == train_vit.LAMBDAS
    tuned = json.loads((ROOT / "figures" / "vit_tune.json").read_text())
    best = {name: max(scores, key=scores.get) for name, scores in tuned["validation"].items()}
    assert {name: float(rate) for name, rate in best.items()} == train_vit.LEARNING_RATES["digits"]


@pytest.mark.slow
def test_the_quick_demo_runs_as_a_user_runs_it(tmp_path):
    launch = [sys.executable, str(ROOT / "train_vit.py"), "--quick", "--runs", str(tmp_path)]
    done = subprocess.run(launch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (out,) = tmp_path.rglob("vit_digits.json")
    result = json.loads(out.read_text())
    rows = {r["row"]: r for r in result["rows"]}
    assert len(result["runs"]) == 9 * 6 and next(iter(rows)) == "Full"
    assert rows["Full"]["mean"] > rows["Base"]["mean"] + 0.05
    assert rows["EigenLoRAx"]["mean"] > rows["Base"]["mean"]
    assert plots.as_table(result["rows"]) in done.stdout
    assert out.with_suffix(".png").exists()
    assert len(result["weights"]) == 16


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="REFERENCE_DATA is not set: no real backbone or images here")
def test_a_real_backbone_and_real_images(tmp_path):
    places = dict(backbone=f"{REAL}/models/dinov2-small-focus", data=f"{REAL}/cifar100")
    sizes = dict(subsets=2, classes=3, images=18, validation=6, epochs=4, seeds=1, batch_size=9)
    sizes["components"] = 4  # the one other adapter has no more directions
    others = (f"{REAL}/caltech101",)
    asked = config(table="claims", **places, **sizes, others=others, runs=str(tmp_path))
    ledger = train_vit.Ledger(asked)
    rates = {"LoRA r=4": {"lr": 3e-3}, "EigenLoRAx K=2, r=1": {"lr": 1e-2}}
    names = ("Probe", *rates)
    specs = train_vit.specs_of(rates, ["subset 1"], [0], *names)
    probe, lora, few = ledger.make(specs)
    assert (lora["trainable"], few["trainable"]) == (12 * 2 * 4 * 2 * 384, 96)
    assert min(probe["test"], lora["test"], lora["probe"]) > 0.5  # chance is a third
    assert probe["kept"] > 0.3 and lora["kept"] > 0.1  # of 100 classes
