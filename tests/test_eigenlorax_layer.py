"""eigenlorax.py alone: components and updates, tasks of a layer, serving, banks.

What all three methods' layers do alike is in test_layers.py.
"""

import copy
import io
import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import eigenlorax
from eigenlorax import (
    adapt,
    from_bank,
    principal_components,
    recycle,
    serving,
    to_bank,
    update,
)
from tests.checks import BF16, EPS, F16, F32, F64, SEEDS, WIDE, close, eps, exactly, normal, seeded
from tests.test_eigenlorax import layer, orthonormal, projector, svd

IDS = torch.arange(24).view(4, 6) % 20


def some_adapters(generator, ranks, shapes, dtype=F32):
    """One adapter for each rank, with one layer for each {name: (o, d)}."""
    draw = lambda *shape: normal(generator, *shape, dtype=dtype)  # noqa: E731
    return [{name: (draw(o, r), draw(r, d)) for name, (o, d) in shapes.items()} for r in ranks]


def repeated(turns, dtype=F64):
    """Adapters (BQ, QᵀA) of one ΔW of rank 2 and shape (9, 12), in as many turns Q."""
    generator = seeded(0)
    B, A = normal(generator, 9, 2), normal(generator, 2, 12)
    Qs = [torch.linalg.qr(normal(generator, 2, 2)).Q for _ in range(turns)]
    return [{"q": ((B @ Q).to(dtype), (Q.T @ A).to(dtype))} for Q in Qs]


# ----------------------------------------------------------------------------------- components


def test_half_precision_rows_are_taken_as_they_are_and_answered_in_float32():
    rows = normal(0, 6, 10, dtype=BF16)
    found = principal_components(rows, 3)
    assert {found.V.dtype, found.mean.dtype, found.singular_values.dtype} == {F32}
    sigma, _ = svd(rows, center=True)
    close(found.singular_values, sigma[:3], eps(F32) * sigma[0] ** 2 / sigma[2])


@pytest.mark.parametrize("first, later", [(F32, F32), (F32, F64), (F64, F32)])
def test_rounding_of_float32_is_no_direction(first, later):
    """At once and by an update, also where some of the adapters are float64."""
    one, other = repeated(1, first), repeated(20, later)[1:]
    for found in (recycle(one + other)["q"], update(recycle(one), other)["q"]):
        assert (len(found.A.V), len(found.B.V)) == (2, 2)


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
    wanted = recycle(adapters, k=0.9)["q"]
    B, A = adapters[0]["q"]
    adapters[0] = {"q": (B / 100, 100 * A)}
    assert len(recycle(adapters, k=0.9)["q"].A.V) < len(wanted.A.V)
    for adapter in adapters:
        B, A = adapter["q"]
        c = (A.norm() / B.norm()).sqrt()
        adapter["q"] = c * B, A / c
    found = recycle(adapters, k=0.9)["q"]
    assert len(found.A.V) == len(wanted.A.V)
    for B, A in (adapter["q"] for adapter in adapters):
        left = B @ A - projector(found.B.V) @ B @ A @ projector(found.A.V)
        assert left.norm() < 0.5 * (B @ A).norm()


def test_pseudo_components_stand_below_and_go_with_an_update():
    adapters, state = some_adapters(seeded(0), [2, 2], {"q": (20, 30)}), torch.get_rng_state()
    start = recycle(adapters[:1], k=1, pseudo=4, generator=seeded(1))
    exactly(torch.get_rng_state(), state)
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
    adapters = some_adapters(seeded(0), [1, 2, 3], {"q": (5, 6), "k": (5, 6)})
    found, wanted = recycle(Lazy(adapter) for adapter in adapters), recycle(adapters)
    assert asked == ["q"] * 3 + ["k"] * 3
    for name in ("q", "k"):
        exactly(found[name].A.V, wanted[name].A.V)


def test_recycled_directions_carry_no_gradient_and_layers_share_no_memory():
    subspaces = recycle([{"0": layer(seeded(0), dtype=F32, o=6, d=6).pair()}], pseudo=1)
    assert not subspaces["0"].A.V.requires_grad and not subspaces["0"].B.V.requires_grad
    copy.deepcopy(subspaces)
    one, two = (adapt(nn.Sequential(nn.Linear(6, 6)), subspaces)["0"] for _ in range(2))
    assert len({V.data_ptr() for V in (one.V_A, two.V_A, subspaces["0"].A.V)}) == 3


