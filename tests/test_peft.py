"""PEFT in and out: what it saves is read with the same outputs, or refused by name; and back again.

At the end ReSoRA on PEFT's own LoRA: which layers count, what is refused, which forwards count.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import eigenlorax
import hra
from eigenlorax import lora_pairs, recycle, update
from hra import from_peft
from resora import METRICS, ReSoRA, redundancy
from tests.checks import BF16, F32, F64, close, eps, exactly, normal, seeded
from tests.test_eigenlorax import both_stacks, orthonormal, projector, svd
from tests.test_hostile import refused

PIXELS = normal(0, 4, 1, 8, 8, dtype=F32)
PREFIX = "base_model.model."


def vit():
    """A tiny ViT of three classes."""
    transformers.set_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    image = dict(image_size=8, patch_size=4, num_channels=1, num_labels=3)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **image)).eval()


# ----------------------------------------------------------------------------- there and back


def saved(folder, config):
    """Save an adapter of random numbers: its tensors, its config, the logits of its model."""
    model = peft.get_peft_model(vit(), config).eval()
    for i, p in enumerate(model.parameters()):
        if p.requires_grad:
            p.data += 0.3 * normal(i, *p.shape, dtype=F32)
    model.save_pretrained(folder)
    stored = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), stored, model(PIXELS).logits


def read(model, state, config):
    """Put an adapter into a model with this project's files, and its head if it has one."""
    if config["peft_type"] == "HRA":
        Us = from_peft(state)
        layers = hra.adapt(model, list(Us), config["r"], init="random", strict=config["apply_GS"])
        for name, U in Us.items():
            layers[name].load_state_dict({"U": U}, strict=False)
    else:
        pairs = lora_pairs(state, config)
        eigenlorax.set_task(eigenlorax.adapt(model, recycle([pairs]), rank=4), 0, pairs)
    head = {name: state[PREFIX + name] for name in HEAD if PREFIX + name in state}
    model.load_state_dict(head, strict=False)


HEAD = ["classifier.weight", "classifier.bias"]
TARGETS = ["projection", "q_proj", "fc2"]  # of HRA, which takes the convolution as well
PATTERNS = {
    "rank_pattern": {"layers.0.attention.q_proj": 2, "v_proj": 3},
    "alpha_pattern": {r"layers\.1\..*q_proj": 7, "v_proj": -5},
}
SAVED = {
    "HRA": (peft.HRAConfig, {}),
    "HRA, odd rank": (peft.HRAConfig, {"r": 7}),
    "HRA, λ = ∞": (peft.HRAConfig, {"apply_GS": True}),
    "HRA and a head": (peft.HRAConfig, {"modules_to_save": ["classifier"]}),
    "LoRA": (peft.LoraConfig, {"lora_alpha": 12}),
    "LoRA, rslora": (peft.LoraConfig, {"lora_alpha": 12, "use_rslora": True}),
    "LoRA, patterns": (peft.LoraConfig, {"lora_alpha": 3, "use_rslora": True, **PATTERNS}),
    "LoRA, gaussian": (peft.LoraConfig, {"init_lora_weights": "gaussian"}),
    "LoRA and a head": (peft.LoraConfig, {"modules_to_save": ["classifier"]}),
}


@pytest.mark.parametrize("kind, options", SAVED.values(), ids=SAVED)
def test_an_adapter_of_pefts_gives_the_same_here(kind, options, tmp_path):
    if kind is peft.HRAConfig:
        options = {"target_modules": TARGETS, "r": 4, "init_weights": False} | options
    else:
        options = {"target_modules": ["q_proj", "v_proj"], "r": 4} | options
    state, config, logits = saved(tmp_path, kind(**options))
    model = vit()
    assert (model(PIXELS).logits - logits).abs().max() > 0.01
    read(model, state, config)
    close(model(PIXELS).logits, logits, 1e-5)  # float32, logits of order 1, two layers


OURS = {
    "HRA": dict(rank=4),
    "HRA, odd rank": dict(rank=7),
    "HRA, λ = ∞": dict(rank=4, strict=True),
    "EigenLoRAx": None,
}


