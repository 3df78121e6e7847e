"""The claims of eigenlorax.py, in order. A test's docstring is the sentence that it checks."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from eigenlorax import (
    EigenLoRAxLinear,
    Subspace,
    adapt,
    augment,
    choose_k,
    directions,
    principal_components,
    recycle,
    serving,
    update,
)
from tests.checks import BF16, EPS, F32, SEEDS, WIDE, close, eps, exactly, normal, seeded, within

SIZE = st.integers(1, 20)
RANKS = st.lists(st.integers(1, 3), min_size=2, max_size=5)


# ------------------------------------------------------------------------------- what is tested


def planted(generator, m, n, sigma, dtype):
    """Rows (m, n) with the singular values sigma."""
    r = len(sigma)
    U, V = (torch.linalg.qr(normal(generator, size, r)).Q for size in (m, n))
    return (U * torch.as_tensor(sigma, dtype=torch.float64) @ V.T).to(dtype)


def some_adapters(generator, ranks, o, d, dtype=torch.float64):
    """One adapter for each rank, with one layer, "q"."""
    draw = lambda *shape: normal(generator, *shape, dtype=dtype)  # noqa: E731
    return [{"q": (draw(o, r), draw(r, d))} for r in ranks]


def both_stacks(adapters):
    """All rows of A and all columns of B of the layer "q", in float64."""
    A = torch.cat([adapter["q"][1] for adapter in adapters]).double()
    B = torch.cat([adapter["q"][0].T for adapter in adapters]).double()
    return A, B


def svd(rows, center=False):
    """σ and V of the rows in float64, by definition."""
    X = rows.double() - rows.double().mean(0) * center
    _, sigma, V = torch.linalg.svd(X, full_matrices=False)
    return sigma, V


def projector(V):
    """The orthogonal projection VᵀV, which the signs and the order of V's rows do not change."""
    return V.double().T @ V.double()


def orthonormal(V, dtype):
    """V Vᵀ = I: n products of size 1/n add up, each rounded to dtype; c = 8."""
    I = torch.eye(len(V), dtype=torch.float64)
    close(V.double() @ V.double().T, I, 8 * math.sqrt(1 + V.shape[1]) * eps(dtype))


def layer(generator, tasks=1, rank=2, o=7, d=9, K=4, dtype=torch.float64, **options):
    """A layer of random weights, directions and coefficients."""
    V_A, V_B = (torch.linalg.qr(normal(generator, n, K)).Q.T.to(dtype) for n in (d, o))
    base = nn.Linear(d, o, dtype=dtype)
    base.weight.data.copy_(normal(generator, o, d))
    base.bias.data.copy_(normal(generator, o))
    options = {"init": "random", "generator": generator} | options
    return EigenLoRAxLinear(
        base, Subspace(directions(V_A), directions(V_B)), rank, tasks, **options
    )


# --------------------------------------------------------------------------------------- claims


@given(SEEDS, st.integers(2, 20), SIZE, SIZE, st.booleans(), WIDE)
@example(0, 2, 1, 1, True, F32)
@example(0, 8, 8, 8, False, F32)
def test_E1_orthonormal_and_the_numerical_rank_is_the_limit(seed, m, n, r, center, dtype):
    """V has orthonormal rows, and asking for more of them than the numerical rank is an error that
    names the rank."""
    r = min(r, m, n)
    rows = planted(seeded(seed), m, n, torch.linspace(1, 0.1, r), dtype)
    found = principal_components(rows, None, center)
    orthonormal(found.V, dtype)
    sigma, V = svd(rows, center)
    free = sigma[: m - center]  # centred, one row follows from the others
    rank = int((free > sigma[0] * max(m - center, n) * eps(dtype)).sum())
    assert len(found.V) == rank
    with pytest.raises(ValueError, match=rf"want a rule or 1 to {rank}, numerical rank"):
        principal_components(rows, rank + 1, center)
    if rank:
        gap = sigma[rank - 1] / sigma[0]  # below it there is only rounding, which turns V by 1/gap
        bound = 64 * max(m, n) * (EPS / gap**2 + eps(dtype) / gap)
        close(projector(found.V), projector(V[:rank]), bound)
        asked = principal_components(rows, rank, center)
        assert len(asked.V) == rank
        orthonormal(asked.V, dtype)


