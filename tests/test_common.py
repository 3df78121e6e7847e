"""common.py: data, adapters on disk, methods by name, training, results, the command line."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from itertools import pairwise, product
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
from figures import runs as tables

ROOT = Path(__file__).parents[1]
TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def tiny_vit(labels: int = 3, seed: int = 0) -> transformers.ViTForImageClassification:
    transformers.set_seed(seed)
    sizes = dict(image_size=4, patch_size=2, num_channels=1, num_labels=labels)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**TINY, **sizes))


def tiny_task(n: int = 24, seed: int = 0) -> common.ImageTask:
    labels = torch.arange(n) % 3
    images = torch.randint(0, 60, (n, 1, 4, 4), generator=torch.Generator().manual_seed(seed))
    images[:, 0, 0] += 60 * labels[:, None]
    return common.ImageTask(images.to(torch.uint8), labels, [0.3], [0.3])


def save_lora(folder: Path, seed: int = 0, **options) -> nn.Module:
    """A PEFT LoRA of a tiny ViT, both of its factors random, saved the way PEFT saves it."""
    model = tiny_vit(seed=seed)
    options |= dict(target_modules=common.targets_of(model), init_lora_weights=False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=6, **options))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a sound adapter."""
    folder = tmp_path_factory.mktemp("whole")
    save_lora(folder)
    return folder


@pytest.fixture
def lora(whole, tmp_path) -> Path:
    """A copy of it, to spoil."""
    return shutil.copytree(whole, tmp_path / "lora")


def command(monkeypatch, script, *arguments: str) -> str:
    """Run a script's main on a command line that must fail; returns its one line."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
    with pytest.raises(SystemExit) as end:
        common.one_line_errors(script.main)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


# ---------------------------------------------------------------- files and results


@pytest.mark.parametrize("name", ["half", "folder/inner/half"])
def test_what_fails_half_way_leaves_the_old_and_nothing_else(tmp_path, name):
    common.write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(RuntimeError), common.replacing(tmp_path / "a.json") as temporary:
        if "/" in name:
            temporary = temporary / name
            temporary.parent.mkdir(parents=True)
        temporary.write_text("half of a ne")
        raise RuntimeError
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
    with pytest.raises(OSError, match="found a folder"):
        common.check_writable(tmp_path)
    common.check_writable(tmp_path / "new" / "out.json")
    assert not (tmp_path / "new" / "out.json").exists()
    line = command(monkeypatch, train_vit, "--runs", str(tmp_path / "file"))
    assert line.startswith(f"train_vit.py: error: cannot write in {tmp_path / 'file'}")


def test_results_are_kept_by_configuration_and_run_and_a_damaged_one_is_named(tmp_path):
    results, spec = common.Results(tmp_path, "t", {"epochs": 1}), {"row": "a", "seed": 0}
    assert results.get(spec) is None
    results.make(spec, lambda spec: {"test": 0.5})
    again = common.Results(tmp_path, "t", {"epochs": 1})
    assert again.get(dict(reversed(spec.items()))) == {"test": 0.5}
    assert results.get({**spec, "seed": 1}) is None
    assert common.Results(tmp_path, "t", {"epochs": 2}).get(spec) is None
    file = results.file(spec)
    half = file.read_text()[:20]
    for text, message in ((half, "is not valid JSON"), ('{"result": {}}', "holds no result")):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"{file.name} {message}.*delete"):
            results.get(spec)


def test_results_depend_on_every_file_beside_the_script_but_the_other_scripts(tmp_path):
    """A method of one's own, broken and run again, must not print its old results."""
    script = tmp_path / "train_vit.py"
    script.write_text("x = 1\n")
    seen = [common.sources(script)]
    for name, text in (
        ("ether.py", "x = 1\n"),  # a new file
        ("ether.py", "x = 2\n"),  # broken
        ("train_vit.py", "x = 2\n"),
        ("ether.py", "x = 2  # two\n\n"),  # from here on the same
        ("train_glue.py", "x = 1\n"),
    ):
        (tmp_path / name).write_text(text)
        seen.append(common.sources(script))
    assert [old != new for old, new in pairwise(seen)] == [True, True, True, False, False]
    assert {"hra.py", "resora.py", "eigenlorax.py"} < set(common.sources(train_vit.__file__))


# ---------------------------------------------------------------- backbones and tasks


