"""Every architecture of the papers, tiny and random, with each method: an adapter's whole life.

From transformers' configurations, without a download. GPT-2's Conv1D is no nn.Linear, holds its
weight the other way round, and is refused; with Linears in its place GPT-2 is like any other.
"""

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import eigenlorax
import hra
import resora

TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
IMAGE = dict(image_size=4, patch_size=2)
TEXT = dict(vocab_size=20, max_position_embeddings=32)
ENDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
VISION = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
BERT = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = {"hra": hra, "resora": resora, "eigenlorax": eigenlorax}
RANK, K, TASKS = 2, 3, 2

# name: (configuration, what HRA adapts: every Linear of the blocks; what the others do: q, v or so)
ARCHITECTURES = {
    "vit": (transformers.ViTConfig(**TINY, **IMAGE), VISION, ["q_proj", "v_proj"]),
    "dinov2": (transformers.Dinov2Config(**TINY, **IMAGE), VISION, ["q_proj", "v_proj"]),
    "swin": (
        transformers.SwinConfig(
            image_size=8, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2
        ),
        VISION,
        ["q_proj", "v_proj"],
    ),
    "clip": (
        transformers.CLIPConfig(
            text_config={**TINY, **TEXT, **ENDS}, vision_config=TINY | IMAGE, projection_dim=8
        ),
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        ["q_proj", "v_proj"],
    ),
    "bert": (transformers.BertConfig(**TINY, **TEXT), BERT, ["query", "value"]),
    "roberta": (transformers.RobertaConfig(**TINY, **TEXT), BERT, ["query", "value"]),
    "deberta-v3": (
        transformers.DebertaV2Config(
            **TINY,
            **TEXT,
            relative_attention=True,
            position_buckets=4,
            pos_att_type="p2c|c2p",
            share_att_key=True,
            norm_rel_ebd="layer_norm",
        ),
        ["query_proj", "key_proj", "value_proj", *BERT[3:]],
        ["query_proj", "value_proj"],
    ),
    "llama": (transformers.LlamaConfig(**TINY, **TEXT, **ENDS), LLAMA, ["q_proj", "v_proj"]),
    "mistral": (
        transformers.MistralConfig(**TINY, **TEXT, **ENDS, num_key_value_heads=1, sliding_window=4),
        LLAMA,
        ["q_proj", "k_proj", "v_proj"],
    ),
    "gpt2": (
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **TEXT, **ENDS),
        ["c_attn", "c_proj", "c_fc"],
        ["c_attn"],
    ),
    "resnet": (
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
        ),
        ["convolution"],
        None,
    ),
}
LAYERS = {"clip": (24, 8), "llama": (14, 4), "mistral": (14, 6), "gpt2": (8, 2), "resnet": (6, 0)}
DECODERS = ("llama", "mistral", "gpt2")


def build(name: str) -> tuple[nn.Module, dict]:
    """A model in evaluation mode, whose outputs do not hang on a tie, and a batch for it."""
    config = ARCHITECTURES[name][0]
    kind = {
        "clip": transformers.AutoModel,
        **dict.fromkeys(DECODERS, transformers.AutoModelForCausalLM),
        **dict.fromkeys(
            ("bert", "roberta", "deberta-v3"), transformers.AutoModelForSequenceClassification
        ),
    }.get(name, transformers.AutoModelForImageClassification)
    transformers.set_seed(0)
    model = kind.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 32)
    batch = {
        "pixel_values": torch.randn(3, 3, size, size),
        "input_ids": torch.randint(3, 20, (3, 7)),
    }
    if name == "clip":
        batch["input_ids"][:, -1] = ENDS["eos_token_id"]  # where its text model looks
        return model, batch
    return model, {model.main_input_name: batch[model.main_input_name]}


def with_linears(model: nn.Module) -> nn.Module:
    """GPT-2 with an nn.Linear for every Conv1D: the same function."""
    for name, conv in [(n, m) for n, m in model.named_modules() if isinstance(m, Conv1D)]:
        linear = nn.Linear(*conv.weight.shape)
        linear.weight, linear.bias = nn.Parameter(conv.weight.detach().T), conv.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    return model


def layers_of(model: nn.Module, targets: list[str]) -> dict[str, nn.Module]:
    """The layers that the targets mean, found without the methods' help."""
    ends = tuple(f".{t}" for t in targets)
    kinds = nn.Linear, nn.Conv2d
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) and n.endswith(ends)}


def adapted(method: str, model: nn.Module, targets: list[str], seed: int) -> dict[str, nn.Module]:
    """{name: module} of a model that a method has adapted, with random numbers by a seed."""
    generator = torch.Generator().manual_seed(seed)
    if method == "eigenlorax":
        fixed = torch.Generator().manual_seed(9)  # the recycled adapters are the same for any seed
        draw = lambda *shape: torch.randn(*shape, generator=fixed)  # noqa: E731
        shapes = {n: layer.weight.shape for n, layer in layers_of(model, targets).items()}
        adapters = [{n: (draw(o, 2), draw(2, d)) for n, (o, d) in shapes.items()} for _ in range(3)]
        subspaces = eigenlorax.recycle(adapters, k=K)
        return eigenlorax.adapt(model, subspaces, RANK, tasks=TASKS, generator=generator)
    return METHODS[method].adapt(model, targets, RANK, generator=generator)


def wanted_count(method: str, o: int, d: int) -> int:
    """Trained numbers of one layer by the formula of README's table."""
    return {"hra": d * RANK, "resora": (d + o) * RANK, "eigenlorax": TASKS * 2 * K * RANK}[method]


def outputs_of(model: nn.Module, batch: dict) -> torch.Tensor:
    found = model(**batch)
    logits = found.logits_per_image if "logits_per_image" in found else found.logits
    assert logits.isfinite().all()
    return logits


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Up to float32's rounding in a few dozen layers of sums of up to 24 products."""
    tolerance = 500 * torch.finfo(torch.float32).eps * wanted.abs().max()
    assert (found - wanted).abs().max() <= tolerance


@pytest.mark.parametrize("method", METHODS)
def test_gpt2s_conv1d_is_refused(method):
    model = build("gpt2")[0]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="c_attn.*Conv1D"):
        METHODS[method].adapt(model, {"c_attn": None})  # only the names are looked at
    assert isinstance(model.transformer.h[0].attn.c_attn, Conv1D)
    assert flags == [p.requires_grad for p in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_lives_with_a_method(name, method, tmp_path):
    model, batch = build(name)
    targets = ARCHITECTURES[name][1 if method == "hra" else 2]
    if targets is None:
        pytest.skip("a convolution is adapted by HRA alone")
    if name == "gpt2":
        before = outputs_of(model, batch)
        close(outputs_of(with_linears(model), batch), before)
    bare, before = copy.deepcopy(model), outputs_of(model, batch).detach()
    shapes = {n: layer.weight.flatten(1).shape for n, layer in layers_of(model, targets).items()}
    assert len(shapes) == LAYERS.get(name, (12, 4))[method != "hra"]

    modules = adapted(method, model, targets, seed=0)
    assert set(modules) == set(shapes)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == sum(
        wanted_count(method, *shape) for shape in shapes.values()
    )
    close(outputs_of(model, batch), before)  # every method starts at W

    with torch.no_grad():
        for p in trained.values():
            p += 0.6 * torch.randn_like(p)
    penalty = {
        "hra": lambda: sum(m.penalty() for m in modules.values()),
        "resora": resora.ReSoRA(model).penalty if method == "resora" else None,
        "eigenlorax": lambda: 0.0,
    }[method]
    after = outputs_of(model, batch)
    assert (after - before).abs().max() > 0.01 * before.abs().max()
    (after.square().mean() + penalty()).backward()
    for n, p in model.named_parameters():
        assert (p.grad is not None) == (n in trained), n
    for n, p in trained.items():
        task = p.grad[:1] if method == "eigenlorax" else p.grad  # the other task was not asked
        assert p.grad.isfinite().all() and task.abs().max() > 0, n

    save_file({n: p.detach() for n, p in trained.items()}, tmp_path / "adapter.safetensors")
    again = copy.deepcopy(bare)
    adapted(method, again, targets, seed=1)
    unexpected = again.load_state_dict(load_file(tmp_path / "adapter.safetensors"), False)[1]
    assert unexpected == [] and torch.equal(outputs_of(again, batch), after)

    merged = METHODS[method].merge(copy.deepcopy(again))
    assert [type(m) for m in merged.modules()] == [type(m) for m in bare.modules()]
    close(outputs_of(merged, batch), after)
    if name in DECODERS:
        same = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)
        prompt = batch["input_ids"]
        tokens = [
            m.generate(prompt, use_cache=cache, **same)
            for m, cache in ((again, True), (merged, True), (again, False), (bare, True))
        ]
        assert tokens[0].shape == (3, 19)
        assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2])
        assert not torch.equal(tokens[0], tokens[3])