@given(SEEDS, st.integers(2, 30), st.integers(1, 30), st.booleans(), WIDE, st.integers(0, 6))
@example(0, 12, 20, False, F32, 6)
@example(0, 20, 12, True, F32, 6)
@settings(max_examples=100)
def test_E2_singular_values_are_those_of_the_svd(seed, m, n, center, dtype, digits):
    """The singular values are those of an SVD in float64, up to max(m, n)·ε·σ₁²/σᵢ with the ε of
    float64, and up to their own rounding."""
    sigma = 3 * torch.logspace(0, -digits, min(m, n), dtype=torch.float64)
    rows = planted(seeded(seed), m, n, sigma, dtype)
    wanted, _ = svd(rows, center)
    every = principal_components(rows, None, center)
    rules = [None, 0.99, max(1, len(every.V) // 2)] if len(every.V) else [None]
    for rule in rules:
        found = principal_components(rows, rule, center).singular_values.double()
        kept = wanted[: len(found)]
        bound = max(m, n) * EPS * wanted[0] ** 2 / kept + eps(dtype) * kept
        error = (found - kept).abs()
        within((error / bound).amax() if len(found) else 0.0, 1.0)
        assert (found.diff() <= 0).all()


@given(SEEDS, st.integers(2, 20), SIZE, st.booleans(), WIDE)
def test_E3_what_is_left_is_the_energy_that_is_not_held(seed, m, n, center, dtype):
    """The K principal components of a stack leave energy − Σσ² of it, whatever K."""
    generator = seeded(seed)
    rows = normal(generator, m, n, dtype=dtype) + 3 * normal(generator, n, dtype=dtype)
    size = float(rows.double().square().sum())
    for K in range(1, len(principal_components(rows, None, center).V) + 1):
        found = principal_components(rows, K, center)
        left = rows.double() - found.reconstruct(found.project(rows)).double()
        held = found.singular_values.double().square().sum()
        # V, μ, σ and the products are rounded to dtype: m·n entries of relative error eps; c = 16
        bound = 16 * math.sqrt(m * n) * eps(dtype) * size
        close(left.square().sum(), found.energy - held, bound)


@given(SEEDS, st.integers(2, 7), st.integers(2, 7), st.integers(1, 3), st.integers(1, 3))
def test_E4_projecting_both_factors_gives_the_best_core(seed, o, d, r, K):
    """Projecting both factors gives the core M for which V_Bᵀ M V_A is nearest to ΔW."""
    generator = seeded(seed)
    subspace = recycle(some_adapters(generator, [3, 2], o, d), k=min(K, o, d))["q"]
    base = nn.Linear(d, o, dtype=torch.float64)
    module = EigenLoRAxLinear(base, subspace, rank=4, scaling=0.5)
    module.set_task(0, normal(generator, o, 4), normal(generator, 4, d))  # to be forgotten
    B, A = normal(generator, o, r), normal(generator, r, d)
    module.set_task(0, B, A)
    core = module.scaling * module.alpha_B[0] @ module.alpha_A[0].T
    every = torch.kron(subspace.B.V.T.contiguous(), subspace.A.V.T.contiguous())  # of vec(M)
    best = torch.linalg.lstsq(every, (B @ A).reshape(-1, 1)).solution.view(core.shape)
    close(core, best, 8 * o * d * EPS * (B @ A).norm())


@given(SEEDS, RANKS, SIZE, SIZE)
def test_E5_error_of_the_recycled_never_grows_and_ends_at_zero(seed, ranks, o, d):
    """The error of a recycled adapter, ‖ΔW − V_BᵀV_B ΔW V_AᵀV_A‖, never grows with K, and is zero
    at the rank of the stacks (not the numerical rank, below which a tiny adapter may lie)."""
    adapters = some_adapters(seeded(seed), ranks, o, d)
    limit = min(sum(ranks), o, d)
    errors = []
    for k in [*range(1, limit + 1), None]:
        found = recycle(adapters, k)["q"]
        assert k is None or len(found.A.V) == len(found.B.V) == k
        left = []
        for B, A in (adapter["q"] for adapter in adapters):
            delta = B @ A - projector(found.B.V) @ B @ A @ projector(found.A.V)
            left.append(delta.norm() / (B @ A).norm())
        for side, X in zip((found.A, found.B), both_stacks(adapters), strict=True):
            left.append((X - side.reconstruct(side.project(X))).norm() / X.norm())
        errors.append(torch.stack(left))
    errors = torch.stack(errors)  # (K, adapters + 2)
    bound = 16 * (o + d + sum(ranks)) * EPS
    close(errors[-1], torch.zeros_like(errors[-1]), bound)
    assert errors.isfinite().all()
    within(errors.diff(dim=0).clamp(min=0).max() if len(errors) > 1 else 0.0, bound)


@given(SEEDS, st.integers(1, 40), st.integers(0, 40), st.integers(0, 40), WIDE)
@example(0, 40, 1, 39, F32)
@example(0, 1, 1, 0, torch.float64)
@example(0, 5, 0, 5, torch.float64)
def test_E6_pseudo_components_are_orthonormal_to_rounding(seed, n, K, p, dtype):
    """Up to n − K pseudo-components are orthogonal to V and orthonormal among themselves, to
    rounding."""
    generator = seeded(seed)
    K = min(K, n)
    p = min(p, n - K)
    V = torch.linalg.qr(normal(generator, n, K)).Q.T.to(dtype)
    found = augment(V, p, generator)
    assert found.shape == (K + p, n)
    exactly(found[:K], V)
    orthonormal(found, dtype)
    one_by_one = V
    for _ in range(p):
        one_by_one = augment(one_by_one, 1, generator)
    orthonormal(one_by_one, dtype)
    with pytest.raises(ValueError, match="want 0 to n − K"):
        augment(V, n - K + 1)


@given(SEEDS, RANKS, st.integers(2, 14), st.integers(2, 14), st.booleans(), WIDE, st.data())
@settings(max_examples=40)
def test_E7_update_is_starting_over(seed, ranks, o, d, singly, dtype, data):
    """An update equals starting over while nothing was dropped. After any number of truncated
    updates V misses at most energy − Σσ² of all the rows ever stacked, and where every step
    asked for a share k, Σσ² is at least k·energy."""
    adapters = some_adapters(seeded(seed), [*ranks, 2, 1], o, d, dtype)
    # Means far from 0, which an update that centred would lose.
    adapters = [{"q": (B + 1, A - 2)} for adapter in adapters for B, A in adapter.values()]
    first, later = adapters[:2], adapters[2:]
    steps = [[adapter] for adapter in later] if singly else [later]
    share = data.draw(st.floats(0.3, 1.0))

    def grown(k):
        """The components of all the adapters, after the steps."""
        subspaces = recycle(first, k)
        for step in steps:
            subspaces = update(subspaces, step, k)
        return subspaces["q"].A, subspaces["q"].B

    stacks = both_stacks(adapters)
    over = recycle(adapters)["q"]
    rounding = 64 * len(adapters) * eps(dtype)  # V and σ are rounded in each step; c = 64
    for found, wanted, X in zip(grown(None), (over.A, over.B), stacks, strict=True):
        orthonormal(found.V, dtype)
        smallest = float(wanted.singular_values[-1]) / float(X.norm())
        close(projector(found.V), projector(wanted.V), rounding * sum(X.shape) / smallest)
        close(found.singular_values, wanted.singular_values, rounding * sum(X.shape) * X.norm())
        close(found.energy, wanted.energy, rounding * wanted.energy)
    for k in (1, share):
        for found, X in zip(grown(k), stacks, strict=True):
            whole = float(X.square().sum())
            held = float(found.singular_values.double().square().sum())
            left = X - X @ projector(found.V)
            assert left.isfinite().all() and math.isfinite(found.energy) and math.isfinite(held)
            close(found.energy, whole, rounding * whole)
            best = float(svd(X)[0][len(found.V) :].square().sum())
            within(max(0.0, best - float(left.square().sum())), rounding * whole)
            within(max(0.0, float(left.square().sum()) - found.energy + held), rounding * whole)
            if isinstance(k, float):
                within(max(0.0, share * whole - held), rounding * whole)
                within(
                    max(0.0, share * whole - float((X @ found.V.T.double()).square().sum())),
                    rounding * whole,
                )


@given(SEEDS, st.lists(st.integers(1, 4), min_size=1, max_size=4), SIZE, SIZE)
def test_E8_ranks_may_differ_and_rotations_change_nothing(seed, ranks, o, d):
    """Ranks may differ, and (BQ, QᵀA) with an orthogonal Q recycles to the same subspace."""
    generator = seeded(seed)
    adapters = some_adapters(generator, ranks, o, d)
    turned = []
    for adapter in adapters:
        B, A = adapter["q"]
        Q = torch.linalg.qr(normal(generator, len(A), len(A))).Q
        turned.append({"q": (B @ Q, Q.T @ A)})
    found, wanted = recycle(turned)["q"], recycle(adapters)["q"]
    sides = (found.A, wanted.A), (found.B, wanted.B)
    for (one, other), X in zip(sides, both_stacks(adapters), strict=True):
        sigma = other.singular_values
        bound = 8 * sum(X.shape) * EPS
        close(one.singular_values, sigma, bound * sigma[0])
        close(projector(one.V), projector(other.V), bound * sigma[0] / sigma[-1])


@given(SEEDS, st.integers(1, 5), st.integers(1, 3), st.sampled_from([(), (1,), (40,), (2, 3)]))
def test_E9_delta_is_the_product_and_merge_is_forward(seed, K, rank, batch):
    """ΔW(task) = s·V_Bᵀ α_B α_Aᵀ V_A, merging changes outputs only by the rounding of W₀ + ΔW to
    W₀'s dtype, and with init="zero" a new task has ΔW = 0."""
    generator = seeded(seed)
    module = layer(generator, tasks=3, rank=rank, K=K, scaling=0.5)
    x = normal(generator, *batch, 9)
    for task in range(3):
        delta = 0.5 * module.V_B.T @ module.alpha_B[task] @ module.alpha_A[task].T @ module.V_A
        wanted = x @ (module.base.weight + delta).T + module.base.bias
        bound = 32 * EPS * (1 + wanted.abs().max())
        close(module(x, task), wanted, bound)
        B, A = module.pair(task)
        close(B @ A, delta, bound)
        merged = module.merge(task)
        assert type(merged) is nn.Linear
        close(merged(x), module(x, task), bound)
        module.task = task
        exactly(module.weight, merged.weight)
        exactly(module(x), module(x, task))
    half = layer(generator, rank=rank, K=K, dtype=BF16)  # its sum is rounded once
    exact = half.base.weight.double() + half.V_B.double().T @ half.alpha_B[0].double() @ (
        half.alpha_A[0].double().T @ half.V_A.double()
    )
    excess = (half.merge().weight.double() - exact).abs() - exact.abs() * eps(BF16) / 2
    within(excess.max().clamp(min=0), 32 * eps(F32) * (1 + exact.abs().max()))
    new = layer(generator, rank=rank, K=K, init="zero")
    exactly(new(x), new.base(x))
    new(x + 1).square().sum().backward()
    assert new.alpha_B[0].grad.isfinite().all() and new.alpha_B[0].grad.norm() > 0
    assert new.base.weight.grad is None


@pytest.mark.parametrize(
    "layers, shapes, K, r, wanted",
    [
        (12, [(768, 768)] * 2, 2, 1, 96),  # ViT-B/16, query and value
        (12, [(768, 768)] * 2, 32, 8, 12_288),  # RoBERTa-base
        (12, [(768, 768)] * 2, 64, 8, 24_576),  # 32 components + 32 pseudo
        (32, [(4096, 4096), (1024, 4096), (1024, 4096)], 32, 16, 98_304),  # Mistral q, k, v
        (32, [(4096, 4096), (1024, 4096), (1024, 4096)], 256, 16, 786_432),
    ],
)
def test_E10_only_coefficients_train_and_there_are_so_many(layers, shapes, K, r, wanted):
    """Only coefficients train: tasks·(K_A + K_B)·r numbers a Linear. With query and value of 12
    blocks adapted, these are the paper's 24·(2 + 2)·1 = 96 (ViT, Appendix A.1.1) and 24·(32 +
    32)·8 = 12,288 (RoBERTa, Table 2: 12K)."""
    with torch.device("meta"):
        block = [nn.ModuleList(nn.Linear(d, o) for o, d in shapes) for _ in range(layers)]
        model = nn.ModuleList(block)
        subspaces = {
            f"{i}.{j}": Subspace(directions(torch.empty(K, d)), directions(torch.empty(K, o)))
            for i in range(layers)
            for j, (o, d) in enumerate(shapes)
        }
        adapt(model, subspaces, rank=r)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {f"{name}.alpha_{side}.0" for name in subspaces for side in "AB"}
    close(sum(trained.values()), wanted, 0)
    uneven = Subspace(directions(torch.eye(3, 9)), directions(torch.eye(5, 7)))
    module = EigenLoRAxLinear(nn.Linear(9, 7), uneven, rank=2, tasks=4)
    close(sum(p.numel() for p in module.parameters() if p.requires_grad), 4 * (3 + 5) * 2, 0)


def omega(β):
    """ω(β) of arXiv:1305.5870 from its definition: λ(β) / √median of Marchenko–Pastur."""
    cut = 2 * (β + 1) + 8 * β / (β + 1 + math.sqrt(β**2 + 14 * β + 1))
    θ = (torch.arange(100_000, dtype=torch.float64) + 0.5) * (math.pi / 100_000)
    t = 1 + β - 2 * math.sqrt(β) * θ.cos()  # eigenvalues, from (1 − √β)² to (1 + √β)²
    mass = (θ.sin().square() / t).cumsum(0)  # up to a factor
    return math.sqrt(cut / t[torch.searchsorted(mass, mass[-1] / 2)].item())


@given(SEEDS, st.integers(1, 3), st.integers(60, 90), st.integers(60, 160), st.booleans())
@settings(max_examples=8)
def test_E11_k_by_explained_variance_and_by_gavish_donoho(seed, r, m, n, center):
    """K by a share is the least K up to the rank that holds it; Gavish and Donoho's K is the
    planted rank where a low rank stands well above white noise, and the cubic is within 0.02 of
    their ω."""
    generator = seeded(seed)
    noise = normal(generator, m, n)
    # signal at 3 times the edge √m + √n of the noise; ω·median lies between 1.02 and 1.6 edges
    strong = 3 * (math.sqrt(m) + math.sqrt(n))
    rows = noise + planted(generator, m, n, [strong * (1 + i) for i in range(r)], torch.float64)
    close(len(principal_components(rows, "gavish-donoho", center).V), r, 0)
    free = m - center  # of centred rows one follows from the others
    sigma = svd(rows, center)[0][:free]
    close(choose_k(sigma, "gavish-donoho", (free, n)), r, 0)
    held = sigma.square().cumsum(0)
    for share in (0.01, 0.5, 0.9, 0.99):
        least = next(K for K in range(1, len(held) + 1) if held[K - 1] >= share * held[-1])
        close(len(principal_components(rows, share, center).V), least, 0)
        close(choose_k(sigma, share, (free, n), energy=float(held[-1])), least, 0)
    assert len(principal_components(rows, 1.0, center).V) <= min(free, n)
    for part in (50, 300, 700, 1000):
        around = torch.tensor([0.02, -0.02]) + omega(part / 1000)  # the median is 1
        close(choose_k(torch.cat([around, torch.ones(9)]), "gavish-donoho", (part, 1000)), 1, 0)


@given(SEEDS, st.integers(1, 4), st.integers(1, 6), st.sampled_from([(), (1,), (5,), (2, 3)]))
def test_E12_a_mixed_batch_gets_what_each_gets_alone(seed, tasks, batch, inner):
    """In a batch of mixed tasks each sample gets from a layer, to rounding, what it gets alone."""
    generator = seeded(seed)
    module = layer(generator, tasks=tasks, rank=3, scaling=2.0)
    x = normal(generator, batch, *inner, 9)
    ids = torch.randint(tasks, (batch,), generator=generator)
    alone = torch.cat([module(x[i : i + 1], task) for i, task in enumerate(ids.tolist())])
    bound = 32 * EPS * (1 + alone.abs().max())
    close(module(x, ids), alone, bound)
    with torch.no_grad():
        close(module(x, ids), alone, bound)
    for given_ids in (ids.tolist(), ids.int()):
        with serving({"q": module}, given_ids):
            close(module(x), alone, bound)
        with torch.no_grad(), serving({"q": module}, given_ids):
            close(module(x), alone, bound)
    alphas = [*module.alpha_A, *module.alpha_B]
    mixed = torch.autograd.grad(module(x, ids).sin().sum(), alphas, allow_unused=True)
    single = torch.autograd.grad(alone.sin().sum(), alphas, allow_unused=True)
    for one, other in zip(mixed, single, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            close(one, other, bound * x.numel())


OPTIMISERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "SGD": lambda parameters: torch.optim.SGD(parameters, 1e-2, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS.values(), ids=OPTIMISERS)
def test_E13_the_other_tasks_keep_every_bit(optimiser):
    """While some tasks train, with weight decay and momentum, the others keep every bit."""
    module = layer(seeded(0), tasks=4)
    optimiser = optimiser([*module.alpha_A, *module.alpha_B])
    x = normal(seeded(1), 6, 9)
    mixed = torch.tensor([0, 2, 0, 2, 2, 0])
    for training, chosen in ((0, {0}), (1, {1}), (mixed, {0, 2}), (3, {3})):
        alphas = [p.detach().clone() for p in (*module.alpha_A, *module.alpha_B)]
        for _ in range(5):
            with serving({"q": module}, training):
                module(x).square().sum().backward()
            optimiser.step()
            optimiser.zero_grad()
        after = [*module.alpha_A, *module.alpha_B]
        for i, (p, old) in enumerate(zip(after, alphas, strict=True)):
            if i % 4 in chosen:
                assert not torch.equal(p, old)
            else:
                exactly(p, old)