@pytest.mark.parametrize("options", OURS.values(), ids=OURS)
def test_an_adapter_of_ours_gives_the_same_in_peft(options, tmp_path):
    model = vit()
    model.classifier.weight.data += 1
    head = {name: model.get_parameter(name) for name in HEAD}
    if options:
        layers = hra.adapt(model, TARGETS, init="random", generator=seeded(1), **options)
        state = hra.to_peft(layers, head)
        config = {"peft_type": "HRA", "r": options["rank"], "target_modules": list(layers)}
        config |= {"apply_GS": "strict" in options, "modules_to_save": ["classifier"]}
        for name, U in from_peft(state).items():
            exactly(U, layers[name].U.detach())
    else:
        layers = some_tasks(model)
        state, config = eigenlorax.to_peft(layers, 1, head)
        for name, (B, A) in lora_pairs(state, config).items():
            b, a = layers[name].pair(1)
            close(B @ A, b @ a, 1e-6)
    assert config["modules_to_save"] == ["classifier"]
    assert not any(tensor.requires_grad for tensor in state.values())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "adapter_model.safetensors")
    theirs = peft.PeftModel.from_pretrained(vit(), tmp_path).eval()
    close(theirs(PIXELS).logits, model(PIXELS).logits, 1e-5)  # float32, logits of order 1
    close(theirs.merge_and_unload()(PIXELS).logits, model(PIXELS).logits, 1e-5)


def test_one_layer_of_two_names_becomes_two_tensors(tmp_path):
    layer = hra.HRALinear(nn.Linear(3, 4), 2)
    state = hra.to_peft({"a": layer, "b": layer})
    save_file(state, tmp_path / "adapter_model.safetensors")  # it refuses shared memory
    exactly(from_peft(state)["b"], layer.U.detach())


def some_tasks(model):
    """EigenLoRAx of other ranks in other layers, with the second of two tasks active."""
    layers, draw = {}, seeded(0)
    for i, name in enumerate(["0.attention.q_proj", "0.attention.v_proj", "1.attention.q_proj"]):
        adapters = [{name: (normal(draw, 16, 3), normal(draw, 3, 16))} for _ in range(2)]
        found = recycle(adapters, k=4)
        options = {"rank": 1 + i, "tasks": 2, "scaling": 0.3, "init": "random", "generator": draw}
        layers |= eigenlorax.adapt(model, found, **options)
    for layer in layers.values():
        layer.task = 1
    return layers


# ------------------------------------------------------------------- what is read from a file

A, B, U = torch.ones(4, 3), torch.ones(2, 4), torch.ones(3, 2)
PAIR = {"q.lora_A.weight": A, "q.lora_B.weight": B}


def lora(layer="q"):
    """A LoRA of one layer, as PEFT saves it."""
    return {f"{PREFIX}{layer}.lora_A.weight": A, f"{PREFIX}{layer}.lora_B.weight": B}


def mirrors(layer="q"):
    """An HRA of one layer, as PEFT saves it."""
    return {f"{PREFIX}{layer}.hra_u": U}


def lora_config(**options):
    """A config that PEFT may have saved."""
    return {"peft_type": "LORA", "r": 4, "target_modules": ["q"]} | options


HALF = {"a.q.lora_A.mine.weight": A.half(), "a.q.lora_B.mine.weight": B.half()}
SCALES = [
    (lora("a.q"), None, 1.0),  # only where nothing says otherwise
    (HALF, None, 1.0),  # the adapter's own name is left out, and half becomes float32
    (lora("a.q") | {"a.q.alpha": torch.tensor(1.0)}, None, 0.25),
    (lora("a.q"), lora_config(lora_alpha=12), 3.0),
    (lora("a.q"), lora_config(), 2.0),  # PEFT's default is 8
    (lora("a.q"), lora_config(use_rslora=True), 4.0),
    (lora("a.q"), lora_config(r=99, lora_alpha=12), 3.0),  # r is the tensors'
    (lora("a.q"), lora_config(lora_alpha=1, alpha_pattern={"v": 4, "q": 8, "a.q": 20}), 2.0),
    (lora("a.q"), lora_config(lora_alpha=1, alpha_pattern={"quer": 8, ".q": 8}), 0.25),  # no part
    (lora("a.q"), lora_config(lora_alpha=4, base_model_name_or_path="x/base.lora_merged"), 1.0),
]


