"""Tests of eigenlorax.py: the claims of its docstring, in their order, then everything else."""

import copy
import io
import json
import math
import os
from pathlib import Path

import peft
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from eigenlorax import (
    EigenLoRAxLinear,
    Subspace,
    adapt,
    augment,
    choose_k,
    lora_pairs,
    merge,
    principal_components,
    project,
    reconstruct,
    recycle,
    serving,
    to_peft,
    update,
)

EPS = torch.finfo(torch.float64).eps
SEED = st.integers(0, 10_000)
SIZE = st.integers(1, 20)
DTYPE = st.sampled_from([torch.float32, torch.float64])


def normal(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def planted(generator, m, n, sigma, dtype):
    """(m, n) with singular values sigma."""
    r = len(sigma)
    U, V = (torch.linalg.qr(normal(generator, size, r)).Q for size in (m, n))
    return (U * torch.as_tensor(sigma, dtype=torch.float64) @ V.T).to(dtype)


def some_adapters(generator, ranks, shapes, dtype=torch.float64):
    """One adapter for each rank, each with one module for each {name: (o, d)}."""
    return [
        {
            name: (normal(generator, o, r, dtype=dtype), normal(generator, r, d, dtype=dtype))
            for name, (o, d) in shapes.items()
        }
        for r in ranks
    ]


def stack(adapters, name):
    """(every row of A, every column of B) in float64."""
    pairs = [adapter[name] for adapter in adapters]
    return torch.cat([A for _, A in pairs]).double(), torch.cat([B.T for B, _ in pairs]).double()


def projector(V):
    return V.double().T @ V.double()


def close(found, wanted, tolerance):
    """Assert finite and |found − wanted| <= tolerance everywhere."""
    assert found.shape == wanted.shape
    assert found.isfinite().all()
    error = (found.double() - wanted.double()).abs().max() if found.numel() else torch.zeros(())
    assert error <= tolerance, f"error {error:.3g} > {tolerance:.3g}"


def orthonormal(V, dtype):
    """V Vᵀ = I; 4 eps per addition of a dot product, for up to n of them in sequence of √n."""
    eye = torch.eye(len(V), dtype=torch.float64)
    close(V.double() @ V.double().T, eye, 8 * (1 + V.shape[1]) ** 0.5 * torch.finfo(dtype).eps)


def layer(generator, tasks=1, rank=2, o=7, d=9, K=4, dtype=torch.float64, **kw):
    """A module with random coefficients."""
    V_A, V_B = (torch.linalg.qr(normal(generator, n, K)).Q.T.to(dtype) for n in (d, o))
    zero = [torch.zeros(n, dtype=dtype) for n in (d, o, K, K)]
    base = nn.Linear(d, o, dtype=dtype)
    with torch.no_grad():
        base.weight.copy_(normal(generator, o, d)), base.bias.copy_(normal(generator, o))
    kw = {"init": "random", "generator": generator} | kw
    return EigenLoRAxLinear(base, Subspace(V_A, V_B, *zero, count=K), rank, tasks, **kw)


# ------------------------------------------------------------------------------------- claims


@given(SEED, st.integers(2, 20), SIZE, SIZE, st.booleans(), DTYPE)
@example(0, 2, 1, 1, True, torch.float32)
@example(0, 8, 8, 8, False, torch.float32)
def test_E1_orthonormal_and_the_numerical_rank_is_the_limit(seed, m, n, r, center, dtype):
    generator, r = seeded(seed), min(r, m, n)
    rows = planted(generator, m, n, torch.linspace(1, 0.1, r), dtype)
    V, _, s = principal_components(rows, None, center)
    exact = rows.double() - rows.double().mean(0) * center
    wanted = torch.linalg.svdvals(exact)
    free = wanted[: m - center]  # centred, one row follows from the others
    rank = int((free > wanted[0] * max(m, n) * torch.finfo(dtype).eps).sum())
    assert len(V) == rank <= min(r, m - center)
    orthonormal(V, dtype)
    assert s.shape == (min(m, n),)
    with pytest.raises(ValueError, match=rf"1 to {len(V)}, numerical rank"):
        principal_components(rows, len(V) + 1, center)
    # σ near the limit of float32: σ₁²/σ₄² = 1e11 leaves 1e-5 of float64's 16 digits to fix
    steep = planted(generator, 4, 4, [1, 1e-2, 1e-4, 3e-6], torch.float32)
    V_steep, _, _ = principal_components(steep, 4, center=False)
    orthonormal(V_steep, torch.float32)
    if len(V):
        V, _, _ = principal_components(rows, len(V), center)
        orthonormal(V, dtype)
        gap = wanted[len(V) - 1]  # nothing below it but rounding
        tolerance = 64 * max(m, n) * (EPS / gap**2 + torch.finfo(dtype).eps / gap) * wanted[0] ** 2
        close(
            V.double() - V.double() @ torch.linalg.pinv(exact, rtol=1e-5) @ exact, 0 * V, tolerance
        )


@given(SEED, st.integers(2, 30), st.integers(1, 30), st.booleans(), DTYPE, st.integers(0, 7))
@example(0, 12, 20, False, torch.float32, 7)
@example(0, 20, 12, True, torch.float32, 7)
@settings(max_examples=100)
def test_E2_singular_values_are_those_of_the_svd(seed, m, n, center, dtype, digits):
    sigma = 3 * torch.logspace(0, -digits, min(m, n), dtype=torch.float64)
    rows = planted(seeded(seed), m, n, sigma, dtype)
    _, mean, s = principal_components(rows, None, center)
    close(mean, rows.double().mean(0) * center, 4 * torch.finfo(dtype).eps * 3)
    wanted = torch.linalg.svdvals(rows.double() - rows.double().mean(0) * center)
    assert s.shape == wanted.shape and (s.diff() <= 0).all()
    # |s − σᵢ| <= c·eps·σ₁²/σᵢ, written so that σᵢ = 0 needs no exception; the Gram matrix adds up
    # max(m, n) products (c = 4·max(m, n)); then s is rounded once to its dtype
    error = (s.double().square() - wanted.square()).abs()
    rounding = 2 * torch.finfo(dtype).eps * wanted.square()
    assert (error <= 4 * max(m, n) * EPS * wanted[0] ** 2 + rounding).all()


@pytest.mark.parametrize("steepest", [1.2, 20, 1000])  # σ₁/σ_K: within float32's reach, and not
@given(SEED, st.integers(2, 40), st.integers(2, 40), st.integers(1, 40))
def test_a_given_k_costs_no_more_than_float32s_rounding(steepest, seed, m, n, K):
    p = min(m, n)
    K = min(K, p)
    sigma = torch.logspace(0, -math.log10(steepest), K, dtype=torch.float64)
    sigma = torch.cat([sigma, torch.linspace(0.9, 0, p - K, dtype=torch.float64) / steepest])
    rows = planted(seeded(seed), m, n, sigma, torch.float32)
    V, _, s = principal_components(rows, K, center=False)
    orthonormal(V, torch.float32)
    _, wanted, W = torch.linalg.svd(rows.double(), full_matrices=False)
    eps = 64 * torch.finfo(torch.float32).eps  # c = 64
    assert ((s.double().square() - wanted.square()).abs() <= eps * wanted[0] ** 2).all()
    last, after = wanted[K - 1] ** 2, wanted[K] ** 2 if K < p else 0
    found, best = (X.double().T @ X.double() for X in (V, W[:K]))
    # where σ_K² < σ₁²/1000, float64 keeps the error from growing on
    close(found, best, eps * float(min(wanted[0] ** 2, 1000 * last) / (last - after)))


@given(SEED, st.integers(2, 20), SIZE, st.booleans(), DTYPE)
def test_E3_what_is_left_is_the_sum_of_the_other_singular_values(seed, m, n, center, dtype):
    generator = seeded(seed)
    rows = normal(generator, m, n, dtype=dtype) + 3 * normal(generator, n, dtype=dtype)
    V, mean, s = principal_components(rows, None, center)
    X, V, mean, s = rows.double(), V.double(), mean.double(), s.double()
    for K in range(len(V) + 1):
        alpha = project(X, V[:K], mean if center else None)
        left = X - reconstruct(alpha, V[:K], mean if center else None)
        # V, mean and σ are rounded to dtype: each entry errs by eps·‖row‖, so does √ of the sum
        tolerance = 16 * math.sqrt(m * n) * torch.finfo(dtype).eps * X.square().sum()
        close(left.square().sum(), s[K:].square().sum(), tolerance)


@given(SEED, st.integers(2, 7), st.integers(2, 7), st.integers(1, 3), st.integers(1, 3))
def test_E4_projecting_both_factors_gives_the_best_core(seed, o, d, r, K):
    generator = seeded(seed)
    K = min(K, o, d)
    subspace = recycle(some_adapters(generator, [3, 2], {"q": (o, d)}), k=min(K, o, d))["q"]
    module = EigenLoRAxLinear(nn.Linear(d, o, dtype=torch.float64), subspace, rank=r, scaling=0.5)
    B, A = normal(generator, o, r), normal(generator, r, d)
    module.set_task(0, B, A)
    core = module.scaling * module.alpha_B[0] @ module.alpha_A[0].T
    every = torch.kron(subspace.V_B.T.contiguous(), subspace.V_A.T.contiguous())  # vec of V_BᵀMV_A
    best = torch.linalg.lstsq(every, (B @ A).reshape(-1, 1)).solution.view(K, K)
    close(core.detach(), best, 64 * o * d * EPS * (B @ A).norm())


@given(SEED, st.lists(st.integers(1, 3), min_size=2, max_size=4), SIZE, SIZE, st.booleans())
def test_E5_error_of_the_recycled_never_grows_and_ends_at_zero(seed, ranks, o, d, center):
    generator = seeded(seed)
    adapters = some_adapters(generator, ranks, {"q": (o, d)})
    stacks = stack(adapters, "q")
    limit = min(sum(ranks) - center, o, d)
    errors = []
    for k in [*range(1, limit + 1), None]:
        found = recycle(adapters, k, center)["q"]
        sides = zip(stacks, (found.V_A, found.V_B), strict=True)
        left = [(X - reconstruct(project(X, V), V)).norm() / X.norm() for X, V in sides]
        B, A = adapters[0]["q"]
        delta = B @ A - projector(found.V_B) @ B @ A @ projector(found.V_A)
        errors.append(torch.stack([*left, delta.norm() / (B @ A).norm()]))
    errors = torch.stack(errors)
    tolerance = 64 * (o + d + sum(ranks)) * EPS
    assert errors.isfinite().all() and (errors.diff(dim=0) <= tolerance).all()
    close(errors[-1], torch.zeros(3), tolerance)


@given(SEED, st.integers(1, 40), st.integers(0, 40), st.integers(0, 40), DTYPE)
@example(0, 40, 1, 39, torch.float32)
@example(0, 1, 1, 0, torch.float64)
@example(0, 5, 0, 5, torch.float64)
def test_E6_pseudo_components_are_orthonormal_to_rounding(seed, n, K, p, dtype):
    generator = seeded(seed)
    K = min(K, n)
    p = min(p, n - K)
    V = torch.linalg.qr(normal(generator, n, K)).Q.T.to(dtype)
    found = augment(V, p, generator)
    assert found.shape == (K + p, n) and found.dtype == dtype
    assert torch.equal(found[:K], V)
    orthonormal(found, dtype)
    one_by_one = V
    for _ in range(p):
        one_by_one = augment(one_by_one, 1, generator)
    orthonormal(one_by_one, dtype)
    with pytest.raises(ValueError, match="want 0 to n − K"):
        augment(V, n - K + 1)


@given(
    SEED,
    st.lists(st.integers(1, 3), min_size=3, max_size=6),
    st.integers(2, 14),
    st.integers(2, 14),
    st.booleans(),
    st.booleans(),
    DTYPE,
)
@example(0, [1, 1, 1], 5, 5, True, True, torch.float64)
@settings(max_examples=25)
def test_E7_update_is_starting_over(seed, ranks, o, d, center, singly, dtype):
    generator = seeded(seed)
    adapters = some_adapters(generator, ranks, {"q": (o, d)}, dtype)
    adapters = [{"q": (B + 1, A - 2)} for adapter in adapters for B, A in adapter.values()]
    first, steps = adapters[:2], [[a] for a in adapters[2:]] if singly else [adapters[2:]]
    eps = torch.finfo(dtype).eps
    X_A, X_B = stack(adapters, "q")

    grown = start = recycle(first, center=center)
    for step in steps:
        grown = update(grown, step)
    found, wanted = grown["q"], recycle(adapters, center=center)["q"]
    assert found.count == wanted.count == sum(ranks)
    for side, X in (("A", X_A), ("B", X_B)):
        V, mean, s = (getattr(found, f"{f}_{side}") for f in ("V", "mean", "singular_values"))
        orthonormal(V, dtype)
        smallest = getattr(wanted, f"singular_values_{side}").double().amin() / X.norm()
        tolerance = 64 * len(adapters) * sum(X.shape) * eps  # one rounding of V and σ per update
        close(projector(V), projector(getattr(wanted, f"V_{side}")), tolerance / smallest)
        close(s, getattr(wanted, f"singular_values_{side}"), tolerance * X.norm())
        close(mean, getattr(wanted, f"mean_{side}"), tolerance * X.norm())

    base = nn.Linear(d, o, dtype=dtype)
    old, new = (EigenLoRAxLinear(base, s["q"], rank=3) for s in (start, grown))
    old.set_task(0, *first[0]["q"])
    new.set_task(0, *old.pair(0))
    (B, A), (B_new, A_new) = old.pair(0), new.pair(0)
    close((B_new @ A_new).detach(), (B @ A).detach(), 64 * (o + d) * eps * B.norm() * A.norm())

    k = 1 if center else 2
    grown = recycle(first, k=k, center=center)
    for step in steps:
        grown = update(grown, step)
    found = grown["q"]
    for X, side in ((X_A, "A"), (X_B, "B")):
        V, dropped = getattr(found, f"V_{side}")[:k].double(), getattr(found, f"dropped_{side}")
        assert len(getattr(found, f"singular_values_{side}")) == k
        X = X - X.mean(0) * center
        left = (X - X @ V.T @ V).square().sum()
        best = torch.linalg.svdvals(X)[k:].square().sum()
        rounding = 64 * len(adapters) * eps * X.square().sum()
        assert best - rounding <= left <= best + dropped + rounding
        kept = getattr(found, f"singular_values_{side}").double().square().sum()
        close(kept + dropped, X.square().sum(), rounding)  # `dropped` is what is missing


@given(SEED, st.lists(st.integers(1, 4), min_size=1, max_size=4), SIZE, SIZE)
def test_E8_ranks_may_differ_and_rotations_change_nothing(seed, ranks, o, d):
    generator = seeded(seed)
    adapters = some_adapters(generator, ranks, {"q": (o, d)})
    turned = []
    for adapter in adapters:
        B, A = adapter["q"]
        Q = torch.linalg.qr(normal(generator, len(A), len(A))).Q
        turned.append({"q": (B @ Q, Q.T @ A)})
    found, wanted = recycle(turned)["q"], recycle(adapters)["q"]
    for X, side in zip(stack(adapters, "q"), "AB", strict=True):
        s = getattr(wanted, f"singular_values_{side}")
        assert len(s) == min(X.shape) and found.count == len(X) == sum(ranks)
        close(getattr(found, f"singular_values_{side}"), s, 64 * sum(X.shape) * EPS * s[0])
        V, V_turned = getattr(wanted, f"V_{side}"), getattr(found, f"V_{side}")
        close(projector(V_turned), projector(V), 64 * sum(X.shape) * EPS * s[0] / s[-1])


@given(SEED, st.integers(1, 5), st.integers(1, 3), st.sampled_from([(), (1,), (40,), (2, 3)]))
def test_E9_delta_is_the_product_and_merge_is_forward(seed, K, rank, batch):
    generator = seeded(seed)
    module = layer(generator, tasks=3, rank=rank, K=K, scaling=0.5)
    x = normal(generator, *batch, 9)
    for task in range(3):
        a, b = module.alpha_A[task], module.alpha_B[task]
        delta = 0.5 * module.V_B.T @ b @ a.T @ module.V_A
        wanted = x @ (module.base.weight + delta).T + module.base.bias
        tolerance = 256 * EPS * (1 + wanted.abs().max().item())
        close(module(x, task).detach(), wanted.detach(), tolerance)
        B, A = module.pair(task)
        close((B @ A).detach(), delta.detach(), tolerance)
        merged = module.merge(task)
        assert type(merged) is nn.Linear
        close(merged(x).detach(), module(x, task).detach(), tolerance)
        module.task = task
        close(module.weight.detach(), merged.weight.detach(), 0)
        close(module(x).detach(), module(x, task).detach(), 0)
    fresh = layer(generator, rank=rank, K=K, init="zero")
    assert torch.equal(fresh(x), fresh.base(x))
    fresh(x + 1).square().sum().backward()
    assert fresh.alpha_B.grad.isfinite().all() and fresh.alpha_B.grad.norm() > 0
    assert fresh.base.weight.grad is None


@pytest.mark.parametrize(
    "layers, shapes, K, r, wanted, with_V",
    [
        (12, [(768, 768)] * 2, 2, 1, 96, None),  # ViT-B/16, query and value
        (12, [(768, 768)] * 2, 32, 8, 12_288, None),  # RoBERTa-base
        (12, [(768, 768)] * 2, 64, 8, 24_576, None),  # 32 components + 32 pseudo
        (12, [(768, 768)] * 2, 32, 8, 12_288, 1_191_936),  # components trained too
        (32, [(4096, 4096), (1024, 4096), (1024, 4096)], 32, 16, 98_304, None),  # Mistral q, k, v
        (32, [(4096, 4096), (1024, 4096), (1024, 4096)], 256, 16, 786_432, None),
    ],
)
def test_E10_only_coefficients_train_and_there_are_so_many(layers, shapes, K, r, wanted, with_V):
    with torch.device("meta"):
        block = lambda: nn.ModuleList(nn.Linear(d, o) for o, d in shapes)  # noqa: E731
        model = nn.ModuleList(block() for _ in range(layers))
        subspaces = {
            f"{i}.{j}": Subspace(torch.empty(K, d), torch.empty(K, o), *torch.empty(4, 0), count=K)
            for i in range(layers)
            for j, (o, d) in enumerate(shapes)
        }
        modules = adapt(model, subspaces, rank=r)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.alpha_{side}" for name in subspaces for side in "AB"}
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == wanted
    V = sum(module.V_A.numel() + module.V_B.numel() for module in modules.values())
    assert with_V is None or count + V == with_V


def omega(beta):
    """ω(β) of arXiv:1305.5870 from its definition: λ(β) / √median of Marchenko–Pastur."""
    cut = 2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1))
    theta = (torch.arange(100_000, dtype=torch.float64) + 0.5) * (math.pi / 100_000)
    t = 1 + beta - 2 * math.sqrt(beta) * theta.cos()  # eigenvalues, from (1 − √β)² to (1 + √β)²
    mass = (theta.sin().square() / t).cumsum(0)  # up to a factor
    return math.sqrt(cut / t[torch.searchsorted(mass, mass[-1] / 2)].item())