# ----------------------------------------------------------------------------- tasks of a layer


def test_a_pair_of_smaller_rank_leaves_columns_that_can_still_train():
    """α_B is 0 in them and α_A is not; a column that a pair has at 0 is such a column."""
    module = layer(seeded(0), rank=3, scaling=-4.0)
    before = module.alpha_A[0].detach().clone()
    B, A = normal(1, 7, 2), normal(2, 2, 9)
    B[:, 1], A[1] = 0, 0
    B, A = projector(module.V_B) @ B, A @ projector(module.V_A)
    module.set_task(0, B, A)
    close(torch.matmul(*module.pair()), B @ A, 64 * 9 * EPS * (B @ A).norm())
    exactly(module.alpha_A[0][:, 1:], before[:, 1:])
    assert not module.alpha_B[0][:, 1:].any()
    optimiser = torch.optim.SGD(module.parameters(), 0.1)
    module(normal(1, 5, 9)).square().sum().backward()
    optimiser.step()
    assert (module.alpha_B[0].norm(dim=0) > 0).all()


@given(SEEDS, WIDE, st.sampled_from([BF16, F16]))
def test_a_half_pair_is_projected_in_the_layers_precision(seed, dtype, half):
    module = layer(seeded(seed), dtype=dtype, scaling=1e-3)
    B, A = 100 * normal(seed, 7, 2, dtype=half), normal(seed + 1, 2, 9, dtype=half)
    module.set_task(0, B.to(dtype), A.to(dtype))
    wanted = module.alpha_B[0].detach().clone()
    with torch.autocast("cpu", BF16):
        module.set_task(0, B, A)
    exactly(module.alpha_B[0], wanted)


def test_a_compiled_layer_refuses_a_negative_task():
    compiled = torch.compile(layer(seeded(0), tasks=3, dtype=F32), backend="eager")
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError)):
        compiled(normal(1, 2, 9, dtype=F32), torch.tensor([-1, 0]))


def test_a_mixed_batch_compiles_in_one_graph_without_gradients():
    module = layer(seeded(0), tasks=3, dtype=F32)
    x, ids = normal(1, 20, 9, dtype=F32), torch.arange(20) % 3
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch.no_grad():
        close(compiled(x, ids), module(x, ids), 1e-6)  # float32, values of order 1
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
    found, wanted = (
        torch.autograd.grad(call(x, ids).square().sum(), alphas, allow_unused=True)
        for call in (compiled, module)
    )
    for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert (one is None) == (other is None) == (i in (1, 4))
        if one is not None:
            close(one, other, 1e-5 * other.abs().max())


def test_a_mixed_batch_exports_with_a_dynamic_batch():
    module = layer(seeded(0), tasks=3, dtype=F32)
    x, ids, batch = normal(1, 6, 9, dtype=F32), torch.arange(6) % 3, torch.export.Dim("batch")
    program = torch.export.export(module, (x, ids), dynamic_shapes=({0: batch}, {0: batch}))
    for n in (2, 5):
        close(program.module()(x[:n], ids[:n]), module(x[:n], ids[:n]), 1e-6)


def test_an_offloaded_tensor_is_named_whatever_reads_it():
    x, pair = normal(1, 5, 9, dtype=F32), (normal(2, 7, 1), normal(3, 1, 9))
    for name in ("V_A", "V_B", "alpha_A", "alpha_B"):
        m = layer(seeded(0), tasks=2, dtype=F32)
        if name in ("V_A", "V_B"):
            setattr(m, name, getattr(m, name).to("meta"))
        else:
            getattr(m, name)[1] = nn.Parameter(getattr(m, name)[1].to("meta"))
            m(x, 0)  # the other task is served
        calls = [lambda m=m: m(x, 1), lambda m=m: m(x, torch.ones(5).long()), lambda m=m: m.pair(1)]
        if name.startswith("alpha"):
            calls.append(lambda m=m: m.set_task(1, *pair))
        for call in calls:
            with pytest.raises(ValueError, match=rf"{name}.* on the meta device \(offloaded\?\)"):
                call()
    m = layer(seeded(0), tasks=2, dtype=F32)
    m.base.weight = nn.Parameter(m.base.weight.to("meta"))
    with pytest.raises(ValueError, match="weight on the meta device"):
        _ = m.weight


