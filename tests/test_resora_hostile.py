"""resora.py given what it was not made for: the right value, or a refusal that names the fault."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from resora import LoRALinear, ReSoRA, adapt, merge, redundancy, redundancy_dense, regauge
from tests.checks import BF16, F32, F64, close, eps, exactly, normal

# --------------------------------------------------------------------------------- the functions


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (dict(metric="cosin"), "'cosin'"),
        (dict(sigma=0.0), "sigma=0.0"),
        (dict(beta=-1.0), "beta=-1.0"),
        (dict(beta=float("nan")), "beta=nan"),
        (dict(samples=1), "samples=1"),
        (dict(S=torch.ones(4, 3)), r"\(5, 2\), \(4, 3\)"),
        (dict(S=torch.ones(0, 2)), r"\(0, 2\)"),
        (dict(B=torch.ones(2)), r"\(2,\)"),
        (dict(B=torch.ones(3, 5, 2), S=torch.ones(3, 4, 2)), r"\(3, 5, 2\)"),
        (dict(S=torch.ones(4, 2, dtype=torch.int64)), "torch.int64"),
    ],
)
def test_wrong_arguments(arguments, wanted):
    arguments = dict(B=torch.ones(5, 2), S=torch.ones(4, 2)) | arguments
    for function in (redundancy, redundancy_dense):
        with pytest.raises(ValueError, match=wanted):
            function(**arguments)


@pytest.mark.parametrize(
    ("B", "A", "x"),
    [
        (torch.ones(4, 2), torch.ones(3, 5), None),
        (torch.ones(4), torch.ones(2, 5), None),
        (torch.ones(4, 2), torch.ones(2, 5), torch.ones(7, 4)),
        (torch.ones(4, 2) * torch.nan, torch.ones(2, 5), None),
        (torch.ones(4, 2), torch.ones(2, 5).long(), None),
    ],
)
def test_regauge_refuses_what_does_not_fit(B, A, x):
    with pytest.raises(ValueError, match="B, A, x: found .*want finite floats"):
        regauge(B, A, x)


def test_regauge_keeps_a_fresh_adapter():
    A = normal(0, 2, 5)
    B2, A2 = regauge(torch.zeros(4, 2), A, normal(1, 9, 5))
    exactly(B2, torch.zeros(4, 2))
    exactly(A2, A)
    assert A2 is not A and A2.data_ptr() != A.data_ptr()


# -------------------------------------------------------------------------------------- adapt


def test_targets_and_arguments_that_are_wrong_change_nothing():
    model = nn.ModuleDict({"query": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    model = nn.ModuleDict({"block": model, "head": nn.Linear(4, 2)})
    for targets, options, wanted in [
        (["query", "value"], {}, "no layer is named 'value'"),
        ([], {}, "found no targets"),
        ("norm", {}, "'norm' fits block.norm, a LayerNorm"),
        ("uery", {}, "no layer is named 'uery'"),
        ("query", dict(dropout=2.0), "block.query: found .*dropout=2.0"),
        ("query", dict(alpha=float("inf")), "alpha=inf"),
        (["head", "query"], dict(rank=0), "rank: found 0"),
    ]:
        with pytest.raises(ValueError, match=wanted):
            adapt(model, targets, **options)
    assert all(p.requires_grad for p in model.parameters())
    assert type(model.head) is type(model.block.query) is nn.Linear
    adapt(model, "query", 2)
    with pytest.raises(ValueError, match="fits block.query, a LoRALinear"):
        adapt(model, "query", 2)


def test_a_name_that_two_kinds_share_is_refused():
    model = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    model["b"] = nn.ModuleDict({"q": nn.Conv1d(4, 4, 1)})
    with pytest.raises(ValueError, match="'q' fits b.q, a Conv1d"):
        adapt(model, ["q"])
    assert model.a.q.weight.requires_grad


def test_a_long_list_of_names_is_cut():
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(1000))
    with pytest.raises(ValueError, match=r"0, 1, 2, 3, 4 … \(1000 in all\)") as caught:
        adapt(model, "query")
    assert len(str(caught.value)) < 200
    adapt(model, [str(i) for i in range(1000)], rank=1)
    with pytest.raises(ValueError, match=r"found no input of 0, 1, 2, 3, 4 … \(1000 in all\)"):
        ReSoRA(model).penalty()


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "8"])
def test_wrong_rank(rank):
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=f"0: rank: found {rank!r}"):
        adapt(model, "0", rank)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_what_is_no_linear():
    for base in (nn.Tanh(), nn.Linear(0, 3), nn.Linear(3, 0), nn.Embedding(3, 2)):
        with pytest.raises(TypeError, match=f"found {type(base).__name__}, want an nn.Linear"):
            LoRALinear(base)


# ----------------------------------------------------------------------- bases that are not plain


class Quantised(nn.Linear):
    """A Linear whose weight is kept in a smaller dtype, beside a scale."""

    def __init__(self, d, o, dtype):
        super().__init__(d, o, bias=False)
        self.scale = self.weight.detach().abs().max() / 100
        self.weight = nn.Parameter((self.weight.detach() / self.scale).to(dtype), False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


class Wrapped(nn.Module):
    """The same without being an nn.Linear."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.weight, self.bias = linear, linear.weight, None
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("wrap", [False, True])
def test_a_quantised_base_is_called_not_opened(dtype, wrap):
    base = Quantised(6, 5, dtype)
    base = Wrapped(base) if wrap else base
    layer = LoRALinear(base, 2)
    nn.init.normal_(layer.B)
    x = torch.randn(3, 6)
    close(layer(x), base(x) + x @ layer.A.T @ layer.B.T, 50 * eps(F32))
    layer(x).sum().backward()
    assert layer.A.dtype == layer.B.grad.dtype == F32
    assert hasattr(layer, "weight") and layer.weight is base.weight  # as T5 reads wo's
    model = nn.Sequential(nn.Linear(6, 6), layer)
    with pytest.raises(TypeError, match=f"1: base.weight: found {dtype}, want .* to merge"):
        merge(model)
    assert model[1] is layer


def test_a_base_that_computes_something_else_is_not_merged():
    class Standardised(nn.Linear):
        def forward(self, x):
            W = self.weight
            return F.linear(x, (W - W.mean(1, keepdim=True)) / W.std(1, keepdim=True), self.bias)

    base = Standardised(6, 5)
    model, x = nn.Sequential(base, nn.Linear(5, 5)), torch.randn(3, 6)
    layer = adapt(model, ["0", "1"], 2)["0"]
    nn.init.normal_(layer.B)
    close(layer(x), base(x) + x @ layer.A.T @ layer.B.T, 50 * eps(F32))
    with pytest.raises(TypeError, match="0: base: found a Standardised, want nn.Linear's forward"):
        merge(model)
    assert isinstance(model[1], LoRALinear)  # none is merged if one cannot be


@pytest.mark.parametrize(("base_dtype", "x_dtype"), [(BF16, F32), (F32, BF16), (F32, F64)])
def test_a_base_that_answers_in_another_dtype(base_dtype, x_dtype):
    class Casts(nn.Linear):
        def forward(self, x):
            return super().forward(x.to(self.weight.dtype))

    layer = LoRALinear(Casts(6, 5, dtype=base_dtype), 2)
    nn.init.normal_(layer.B)
    x = torch.randn(3, 6, dtype=x_dtype)
    y = layer(x)
    assert y.dtype == base_dtype
    W = layer.base.weight.double() + layer.B.double() @ layer.A.double()
    wanted = F.linear(x.double(), W, layer.base.bias.double())
    close(y, wanted, 100 * max(eps(base_dtype), eps(x_dtype)))


def test_a_factor_that_was_left_on_meta():
    from accelerate import cpu_offload

    torch.manual_seed(0)
    x = torch.randn(3, 6)
    model = cpu_offload(nn.Sequential(nn.Linear(6, 5)), execution_device=torch.device("cpu"))
    adapt(model, "0", 2)  # beside a weight that is on meta, and so are A and B
    with pytest.raises(ValueError, match="A: found it on the meta device"):
        model(x)
    model = nn.Sequential(nn.Linear(6, 5))
    nn.init.normal_(adapt(model, "0", 2)["0"].B)
    plain, wanted = copy.deepcopy(model), model(x)
    model = cpu_offload(model, execution_device=torch.device("cpu"))
    close(model(x), wanted, 10 * eps(F32))
    with pytest.raises(ValueError, match="0: base.weight: found it on the meta device"):
        merge(model)
    plain[0].B = nn.Parameter(plain[0].B.to("meta"))
    with pytest.raises(ValueError, match="B: found it on the meta device"):
        plain(x)
    with pytest.raises(ValueError, match="0: B: found it on the meta device"):
        merge(plain)


def test_a_model_wholly_on_meta_works():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    adapt(model, ["0", "1"], 2)
    with ReSoRA(model) as regularizer:
        assert model(torch.empty(3, 6, device="meta")).shape == (3, 4)
        assert regularizer.penalty().is_meta
    assert merge(model)[0].weight.is_meta


# ------------------------------------------------------------------------------------------ ReSoRA


def test_what_resora_refuses():
    model = nn.Sequential(LoRALinear(nn.Linear(3, 3), 2))
    with pytest.raises(ValueError, match="found no LoRALinear and no PEFT LoRA in Linear"):
        ReSoRA(nn.Linear(3, 3))
    with pytest.raises(
        ValueError, match="level: found 'features', want one of .'feature', 'weight'"
    ):
        ReSoRA(model, level="features")
    with pytest.raises(ValueError, match="metric: found 'cka', want one of"):
        ReSoRA(model, "cka")
    with pytest.raises(ValueError, match="sigma=-1"):
        ReSoRA(model, sigma=-1)
    with pytest.raises(TypeError, match="lamda"):
        ReSoRA(model, lamda=1)
    assert not model._forward_pre_hooks and not model[0]._forward_pre_hooks


