"""hra.py and PEFT: adapters go both ways, and what is no HRA adapter is refused by name."""

import copy
import json

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

import hra
from hra import HRALinear, adapt
from tests.checks import close, exactly, seeded
from tests.test_hra_layer import net

TARGETS = ["conv", "body.0", "body.2"]


@pytest.mark.parametrize("gs, rank", [(False, 4), (False, 7), (True, 4)])
def test_an_adapter_of_pefts_gives_the_same_here(gs, rank, tmp_path):
    model, x = net()
    config = peft.HRAConfig(r=rank, apply_GS=gs, init_weights=False, target_modules=TARGETS)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        theirs(x).square().sum().backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path)
    Us = hra.from_peft(safetensors.torch.load_file(tmp_path / "adapter_model.safetensors"))
    assert sorted(Us) == sorted(TARGETS)
    modules = adapt(model, list(Us), rank, init="random", strict=gs)
    for name, U in Us.items():
        modules[name].load_state_dict({"U": U}, strict=False)
    close(model(x), theirs(x), 1e-5)
    theirs.zero_grad()
    for m in (model, theirs):
        m(x).square().sum().backward()
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            mine = modules[name.removeprefix("base_model.model.").removesuffix(".hra_u.default")]
            close(mine.U.grad, p.grad, 1e-4 * p.grad.abs().max())


@pytest.mark.parametrize("gs, rank", [(False, 4), (False, 7), (True, 4)])
def test_an_adapter_of_ours_loads_in_peft(gs, rank, tmp_path):
    model, x = net()
    bare = copy.deepcopy(model)
    modules = adapt(model, TARGETS, rank, init="random", strict=gs, generator=seeded(1))
    config = peft.HRAConfig(r=rank, apply_GS=gs, target_modules=TARGETS)
    config.save_pretrained(tmp_path)
    safetensors.torch.save_file(hra.to_peft(modules), tmp_path / "adapter_model.safetensors")
    theirs = peft.PeftModel.from_pretrained(bare, tmp_path)
    close(theirs(x), model(x), 1e-5)
    close(theirs.merge_and_unload()(x), model(x), 1e-5)


def classifier() -> nn.Module:
    """A tiny BERT with a classification head, in evaluation mode."""
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    config = transformers.BertConfig(**sizes, vocab_size=20, max_position_embeddings=32)
    transformers.set_seed(0)
    return transformers.BertForSequenceClassification(config).eval()


IDS = torch.arange(21).view(3, 7) % 20


def test_a_head_that_peft_trained_beside_the_adapter(tmp_path):
    config = peft.HRAConfig(
        r=4, init_weights=False, target_modules=["query"], task_type=peft.TaskType.SEQ_CLS
    )
    theirs = peft.get_peft_model(classifier(), config)
    for p in theirs.parameters():
        p.data += 0.1 * p.requires_grad
    theirs.save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.classifier.weight" in state

    model, Us = classifier(), hra.from_peft(state)
    assert len(Us) == 2
    modules = adapt(model, list(Us), 4, init="random")
    for name, U in Us.items():
        modules[name].load_state_dict({"U": U}, strict=False)
    assert (model(IDS).logits - theirs(IDS).logits).abs().max() > 1e-2  # the head is left to do
    head = {k: v for k, v in state.items() if ".classifier." in k}
    head = {k.removeprefix("base_model.model."): v for k, v in head.items()}
    model.load_state_dict(head, strict=False)
    close(model(IDS).logits, theirs.eval()(IDS).logits, 1e-5)


