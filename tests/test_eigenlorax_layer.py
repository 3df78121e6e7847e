"""eigenlorax.py in a model: dtypes, autocast, devices, compiled, exported, saved, served."""

import copy
import io
import math

import accelerate
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import eigenlorax
from eigenlorax import (
    EigenLoRAxLinear,
    adapt,
    from_bank,
    merge,
    principal_components,
    recycle,
    serving,
    to_bank,
    update,
)
from tests.checks import BF16, EPS, F16, F32, F64, SEEDS, WIDE, close, eps, exactly, normal, seeded
from tests.test_eigenlorax import layer, orthonormal, planted, projector, svd

IDS = torch.arange(24).view(4, 6) % 20


def some_adapters(generator, ranks, shapes, dtype=F32):
    """One adapter for each rank, with one layer for each {name: (o, d)}."""
    draw = lambda *shape: normal(generator, *shape, dtype=dtype)  # noqa: E731
    return [{name: (draw(o, r), draw(r, d)) for name, (o, d) in shapes.items()} for r in ranks]


# ----------------------------------------------------------------------------------- components


@given(SEEDS, st.integers(3, 40), st.integers(3, 40), st.booleans(), WIDE)
def test_components_are_those_of_a_float64_svd(seed, m, n, center, dtype):
    K = min(m - 1, n) // 2 or 1
    sigma = torch.cat([torch.linspace(2, 1, K), torch.linspace(0.1, 0.05, min(m, n) - K)])
    rows = planted(seeded(seed), m, n, sigma, dtype)
    sigma, V = svd(rows, center)
    gap = sigma[0] ** 2 / (sigma[K - 1] ** 2 - sigma[K] ** 2)
    found = principal_components(rows, K, center).V
    close(projector(found), projector(V[:K]), 8 * max(m, n) * EPS * gap + 4 * eps(dtype))


def test_half_precision_rows_are_taken_as_they_are_and_answered_in_float32():
    rows = normal(0, 6, 10, dtype=BF16)
    found = principal_components(rows, 3)
    assert {found.V.dtype, found.mean.dtype, found.singular_values.dtype} == {F32}
    sigma, _ = svd(rows, center=True)
    close(found.singular_values, sigma[:3], eps(F32) * sigma[0] ** 2 / sigma[2])


def test_principal_components_leaves_its_argument_alone():
    rows = normal(0, 6, 10)
    before = rows.clone()
    principal_components(rows, 3)
    exactly(rows, before)


@pytest.mark.parametrize("mixed", [False, True])
def test_the_rank_of_repeated_float32_rows_is_not_fooled_by_rounding(mixed):
    generator = seeded(0)
    A = normal(generator, 5, 60, dtype=F32)
    turns = [torch.linalg.qr(normal(generator, 5, 5, dtype=F32)).Q for _ in range(20)]
    B = normal(generator, 7, 5, dtype=F32)
    adapters = [{"q": (B, Q @ A)} for Q in turns]
    if mixed:  # one adapter in float64 does not make the others exact
        adapters[0] = {"q": tuple(X.double() for X in adapters[0]["q"])}
    assert recycle(adapters)["q"].A.V.shape == (5, 60)
    assert len(principal_components(torch.cat([Q @ A for Q in turns]), center=False).V) == 5


@pytest.mark.parametrize("size", [1.0, 1e20, 1e-25])
def test_centred_components_keep_the_mean_apart_and_one_row_brings_it_back(size):
    rows = size * (normal(0, 8, 12) + 3).float()
    found = principal_components(rows, center=True)
    close(found.mean, rows.mean(0), 4 * eps(F32) * rows.abs().max())
    close(found.reconstruct(found.project(rows)), rows, 64 * eps(F32) * rows.abs().max())
    residual = found.mean - found.mean @ found.V.T @ found.V
    V = torch.cat([found.V, nn.functional.normalize(residual[None] / size)])
    orthonormal(V, F32)
    close(rows @ V.T @ V, rows, 64 * eps(F32) * rows.abs().max())