def test_backbones_load_as_float32_with_a_fresh_head(tmp_path):
    source = tiny_vit().half()
    source.save_pretrained(tmp_path)
    transformers.set_seed(7)
    model = common.load_backbone(str(tmp_path), 3)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    trunk = source.base_model.state_dict()
    for name, value in model.base_model.state_dict().items():
        assert torch.equal(value, trunk[name].float()), name
    assert (model.classifier.weight - source.classifier.weight.float()).abs().max() > 1e-3
    assert common.load_backbone(str(tmp_path), 5).classifier.out_features == 5


def test_bad_backbones_are_named(tmp_path):
    def refused(message: str, folder: Path | str = tmp_path) -> None:
        with pytest.raises(ValueError, match=f"backbone '{folder}': .*{message}"):
            common.load_backbone(str(folder), 2)

    refused("wanted a folder", "nobody/no-such-model")
    refused("wanted a folder")  # it is empty
    tiny_vit().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load(file.read_bytes())
    key = next(key for key in tensors if key.endswith(("q_proj.weight", "query.weight")))
    rest = {name: tensor for name, tensor in tensors.items() if name != key}
    for spoiled, message in (
        (tensors | {key: torch.full_like(tensors[key], torch.nan)}, "a non-finite value in"),
        (tensors | {key: torch.zeros(3, 3)}, r"do not fit its config\.json"),
        (rest, "found no weights for"),
    ):
        save_file(spoiled, file, metadata={"format": "pt"})
        refused(message)
    file.write_bytes(file.read_bytes()[:2000])
    refused("wanted a folder")


def test_a_pickled_backbone_is_refused_however_sound_it_is(tmp_path):
    model = tiny_vit()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="wanted .*model.safetensors"):
        common.load_backbone(str(tmp_path), 3)


KINDS = "vit dinov2 bert roberta deberta-v2 swin clip_vision_model llama mistral"


@pytest.mark.parametrize("kind", KINDS.split())
def test_targets_are_the_query_and_value_projections(kind):
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind))
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
    for task, sentences in (("cola", "a,0\nb,1"), ("mrpc", "c,0")):
        (tmp_path / task).mkdir()
        (tmp_path / task / "train.csv").write_text(f"sentence,label\n{sentences}\n")
    assert common.load_task(str(tmp_path), "cola")["train"]["sentence"][:] == ["a", "b"]
    with pytest.raises(ValueError, match=r"no folder 'sst2' in .*found \['cola', 'mrpc'\]"):
        common.load_task(str(tmp_path), "sst2")
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


def test_lazy_adapter_reads_one_module_at_a_time(lora):
    tensors = load((lora / TENSORS).read_bytes())
    bad = next(key for key in tensors if "lora_B" in key)
    tensors[bad][0, 0] = float("inf")
    save_file(tensors, lora / TENSORS)
    adapter = common.LazyAdapter(lora)
    (name,) = (name for name in adapter if f"{name}.lora_B" in bad)
    with pytest.raises(ValueError, match=rf"{name}.*finite"):
        adapter[name]
    for other in set(adapter) - {name}:
        assert all(torch.isfinite(factor).all() for factor in adapter[other])


def test_adapters_of_two_base_models_are_not_read_together(whole, tmp_path):
    for name, base in (("a", "bert"), ("b", "bert"), ("c", "vit")):
        file = shutil.copytree(whole, tmp_path / name) / CONFIG
        file.write_text(json.dumps(common.read_json(file) | {"base_model_name_or_path": base}))
    assert len(common.adapters_of_one_base([tmp_path / "a", tmp_path / "b"])) == 2
    with pytest.raises(ValueError, match=r"adapters of 2 base models \(.*: bert; .*: vit\)"):
        common.adapters_of_one_base(tmp_path / name for name in "abc")


