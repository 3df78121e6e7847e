"""eigenlorax.py and PEFT: what it saves is read with the right ΔW or refused, and back again."""

import json
import os
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import eigenlorax
from eigenlorax import adapt, lora_pairs, recycle, serving, to_peft, update
from tests.checks import F32, F64, close, eps, exactly, normal, seeded
from tests.test_eigenlorax import both_stacks, orthonormal, projector, svd
from tests.test_eigenlorax_layer import IDS, NAMES, some_adapters, tiny_bert

A, B = torch.ones(4, 3), torch.ones(2, 4)
PAIR = {"q.lora_A.weight": A, "q.lora_B.weight": B}


def saved(folder, **options):
    """Save a LoRA of tiny_bert with random weights; return (state dict, config, its logits)."""
    config = peft.LoraConfig(**({"target_modules": ["query", "value"], "r": 4} | options))
    model = peft.get_peft_model(tiny_bert(), config).eval()
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if "lora_" in name or "modules_to_save" in name:
                p.copy_(0.3 * normal(i, *p.shape))
    model.save_pretrained(folder)
    stored = json.loads((Path(folder) / "adapter_config.json").read_text())
    state = load_file(Path(folder) / "adapter_model.safetensors")
    return state, stored, model(IDS).logits.detach()


PATTERNS = {
    "plain": {"lora_alpha": 12},
    "rslora": {"lora_alpha": 12, "use_rslora": True},
    "patterns": {
        "lora_alpha": 3,
        "use_rslora": True,
        "rank_pattern": {"layer.0.attention.self.query": 2, "value": 3},
        "alpha_pattern": {r"layer\.1\..*query": 7, "value": -5},
    },
    "gaussian": {"init_lora_weights": "gaussian"},
    "head": {"modules_to_save": ["classifier"]},
}


@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
def test_lora_pairs_gives_the_delta_that_peft_merges(options, tmp_path):
    state, config, logits = saved(tmp_path, **options)
    pairs = lora_pairs(state, config)
    assert len(pairs) == 4 and "bert.encoder.layer.1.attention.self.value" in pairs
    model = tiny_bert()
    merged = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path).merge_and_unload()
    for name, (b, a) in pairs.items():
        delta = merged.get_submodule(name).weight - model.get_submodule(name).weight
        close(b @ a, delta, 32 * eps(F32) * (1 + delta.abs().max()))
    layers = adapt(model, recycle([pairs]), rank=4)
    eigenlorax.set_task(layers, 0, pairs)
    if "modules_to_save" not in options:
        close(model(IDS).logits, logits, 1e-5)  # float32, logits of order 1, two layers
    named = {k.replace(".weight", ".default.weight"): v.half() for k, v in state.items()}
    bare = {k.removeprefix("base_model.model."): v for k, v in named.items()}
    found = lora_pairs(bare, config)
    assert found.keys() == pairs.keys() and all(b.dtype == F32 for b, _ in found.values())
    exactly(lora_pairs(state)[name][0], state[f"base_model.model.{name}.lora_B.weight"])


@pytest.mark.parametrize(
    "config, s",
    [
        (None, 1.0),  # only where nothing says otherwise
        ({"r": 4, "lora_alpha": 12}, 3.0),
        ({"peft_type": "LORA", "r": 4, "target_modules": ["q"]}, 2.0),  # PEFT's default, 8
        ({"peft_type": "LORA", "r": 4, "use_rslora": True}, 4.0),
        ({"r": 99, "lora_alpha": 12}, 3.0),  # r is the tensors'
        ({"lora_alpha": 1, "alpha_pattern": {"v": 4, "q": 8, "a.q": 20}}, 2.0),
        ({"lora_alpha": 1, "alpha_pattern": {"quer": 8}}, 0.25),
        ({"lora_alpha": 4, "base_model_name_or_path": "x/base.lora_merged"}, 1.0),
    ],
)
def test_the_scale_of_a_pair(config, s):
    pair = {f"a.{key}": value for key, value in PAIR.items()}
    b, a = lora_pairs(pair, config)["a.q"]
    exactly(b, s * B)
    exactly(a, A)


def test_an_alpha_beside_a_pair_is_folded_in_once():
    state = PAIR | {"q.alpha": torch.tensor(1.0)}
    exactly(lora_pairs(state)["q"][0], B / 4)
    with pytest.raises(ValueError, match=r"alpha is in the file and in the config"):
        lora_pairs(state, {"r": 4, "lora_alpha": 4})


HEADS = ["classifier.weight", "pre_classifier.bias", "score.weight", "classifier.dense.weight"]


@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_left_alone(head):
    assert list(lora_pairs(PAIR | {f"base_model.model.{head}": torch.ones(2)})) == ["q"]