@pytest.mark.parametrize("state, config, s", SCALES)
def test_a_pair_is_read_with_its_scale(state, config, s):
    found = lora_pairs(state, config)["a.q"]
    exactly(found[0], s * B)
    exactly(found[1], A)


def test_shapes_are_read_on_the_meta_device():
    state = {key: value.to("meta") for key, value in PAIR.items()}
    assert lora_pairs(state, lora_config())["q"][0].shape == (2, 4)


KINDS = {"LoRA": (lora_pairs, lora), "HRA": (from_peft, mirrors)}
both = pytest.mark.parametrize("read, adapter", KINDS.values(), ids=KINDS)
HEADS = ["classifier.weight", "pre_classifier.bias", "score.weight", "classifier.dense.weight"]


@both
@pytest.mark.parametrize("head", HEADS)
def test_a_head_beside_an_adapter_is_left_alone(read, adapter, head):
    assert list(read(adapter() | {PREFIX + head: torch.ones(2)})) == ["q"]


LOST = """
q.bias q.base_layer.bias q.dora_scale q.lora_magnitude_vector q.lora_B.bias q.lora_diag.weight
k.base_layer.bias norm.weight model.embed_tokens.weight layers.0.fc.weight
layer.0.attention.head.weight k.alpha k.lokr_w1 k.to_k_lora.down.weight k.lora.down.weight
k.hada_w1_a k.oft_R.weight k.ia3_l k.lora_embedding_A k.hra_u.default .hra_u h.0.mlp.fc.lokr_w1
classifier.road_theta classifier.lokr_w1 fc.road_theta fc.oft_R.weight score.hra_u.default
head.lora.down.weight head.to_k_lora.down.weight
""".split()


@both
@pytest.mark.parametrize("key", LOST)
def test_what_would_be_lost_beside_an_adapter_is_refused_by_name(read, adapter, key):
    words = rf"'({PREFIX})?{re.escape(key)}'"
    refused(lambda: read(adapter() | {PREFIX + key: torch.ones(2)}), words)


@both
@pytest.mark.parametrize("part", ["weight", "bias", "dora_scale", "lora_magnitude_vector.weight"])
def test_what_else_an_adapted_layer_of_a_head_has_is_refused(read, adapter, part):
    first = {f"{PREFIX}classifier.dense.{part}": torch.ones(2)}
    assert list(read(adapter("classifier.dense"))) == ["classifier.dense"]
    refused(lambda: read(first | adapter("classifier.dense")), rf"'.*classifier.dense.{part}'")


LORA, NORM = dict(target_modules=["q_proj"], r=2), ["layernorm"]
MORE = [
    (peft.LoraConfig(**LORA, use_dora=True), "use_dora=True: DoRA also rescales"),
    (peft.LoraConfig(**LORA, bias="all"), "bias=all: a trained bias"),
    (peft.LoraConfig(**LORA, lora_bias=True), "lora_bias=True: a trained bias"),
    (peft.LoraConfig(**LORA, init_lora_weights="pissa"), "init_lora_weights=pissa: it may take"),
    (peft.LoraConfig(**LORA, init_lora_weights="olora"), "init_lora_weights=olora: it may take"),
    (peft.LoraConfig(**LORA, modules_to_save=NORM), "'.*layernorm.*' would be lost"),
    (peft.LoraConfig(**LORA, kasa_config=peft.KasaConfig()), "kasa_config.*KaSA has a diagonal"),
    (peft.LoraConfig(target_modules=["projection"], r=2), r"B: found .*\(16, 2, 1, 1\).* \(m, n\)"),
    (peft.HRAConfig(**LORA, bias="hra_only"), "a trained bias, '.*q_proj.base_layer.bias'"),
    (peft.HRAConfig(**LORA, modules_to_save=NORM), "a trained bias, '.*layernorm.*.bias'"),
]


@pytest.mark.parametrize("config, words", MORE)
def test_an_adapter_of_pefts_that_is_more_is_refused_with_the_reason(config, words, tmp_path):
    state, stored, _ = saved(tmp_path, config)
    refused(lambda: read(vit(), state, stored), words)


