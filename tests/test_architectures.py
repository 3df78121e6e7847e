"""Every architecture of the papers, tiny and random, with each method: an adapter's whole life.

From transformers' configurations, without a download. GPT-2's Conv1D is no nn.Linear, holds its
weight the other way round, and is refused; with Linears in its place GPT-2 is like any other.
"""

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import resora
from tests.checks import F32, close, eps
from tests.test_layers import METHODS, adapt, fill, trained

TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
IMAGE = dict(image_size=4, patch_size=2)
TEXT = dict(vocab_size=20, max_position_embeddings=32)
ENDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
SWIN = dict(image_size=8, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2)
CLIP = dict(text_config=TINY | TEXT | ENDS, vision_config=TINY | IMAGE, projection_dim=8)
DEBERTA = dict(relative_attention=True, position_buckets=4, pos_att_type="p2c|c2p")
DEBERTA |= dict(share_att_key=True, norm_rel_ebd="layer_norm")
GROUPED = dict(num_key_value_heads=1, sliding_window=4)
GPT2 = dict(n_embd=16, n_layer=2, n_head=2, n_positions=32)
RESNET = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
QV = ["q_proj", "v_proj"]
VIT = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
BERT = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# name: (its configuration, the head, what HRA adapts: every Linear of the blocks, how many these
# are; what the others adapt: q, v or so, how many these are)
AUTO = transformers.AutoModel
IMAGES = transformers.AutoModelForImageClassification
CLASSES = transformers.AutoModelForSequenceClassification
TOKENS = transformers.AutoModelForCausalLM
ARCHITECTURES = {
    "vit": (TINY | IMAGE, IMAGES, VIT, 12, QV, 4),
    "dinov2": (TINY | IMAGE, IMAGES, VIT, 12, QV, 4),
    "swin": (SWIN, IMAGES, VIT, 12, QV, 4),
    "clip": (CLIP, AUTO, [*VIT[:3], "out_proj", "fc1", "fc2"], 24, QV, 8),
    "bert": (TINY | TEXT, CLASSES, BERT, 12, ["query", "value"], 4),
    "roberta": (TINY | TEXT, CLASSES, BERT, 12, ["query", "value"], 4),
    "deberta-v2": (
        TINY | TEXT | DEBERTA,
        CLASSES,
        ["query_proj", "key_proj", "value_proj", *BERT[3:]],
        12,
        ["query_proj", "value_proj"],
        4,
    ),
    "llama": (TINY | TEXT | ENDS, TOKENS, LLAMA, 14, QV, 4),
    "mistral": (TINY | TEXT | ENDS | GROUPED, TOKENS, LLAMA, 14, LLAMA[:3], 6),
    "gpt2": (GPT2 | TEXT | ENDS, TOKENS, ["c_attn", "c_proj", "c_fc"], 8, ["c_attn"], 2),
    "resnet": (RESNET, IMAGES, ["convolution"], 6, None, 0),
}


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model in evaluation mode, whose outputs do not hang on a tie, and a batch for it."""
    options, kind, *_ = ARCHITECTURES[name]
    transformers.set_seed(0)
    model = kind.from_config(transformers.AutoConfig.for_model(name, **options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    size = options.get("image_size", 32 if name == "resnet" else 4)
    ids = torch.randint(3, 20, (3, 7))
    ids[:, -1] = ENDS["eos_token_id"]  # where CLIP's text model looks
    batch = {"pixel_values": torch.randn(3, 3, size, size), "input_ids": ids}
    return model, batch if name == "clip" else {model.main_input_name: batch[model.main_input_name]}


def with_linears(model: nn.Module) -> nn.Module:
    """GPT-2 with an nn.Linear for every Conv1D: the same function."""
    for name, conv in [(n, m) for n, m in model.named_modules() if isinstance(m, Conv1D)]:
        linear = nn.Linear(*conv.weight.shape)
        linear.weight, linear.bias = nn.Parameter(conv.weight.detach().T), conv.bias
        model.set_submodule(name, linear)
    return model


def outputs_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found = model(**batch)
    return found.logits_per_image if "logits_per_image" in found else found.logits


def alike(found: Tensor, wanted: Tensor) -> None:
    """Up to float32's rounding in a few dozen layers of sums of up to 24 products."""
    close(found, wanted, 500 * eps(F32) * wanted.abs().max())


@pytest.mark.parametrize("method", METHODS)
def test_gpt2s_conv1d_is_refused(method):
    model, _ = build("gpt2")
    with pytest.raises(ValueError, match=r"c_attn.*Conv1D"):
        METHODS[method].adapt(model, {"c_attn": None})  # only the names are looked at
    assert isinstance(model.transformer.h[0].attn.c_attn, Conv1D)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_lives_with_a_method(name, method, tmp_path):
    """It is adapted, starts at W, trains, is saved and loaded, merged, and writes text."""
    model, batch = build(name)
    *_, every, count, some, few = ARCHITECTURES[name]
    targets, count = (every, count) if method == "hra" else (some, few)
    if targets is None:
        pytest.skip("a convolution is adapted by HRA alone")
    before = outputs_of(model, batch).detach()
    if name == "gpt2":
        alike(outputs_of(with_linears(model), batch), before)
    bare, rank = copy.deepcopy(model), 2
    ends = tuple(f".{target}" for target in targets)
    kinds = nn.Linear, nn.Conv2d
    plain = {n: m for n, m in model.named_modules() if isinstance(m, kinds) and n.endswith(ends)}
    names = [*plain] if method == "eigenlorax" else targets

    layers = adapt(method, model, names, rank)
    assert set(layers) == set(plain) and len(plain) == count
    numbers = 0  # by the formulas of README's table
    for o, d in (m.weight.flatten(1).shape for m in plain.values()):
        numbers += {"hra": d * rank, "resora": (d + o) * rank, "eigenlorax": 2 * 4 * rank}[method]
    assert sum(p.numel() for p in trained(model).values()) == numbers
    alike(outputs_of(model, batch), before)  # every method starts at W

    regularizer = resora.ReSoRA(model) if method == "resora" else None
    after = outputs_of(fill(model), batch)
    assert (after - before).abs().max() > 0.01 * before.abs().max()
    loss = after.square().mean()
    if method == "hra":
        loss = loss + sum(m.penalty() for m in layers.values())
    if method == "resora":
        loss = loss + regularizer.penalty()
    loss.backward()
    for n, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, n
        assert p.grad is None or (p.grad.isfinite().all() and p.grad.abs().max() > 0), n

    save_file({n: p.detach() for n, p in trained(model).items()}, tmp_path / "adapter.safetensors")
    again = copy.deepcopy(bare)
    adapt(method, again, names, rank, seed=1)
    unexpected = again.load_state_dict(load_file(tmp_path / "adapter.safetensors"), False)[1]
    assert unexpected == [] and torch.equal(outputs_of(again, batch), after)

    merged = METHODS[method].merge(copy.deepcopy(again))
    assert [type(m) for m in merged.modules()] == [type(m) for m in bare.modules()]
    alike(outputs_of(merged, batch), after)
    if ARCHITECTURES[name][1] is TOKENS:
        same = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)
        by_adapter, by_merged, without_cache, by_bare = (
            m.generate(batch["input_ids"], use_cache=cache, **same)
            for m, cache in ((again, True), (merged, True), (again, False), (bare, True))
        )
        assert by_adapter.shape == (3, 19)
        assert torch.equal(by_adapter, by_merged) and torch.equal(by_adapter, without_cache)
        assert not torch.equal(by_adapter, by_bare)