ODD_KEYS = [
    "q.dora_scale",
    "q.lora_magnitude_vector",
    "q.lora_B.bias",
    "q.base_layer.bias",
    "q.lora_diag.weight",
    "model.norm.weight",
    "model.embed_tokens.weight",
    "k.lokr_w1",
    "k.to_k_lora.down.weight",
    "k.lora.down.weight",
    "k.hada_w1_a",
    "k.oft_R.weight",
    "k.hra_u",
    "k.ia3_l",
    "k.alpha",
    "k.lora_embedding_A",
    "h.0.mlp.fc.lokr_w1",
    "classifier.road_theta",
    "fc.oft_R.weight",
    "classifier.lokr_w1",
    "head.lora.down.weight",
    "head.to_k_lora.down.weight",
    "layers.0.fc.weight",
    "layer.0.attention.head.weight",
]


@pytest.mark.parametrize("key", ODD_KEYS)
def test_what_would_be_lost_beside_the_pairs_is_refused_by_name(key):
    with pytest.raises(ValueError, match=f"'{key}' would be lost") as error:
        lora_pairs(PAIR | {key: torch.ones(2)})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["weight", "bias", "dora_scale", "lora_magnitude_vector.weight"])
def test_what_else_a_layer_with_a_pair_has_is_no_head(part):
    state = {key.replace("q.", "classifier."): value for key, value in PAIR.items()}
    assert list(lora_pairs(state)) == ["classifier"]
    with pytest.raises(ValueError, match=f"'classifier.{part}' would be lost"):
        lora_pairs(state | {f"classifier.{part}": torch.ones(2)})


REFUSED = {
    "use_dora=True: DoRA also rescales": {"use_dora": True},
    "bias=all: a trained bias": {"bias": "all"},
    "lora_bias=True: a trained bias": {"lora_bias": True},
    "lora_embedding_A' would be lost": {"target_modules": ["query", "word_embeddings"]},
    "init_lora_weights=pissa: it may take its start off": {"init_lora_weights": "pissa"},
    "init_lora_weights=olora: it may take its start off": {"init_lora_weights": "olora"},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "LayerNorm.*would be lost": {"modules_to_save": ["LayerNorm"]},
    "kasa_config.*KaSA has a diagonal": {"kasa_config": peft.KasaConfig()}
    if hasattr(peft, "KasaConfig")
    else {"use_dora": True},
}


