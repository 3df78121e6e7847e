"""resora.py on PEFT's LoRA: which layers count, what is refused, and the forwards that count."""

import peft
import pytest
import torch
from torch import nn

from resora import METRICS, ReSoRA, redundancy
from tests.checks import BF16, F32, close, eps


def with_peft(name="default", layers=("0", "2", "4"), **options):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    config = dict(r=3, target_modules=list(layers), init_lora_weights=False) | options
    return peft.get_peft_model(base, peft.LoraConfig(**config), adapter_name=name), config


def codes(layer, x, *names):
    B = torch.cat([layer.lora_B[n].weight * layer.scaling[n] for n in names], 1)
    return B, x.detach() @ torch.cat([layer.lora_A[n].weight for n in names]).T


def wanted(model, x, metric="linear", names=("default",)):
    """The mean of R by hand, from a forward in evaluation mode."""
    base, values = model.base_model.model, []
    with torch.no_grad():
        inputs = [x, base[:2](x), base[:4](x)]
    for i, h in zip((0, 2, 4), inputs, strict=True):
        values.append(redundancy(*codes(base[i], h, *names), metric))
    return sum(values) / 3


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "extra", [{}, dict(lora_dropout=0.5), dict(use_rslora=True, lora_alpha=5), dict(lora_bias=True)]
)
def test_the_codes_of_every_layer(metric, extra):
    model, _ = with_peft("my_adapter", **extra)
    base, x = model.base_model.model, torch.randn(50, 8)
    seen = []
    for i in (0, 2, 4):
        base[i].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with ReSoRA(model, metric) as regularizer:
        model(x)
        value = regularizer.penalty()
    pairs = [codes(base[i], h, "my_adapter") for i, h in zip((0, 2, 4), seen, strict=True)]
    close(value, sum(redundancy(B, S, metric) for B, S in pairs) / 3, 1000 * eps(F32))
    value.backward()
    assert all(base[i].lora_A["my_adapter"].weight.grad.abs().max() > 0 for i in (0, 2, 4))
    assert not base[1]._forward_pre_hooks


def test_several_active_adapters_are_one_set_of_components():
    model, config = with_peft("one")
    model.add_adapter("two", peft.LoraConfig(**config | dict(r=2)))
    x, base = torch.randn(50, 8), model.base_model.model
    with ReSoRA(model) as regularizer:
        for active in (["one"], ["two"], ["one", "two"]):
            model.base_model.set_adapter(active)
            model(x)
            value = regularizer.penalty()
            close(value, wanted(model, x, names=active), 1e3 * eps(F32))
        value.backward()
    assert all(base[0].lora_A[n].weight.grad.abs().max() > 0 for n in ("one", "two"))


def test_adapters_on_different_layers():
    model, _ = with_peft("one", layers=("0",))
    model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["4"], init_lora_weights=False))
    x, base = torch.randn(50, 8), model.base_model.model
    with ReSoRA(model) as regularizer:
        model.set_adapter("one")
        model(x)
        B, S = codes(base[0], x, "one")
        close(regularizer.penalty(), redundancy(B, S), 1e3 * eps(F32))
        model.set_adapter("two")
        model(x)
        with pytest.raises(ValueError, match="0: found no active adapter"):
            regularizer.penalty()


def test_merged_or_disabled():
    model, _ = with_peft()
    regularizer = ReSoRA(model)
    x = torch.randn(9, 8)
    with model.disable_adapter():
        model(x)
    with pytest.raises(ValueError, match="found no input"):
        regularizer.penalty()
    model(x)
    model.merge_adapter()
    with pytest.raises(ValueError, match="0: found a merged adapter; want plain"):
        regularizer.penalty()
    assert regularizer.inputs == {}
    regularizer.remove()
    with pytest.raises(ValueError, match="0: found a merged adapter; want plain"):
        ReSoRA(model)
    assert not any(m._forward_pre_hooks for m in model.modules())
    model.unmerge_adapter()
    with ReSoRA(model) as regularizer:
        model(x)
        close(regularizer.penalty(), wanted(model, x), 1e3 * eps(F32))


def test_generation_and_reference_passes_are_not_the_step():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20, num_key_value_heads=2))
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).train()
    ids, values = torch.arange(12).view(2, 6), []
    for between in (False, True):
        with ReSoRA(model) as regularizer:
            loss = model(input_ids=ids, labels=ids).loss
            if between:
                model.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
                with torch.no_grad(), model.disable_adapter():
                    model(input_ids=ids[:, :2])
                held = regularizer.inputs
                assert [len(x) for x in held.values()] == [1] * 4
            values.append(regularizer.penalty())
            loss.backward()
            model.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
            assert regularizer.inputs == {}  # a rollout keeps nothing
    close(values[1], values[0], 0)


def refused(config, match, base=None):
    base = nn.Sequential(nn.Linear(4, 3)) if base is None else base
    model = peft.get_peft_model(base, config)
    with pytest.raises(ValueError, match=match):
        ReSoRA(model)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_convolutions_are_refused():
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    config = peft.LoraConfig(r=2, target_modules=["0", "2"])
    refused(config, "0: found a Conv2d that is no Linear; want plain", base)


def test_embeddings_are_refused():
    base = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    config = peft.LoraConfig(r=2, target_modules=["0", "1"])
    refused(config, "0: found lora_embedding_A.default.*want plain", base)


def test_variants_are_refused():
    refused(peft.LoraConfig(r=2, target_modules=["0"], use_dora=True), "0: found Dora.*want plain")
    kasa = peft.LoraConfig(r=2, target_modules=["0"], kasa_config=peft.KasaConfig())
    refused(kasa, "0: found Kasa.*lora_.*want plain")


def test_an_adapter_of_a_bare_parameter_is_refused():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, 4, 4))

        def forward(self, x):
            return torch.einsum("nd,edo->no", x, self.up)

    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["0.up"])
    refused(config, "found target_parameters up; want plain", nn.Sequential(Experts()))


def test_another_method_is_no_lora():
    config = peft.AdaLoraConfig(init_r=3, target_r=2, target_modules=["0"], total_step=10)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
    with pytest.raises(ValueError, match="found no LoRALinear and no PEFT LoRA in PeftModel"):
        ReSoRA(model)


def test_compiled_and_half():
    model, _ = with_peft(lora_dropout=0.0)
    x = torch.randn(9, 8)
    with ReSoRA(model) as regularizer:
        model(x)
        value = regularizer.penalty()
        compiled = torch.compile(model, backend="aot_eager")
        compiled(x)
        close(regularizer.penalty(), value, 100 * eps(F32))
        torch.compiler.reset()
        model.base_model.model.to(BF16)(x.to(BF16))  # not a forward of the model attached to
        with pytest.raises(ValueError, match="found no input"):
            regularizer.penalty()
        model(x.to(BF16))
        close(regularizer.penalty(), value, 20 * eps(BF16))