ALPHA = {"q.alpha": torch.tensor(1.0)}
CODES = {"q.lora_B.weight": B.to(torch.float8_e4m3fn)}
TWO = {"q.lora_A.one.weight": A, "q.lora_B.two.weight": B}
MANY = {f"{PREFIX}q{i}.lora_A.weight": A for i in range(99)}
ADAPTERS = [
    (from_peft, (MANY,), r"\(99 in all\); want base_model.model.NAME.hra_u"),
    (from_peft, ({PREFIX + "q.hra_u": torch.ones(4)},), r"q.hra_u: found .*want floats \(d, r\)"),
    (from_peft, ({PREFIX + "q.hra_u": U.long()},), r"q.hra_u: found .*want floats \(d, r\)"),
    (from_peft, ({PREFIX + "q.hra_u": 0 * U},), "q.hra_u: column 0 is zero"),
    (from_peft, (mirrors() | lora("classifier"),), "an unknown key, 'classifier.lora_A.weight'"),
    (from_peft, (mirrors() | lora(),), "an unknown key, 'q.lora_A.weight'"),
    (from_peft, (mirrors() | {"k.hra_u": U},), "an unknown key, 'k.hra_u'"),  # without the prefix
    (from_peft, (mirrors() | {PREFIX: U},), "an unknown key, ''"),
    (lora_pairs, (PAIR | {"k.hra_u": U},), "'k.hra_u' would be lost"),
    (lora_pairs, (PAIR | ALPHA, lora_config()), "q: alpha is in the file and in the config"),
    (lora_pairs, ({},), "found ; want"),
    (lora_pairs, ({"q.weight": B},), "'q.weight' would be lost"),
    (lora_pairs, ({"q.lora_A.weight": A},), "found q; want lora_A.weight, lora_B.weight"),
    (lora_pairs, ({"classifier.weight": A},), "found classifier.weight; want lora_A.weight"),
    (lora_pairs, (PAIR | {"q.lora_A.b.weight": A},), "'q.lora_A.b.weight' is of a second adapter"),
    (lora_pairs, (PAIR | lora(),), f"'{PREFIX}q.lora_A.weight' is of a second adapter"),
    (lora_pairs, (TWO,), "'q.lora_B.two.weight' is of a second adapter"),
    (lora_pairs, ({"q.lora_A": A, "q.lora_B": B},), r"'q.lora_A' lacks '.weight' \(loralib\?\)"),
    (lora_pairs, (PAIR | {"q.lora_B.weight": B[:, :2]},), r"'q': B \(2, 2\), A \(4, 3\); want"),
    (lora_pairs, (PAIR | {"q.lora_B.weight": B / 0},), "'q': B: found .* summing to inf"),
    (lora_pairs, (PAIR | CODES,), "'q': B: found torch.float8_e4m3fn .*want finite floats"),
    (lora_pairs, (PAIR, lora_config(peft_type="ADALORA")), "peft_type=ADALORA: no LoRA"),
    (lora_pairs, (PAIR, lora_config(use_qalora=True)), "use_qalora=True: QALoRA"),
    (lora_pairs, (PAIR, lora_config(trainable_token_indices=[1])), "trainable_token_indices"),
    (lora_pairs, (PAIR, lora_config(lora_alpha=1e300)), "'q': s·B: found .* summing to inf"),
    (lora_pairs, (PAIR, lora_config(lora_alpha="16")), "'q': lora_alpha is '16'; want a number"),
]


@pytest.mark.parametrize("read, given, words", ADAPTERS)
def test_a_broken_adapter_is_refused(read, given, words):
    refused(lambda: read(*given), words)


@pytest.mark.parametrize(
    "given, words",
    [
        (({key: np.ones(value.shape) for key, value in PAIR.items()},), "a ndarray; want a"),
        ((PAIR, peft.LoraConfig()), "LoraConfig; want a mapping"),
        (([A, B],), "state_dict is a list; want"),
    ],
)
def test_what_is_no_state_dict_or_config_is_refused(given, words):
    refused(lambda: lora_pairs(*given), words, TypeError)


# -------------------------------------------------------------------------------- real adapters

DATA = os.environ.get("REFERENCE_DATA")
real = pytest.mark.skipif(not DATA, reason="REFERENCE_DATA is unset: no folder of real adapters")