@pytest.mark.parametrize("message, options", REFUSED.items(), ids=REFUSED)
def test_adapters_that_are_more_than_a_product_are_refused_with_the_reason(
    message, options, tmp_path
):
    state, config, _ = saved(tmp_path, **options)
    with pytest.raises(ValueError, match=message) as error:
        lora_pairs(state, config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "state, config, message",
    [
        ({}, None, "found ; want"),
        ({"q.weight": B}, None, "'q.weight' would be lost"),
        ({"q.lora_A.weight": A}, None, "found q; want lora_A.weight, lora_B.weight"),
        ({"classifier.weight": A}, None, "found classifier.weight; want lora_A.weight"),
        (
            PAIR | {"q.lora_A.other.weight": A},
            None,
            "'q.lora_A.other.weight' is of a second adapter",
        ),
        (PAIR | {"q.lora_B.weight": B[:, :2]}, None, r"'q': B \(2, 2\), A \(4, 3\); want"),
        (
            {"q.lora_A.weight": torch.ones(1, 3, 3, 3), "q.lora_B.weight": torch.ones(2, 1, 1, 1)},
            None,
            r"'q': B: found .*\(2, 1, 1, 1\).*; want finite floats \(m, n\)",
        ),
        (PAIR, {"peft_type": "ADALORA"}, "peft_type=ADALORA: no LoRA"),
        (PAIR, {"use_qalora": True}, "use_qalora=True: QALoRA"),
        (PAIR | {"q.lora_B.weight": B * torch.nan}, None, "'q': B: found .* summing to nan"),
        (PAIR, {"lora_alpha": 1e300, "r": 4}, "'q': s·B: found .* summing to inf"),
        ({"q.lora_A": A, "q.lora_B": B}, None, r"'q.lora_A' lacks '.weight' \(loralib\?\)"),
        (PAIR, {"lora_alpha": "16"}, "'q': lora_alpha is '16'; want a number"),
        (
            {"q.lora_A.one.weight": A, "q.lora_B.two.weight": B},
            None,
            "'q.lora_B.two.weight' is of a second adapter",
        ),
        (PAIR | {"q.lora_B.weight": B.to(torch.float8_e4m3fn)}, None, "'q': B: found torch.float8"),
    ],
)
def test_broken_state_dicts_are_one_line_errors(state, config, message):
    with pytest.raises(ValueError, match=message) as error:
        lora_pairs(state, config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: lora_pairs({k: np.ones(v.shape) for k, v in PAIR.items()}), "a ndarray; want a"),
        (lambda: lora_pairs(PAIR, peft.LoraConfig()), "LoraConfig; want a mapping"),
        (lambda: lora_pairs([A, B]), "state_dict is a list; want"),
        (
            lambda: adapt(nn.Sequential(nn.Linear(3, 2)), {"0": (B, A)}),
            "0: the subspace is a tuple",
        ),
        (lambda: recycle({"q": (B, A)}), "found one dict; want a list of adapters"),
        (lambda: recycle([PAIR]), "found a Tensor; want a pair"),
        (lambda: recycle([(B, A)]), "found a tuple; want adapters"),
        (lambda: recycle([{"q": (B.numpy(), A.numpy())}]), "B is a ndarray; want a torch tensor"),
    ],
)
def test_what_is_no_adapter_gets_a_sentence(call, message):
    with pytest.raises(TypeError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_lora_pairs_reads_shapes_on_the_meta_device():
    state = {key: value.to("meta") for key, value in PAIR.items()}
    assert lora_pairs(state, {"r": 4, "lora_alpha": 2})["q"][0].shape == (2, 4)


@pytest.mark.parametrize("mixed", [False, True])
def test_peft_loads_an_exported_task_with_equal_logits(mixed, tmp_path):
    generator = seeded(0)
    model = tiny_bert()
    names = [f"bert.{name}" for name in NAMES]
    adapters = some_adapters(generator, [3, 3], dict.fromkeys(names, (16, 16)))
    layers = {}
    for i, (name, subspace) in enumerate(recycle(adapters, k=4).items()):
        options = {"tasks": 2, "scaling": 0.3, "init": "random", "generator": generator}
        layers |= adapt(model, {name: subspace}, rank=1 + i % 3 if mixed else 2, **options)
    head = {"classifier." + k: v + 1 for k, v in model.classifier.state_dict().items()}
    state, config = to_peft(layers, 1, head)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.save(state, tmp_path / "adapter_model.bin")
    loaded = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    model.classifier.load_state_dict({k.removeprefix("classifier."): v for k, v in head.items()})
    with serving(layers, 1):
        wanted = model(IDS).logits
    close(loaded(IDS).logits, wanted, 1e-5)  # float32, logits of order 1
    assert (tiny_bert()(IDS).logits - wanted + 1).abs().max() > 0.01
    pairs = lora_pairs(state, config)
    for name, layer in layers.items():
        b, a = layer.pair(1)
        close(pairs[name][0] @ pairs[name][1], b @ a, 1e-6)


DATA = os.environ.get("REFERENCE_DATA")
real = pytest.mark.skipif(not DATA, reason="REFERENCE_DATA is unset: no folder of real adapters")


def real_adapters(pattern):
    """The adapters in the folders of the pattern."""
    adapters = []
    for folder in sorted(Path(DATA).glob(pattern)):
        config = json.loads((folder / "adapter_config.json").read_text())
        adapters.append(lora_pairs(load_file(folder / "adapter_model.safetensors"), config))
    return adapters


@real
def test_real_adapters_recycle_exactly():
    adapters = real_adapters("vtab-lora/*/")
    assert len(adapters) == 14 and {len(adapter) for adapter in adapters} == {24}
    name = sorted(adapters[0])[0]
    adapters = [{"q": adapter[name]} for adapter in adapters]
    found, whole = recycle(adapters, k=32)["q"], recycle(adapters)["q"]
    grown = update(recycle(adapters[:10]), adapters[10:])["q"]
    for side in ("A", "B"):
        X = both_stacks(adapters)["AB".index(side)]
        one, every, later = (getattr(s, side) for s in (found, whole, grown))
        sigma, V = svd(X)
        orthonormal(one.V, F32)
        for k in (one, every):
            close(k.singular_values, sigma[: len(k.V)].float(), eps(F32) * sigma[0])
        gap = sigma[0] ** 2 / (sigma[31] ** 2 - sigma[32] ** 2)
        close(projector(one.V), projector(V[:32]), 8 * max(X.shape) * eps(F64) * gap + 1e-6)
        close(later.singular_values, every.singular_values, 64 * 2 * eps(F32) * sigma[0])


@real
def test_every_real_adapter_is_read_with_its_head_left_alone():
    adapters = real_adapters("adapters/*/")
    assert len(adapters) == 11 and all(adapters)


@real
def test_an_update_in_batches_keeps_the_share_on_real_adapters():
    adapters = real_adapters("vtab-lora/*/")
    name = sorted(adapters[0])[0]
    adapters = [{"q": adapter[name]} for adapter in adapters]
    found = recycle(adapters[:5], k=0.9)
    for start in (5, 10):
        found = update(found, adapters[start : start + 5], k=0.9)
    for side, X in zip((found["q"].A, found["q"].B), both_stacks(adapters), strict=True):
        held = float(side.singular_values.double().square().sum())
        share = float((X @ side.V.T.double()).square().sum() / X.square().sum())
        assert held >= (0.9 - 1e-6) * side.energy and share >= 0.9 - 1e-6
