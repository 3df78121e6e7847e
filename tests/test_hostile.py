"""Bad input, and what users met, in all three methods: the right value, or a refusal.

A refusal is a ValueError or a TypeError of one line, which names what was found and what is wanted
and leaves everything as it was. Where methods say the same in other words, the words that they
share are looked for.
"""

import copy
import math
import re
from itertools import permutations

import accelerate
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations, weight_norm

import eigenlorax
import hra
import resora
from eigenlorax import (
    EigenLoRAxLinear,
    augment,
    choose_k,
    principal_components,
    recycle,
    set_task,
    update,
)
from hra import HRAConv2d, HRALinear, reflect
from resora import LoRALinear, ReSoRA, redundancy, redundancy_dense, regauge
from tests.checks import BF16, EPS, F32, F64, close, eps, exactly, normal

# ------------------------------------------------------- one way to use each of the three methods

every = pytest.mark.parametrize("method", [hra, resora, eigenlorax], ids=lambda m: m.__name__)
SUBSPACE = recycle([{"q": (normal(0, 5, 3), normal(1, 3, 6))}])["q"]
x = normal(2, 3, 6)


def moved(module):
    """The module with all that trains moved off its start, so that ΔW is not 0."""
    for p in module.parameters():
        if p.requires_grad:
            p.data += normal(3, *p.shape).to(p)
    return module


def wrap(method, base, rank=2, **options):
    """The method's layer around a base of 6 inputs and 5 outputs."""
    if method is eigenlorax:
        return moved(EigenLoRAxLinear(base, SUBSPACE, rank, **options))
    layer = HRALinear if method is hra else LoRALinear
    return moved(layer(base, rank, **options))


def layer_of(method, rank=2, dtype=F64, **options):
    """The method's layer around a Linear(6, 5)."""
    return wrap(method, nn.Linear(6, 5, dtype=dtype), rank, **options)


def adapt(method, model, names):
    """The method's layers in the model, {name: layer}."""
    if method is eigenlorax:
        layers = eigenlorax.adapt(model, dict.fromkeys(names, SUBSPACE), rank=2)
    else:
        layers = method.adapt(model, names, rank=2)
    moved(model)
    return layers


def answer(layer, x, *args, **kwargs):
    """What the forward of a layer should give, by its base and the literal formula."""
    if isinstance(layer, HRALinear):
        return layer.base(x @ hra.chain(layer.U.to(x)).T, *args, **kwargs)
    B, A = layer.pair()
    return layer.base(x, *args, **kwargs) + x @ A.to(x).T @ B.to(x).T


def refused(call, words, kind=ValueError):
    """Assert that the call raises one line that has these words."""
    with pytest.raises(kind, match=words) as error:
        call()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


# ------------------------------------------------------------------------------ names in a model


@every
@pytest.mark.parametrize(
    "names, words",
    [
        ([], "found no targets; want the name of a layer"),
        (["head", "nowhere"], "no layer is named 'nowhere'; want names, no patterns: a.q, "),
        (["ead"], "no layer is named 'ead'"),
        (["head", "norm"], "'norm' fits norm, a LayerNorm; want a layer to adapt"),
        (["q"], "'q' fits b.q, a Conv1d; want a layer to adapt"),
        (["done"], "'done' fits done, a (HRA|LoRA|EigenLoRAx)Linear; want a layer to adapt"),
        (["head", "empty"], "^empty: .*want"),  # found when the first layer was made already
    ],
)
def test_a_name_that_does_not_fit_changes_nothing(method, names, words):
    one, other = nn.ModuleDict({"q": nn.Linear(6, 5)}), nn.ModuleDict({"q": nn.Conv1d(6, 5, 1)})
    model = nn.ModuleDict({"a": one, "b": other, "norm": nn.LayerNorm(6)})
    model.update({"head": nn.Linear(6, 5), "empty": nn.Linear(0, 5), "done": layer_of(method)})
    model["norm"].requires_grad_(False)
    modules, flags = [*model.modules()], [p.requires_grad for p in model.parameters()]
    refused(lambda: adapt(method, model, names), words, (TypeError, ValueError))
    assert [*model.modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == flags


@every
def test_a_long_list_of_names_is_cut(method):
    linears = nn.ModuleList(nn.Linear(6, 5) for _ in range(500))
    refused(lambda: adapt(method, linears, ["q"]), r": 0, 1, 2, 3, 4 … \(500 in all\)$")
    wrappers = nn.ModuleList(nn.ModuleDict({"q": nn.LayerNorm(6)}) for _ in range(500))
    refused(lambda: adapt(method, wrappers, ["q"]), r"4.q … \(500 in all\), a LayerNorm; want")


@every
def test_the_new_layer_takes_the_mode_of_the_old_one(method):
    model = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5).eval()])
    layers = adapt(method, model, ["0", "1"])
    for name, training in (("0", True), ("1", False)):
        assert {m.training for m in layers[name].modules()} == {training}
    method.merge(model)
    assert [m.training for m in model] == [True, False]


