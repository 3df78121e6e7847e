"""resora.py where it has to work: numbers in docstrings, dtypes, layers, models, training loops."""

import copy
import gc
import pickle
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from resora import METRICS, LoRALinear, ReSoRA, adapt, draw_tokens, merge, redundancy, regauge
from tests.checks import (
    BF16,
    EPS,
    F16,
    F32,
    F64,
    SEEDS,
    close,
    eps,
    exactly,
    normal,
    seeded,
    within,
)

O, D, R = st.integers(1, 12), st.integers(1, 12), st.integers(1, 6)


# ------------------------------------------------------------------------- numbers in docstrings


@pytest.mark.parametrize(("n", "wanted"), [(32, 0.074), (128, 0.019), (256, 0.0095), (512, 0.0046)])
def test_floor_of_nonlinear_for_independent_codes(n, wanted):
    B, values = torch.ones(1, 24), []
    for seed in range(max(2, 512 // n)):
        values.append(redundancy(B, normal(seed, n, 24, dtype=F32), "nonlinear", samples=n).item())
    within(abs(np.mean(values) - wanted), 0.06 * wanted)  # 276 pairs × at least 2 draws


def test_floor_of_linear_for_independent_codes():
    values = [redundancy(torch.ones(1, 30), normal(s, 20, 30, dtype=F32)).item() for s in range(40)]
    within(abs(np.mean(values) - 1 / 19), 0.03 / 19)  # 435 pairs × 40 draws


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_as_large_as_the_feature_maps_is_built(metric):
    N, o, d, r, n = 4000, 500, 300, 4, 32
    layer = LoRALinear(nn.Linear(d, o), r)
    nn.init.normal_(layer.B)
    regularizer = ReSoRA(layer, metric, samples=n)
    layer(torch.randn(N, d))
    with Sizes() as sizes:
        regularizer.penalty().backward()
    assert 0 < sizes.largest <= max(N * r, r * n**2) < N * d < N * o * r


class Sizes(TorchDispatchMode):
    """The number of elements of the largest new tensor; views are not new."""

    largest = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in old:
                self.largest = max(self.largest, t.numel())
        return out


def test_drawn_tokens_are_distinct_and_each_as_likely_as_any_other():
    n, k, draws = 425, 128, 2000
    rows = [draw_tokens(torch.arange(n)[:, None], k, i).flatten() for i in range(draws)]
    assert all(len(row.unique()) == k for row in rows[:100])
    counts = torch.cat(rows).bincount(minlength=n)
    spread = (counts - draws * k / n).square().mean() / (draws * k / n * (1 - k / n))
    assert 0.8 < spread < 1.2  # χ² of 424 degrees of freedom, over 424: 1 ± 0.07
    both = [len(set(a.tolist()) & set(b.tolist())) for a, b in pairwise(rows[:400])]
    assert abs(sum(both) / 399 - k * k / n) < 1  # hypergeometric, deviation 4.3/√399


# ------------------------------------------------------------------------------ dtypes and ranges


def test_no_control_flow_depends_on_data():
    for metric in METRICS:  # tensors without data
        B, S = torch.empty(5, 3, device="meta"), torch.empty(9, 3, device="meta")
        assert redundancy(B, S, metric).shape == ()
        compiled = torch.compile(redundancy, fullgraph=True, backend="eager")
        B, S = normal(0, 5, 3), normal(1, 9, 3)
        close(compiled(B, S, metric), redundancy(B, S, metric), 10 * EPS)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_halves_are_summed_in_single_precision(dtype):
    B, S = normal(0, 64, 4, dtype=dtype), normal(1, 5000, 4, dtype=dtype)
    for metric in METRICS:
        with torch.autocast("cpu", BF16):
            value = redundancy(B, S, metric)
        assert value.dtype == F32
        wanted = redundancy(B.double(), S.double(), metric)
        close(value, wanted, 100 * eps(F32))  # no loss but the input's own rounding


def test_a_wide_kernel_keeps_its_digits():
    B, S = torch.ones(1, 3), normal(0, 40, 3)  # K − 1 is about −1e-6, and float32 has seven digits
    wanted = redundancy(B.double(), S, "nonlinear", sigma=1e3)
    close(redundancy(B, S.float(), "nonlinear", sigma=1e3), wanted, 1e3 * eps(F32))


def test_euclidean_stays_at_most_one_for_large_and_equal_components():
    for seed in range(20):  # rounding makes some of their squared distances negative
        B, S = torch.ones(4, 2) * 1.1e4, torch.ones(6, 2) * 1e3
        S += 1e-3 * normal(seed, 6, 1, dtype=F32)
        B[:, 1] += 1e-2 * normal(seed, 4, dtype=F32)
        assert 0 <= redundancy(B, S, "euclidean") <= 1


@pytest.mark.parametrize("metric", METRICS)
def test_squares_beyond_the_dtype_give_nan_and_no_number(metric):
    B, S = normal(0, 5, 3, dtype=F32), normal(1, 8, 3, dtype=F32)
    assert redundancy(B, S * 1e20, metric).isnan()
    if metric != "euclidean":  # whose value is the distances'
        close(redundancy(B, S * 1e15, metric), redundancy(B, S, metric), 1e3 * eps(F32))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_regauge_in_other_dtypes(dtype):
    g = seeded(0)
    B, A, x = (normal(g, *shape, dtype=dtype) for shape in ((20, 4), (4, 30), (50, 30)))
    with torch.autocast("cpu", BF16):
        B2, A2 = regauge(B, A, x)
    assert B2.dtype == A2.dtype == dtype
    wanted = (B.double() @ A.double()).float()
    bound = 10 * eps(dtype) * B.norm().item() * A.norm().item()
    close(B2.float() @ A2.float(), wanted, bound)
    assert redundancy(B2, x.float() @ A2.float().T, "linear") < (100 * eps(dtype)) ** 2
    assert not regauge(B.requires_grad_(), A)[0].requires_grad


# ------------------------------------------------------------------------------------- LoRALinear


def tiny(seed=0, rank=3, **options):
    """A model of three adapted layers whose B is not zero, and its {name: module}."""
    g = seeded(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    modules = adapt(model, ["0", "2", "4"], rank=rank, generator=g, **options)
    for m in modules.values():
        nn.init.normal_(m.B, generator=g)
    return model, modules


def filled(layer):
    """The layer with a B that is not zero."""
    nn.init.normal_(layer.B, generator=seeded(0))
    return layer


def test_starts_as_the_base():
    base = nn.Linear(6, 5)
    layer = LoRALinear(base, 3)
    x = torch.randn(2, 7, 6)
    exactly(layer(x), base(x))
    assert layer.base is base and not any(p.requires_grad for p in base.parameters())
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"A", "B"}
    assert layer.A.shape == (3, 6) and layer.B.shape == (5, 3) and layer.scaling == 1
    assert layer.A.abs().max() <= 6**-0.5 and layer.A.std() > 0.5 * 6**-0.5 / 3**0.5
    assert (layer.in_features, layer.out_features) == (6, 5) and layer.bias is base.bias
    assert "rank=3" in repr(layer)


@given(SEEDS, O, D, R, st.sampled_from([(), (0,), (4,), (2, 3)]), st.booleans())
@settings(max_examples=25)
def test_forward_weight_pair_and_merge_agree(seed, o, d, r, shape, bias):
    base = nn.Linear(d, o, bias=bias, dtype=F64)
    layer = LoRALinear(base, r, alpha=2.0 * r + 1, generator=seeded(seed)).eval()
    g = seeded(seed)
    B, x = normal(g, o, r), normal(g, *shape, d)
    layer.B.data = B
    W = base.weight + (2 + 1 / r) * B @ layer.A
    tolerance = 100 * (d + r) * EPS * (1 + W.abs().max().item()) * (1 + 2 * x.abs().sum().item())
    close(layer(x), F.linear(x, W, base.bias), tolerance)
    close(layer.weight, W, tolerance)
    B2, A2 = layer.pair()
    close(base.weight + B2 @ A2, W, tolerance)
    before = copy.deepcopy(base.state_dict())
    plain = layer.merge()
    assert type(plain) is nn.Linear and not plain.training
    close(plain(x), layer(x), tolerance)
    plain.weight.data.zero_()
    if bias:
        plain.bias.data.zero_()
    assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())


def test_gradients_of_forward_and_weight():
    layer = LoRALinear(nn.Linear(4, 3, dtype=F64), 2, alpha=3)
    parameters = [layer.A.detach().clone().requires_grad_(), normal(0, 3, 2).requires_grad_()]

    def call(A, B):
        state = {"A": A, "B": B}
        named = {f"layer.{k}": v for k, v in state.items()}
        weight = torch.func.functional_call(Weight(layer), named)
        return torch.func.functional_call(layer, state, (normal(1, 5, 4),)), weight

    assert torch.autograd.gradcheck(call, parameters)


class Weight(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self):
        return self.layer.weight


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
def test_dtypes(dtype):
    base = nn.Linear(6, 5, dtype=dtype)
    layer = filled(LoRALinear(base, 3, generator=seeded(0)))
    assert layer.A.dtype == layer.B.dtype == (F64 if dtype == F64 else F32)
    x = torch.randn(4, 6).to(dtype)
    exact = base.weight.double() + layer.B.double() @ layer.A.double()
    assert layer(x).dtype == layer.weight.dtype == layer.merge().weight.dtype == dtype
    close(layer(x), F.linear(x.double(), exact, base.bias.double()), 50 * eps(dtype))
    layer(x).sum().backward()
    assert layer.A.grad.dtype == layer.A.dtype
    close(layer.merge().weight, exact, eps(dtype) * exact.abs().max().item())  # rounded once


def test_a_model_turned_to_half_merges_without_half_sums():
    base = nn.Linear(300, 5)
    layer = filled(LoRALinear(base, 40, alpha=41)).to(BF16)
    B, A = layer.pair()
    exact = base.weight.double() + B.double() @ A.double()
    for W in (
        layer.weight,
        layer.merge().weight,
    ):  # half an eps of a number in [1, 2), rounded once
        within(((W.double() - exact) / exact).abs().max(), eps(BF16) / 2 * 1.01)


def test_autocast():
    layer = filled(LoRALinear(nn.Linear(6, 5), 3))
    x = torch.randn(4, 6)
    with torch.autocast("cpu", BF16):
        y, plain, W, merged = layer(x), layer.base(x), layer.weight, layer.merge().weight
    assert y.dtype == plain.dtype == BF16 and W.dtype == F32
    close(y, layer(x), 50 * eps(BF16))
    exactly(W, layer.merge().weight)
    exactly(W, merged)


def test_dropout_is_on_the_input_of_A_only():
    layer = filled(LoRALinear(nn.Linear(6, 5), 3, dropout=0.5))
    x = torch.randn(100, 6)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    close(layer(x), F.linear(x, layer.weight, layer.bias), 1e3 * eps(F32))
    exactly(layer(x), layer(x))


def test_stock_modules_that_read_the_weight_get_the_adapted_one():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    filled(adapt(attention, "out_proj", rank=2)["out_proj"])
    x = torch.randn(2, 3, 8)
    before = attention(x, x, x)[0]
    after = merge(attention)(x, x, x)[0]  # NonDynamicallyQuantizableLinear merges
    assert type(attention.out_proj) is nn.Linear
    close(before, after, 100 * eps(F32))


def test_copies_and_devices():
    layer = filled(LoRALinear(nn.Linear(6, 5), 3, alpha=6))
    x = torch.randn(4, 6)
    other = LoRALinear(nn.Linear(6, 5), 3, alpha=6)
    other.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        exactly(twin(x), layer(x))
        assert twin.B is not layer.B
    assert layer.to(F64)(x.double()).dtype == F64
    meta = LoRALinear(nn.Linear(6, 5, device="meta"), 3)
    assert meta(torch.empty(2, 6, device="meta")).shape == (2, 5)
    assert meta.weight.is_meta
    assert LoRALinear(nn.Linear(6, 5, device="meta"), 3, generator=seeded(0)).A.is_meta


def test_generator_leaves_the_global_state_alone():
    base, state = nn.Linear(6, 5), torch.get_rng_state()
    a, b = (LoRALinear(base, 3, generator=seeded(1)) for _ in range(2))
    a.merge()
    exactly(torch.get_rng_state(), state)
    exactly(a.A, b.A)
    assert not torch.equal(LoRALinear(base, 3).A, LoRALinear(base, 3).A)


def test_compiles_into_one_graph():
    layer = filled(LoRALinear(nn.Linear(6, 5), 3, alpha=2))
    x = torch.randn(4, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    close(compiled(x), layer(x), 10 * eps(F32))


def test_the_mode_of_the_layer_that_is_replaced():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    model[1].train()
    modules = adapt(model, ["0", "1"], 4, dropout=0.5)
    x = torch.randn(3, 8)
    exactly(filled(modules["0"])(x), modules["0"](x))
    assert [m.training for m in model] == [False, True]
    assert [m.training for m in merge(model)] == [False, True]


def test_more_arguments_reach_the_base():
    class Gated(nn.Linear):
        def forward(self, x, gate, *, shift=0.0):
            return super().forward(x) * gate + shift

    base = Gated(6, 5)
    layer = LoRALinear(base, 2)
    x = torch.randn(3, 6)
    exactly(layer(x, 2.0, shift=1.0), base(x, 2.0, shift=1.0))


# ------------------------------------------------------------------------------------ a whole model


def test_adapt_and_merge_change_what_they_should():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"query": shared, "key": nn.Linear(4, 4), "also_query": shared})
    model = nn.ModuleDict({"block": model, "head": nn.Linear(4, 2)})
    modules = adapt(model, ["block.query", "also_query"], rank=2, alpha=4)
    assert set(modules) == {"block.query", "block.also_query"}
    assert modules["block.query"] is modules["block.also_query"] is model.block.query
    assert modules["block.query"].scaling == 2 and type(model.block.key) is nn.Linear
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"block.query.A", "block.query.B"}
    filled(modules["block.query"])
    x = torch.randn(3, 4)
    before = model.block.query(x)
    assert merge(model) is model and model.block.query is model.block.also_query
    assert type(model.block.query) is nn.Linear
    close(model.block.query(x), before, 50 * eps(F32))
    assert type(merge(LoRALinear(nn.Linear(2, 2)))) is nn.Linear