def taken(folder: Path, name: str, content: bytes) -> bool:
    """Whether an adapter with this content in one of its files is taken, as finite numbers.

    A refusal is a ValueError of one line that names the file; the folder stays as it was.
    """
    (folder / name).write_bytes(content)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    try:
        pairs = list(common.LazyAdapter(folder).values())
        assert all(factor.isfinite().all() for pair in pairs for factor in pair)
        return True
    except ValueError as error:
        assert "adapter_" in str(error) and len(str(error)) < 5000
        return False
    finally:
        assert {file: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_flipped_bits_and_cut_ends_are_read_as_numbers_or_refused(lora, name):
    good = (lora / name).read_bytes()
    assert taken(lora, name, good)
    generator = np.random.default_rng(0)
    head = 8 + int.from_bytes(good[:8], "little") if name == TENSORS else len(good)
    for size in [head] * 32 + [len(good)] * 8:  # most of them in the header
        spoiled = bytearray(good)
        spoiled[generator.integers(size)] ^= 1 << int(generator.integers(8))
        taken(lora, name, bytes(spoiled))
    for size in (0, 4, 20, *generator.integers(0, len(good), 5), len(good) - 8):
        assert not taken(lora, name, good[: int(size)])
    (lora / name).unlink()
    with pytest.raises(ValueError, match=rf"wanted .*{name}.*found"):
        common.LazyAdapter(lora)


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 100_000, '{"a":' * 100_000, "1" * 5_000, "\udcff", "NaN", "[1]", '"text"', "true"),
        "",
        "null",  # which would lose the scaling
        "{" + 2**20 * " " + "}",
        '{"peft_type": "LORA", "lora_alpha": "y"}',
        '{"lora_alpha": NaN}',
        '{"lora_alpha": 1' + 400 * "0" + "}",
        '{"alpha_pattern": {"[": 1}}',
        '{"alpha_pattern": {"(a+)+": 1}}',  # takes time without end
        '{"alpha_pattern": {"' + 20 * ".*" + 'x": 1}}',
    ],
    ids=lambda text: repr(text)[:30],
)
def test_json_that_is_no_configuration_is_refused(lora, text):
    assert not taken(lora, CONFIG, text.encode("utf-8", "surrogateescape"))


@pytest.mark.parametrize("name", ["lora_alpha", "r", "alpha_pattern", "use_rslora", "bias"])
def test_fields_of_the_wrong_kind_are_refused_or_mean_nothing(lora, name):
    config = common.read_json(lora / CONFIG)
    for value in ("x", [1], {"a": []}, -1e400, 1e308, None, {"(": 1}, {"": "y"}):
        taken(lora, CONFIG, json.dumps(config | {name: value}).encode())


def test_a_header_that_claims_more_than_the_file_holds_costs_no_memory(lora):
    header = b'{"base_model.model.q.lora_A.weight":{"dtype":"F32","shape":[1000000000,1000000000],'
    header += b'"data_offsets":[0,4000000000000000000]}}'
    for size in (len(header), 2**63):
        assert not taken(lora, TENSORS, size.to_bytes(8, "little") + header + bytes(16))


def test_names_that_climb_out_of_a_folder_are_only_names(lora, tmp_path):
    tensors = load((lora / TENSORS).read_bytes())
    climbing = {key.replace("model.vit", "model.../../x"): X for key, X in tensors.items()}
    save_file(climbing, lora / TENSORS)
    subspaces = eigenlorax.recycle([common.LazyAdapter(lora)])
    with pytest.raises(ValueError, match=r"no layer is named '\.\./\.\./x"):
        eigenlorax.adapt(tiny_vit(), subspaces)
    assert [*tmp_path.iterdir()] == [lora]


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


# ---------------------------------------------------------------- training and scoring


def trained(model: nn.Module, data: common.ImageTask, **options) -> list[float]:
    """The losses of a short training."""
    options = dict(epochs=2, batch_size=8, lr=1e-2, seed=0) | options
    return common.train(model, data, common.accelerator(), **options)


def test_training_lowers_the_loss_and_repeats_exactly():
    models = tiny_vit(), tiny_vit()
    losses, again = (trained(model, tiny_task(), epochs=40, seed=3) for model in models)
    assert losses == again and losses[-1] < 0.5 * losses[0]
    assert torch.equal(*(model.classifier.weight for model in models))
    assert common.evaluate(models[0], tiny_task(), common.accelerator()) > 0.9


def test_the_penalty_is_told_the_progress_and_added():
    model, seen = tiny_vit(), []

    def penalty(progress: float) -> torch.Tensor:
        seen.append(progress)
        return 1e4 * model.classifier.weight.square().sum()

    before = model.classifier.weight.norm().item()
    trained(model, tiny_task(), epochs=4, weight_decay=0.0, penalty=penalty)
    assert seen == [i / 12 for i in range(12)]
    assert model.classifier.weight.norm().item() < 0.7 * before


def test_data_of_less_than_a_batch_and_of_odd_length_train_and_count_every_row():
    model, data = tiny_vit(), tiny_task(5)
    losses = trained(model, data, lr=0)
    assert len(losses) == 2 and losses[0] > 0
    fifths = 5 * common.evaluate(model, data, common.accelerator(), batch_size=2)
    assert fifths == round(fifths)