def test_penalty_needs_a_forward_with_gradients():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    layer = adapt(model, ["0", "1"], 2)["0"]
    regularizer = ReSoRA(model)
    wanted = re.escape("found no input of 0, 1; want a forward of the model with gradients")
    with pytest.raises(ValueError, match=wanted):
        regularizer.penalty()
    with torch.no_grad():
        model(torch.randn(5, 8))
    layer(torch.randn(5, 8))  # one layer alone is no forward of the model
    with pytest.raises(ValueError, match=wanted):
        regularizer.penalty()
    model(torch.randn(5, 8))
    regularizer.penalty()
    with pytest.raises(ValueError, match="before each penalty"):
        regularizer.penalty()
    regularizer.remove()
    model(torch.randn(5, 8))
    with pytest.raises(ValueError, match=wanted):
        regularizer.penalty()


def test_layers_that_only_look_like_lora():
    class Own(nn.Module):
        def __init__(self, lora_A):
            super().__init__()
            self.lora_A = lora_A

    for lora_A in (nn.Linear(4, 2), nn.ModuleDict({"default": nn.Linear(4, 2)})):
        with pytest.raises(ValueError, match="found no LoRALinear"):
            ReSoRA(nn.Sequential(Own(lora_A)))


def test_one_token_and_r_equal_to_one_give_zero_with_gradients():
    model = nn.Sequential(nn.Linear(8, 8))
    layer = adapt(model, "0", 1)["0"]
    with ReSoRA(model) as regularizer:
        model(torch.randn(5, 8))
        value = regularizer.penalty()
        value.backward()
        exactly(value.detach(), torch.tensor(0.0))
        exactly(layer.A.grad, torch.zeros_like(layer.A))
    other = LoRALinear(nn.Linear(8, 8), 3)
    with ReSoRA(other) as regularizer:
        other(torch.randn(8))  # one token: constant codes
        exactly(regularizer.penalty().detach(), torch.tensor(0.0))


def test_a_base_with_a_hook_serves_and_does_not_merge():
    layer = LoRALinear(nn.Linear(4, 3), 2)
    layer.base.register_forward_hook(lambda module, args, y: 2 * y)
    with pytest.raises(TypeError, match="found a hook"):
        layer.merge()


def test_a_factor_that_was_offloaded_is_named_by_the_penalty():
    model = nn.Sequential(nn.Linear(4, 3))
    layers = adapt(model, ["0"], 2)
    regularizer = ReSoRA(model)
    model(torch.ones(5, 4))
    layers["0"].A = nn.Parameter(torch.empty(2, 4, device="meta"))
    with pytest.raises(ValueError, match="A: found it on the meta device"):
        regularizer.penalty()


@pytest.mark.parametrize("x, found", [(torch.ones(1, 5), r"\(1, 5\)"), ([1.0], "list")])
def test_an_input_of_another_kind_is_refused_by_a_sentence(x, found):
    with pytest.raises(ValueError, match=rf"x: found {found}, want \(…, 4\)"):
        LoRALinear(nn.Linear(4, 3), 2)(x)


def test_a_packed_weight_is_read_as_it_is():
    base = nn.Linear(4, 3)
    layer = LoRALinear(base, 2)
    base.weight = nn.Parameter(torch.zeros(6, 1), requires_grad=False)  # two numbers in one
    assert layer.weight is base.weight


def test_a_base_without_a_weight_is_refused():
    class Packed(nn.Module):
        in_features, out_features, bias = 4, 3, None

    with pytest.raises(TypeError, match="base: found Packed, want an nn.Linear"):
        LoRALinear(Packed(), 2)


def test_a_code_that_is_nearly_constant_is_a_code():
    S = torch.ones(1000, 2)
    S[0] = 1.0002
    close(redundancy(torch.ones(3, 2), S), 1.0, 1e-5)  # float32


@pytest.mark.parametrize("size", [1.0, 10.0, 100.0])
def test_a_component_that_a_delta_lacks_is_0_after_regauging(size):
    B, A, x = normal(1, 4, 2, dtype=F32), normal(2, 2, 4, dtype=F32), normal(3, 20, 4, dtype=F32)
    A[1] = A[0]  # ΔW has rank 1
    B_new, A_new = regauge(B, A, size * x)
    assert not A_new[1].any()
    close(B_new @ A_new, B @ A, 1e-5)  # float32, of order 1
    close(redundancy(B_new, size * x @ A_new.T), 0.0, 1e-5)


def test_a_forward_that_raised_records_no_more():
    class Stumbling(nn.Sequential):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("stop")

    model = Stumbling(nn.Linear(4, 3))
    adapt(model, ["0"], 2)
    regularizer = ReSoRA(model)
    with pytest.raises(RuntimeError, match="stop"):
        model(torch.ones(5, 4))
    assert not regularizer.recording