def test_training_reaches_the_components_where_a_user_wants_that():
    module = layer(seeded(0), dtype=F32)
    V = module.V_A.clone()
    del module.V_A
    module.V_A = nn.Parameter(V)
    module(normal(1, 5, 9, dtype=F32)).square().sum().backward()
    assert module.V_A.grad.norm() > 0


# --------------------------------------------------------------------------------- whole models


def test_a_whole_adapter_is_a_task_and_a_layer_that_it_lacks_gets_no_delta():
    """The names in the adapter may lack the front that the model gives them."""
    adapters = some_adapters(seeded(0), [2, 2], {"q": (6, 6), "v": (5, 6)}, F64)
    block = nn.ModuleDict({"q": nn.Linear(6, 6, dtype=F64), "v": nn.Linear(6, 5, dtype=F64)})
    layers = adapt(nn.ModuleDict({"b": block}), recycle(adapters), rank=2, init="random")
    assert list(layers) == ["b.q", "b.v"]
    B, A = adapters[1]["v"]
    eigenlorax.set_task(layers, 0, {"v": (B, A)})
    assert not layers["b.q"].pair()[0].any()
    close(torch.matmul(*layers["b.v"].pair()), B @ A, 64 * 6 * EPS * B.norm() * A.norm())


def test_a_name_that_two_layers_share_is_given_whole():
    names = {"0": (6, 6), "a.0": (6, 6)}
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 6)), "0": nn.Linear(6, 6)})
    subspaces = recycle(some_adapters(seeded(0), [2], names))
    for name, module in adapt(model, subspaces).items():
        exactly(module.V_A, subspaces[name].A.V)


def tiny_t5():
    """The encoder of a T5; it reads wo.weight, for its dtype."""
    sizes = dict(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
    torch.manual_seed(0)
    return transformers.T5EncoderModel(transformers.T5Config(**sizes, dropout_rate=0.0)).eval()


def tiny_bert():
    """BERT for three classes, 16 wide."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    still = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = transformers.BertConfig(vocab_size=20, num_labels=3, **sizes, **still)
    return transformers.BertForSequenceClassification(config).eval()


NAMES = [f"encoder.layer.{i}.attention.self.{m}" for i in (0, 1) for m in ("query", "value")]
SERVED = {
    "BERT": (tiny_bert, dict.fromkeys(NAMES, (16, 16))),
    "T5": (tiny_t5, {"encoder.block.0.layer.1.DenseReluDense.wo": (8, 12)}),
}


@pytest.mark.parametrize("make, shapes", SERVED.values(), ids=SERVED)
def test_serving_routes_a_whole_model(make, shapes):
    """In a block, with or without gradients, and in a block within a block."""
    model = make()
    options = {"rank": 3, "tasks": 3, "init": "random", "generator": seeded(0)}
    layers = adapt(model, recycle(some_adapters(seeded(0), [3, 3], shapes)), **options)
    ids = [2, 0, 1, 2]
    alone = []
    for i, task in enumerate(ids):
        with serving(layers, task):
            alone.append(model(IDS[i : i + 1])[0])
    alone = torch.cat(alone)
    assert (alone[0] - alone[1]).abs().max() > 0.001
    for given_ids in (ids, tuple(ids), torch.tensor(ids), np.array(ids, dtype=np.uint16)):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients), serving(layers, given_ids):
                with serving(layers, 2):
                    close(model(IDS[:1])[0], alone[:1], 1e-5)  # float32, of order 1
                close(model(IDS)[0], alone, 1e-5)
                with torch.enable_grad():
                    y = model(IDS)[0]
                close(y, alone, 1e-5)
                assert y.requires_grad


def test_a_block_that_ends_by_an_error_leaves_the_tasks_as_they_were():
    layers = {"q": layer(seeded(0), tasks=3)}
    with pytest.raises(RuntimeError, match="stop"), serving(layers, np.int64(2)):
        assert layers["q"].task == 2
        raise RuntimeError("stop")
    assert layers["q"].task == 0 and layers["q"].gathered is None
    with serving(layers, [2, 0]), pytest.raises(RuntimeError):
        nn.functional.linear(normal(0, 1, 9), layers["q"].weight)  # there is no one weight


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
    subspaces = recycle([{"0": (torch.ones(3, 1), torch.ones(1, 4))}])
    bank = to_bank(adapt(nn.Sequential(nn.Linear(4, 3)), subspaces, tasks=2)) | {key: value}
    bank = {name: X for name, X in bank.items() if X is not None}
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=message):
        from_bank(model, bank)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad
