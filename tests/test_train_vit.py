"""train_vit.py: the data, the protocol, and what a run leaves behind."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import common
import train_vit
from figures import plots
from tests.test_common import command

ROOT = Path(__file__).parents[1]
REAL = os.environ.get("REFERENCE_DATA")


def config(**options) -> train_vit.Config:
    return train_vit.complete(train_vit.Config(jobs=1, **options))


def specs_of(config: train_vit.Config, table, *names: str, task: str = "") -> list[dict]:
    """The runs of some rows of a table with seed 0; of one task, or of all."""
    rows = {r["row"]: r for r in table(config)}
    chosen = [rows[name] for name in names]
    preset = train_vit.LEARNING_RATES[train_vit.preset(config)]
    _, rates = common.rows_and_rates(config, chosen, {}, preset)
    specs = common.specify(chosen, rates, train_vit.task_names(config), [0])
    return [spec for spec in specs if task in ("", spec["task"])]


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


def test_quick_is_one_seed_unless_the_user_says_otherwise():
    assert config(quick=True).seeds == 1 and config(quick=True, seeds=3).seeds == 3
    assert config(quick=True).epochs < config().epochs and config().seeds == 3
    paper = config(backbone="x", data="y")
    assert (paper.batch_size, paper.components, paper.weight_decay) == (128, 2, 0.1)
    assert config(backbone="x", data="y", batch_size=8).batch_size == 8


def test_rates_are_set_for_names_that_hold_an_equals_sign():
    rates = train_vit.rows_and_rates(config(lr="LoRA r=4=0.5; HRA r=8, λ=0=0.25"))[1]
    assert (rates["LoRA r=4"], rates["HRA r=8, λ=0"]) == (0.5, 0.25)


def test_edited_or_other_data_and_backbones_begin_anew(tmp_path):
    seen = []
    for kind in ("backbone", "data", "elsewhere/backbone"):
        (tmp_path / kind).mkdir(parents=True)
    folders = {kind: str(tmp_path / kind) for kind in ("backbone", "data")}
    wanted = config(**folders, runs=str(tmp_path / "runs"))
    for change in ("backbone", "data", None):
        seen.append(train_vit.prepare(wanted)[1].folder)
        if change:
            (tmp_path / change / "file").write_text("edited")
    other = replace(wanted, backbone=str(tmp_path / "elsewhere" / "backbone"))
    seen.append(train_vit.prepare(other)[1].folder)
    assert len(set(seen)) == 4
    assert train_vit.prepare(wanted)[1].folder == seen[-2]


# ---------------------------------------------------------------- the data


def test_digits_are_split_once_into_disjoint_parts():
    from sklearn.datasets import load_digits

    parts = train_vit.digits()
    assert [len(parts[s][1]) for s in ("train", "validation", "test")] == [1000, 297, 500]
    together = torch.cat([images.flatten(1) for images, _ in parts.values()])
    whole = torch.from_numpy(load_digits().images).mul(15).to(torch.uint8).flatten(1)
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, whole.tolist()))


@pytest.mark.parametrize("name", train_vit.VIEWS)
def test_views_move_pixels_and_lose_nothing(name):
    images = train_vit.digits()["test"][0]
    seen = train_vit.view(images, name)
    assert seen.dtype == torch.uint8 and seen.shape == images.shape
    assert not torch.equal(seen, images)
    pixels = 240 - images if name == "invert" else images
    assert torch.equal(seen.flatten(1).sort().values, pixels.flatten(1).sort().values)


def test_a_seed_draws_three_hundred_training_images_and_nothing_else():
    one, again = (train_vit.load(config(), "mirror", 1) for _ in range(2))
    other = train_vit.load(config(), "mirror", 2)
    assert len(one["train"]) == 300
    assert torch.equal(one["train"].images, again["train"].images)
    assert not torch.equal(one["train"].images, other["train"].images)
    for split in ("validation", "test"):
        assert torch.equal(one[split].images, other[split].images)


@pytest.fixture(scope="module")
def fake_data(tmp_path_factory) -> Path:
    """A data set in the hub's layout: 6 classes, the class is the grey level of the image."""
    import datasets
    from PIL import Image

    folder = tmp_path_factory.mktemp("data")
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=6)}
    for split, n in (("train", 60), ("test", 24)):
        labels = [i % 6 for i in range(n)]
        columns = {"image": [Image.new("L", (8, 6), 40 * y) for y in labels], "label": labels}
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


def test_tasks_are_disjoint_class_subsets_that_the_seed_draws(fake_data):
    base = config(data=str(fake_data), **SMALL)

    def greys(part: common.ImageTask) -> list[int]:
        return (part.images[:, 0, 0, 0] / 40).round().int().tolist()

    classes = {}
    for seed in (0, 1):
        loaded = [train_vit.load(base, name, seed) for name in train_vit.task_names(base)]
        for task in loaded:
            assert [len(task[s]) for s in ("train", "validation", "test")] == [18, 2, 8]
            assert task["train"].images.shape[1:] == (3, 4, 4)
            pairs = set()
            for part in task.values():
                pairs |= set(zip(greys(part), part.labels.tolist(), strict=True))
            assert len(pairs) == 2 and {label for _, label in pairs} == {0, 1}
        classes[seed] = [sorted(set(greys(task["test"]))) for task in loaded]
        assert sorted(grey for task in classes[seed] for grey in task) == list(range(6))
    assert classes[0] != classes[1]
    few = train_vit.load(replace(base, images=3), "subset 1", 0)
    assert len(few["train"]) + len(few["validation"]) == 6
    assert few["test"][0]["pixel_values"].dtype == torch.float32


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A backbone and the LoRA adapters of all views with seed 0, after one epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_vit.PRETRAINING, "epochs", 1)
        base = config(epochs=1, seeds=1, runs=str(tmp_path_factory.mktemp("runs")))
        backbone, results = train_vit.prepare(base)
    specs = specs_of(base, train_vit.eigenlorax_rows, "LoRA r=4")
    train_vit.finish(specs, base, backbone, results)
    return results, backbone, base


def made(shared, table, *names: str) -> dict[str, dict]:
    """{row: the result of its run on the mirrored digits}."""
    results, backbone, base = shared
    specs = specs_of(base, table, *names, task="mirror")
    return {run["row"]: run for run in train_vit.finish(specs, base, backbone, results)}


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
    (spec,) = specs_of(shared[2], table, name, task="mirror")
    return load_file(common.adapter_folder(shared[0].folder, spec) / "state.safetensors")


def test_one_backbone_is_made_for_all_tables_and_lengths(shared, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(common, "train", lambda *a, **options: asked.append(options))
    runs = str(tmp_path)
    tables = ({}, {"table": "hra", "epochs": 3}, {"rows": ("lora",), "quick": True})
    folders = {train_vit.digits_backbone(config(runs=runs, **table)) for table in tables}
    assert len(folders) == 1 == len(asked) and asked[0]["epochs"] == 30
    assert len(common.hash_of(shared[1])) == 16


def test_adapters_are_recycled_from_the_other_tasks_only(shared, monkeypatch):
    opened, lazy = [], common.LazyAdapter
    monkeypatch.setattr(common, "LazyAdapter", lambda folder: opened.append(folder) or lazy(folder))
    for name in ("EigenLoRAx", "EigenLoRAx-AUG"):
        opened.clear()
        run = made(shared, train_vit.eigenlorax_rows, name)[name]
        assert run["trainable"] == 4 * 2 * 2 * 16 * 4 == 1024
        specs = specs_of(shared[2], train_vit.eigenlorax_rows, "LoRA r=4")
        folders = {s["task"]: common.adapter_folder(shared[0].folder, s) for s in specs}
        assert set(opened) == set(folders.values()) - {folders["mirror"]} and len(opened) == 5


def test_more_components_than_directions_is_an_error_that_counts_them(shared):
    results, backbone, base = shared
    many = replace(base, components=21)
    specs = specs_of(many, train_vit.eigenlorax_rows, "EigenLoRAx", task="mirror")
    with pytest.raises(ValueError, match=r"\b21\b.*\b20\b|\b20\b.*\b21\b"):
        train_vit.finish(specs, base, backbone, results)
    assert results.get(specs[0]) is None


def test_a_run_killed_between_its_adapter_and_its_result_is_made_again(shared):
    results, backbone, base = shared
    (spec,) = specs_of(base, train_vit.eigenlorax_rows, "LoRA r=4", task="mirror")
    before = results.get(spec)
    results.file(spec).unlink()
    (after,) = train_vit.finish([spec], base, backbone, results)
    assert before == {key: after[key] for key in before}
    assert len(common.LazyAdapter(common.adapter_folder(results.folder, spec))) == 8


def test_frozen_and_random_rows(shared):
    table = train_vit.eigenlorax_rows
    found = made(shared, table, "EigenLoRAx-ZS", "Random subspace")
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
    for name in kept:
        if name.endswith(".B"):
            twin = name.removesuffix("B") + "A"
            B, A, old_B, old_A = (start[n] for start in (began[-1], kept) for n in (name, twin))
            assert (B @ A - old_B @ old_A).abs().max() < 64 * torch.finfo(torch.float32).eps
            assert abs((A @ A.T)[0, 1]) < 1e-5 < abs((old_A @ old_A.T)[0, 1])
    (once,) = made(shared, table, "r=2, linear, one stage").values()
    assert len(once["losses"]) == 2


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
        (spec,) = specs_of(asked, train_vit.eigenlorax_rows, "Base", task="mirror")
        run = train_vit.run(spec, config=asked, backbone=backbone, folder=Path(asked.runs))
        losses += run["losses"]
    assert 0 < abs(losses[0] - losses[1]) < 0.05  # eight bits of mantissa on a loss of about 2


def test_an_interrupted_table_continues_and_ends_the_same(shared, monkeypatch):
    results, backbone, base = shared
    specs = specs_of(base, train_vit.eigenlorax_rows, "Base")[:4]
    done, work = [], train_vit.run

    def stops(spec, **options):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(spec)
        return work(spec, **options)

    monkeypatch.setattr(train_vit, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        train_vit.finish(specs, base, backbone, results)
    monkeypatch.setattr(train_vit, "run", lambda s, **o: done.append(s) or work(s, **o))
    finished = train_vit.finish(specs, base, backbone, results)
    assert done == specs  # each was run once: the first two were not run again
    straight = [work(s, config=base, backbone=backbone, folder=results.folder) for s in specs]
    assert [{**s, **r} for s, r in zip(specs, straight, strict=True)] == finished


def test_the_committed_lambdas_and_rates_are_those_that_validation_chose():
    from figures import vit_lambda

    committed = json.loads((ROOT / "figures" / "vit_lambda.json").read_text())
    assert vit_lambda.chosen(committed) == train_vit.LAMBDAS
    tuned = json.loads((ROOT / "figures" / "vit_tune.json").read_text())
    best = {name: max(scores, key=scores.get) for name, scores in tuned["validation"].items()}
    assert {name: float(rate) for name, rate in best.items()} == train_vit.LEARNING_RATES["digits"]


@pytest.mark.slow
def test_the_quick_demo_runs_as_a_user_runs_it(tmp_path):
    """--quick from a shell, killed once in the middle, then continued to the end."""
    launch = [sys.executable, str(ROOT / "train_vit.py"), "--quick", "--runs", str(tmp_path)]
    process = subprocess.Popen(launch, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(list(tmp_path.rglob("finished/*.json"))) < 5:
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
    process.kill()
    process.wait()
    assert not list(tmp_path.rglob("vit_digits.json"))
    kept = {p: p.read_bytes() for p in tmp_path.rglob("finished/*.json")}
    done = subprocess.run(launch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for path, content in kept.items():
        assert path.read_bytes() == content
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
    data = dict(backbone=f"{REAL}/models/dinov2-small-focus", data=f"{REAL}/cifar100")
    sizes = dict(subsets=2, classes=3, images=20, image_size=56, epochs=4, seeds=1, batch_size=9)
    rates = "LoRA r=4=3e-3; Base=1e-2"
    wanted = config(**data, **sizes, lr=rates, runs=str(tmp_path))
    backbone, results = train_vit.prepare(wanted)
    _, rates = train_vit.rows_and_rates(wanted)
    rows = {r["row"]: r for r in train_vit.eigenlorax_rows(wanted)}

    def finished(*names: str) -> list[dict]:
        tasks = train_vit.task_names(wanted)
        specs = common.specify([rows[name] for name in names], rates, tasks, [0])
        return train_vit.finish(specs, wanted, backbone, results)

    lora, base = finished("LoRA r=4", "Base")[:2]
    assert lora["trainable"] == 12 * 2 * 4 * 2 * 384 and base["trainable"] == 0
    assert min(lora["test"], base["test"]) > 0.5  # chance is a third
    assert finished("EigenLoRAx")[0]["trainable"] == 96