def test_the_recipe_for_pairs_of_unequal_size_brings_the_subspace_back():
    adapters = some_adapters(seeded(0), [2, 2, 2], {"q": (9, 11)}, F64)
    B, A = adapters[0]["q"]
    wanted = recycle(adapters, k=0.9)["q"]
    adapters[0] = {"q": (B / 100, 100 * A)}
    assert len(recycle(adapters, k=0.9)["q"].A.V) < len(wanted.A.V)
    balanced = []
    for adapter in adapters:
        B, A = adapter["q"]
        c = (A.norm() / B.norm()).sqrt()
        balanced.append({"q": (c * B, A / c)})
    found = recycle(balanced, k=0.9)["q"]
    assert len(found.A.V) == len(wanted.A.V)
    for B, A in (adapter["q"] for adapter in adapters):
        left = B @ A - projector(found.B.V) @ B @ A @ projector(found.A.V)
        assert left.norm() < 0.5 * (B @ A).norm()


def test_pseudo_components_stand_below_and_go_with_an_update():
    adapters = some_adapters(seeded(0), [2, 2], {"q": (20, 30)})
    start = recycle(adapters[:1], k=1, pseudo=4, generator=seeded(1))
    assert start["q"].A.V.shape == (5, 30) and start["q"].A.singular_values.shape == (1,)
    orthonormal(start["q"].A.V, F32)
    grown = update(start, adapters[1:], k=1)["q"]
    plain = update(recycle(adapters[:1], k=1), adapters[1:], k=1)["q"]
    exactly(grown.A.V, plain.A.V)


def test_update_takes_new_layers_and_keeps_the_others():
    generator = seeded(0)
    first = some_adapters(generator, [2], {"q": (5, 6), "k": (5, 6)})
    more = some_adapters(generator, [3], {"q": (5, 6), "v": (4, 6)})
    start = recycle(first, k=2)
    grown = update(start, more, k=2)
    assert list(grown) == ["q", "k", "v"] and grown["k"] is start["k"]
    assert {len(subspace.A.V) for subspace in grown.values()} == {2}
    exactly(grown["v"].A.V, recycle([{"v": more[0]["v"]}], k=2)["v"].A.V)


def test_an_update_in_another_precision_takes_no_rounding_for_directions():
    generator = seeded(0)
    A, B = normal(generator, 2, 12), normal(generator, 9, 2)
    turns = [torch.linalg.qr(normal(generator, 2, 2)).Q for _ in range(6)]
    exact = [{"q": (B @ Q, Q.T @ A)} for Q in turns]
    coarse = [{"q": tuple(X.float() for X in adapter["q"])} for adapter in exact]
    for first, later in ((exact, coarse), (coarse, exact)):
        found = update(recycle(first), later)["q"]
        assert (len(found.A.V), len(found.B.V)) == (2, 2)


def test_a_share_that_an_update_has_lost_keeps_all_there_is():
    adapters = some_adapters(seeded(0), [4, 1], {"q": (9, 11)}, F64)
    found = update(recycle(adapters[:1], k=1), adapters[1:], k=0.999)["q"]
    assert len(found.A.V) == 2  # one direction was kept, one came: the share is out of reach
    assert found.A.singular_values.square().sum() < 0.999 * found.A.energy


def test_adapters_are_asked_for_one_layer_at_a_time():
    class Lazy(dict):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    asked = []
    adapters = [Lazy(a) for a in some_adapters(seeded(0), [1, 2, 3], {"q": (5, 6), "k": (5, 6)})]
    wanted = recycle([dict(a) for a in adapters])
    found = recycle(iter(adapters))
    assert asked == ["q"] * 3 + ["k"] * 3
    for name in ("q", "k"):
        exactly(found[name].A.V, wanted[name].A.V)


def test_random_numbers_come_from_the_generator_when_there_is_one():
    state = torch.get_rng_state()
    one, two = (layer(seeded(3), dtype=F32, tasks=2) for _ in range(2))
    for alpha, twin in zip(one.parameters(), two.parameters(), strict=True):
        exactly(alpha, twin)
    base, subspaces = nn.Linear(3, 4), recycle([{"q": (torch.ones(4, 1), torch.ones(1, 3))}])
    torch.set_rng_state(state)
    EigenLoRAxLinear(base, subspaces["q"], generator=seeded(0))
    recycle([{"q": (torch.ones(4, 1), torch.ones(1, 3))}], pseudo=1, generator=seeded(0))
    exactly(torch.get_rng_state(), state)


def test_recycled_directions_carry_no_gradient_and_layers_share_no_memory():
    subspaces = recycle([{"0": layer(seeded(0), dtype=F32, o=6, d=6).pair()}], pseudo=1)
    assert not subspaces["0"].A.V.requires_grad and not subspaces["0"].B.V.requires_grad
    copy.deepcopy(subspaces)
    one, two = (nn.Sequential(nn.Linear(6, 6)) for _ in range(2))
    adapt(one, subspaces), adapt(two, subspaces)
    assert len({V.data_ptr() for V in (one[0].V_A, two[0].V_A, subspaces["0"].A.V)}) == 3


# ---------------------------------------------------------------------------------------- layer


def test_set_task_takes_smaller_ranks_and_the_columns_left_over_can_train():
    adapters = some_adapters(seeded(0), [2, 3], {"q": (7, 9)}, F64)
    base = nn.Linear(9, 7, dtype=F64)
    module = EigenLoRAxLinear(base, recycle(adapters)["q"], rank=3, tasks=2, scaling=-4.0)
    for task, adapter in enumerate(adapters):
        module.set_task(task, *adapter["q"])
        (B, A), (B_0, A_0) = module.pair(task), adapter["q"]
        close(B @ A, B_0 @ A_0, 64 * 9 * EPS * (B_0 @ A_0).norm())
    optimiser = torch.optim.SGD(module.parameters(), 0.1)
    module(normal(1, 5, 9)).square().sum().backward()
    optimiser.step()
    assert module.alpha_B[0][:, 2].norm() > 0  # it was 0, and its α_A was not


@given(SEEDS, WIDE, st.sampled_from([BF16, F16]))
def test_a_half_pair_is_projected_in_the_layers_precision(seed, dtype, half):
    module = layer(seeded(seed), dtype=dtype, scaling=1e-3)
    B, A = 100 * normal(seed, 7, 2, dtype=half), normal(seed + 1, 2, 9, dtype=half)
    module.set_task(0, B, A)
    coarse = module.alpha_B[0].detach().clone()
    module.set_task(0, B.to(dtype), A.to(dtype))
    assert coarse.isfinite().all()
    exactly(module.alpha_B[0], coarse)


def test_pairs_merging_and_projecting_ignore_autocast():
    module = layer(seeded(0), dtype=F32)
    pair = normal(1, 7, 2, dtype=F32), normal(2, 2, 9, dtype=F32)
    module.set_task(0, *pair)
    wanted = [module.merge().weight, *module.pair(), *(p.clone() for p in module.parameters())]
    with torch.autocast("cpu", BF16):
        module.set_task(0, *pair)
        found = [module.merge().weight, *module.pair(), *module.parameters()]
    for one, other in zip(found, wanted, strict=True):
        exactly(one, other)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_half_precision_model_keeps_float32_coefficients(dtype):
    generator = seeded(0)
    subspace = recycle(some_adapters(generator, [3], {"q": (6, 8)}))["q"]
    base = nn.Linear(8, 6, dtype=dtype)
    module = EigenLoRAxLinear(base, subspace, rank=2, tasks=2, init="random", generator=generator)
    assert {module.alpha_A[0].dtype, module.V_B.dtype} == {F32}
    x = normal(generator, 40, 8, dtype=dtype)
    merged = module.merge(1)
    assert merged.weight.dtype == dtype
    B, A = module.pair(1)
    exactly(merged.weight, (base.weight.float() + B @ A).to(dtype))
    for y in (module(x, 1), module(x[:1], 1), module(x, torch.ones(40, dtype=torch.long))):
        assert y.dtype == dtype
        close(y, merged(x[: len(y)]), 8 * 8 * eps(dtype) * 4)  # sums of 8, values to 4; c = 8
    module.float()
    with torch.autocast("cpu", BF16):
        for task in (0, torch.zeros(40, dtype=torch.long)):
            assert module(x.float(), task).dtype == BF16


def test_a_base_that_answers_in_another_dtype_is_followed():
    class Casting(nn.Linear):
        def forward(self, x):
            return super().forward(x.to(self.weight.dtype))

    subspace = recycle([{"q": (torch.ones(3, 1), torch.ones(1, 4))}])["q"]
    module = EigenLoRAxLinear(Casting(4, 3, dtype=BF16), subspace, tasks=2, init="random")
    for task in (0, torch.tensor([0, 1])):
        assert module(torch.ones(2, 4), task).dtype == BF16


def test_a_base_in_float32_under_autocast_keeps_its_digits_in_a_mixed_batch():
    class Exact(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    subspace = recycle([{"q": (torch.ones(3, 1), torch.ones(1, 4))}])["q"]
    module = EigenLoRAxLinear(Exact(4, 3), subspace, tasks=2)
    module.base.bias.data.fill_(1000.1)
    x = normal(0, 2, 4, dtype=F32)
    with torch.autocast("cpu", BF16):
        exactly(module(x, torch.tensor([0, 1])), module.base(x))  # ΔW = 0


def test_a_compiled_layer_refuses_a_negative_task():
    module = layer(seeded(0), tasks=3, dtype=F32)
    compiled = torch.compile(module, backend="eager")
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError)):
        compiled(normal(1, 2, 9, dtype=F32), torch.tensor([-1, 0]))


def test_a_column_that_a_pair_leaves_at_zero_can_still_train():
    module = layer(seeded(0), rank=2)
    alpha_A = module.alpha_A[0].detach().clone()
    B, A = normal(1, 7, 2), normal(2, 2, 9)
    B[:, 1], A[1] = 0, 0
    module.set_task(0, B, A)
    exactly(module.alpha_A[0][:, 1], alpha_A[:, 1])
    assert not module.alpha_B[0][:, 1].any()


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_takes_the_mode_of_the_layer_it_replaces(training):
    model = nn.Sequential(nn.Linear(3, 4)).train(training)
    layers = adapt(model, recycle([{"0": (torch.ones(4, 1), torch.ones(1, 3))}]))
    assert layers["0"].training is training and layers["0"].merge().training is training


def test_drop_in_attributes_copies_and_state_dict():
    module = layer(seeded(0), tasks=2)
    assert (module.in_features, module.out_features) == (9, 7)
    assert module.bias is module.base.bias
    names = ["base.weight", "base.bias", "V_A", "V_B"]
    names += [f"alpha_{side}.{task}" for side in "AB" for task in (0, 1)]
    assert set(module.state_dict()) == set(names)
    assert all(value.is_contiguous() for value in module.state_dict().values())  # safetensors'
    x = normal(1, 3, 9)
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    other = layer(seeded(2), tasks=2)
    other.load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), torch.load(stored, weights_only=False), other):
        exactly(twin(x, 1), module(x, 1))
    module.weight.sum().backward()
    assert module.alpha_A[0].grad.norm() > 0 and module.base.weight.grad is None
    assert module.merge().bias.data_ptr() != module.bias.data_ptr()
    assert module.half().V_A.dtype == F16


def test_it_compiles_in_one_graph_without_gradients():
    module = layer(seeded(0), tasks=3, dtype=F32)
    x, ids = normal(1, 20, 9, dtype=F32), torch.arange(20) % 3
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    close(compiled(x, 1), module(x, 1), 1e-6)  # float32, values of order 1
    with torch.no_grad():
        close(compiled(x, ids), module(x, ids), 1e-6)
        for chosen in (ids, ids.flip(0)):  # the second block is not answered with the first's α
            with serving({"q": module}, chosen):
                close(compiled(x), module(x), 1e-6)


OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)


@pytest.mark.skipif(OLD, reason="before torch 2.13 a compiled graph gives 0 to what it did not use")
def test_compiled_training_of_a_mixed_batch_leaves_an_absent_task_alone():
    module = layer(seeded(0), tasks=3, dtype=F32)
    x, ids = normal(1, 4, 9, dtype=F32), torch.tensor([0, 2, 2, 0])
    compiled = torch.compile(module, backend="eager")  # in more than one graph
    alphas = [*module.alpha_A, *module.alpha_B]
    for call in (compiled, module):
        found = torch.autograd.grad(call(x, ids).square().sum(), alphas, allow_unused=True)
        assert [g is None for g in found] == [False, True, False] * 2
        if call is compiled:
            wanted = found
    for one, other in zip(found, wanted, strict=True):
        if one is not None:
            close(one, other, 1e-5 * other.abs().max())