def test_a_layer_around_a_layer_is_merged_with_it():
    inner = filled(LoRALinear(nn.Linear(6, 5), 2))
    model = nn.Sequential(filled(LoRALinear(inner, 3, alpha=5)))
    x = torch.randn(4, 6)
    before = model(x)
    assert type(merge(model)[0]) is nn.Linear and not [*model[0].children()]
    close(model(x), before, 100 * eps(F32))


# ------------------------------------------------------------------------------------------ ReSoRA


def by_hand(modules, inputs, metric="linear", **options):
    pairs = zip(modules.values(), inputs, strict=True)
    return sum(redundancy(*codes(m, x), metric, **options) for m, x in pairs) / len(inputs)


def codes(module, x):
    B, A = module.pair()
    return B, x.detach().reshape(-1, x.shape[-1]) @ A.T


def layer_inputs(model, x):
    return [x, model[:2](x), model[:4](x)]


def gradients(value, *tensors):
    """Of a scalar; a tensor that it does not depend on has gradient 0."""
    found = torch.autograd.grad(value, tensors, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def all_gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("metric", METRICS)
def test_penalty_is_the_mean_over_layers_of_each_ones_codes(metric):
    model, modules = tiny(alpha=5)
    x = normal(1, 6, 5, 8, dtype=F32)
    with ReSoRA(model, metric, beta=0.5, sigma=0.8) as regularizer:
        model(x)
        value = regularizer.penalty()
    wanted = by_hand(modules, layer_inputs(model, x), metric, beta=0.5, sigma=0.8)
    close(value, wanted, 1000 * eps(F32))
    factors = [p for m in modules.values() for p in (m.A, m.B)]
    for found, g in zip(gradients(value, *factors), gradients(wanted, *factors), strict=True):
        close(found, g, 1000 * eps(F32) * (1 + g.abs().max().item()))


def test_layers_of_other_dtypes_and_sizes_count_alike():
    model = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 4, dtype=F64))
    modules = adapt(model, ["0", "1"], 3)
    x = torch.randn(30, 8)
    with ReSoRA(model) as regularizer:
        model[1](model[0](x).double())  # not a forward of `model`
        with pytest.raises(ValueError, match="found no input"):
            regularizer.penalty()
    model.forward = lambda x: model[1](model[0](x).double())
    with ReSoRA(model) as regularizer:
        h = model[0](x).double()
        model(x)
        wanted = by_hand(modules, [x, h])
        close(regularizer.penalty(), wanted, 10 * eps(F32))


def test_detached_inputs_move_a_layers_own_factors_only():
    for detach in (True, False):
        model, modules = tiny()
        with ReSoRA(model, detach_input=detach) as regularizer:
            model(torch.randn(20, 8))
            value = regularizer.penalty()
        assert gradients(value, modules["4"].A)[0].abs().max() > 0
        # the last layer's term alone: what it does to the first layer
        before = nn.Sequential(*model[:4])
        with ReSoRA(model[4], detach_input=detach) as regularizer:
            model[4](before(torch.randn(20, 8)))
            term = regularizer.penalty()
        assert (gradients(term, modules["0"].B)[0].abs().max() == 0) == detach


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.query(x)) * self.value(x)


class Stack(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        self.blocks, self.reentrant = nn.ModuleList(Block() for _ in range(3)), reentrant

    def forward(self, x):
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def stack(reentrant=None, **options):
    torch.manual_seed(0)
    model = Stack(reentrant)
    for m in adapt(model, ["query", "value"], rank=3, **options).values():
        nn.init.normal_(m.B)
    return model


def train(model, call=None, steps=2, metric="linear", regularizer=None):
    """(gradients, what ReSoRA still holds) after `steps` accumulated steps."""
    regularizer = regularizer or ReSoRA(model, metric)
    call = model if call is None else call  # a compiled model has no truth value
    for step in range(steps):
        x = normal(step, 4, 6, 8, dtype=F32)
        loss = call(x.requires_grad_()).square().mean()
        (loss + regularizer.penalty()).backward()
    return all_gradients(model), regularizer.inputs


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, metric):
    wanted, _ = train(stack(), metric=metric)
    found, held = train(stack(reentrant), metric=metric)
    close(found, wanted, 1e3 * eps(F32))
    assert held == {}  # the second forward, inside backward, recorded nothing