@given(SEED, st.integers(1, 3), st.integers(60, 90), st.integers(60, 160), st.booleans())
@settings(max_examples=8)
def test_E11_k_by_explained_variance_and_by_gavish_donoho(seed, r, m, n, center):
    generator = seeded(seed)
    noise = normal(generator, m, n)
    # signal at 3 times the edge √m + √n of the noise; ω·median lies between 1.02 and 1.6 edges
    strong = 3 * (math.sqrt(m) + math.sqrt(n))
    rows = noise + planted(generator, m, n, [strong * (1 + i) for i in range(r)], torch.float64)
    V, _, s = principal_components(rows, "gavish-donoho", center)
    assert len(V) == r
    assert choose_k(s, "gavish-donoho", (m, n)) == r
    exact = torch.linalg.svdvals(rows - rows.mean(0) * center).square()
    for part in (0.01, 0.5, 0.9, 0.99):
        K = next(K for K in range(1, m + 1) if exact[:K].sum() >= part * exact.sum())
        assert len(principal_components(rows, part, center)[0]) == K
    assert len(principal_components(rows, 1.0, center)[0]) <= min(m - center, n)
    for part in (50, 300, 700, 1000):  # the fit of ω(β) is good to 0.02
        near = torch.tensor([0.02, -0.02]) + omega(part / 1000)  # the median is 1
        assert choose_k(torch.cat([near, torch.ones(9)]), "gavish-donoho", (part, 1000)) == 1