# ------------------------------------------------------------------------- arguments of any method


@every
@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "8"], ids=repr)
def test_a_rank_that_is_no_positive_int_is_refused(method, rank):
    base = nn.Linear(6, 5)
    refused(lambda: wrap(method, base, rank), f"rank.* {rank!r},.*want")
    assert base.weight.requires_grad
    assert base.bias.requires_grad


class Packed(nn.Module):
    """A layer without a weight that could be read."""

    in_features, out_features, bias = 6, 5, None


NO_LINEARS = [nn.Tanh(), nn.LayerNorm(6), nn.Embedding(5, 6), nn.Conv2d(6, 5, 1), Packed()]


@every
@pytest.mark.parametrize("base", NO_LINEARS, ids=lambda base: type(base).__name__)
def test_a_base_that_is_no_linear_is_refused(method, base):
    refused(lambda: wrap(method, base), f"{type(base).__name__}.*want an nn.Linear", TypeError)


@every
def test_an_input_that_does_not_fit_is_refused(method):
    layer = layer_of(method)
    refused(lambda: layer(torch.ones(2, 7)), r"x.* \(2, 7\).*want .*6")
    refused(lambda: layer(torch.ones(())), r"x.* \(\).*want .*6")
    refused(lambda: layer([[1.0] * 6]), "x.* list.*want a tensor|x: found list, want .*6")


# ----------------------------------------------------------------------- bases that are not plain


class Quantised(nn.Linear):
    """Codes and a scale in the place of a weight, as libraries for int8 and float8 have them."""

    def __init__(self, dtype):
        super().__init__(6, 5)
        codes = (100 * self.weight.detach()).to(dtype)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x) / 100, self.bias.to(x))


class Wrapped(nn.Module):
    """A Linear that is inside of something else."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.weight, self.bias = linear, linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x):
        return self.linear(x)


class Doubled(nn.Linear):
    """Another function than x Wᵀ + b, with arguments of its own."""

    def forward(self, x, times=2, *, shift=0.0):
        return times * super().forward(x) + shift


class Casts(nn.Linear):
    """A Linear that answers in the dtype of its weight."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


@every
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_quantised_base_is_called_and_not_read(method, dtype, wrapped):
    base = Wrapped(Quantised(dtype)) if wrapped else Quantised(dtype)
    layer, plain = wrap(method, base), nn.Linear(6, 5)
    close(layer(x), answer(layer, x), 1000 * EPS)
    layer(x).sum().backward()
    for p in layer.parameters():
        assert not p.requires_grad or (p.dtype == F32 and p.grad.abs().max() > 0)
    assert layer.weight is base.weight  # some models look at its dtype, as T5 does at wo's
    refused(layer.merge, f"{dtype}|{type(base).__name__} with a forward of its own", TypeError)
    plain.weight = base.weight
    refused(wrap(method, plain).merge, f"{dtype}.*want", TypeError)


@every
def test_a_packed_weight_is_read_as_it_is(method):
    layer = layer_of(method)
    layer.base.weight = nn.Parameter(torch.zeros(15, 1), requires_grad=False)  # two numbers in one
    assert layer.weight is layer.base.weight


@every
def test_a_base_with_its_own_forward_is_called_and_no_layer_of_its_model_is_merged(method):
    model = nn.ModuleList([nn.Linear(6, 5, dtype=F64), Doubled(6, 5, dtype=F64)])
    layers = adapt(method, model, ["0", "1"])
    close(model[1](x), answer(model[1], x), 1000 * EPS)
    refused(lambda: method.merge(model), "^1: .*Doubled.* forward", TypeError)
    assert [*model] == [*layers.values()]


@pytest.mark.parametrize("method", [hra, resora], ids=["hra", "resora"])
def test_further_arguments_go_to_the_base(method):
    layer = wrap(method, Doubled(6, 5, dtype=F64))
    close(layer(x, 3, shift=1.0), answer(layer, x, 3, shift=1.0), 1000 * EPS)


