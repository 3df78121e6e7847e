"""common.py: data, adapters on disk, methods by name, training, results, the command line."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load, save_file
from torch import nn

import common
import eigenlorax
import hra
import train_glue
import train_vit
from common import row
from figures import plots

ROOT = Path(__file__).parents[1]
TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)


def tiny_vit(labels: int = 3, seed: int = 0) -> transformers.ViTForImageClassification:
    transformers.set_seed(seed)
    sizes = dict(image_size=4, patch_size=2, num_channels=1, num_labels=labels)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**TINY, **sizes))


def tiny_task(n: int = 24, seed: int = 0) -> common.ImageTask:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = torch.randint(0, 60, (n, 1, 4, 4), generator=generator)
    images[:, 0, 0] += 60 * labels[:, None]
    return common.ImageTask(images.to(torch.uint8), labels, [0.3], [0.3])


def save_lora(folder: Path, seed: int = 0, **options) -> nn.Module:
    """A PEFT LoRA of a tiny ViT with random factors, saved the way PEFT saves it."""
    model = tiny_vit()
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=common.targets_of(model), **options)
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator)
    model.save_pretrained(folder)
    return model


def command(monkeypatch, script, *arguments: str) -> str:
    """Run a script's main on a command line that must fail; returns its one line."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
    with pytest.raises(SystemExit) as end:
        common.one_line_errors(script.main)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


# ---------------------------------------------------------------- files and results


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_fails_half_way_leaves_the_old_and_nothing_else(tmp_path, kind):
    common.write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(RuntimeError), common.replacing(tmp_path / "a.json") as temporary:
        if kind == "folder":
            (temporary / "inner").mkdir(parents=True)
            temporary = temporary / "inner" / "file"
        temporary.write_text("half of a ne")
        raise RuntimeError
    assert common.read_json(tmp_path / "a.json") == {"x": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        common.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert common.read_json(tmp_path / "a.json") == {"x": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_folder_that_two_make_is_that_of_the_first(tmp_path):
    for name in ("first", "second"):
        with common.replacing(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(tmp_path / "folder") == ["first"]


def test_json_keeps_what_it_is_given_and_numbers_on_a_line(tmp_path):
    value = {"a": [1, -2.5e-7, 3.0], "b": [[0.5, 1], []], "c": "[\n1,\n2\n]", "d": [1, None, "x"]}
    common.write_json(tmp_path / "a.json", value)
    assert common.read_json(tmp_path / "a.json") == value
    lines = (tmp_path / "a.json").read_text().splitlines()
    assert ' "a": [1, -2.5e-07, 3.0],' in lines and "  [0.5, 1]," in lines


def test_a_place_that_cannot_be_written_is_named_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write in .*file"):
        common.check_writable(tmp_path / "file" / "out.json")
    with pytest.raises(OSError, match="found a folder"):
        common.check_writable(tmp_path)
    common.check_writable(tmp_path / "new" / "out.json")
    assert not (tmp_path / "new" / "out.json").exists()
    line = command(monkeypatch, train_vit, "--runs", str(tmp_path / "file"))
    assert "cannot write in" in line and "file" in line


def test_results_are_kept_by_configuration_and_run(tmp_path):
    results = common.Results(tmp_path, "t", {"epochs": 1})
    spec = {"row": "a", "seed": 0}
    assert results.get(spec) is None
    results.make(spec, lambda spec: {"test": 0.5})
    again = common.Results(tmp_path, "t", {"epochs": 1})
    assert again.get(dict(reversed(spec.items()))) == {"test": 0.5}
    assert results.get({**spec, "seed": 1}) is None
    assert common.Results(tmp_path, "t", {"epochs": 2}).get(spec) is None


def test_a_damaged_result_file_is_named(tmp_path):
    results = common.Results(tmp_path, "t", {})
    results.make({"row": "a"}, lambda spec: {"test": 0.5})
    file = results.file({"row": "a"})
    for text, message in (
        (file.read_text()[:20], rf"{file.name} is not valid JSON"),
        ("{}", rf"{file.name} holds no result; delete it"),
        ('{"run": {}, "result": {}}', rf"{file.name} holds no result; delete it"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            results.get({"row": "a"})


def test_results_depend_on_every_file_beside_the_script_but_the_other_scripts(tmp_path):
    """A method of one's own, broken and run again, must not print its old results."""
    (tmp_path / "common.py").write_text("x = 1\n")
    (tmp_path / "train_vit.py").write_text("x = 1\n")
    seen = [common.sources(tmp_path / "train_vit.py")]
    for name, text in (
        ("ether.py", "x = 1\n"),  # a new file
        ("ether.py", "x = 2\n"),  # broken
        ("train_vit.py", "x = 2\n"),
        ("ether.py", "x = 2  # two\n\n"),  # from here on the same
        ("train_glue.py", "x = 1\n"),
    ):
        (tmp_path / name).write_text(text)
        seen.append(common.sources(tmp_path / "train_vit.py"))
    changed = [before != after for before, after in pairwise(seen)]
    assert changed == [True, True, True, False, False]
    assert {"hra.py", "resora.py", "eigenlorax.py"} < set(common.sources(train_vit.__file__))


# ---------------------------------------------------------------- backbones and tasks


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_backbones_load_as_float32_with_a_fresh_head(tmp_path, dtype):
    source = tiny_vit()
    source.to(dtype).save_pretrained(tmp_path)
    transformers.set_seed(7)
    model = common.load_backbone(str(tmp_path), 3)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    trunk = source.base_model.state_dict()
    for name, value in model.base_model.state_dict().items():
        assert torch.equal(value, trunk[name].float()), name
    assert (model.classifier.weight - source.classifier.weight.float()).abs().max() > 1e-3
    assert common.load_backbone(str(tmp_path), 5).classifier.out_features == 5


def test_bad_backbones_are_named(tmp_path):
    def refused(message: str, folder: str) -> None:
        with pytest.raises(ValueError, match=message):
            common.load_backbone(folder, 2)

    refused(r"backbone 'nobody/no-such-model': wanted a folder", "nobody/no-such-model")
    (tmp_path / "empty").mkdir()
    refused("backbone .*empty", str(tmp_path / "empty"))
    good = tmp_path / "good"
    tiny_vit().save_pretrained(good)
    weights = good / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused("backbone .*good", str(good))
    tensors = load(whole)
    name = next(key for key in tensors if key.endswith(("q_proj.weight", "query.weight")))
    for value, message in (
        (torch.full_like(tensors[name], torch.nan), "found a non-finite value in"),
        (torch.zeros(3, 3), r"do not fit its config\.json"),
        (None, "found no weights for"),
    ):
        tensors.pop(name)
        if value is not None:
            tensors[name] = value
        save_file(tensors, weights, metadata={"format": "pt"})
        refused(message, str(good))


class Bomb:
    """A pickle of this runs code when it is opened."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_pickles_are_refused_and_never_opened(tmp_path, name):
    folder = tmp_path / "m"
    (save_lora if name.startswith("adapter") else tiny_vit().save_pretrained)(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(ValueError, match="safetensors"):
        if name.startswith("adapter"):
            common.LazyAdapter(folder)
        else:
            common.load_backbone(str(folder), 3)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "config",
    [
        transformers.ViTConfig(**TINY),
        transformers.Dinov2Config(**TINY),
        transformers.BertConfig(**TINY),
        transformers.RobertaConfig(**TINY),
        transformers.DebertaV2Config(**TINY),
        transformers.SwinConfig(embed_dim=8, depths=[1], num_heads=[2]),
        transformers.CLIPVisionConfig(**TINY),
        transformers.LlamaConfig(**TINY, vocab_size=8),
        transformers.MistralConfig(**TINY, vocab_size=8),
    ],
    ids=lambda config: config.model_type,
)
def test_targets_are_the_query_and_value_projections(config):
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    query, value = common.targets_of(model)
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    counts = [sum(name.endswith(f".{last}") for name in names) for last in (query, value)]
    assert counts[0] == counts[1] > 0
    assert query.startswith("q") and value.startswith("v")


def test_targets_are_every_layer_of_the_blocks_or_an_error_that_lists_what_there_is():
    config = transformers.RobertaConfig(num_hidden_layers=12)
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    found = common.targets_of(model, every=True)
    assert len(found) == 12 * 6 and not any("classifier" in name for name in found)
    head = sum(p.numel() for _, p in common.head_of(model))
    adapted, _ = common.build(model, row("", "hra", rank=8, every=True))
    size = sum(p.numel() for p in adapted.parameters() if p.requires_grad) - head
    assert size == 663_552  # HRA, Table 2: 0.66M
    with pytest.raises(ValueError, match=r"found \['0', '2'\] in Sequential"):
        common.targets_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))


def test_load_task_reads_folders_and_names_what_is_wrong(tmp_path):
    import datasets

    (tmp_path / "data" / "cola").mkdir(parents=True)
    rows = datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 1]})
    rows.to_parquet(tmp_path / "data" / "cola" / "train.parquet")
    loaded = common.load_task(str(tmp_path / "data"), "cola")
    assert loaded["train"]["sentence"][:] == ["a", "b"]
    with pytest.raises(ValueError, match=r"no folder 'sst2' in .*found \['cola'\]"):
        common.load_task(str(tmp_path / "data"), "sst2")
    with pytest.raises(ValueError, match="data 'nobody/nothing': found neither"):
        common.load_task("nobody/nothing")


# ---------------------------------------------------------------- adapters on disk


def test_lazy_adapter_is_the_delta_that_peft_applies(tmp_path):
    model = save_lora(tmp_path, use_rslora=True)
    adapter = common.LazyAdapter(tmp_path)
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert set(adapter) == set(layers) and len(adapter) == 4
    for name, (B, A) in adapter.items():
        delta = layers[name].get_delta_weight("default")
        assert (B @ A - delta).abs().max() <= 8 * A.shape[1] * torch.finfo(A.dtype).eps


def test_lazy_adapter_reads_one_module_at_a_time(tmp_path):
    save_lora(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load(file.read_bytes())
    bad = next(k for k in tensors if "lora_B" in k)
    tensors[bad][0, 0] = float("inf")
    save_file(tensors, file)
    adapter = common.LazyAdapter(tmp_path)
    name = next(n for n in adapter if f"{n}.lora_B" in bad)
    with pytest.raises(ValueError, match=rf"{name}.*finite"):
        adapter[name]
    for other in set(adapter) - {name}:
        assert all(torch.isfinite(factor).all() for factor in adapter[other])


def test_adapters_of_two_base_models_are_not_read_together(tmp_path):
    for name, base in (("a", "bert"), ("b", "bert"), ("c", "vit")):
        save_lora(tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps(common.read_json(file) | {"base_model_name_or_path": base}))
    assert len(common.adapters_of_one_base([tmp_path / "a", tmp_path / "b"])) == 2
    with pytest.raises(ValueError, match=r"adapters of 2 base models \(.*: bert; .*: vit\)"):
        common.adapters_of_one_base(tmp_path / name for name in "abc")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a sound adapter."""
    folder = tmp_path_factory.mktemp("whole")
    save_lora(folder)
    return folder


CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def taken(whole: Path, folder: Path, name: str, spoiled: bytes | None) -> bool:
    """Whether an adapter with this file spoiled is taken, as finite numbers.

    A refusal is a ValueError of one line that names the file; the folder stays as it was.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    (folder / name).unlink()
    if spoiled is not None:
        (folder / name).write_bytes(spoiled)
    before = sorted(folder.rglob("*"))
    try:
        pairs = list(common.LazyAdapter(folder).values())
        assert all(factor.isfinite().all() for pair in pairs for factor in pair)
        return True
    except ValueError as error:
        assert "adapter_" in str(error) and len(str(error)) < 5000
        return False
    finally:
        assert sorted(folder.rglob("*")) == before
        assert spoiled is None or (folder / name).read_bytes() == spoiled


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_flipped_bits_and_cut_ends_are_read_as_numbers_or_refused(whole, tmp_path, name):
    good = (whole / name).read_bytes()
    assert taken(whole, tmp_path / "copy", name, good)
    generator = np.random.default_rng(0)
    for _ in range(40):
        spoiled = bytearray(good)
        head = 8 + int.from_bytes(good[:8], "little") if name == TENSORS else len(good)
        place = int(generator.integers(0, head if generator.random() < 0.8 else len(good)))
        spoiled[place] ^= 1 << int(generator.integers(8))
        taken(whole, tmp_path / "copy", name, bytes(spoiled))
    for size in (0, 4, 20, *generator.integers(0, len(good), 5), len(good) - 8):
        assert not taken(whole, tmp_path / "copy", name, good[: int(size)])
    assert not taken(whole, tmp_path / "copy", name, None)


DEEP = 100_000


@pytest.mark.parametrize(
    "text",
    [
        *("[" * DEEP, '{"a":' * DEEP, "1" * 5_000, "\udcff", "NaN", "[1]", '"text"', "true", ""),
        "null",  # which would lose the scaling
        "{" + 2**20 * " " + "}",
        '{"peft_type": "LORA", "lora_alpha": "y"}',
        '{"lora_alpha": NaN}',
        '{"lora_alpha": 1' + 400 * "0" + "}",
        '{"alpha_pattern": {"(": 1}}',
        '{"alpha_pattern": {"(a+)+": 1}}',  # takes time without end
        '{"alpha_pattern": {"' + 20 * ".*" + 'x": 1}}',
    ],
    ids=lambda text: repr(text)[:30],
)
def test_json_that_is_no_configuration_is_refused(whole, tmp_path, text):
    spoiled = text.encode("utf-8", "surrogateescape")
    assert not taken(whole, tmp_path / "copy", CONFIG, spoiled)


@pytest.mark.parametrize("name", ["lora_alpha", "r", "alpha_pattern", "use_rslora", "bias"])
def test_fields_of_the_wrong_kind_are_refused_or_mean_nothing(whole, tmp_path, name):
    config = common.read_json(whole / CONFIG)
    for value in ("x", [1], {"a": []}, -1e400, 1e308, None, {"(": 1}, {"": "y"}):
        spoiled = json.dumps(config | {name: value}).encode()
        taken(whole, tmp_path / "copy", CONFIG, spoiled)


def test_names_that_climb_out_of_a_folder_are_only_names(tmp_path):
    name = "base_model.model.../../escaped"
    tensors = {f"{name}.lora_A.weight": torch.ones(1, 3), f"{name}.lora_B.weight": torch.ones(2, 1)}
    (tmp_path / "in" / "adapter").mkdir(parents=True)
    save_file(tensors, tmp_path / "in" / "adapter" / TENSORS)
    (tmp_path / "in" / "adapter" / CONFIG).write_text('{"r": 1, "lora_alpha": 1}')
    subspaces = eigenlorax.recycle([common.LazyAdapter(tmp_path / "in" / "adapter")])
    with pytest.raises(ValueError, match="no layer is named"):
        eigenlorax.adapt(tiny_vit(), subspaces)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_links_are_read_and_never_written_through(whole, tmp_path):
    for name in (TENSORS, CONFIG):
        (tmp_path / name).symlink_to(whole / name)
    before = (whole / CONFIG).read_bytes()
    assert len(list(common.LazyAdapter(tmp_path).values())) == 4
    common.write_json(tmp_path / CONFIG, {})
    assert (whole / CONFIG).read_bytes() == before
    (tmp_path / TENSORS).unlink()
    (tmp_path / TENSORS).symlink_to(TENSORS)
    with pytest.raises(ValueError, match=TENSORS):
        common.LazyAdapter(tmp_path)  # a link to itself


def test_a_header_that_claims_more_than_the_file_holds_costs_no_memory(whole, tmp_path):
    header = b'{"base_model.model.q.lora_A.weight":{"dtype":"F32","shape":[1000000000,1000000000],'
    header += b'"data_offsets":[0,4000000000000000000]}}'
    for size in (len(header), 2**63):
        spoiled = size.to_bytes(8, "little") + header + bytes(16)
        assert not taken(whole, tmp_path / "copy", TENSORS, spoiled)


# ---------------------------------------------------------------- training and scoring


def test_training_lowers_the_loss_and_repeats_exactly():
    losses, weights = [], []
    for _ in range(2):
        model, data = tiny_vit(), tiny_task()
        options = dict(epochs=40, batch_size=8, lr=1e-2, seed=3)
        losses.append(common.train(model, data, common.accelerator(), **options))
        weights.append(model.classifier.weight.detach().clone())
    assert losses[0] == losses[1] and torch.equal(*weights)
    assert losses[0][-1] < 0.5 * losses[0][0]
    assert common.evaluate(model, data, common.accelerator()) > 0.9


def test_the_penalty_is_told_the_progress_and_added():
    model, seen = tiny_vit(), []

    def penalty(progress: float) -> torch.Tensor:
        seen.append(progress)
        return 1e4 * model.classifier.weight.square().sum()

    options = dict(epochs=4, batch_size=8, lr=1e-2, seed=0, weight_decay=0.0)
    before = model.classifier.weight.norm().item()
    common.train(model, tiny_task(), common.accelerator(), penalty=penalty, **options)
    assert seen == [i / 12 for i in range(12)]
    assert model.classifier.weight.norm().item() < 0.7 * before


def test_a_loss_that_is_not_finite_is_an_error():
    model = tiny_vit()
    model.classifier.weight.data.fill_(float("nan"))
    options = dict(epochs=1, batch_size=8, lr=1e-2, seed=0)
    with pytest.raises(common.Diverged, match=r"found loss nan in epoch 1 at learning rate 0\.01"):
        common.train(model, tiny_task(), common.accelerator(), **options)


def test_data_of_less_than_a_batch_and_of_odd_length_train_and_count_every_row():
    model, data = tiny_vit(), tiny_task(5)
    losses = common.train(model, data, common.accelerator(), epochs=2, batch_size=8, lr=0, seed=0)
    assert len(losses) == 2 and losses[0] > 0
    fifths = 5 * common.evaluate(model, data, common.accelerator(), batch_size=2)
    assert fifths == round(fifths)


def test_metrics_are_their_definitions():
    generator = np.random.default_rng(0)
    truth, guess = generator.integers(0, 2, 50), generator.integers(0, 2, 50)
    logits, labels = torch.eye(2)[torch.from_numpy(guess)], torch.from_numpy(truth)
    assert common.score(logits, labels, "accuracy") == np.mean(truth == guess)
    expected = np.corrcoef(truth, guess)[0, 1]
    assert abs(common.score(logits, labels, "matthews") - expected) < 50 * 2.2e-16
    noise, values = generator.normal(size=(2, 50)).astype(np.float32)
    labels = torch.from_numpy(values + noise)
    for slope in (1, 1e-2, 1e-4):  # nearly constant outputs too, in float32
        logits = torch.from_numpy(2.5 + slope * values)[:, None]
        expected = np.corrcoef(logits[:, 0].double(), labels.double())[0, 1]
        assert abs(common.score(logits, labels, "pearson") - expected) < 50 * 2.2e-16


@pytest.mark.parametrize("constant", [0.0, 2.5, 0.1, -1e-3, 1e30])
def test_the_pearson_correlation_of_a_constant_is_zero(constant):
    labels = torch.rand(200, generator=torch.Generator().manual_seed(0)) * 5
    found = common.score(torch.full((200, 1), constant), labels, "pearson")
    assert np.isfinite(found) and abs(found) < 200 * 2.2e-16


def test_outputs_that_are_not_finite_have_no_score():
    for bad in (torch.nan, torch.inf):
        logits = torch.eye(2).repeat(20, 1)
        logits[33, 1] = bad
        for metric in ("accuracy", "matthews", "pearson"):
            with pytest.raises(common.Diverged, match="found a non-finite output among 40"):
                common.score(logits, torch.arange(40) % 2, metric)


# ---------------------------------------------------------------- methods by name

SIZES = {  # method, options: trained numbers of 2 layers × {query, value} of width 16
    "head": ({}, 0),
    "lora": ({"rank": 3}, 4 * 3 * 32),
    "pissa": ({"rank": 3, "init_lora_weights": "pissa"}, 4 * 3 * 32),
    "vera": ({"rank": 5}, 4 * (5 + 16)),
    "oft": ({"rank": 4}, 4 * 4 * 6),
    "boft": ({"rank": 4}, 4 * ((1 + torch.cuda.is_available()) * 64 + 16)),  # 1 factor on a CPU
    "hra": ({"rank": 2, "lam": 1e-3}, 4 * 2 * 16),
    "hra strict": ({"rank": 2, "strict": True}, 4 * 2 * 16),
    "resora": ({"rank": 2, "metric": "linear", "level": "feature", "lam": 0.1}, 4 * 2 * 32),
    "random": ({"components": 3, "rank": 2}, 4 * 2 * 3 * 2),
    "eigenlorax": ({"components": 3, "rank": 2}, 4 * 2 * 3 * 2),
    "eigenlorax frozen": ({"components": 3, "rank": 2, "frozen": True}, 0),
    "eigenlorax free": ({"components": 3, "rank": 2, "pseudo": 1, "free": 1}, 4 * 2 * (4 * 2 + 16)),
}


@pytest.mark.parametrize("name", SIZES)
def test_methods_train_their_own_numbers_and_the_head(whole, name):
    options, count = SIZES[name]
    adapters = [common.LazyAdapter(whole)] * 2
    if name.startswith("eigenlorax"):
        adapters = [{n: (B + i, A + i) for n, (B, A) in adapters[0].items()} for i in range(2)]
    model = tiny_vit()
    head = sum(p.numel() for _, p in common.head_of(model))
    spec = row("", name.partition(" ")[0], **options)
    model, penalty = common.build(model, spec, adapters)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == count + head
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train = dict(epochs=3, batch_size=4, lr=1e-2, seed=0, penalty=penalty)
    common.train(model, tiny_task(12), common.accelerator(), **train)
    for key, p in model.named_parameters():
        assert torch.isfinite(p).all(), key
        assert p.requires_grad != torch.equal(p, before[key]), key


def test_every_method_has_a_test_and_a_colour_of_its_own():
    tested = {name.partition(" ")[0] for name in SIZES} | {"full"}
    assert tested == set(common.METHODS)
    assert len({method.colour for method in common.METHODS.values()}) == len(common.METHODS)


def test_fixed_rows_of_a_subspace_stay_while_free_ones_train(whole):
    adapter = dict(common.LazyAdapter(whole))
    spec = row("", "eigenlorax", components=2, rank=2, pseudo=4, free=4)
    model, _ = common.build(tiny_vit(), spec, [adapter])
    module = next(iter(common.layers_of(model, eigenlorax.EigenLoRAxLinear).values()))
    before, x = module.V_A.detach().clone(), torch.randn(3, 16)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 0.1)
    for _ in range(2):  # α_B is 0 at first
        module(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(module.V_A[:2], before[:2]) and module.V_A.shape == (6, 16)
    assert (module.V_A[2:] - before[2:]).abs().min() > 1e-3
    assert (module.merge()(x) - module(x)).abs().max() < 1e-4


def ether(model: nn.Module, targets: list[str], rank: int):
    """Some method of one's own: here two reflections."""
    hra.adapt(model, targets, rank)
    return model, None


def test_a_method_of_ones_own_is_one_entry(monkeypatch, tmp_path):
    entry = common.Method("ETHER", ether, 1e-2, "#123456", {"rank": 2})
    monkeypatch.setitem(common.METHODS, "ether", entry)
    config = train_vit.complete(train_vit.Config(rows=("lora", "ether", "eigenlorax"), jobs=1))
    rows, rates = train_vit.rows_and_rates(config)
    assert [r["row"] for r in rows] == ["LoRA r=4", "ETHER", "EigenLoRAx"]
    assert rates["ETHER"] == 1e-2
    preset = {"HRA r=8, λ=0": 0.7}  # a method's rate is that of the first row named like it
    one = replace(config, rows=("hra",))
    assert common.rows_and_rates(one, [], train_vit.LORA, preset)[1]["HRA"] == 0.7
    asked = train_vit.rows_and_rates(replace(config, lr="ETHER=0.5"))[1]
    assert asked["ETHER"] == 0.5
    runs = []
    for spec in common.specify(rows, rates, ["a", "b"], [0]):
        result = {"trainable": 7, "losses": [1.0], "validation": 0.5, "test": 0.5}
        runs.append({**spec, **result})
    model, _ = common.build(tiny_vit(), rows[1])
    assert len(common.layers_of(model, hra.HRALinear)) == 4
    data = {"config": {"data": "x"}, "rows": plots.summary(runs), "runs": runs}
    assert "| ETHER" in plots.as_table(data["rows"])
    (tmp_path / "a.json").write_text(json.dumps(data))
    assert plots.draw(tmp_path / "a.json").exists()


# ---------------------------------------------------------------- the command line

BOTH = [
    (["--backbone", "x/y"], "found --backbone x/y with --data "),
    (["--epochs", "-3"], "found --epochs -3; wanted 1 or more"),
    (["--epochs", "0"], "found --epochs 0; wanted 1 or more"),
    (["--seeds", "-1"], "found --seeds -1; wanted 1 or more"),
    (["--seeds", "101"], "found --seeds 101; wanted at most 100"),
    (["--jobs", "-3"], "found --jobs -3; wanted 1 or more"),
    (["--components", "21"], "found --components 21; wanted at most 20, the directions of 5"),
    (["--weight-decay", "nan"], "found --weight-decay nan; wanted a finite number"),
    (["--out", "x.png"], "found --out x.png; wanted a name that ends in .json"),
    (["--lr", "LoRa=1"], "found row 'LoRa' in --lr; wanted one of Full"),
    (["--lr", "LoRA r=4=-1"], "found rate '-1' for LoRA r=4 in --lr; wanted a number above 0"),
    (["--lr", "Full=fast"], "found rate 'fast' for Full in --lr; wanted a number above 0"),
    pytest.param(
        ["--mixed-precision", "fp16"],
        "found --mixed-precision fp16 without a GPU; wanted no or bf16",
        marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="there is one"),
    ),
]


@pytest.mark.parametrize("script", [train_vit, train_glue], ids=lambda script: script.__name__)
@pytest.mark.parametrize(("arguments", "message"), BOTH)
def test_bad_input_is_one_line_that_names_it(monkeypatch, tmp_path, script, arguments, message):
    line = command(monkeypatch, script, *arguments, "--runs", str(tmp_path))
    assert line.startswith(f"{script.__name__}.py: error: {message}"), line
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("option", ["table", "rows", "mixed-precision"])
def test_a_wrong_choice_names_the_option_and_the_choices(capsys, option):
    with pytest.raises(SystemExit):
        common.parse(train_vit.Config, {}, [f"--{option}", "nine"])
    text = " ".join(capsys.readouterr().err.replace("│", "").split())
    known = {"table": "'eigenlorax', 'eigenlorax-ablation'", "rows": "'full', 'head', 'lora'"}
    known["mixed-precision"] = "'no', 'bf16', 'fp16'"
    assert f"invalid choice 'nine' for argument '--{option}'" in text and known[option] in text


@pytest.mark.parametrize("script", [train_vit, train_glue], ids=lambda script: script.__name__)
def test_every_option_has_its_help_and_every_preset_is_shown(capsys, script):
    with pytest.raises(SystemExit):
        common.parse(script.Config, script.PRESETS, ["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", "").split())
    for option in fields(script.Config):
        _, _, after = text.partition(f"--{option.name.replace('_', '-')} ")
        said, _, _ = after.partition("(default:")
        assert len(said.split()) > 2, option.name
    for name, preset in script.PRESETS.items():
        assert f"{name}: {next(iter(preset))} " in text


def test_lambda_is_an_option_of_either_name_and_reaches_its_rows():
    for name in ("--lam", "--λ"):
        config = common.parse(train_vit.Config, {}, ["--rows", "hra", "lora", name, "1e-3"])
        rows, _ = train_vit.rows_and_rates(train_vit.complete(config))
        assert [r.get("lam") for r in rows] == [1e-3, None]


def test_without_the_libraries_one_line_names_the_extra():
    code = "import sys; sys.modules['transformers'] = None; import train_vit"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "transformers is missing; the scripts need: pip install '.[scripts]'\n"


# ---------------------------------------------------------------- tables and verdicts


def test_the_summary_is_the_mean_over_seeds_of_the_mean_over_tasks():
    runs = [
        {"row": "a", "trainable": 7, "task": t, "seed": s, "test": score}
        for (t, s), score in {("x", 0): 0.5, ("y", 0): 0.7, ("x", 1): 0.9, ("y", 1): 0.9}.items()
    ]
    (found,) = plots.summary(runs)
    assert found["tasks"] == {"x": pytest.approx(0.7), "y": pytest.approx(0.8)}
    assert found["mean"] == pytest.approx(0.75)
    assert found["std"] == pytest.approx(0.15 * 2**0.5)  # of 0.6 and 0.9, n − 1

    def cells(runs: list[dict]) -> list[str]:
        line = plots.as_table(plots.summary(runs)).splitlines()[-1]
        return [cell.strip() for cell in line.split("|")][1:-1]

    assert cells(runs) == ["a", "7", "70.0", "80.0", "75.0 ± 21.2"]
    assert cells(runs[:2]) == ["a", "7", "50.0", "70.0", "60.0 (n = 1)"]


@pytest.mark.parametrize(("tasks", "seeds"), [(3, 3), (6, 1)])
def test_few_tasks_or_one_seed_are_no_verdict(tasks, seeds):
    runs = [
        {"row": name, "task": task, "seed": seed, "test": score}
        for name, score in (("a", 0.9), ("b", 0.1))
        for task in range(tasks)
        for seed in range(seeds)
    ]
    _, difference, said = plots.judge({"runs": runs}, "a beats b", ["a"], ["b"])
    assert difference == "+80.0 [+80.0, +80.0] points"
    assert said == f"no verdict: {tasks} tasks, {seeds} seed(s)"