def test_gradient_accumulation():
    model = stack()
    total, _ = train(model, steps=3)
    single = torch.zeros_like(total)
    for step in range(3):
        model.zero_grad()
        with ReSoRA(model) as regularizer:
            loss = model(normal(step, 4, 6, 8, dtype=F32)).square().mean()
            (loss + regularizer.penalty()).backward()
        single += all_gradients(model)
    close(total, single, 1e3 * eps(F32))


def test_autocast_and_half_models():
    model, _ = tiny()
    x = normal(1, 40, 8, dtype=F32)
    with ReSoRA(model) as regularizer:
        model(x)
        wanted = regularizer.penalty()
        with torch.autocast("cpu", BF16):
            model(x)
            inside = regularizer.penalty()
            model(x)
        outside = regularizer.penalty()
        model.to(BF16)(x.to(BF16))
        half = regularizer.penalty()
    assert inside.dtype == outside.dtype == half.dtype == F32
    close(inside, outside, 10 * eps(F32))
    close(inside, wanted, 10 * eps(BF16))
    close(half, wanted, 10 * eps(BF16))


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_after_attaching(whole):
    wanted, _ = train(stack())
    model = stack()
    regularizer = ReSoRA(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if not whole:  # block by block
        compiled = model
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    found, held = train(model, compiled, regularizer=regularizer)
    close(found, wanted, 1e3 * eps(F32))
    assert held == {}
    regularizer.remove()
    compiled(torch.randn(4, 6, 8))
    assert regularizer.inputs == {}  # the graph with the hooks in it is not used any more
    torch.compiler.reset()


def test_compiled_and_checkpointed():
    wanted, _ = train(stack())
    model = stack(reentrant=False)
    regularizer = ReSoRA(model)
    found, held = train(model, torch.compile(model, backend="aot_eager"), regularizer=regularizer)
    close(found, wanted, 1e3 * eps(F32))
    assert held == {}
    torch.compiler.reset()


def test_hooks_that_a_compiled_graph_never_calls_are_noticed():
    model = stack()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(4, 6, 8)
    compiled(x)
    regularizer = ReSoRA(model)
    compiled(x)
    with pytest.raises(ValueError, match=r"no input of blocks.0.query, .*compile after ReSoRA"):
        regularizer.penalty()
    torch.compiler.reset()


def test_distributed(tmp_path):
    from torch import distributed

    wanted, _ = train(stack())
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for attach_outside in (True, False):
            model = stack()
            parallel = nn.parallel.DistributedDataParallel(model)
            regularizer = ReSoRA(parallel if attach_outside else model)
            found, held = train(model, parallel, regularizer=regularizer)
            close(found, wanted, 1e3 * eps(F32))
            assert held == {}
    finally:
        distributed.destroy_process_group()


def test_a_level_weight_penalty_inside_a_ddp_forward_that_skips_layers(tmp_path):
    from torch import distributed

    class Step(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.regularizer = model, ReSoRA(model, level="weight")

        def forward(self, x):
            return self.model.blocks[0](x).square().mean() + self.regularizer.penalty()

    model = stack()
    Step(model)(torch.ones(4, 6, 8)).backward()
    wanted = [p.grad for p in model.parameters()]
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = stack()
        parallel = nn.parallel.DistributedDataParallel(Step(model), find_unused_parameters=True)
        parallel(torch.ones(4, 6, 8)).backward()
    finally:
        distributed.destroy_process_group()
    for p, g in zip(model.parameters(), wanted, strict=True):
        assert (p.grad is None or p.grad.eq(0).all()) if g is None else torch.equal(p.grad, g)


def _worker(rank, folder):
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    parallel = nn.parallel.DistributedDataParallel(stack())
    regularizer = ReSoRA(parallel)
    x = normal(rank, 4, 6, 8, dtype=F32)
    (parallel(x).square().mean() + regularizer.penalty()).backward()
    torch.save(all_gradients(parallel), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_their_own_statistics(tmp_path):
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    a, b = (torch.load(f"{tmp_path}/{rank}.pt") for rank in range(2))
    exactly(a, b)
    singles = []
    for rank in range(2):
        model = stack()
        regularizer = ReSoRA(model)
        x = normal(rank, 4, 6, 8, dtype=F32)
        (model(x).square().mean() + regularizer.penalty()).backward()
        singles.append(all_gradients(model))
    close(a, (singles[0] + singles[1]) / 2, 1e3 * eps(F32))


def test_functional_call_around_forward_and_penalty():
    model, modules = tiny()
    regularizer = ReSoRA(model)

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            self.model(x)
            return regularizer.penalty()

    x = normal(1, 20, 8, dtype=F32)
    own = {name: p.detach().clone() for name, p in Step().named_parameters()}
    other = {name: (p + 1).requires_grad_() for name, p in own.items()}
    value = torch.func.functional_call(Step(), other, (x,))
    (gradient,) = gradients(value, other["model.0.A"])
    for name, p in model.named_parameters():
        p.data = other[f"model.{name}"].detach()
    wanted = by_hand(modules, layer_inputs(model, x))
    close(value, wanted, 100 * eps(F32))
    close(gradient, gradients(wanted, modules["0"].A)[0], 100 * eps(F32))
    assert gradient.abs().max() > 0


def hooks(model):
    return [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


def test_remove_leaves_nothing_behind():
    model, _ = tiny()
    own = model[1].register_forward_hook(lambda *_: None)
    regularizer = ReSoRA(model)
    model(torch.randn(3, 8))
    assert len(hooks(model)) == 6  # three layers, two of the model, and the user's own
    regularizer.remove()
    regularizer.remove()
    assert len(hooks(model)) == 1 and regularizer.inputs == {}
    own.remove()
    with pytest.raises(RuntimeError, match="from the block"), ReSoRA(model):
        raise RuntimeError("from the block")
    assert hooks(model) == []
    ReSoRA(model, level="weight")
    assert hooks(model) == []


def test_holds_no_activation_between_steps():
    model, _ = tiny()
    regularizer = ReSoRA(model)
    alive = []
    model[1].register_forward_hook(lambda m, a, y: alive.append(weakref.ref(y.untyped_storage())))
    for _ in range(3):
        loss = model(torch.randn(3, 8)).sum()
        (loss + regularizer.penalty()).backward()
    del loss
    gc.collect()
    assert regularizer.inputs == {}
    # λ = 0 for a while: penalty() is not called, and only the latest forward is kept
    for _ in range(4):
        model(torch.randn(5, 8))
    assert [len(x) for x in regularizer.inputs.values()] == [1, 1, 1]


@pytest.mark.parametrize("mode", [True, False])
def test_forwards_without_gradients_are_not_the_steps(mode):
    model, modules = tiny()
    model.train(mode)  # from_pretrained returns a model in evaluation mode, and it is trained so
    x = torch.randn(9, 8)
    wanted = by_hand(modules, layer_inputs(model, x))
    with ReSoRA(model) as regularizer:
        for context in (torch.no_grad, torch.inference_mode):
            model(x)
            with context():
                for _ in range(3):  # as generate() does, and a reference pass
                    model(torch.randn(7, 8))
            close(regularizer.penalty(), wanted, 100 * eps(F32))
            with context():
                model(torch.randn(7, 8))
            assert regularizer.inputs == {}
        model(torch.randn(7, 8))
        model(x)  # the latest forward with gradients
        close(regularizer.penalty(), wanted, 100 * eps(F32))


def test_a_forward_that_fails_leaves_nothing_to_the_next():
    model, modules = tiny()
    x = torch.randn(9, 8)
    with ReSoRA(model) as regularizer:
        with pytest.raises(ValueError, match=r"x: found \(3, 5\), want \(…, 8\)"):
            nn.Sequential.forward(model, torch.randn(3, 5))
        with pytest.raises(ValueError, match=r"x: found \(3, 5\), want \(…, 8\)"):
            model(torch.randn(3, 5))
        model(x)
        value = regularizer.penalty()
    close(value, by_hand(modules, layer_inputs(model, x)), 100 * eps(F32))


def test_layers_that_do_not_run_are_left_out_of_the_mean():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x, rows):
            for expert, n in zip(self.experts, rows, strict=True):
                if n is not None:
                    expert(x[:n])

    model, x = Experts(), torch.randn(20, 8)
    first, second, third = adapt(model, ["experts.0", "experts.1", "experts.2"], 3).values()
    with ReSoRA(model) as regularizer:
        model(x, [20, None, 0])  # skipped, as by LayerDrop; an expert that got no token
        close(regularizer.penalty(), redundancy(*codes(first, x)), 10 * eps(F32))
        model(x, [None, 20, 10])
        wanted = (redundancy(*codes(second, x)) + redundancy(*codes(third, x[:10]))) / 2
        close(regularizer.penalty(), wanted, 10 * eps(F32))
        for rows in ([None] * 3, [0] * 3):
            model(x, rows)
            with pytest.raises(
                ValueError, match="no input of experts.0, .*use `if model.training`"
            ):
                regularizer.penalty()


def test_a_layer_called_twice_has_the_tokens_of_both_calls():
    layer = LoRALinear(nn.Linear(8, 8), 3)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = layer

        def forward(self, x):
            return self.b(self.a(x))

    model, x = Twice(), torch.randn(9, 8)
    with ReSoRA(model) as regularizer:
        model(x)
        value = regularizer.penalty()
    tokens = torch.cat([x, layer(x)])
    close(value, redundancy(*codes(layer, tokens)), 100 * eps(F32))


def test_inputs_by_keyword():
    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = LoRALinear(nn.Linear(8, 8), 3)

        def forward(self, x):
            return self.layer(x=x)

    model, x = Caller(), torch.randn(9, 8)
    with ReSoRA(model) as regularizer:
        model(x=x)
        close(regularizer.penalty(), redundancy(*codes(model.layer, x)), 10 * eps(F32))


def test_nonlinear_draws_other_tokens_in_each_step_and_the_same_in_each_run():
    model, _ = tiny()
    x = torch.randn(100, 8)

    def values(**options):
        with ReSoRA(model, "nonlinear", samples=20, **options) as regularizer:
            found = []
            for _ in range(2):
                model(x)
                found.append(regularizer.penalty().item())
        return found

    first = values()
    assert first[0] != first[1] and values() == first
    assert values(generator=seeded(7)) == values(generator=seeded(7)) != first


def test_copies_of_a_watched_model_are_on_their_own():
    model, _ = tiny()
    with ReSoRA(model) as regularizer:
        twin = copy.deepcopy(model)
        pickle.loads(pickle.dumps(model))(torch.randn(3, 8))
        twin(torch.randn(3, 8))
        assert regularizer.inputs == {}
        weight = ReSoRA(twin, level="weight")  # a copy needs its own
        twin[0].A.data += 1
        assert weight.penalty() != ReSoRA(model, level="weight").penalty()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_transformer_with_checkpointing(reentrant):
    import peft
    from transformers import ViTConfig, ViTForImageClassification

    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(ViTForImageClassification(config), lora).train()
        if checkpointing:
            model.enable_input_require_grads()
            keywords = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)
        regularizer = ReSoRA(model)  # the next three lines are what a user writes
        pixels = normal(0, 2, 3, 16, 16, dtype=F32).requires_grad_()
        loss = model(pixel_values=pixels, labels=torch.tensor([0, 1])).loss
        (loss + 0.1 * regularizer.penalty()).backward()
        assert regularizer.inputs == {}
        found.append(all_gradients(model))
    close(found[1], found[0], 1e3 * eps(F32))