@given(SEED, st.integers(1, 4), st.integers(1, 6), st.sampled_from([(), (1,), (5,), (2, 3)]))
def test_E12_a_mixed_batch_gets_what_each_gets_alone(seed, tasks, batch, inner):
    generator = seeded(seed)
    module = layer(generator, tasks=tasks, rank=3, scaling=2.0)
    x = normal(generator, batch, *inner, 9)
    ids = torch.randint(tasks, (batch,), generator=generator)
    alone = torch.cat([module(x[i : i + 1], task) for i, task in enumerate(ids.tolist())])
    tolerance = 256 * EPS * (1 + alone.abs().max().item())
    close(module(x, ids).detach(), alone.detach(), tolerance)
    for given_ids in (ids.tolist(), ids.int()):
        with serving({"q": module}, given_ids):
            close(module(x).detach(), alone.detach(), tolerance)
    grads = []
    for y in (module(x, ids), alone):
        grads.append(torch.autograd.grad(y.sin().sum(), [module.alpha_A, module.alpha_B]))
    for mixed, single in zip(*grads, strict=True):
        close(mixed, single, tolerance * x.numel())


# -------------------------------------------------------------------------------- components


@given(SEED, st.integers(3, 40), st.integers(3, 40), st.booleans(), DTYPE)
def test_components_are_those_of_a_float64_svd(seed, m, n, center, dtype):
    generator = seeded(seed)
    K = min(m - 1, n) // 2 or 1
    sigma = torch.cat([torch.linspace(2, 1, K), torch.linspace(0.1, 0.05, min(m, n) - K)])
    rows = planted(generator, m, n, sigma, dtype)
    exact = rows.double() - rows.double().mean(0) * center
    _, s, V = torch.linalg.svd(exact, full_matrices=False)
    found, _, _ = principal_components(rows, K, center)
    gap = s[0] ** 2 / (s[K - 1] ** 2 - s[K] ** 2)
    tolerance = 8 * max(m, n) * EPS * gap + 4 * torch.finfo(dtype).eps  # the last: V is rounded
    close(projector(found), projector(V[:K]), tolerance)


def test_half_precision_rows_are_taken_as_they_are_and_answered_in_float32():
    rows = normal(seeded(0), 6, 10, dtype=torch.bfloat16)
    V, mean, s = principal_components(rows, 3)
    assert {V.dtype, mean.dtype, s.dtype} == {torch.float32}
    wanted = torch.linalg.svdvals(rows.double() - rows.double().mean(0))
    close(s, wanted, 1e-6 * wanted[0])  # float32 rounding


def test_principal_components_leaves_its_argument_alone():
    rows = normal(seeded(0), 6, 10)
    before = rows.clone()
    principal_components(rows, 3)
    assert torch.equal(rows, before)


def test_numerical_rank_of_repeated_float32_rows_is_not_fooled_by_rounding():
    generator = seeded(0)
    A = normal(generator, 5, 60, dtype=torch.float32)
    turns = [torch.linalg.qr(normal(generator, 5, 5, dtype=torch.float32)).Q for _ in range(20)]
    V, _, _ = principal_components(torch.cat([Q @ A for Q in turns]), center=False)
    assert len(V) == 5


def test_mean_row_makes_a_centred_subspace_hold_every_row():
    generator = seeded(0)
    adapters = some_adapters(generator, [2, 2, 2], {"q": (8, 12)})
    adapters = [{"q": (B + 3, A + 3)} for a in adapters for B, A in a.values()]
    found = recycle(adapters, k=2, center=True)["q"]
    assert len(found.V_A) == 3 and len(found.singular_values_A) == 2
    orthonormal(found.V_A, torch.float64)
    mean = found.mean_A[None]
    close(reconstruct(project(mean, found.V_A), found.V_A), mean, 1e-14 * mean.norm())


def test_pseudo_rows_are_dropped_by_an_update():
    generator = seeded(0)
    adapters = some_adapters(generator, [2, 2], {"q": (20, 30)}, torch.float32)
    for center in (False, True):
        start = recycle(adapters[:1], k=1, center=center, pseudo=4, generator=generator)
        grown = update(start, adapters[1:])["q"]
        assert start["q"].V_A.shape == (5 + center, 30) and grown.V_A.shape == (1 + center, 30)
        orthonormal(grown.V_A, torch.float32)


def test_update_knows_new_modules_and_keeps_the_others():
    generator = seeded(0)
    first = some_adapters(generator, [2], {"q": (5, 6), "k": (5, 6)})
    more = some_adapters(generator, [3], {"q": (5, 6), "v": (4, 6)})
    grown = update(recycle(first, k=2), more, k=2)
    assert {name: s.count for name, s in grown.items()} == {"q": 5, "k": 2, "v": 3}
    assert {len(s.V_A) for s in grown.values()} == {2}
    variance = update(recycle(first, k=0.9), more)["q"]
    whole = float(stack(first[:1] + more, "q")[0].square().sum())
    seen = float(variance.singular_values_A.double().square().sum())
    assert 0.9 * 0.9 * whole <= seen < whole  # of what was kept, not of all there was
    assert seen + variance.dropped_A == pytest.approx(whole)


def test_lazy_mappings_are_asked_for_one_module_at_a_time():
    class Lazy(dict):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    asked = []
    names = {"q": (5, 6), "k": (5, 6)}
    adapters = [Lazy(a) for a in some_adapters(seeded(0), [1, 2, 3], names)]
    wanted = recycle([dict(a) for a in adapters])
    found = recycle(iter(adapters))
    assert asked == ["q"] * 3 + ["k"] * 3
    assert all(torch.equal(found[n].V_A, wanted[n].V_A) for n in names)