@every
def test_a_base_with_a_hook_serves_and_does_not_merge(method):
    layer = layer_of(method)
    layer.base.register_forward_hook(lambda module, args, y: 2 * y)
    close(layer(x), answer(layer, x), 1000 * EPS)
    refused(layer.merge, "base.* a hook, as of weight_norm.* want none", TypeError)
    late = wrap(method, weight_norm(nn.Linear(6, 5)))  # a hook before the forward computes its W
    refused(late.merge, "hook", TypeError)


@every
@pytest.mark.parametrize(
    "base", [NonDynamicallyQuantizableLinear(6, 5), parametrizations.weight_norm(nn.Linear(6, 5))]
)
def test_a_subclass_with_torchs_forward_is_merged(method, base):
    layer = wrap(method, copy.deepcopy(base).double())
    assert type(layer.merge()) is nn.Linear
    close(layer.merge()(x), answer(layer, x), 1000 * EPS)


@every
@pytest.mark.parametrize("base_dtype, x_dtype", [(BF16, F32), (F32, BF16), (F32, F64)])
def test_a_base_that_answers_in_another_dtype_is_followed(method, base_dtype, x_dtype):
    layer = wrap(method, Casts(6, 5, dtype=base_dtype))
    y = layer(x.to(x_dtype))
    assert y.dtype == base_dtype
    wanted = answer(copy.deepcopy(layer).double(), x.to(x_dtype).double())
    close(y, wanted, 100 * max(eps(base_dtype), eps(x_dtype)))


@pytest.mark.parametrize("method, inner", [*permutations([hra, resora, eigenlorax], 2)])
def test_an_adapter_of_another_method_inside_is_not_merged_over(method, inner):
    base = wrap(inner, nn.Linear(6, 5))
    refused(wrap(method, base).merge, type(base).__name__, TypeError)


# --------------------------------------------------------------------------------------- devices

TENSORS = [(hra, "U"), (resora, "A"), (resora, "B")]
TENSORS += [(eigenlorax, name) for name in ("V_A", "V_B", "alpha_A.0", "alpha_B.0")]


@pytest.mark.parametrize("method, name", TENSORS)
def test_a_tensor_that_was_left_on_meta_is_named(method, name):
    layer = layer_of(method)
    left = layer.state_dict()[name].to("meta")
    layer.load_state_dict({name: left}, strict=False, assign=True)
    words = f"{name.partition('.')[0]}.* on (the )?meta"
    refused(lambda: layer(x), words)
    refused(layer.merge, words)


@every
def test_a_layer_wholly_on_meta_works_and_one_partly_there_is_not_merged(method):
    model = nn.Sequential(nn.Linear(6, 5, device="meta"))
    adapt(method, model, ["0"])
    assert model(torch.empty(2, 6, device="meta")).shape == (2, 5)
    assert method.merge(model)[0].weight.is_meta
    layer = layer_of(method)
    layer.base.weight = nn.Parameter(layer.base.weight.to("meta"))
    refused(layer.merge, "weight.* on (the )?meta")


@every
def test_a_model_that_accelerate_offloads_is_answered_or_refused(method):
    model, offloaded = (nn.Sequential(nn.Linear(6, 5, dtype=F64)) for _ in range(2))
    adapt(method, model, ["0"])
    wanted = model(x)
    for each in (model, offloaded):
        accelerate.cpu_offload(each, torch.device("cpu"))
    adapt(method, offloaded, ["0"])  # what trains is made beside a weight on meta
    refused(lambda: offloaded(x), "on (the )?meta")
    if method is eigenlorax:  # accelerate brings no ParameterList back
        refused(lambda: model(x), "alpha.* on the meta device")
    else:
        exactly(model(x), wanted)
    refused(lambda: method.merge(model), "base.weight.* on (the )?meta")