def test_a_head_of_ours_loads_in_peft(tmp_path):
    model = classifier()
    modules = adapt(model, ["query"], 4, init="random", generator=seeded(1))
    model.classifier.weight.data += 1
    head = {f"classifier.{k}": v for k, v in model.classifier.state_dict().items()}
    state = hra.to_peft(modules, head)
    config = {"peft_type": "HRA", "r": 4, "target_modules": list(modules)}
    config["modules_to_save"] = ["classifier"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(state, tmp_path / "adapter_model.safetensors")
    theirs = peft.PeftModel.from_pretrained(classifier(), tmp_path).eval()
    close(theirs(IDS).logits, model(IDS).logits, 1e-5)
    Us = hra.from_peft(state)
    assert list(Us) == list(modules)
    for name, U in Us.items():
        exactly(U, modules[name].U.detach())


U = torch.ones(4, 2)
MORE = {  # a key beside base_model.model.p.hra_u: why it is refused
    "base_model.model.p.base_layer.bias": "trained bias",
    "base_model.model.q.base_layer.bias": "trained bias",
    "base_model.model.q.bias": "trained bias",
    "base_model.model.q.lora_A.weight": "unknown key, 'q.lora_A.weight'",
    "base_model.model.q.hra_u.default": "unknown key",
    "base_model.model..hra_u"[:-6]: "unknown key",
    "base_model.model..hra_u": "unknown key",
    "q.hra_u": "unknown key",
    "base_model.model.norm.weight": "unknown key, 'norm.weight'",
    "base_model.model.model.embed_tokens.weight": "unknown key",
    "base_model.model.k.lokr_w1": "unknown key",
    "k.to_k_lora.down.weight": "unknown key",
    "k.lora.down.weight": "unknown key",
    "k.hada_w1_a": "unknown key",
    "base_model.model.k.oft_R.weight": "unknown key",
    "base_model.model.k.ia3_l": "unknown key",
    "base_model.model.classifier.lora_A.weight": "unknown key, 'classifier.lora_A.weight'",
    "base_model.model.score.hra_u.default": "unknown key",
}


@pytest.mark.parametrize("key", MORE)
def test_what_is_no_hra_adapter_is_refused_by_name(key):
    with pytest.raises(ValueError, match=MORE[key]):
        hra.from_peft({"base_model.model.p.hra_u": U, key: U})


def test_a_bias_of_an_adapted_head_is_refused():
    keys = ["base_model.model.classifier.dense.hra_u", "base_model.model.classifier.dense.bias"]
    with pytest.raises(ValueError, match="trained bias, 'classifier.dense.bias'"):
        hra.from_peft(dict.fromkeys(reversed(keys), U))


def test_a_file_without_a_single_u_is_refused():
    keys = [f"base_model.model.q{i}.lora_A.weight" for i in range(99)]
    with pytest.raises(ValueError, match=r"\(99 in all\); want base_model.model.NAME.hra_u"):
        hra.from_peft(dict.fromkeys(keys, U))


def test_a_bias_that_peft_trained_is_refused(tmp_path):
    model, _ = net()
    config = peft.HRAConfig(r=4, target_modules=["body.0"], bias="hra_only")
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="trained bias, 'body.0.base_layer.bias'"):
        hra.from_peft(state)


def test_tensors_that_are_no_columns(tmp_path):
    for bad in (torch.ones(4), torch.ones(4, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"q.hra_u: found .*want floats \(d, r\)"):
            hra.from_peft({"base_model.model.q.hra_u": bad})
    shared = HRALinear(nn.Linear(4, 3), 2)
    tensors = hra.to_peft(
        {"a": shared, "b": shared}
    )  # two names, two tensors: safetensors wants it
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    exactly(hra.from_peft(tensors)["b"], shared.U.detach())
    assert not tensors["base_model.model.a.hra_u"].requires_grad


@pytest.mark.parametrize("name", ["layers.0.fc.weight", "head.lora.down.weight", "fc.road_theta"])
def test_a_trunk_tensor_or_another_methods_factor_is_no_head(name):
    with pytest.raises(ValueError, match=f"found an unknown key, '{name}'"):
        hra.from_peft(
            {
                "base_model.model.q.hra_u": torch.ones(1, 2),
                f"base_model.model.{name}": torch.ones(2),
            }
        )
