"""common.py: files, backbones, tasks, adapters on disk, training and scoring."""

import json
import os
import pickle
import shutil
import sys
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

TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)


def tiny_vit(labels: int = 3, seed: int = 0) -> transformers.ViTForImageClassification:
    transformers.set_seed(seed)
    config = transformers.ViTConfig(
        **TINY, image_size=4, patch_size=2, num_channels=1, num_labels=labels
    )
    return transformers.ViTForImageClassification(config)


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


# ---------------------------------------------------------------- files and results


def test_replacing_keeps_the_old_file_when_the_block_fails(tmp_path):
    target = tmp_path / "a.json"
    common.write_json(target, {"x": 1})
    with pytest.raises(RuntimeError), common.replacing(target) as temporary:
        temporary.write_text("half of a ne")
        raise RuntimeError
    assert common.read_json(target) == {"x": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_replacing_a_folder_leaves_nothing_behind_when_it_fails(tmp_path):
    with pytest.raises(RuntimeError), common.replacing(tmp_path / "folder") as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "file").write_text("x")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_replacing_a_folder_that_is_there_already(tmp_path):
    for text in ("old", "new"):
        with common.replacing(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / text).write_text(text)
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(tmp_path / "folder") == ["new"]


def test_a_result_that_json_cannot_hold_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        common.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_is_named_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write in .*file"):
        common.check_writable(tmp_path / "file" / "out.json")
    with pytest.raises(OSError, match="found a folder"):
        common.check_writable(tmp_path)
    common.check_writable(tmp_path / "new" / "out.json")
    assert not (tmp_path / "new" / "out.json").exists()


def test_results_are_kept_by_configuration_and_run(tmp_path):
    results = common.Results(tmp_path, "t", {"epochs": 1})
    spec = {"row": "a", "seed": 0}
    assert results.get(spec) is None
    results.put(spec, {"test": 0.5})
    assert common.Results(tmp_path, "t", {"epochs": 1}).get(dict(reversed(spec.items()))) == {
        "test": 0.5
    }
    assert results.get({**spec, "seed": 1}) is None
    assert common.Results(tmp_path, "t", {"epochs": 2}).get(spec) is None


def test_a_damaged_result_file_is_named(tmp_path):
    results = common.Results(tmp_path, "t", {})
    results.put({"row": "a"}, {"test": 0.5})
    file = next((results.folder / "finished").iterdir())
    file.write_text(file.read_text()[:20])
    with pytest.raises(ValueError, match=rf"{file.name} is not valid JSON"):
        results.get({"row": "a"})
    for text in ("{}", '{"run": {}, "result": {}}'):
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"{file.name} holds no result; delete it"):
            results.get({"row": "a"})


def test_code_fingerprint_sees_code_but_not_comments(tmp_path):
    prints = []
    for text in ("x = 1\n", "x = 1  # one\n\n", "x = 2\n"):
        (tmp_path / "m.py").write_text(text)
        module = type(sys)("m")
        module.__file__ = str(tmp_path / "m.py")
        prints.append(common.code_fingerprint(module))
    assert prints[0] == prints[1] != prints[2]


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
    with pytest.raises(ValueError, match=r"backbone 'nobody/no-such-model': wanted a folder"):
        common.load_backbone("nobody/no-such-model", 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="backbone .*empty"):
        common.load_backbone(str(tmp_path / "empty"), 2)

    good = tmp_path / "good"
    tiny_vit().save_pretrained(good)
    weights = good / "model.safetensors"
    whole = weights.read_bytes()
    tensors = load(whole)
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="backbone .*good"):
        common.load_backbone(str(good), 2)

    name = next(k for k in tensors if k.endswith("q_proj.weight") or k.endswith("query.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="found a non-finite value in"):
        common.load_backbone(str(good), 2)

    tensors[name] = torch.zeros(3, 3)
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit its config\.json"):
        common.load_backbone(str(good), 2)

    del tensors[name]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="found no weights for"):
        common.load_backbone(str(good), 2)


class Bomb:
    """A pickle of this runs code when it is opened."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("pytorch_model.bin", lambda folder: common.load_backbone(str(folder), 3)),
        ("adapter_model.bin", common.LazyAdapter),
    ],
)
def test_pickles_are_refused_and_never_opened(tmp_path, name, load):
    (save_lora if name.startswith("adapter") else tiny_vit().save_pretrained)(tmp_path / "m")
    for file in (tmp_path / "m").glob("*.safetensors"):
        file.unlink()
    (tmp_path / "m" / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(ValueError, match="safetensors"):
        load(tmp_path / "m")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (transformers.ViTConfig(**TINY), None),
        (transformers.Dinov2Config(**TINY), None),
        (transformers.BertConfig(**TINY), None),
        (transformers.RobertaConfig(**TINY), None),
        (transformers.DebertaV2Config(**TINY), ["query_proj", "value_proj"]),
        (transformers.SwinConfig(embed_dim=8, depths=[1], num_heads=[2]), None),
        (transformers.CLIPVisionConfig(**TINY), ["q_proj", "v_proj"]),
        (transformers.LlamaConfig(**TINY, vocab_size=8), ["q_proj", "v_proj"]),
        (transformers.MistralConfig(**TINY, vocab_size=8), ["q_proj", "v_proj"]),
    ],
    ids=lambda x: getattr(x, "model_type", ""),
)
def test_targets_are_the_query_and_value_projections(config, wanted):
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    found = common.targets_of(model)
    assert found == (wanted or found)
    query, value = found
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert sum(n.endswith(f".{query}") for n in names) == sum(
        n.endswith(f".{value}") for n in names
    )
    assert query.startswith("q") and value.startswith("v")


def test_every_target_is_a_linear_layer_of_a_numbered_block():
    shape = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12)
    config = transformers.RobertaConfig(**shape, num_attention_heads=12)
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    found = common.targets_of(model, every=True)
    assert len(found) == 12 * 6 and not any("classifier" in name for name in found)
    row = dict(method="hra", rank=8, every=True)
    head = sum(p.numel() for _, p in common.head_of(model))
    adapted, *_ = common.build(model, row, 0)
    size = sum(p.numel() for p in adapted.parameters() if p.requires_grad) - head
    assert size == 663_552  # HRA, Table 2: 0.66M


def test_targets_that_match_nothing_list_what_there_is():
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


def test_json_keeps_what_it_is_given_and_numbers_on_a_line(tmp_path):
    value = {"a": [1, -2.5e-7, 3.0], "b": [[0.5, 1], []], "c": "[\n1,\n2\n]", "d": [1, None, "x"]}
    common.write_json(tmp_path / "a.json", value)
    assert common.read_json(tmp_path / "a.json") == value
    lines = (tmp_path / "a.json").read_text().splitlines()
    assert ' "a": [1, -2.5e-07, 3.0],' in lines and "  [0.5, 1]," in lines


def test_bad_adapter_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="found no such folder"):
        common.LazyAdapter(tmp_path / "nothing")
    save_lora(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    for size in (len(whole) - 8, 20, 4, 0):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{file.name} is not a whole safetensors file"):
            common.LazyAdapter(tmp_path)
    file.write_bytes(whole)
    texts = ['{"peft_type": "LORA", "lora_alpha": "y"}', '{"lora_alpha": NaN}']
    texts += ['{"lora_alpha": 1' + 400 * "0" + "}", '{"alpha_pattern": {"(": 1}}']
    for text in (*texts, '{"alpha_pattern": {"(a+)+": 1}}'):  # the last takes time without end
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match="adapter_(model.safetensors|config.json)"):
            next(iter(common.LazyAdapter(tmp_path).values()))
    (tmp_path / "adapter_config.json").write_text("{" + 2**20 * " " + "}")
    with pytest.raises(ValueError, match=r"has 1,048,578 bytes; wanted at most 1,048,576"):
        common.LazyAdapter(tmp_path)
    for text, found in (("[1]", r"\[1\]"), ("null", "none")):  # null would lose the scaling
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"wanted a JSON object in .*found {found}"):
            common.LazyAdapter(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"JSON object in .*adapter_config\.json; found none"):
        common.LazyAdapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not valid JSON"):
        common.LazyAdapter(tmp_path)


def test_adapters_of_two_base_models_are_not_read_together(tmp_path):
    for name, base in (("a", "bert"), ("b", "bert"), ("c", "vit")):
        save_lora(tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        config = common.read_json(file) | {"base_model_name_or_path": base}
        file.write_text(json.dumps(config))
    assert len(common.adapters_of_one_base([tmp_path / "a", tmp_path / "b"])) == 2
    with pytest.raises(ValueError, match=r"adapters of 2 base models \(.*: bert; .*: vit\)"):
        common.adapters_of_one_base(tmp_path / name for name in "abc")


# ---------------------------------------------------------------- training, scoring, methods


def test_training_lowers_the_loss_and_repeats_exactly():
    losses, weights = [], []
    for _ in range(2):
        model, data = tiny_vit(), tiny_task()
        options = dict(epochs=40, batch_size=8, lr=1e-2, seed=3, collate=data.collate)
        losses.append(common.train(model, data, common.accelerator(cpu=True), **options))
        weights.append(model.classifier.weight.detach().clone())
    assert losses[0] == losses[1] and torch.equal(*weights)
    assert losses[0][-1] < 0.5 * losses[0][0]
    score = common.evaluate(model, data, common.accelerator(cpu=True), collate=data.collate)
    assert score > 0.9


def test_the_penalty_is_told_the_progress_and_added():
    data, seen = tiny_task(), []
    model = tiny_vit()

    def penalty(progress: float) -> torch.Tensor:
        seen.append(progress)
        return 1e4 * model.classifier.weight.square().sum()

    options = dict(epochs=4, batch_size=8, lr=1e-2, seed=0, collate=data.collate, weight_decay=0.0)
    before = model.classifier.weight.norm().item()
    common.train(model, data, common.accelerator(cpu=True), penalty=penalty, **options)
    assert seen == [i / 12 for i in range(12)]
    assert model.classifier.weight.norm().item() < 0.7 * before


def test_a_loss_that_is_not_finite_is_an_error():
    model, data = tiny_vit(), tiny_task()
    model.classifier.weight.data.fill_(float("nan"))
    options = dict(epochs=1, batch_size=8, lr=1e-2, seed=0, collate=data.collate)
    with pytest.raises(ValueError, match=r"found loss nan in epoch 1 at learning rate 0\.01"):
        common.train(model, data, common.accelerator(cpu=True), **options)


class Given(nn.Module):
    """A model whose logits are its inputs."""

    def forward(self, logits, labels):
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=logits)


def scored(logits: torch.Tensor, labels: torch.Tensor, metric: str) -> float:
    """What `evaluate` says of these logits and labels."""
    rows = [{"logits": x, "labels": y} for x, y in zip(logits, labels, strict=True)]
    accelerate = common.accelerator(cpu=True)
    return common.evaluate(Given(), rows, accelerate, metric=metric, batch_size=16)


def test_metrics_are_their_definitions():
    generator = np.random.default_rng(0)
    truth, guess = generator.integers(0, 2, 50), generator.integers(0, 2, 50)
    logits, labels = torch.eye(2)[torch.from_numpy(guess)], torch.from_numpy(truth)
    assert scored(logits, labels, "accuracy") == np.mean(truth == guess)
    expected = np.corrcoef(truth, guess)[0, 1]
    assert abs(scored(logits, labels, "matthews") - expected) < 50 * 2.2e-16
    noise, values = generator.normal(size=(2, 50)).astype(np.float32)
    for slope in (1, 1e-2, 1e-4):  # nearly constant outputs too, in float32
        logits = torch.from_numpy(2.5 + slope * values)[:, None]
        labels = torch.from_numpy(values + noise)
        expected = np.corrcoef(logits[:, 0].double(), labels.double())[0, 1]
        assert abs(scored(logits, labels, "pearson") - expected) < 50 * 2.2e-16


@pytest.mark.parametrize("constant", [0.0, 2.5, 0.1, -1e-3, 1e30])
def test_the_pearson_correlation_of_a_constant_is_zero(constant):
    labels = torch.rand(200, generator=torch.Generator().manual_seed(0)) * 5
    found = scored(torch.full((200, 1), constant), labels, "pearson")
    assert np.isfinite(found) and abs(found) < 200 * 2.2e-16


def test_outputs_that_are_not_finite_have_no_score():
    for bad in (torch.nan, torch.inf):
        logits = torch.eye(2).repeat(20, 1)
        logits[33, 1] = bad
        for metric in ("accuracy", "matthews", "pearson"):
            with pytest.raises(common.Diverged, match="found a non-finite output among 40"):
                scored(logits, torch.arange(40) % 2, metric)


@pytest.mark.parametrize(
    ("row", "count"),  # 2 layers × {query, value} of width 16
    [
        (dict(method="head"), 0),
        (dict(method="lora", rank=3), 4 * 3 * 32),
        (dict(method="pissa", rank=3), 4 * 3 * 32),
        (dict(method="vera", rank=5), 4 * (5 + 16)),
        (dict(method="oft", rank=4), 4 * 4 * 6),
        (dict(method="hra", rank=2, lam=1e-3), 4 * 2 * 16),
        (dict(method="hra", rank=2, strict=True), 4 * 2 * 16),
        (dict(method="resora", rank=2, metric="linear", level="feature", lam=0.1), 4 * 2 * 32),
        (dict(method="eigenlorax", components=3, rank=2), 4 * 2 * 3 * 2),
        (dict(method="eigenlorax", components=3, rank=2, frozen=True), 0),
    ],
    ids=lambda x: x["method"] if isinstance(x, dict) else "",
)
def test_methods_train_their_own_numbers_and_the_head(row, count):
    model, data = tiny_vit(), tiny_task(12)
    head = {n for n, _ in common.head_of(model)}
    model, _, penalty = common.build(model, row, seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == count + sum(
        p.numel() for n, p in tiny_vit().named_parameters() if n in head
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    options = dict(epochs=3, batch_size=4, lr=1e-2, seed=0, collate=data.collate)
    common.train(model, data, common.accelerator(cpu=True), penalty=penalty, **options)
    for name, p in model.named_parameters():
        assert torch.isfinite(p).all(), name
        moved = not torch.equal(p, before[name])
        assert moved == p.requires_grad, name


def test_an_unknown_method_is_an_error():
    with pytest.raises(ValueError, match="found method 'dora'; wanted one of"):
        common.build(tiny_vit(), {"method": "dora"}, seed=0)


# ---------------------------------------------------------------- hostile files


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with a sound adapter."""
    folder = tmp_path_factory.mktemp("whole")
    save_lora(folder / "adapter")
    return folder


def read_adapter(folder: Path) -> list:
    return [factor for pair in common.LazyAdapter(folder / "adapter").values() for factor in pair]


READERS = {
    "adapter/adapter_model.safetensors": read_adapter,
    "adapter/adapter_config.json": read_adapter,
}


def survives(whole: Path, folder: Path, name: str, spoiled: bytes) -> bool:
    """Whether a file's reader takes it: finite numbers. A refusal is a ValueError of one line."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    (folder / name).write_bytes(spoiled)
    before = sorted(folder.rglob("*"))
    try:
        assert all(factor.isfinite().all() for factor in READERS[name](folder))
        taken = True
    except ValueError as error:
        assert Path(name).parts[-1].partition("_")[0].partition(".")[0] in str(error)
        assert len(str(error)) < 5000
        taken = False
    assert sorted(folder.rglob("*")) == before and (folder / name).read_bytes() == spoiled
    return taken


@pytest.mark.parametrize("name", READERS)
def test_flipped_bits_and_cut_ends_are_read_as_numbers_or_refused(whole, tmp_path, name):
    good = (whole / name).read_bytes()
    assert survives(whole, tmp_path / "copy", name, good)
    generator = np.random.default_rng(0)
    for _ in range(60):
        spoiled = bytearray(good)
        head = 8 + int.from_bytes(good[:8], "little") if name.endswith("s") else len(good)
        place = int(generator.integers(0, head if generator.random() < 0.8 else len(good)))
        spoiled[place] ^= 1 << int(generator.integers(8))
        survives(whole, tmp_path / "copy", name, bytes(spoiled))
    for size in generator.integers(0, len(good), 10):
        assert not survives(whole, tmp_path / "copy", name, good[: int(size)])


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "1" * 5_000, "\udcff", "NaN", "[1]", '"text"', "true", ""],
    ids=["lists", "objects", "digits", "bytes", "nan", "list", "string", "bool", "empty"],
)
def test_json_that_is_no_configuration_is_refused(whole, tmp_path, text):
    spoiled = text.encode("utf-8", "surrogateescape")
    assert not survives(whole, tmp_path / "copy", "adapter/adapter_config.json", spoiled)


@pytest.mark.parametrize("field", ["lora_alpha", "r", "alpha_pattern", "use_rslora", "bias"])
@pytest.mark.parametrize("value", ["x", [1], {"a": []}, -1e400, 1e308, None, {"(": 1}, {"": "y"}])
def test_fields_of_the_wrong_kind_are_refused_or_mean_nothing(whole, tmp_path, field, value):
    config = common.read_json(whole / "adapter" / "adapter_config.json") | {field: value}
    spoiled = json.dumps(config).encode()
    survives(whole, tmp_path / "copy", "adapter/adapter_config.json", spoiled)


def test_names_that_climb_out_of_a_folder_are_only_names(tmp_path):
    tensors = {
        "base_model.model.../../escaped.lora_A.weight": torch.ones(1, 3),
        "base_model.model.../../escaped.lora_B.weight": torch.ones(2, 1),
    }
    (tmp_path / "in" / "adapter").mkdir(parents=True)
    save_file(tensors, tmp_path / "in" / "adapter" / "adapter_model.safetensors")
    (tmp_path / "in" / "adapter" / "adapter_config.json").write_text('{"r": 1, "lora_alpha": 1}')
    subspaces = eigenlorax.recycle([common.LazyAdapter(tmp_path / "in" / "adapter")])
    with pytest.raises(ValueError, match="no layer is named"):
        eigenlorax.adapt(tiny_vit(), subspaces)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_links_are_read_and_never_written_through(whole, tmp_path):
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "adapter" / name).symlink_to(whole / "adapter" / name)
    before = (whole / "adapter" / "adapter_config.json").read_bytes()
    read_adapter(tmp_path)
    common.write_json(tmp_path / "adapter" / "adapter_config.json", {})
    assert (whole / "adapter" / "adapter_config.json").read_bytes() == before
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter" / "adapter_model.safetensors").symlink_to("adapter_model.safetensors")
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        read_adapter(tmp_path)  # a link to itself


def test_a_header_that_claims_more_than_the_file_holds_costs_no_memory(whole, tmp_path):
    header = b'{"base_model.model.q.lora_A.weight":{"dtype":"F32","shape":[1000000000,1000000000],'
    header += b'"data_offsets":[0,4000000000000000000]}}'
    name = "adapter/adapter_model.safetensors"
    spoiled = len(header).to_bytes(8, "little") + header + bytes(16)
    assert not survives(whole, tmp_path / "copy", name, spoiled)
    assert not survives(whole, tmp_path / "copy", name, (2**63).to_bytes(8, "little") + header)