NAN = float("nan")
PAIR = torch.ones(4, 2), torch.ones(2, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: recycle([]), "0 adapters, no module; want one"),
        (lambda: recycle([{}]), "1 adapters, no module; want one"),
        (
            lambda: recycle([{"q": PAIR}, {"q": (torch.ones(4, 2), torch.ones(2, 5))}]),
            r"adapter 1, 'q': B \(4, 2\), A \(2, 5\); want \(4, r\) and \(r, 3\)",
        ),
        (
            lambda: recycle([{"q": PAIR}, {"q": (PAIR[0] * NAN, PAIR[1])}]),
            r"adapter 1, 'q': B \(4, 2\) sums to nan; want finite",
        ),
        (
            lambda: recycle([{"q": (PAIR[0], PAIR[1] * math.inf)}]),
            r"adapter 0, 'q': A \(2, 3\) sums to inf; want finite",
        ),
        (
            lambda: recycle([{"q": PAIR}], k=2),
            "k = 2 means 2; want a rule or 1 to 1, numerical rank",
        ),
        (
            lambda: update(recycle([{"q": PAIR}]), [{"q": PAIR[::-1]}]),
            r"want \(4, r\) and \(r, 3\)",
        ),
        (
            lambda: principal_components(torch.ones(3)),
            r"rows \(3,\) sums to 3.0; want finite \(m, n\)",
        ),
        (
            lambda: principal_components(normal(seeded(0), 60, 90), "gavish-donoho", False),
            "k = 'gavish-donoho' means 0; want a rule or 1 to 60, numerical rank",
        ),
        (lambda: choose_k(torch.ones(3), 0, (3, 4)), "k = 0 means 0; want a rule or 1 to 3"),
        (lambda: choose_k(torch.ones(3), -1, (3, 4)), "k = -1 means -1; want a rule or 1 to 3"),
        (lambda: choose_k(torch.ones(3), True, (3, 4)), "k = True means True; want a rule or 1"),
        (lambda: choose_k(torch.ones(3), 1.5, (3, 4)), "k = 1.5 means 1.5; want a rule or 1"),
        (
            lambda: choose_k(torch.ones(3), "elbow", (3, 4)),
            "k = 'elbow' means 'elbow'; want a rule or 1",
        ),
        (lambda: augment(torch.eye(3), 1), "1 pseudo-components; want 0 to n − K = 3 − 3"),
        (lambda: layer(seeded(0), rank=0), "rank = 0, tasks = 1; want ints >= 1"),
        (lambda: layer(seeded(0), rank=True), "rank = True, tasks = 1; want ints >= 1"),
        (lambda: layer(seeded(0), tasks=1.0), "rank = 2, tasks = 1.0; want ints >= 1"),
        (lambda: layer(seeded(0), scaling=0), "scaling 0, init 'random'; want finite != 0"),
        (lambda: layer(seeded(0), init="ones"), "scaling 1.0, init 'ones'; want finite != 0"),
        (
            lambda: EigenLoRAxLinear(nn.Linear(9, 9), recycle([{"q": PAIR}])["q"]),
            r"V_A is \(1, 3\); want \(K, 9\), K >= 1",
        ),
        (
            lambda: layer(seeded(0)).set_task(1, torch.ones(7, 1), torch.ones(1, 9)),
            "task = 1; want",
        ),
        (lambda: layer(seeded(0)).set_task(0, *PAIR), r"want \(7, r\) and \(r, 9\)"),
        (
            lambda: layer(seeded(0)).set_task(0, torch.ones(7, 3), torch.ones(3, 9)),
            "the pair has rank 3; want at most this module's 2",
        ),
        (
            lambda: layer(seeded(0)).set_task(0, torch.ones(7, 1) * NAN, torch.ones(1, 9)),
            r"B \(7, 1\) sums to nan; want finite",
        ),
        (
            lambda: layer(seeded(0))(torch.ones(2, 9).double(), 1),
            "task = 1; want 0 to 0, or 2 such int64",
        ),
        (lambda: layer(seeded(0)).merge(-1), "task = -1; want 0 to 0, or None such int64"),
        (
            lambda: layer(seeded(0))(torch.ones(2, 9).double(), torch.zeros(3, dtype=torch.long)),
            r"task = tensor\(\[0, 0, 0\]\); want 0 to 0, or 2 such int64",
        ),
        (
            lambda: layer(seeded(0))(torch.ones(2, 9).double(), torch.ones(2, dtype=torch.bool)),
            r"task = tensor\(\[True, True\]\); want 0 to 0, or 2 such int64",
        ),
        (
            lambda: serving({"q": layer(seeded(0), tasks=2)}, [0, 2]).__enter__(),
            r"task = \[0, 2\]; want an int from 0 to 1, or one per sample",
        ),
        (
            lambda: adapt(nn.Sequential(nn.Linear(3, 4)), recycle([{"q": PAIR}])),
            r"no layer's name ends in \['\.q'\]; found: \['0'\]",
        ),
    ],
)
def test_bad_input_is_a_one_line_error_with_the_value_found_and_wanted(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------- module


def mlp(generator):
    """A model with a shared layer, and adapters for it."""
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"one": nn.Sequential(nn.Linear(6, 6), nn.Tanh(), shared), "two": shared})
    adapters = some_adapters(generator, [2, 3], {"one.0": (6, 6), "one.2": (6, 6)}, torch.float32)
    return model, adapters


def test_adapt_replaces_what_is_named_and_an_error_changes_nothing():
    model, adapters = mlp(seeded(0))
    before = dict(model.named_modules())
    subspaces = recycle(adapters, k=2)
    bad = subspaces | {"one.2": recycle([{"q": PAIR}])["q"]}
    with pytest.raises(ValueError, match="V_A is"):
        adapt(model, bad)
    assert dict(model.named_modules()) == before
    modules = adapt(model, subspaces, rank=2, tasks=3)
    assert list(modules) == ["one.0", "one.2"]
    assert model["one"][0] is modules["one.0"] and modules["one.0"].tasks == 3


def test_adapt_finds_names_without_their_front_and_takes_the_longest():
    generator = seeded(0)
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 6)), "0": nn.Linear(6, 6)})
    subspaces = recycle(some_adapters(generator, [2], {"0": (6, 6), "a.0": (6, 6)}, torch.float32))
    modules = adapt(model, subspaces)
    assert list(modules) == ["a.0", "0"]
    assert all(torch.equal(modules[name].V_A, subspaces[name].V_A) for name in modules)
    model = nn.ModuleDict({"b": nn.Sequential(nn.Linear(6, 6))})
    assert torch.equal(adapt(model, {"0": subspaces["0"]})["b.0"].V_A, subspaces["0"].V_A)