@pytest.mark.parametrize("mixed", [False, True])
def test_it_exports_with_a_dynamic_batch(mixed):
    module = layer(seeded(0), tasks=3, dtype=F32)
    x, ids = normal(1, 6, 9, dtype=F32), torch.arange(6) % 3
    given, batch = (x, ids) if mixed else (x,), torch.export.Dim("batch")
    program = torch.export.export(module, given, dynamic_shapes=[{0: batch} for _ in given])
    for n in (2, 5):
        fewer = [X[:n] for X in given]
        close(program.module()(*fewer), module(*fewer), 1e-6)  # float32, values of order 1


def test_a_model_wholly_on_meta_works_and_an_offloaded_tensor_is_named():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3))
        layers = adapt(model, recycled_on_cpu())
        assert model(torch.empty(2, 4)).is_meta and layers["0"].merge().weight.is_meta
    offloaded = accelerate.cpu_offload(nn.Sequential(nn.Linear(4, 3)), torch.device("cpu"))
    adapted = adapt(offloaded, recycled_on_cpu())["0"]
    for tensor in (adapted.alpha_A[0], adapted.alpha_B[0]):
        assert tensor.is_meta
    with pytest.raises(ValueError, match="base.weight is on the meta device"):
        adapted.merge()
    module = layer(seeded(0), tasks=2, dtype=F32)
    x = normal(1, 5, 9, dtype=F32)
    module.alpha_B[1] = nn.Parameter(module.alpha_B[1].to("meta"))
    module(x, 0)
    for call in (lambda: module(x, 1), lambda: module.merge(1), lambda: module.pair(1)):
        with pytest.raises(ValueError, match=r"alpha_B on the meta device \(offloaded\?\)"):
            call()
        with pytest.raises(ValueError, match="alpha_B on the meta device"), torch.no_grad():
            module.set_task(1, normal(2, 7, 1, dtype=F32), normal(3, 1, 9, dtype=F32))
    module.base.weight = nn.Parameter(module.base.weight.to("meta"))
    for read in (lambda: module.merge(0), lambda: module.weight):
        with pytest.raises(ValueError, match="weight on the meta device"):
            read()
    module = layer(seeded(0), dtype=F32)
    module.V_A = module.V_A.to("meta")
    for ids in (0, torch.zeros(5, dtype=torch.long)):
        with pytest.raises(ValueError, match="V_A on the meta device"):
            module(x, ids)


def recycled_on_cpu():
    """A subspace for a Linear(4, 3) named "0"."""
    with torch.device("cpu"):
        return recycle([{"0": (torch.ones(3, 1), torch.ones(1, 4))}])


class Quantised(nn.Linear):
    """A Linear of stored numbers and a scale, as libraries for int8 and float8 have it."""

    def __init__(self, dtype):
        super().__init__(4, 3)
        self.scale = 0.01
        stored = (self.weight.detach() / self.scale).to(dtype)
        self.weight = nn.Parameter(stored, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantised_base_serves_and_says_that_it_does_not_merge(dtype):
    module = EigenLoRAxLinear(Quantised(dtype), recycled_on_cpu()["0"], init="random")
    x = normal(0, 5, 4, dtype=F32)
    B, A = module.pair()
    close(module(x), module.base(x) + x @ A.T @ B.T, 64 * eps(F32))
    assert hasattr(module, "weight") and module.weight.dtype == dtype
    with pytest.raises(TypeError, match="Quantised with a forward of its own"):
        module.merge()
    module.base.forward = None  # an instance cannot hide it
    plain = nn.Linear(4, 3)
    plain.weight = nn.Parameter(plain.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(TypeError, match=f"the base weight is {dtype}"):
        EigenLoRAxLinear(plain, recycled_on_cpu()["0"]).merge()


def test_training_reaches_the_components_where_a_user_wants_that():
    module = layer(seeded(0), dtype=F32)
    V = module.V_A.clone()
    del module.V_A
    module.V_A = nn.Parameter(V)
    module(normal(1, 5, 9, dtype=F32)).square().sum().backward()
    assert module.V_A.grad.norm() > 0


# --------------------------------------------------------------------------------- whole models


def mlp():
    """A model in which one layer has two names, and adapters for it."""
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"one": nn.Sequential(nn.Linear(6, 6), nn.Tanh(), shared), "two": shared})
    return model, some_adapters(seeded(0), [2, 3], {"one.0": (6, 6), "one.2": (6, 6)})


def test_merge_of_a_model_replaces_a_shared_layer_once():
    model, adapters = mlp()
    layers = adapt(model, recycle(adapters, k=2), rank=2, init="random")
    assert list(layers) == ["one.0", "one.2"]
    model["two"] = model["one"][2]
    model.eval()
    x = normal(1, 5, 6, dtype=F32)
    wanted = model["two"](model["one"](x))
    kept = layers["one.0"].base.weight.clone()
    assert merge(model) is model
    assert not any(isinstance(m, EigenLoRAxLinear) for m in model.modules())
    assert model["one"][2] is model["two"] and not model["two"].training
    close(model["two"](model["one"](x)), wanted, 64 * 6 * eps(F32) * 4)
    exactly(layers["one.0"].base.weight, kept)
    assert type(merge(layers["one.0"])) is nn.Linear


def test_a_name_may_lack_its_front_and_a_whole_name_is_that_layer_alone():
    adapters = some_adapters(seeded(0), [2], {"0": (6, 6), "a.0": (6, 6)})
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 6)), "0": nn.Linear(6, 6)})
    subspaces = recycle(adapters)
    layers = adapt(model, {"0": subspaces["0"]})
    assert list(layers) == ["0"] and type(model["a"][0]) is nn.Linear
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 6)), "0": nn.Linear(6, 6)})
    layers = adapt(model, subspaces)
    for name in ("0", "a.0"):
        exactly(layers[name].V_A, subspaces[name].A.V)
    model = nn.ModuleDict({"b": nn.Sequential(nn.Linear(6, 6))})
    layers = adapt(model, {"0": subspaces["0"]}, rank=2)
    assert list(layers) == ["b.0"]
    eigenlorax.set_task(layers, 0, {"0": adapters[0]["0"]})
    (B, A), (B_0, A_0) = layers["b.0"].pair(), adapters[0]["0"]
    close(B @ A, B_0 @ A_0, 64 * 6 * eps(F32) * B_0.norm() * A_0.norm())


def test_a_whole_adapter_is_a_task_and_a_layer_that_it_lacks_gets_no_delta():
    adapters = some_adapters(seeded(0), [2, 2], {"0": (6, 6), "2": (5, 6)})
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5))
    layers = adapt(model, recycle(adapters), rank=2, init="random")
    eigenlorax.set_task(layers, 0, {"2": adapters[1]["2"]})
    assert not layers["0"].pair()[0].any()
    B, A = adapters[1]["2"]
    close(layers["2"].weight - model[2].base.weight, B @ A, 64 * 6 * eps(F32) * B.norm() * A.norm())


def test_a_layer_with_two_names_is_adapted_under_both():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"one": nn.Sequential(nn.Linear(6, 6)), "two": shared, "three": shared})
    layers = adapt(model, recycle(some_adapters(seeded(0), [2], {"two": (6, 6)})))
    assert list(layers) == ["two"] and model["two"] is model["three"] is layers["two"]


def test_t5_reads_a_weight_and_serves_a_mixed_batch():
    config = transformers.T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(config).eval()
    name = "encoder.block.0.layer.1.DenseReluDense.wo"
    adapters = some_adapters(seeded(0), [2, 2], {name: (8, 12)})
    layers = adapt(model, recycle(adapters), rank=2, tasks=3, init="random")
    alone = []
    for i, task in enumerate((2, 0, 1, 2)):
        with serving(layers, task):
            alone.append(model(IDS[i : i + 1]).last_hidden_state)
    with serving(layers, [2, 0, 1, 2]):
        close(model(IDS).last_hidden_state, torch.cat(alone), 1e-5)  # float32, of order 1
        with pytest.raises(RuntimeError):
            nn.functional.linear(torch.ones(1, 12), layers[name].weight)


def test_layers_that_are_read_and_not_called_serve_their_adapter():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    adapters = some_adapters(seeded(0), [2], {"linear1": (16, 8), "out_proj": (8, 8)})
    x = normal(1, 2, 3, 8, dtype=F32)
    plain = encoder(x)
    adapt(encoder, recycle(adapters), rank=2, init="random", generator=seeded(2))
    with torch.no_grad():
        fast = encoder(x)
    merged = merge(copy.deepcopy(encoder))(x)
    close(fast, merged, 1e-5)  # float32, values of order 1, three layers
    assert (fast - plain).abs().max() > 0.01