def real_adapters(pattern):
    """The adapters in the folders of the pattern."""
    found = []
    for folder in sorted(Path(DATA).glob(pattern)):
        config = json.loads((folder / "adapter_config.json").read_text())
        found.append(lora_pairs(load_file(folder / "adapter_model.safetensors"), config))
    return found


@real
def test_every_real_adapter_is_read_with_its_head_left_alone():
    found = real_adapters("adapters/*/")
    assert len(found) == 11
    assert all(found)


@real
def test_real_adapters_recycle_exactly_and_an_update_in_batches_keeps_its_share():
    found = real_adapters("vtab-lora/*/")
    assert len(found) == 14
    assert {len(adapter) for adapter in found} == {24}
    adapters = [{"q": adapter[sorted(adapter)[0]]} for adapter in found]
    first, whole = recycle(adapters, k=32)["q"], recycle(adapters)["q"]
    grown = update(recycle(adapters[:10]), adapters[10:])["q"]
    shared = recycle(adapters[:5], k=0.9)
    for start in (5, 10):
        shared = update(shared, adapters[start : start + 5], k=0.9)
    for side, X in zip("AB", both_stacks(adapters), strict=True):
        some, every, later = (getattr(subspace, side) for subspace in (first, whole, grown))
        sigma, V = svd(X)
        orthonormal(some.V, F32)
        for held in (some, every):
            wanted = sigma[: len(held.V)].float()
            close(held.singular_values, wanted, eps(F32) * sigma[0])
        gap = sigma[0] ** 2 / (sigma[31] ** 2 - sigma[32] ** 2)
        bound = 8 * max(X.shape) * eps(F64) * gap + 1e-6
        close(projector(some.V), projector(V[:32]), bound)
        close(later.singular_values, every.singular_values, 64 * 2 * eps(F32) * sigma[0])
        kept = getattr(shared["q"], side)
        assert kept.singular_values.double().square().sum() >= (0.9 - 1e-6) * kept.energy
        assert (X @ kept.V.T.double()).square().sum() >= (0.9 - 1e-6) * X.square().sum()


# ------------------------------------------------------------------------- ReSoRA on PEFT's LoRA


def with_peft(name="default", **options):
    """A model of three Linears with PEFT's LoRA, and its config."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    config = dict(r=3, target_modules=["0", "2", "4"], init_lora_weights=False) | options
    return peft.get_peft_model(base, peft.LoraConfig(**config), adapter_name=name), config


def wanted(model, inputs, metric="linear", names=("default",)):
    """The mean of R by hand, from {index of a layer: its input}."""
    values = []
    for i, x in inputs.items():
        layer = model.base_model.model[i]
        B = torch.cat([layer.lora_B[n].weight * layer.scaling[n] for n in names], 1)
        A = torch.cat([layer.lora_A[n].weight for n in names])
        values.append(redundancy(B, x.detach() @ A.T, metric))
    return sum(values) / len(values)


def watched(model):
    """{index of a layer: its latest input}, which fills as the model runs."""
    inputs = {}
    for i in (0, 2, 4):

        def keep(layer, args, i=i):
            inputs[i] = args[0]

        model.base_model.model[i].register_forward_pre_hook(keep)
    return inputs


EXTRAS = [{}, dict(lora_dropout=0.5), dict(use_rslora=True, lora_alpha=5), dict(lora_bias=True)]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("extra", EXTRAS)
def test_the_penalty_has_the_codes_of_every_layer(metric, extra):
    model, _ = with_peft("mine", **extra)
    base, inputs = model.base_model.model, watched(model)
    with ReSoRA(model, metric) as regularizer:
        model(torch.randn(50, 8))
        value = regularizer.penalty()
    close(value, wanted(model, inputs, metric, ["mine"]), 1000 * eps(F32))
    value.backward()
    assert all(base[i].lora_A["mine"].weight.grad.abs().max() > 0 for i in (0, 2, 4))
    assert not base[1]._forward_pre_hooks


def test_the_active_adapters_are_one_set_of_components_and_a_layer_without_one_is_named():
    model, config = with_peft("one")
    model.add_adapter("two", peft.LoraConfig(**config | dict(r=2)))
    model.add_adapter("last", peft.LoraConfig(**config | dict(target_modules=["4"])))
    base, inputs = model.base_model.model, watched(model)
    model.set_adapter("last")
    with ReSoRA(model) as regularizer:
        model(torch.randn(50, 8))
        only = {4: inputs[4]}  # the other layers have adapters, but none that is active
        close(regularizer.penalty(), wanted(model, only, names=["last"]), 1000 * eps(F32))
    model.set_adapter("one")
    with ReSoRA(model) as regularizer:
        for active in (["one"], ["two"], ["one", "two"]):
            model.base_model.set_adapter(active)
            model(torch.randn(50, 8))
            value = regularizer.penalty()
            close(value, wanted(model, inputs, names=active), 1000 * eps(F32))
        value.backward()
        assert all(base[0].lora_A[name].weight.grad.abs().max() > 0 for name in active)
        model.set_adapter("last")
        model(torch.randn(50, 8))
        refused(regularizer.penalty, "0: found no active adapter")


def test_a_merged_or_disabled_adapter_has_no_penalty_and_other_forwards_are_not_the_step():
    model, _ = with_peft()
    regularizer, x = ReSoRA(model), torch.randn(9, 8)
    with model.disable_adapter():
        model(x)
    refused(regularizer.penalty, "found no input")
    model(x)
    model.merge_adapter()
    for call in (regularizer.penalty, lambda: ReSoRA(model)):
        refused(call, "0: found a merged adapter; want plain")
    assert regularizer.inputs == {}
    regularizer.remove()
    assert not any(m._forward_pre_hooks for m in model.modules())
    model.unmerge_adapter()
    inputs = watched(model)
    with ReSoRA(model) as regularizer:
        model(x)
        value = wanted(model, inputs)
        model.base_model(torch.randn(1, 8))  # generate() runs what is inside
        with torch.no_grad(), model.disable_adapter():
            model(torch.randn(2, 8))  # a reference pass
        close(regularizer.penalty(), value, 1000 * eps(F32))
        with torch.no_grad():
            model(x)
        assert regularizer.inputs == {}  # a rollout keeps nothing


class Experts(nn.Module):
    """A layer whose weights are a bare parameter."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.ones(2, 4, 4))

    def forward(self, x):
        return torch.einsum("nd,edo->no", x, self.up)