def test_metrics_are_their_definitions_and_zero_for_a_constant():
    generator = np.random.default_rng(0)
    truth, guess = generator.integers(0, 2, (2, 50))
    logits, labels = torch.eye(2)[torch.from_numpy(guess)], torch.from_numpy(truth)
    assert common.score(logits, labels, "accuracy") == np.mean(truth == guess)
    wanted = np.corrcoef(truth, guess)[0, 1]
    assert abs(common.score(logits, labels, "matthews") - wanted) < 50 * 2.2e-16
    noise, values = generator.normal(size=(2, 50)).astype(np.float32)
    labels = torch.from_numpy(values + noise)
    for slope in (1, 1e-2, 1e-4):  # nearly constant outputs too, in float32
        logits = torch.from_numpy(2.5 + slope * values)[:, None]
        wanted = np.corrcoef(logits[:, 0].double(), labels.double())[0, 1]
        assert abs(common.score(logits, labels, "pearson") - wanted) < 50 * 2.2e-16
    for constant in (0.0, 2.5, 0.1, -1e-3, 1e30):
        found = common.score(torch.full((50, 1), constant), labels, "pearson")
        assert abs(found) < 50 * 2.2e-16


def test_a_loss_and_outputs_that_are_not_finite_are_errors():
    model = tiny_vit()
    model.classifier.weight.data.fill_(float("nan"))
    with pytest.raises(common.Diverged, match=r"found loss nan in epoch 1 at learning rate 0\.01"):
        trained(model, tiny_task())
    logits = torch.eye(2).repeat(20, 1)
    for bad, metric in product((torch.nan, torch.inf), ("accuracy", "matthews", "pearson")):
        logits[33, 1] = bad
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
    pairs = common.LazyAdapter(whole).items()
    adapters = [{n: (B + i, A + i) for n, (B, A) in pairs} for i in range(2)]
    model = tiny_vit()
    head = sum(p.numel() for _, p in common.head_of(model))
    model, penalty = common.build(model, row("", name.partition(" ")[0], **options), adapters)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count + head
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained(model, tiny_task(12), batch_size=4, penalty=penalty)
    for key, p in model.named_parameters():
        assert torch.isfinite(p).all(), key
        assert p.requires_grad != torch.equal(p, before[key]), key


def test_options_reach_the_layers():
    model, _ = common.build(tiny_vit(), row("", "lora", rank=3, init_lora_weights="pissa"))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (3, 3, "pissa")
    model, _ = common.build(tiny_vit(), row("", "hra", rank=2, strict=True))
    assert all(layer.strict for layer in common.layers_of(model, hra.HRALinear).values())


def test_every_method_has_a_test_and_a_colour_of_its_own():
    assert {name.partition(" ")[0] for name in SIZES} | {"full"} == set(common.METHODS)
    assert len({method.colour for method in common.METHODS.values()}) == len(common.METHODS)


def test_fixed_rows_of_a_subspace_stay_while_free_ones_train(whole):
    spec = row("", "eigenlorax", components=2, rank=2, pseudo=4, free=4)
    model, _ = common.build(tiny_vit(), spec, [common.LazyAdapter(whole)])
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
    config = train_vit.complete(train_vit.Config(rows=("ether", "eigenlorax", "lora"), jobs=1))
    rows, rates = train_vit.rows_and_rates(config)
    assert [r["row"] for r in rows] == ["ETHER", "LoRA r=4", "EigenLoRAx"]
    assert rates["ETHER"] == 1e-2
    assert train_vit.rows_and_rates(replace(config, lr="ETHER=0.5"))[1]["ETHER"] == 0.5
    preset = {"HRA r=8, λ=0": 0.7}  # a method's rate is that of the first row named like it
    one = replace(config, rows=("hra",))
    assert common.rows_and_rates(one, [], train_vit.LORA, preset)[1]["HRA"] == 0.7
    model, _ = common.build(tiny_vit(), rows[0])
    assert len(common.layers_of(model, hra.HRALinear)) == 4
    result = {"trainable": 7, "losses": [1.0], "validation": 0.5, "test": 0.5}
    runs = [{**spec, **result} for spec in common.specify(rows, rates, ["a", "b"], [0])]
    data = {"config": {"data": "x"}, "rows": plots.summary(runs), "runs": runs}
    assert "| ETHER" in plots.as_table(data["rows"])
    (tmp_path / "a.json").write_text(json.dumps(data))
    assert tables.draw(tmp_path / "a.json").exists()