def tiny_bert():
    """BERT for three classes, 16 wide."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    still = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = transformers.BertConfig(vocab_size=20, num_labels=3, **sizes, **still)
    return transformers.BertForSequenceClassification(config).eval()


NAMES = [f"encoder.layer.{i}.attention.self.{m}" for i in (0, 1) for m in ("query", "value")]


def test_serving_routes_a_whole_model():
    generator = seeded(0)
    model = tiny_bert()
    adapters = some_adapters(generator, [3, 3], dict.fromkeys(NAMES, (16, 16)))
    options = {"rank": 3, "tasks": 3, "init": "random", "generator": generator}
    layers = adapt(model, recycle(adapters), **options)
    ids = [2, 0, 1, 2]
    alone = []
    for i, task in enumerate(ids):
        with serving(layers, task):
            alone.append(model(IDS[i : i + 1]).logits)
    alone = torch.cat(alone)
    for given_ids in (ids, tuple(ids), torch.tensor(ids), np.array(ids, dtype=np.uint16)):
        with serving(layers, given_ids):
            close(model(IDS).logits, alone, 1e-5)  # float32, logits of order 1
            with serving(layers, 2), torch.no_grad():
                close(model(IDS[:1]).logits, alone[:1], 1e-5)
        with torch.no_grad(), serving(layers, given_ids):
            close(model(IDS).logits, alone, 1e-5)
            with torch.enable_grad():
                close(model(IDS).logits, alone, 1e-5)
    assert (alone[0] - alone[3]).abs().max() > 0.001
    with pytest.raises(RuntimeError, match="stop"), serving(layers, np.int64(2)):
        assert {module.task for module in layers.values()} == {2}
        raise RuntimeError("stop")
    assert {module.task for module in layers.values()} == {0}
    assert {module.gathered for module in layers.values()} == {None}


def test_a_bank_comes_back_on_another_model_and_is_whole():
    adapters = some_adapters(seeded(0), [3, 3], dict.fromkeys(NAMES, (16, 16)))
    model, other = tiny_bert(), tiny_bert()
    layers = adapt(model, recycle(adapters), rank=3, tasks=3, scaling=0.5, init="random")
    eigenlorax.set_task(layers, 1, adapters[0])
    stored = io.BytesIO()
    torch.save(to_bank(layers), stored)
    stored.seek(0)
    again = from_bank(other, torch.load(stored))
    assert list(again) == list(layers)
    assert {layer.scaling for layer in again.values()} == {0.5}
    for task in (0, 1, [2, 1, 0, 1]):
        with serving(layers, task), serving(again, task):
            exactly(other(IDS).logits, model(IDS).logits)
    short = {name.removeprefix("bert.encoder."): X for name, X in to_bank(layers).items()}
    assert list(from_bank(tiny_bert(), short)) == list(layers)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("0.V_A", None, r"the bank lacks, or has beside its own: 0.V_A"),
        ("0.other", torch.ones(1), r"the bank lacks, or has beside its own: 0.other"),
        ("0.alpha_B", torch.zeros(2, 2, 1), r"0: found α \(2, 1, 1\), \(2, 2, 1\) with V of 1, 1"),
        ("0.alpha_A", torch.zeros(3, 1, 1), r"0: found α \(3, 1, 1\), \(2, 1, 1\) with V of 1, 1"),
        ("0.alpha_A", torch.full((2, 1, 1), math.nan), r"0: α_A: found .* summing to nan"),
        ("0.V_B", torch.ones(1, 5), r"0: V_B is \(1, 5\); want \(K, 3\)"),
        ("0.scaling", torch.tensor(0.0), r"0: scaling 0.0"),
    ],
)
def test_a_bank_that_does_not_fit_is_refused_and_changes_nothing(key, value, message):
    bank = to_bank(adapt(nn.Sequential(nn.Linear(4, 3)), recycled_on_cpu(), tasks=2))
    bank |= {key: value}
    bank = {name: X for name, X in bank.items() if X is not None}
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=message):
        from_bank(model, bank)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad
