"""train_vit.py: the command line, the data, the protocol, and what a run leaves behind."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import common
import train_vit

ROOT = Path(__file__).parents[1]
REAL = os.environ.get("REFERENCE_DATA")


def config(**options) -> train_vit.Config:
    return train_vit.complete(train_vit.Config(jobs=1, **options))


def command(monkeypatch, *arguments: str) -> str:
    """Run the script's main on a command line that must fail; returns its one line."""
    monkeypatch.setattr(sys, "argv", ["train_vit.py", *arguments])
    with pytest.raises(SystemExit) as end:
        common.one_line_errors(train_vit.main)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "x/y"], "found --backbone x/y with --data digits; wanted both"),
        (["--epochs", "-3"], "found --epochs -3; wanted 1 or more"),
        (["--seeds", "-1"], "found --seeds -1; wanted 1 or more"),
        (["--table", "nine"], "found --table nine; wanted one of ['eigenlorax'"),
        (["--jobs", "-3"], "found --jobs -3; wanted 1 or more"),
        (["--mixed-precision", "x"], "found --mixed-precision x; wanted one of ['no'"),
        (["--components", "21"], "found --components 21; wanted at most 20, the directions of 5"),
        (["--seeds", "101"], "found --seeds 101; wanted at most 100"),
        (["--out", "x.png"], "found --out x.png; wanted a name that ends in .json"),
        (["--lr", "LoRA r=4=-1"], "found rate '-1' for LoRA r=4 in --lr; wanted a number above 0"),
        (["--lr", "LoRa=1"], "found row 'LoRa' in --lr; wanted one of Full"),
        (["--lr", "Full=fast"], "found rate 'fast' for Full in --lr; wanted a number above 0"),
        (["--backbone", "no/model", "--data", "no/data"], "data 'no/data': found neither"),
    ],
)
def test_bad_input_is_one_line_that_names_it(monkeypatch, tmp_path, arguments, message):
    line = command(monkeypatch, *arguments, "--runs", str(tmp_path))
    assert line.startswith(f"train_vit.py: error: {message}"), line
    assert not list(tmp_path.rglob("*vit*.json"))


def test_a_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    line = command(monkeypatch, "--runs", str(tmp_path / "file"))
    assert "cannot write in" in line and "file" in line


def test_an_unknown_backbone_is_named(monkeypatch, tmp_path, fake_data):
    arguments = [
        "--data",
        str(fake_data),
        "--subsets",
        "2",
        "--classes",
        "2",
        "--runs",
        str(tmp_path),
    ]
    line = command(monkeypatch, "--backbone", "no/model", "--image-size", "4", *arguments)
    assert "backbone 'no/model': wanted a folder with config.json" in line
    assert not list(tmp_path.rglob("vit_digits.json"))


def test_more_classes_than_there_are_is_an_error(fake_data):
    wanted = config(backbone="x", data=str(fake_data), subsets=3, classes=3, image_size=4)
    with pytest.raises(ValueError, match="found 6 classes in .*; wanted 3 × 3"):
        train_vit.load(wanted, "subset 1", 0)
    wanted = replace(wanted, label="kind", classes=2)
    with pytest.raises(ValueError, match=r"found the class columns \['label'\]; wanted kind"):
        train_vit.load(wanted, "subset 1", 0)


def test_more_components_than_directions_is_an_error_that_counts_them(shared):
    results, backbone, base = shared
    rows = train_vit.eigenlorax_rows(replace(base, components=21))
    row = next(r for r in rows if r["row"] == "EigenLoRAx")
    spec = train_vit.specify([row], base, train_vit.rates_of(base), [0])[0]
    with pytest.raises(ValueError, match=r"\b21\b.*\b20\b|\b20\b.*\b21\b"):
        train_vit.finish([spec], base, backbone, results)
    assert results.get(spec) is None


def test_quick_is_one_seed_unless_the_user_says_otherwise():
    assert config(quick=True).seeds == 1 and config(quick=True, seeds=3).seeds == 3
    assert config(quick=True).epochs < config().epochs and config().seeds == 3


def test_rates_are_set_for_names_that_hold_an_equals_sign():
    rates = train_vit.rates_of(config(lr="LoRA r=4=0.5; HRA r=8, λ=0=0.25"))
    assert (rates["LoRA r=4"], rates["HRA r=8, λ=0"]) == (0.5, 0.25)


def test_backbones_of_one_name_in_two_folders_do_not_share_results(tmp_path):
    keys = set()
    for folder in ("a", "b"):
        (tmp_path / folder / "model").mkdir(parents=True)
        where = str(tmp_path / folder / "model")
        wanted = config(backbone=where, data="x", runs=str(tmp_path / "runs"))
        keys.add(train_vit.prepare(wanted)[1].folder)
    assert len(keys) == 2


def test_edited_data_and_backbones_begin_anew(tmp_path):
    seen = []
    for kind in ("backbone", "data"):
        (tmp_path / kind).mkdir()
    wanted = config(
        **{k: str(tmp_path / k) for k in ("backbone", "data")}, runs=str(tmp_path / "r")
    )
    for change in ("backbone", "data", None):
        seen.append(train_vit.prepare(wanted)[1].folder)
        if change:
            (tmp_path / change / "file").write_text("edited")
    assert len(set(seen)) == 3
    assert train_vit.prepare(wanted)[1].folder == seen[-1]


def test_a_run_killed_between_its_adapter_and_its_result_is_made_again(shared):
    results, backbone, base = shared
    spec = train_vit.specify([train_vit.LORA], base, train_vit.rates_of(base), [0])[0]
    before = results.get(spec)
    results._file(spec).unlink()
    after = train_vit.finish([spec], base, backbone, results)[0]
    assert before == {k: after[k] for k in before}
    assert len(common.LazyAdapter(common.adapter_folder(results.folder, spec))) == 8


def test_every_option_has_its_help(capsys):
    with pytest.raises(SystemExit):
        common.parse(train_vit.Config, ["--help"])
    text = capsys.readouterr().out
    for field in fields(train_vit.Config):
        assert f"--{field.name.replace('_', '-')} " in text
    assert text.count("None") == 0


# ---------------------------------------------------------------- the data


def test_digits_are_split_once_into_disjoint_parts():
    parts = train_vit.digits()
    assert [len(parts[s][1]) for s in ("train", "validation", "test")] == [1000, 297, 500]
    together = torch.cat([images.flatten(1) for images, _ in parts.values()])
    from sklearn.datasets import load_digits

    whole = torch.from_numpy(load_digits().images).mul(15).to(torch.uint8).flatten(1)
    order = lambda x: sorted(map(tuple, x.tolist()))  # noqa: E731
    assert order(together) == order(whole)


@pytest.mark.parametrize("view", train_vit.VIEWS)
def test_views_move_pixels_and_lose_nothing(view):
    images = train_vit.digits()["test"][0]
    seen = train_vit.VIEWS[view](images)
    assert seen.dtype == torch.uint8 and seen.shape == images.shape
    assert not torch.equal(seen, images)
    pixels = 240 - images if view == "invert" else images
    assert torch.equal(seen.flatten(1).sort().values, pixels.flatten(1).sort().values)


def test_a_seed_draws_three_hundred_training_images_and_nothing_else():
    base = config()
    one, again = (train_vit.load(base, "mirror", 1) for _ in range(2))
    other = train_vit.load(base, "mirror", 2)
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
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=6)}
    )
    for split, n in (("train", 60), ("test", 24)):
        labels = [i % 6 for i in range(n)]
        images = [Image.new("L", (8, 6), 40 * label) for label in labels]
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(folder / f"{split}.parquet")
    return folder


def test_validation_is_never_taken_for_test(fake_data, tmp_path):
    for split in ("train", "validation", "test"):
        source = "train" if split == "train" else "test"
        (tmp_path / f"{split}.parquet").write_bytes((fake_data / f"{source}.parquet").read_bytes())
    options = dict(backbone="x", subsets=3, classes=2, image_size=4)
    wanted = config(data=str(tmp_path), **options)
    assert len(train_vit.load(wanted, "subset 1", 0)["test"]) == 8
    (tmp_path / "test.parquet").unlink()
    (tmp_path / "validation.parquet").unlink()
    train_vit.image_data.cache_clear()
    with pytest.raises(ValueError, match=r"has the splits \['train'\]; wanted train and test"):
        train_vit.load(wanted, "subset 1", 0)


def test_tasks_are_disjoint_class_subsets_that_the_seed_draws(fake_data):
    wanted = config(backbone="x", data=str(fake_data), subsets=3, classes=2, image_size=4)
    grey = lambda task, split: (task[split].images[:, 0, 0, 0] / 40).round().int()  # noqa: E731
    classes = {}
    for seed in (0, 1):
        loaded = [train_vit.load(wanted, name, seed) for name in train_vit.tasks(wanted)]
        for task in loaded:
            assert [len(task[s]) for s in ("train", "validation", "test")] == [18, 2, 8]
            assert task["train"].images.shape[1:] == (3, 4, 4)
            pairs = {
                (g.item(), label.item())
                for split in task
                for g, label in zip(grey(task, split), task[split].labels, strict=True)
            }
            assert len(pairs) == 2 and {label for _, label in pairs} == {0, 1}
        classes[seed] = [sorted({g for g in grey(task, "test").tolist()}) for task in loaded]
        assert sorted(g for task in classes[seed] for g in task) == list(range(6))
    assert classes[0] != classes[1]
    few = train_vit.load(replace(wanted, images=3), "subset 1", 0)
    assert len(few["train"]) + len(few["validation"]) == 6


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A backbone and the LoRA adapters of all views with seed 0, after one epoch."""
    folder = tmp_path_factory.mktemp("runs")
    base = config(epochs=1, seeds=1, runs=str(folder))
    backbone, results = train_vit.prepare(base)
    specs = train_vit.specify([train_vit.LORA], base, train_vit.rates_of(base), [0])
    train_vit.finish(specs, base, backbone, results)
    return results, backbone, base


def one(shared, table, name: str, task: str = "mirror") -> dict:
    results, backbone, base = shared
    row = next(r for r in table(base) if r["row"] == name)
    specs = train_vit.specify([row], base, train_vit.rates_of(base), [0])
    return train_vit.finish([s for s in specs if s["task"] == task], base, backbone, results)[0]


def test_adapters_are_recycled_from_the_other_tasks_only(shared, monkeypatch):
    opened = []
    lazy = common.LazyAdapter
    monkeypatch.setattr(common, "LazyAdapter", lambda folder: opened.append(folder) or lazy(folder))
    result = one(shared, train_vit.eigenlorax_rows, "EigenLoRAx")
    assert result["trainable"] == 4 * 2 * 2 * 16 * 4 == 1024
    results, _, base = shared
    specs = train_vit.specify([train_vit.LORA], base, train_vit.rates_of(base), [0])
    folders = {s["task"]: common.adapter_folder(results.folder, s) for s in specs}
    assert set(opened) == set(folders.values()) - {folders["mirror"]} and len(opened) == 5
    opened.clear()
    result = one(shared, train_vit.eigenlorax_rows, "EigenLoRAx-AUG")
    assert result["trainable"] == 1024 and len(opened) == 5


def test_frozen_and_random_rows(shared):
    assert one(shared, train_vit.eigenlorax_rows, "EigenLoRAx-ZS")["trainable"] == 0
    assert one(shared, train_vit.eigenlorax_rows, "Random subspace")["trainable"] == 1024
    noisy = one(shared, train_vit.ablation_rows, "noise 100 %")
    clean = one(shared, train_vit.ablation_rows, "K=16, r=2")
    assert noisy["trainable"] == 1024 and clean["trainable"] == 512


def test_recipes_train_components_too_and_go_on_from_coefficients(shared, monkeypatch):
    results, backbone, base = shared
    rows = {r["row"]: r for r in train_vit.ablation_rows(base)}
    names = [
        *("K=16", "components trained too", "4 free directions added"),
        *("coefficients twice as long", "coefficients, then components too"),
    ]
    wanted = [rows[name] for name in reversed(names)]  # dependants first: waves puts them last
    specs = train_vit.specify(wanted, base, train_vit.rates_of(base), [0])
    mirror = [s for s in specs if s["task"] == "mirror"]
    began = starts(monkeypatch)
    runs = {r["row"]: r for r in train_vit.finish(mirror, base, backbone, results)}
    sizes = [runs[name]["trainable"] for name in names]
    coefficients, components = 8 * 2 * 16 * 4, 8 * 2 * 16 * 64
    more = 8 * 2 * (20 * 4 + 4 * 64)
    assert sizes == [
        *(coefficients, coefficients + components, more),
        *(coefficients, coefficients + components),
    ]
    kept = left(shared, next(s for s in mirror if s["row"] == "K=16"))
    for later in began[-2:]:
        assert kept.keys() <= later.keys() and len(kept) == 8 * 2 + 2
        assert all(torch.equal(later[n], kept[n]) for n in kept)


def test_fixed_rows_of_a_subspace_stay_while_free_ones_train(shared):
    results, backbone, base = shared
    row = next(r for r in train_vit.ablation_rows(base) if r["row"] == "4 free directions added")
    (spec,) = train_vit.specify([row], base, train_vit.rates_of(base), [0])[:1]
    adapters = common.recycled(spec, train_vit.tasks(base), results.folder)
    _, modules, _ = common.build(common.load_backbone(backbone, 10), spec, 0, adapters)
    module = next(iter(modules.values()))
    before, x = module.V_A.detach().clone(), torch.randn(3, 64)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 0.1)
    for _ in range(2):  # α_B is 0 at first
        module(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(module.V_A[:16], before[:16]) and module.V_A.shape == (20, 64)
    assert (module.V_A[16:] - before[16:]).abs().min() > 1e-3
    merged = module.merge()(x)
    assert (merged - module(x)).abs().max() < 1e-4


def starts(monkeypatch) -> list[dict]:
    """What each training from now on starts from: the parameters that require grad, by name."""
    seen, train = [], common.train

    def spy(model, *arguments, **options):
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        seen.append({n: p.detach().clone() for n, p in trained})
        return train(model, *arguments, **options)

    monkeypatch.setattr(common, "train", spy)
    return seen


def left(shared, spec: dict) -> dict:
    """What a run left for a second stage to start from."""
    kept = {k: v for k, v in spec.items() if k not in ("trainable", "losses", "validation")}
    kept = {k: v for k, v in kept.items() if k not in ("test", "source", "correlations")}
    return load_file(common.adapter_folder(shared[0].folder, kept) / "state.safetensors")


def test_correlations_of_a_row_are_the_mean_of_its_runs():
    runs = [
        {"row": "a", "correlations": {"0": [[1.0, x], [x, 1.0]], "1": [[1.0, 0.0], [0.0, 1.0]]}}
        for x in (0.25, 0.75)
    ]
    means = train_vit.mean_correlations([*runs, {"row": "b"}])
    assert means == {"a": [[[1.0, 0.5], [0.5, 1.0]], [[1.0, 0.0], [0.0, 1.0]]]}
    assert runs == [{"row": "a"}] * 2


def test_hra_and_resora_rows_report_what_their_figures_need(shared, monkeypatch):
    result = one(shared, train_vit.hra_rows, "HRA r=4, λ=1e-1")
    assert result["trainable"] == 4 * 2 * 64 * 4 and 0 < result["orthogonality"] < 4
    assert 0 <= result["source"] <= 1
    first = one(shared, train_vit.resora_rows, "r=2, stage 1")
    began = starts(monkeypatch)
    second = one(shared, train_vit.resora_rows, "r=2, linear, feature")
    kept = left(shared, first)
    assert kept.keys() == began[0].keys() and len(kept) == 8 * 2 + 2  # with the head
    assert all(torch.equal(began[0][n], kept[n]) for n in kept)
    assert len(second["correlations"]) == 8
    for matrix in second["correlations"].values():
        assert [matrix[i][i] for i in range(2)] == [1.0, 1.0] and 0 <= matrix[0][1] <= 1
    one(shared, train_vit.resora_rows, "r=2, re-gauged")
    B, A = ([v for n, v in began[-1].items() if n.endswith(end)] for end in (".B", ".A"))
    old_B, old_A = ([v for n, v in kept.items() if n.endswith(end)] for end in (".B", ".A"))
    for b, a, old_b, old_a in zip(B, A, old_B, old_A, strict=True):
        assert (b @ a - old_b @ old_a).abs().max() < 64 * torch.finfo(torch.float32).eps
        assert abs((a @ a.T)[0, 1]) < 1e-5 < abs((old_a @ old_a.T)[0, 1])
    assert len(one(shared, train_vit.resora_rows, "r=2, linear, one stage")["losses"]) == 2


def test_mixed_precision_reaches_the_runs(shared):
    import accelerate

    _, backbone, base = shared
    accelerate.state.AcceleratorState._reset_state(True)
    half = replace(base, mixed_precision="bf16")
    row = next(r for r in train_vit.eigenlorax_rows(half) if r["row"] == "Base")
    spec = train_vit.specify([row], half, train_vit.rates_of(half), [0])[0]
    result = train_vit.run(spec, config=half, backbone=backbone, folder=Path(half.runs))
    accelerate.state.AcceleratorState._reset_state(True)
    whole = train_vit.run(spec, config=base, backbone=backbone, folder=Path(base.runs))
    difference = abs(result["losses"][0] - whole["losses"][0])
    assert 0 < difference < 0.05  # eight bits of mantissa on a loss of about 2


def test_an_interrupted_table_continues_and_ends_the_same(shared, monkeypatch):
    results, backbone, base = shared
    row = next(r for r in train_vit.eigenlorax_rows(base) if r["row"] == "Base")
    specs = train_vit.specify([row], base, train_vit.rates_of(base), [0, 1])[:4]
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


def test_the_summary_is_the_mean_over_seeds_of_the_mean_over_tasks():
    runs = [
        {"row": "a", "trainable": 7, "task": t, "seed": s, "test": score}
        for (t, s), score in {("x", 0): 0.5, ("y", 0): 0.7, ("x", 1): 0.9, ("y", 1): 0.9}.items()
    ]
    (row,) = common.summary(runs)
    assert row["tasks"] == {"x": pytest.approx(0.7), "y": pytest.approx(0.8)}
    assert row["mean"] == pytest.approx(0.75)
    assert row["std"] == pytest.approx(0.15 * 2**0.5)  # of 0.6 and 0.9, n − 1
    cells = [cell.strip() for cell in common.as_table([row]).splitlines()[-1].split("|")]
    assert cells[1:-1] == ["a", "7", "70.0", "80.0", "75.0 ± 21.2"]


def test_the_committed_lambdas_are_those_that_validation_chose():
    from figures import vit_lambda

    committed = ROOT / "figures" / "vit_lambda.json"
    assert vit_lambda.chosen(json.loads(committed.read_text())) == train_vit.LAMBDAS


def test_the_committed_rates_are_those_that_validation_chose():
    tuned = json.loads((ROOT / "figures" / "vit_tune.json").read_text())
    for name, scores in tuned["validation"].items():
        best = max(scores, key=scores.get)
        assert float(best) == train_vit.LEARNING_RATES["digits"][name], name
    assert set(tuned["validation"]) == set(train_vit.LEARNING_RATES["digits"])


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
    assert common.as_table(result["rows"]) in done.stdout
    assert out.with_suffix(".png").exists()


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="REFERENCE_DATA is not set: no real backbone or images here")
def test_a_real_backbone_and_real_images(tmp_path):
    wanted = config(
        backbone=f"{REAL}/models/dinov2-small-focus",
        data=f"{REAL}/cifar100",
        subsets=2,
        classes=3,
        images=20,
        image_size=56,
        epochs=4,
        seeds=1,
        batch_size=16,
        runs=str(tmp_path),
    )
    backbone, results = train_vit.prepare(wanted)
    rates = train_vit.rates_of(wanted) | {"LoRA r=4": 3e-3, "Base": 1e-2}
    rows = {r["row"]: r for r in train_vit.eigenlorax_rows(wanted)}
    first = train_vit.specify([rows["LoRA r=4"], rows["Base"]], wanted, rates, [0])
    lora, base = train_vit.finish(first, wanted, backbone, results)[:2]
    assert lora["trainable"] == 12 * 2 * 4 * 2 * 384 and base["trainable"] == 0
    assert min(lora["test"], base["test"]) > 0.5  # chance is a third
    last = train_vit.specify([rows["EigenLoRAx"]], wanted, rates, [0])[:1]
    assert train_vit.finish(last, wanted, backbone, results)[0]["trainable"] == 96