FIRST = dict(r=2, target_modules=["0"])
PLAIN, KASA = peft.LoraConfig(**FIRST), peft.LoraConfig(**FIRST, kasa_config=peft.KasaConfig())
BARE = peft.LoraConfig(r=2, target_modules=[], target_parameters=["0.up"])
ADALORA = peft.AdaLoraConfig(init_r=3, target_r=2, target_modules=["0"], total_step=10)
VARIANTS = [
    (nn.Conv2d(3, 4, 3), PLAIN, "0: found a Conv2d that is no Linear; want plain"),
    (nn.Embedding(5, 4), PLAIN, "0: found lora_embedding_A.default.*want plain"),
    (nn.Linear(4, 3), peft.LoraConfig(**FIRST, use_dora=True), "0: found Dora.*want plain"),
    (nn.MultiheadAttention(4, 2), PLAIN, "0: found an nn.MultiheadAttention; want plain"),
    (nn.Linear(4, 3), KASA, "0: found Kasa.*lora_.*want plain"),
    (Experts(), BARE, "found target_parameters up; want plain"),
    (nn.Linear(4, 3), ADALORA, "found no LoRALinear and no PEFT LoRA in PeftModel"),
]


@pytest.mark.parametrize("layer, config, words", VARIANTS)
def test_what_is_no_plain_lora_of_a_linear_is_refused(layer, config, words):
    model = peft.get_peft_model(nn.Sequential(layer), config)
    refused(lambda: ReSoRA(model), words)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_compiled_model_and_one_in_half_precision_count_alike():
    model, _ = with_peft()
    x = torch.randn(9, 8)
    with ReSoRA(model) as regularizer:
        model(x)
        value = regularizer.penalty()
        torch.compile(model, backend="aot_eager")(x)
        close(regularizer.penalty(), value, 100 * eps(F32))
        torch.compiler.reset()
        model.base_model.model.to(BF16)(x.to(BF16))  # not a forward of the model attached to
        refused(regularizer.penalty, "found no input")
        model(x.to(BF16))
        close(regularizer.penalty(), value, 20 * eps(BF16))