class NoFloat64(Tensor):
    """A tensor on a device that has no float64, as Apple's MPS."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        found = super().__torch_function__(function, types, args, kwargs)
        if function is Tensor.cpu:
            return found.as_subclass(Tensor)
        if isinstance(found, cls) and found.dtype == F64:
            raise TypeError("this device has no float64")
        return found


def test_components_need_no_float64_on_the_device():
    pair = normal(0, 5, 2, dtype=F32), normal(1, 2, 6, dtype=F32)
    there = tuple(X.as_subclass(NoFloat64) for X in pair)
    with pytest.raises(TypeError, match="no float64"):
        there[0].double()
    found = update(recycle([{"q": there}], pseudo=1), [{"q": there}], k=0.9)["q"]
    exactly(found.A.V, update(recycle([{"q": pair}]), [{"q": pair}], k=0.9)["q"].A.V)
    assert choose_k(torch.ones(3).as_subclass(NoFloat64), 0.9, (3, 4)) == 3


# ---------------------------------------------------------------------------- arguments, as tables


def pair(o=5, d=6, r=2, value=1.0):
    """A pair (B, A) whose B is full of one value."""
    return torch.full((o, r), value), torch.ones(r, d)


def adapters(*pairs):
    """An adapter for each pair, of the layer "q"."""
    return [{"q": each} for each in pairs]


def conv(**options):
    """A convolution of 3 channels."""
    return nn.Conv2d(3, 4, 3, **options)


def own(method):
    """A convolution of a class that has this method of its own."""
    return type("Own", (nn.Conv2d,), {method: lambda self, *args: None})(3, 4, 3)


def float8_conv():
    """A convolution whose weight is quantised."""
    layer = conv()
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return layer


U, IMAGE, IDS = normal(0, 6, 2), torch.ones(1, 3, 5, 5), torch.zeros(3, dtype=torch.long)
LORA = nn.Sequential(LoRALinear(nn.Linear(6, 5), 2))
ONE = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(6, 5)})})
TWO = nn.ModuleDict({"a": ONE["a"], "b": nn.ModuleDict({"q": nn.Linear(6, 5)})})
LAYER, TWO_TASKS = layer_of(eigenlorax), layer_of(eigenlorax, tasks=2)
PAIR, SINGLE = pair(), layer_of(eigenlorax, dtype=F32)
KNOWN = recycle(adapters(PAIR))
CENTRED = principal_components(torch.eye(3) + 1)

HRA_ERRORS = [
    (lambda: layer_of(hra, init="zeros"), "init: found 'zeros', want"),
    (lambda: layer_of(hra, 7), "rank: found 7.*even"),
    (lambda: layer_of(hra, strict=True), "strict: found .*trace d − 2r"),
    (lambda: layer_of(hra, 7, init="random", strict=True), "rank: found 7.*at most d = 6"),
    (lambda: wrap(hra, nn.Linear(0, 5)), r"found torch.float32 of shape \(0, 2\)"),
    (lambda: hra.gamma(U[:, 0]), r"U: found torch.float64 of shape \(6,\), want floats \(d, r\)"),
    (lambda: hra.gamma(U[:, :0]), r"U: found torch.float64 of shape \(6, 0\), want"),
    (lambda: hra.penalty(U.long()), "U: found torch.int64 .*, want floats"),
    (lambda: hra.gram_schmidt(U.to(torch.float8_e4m3fn)), "U: found torch.float8_e4m3fn .*, want"),
    (lambda: hra.chain(U.numpy()), "U: found ndarray, want a tensor"),
    (lambda: reflect(x, U[:, 0]), r"U: found torch.float64 of shape \(6,\), want floats \(d, r\)"),
    (lambda: reflect(x.long(), U), "x: found torch.int64 of shape .*, want floats .* d = 6"),
    (lambda: reflect(x + 1j, U), "x: found torch.complex128"),
    (lambda: reflect(x.numpy(), U), "x: found ndarray, want a tensor"),
    (lambda: HRAConv2d(nn.Conv2d(4, 4, 3, groups=2)), "base.groups: found 2, want 1"),
    (lambda: HRAConv2d(conv())(IMAGE.mT[:, :2]), r"x: found \(1, 2, 5, 5\), want \(…, 3, "),
    (lambda: HRAConv2d(conv())([1.0]), r"x: found list, want \(…, 3, height, width\)"),
    (lambda: HRAConv2d(conv(device="meta"))(IMAGE), "x is on cpu and base.weight on meta; want"),
]

RESORA_ERRORS = [
    (lambda: layer_of(resora, dropout=2.0), "dropout=2.0, want a number, 0 to 1"),
    (lambda: layer_of(resora, dropout=math.nan), "dropout=nan, want a number, 0 to 1"),
    (lambda: layer_of(resora, alpha=math.inf), "alpha=inf, .*want a number"),
    (lambda: layer_of(resora, alpha=math.nan), "alpha=nan, .*want a number"),
    (lambda: redundancy(U, U, "cosin"), "metric: found 'cosin', want one of"),
    (lambda: redundancy(U, U, sigma=0.0), "sigma=0.0, .* want"),
    (lambda: redundancy(U, U, beta=-1.0), "beta=-1.0, .* want"),
    (lambda: redundancy(U, U, beta=math.nan), "beta=nan, .* want"),
    (lambda: redundancy(U, U, samples=1), "samples=1, want"),
    (lambda: redundancy(U, torch.ones(4, 3)), r"found \(6, 2\), \(4, 3\).*, want floats"),
    (lambda: redundancy(U, U[:0]), r"found .* \(0, 2\).*, want floats"),
    (lambda: redundancy(U[0], U), r"found \(2,\).*, want floats"),
    (lambda: redundancy(U[None], U[None]), r"found \(1, 6, 2\).*, want floats"),
    (lambda: redundancy(U, U.long()), "found .*torch.int64, want floats"),
    (lambda: redundancy_dense(U, U, "cosin"), "metric: found 'cosin', want one of"),
    (lambda: redundancy_dense(U, U[:0]), r"found .* \(0, 2\).*, want floats"),
    (lambda: regauge(torch.ones(5, 2), torch.ones(3, 6)), "found .* want finite floats"),
    (lambda: regauge(torch.ones(5), torch.ones(2, 6)), "found .* want finite floats"),
    (lambda: regauge(*pair(), torch.ones(7, 5)), "found .* want finite floats"),
    (lambda: regauge(*pair(), torch.ones(0, 6)), "found .* want finite floats"),
    (lambda: regauge(torch.ones(0, 2), torch.ones(2, 6)), "found .* want finite floats"),
    (lambda: regauge(*pair(value=math.nan)), "found .* want finite floats"),
    (lambda: regauge(torch.ones(5, 2), IDS.expand(2, 3)), "found .* want finite floats"),
    (lambda: ReSoRA(nn.Linear(3, 3)), "found no LoRALinear and no PEFT LoRA in Linear"),
    (lambda: ReSoRA(LORA, level="features"), "level: found 'features', want one of "),
    (lambda: ReSoRA(LORA, "cka"), "metric: found 'cka', want one of"),
    (lambda: ReSoRA(LORA, sigma=-1), "sigma=-1, .* want"),
]

COMPONENT_ERRORS = [
    (lambda: recycle([]), "0 adapters, no layer; want"),
    (lambda: recycle([{}]), "1 adapters, no layer; want"),
    (lambda: recycle(adapters(PAIR, pair(d=7))), r"adapter 1, 'q': B \(5, 2\), A \(2, 7\); want"),
    (lambda: recycle(adapters((PAIR[0], torch.ones(1, 6)))), r"'q': .* want \(5, r\) and \(r, 6\)"),
    (lambda: recycle(adapters(PAIR, pair(r=0))), r"adapter 1, 'q': B \(5, 0\), A \(0, 6\)"),
    (lambda: recycle(adapters(pair(value=math.nan))), "'q': B: found .* summing to nan; want"),
    (lambda: recycle(adapters((PAIR[0], PAIR[1] / 0))), "'q': A: found .* summing to inf; want"),
    (lambda: recycle([{"a.q": PAIR}], k=2), "'a.q': k = 2 means 2; want a rule or 1 to 1"),
    (lambda: recycle([{"v": pair(value=0.0)}], k=1), "'v': k = 1 means 1; want a rule or 1 to 0"),
    (lambda: recycle(adapters(PAIR), pseudo=5), "'q': 5 pseudo-components; want 0 to n − K"),
    (lambda: update(KNOWN, adapters(pair(d=7))), r"'q': rows \(2, 7\); want \(m, 6\), as before"),
    (lambda: update(KNOWN, adapters(PAIR), "gavish-donoho"), "'q': want uncentred components"),
    (lambda: eigenlorax.append(CENTRED, torch.ones(1, 3), 1), "want uncentred components"),
    (lambda: principal_components(IDS.float()), r"rows: found .*\(3,\) summing to 0.0; want"),
    (lambda: principal_components(IDS[None]), "rows: found torch.int64 .*want finite floats"),
    (lambda: principal_components(U[:0]), r"rows \(0, 2\); want at least one"),
    (lambda: principal_components(1e200 * U), r"rows up to .*e\+200; want 1e-150 to 1e150"),
    (lambda: principal_components(1e-200 * U), "rows up to .*e-200; want 1e-150 to 1e150"),
    (lambda: recycle(adapters((normal(0, 90, 60), normal(1, 60, 90))), "gavish-donoho"), "means 0"),
    (lambda: choose_k(torch.ones(0), 0.9, (3, 4)), "k = 0.9 means 0.9; want a rule or 1 to"),
    (lambda: choose_k(torch.tensor([1.0, 2.0]), 1, (3, 4)), "want finite ones, descending"),
    (lambda: choose_k(torch.tensor([math.inf]), 1, (3, 4)), "want finite ones, descending"),
    (lambda: augment(torch.eye(3), 1), "1 pseudo-components; want 0 to n − K = 3 − 3"),
    (lambda: augment(torch.ones(1, 3), 1.0), "1.0 pseudo-components; want 0 to n − K"),
    (lambda: augment(torch.ones(1, 3), True), "True pseudo-components; want 0 to n − K"),
    (lambda: augment(torch.ones(1, 3), -1), "-1 pseudo-components; want 0 to n − K"),
    (lambda: augment(torch.ones(1, 3) * math.nan, 1), "V: found .* summing to nan; want finite"),
]

EIGENLORAX_ERRORS = [
    (lambda: layer_of(eigenlorax, tasks=1.0), "rank = 2, tasks = 1.0; want ints ≥ 1"),
    (lambda: layer_of(eigenlorax, scaling=0), "scaling 0, init 'zero'; want finite ≠ 0"),
    (lambda: layer_of(eigenlorax, scaling=math.nan), "scaling nan, init 'zero'; want finite ≠ 0"),
    (lambda: layer_of(eigenlorax, init="ones"), "init 'ones'; want .*zero or random"),
    (lambda: wrap(eigenlorax, nn.Linear(9, 9)), r"V_A is \(3, 6\); want \(K, 9\), K ≥ 1"),
    (lambda: LAYER(x, 1), "task = 1; want an int from 0"),
    (lambda: LAYER(x, IDS[:2]), r"2 tasks for x \(3, 6\); want one for each x\[i\]"),
    (lambda: LAYER(x, IDS[:1]), r"1 tasks for x \(3, 6\); want one for each x\[i\]"),
    (lambda: LAYER(x[:1], IDS), r"3 tasks for x \(1, 6\); want one for each x\[i\]"),
    (lambda: TWO_TASKS.pair([0, 1]), r"task = \[0, 1\]; want one int"),
    (lambda: LAYER.set_task(0, *pair(d=7)), r"want \(5, r\) and \(r, 6\)"),
    (lambda: LAYER.set_task(0, *pair(r=3)), "the pair has rank 3; want at most .* 2"),
    (lambda: LAYER.set_task(0, *pair(value=math.nan)), "B: .* summing to nan; want"),
    (lambda: SINGLE.set_task(0, 1e200 * PAIR[0].double(), PAIR[1]), "α_B: found .*want finite"),
    (lambda: set_task({"a.q": LAYER}, 0, {}), "the adapter has no pair; want"),
    (lambda: set_task({"a.q": LAYER}, 0, {"q": PAIR, "v": PAIR}), "'v' fits no layer; want"),
    (
        lambda: set_task({"a.q": LAYER}, 0, {"a.q": PAIR, "q": PAIR}),
        "'q' fits a.q; want one of its own",
    ),
    (lambda: adapt(eigenlorax, TWO, ["q"]), "'q' fits a.q, b.q; want one layer of its own"),
    (lambda: adapt(eigenlorax, ONE, ["a.q", "q"]), "'q' fits a.q; want one layer of its own"),
    (
        lambda: eigenlorax.adapt(ONE, recycle(adapters(pair(value=0.0)))),
        r"K ≥ 1; were all of its adapters 0\?",
    ),
]
ERRORS = HRA_ERRORS + RESORA_ERRORS + COMPONENT_ERRORS + EIGENLORAX_ERRORS


@pytest.mark.parametrize("call, words", ERRORS)
def test_an_argument_that_does_not_fit_is_refused(call, words):
    refused(call, words)
    assert not LORA._forward_pre_hooks
    assert not LORA[0]._forward_pre_hooks


RULES = [0, -1, 4, True, 1.5, math.nan, "elbow", [1]]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_rule_for_k_that_there_is_not_is_refused(rule):
    words = re.escape(f"k = {rule!r} means {rule!r}; want a rule or 1 to 3, numerical rank")
    refused(lambda: choose_k(torch.ones(3), rule, (3, 4)), words)


TYPE_ERRORS = [
    (lambda: HRAConv2d(nn.Linear(3, 4)), "found Linear, want nn.Conv2d"),
    (lambda: hra.adapt(nn.Sequential(own("forward")), "0"), "0: base: found Own, want nn.Conv2d"),
    (lambda: HRAConv2d(own("_conv_forward")), "found Own, want nn.Conv2d and its forward"),
    (lambda: HRAConv2d(weight_norm(conv())), "found a Tensor of torch.float32, want a Parameter"),
    (lambda: HRAConv2d(parametrizations.weight_norm(conv())), "found a Tensor of torch.float32"),
    (lambda: HRAConv2d(float8_conv()), "found a Parameter of torch.float8_e4m3fn, want"),
    (wrap(hra, Quantised(torch.int8)).pair, "found torch.int8, quantised; want floats"),
    (lambda: wrap(resora, nn.Linear(0, 5)), "found Linear, want an nn.Linear, not empty"),
    (lambda: wrap(resora, nn.Linear(6, 0)), "found Linear, want an nn.Linear, not empty"),
    (lambda: ReSoRA(LORA, lamda=1), "lamda"),
    (lambda: wrap(eigenlorax, nn.Linear(0, 5)), "is Linear; want an nn.Linear, not empty"),
    (lambda: wrap(eigenlorax, nn.Linear(6, 0)), "is Linear; want an nn.Linear, not empty"),
    (lambda: eigenlorax.adapt(ONE, {"q": PAIR}), "a.q: the subspace is a tuple; want"),
    (lambda: recycle({"q": PAIR}), "found one dict; want a list of adapters"),
    (lambda: recycle([{"q.lora_A.weight": torch.ones(2, 6)}]), "found a Tensor; want a pair"),
    (lambda: recycle([PAIR]), "found a tuple; want adapters"),
    (lambda: recycle(adapters((PAIR[0].numpy(), PAIR[1]))), "B is a ndarray; want a torch tensor"),
]


@pytest.mark.parametrize("call, words", TYPE_ERRORS)
def test_an_argument_of_another_kind_is_refused(call, words):
    refused(call, words, TypeError)


# ------------------------------------------------------------------------------------- HRA alone


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
def test_columns_without_a_direction_are_refused_or_give_nan(bad, monkeypatch):
    U = normal(0, 6, 2)
    U[:, 1] = bad
    model = nn.Sequential(nn.ReLU(), layer_of(hra))
    before = copy.deepcopy(model.state_dict())
    refused(lambda: model.load_state_dict(before | {"1.U": U}), r"1\.U: column 1 is")
    for name, tensor in model.state_dict().items():
        exactly(tensor, before[name])
    refused(lambda: hra.gram_schmidt(U), "column 1 is")
    for found in (hra.gamma(U), hra.chain(U), hra.penalty(U), reflect(x, U)):
        assert not found.isfinite().all()  # where values are not looked at, nan arrives
    monkeypatch.setattr(hra, "directions", lambda *args: U)
    base = nn.Linear(6, 5)
    refused(lambda: HRALinear(base, 2, "random"), "column 1 is")
    assert base.weight.requires_grad


def test_a_column_that_the_dtype_rounds_to_zero_is_refused():
    layer = layer_of(hra, dtype=F32)
    tiny = {"U": torch.full((6, 2), 1e-60, dtype=F64)}
    refused(lambda: layer.load_state_dict(tiny, strict=False), "column 0 is zero")
    with pytest.raises(RuntimeError, match="size mismatch"):  # which is torch's to report
        layer.load_state_dict({"U": torch.zeros(6, 5)}, strict=False)


@pytest.mark.parametrize("strict", [False, True])
def test_fsdp2_loads_a_whole_or_a_sharded_state(strict):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, other = (
            nn.Sequential(HRALinear(nn.Linear(6, 5, dtype=F64), 3, "random", strict))
            for _ in range(2)
        )
        fully_shard(other)
        assert isinstance(other[0].U, DTensor)
        before, sharded = other(x), copy.deepcopy(other.state_dict())
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(other, copy.deepcopy(model.state_dict()), options=options)
        close(other(x), model(x), 1000 * EPS)
        other.load_state_dict(sharded)
        close(other(x), before, 1000 * EPS)
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------- ReSoRA alone


def test_a_code_that_is_nearly_constant_is_a_code():
    S = torch.ones(1000, 2)
    S[0] = 1.0002
    close(redundancy(torch.ones(3, 2), S), 1.0, 1e-5)  # float32


def test_regauge_keeps_a_fresh_adapter():
    A = normal(0, 2, 6)
    B_new, A_new = regauge(torch.zeros(5, 2), A, x)
    exactly(B_new, torch.zeros(5, 2))
    exactly(A_new, A)
    assert A_new.data_ptr() != A.data_ptr()


@pytest.mark.parametrize("size", [1.0, 10.0, 100.0])
def test_a_component_that_a_delta_lacks_is_0_after_regauging(size):
    B, A, x = normal(1, 4, 2, dtype=F32), normal(2, 2, 4, dtype=F32), normal(3, 20, 4, dtype=F32)
    A[1] = A[0]  # ΔW has rank 1
    B_new, A_new = regauge(B, A, size * x)
    assert not A_new[1].any()
    close(B_new @ A_new, B @ A, 1e-5)  # float32, of order 1
    close(redundancy(B_new, size * x @ A_new.T), 0.0, 1e-5)


def test_a_penalty_needs_a_forward_of_the_model_with_gradients():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.ones(5, 8)
    layer = resora.adapt(model, ["0", "1"], 2)["0"]
    regularizer = ReSoRA(model)
    words = "found no input of 0, 1; want a forward of the model with gradients before each"
    refused(regularizer.penalty, words)
    with torch.no_grad():
        model(x)
    layer(x)  # one layer alone is no forward of the model
    refused(regularizer.penalty, words)
    model(x)
    regularizer.penalty()
    refused(regularizer.penalty, words)
    model(x)
    regularizer.remove()
    refused(regularizer.penalty, words)
    model(x)
    refused(regularizer.penalty, words)


def test_a_penalty_without_input_names_the_first_layers_of_many():
    model = nn.ModuleList(LoRALinear(nn.Linear(2, 2), 1) for _ in range(100))
    refused(ReSoRA(model).penalty, r"found no input of 0, 1, 2, 3, 4 … \(100 in all\)")


def test_a_forward_that_raised_records_no_more():
    class Stumbling(nn.Sequential):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("stop")

    model = Stumbling(layer_of(resora))
    regularizer = ReSoRA(model)
    with pytest.raises(RuntimeError, match="stop"):
        model(x)
    assert not regularizer.recording


@pytest.mark.parametrize("lora_A", [nn.Linear(4, 2), nn.ModuleDict({"default": nn.Linear(4, 2)})])
def test_a_layer_that_only_looks_like_lora_is_none(lora_A):
    model = nn.Sequential(nn.Module())
    model[0].lora_A = lora_A
    refused(lambda: ReSoRA(model), "found no LoRALinear")


def test_one_component_or_one_token_gives_zero_with_gradients():
    for rank, tokens in ((1, x), (3, x[0])):
        layer = layer_of(resora, rank)
        with ReSoRA(layer) as regularizer:
            layer(tokens)
            value = regularizer.penalty()
        value.backward()
        close(value, 0.0, 0.0)
        close(layer.A.grad, torch.zeros(rank, 6), 0.0)


def test_a_penalty_on_meta_is_there_and_a_factor_left_there_is_named():
    layer = wrap(resora, nn.Linear(6, 5, device="meta"))
    with ReSoRA(layer) as regularizer:
        layer(torch.ones(3, 6, device="meta"))
        assert regularizer.penalty().is_meta
    layer = layer_of(resora)
    with ReSoRA(layer) as regularizer:
        layer(x)
        layer.A = nn.Parameter(layer.A.to("meta"))
        refused(regularizer.penalty, "A: found it on the meta device")


# ------------------------------------------------------------------------------ EigenLoRAx alone

NO_TASKS = [None, "1", "tasks", [None, 0], ["0"], -1, 2, [0, 2], 0.5, [0.5], True, [0, True]]
NO_TASKS += [np.array([True, False]), torch.tensor([[0]]), torch.tensor(1j)]
NO_TASKS += [torch.tensor([0, -1]), torch.tensor([True, True]), math.nan]


@pytest.mark.parametrize("task", NO_TASKS, ids=repr)
def test_what_is_no_task_is_refused_with_a_hint(task):
    layer = layer_of(eigenlorax, tasks=2)

    def serve():
        with eigenlorax.serving({"q": layer}, task):
            pass

    calls = [serve]
    if task is not None:  # to these it means the active task
        calls += [lambda: layer(x[:2], task), lambda: layer.pair(task)]
        calls += [lambda: layer.merge(task), lambda: layer.set_task(task, *pair())]
    for call in calls:
        refused(call, r"want an int from 0 to 1, or .* \(for the base alone: a task with α_B = 0\)")


def test_a_set_task_that_fails_changes_nothing():
    layers = {name: layer_of(eigenlorax) for name in "01"}
    before = copy.deepcopy([layer.state_dict() for layer in layers.values()])
    for adapter, words in (
        ({"0": pair(), "elsewhere": pair()}, "'elsewhere' fits no layer"),
        ({"0": pair(), "1": pair(r=3)}, "'1': the pair has rank 3; want at most this layer's 2"),
        ({"1": pair(value=math.nan)}, "'1': B: found .* summing to nan"),
    ):
        refused(lambda adapter=adapter: set_task(layers, 0, adapter), words)
    refused(lambda: layers["0"].set_task(0, *pair(r=3)), "the pair has rank 3")
    for layer, state in zip(layers.values(), before, strict=True):
        for name, tensor in layer.state_dict().items():
            exactly(tensor, state[name])


def test_an_untrained_layer_recycles_to_no_direction():
    found = recycle([{"q": pair(), "v": pair(value=0.0)}])
    assert found["v"].B.V.shape == (0, 5)
    assert found["q"].B.V.shape == (1, 5)