def test_a_whole_name_is_that_layer_and_no_other():
    generator = seeded(0)
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 6)), "0": nn.Linear(6, 6)})
    subspaces = recycle(some_adapters(generator, [2], {"0": (6, 6)}, torch.float32))
    modules = adapt(model, subspaces)
    assert list(modules) == ["0"] and model["0"] is modules["0"]
    assert type(model["a"][0]) is nn.Linear and not model["a"][0].weight.requires_grad


def test_a_pair_without_a_component_is_refused():
    empty = torch.zeros(5, 0), torch.zeros(0, 6)
    with pytest.raises(ValueError, match=r"adapter 1, 'q': B \(5, 0\), A \(0, 6\); want"):
        recycle([{"q": (torch.ones(5, 1), torch.ones(1, 6))}, {"q": empty}])


def test_merge_of_a_model_replaces_shared_layers_once():
    model, adapters = mlp(seeded(0))
    modules = adapt(model, recycle(adapters, k=2), rank=2, init="random")
    model["two"] = model["one"][2]
    model.eval()
    x = normal(seeded(1), 5, 6, dtype=torch.float32)
    wanted = model["two"](model["one"](x))
    kept = modules["one.0"].base.weight.clone()
    assert merge(model) is model
    assert not any(isinstance(m, EigenLoRAxLinear) for m in model.modules())
    assert model["one"][2] is model["two"] and not model["two"].training
    close(
        model["two"](model["one"](x)), wanted.detach(), 64 * 6 * torch.finfo(torch.float32).eps * 4
    )
    assert torch.equal(modules["one.0"].base.weight, kept)
    assert type(merge(modules["one.0"])) is nn.Linear


def test_drop_in_attributes_copy_pickle_and_state_dict():
    module = layer(seeded(0), tasks=2)
    assert (module.in_features, module.out_features) == (9, 7)
    assert module.bias is module.base.bias
    assert set(module.state_dict()) == {
        *("base.weight", "base.bias", "V_A", "V_B", "alpha_A", "alpha_B"),
    }
    assert all(value.is_contiguous() for value in module.state_dict().values())  # safetensors'
    x = normal(seeded(1), 3, 9)
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    other = layer(seeded(2), tasks=2)
    other.load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), torch.load(stored, weights_only=False), other):
        assert torch.equal(twin(x, 1), module(x, 1))
    module.weight.sum().backward()
    assert module.alpha_A.grad.norm() > 0 and module.base.weight.grad is None
    merged = module.merge()
    assert merged.bias.data_ptr() != module.bias.data_ptr()
    assert module.half().V_A.dtype == torch.float16


def test_transformer_encoder_fast_path_sees_the_adapter():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    adapters = some_adapters(
        seeded(0), [2], {"linear1": (16, 8), "out_proj": (8, 8)}, torch.float32
    )
    x = normal(seeded(1), 2, 3, 8, dtype=torch.float32)
    encoder.eval()
    plain = encoder(x)
    adapt(encoder, recycle(adapters), rank=2, init="random", generator=seeded(2))
    with torch.no_grad():
        fast = encoder(x)
    merged = merge(copy.deepcopy(encoder))(x)
    close(fast, merged.detach(), 1e-5)  # float32, values of order 1, 3 layers
    assert (fast - plain).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model_keeps_float32_coefficients(dtype):
    generator = seeded(0)
    subspace = recycle(some_adapters(generator, [3], {"q": (6, 8)}, torch.float32))["q"]
    base = nn.Linear(8, 6, dtype=dtype)
    module = EigenLoRAxLinear(base, subspace, rank=2, tasks=2, init="random", generator=generator)
    assert {module.alpha_A.dtype, module.V_B.dtype} == {torch.float32}
    x = normal(generator, 40, 8, dtype=dtype)
    merged = module.merge(1)
    assert merged.weight.dtype == dtype
    eps = torch.finfo(dtype).eps
    B, A = module.pair(1)
    close(merged.weight, (base.weight.float() + B @ A).to(dtype), 0)
    for y in (module(x, 1), module(x[:1], 1), module(x, torch.ones(40, dtype=torch.long))):
        assert y.dtype == dtype
        close(y, merged(x[: len(y)]).detach(), 8 * 8 * eps * 4)
    module.float()
    with torch.autocast("cpu", torch.bfloat16):
        for task in (0, torch.zeros(40, dtype=torch.long)):
            assert module(x.float(), task).dtype == torch.bfloat16


def test_compiles_in_one_graph():
    module = layer(seeded(0), tasks=3, dtype=torch.float32)
    x = normal(seeded(1), 20, 9, dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for task in (1, torch.arange(20) % 3):
        close(compiled(x, task), module(x, task).detach(), 1e-6)


def test_random_numbers_come_from_the_generator_when_there_is_one():
    state = torch.get_rng_state()
    first, second = (layer(seeded(3), dtype=torch.float32) for _ in range(2))
    assert torch.equal(first.alpha_A, second.alpha_A) and torch.equal(first.alpha_B, second.alpha_B)
    base, subspace = nn.Linear(3, 4), recycle([{"q": PAIR}])["q"]
    torch.set_rng_state(state)
    EigenLoRAxLinear(base, subspace, generator=seeded(0))
    recycle([{"q": PAIR}], pseudo=1, generator=seeded(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_set_task_pads_smaller_ranks_and_scales():
    generator = seeded(0)
    adapters = some_adapters(generator, [2, 3], {"q": (7, 9)})
    module = EigenLoRAxLinear(
        nn.Linear(9, 7, dtype=torch.float64), recycle(adapters)["q"], rank=3, tasks=2, scaling=-4.0
    )
    for task, adapter in enumerate(adapters):
        module.set_task(task, *adapter["q"])
        (B, A), (B_0, A_0) = module.pair(task), adapter["q"]
        close((B @ A).detach(), B_0 @ A_0, 64 * 9 * EPS * (B_0 @ A_0).norm())
    assert not module.alpha_A[0, :, 2:].any()


# ------------------------------------------------------------------------------------- interop


def tiny_bert():
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).eval()


IDS = torch.arange(24).view(4, 6) % 20


def peft_adapter(folder, **kw):
    """Save a LoRA of tiny_bert with random weights; return (state dict, config, its logits)."""
    config = peft.LoraConfig(**({"target_modules": ["query", "value"], "r": 4} | kw))
    model = peft.get_peft_model(tiny_bert(), config).eval()
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if "lora_" in name or "modules_to_save" in name:
                p.copy_(0.3 * normal(seeded(i), *p.shape))
    model.save_pretrained(folder)
    logits = model(IDS).logits.detach()
    stored = json.loads((Path(folder) / "adapter_config.json").read_text())
    return load_file(Path(folder) / "adapter_model.safetensors"), stored, logits


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
}


@pytest.mark.parametrize("kw", PATTERNS.values(), ids=PATTERNS)
def test_lora_pairs_gives_the_delta_that_peft_merges(kw, tmp_path):
    state, config, logits = peft_adapter(tmp_path, **kw)
    pairs = lora_pairs(state, config)
    assert len(pairs) == 4 and "bert.encoder.layer.1.attention.self.value" in pairs
    model = tiny_bert()
    merged = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path).merge_and_unload()
    for name, (B, A) in pairs.items():
        delta = merged.get_submodule(name).weight - model.get_submodule(name).weight
        close(B @ A, delta.detach(), 32 * torch.finfo(torch.float32).eps * (1 + delta.abs().max()))
    modules = adapt(model, recycle([pairs]), rank=4)
    for name, pair in pairs.items():
        modules[name].set_task(0, *pair)
    close(model(IDS).logits.detach(), logits, 1e-5)  # float32, logits of order 1, two layers
    named = {k.replace(".weight", ".default.weight"): v.half() for k, v in state.items()}
    bare = {k.removeprefix("base_model.model."): v for k, v in named.items()}
    found = lora_pairs(bare, config)
    assert found.keys() == pairs.keys() and all(B.dtype == torch.float32 for B, _ in found.values())
    assert torch.equal(lora_pairs(state)[name][0], state[f"base_model.model.{name}.lora_B.weight"])


def test_heads_are_left_alone(tmp_path):
    state, config, _ = peft_adapter(tmp_path, modules_to_save=["classifier"])
    assert any("classifier" in key for key in state)
    assert len(lora_pairs(state, config)) == 4


REFUSED = {
    "DoRA also rescales": {"use_dora": True},
    "trained bias": {"bias": "all"},
    "lora_B.bias: a trained bias": {"lora_bias": True},
    "an embedding is no Linear": {"target_modules": ["query", "word_embeddings"]},
    "init_lora_weights=pissa: it may take its start off": {"init_lora_weights": "pissa"},
    "init_lora_weights=olora: it may take its start off": {"init_lora_weights": "olora"},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
}


@pytest.mark.parametrize("message, kw", REFUSED.items(), ids=REFUSED)
def test_adapters_that_are_more_than_a_product_are_refused_with_the_reason(message, kw, tmp_path):
    state, config, _ = peft_adapter(tmp_path, **kw)
    with pytest.raises(ValueError, match=message) as error:
        lora_pairs(state, config)
    assert "\n" not in str(error.value)


HALF_A, HALF_B = {"q.lora_A.weight": torch.ones(1, 3)}, {"q.lora_B.weight": torch.ones(2, 1)}


@pytest.mark.parametrize(
    "state, config, message",
    [
        (
            {"q.weight": torch.ones(2, 3)},
            None,
            r"found \['q.weight'\]; want lora_A.weight, lora_B.weight",
        ),
        (HALF_A, None, r"found \['q.lora_A.weight'\]; want lora_A.weight, lora_B.weight"),
        (
            HALF_A | HALF_B | {"q.lora_A.other.weight": torch.ones(1, 3)},
            None,
            r"found .*lora_A.other.weight.*; want lora_A.weight, lora_B.weight per module",
        ),
        (
            HALF_A | {"q.lora_B.weight": torch.ones(2, 2)},
            None,
            r"'q': B \(2, 2\), A \(1, 3\); want",
        ),
        (
            {"q.lora_A.weight": torch.ones(1, 3, 3, 3), "q.lora_B.weight": torch.ones(2, 1, 1, 1)},
            None,
            r"'q': B \(2, 1, 1, 1\) sums to 2.0; want finite \(m, n\)",
        ),
        (HALF_A | HALF_B, {"peft_type": "ADALORA"}, "peft_type=ADALORA: no LoRA"),
        (HALF_A | HALF_B | {"q.lora_magnitude_vector": torch.ones(2)}, None, "DoRA"),
        (HALF_A | HALF_B | {"q.lora_B.bias": torch.ones(2)}, None, "q.lora_B.bias: a trained bias"),
        (HALF_A | HALF_B | {"q.base_layer.bias": torch.ones(2)}, None, "a trained bias"),
        (
            HALF_A | {"q.lora_B.weight": torch.full((2, 1), NAN)},
            None,
            r"'q': B \(2, 1\) sums to nan; want finite",
        ),
    ],
)
def test_broken_state_dicts_are_one_line_errors(state, config, message):
    with pytest.raises(ValueError, match=message) as error:
        lora_pairs(state, config)
    assert "\n" not in str(error.value)


def test_lora_pairs_reads_shapes_on_the_meta_device():
    state = {k: v.to("meta") for k, v in (HALF_A | HALF_B).items()}
    assert lora_pairs(state, {"r": 1, "lora_alpha": 2})["q"][0].shape == (2, 1)


@pytest.mark.parametrize("mixed", [False, True])
def test_peft_loads_an_exported_task_with_equal_logits(mixed, tmp_path):
    generator = seeded(0)
    model = tiny_bert()
    names = [
        f"bert.encoder.layer.{i}.attention.self.{m}" for i in (0, 1) for m in ("query", "value")
    ]
    adapters = some_adapters(generator, [3, 3], dict.fromkeys(names, (16, 16)), torch.float32)
    modules = {}
    for i, (name, subspace) in enumerate(recycle(adapters, k=4).items()):
        kw = {"tasks": 2, "scaling": 0.3, "init": "random", "generator": generator}
        modules |= adapt(model, {name: subspace}, rank=1 + i % 3 if mixed else 2, **kw)
    head = {"classifier." + k: v + 1 for k, v in model.classifier.state_dict().items()}
    state, config = to_peft(modules, 1, head)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.save(state, tmp_path / "adapter_model.bin")
    loaded = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    model.classifier.load_state_dict({k.removeprefix("classifier."): v for k, v in head.items()})
    with serving(modules, 1):
        wanted = model(IDS).logits
    close(loaded(IDS).logits.detach(), wanted.detach(), 1e-5)  # float32, logits of order 1
    assert (tiny_bert()(IDS).logits - wanted + 1).abs().max() > 0.01
    pairs = lora_pairs(state, config)
    for name, module in modules.items():
        B, A = module.pair(1)
        close(pairs[name][0] @ pairs[name][1], (B @ A).detach(), 1e-6)


def test_serving_routes_a_whole_transformers_model():
    generator = seeded(0)
    model = tiny_bert()
    names = [f"encoder.layer.{i}.attention.self.{m}" for i in (0, 1) for m in ("query", "value")]
    adapters = some_adapters(generator, [3, 3], dict.fromkeys(names, (16, 16)), torch.float32)
    subspaces = recycle(adapters)
    modules = adapt(model, subspaces, rank=3, tasks=3, init="random", generator=generator)
    ids = [2, 0, 1, 2]
    alone = []
    for i, task in enumerate(ids):
        with serving(modules, task):
            alone.append(model(IDS[i : i + 1]).logits)
    with serving(modules, ids):
        mixed = model(IDS).logits
    close(mixed.detach(), torch.cat(alone).detach(), 1e-5)  # float32, logits of order 1
    assert (mixed[0] - mixed[3]).abs().max() > 0.001
    with pytest.raises(RuntimeError, match="stop"), serving(modules, 2):
        raise RuntimeError("stop")
    assert {module.task for module in modules.values()} == {0}


REAL = os.environ.get("REFERENCE_DATA")


@pytest.mark.skipif(not REAL, reason="REFERENCE_DATA is unset: no folder of real adapters")
def test_real_adapters_recycle_exactly():
    folders = sorted((Path(REAL) / "vtab-lora").glob("*/"))
    adapters = []
    for folder in folders:
        config = json.loads((folder / "adapter_config.json").read_text())
        adapters.append(lora_pairs(load_file(folder / "adapter_model.safetensors"), config))
    assert len(adapters) == 14 and {len(a) for a in adapters} == {24}
    names = sorted(adapters[0])[:1]
    adapters = [{name: a[name] for name in names} for a in adapters]
    for center in (False, True):
        found = recycle(adapters, k=32, center=center)
        for name in names:
            for X, side in zip(stack(adapters, name), "AB", strict=True):
                V, s = (getattr(found[name], f"{f}_{side}") for f in ("V", "singular_values"))
                X = X - X.mean(0) * center
                _, exact, wanted = torch.linalg.svd(X, full_matrices=False)
                orthonormal(V, torch.float32)
                close(s, exact[:32], 1e-6 * exact[0])  # float32 rounding
                gap = exact[0] ** 2 / (exact[31] ** 2 - exact[32] ** 2)
                tolerance = 8 * max(X.shape) * EPS * gap + 1e-6
                close(projector(V[:32]), projector(wanted[:32]), tolerance)
    step = update(recycle(adapters[:10]), adapters[10:])
    whole = recycle(adapters)
    for name in names:
        close(step[name].singular_values_A, whole[name].singular_values_A, 1e-4)


def test_models_with_one_subspace_share_no_memory():
    generator = seeded(0)
    subspaces = recycle(some_adapters(generator, [2, 2], {"q": (6, 6)}, torch.float32), pseudo=1)
    one, two = (nn.ModuleDict({"q": nn.Linear(6, 6)}) for _ in range(2))
    adapt(one, subspaces), adapt(two, subspaces)
    places = {V.data_ptr() for V in (one["q"].V_A, two["q"].V_A, subspaces["q"].V_A)}
    assert len(places) == 3


@pytest.mark.parametrize("scale", [1e20, 1e-25])
def test_a_mean_of_any_size_stays_in_the_centred_subspace(scale):
    shared = normal(seeded(0), 1, 12, dtype=torch.float32)
    rows = [shared + 0.01 * normal(seeded(i), 2, 12, dtype=torch.float32) for i in range(3)]
    B = [normal(seeded(9 + i), 5, 2, dtype=torch.float32) for i in range(3)]
    pairs = [{"q": (b, scale * A)} for b, A in zip(B, rows, strict=True)]
    V = recycle(pairs, k=2, center=True)["q"].V_A
    assert V.shape == (3, 12)
    stack = torch.cat(rows)
    close(stack @ V.T @ V, stack, 0.05 * stack.norm())  # the mean, and most of what is around it


def test_a_module_that_never_trained_gives_a_subspace_of_no_direction():
    trained, untrained = torch.ones(5, 1), torch.zeros(5, 1)
    A = torch.eye(6)[:1]
    found = recycle([{"q": (trained, A), "v": (untrained, A)}])
    assert found["v"].V_B.shape == (0, 5) and found["q"].V_B.shape == (1, 5)
    both = recycle([{"q": (trained, A)}], center=True)  # one row, which is its own mean
    assert both["q"].V_A.shape == (1, 6)
    close(both["q"].V_A.abs(), A, 4 * torch.finfo(torch.float32).eps)


def test_merging_pairs_and_projecting_are_exact_under_autocast():
    module = layer(seeded(0), dtype=torch.float32, init="random")
    pair = (
        normal(seeded(1), 7, 2, dtype=torch.float32),
        normal(seeded(2), 2, 9, dtype=torch.float32),
    )
    module.set_task(0, *pair)
    wanted = [module.merge().weight, *module.pair(), module.alpha_A.clone(), module.alpha_B.clone()]
    with torch.autocast("cpu", torch.bfloat16):
        module.set_task(0, *pair)
        found = [module.merge().weight, *module.pair(), module.alpha_A, module.alpha_B]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_half_pair_is_projected_in_the_modules_precision():
    module = layer(seeded(0), dtype=torch.float32, scaling=1e-3)
    B, A = torch.full((7, 2), 100.0, dtype=torch.float16), torch.ones(2, 9, dtype=torch.float16)
    module.set_task(0, B, A)
    half = module.alpha_B.clone()
    module.set_task(0, B.float(), A.float())
    assert half.isfinite().all() and torch.equal(half, module.alpha_B)


def test_a_recycled_module_carries_no_gradient():
    subspaces = recycle([{"q": layer(seeded(0), dtype=torch.float32, init="random").pair()}])
    assert not subspaces["q"].V_A.requires_grad and not subspaces["q"].V_B.requires_grad
    copy.deepcopy(subspaces["q"])


def test_a_path_that_looks_like_a_key_is_only_a_path():
    state = {"q.lora_A.weight": torch.ones(1, 2), "q.lora_B.weight": torch.ones(3, 1)}
    assert list(lora_pairs(state, {"r": 1, "base_model_name_or_path": "x/base.lora_merged"})) == [
        "q"
    ]
    with pytest.raises(ValueError, match="use_qalora=True: unknown"):
        lora_pairs(state, {"r": 1, "use_qalora": True})


def test_an_alpha_pattern_is_a_whole_name_and_the_first_counts():
    names = ("a.q", "a.query")
    state = {}
    for name in names:
        state |= {
            f"{name}.lora_A.weight": torch.ones(1, 2),
            f"{name}.lora_B.weight": torch.ones(3, 1),
        }
    config = {"r": 1, "lora_alpha": 1, "alpha_pattern": {"q": 2, "a.q": 5}}
    pairs = lora_pairs(state, config)
    assert [float(pairs[name][0][0]) for name in names] == [2.0, 1.0]