# ---------------------------------------------------------------- the command line

SCRIPTS = pytest.mark.parametrize("script", [train_vit, train_glue], ids=lambda s: s.__name__)
BOTH = [
    ("--backbone x/y", "found --backbone x/y with --data "),
    ("--epochs -3", "found --epochs -3; wanted 1 or more"),
    ("--epochs 0", "found --epochs 0; wanted 1 or more"),
    ("--seeds -1", "found --seeds -1; wanted 1 or more"),
    ("--seeds 101", "found --seeds 101; wanted at most 100"),
    ("--jobs -3", "found --jobs -3; wanted 1 or more"),
    ("--components 21", "found --components 21; wanted at most 20, the directions of 5"),
    ("--weight-decay nan", "found --weight-decay nan; wanted a finite number"),
    ("--out x.png", "found --out x.png; wanted a name that ends in .json"),
    ("--lr LoRa=1", "found row 'LoRa' in --lr; wanted one of Full"),
    ("--lr LoRA r=4=-1", "found rate '-1' for LoRA r=4 in --lr; wanted a number above 0"),
    ("--lr Full=fast", "found rate 'fast' for Full in --lr; wanted a number above 0"),
    ("--mixed-precision fp16", "found --mixed-precision fp16 without a GPU; wanted no or bf16"),
]


@SCRIPTS
@pytest.mark.parametrize(("option", "message"), BOTH)
def test_bad_input_is_one_line_that_names_it(monkeypatch, tmp_path, script, option, message):
    if "without a GPU" in message and torch.accelerator.is_available():
        pytest.skip("there is one")
    line = command(monkeypatch, script, *option.split(" ", 1), "--runs", str(tmp_path))
    assert line.startswith(f"{script.__name__}.py: error: {message}"), line
    assert not list(tmp_path.rglob("*.json"))


@SCRIPTS
def test_help_says_what_each_option_and_preset_is_and_a_wrong_choice_what_there_are(capsys, script):
    def printed(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            common.parse(script.Config, script.PRESETS, [*arguments])
        return " ".join("".join(capsys.readouterr()).replace("│", "").split())

    text = printed("--help")
    for option in fields(script.Config):
        _, _, after = text.partition(f"--{option.name.replace('_', '-')} ")
        said, _, _ = after.partition("(default:")
        assert len(said.split()) > 2, option.name
    for name, preset in script.PRESETS.items():
        assert f"{name}: {next(iter(preset))} " in text
    known = {"rows": common.METHODS, "table": script.TABLES, "mixed-precision": ("no", "bf16")}
    for option, choices in known.items():
        text = printed(f"--{option}", "nine")
        assert f"invalid choice 'nine' for argument '--{option}'" in text
        assert all(f"'{choice}'" in text for choice in choices), option


@pytest.mark.parametrize("name", ["--lam", "--λ"])
def test_lambda_is_an_option_of_either_name_and_reaches_its_rows(name):
    config = common.parse(train_vit.Config, {}, ["--rows", "hra", "lora", name, "1e-3"])
    rows, _ = train_vit.rows_and_rates(train_vit.complete(config))
    assert [r.get("lam") for r in rows] == [1e-3, None]


def test_without_the_libraries_one_line_names_the_extra():
    code = "import sys; sys.modules['transformers'] = None; import train_vit"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "transformers is missing; the scripts need: pip install '.[scripts]'\n"


# ---------------------------------------------------------------- tables


def test_the_summary_is_the_mean_over_seeds_of_the_mean_over_tasks():
    scores = {("x", 0): 0.5, ("y", 0): 0.7, ("x", 1): 0.9, ("y", 1): 0.9}
    runs = [
        {"row": "a", "trainable": 7, "task": task, "seed": seed, "test": score}
        for (task, seed), score in scores.items()
    ]
    (found,) = plots.summary(runs)
    assert found["tasks"] == {"x": pytest.approx(0.7), "y": pytest.approx(0.8)}
    assert found["mean"] == pytest.approx(0.75)
    assert found["std"] == pytest.approx(0.15 * 2**0.5)  # of 0.6 and 0.9, n − 1
    for some, cells in (
        (runs, ["a", "7", "70.0", "80.0", "75.0 ± 21.2"]),
        (runs[:2], ["a", "7", "50.0", "70.0", "60.0 (n = 1)"]),
    ):
        line = plots.as_table(plots.summary(some)).splitlines()[-1]
        assert [cell.strip() for cell in line.strip("|").split("|")] == cells
