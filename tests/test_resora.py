"""resora.py: its claims, in order. Each docstring is the claim's sentence in the method file."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import resora
from resora import METRICS, LoRALinear, ReSoRA, adapt, redundancy, redundancy_dense, regauge
from tests.checks import EPS, F32, SEEDS, at_least, close, exactly, normal, seeded, within

O, D, R = st.integers(1, 12), st.integers(1, 12), st.integers(1, 6)
CENTRED = ("linear", "nonlinear")


def draw(seed, *shapes, dtype=torch.float64):
    """One normal tensor for each shape."""
    generator = seeded(seed)
    return [normal(generator, *shape, dtype=dtype) for shape in shapes]


def gradients(value, *tensors):
    """Of a scalar; a tensor that it does not depend on has gradient 0."""
    found = torch.autograd.grad(value, tensors, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def condition(S):
    """How many times centring enlarges a relative error of the squares of S (N, r)."""
    return (S.square().mean(0) / S.var(0, correction=0)).max().item()


def feature_maps(B, S):
    """All sᵢBᵢᵀ (r, N, o)."""
    return S.T[:, :, None] * B.T[:, None, :]


@pytest.mark.parametrize("metric, center", [*((m, True) for m in METRICS), ("linear", False)])
@given(SEEDS, st.integers(3, 20), O, R)
@example(0, 3, 1, 6)
@example(0, 20, 12, 1)
def test_R1_closed_form_is_the_materialised_one(metric, center, seed, N, o, r):
    """Where no Bᵢ is null and no code is constant, redundancy equals redundancy_dense in every
    metric: value, gradient of B (None counts as 0) and gradient of S."""
    B, S = draw(seed, (o, r), (N, r))
    S = S + 1.0  # a mean, so that centring matters
    B.requires_grad_(), S.requires_grad_()
    options = dict(beta=0.7, sigma=1.3, samples=10, center=center)  # N > 10: some are drawn
    fast = redundancy(B, S, metric, **options, generator=seeded(5))
    dense = redundancy_dense(B, S, metric, **options, generator=seeded(5))
    drawn = resora.draw_tokens(S.detach(), 10, seeded(5)) if metric == "nonlinear" else S.detach()
    # sums of at most N·o terms; the kernel of 3 nearly equal tokens is the worst conditioned
    bound = 10 * N * o * EPS * (condition(drawn) ** 2 if metric in CENTRED else 1)
    close(fast, dense, bound)
    # entries of size 1/‖Bᵢ‖ and 1/‖sᵢ‖
    size = 1 / B.detach().norm(dim=0).min() + 1 / drawn.std(0, correction=0).min()
    for found, wanted in zip(gradients(fast, B, S), gradients(dense, B, S), strict=True):
        close(found, wanted, bound * (1 + size))


@given(SEEDS, st.integers(2, 10), st.integers(0, 6), O, st.integers(2, 6))
def test_R2_weight_level_is_the_feature_level_on_isotropic_inputs(seed, d, more, o, r):
    """The weight level equals the feature level if xᵀx = c·I: for euclidean c = N/d, for cosine any
    c > 0, for linear any c > 0 if the columns of x have mean 0, and for nonlinear, with samples
    ≥ d, if x itself is a multiple of I up to the order of its rows."""
    layer = LoRALinear(nn.Linear(d, o, dtype=torch.float64), r, alpha=2 * r)  # scaling 2
    B, A, noise, shift = draw(seed, (o, r), (r, d), (d + 1 + more, d), (1,))
    layer.B.data, layer.A.data = B, A
    N = len(noise)
    Q = torch.linalg.qr(noise)[0]  # (N, d), QᵀQ = I
    centred = torch.linalg.qr(noise - noise.mean(0))[0]  # and no mean
    shuffled = torch.eye(d, dtype=torch.float64)[torch.randperm(d, generator=seeded(seed))]
    cond = torch.linalg.cond(noise - noise.mean(0)).item()  # what centring does to d columns
    inputs = {  # x, and how much the metric enlarges a rounding error
        "cosine": ((1 + shift.abs()) * Q, cond),
        "euclidean": (math.sqrt(N / d) * Q, cond),
        "linear": ((1 + shift.abs()) * centred, cond),
        "nonlinear": (-3 * shuffled, condition(A.T) ** 2),
    }
    for metric, (x, enlarged) in inputs.items():
        with ReSoRA(layer, metric) as feature:
            layer(x)
            found = feature.penalty()
        weight = ReSoRA(layer, metric, level="weight").penalty()
        close(found, weight, 10 * N * EPS * enlarged)
        if metric != "nonlinear":
            close(found, redundancy(2 * B, x @ A.T, metric), 10 * N * o * EPS * enlarged)
    if d > r:  # not a coincidence: on other inputs the two differ
        with ReSoRA(layer, "cosine") as feature:
            layer(Q * torch.arange(1.0, d + 1, dtype=torch.float64) ** 2)
            other = feature.penalty()
        assert (other - ReSoRA(layer, "cosine", level="weight").penalty()).abs() > 1e-9


@given(SEEDS, st.integers(3, 30), O, st.integers(2, 6))
def test_R3_linear_is_the_squared_correlation_of_the_codes(seed, N, o, r):
    """Centred, linear is ρᵢⱼ², the squared Pearson correlation of two codes, and B gets no
    gradient."""
    B, S = draw(seed, (o, r), (N, r))
    S = (S + 2).requires_grad_()
    B.requires_grad_()
    value = redundancy(B, S, "linear")
    rho = np.corrcoef(S.detach().numpy(), rowvar=False)
    wanted = np.mean(rho[np.triu_indices(r, 1)] ** 2)
    close(value, torch.tensor(wanted), N * EPS * condition(S.detach()))
    assert torch.autograd.grad(value, B, allow_unused=True) == (None,)


@given(SEEDS, st.integers(1, 12), O, st.integers(2, 6))
def test_R4_per_token_squared_cosine_sees_only_B(seed, N, o, r):
    """For a single token with codes that are not 0, cosine is cos²(Bᵢ, Bⱼ), whatever the token,
    and A gets no gradient."""
    B, S = draw(seed, (o, r), (N, r))
    S = (S.sign() * (0.1 + S.abs())).requires_grad_()  # no code near 0
    unit = B / B.norm(dim=0)
    wanted = (unit.T @ unit).square()[np.triu_indices(r, 1)].mean()
    for token in S:
        value = redundancy(B, token[None], "cosine")
        close(value, wanted, 10 * o * EPS)
        # And with no gradient at a code there is none at A.
        close(gradients(value, S)[0], torch.zeros_like(S), 100 * o * EPS)  # 1/|s| ≤ 10


@given(SEEDS, st.integers(1, 20), O, D, st.integers(1, 12), st.booleans())
@example(0, 1, 5, 5, 4, True)
@example(0, 3, 12, 12, 8, True)  # fewer tokens than components
@example(0, 9, 3, 12, 8, True)  # fewer outputs than components
def test_R5_regauge_keeps_the_product_and_removes_the_redundancy(seed, N, o, d, r, given_x):
    """B'A' = BA for every N and r, to rounding, and cosine is 0 for B' and A'. Where T has full
    rank k, linear is 0 on the given x."""
    B, A, x, mean = draw(seed, (o, r), (r, d), (N, d), (1, d))
    x = x + 3 * mean
    before = B.clone(), A.clone()
    B2, A2 = regauge(B, A, x.reshape(1, N, d) if given_x else None)
    exactly(B, before[0]), exactly(A, before[1])
    size = B.norm().item() * A.norm().item()
    close(B2 @ A2, B @ A, 10 * (r + o + d) * EPS * size)
    k = min(o, r)
    close(B2[:, :k].T @ B2[:, :k], torch.eye(k, dtype=torch.float64), 10 * (r + o) * EPS)
    S = x @ A2.T
    zero = torch.zeros((), dtype=torch.float64)
    close(redundancy(B2, S, "cosine"), zero, (10 * (r + o) * EPS) ** 2)
    if given_x:
        # |cosines| ≤ c·eps·‖codes‖/EPS, the smallest code that counts; and they enter squared
        bound = (10 * (N + r + o + d) * EPS * size * x.norm().item() / resora.EPS) ** 2
        close(redundancy(B2, S, "linear"), zero, bound)
    else:
        G = A2 @ A2.T
        close(G - G.diag().diag(), 0 * G, 10 * (r + o + d) * EPS * size**2)


@given(SEEDS, st.integers(1, 12), O, st.integers(1, 6), st.sampled_from(METRICS))
def test_R6_zero_B_is_finite(seed, N, o, r, metric):
    """B = 0, the start of LoRA, and any other null component give finite values and gradients in
    every metric."""
    B, S, some = draw(seed, (o, r), (N, r), (o, r))
    one_null, constant = some.clone(), S.clone()
    one_null[:, 0], constant[:, 0] = 0, 3100.7
    small = S * torch.tensor([1e-8] + [1.0] * (r - 1), dtype=torch.float64)  # null, not constant
    cases = [
        (0 * B, S),
        (one_null, S),
        (some, 0 * S),
        (some, constant),
        (some, small),
        (0 * B, 0 * S),
    ]
    for B0, S0 in cases:
        B0, S0 = B0.clone().requires_grad_(), S0.clone().requires_grad_()
        value = redundancy(B0, S0, metric)
        assert value.isfinite()
        assert all(g.isfinite().all() for g in gradients(value, B0, S0))
    if metric in ("euclidean", "cosine"):
        wanted = torch.tensor(float(metric == "euclidean" and r > 1), dtype=torch.float64)
        exactly(redundancy(0 * B, S, metric), wanted)
    else:  # a constant code: what centring leaves of it is rounding
        codes = torch.full((1000, 2), 3100.7)
        assert (codes - codes.mean(0)).ne(0).all()
        exactly(redundancy(torch.ones(o, 2), codes, metric, samples=1000), torch.tensor(0.0))
    # and as it happens in training: a fresh adapter
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    adapt(model, ["0", "2"], rank=r, generator=seeded(seed))
    with ReSoRA(model, metric) as regularizer:
        loss = model(normal(seed, N, 5, dtype=F32)).square().mean()
        (loss + regularizer.penalty()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@given(SEEDS, st.integers(1, 12), O, st.sampled_from(METRICS))
def test_R7_rank_one_gives_zero(seed, N, o, metric):
    """One component, r = 1, gives 0 in every metric, and its gradient is 0."""
    for function in (redundancy, redundancy_dense):
        B, S = (X.requires_grad_() for X in draw(seed, (o, 1), (N, 1)))
        value = function(B, S, metric)
        exactly(value, torch.zeros((), dtype=torch.float64))
        for gradient in gradients(value, B, S):  # there is a path
            exactly(gradient, torch.zeros_like(gradient))


@given(
    SEEDS, st.integers(4, 30), O, st.integers(2, 6), st.sampled_from(METRICS[1:])
)  # all but euclidean
def test_R8_range_and_invariance(seed, N, o, r, metric):
    """cosine, linear and nonlinear are in [0, 1] to rounding. Where no component is null, they do
    not depend on the order, signs and lengths of the components, and are 1 for equal ones."""
    B, S = draw(seed, (o, r), (N, r))
    drawn = resora.draw_tokens(S, 16, None)
    value = redundancy(B, S, metric, samples=16)
    bound = 5 * N * o * EPS * condition(drawn) ** 2
    assert value.isfinite()
    within(max(0.0, -value.item(), value.item() - 1), bound)
    generator = seeded(seed)
    order = torch.randperm(r, generator=generator)
    factors = 10 ** (4 * torch.rand(2, r, dtype=torch.float64, generator=generator) - 2)  # 10^±2
    factors *= torch.randint(0, 2, (2, r), generator=generator) * 2 - 1
    close(redundancy(B[:, order], S[:, order], metric, samples=16), value, bound)
    close(redundancy(B * factors[0], S * factors[1], metric, samples=16), value, bound)
    twins = B[:, :1].expand(o, 2), S[:, :1].expand(N, 2)
    close(redundancy(*twins, metric, samples=16), torch.ones_like(value), bound)


@given(SEEDS, st.integers(32, 100))
def test_R9_nonlinear_sees_what_linear_does_not(seed, half):
    """Nonlinear sees what linear cannot. Let s₁ be normal numbers and their negatives, and s₂ = s₁²
    − 1. Their covariance, the mean of s₁³, is 0, and so is linear; nonlinear was above 0.12 in
    each draw of 64 tokens or more, three times what independent codes have on 64."""
    (h,) = draw(seed, (half,))
    s = torch.cat([h, -h])
    S = torch.stack([s, s.square() - 1], 1)
    B = torch.eye(3, 2, dtype=torch.float64)
    close(redundancy(B, S, "linear"), torch.zeros(()), (10 * half * EPS) ** 2)
    found = redundancy(B, S, "nonlinear", samples=256)
    at_least(found, 0.12)
    # The same from the definition, by numpy: the centred kernels, and their cosine.
    mean_off = np.eye(2 * half) - 1 / (2 * half)
    distances = [(code[:, None] - code) ** 2 / (2 * code.var()) for code in S.numpy().T]
    K, L = (mean_off @ np.exp(-distance) @ mean_off for distance in distances)
    wanted = (K * L).sum() / np.linalg.norm(K) / np.linalg.norm(L)
    close(found, torch.tensor(wanted), 100 * half * EPS)


@given(SEEDS, st.sampled_from(METRICS), st.sampled_from(["feature", "weight"]))
@settings(max_examples=12)
def test_R10_nothing_else_changes(seed, metric, level):
    """Attaching ReSoRA and computing a penalty changes no bit of an output, of a merged weight and
    of the global random state."""
    generator = seeded(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    modules = adapt(model, ["0", "2"], rank=3, generator=generator)
    for module in modules.values():
        nn.init.normal_(module.B, generator=generator)
    x = normal(generator, 7, 30, 8, dtype=F32)
    given_x, plain = x.clone(), model(x)
    merged = [module.merge().weight for module in modules.values()]
    states = torch.get_rng_state(), random.getstate()
    with ReSoRA(model, metric, level, samples=50) as regularizer:  # 210 tokens: 50 are drawn
        outputs = [model(x)]
        regularizer.penalty().backward()
        outputs.append(model(x))
    exactly(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    for output in [*outputs, model(x)]:
        exactly(output, plain)
    exactly(x, given_x)
    for module, weight in zip(modules.values(), merged, strict=True):
        exactly(module.merge().weight, weight)


@given(SEEDS, st.integers(1, 20), O, R)
def test_R11_euclidean_pays_for_growth(seed, N, o, r):
    """Σ_{i<j} ‖ΔHᵢ − ΔHⱼ‖² = r·Σᵢ ‖ΔHᵢ‖² − ‖Σᵢ ΔHᵢ‖², which quadruples when B doubles, and
    euclidean falls unless all maps are equal."""
    B, S = draw(seed, (o, r), (N, r))
    H = feature_maps(B, S)
    wanted = r * H.square().sum() - H.sum(0).square().sum()
    beta = 1e-3
    for scale in (1, 2):
        found = torch.zeros((), dtype=torch.float64)
        for i, j in zip(*np.triu_indices(r, 1), strict=True):
            pair = redundancy(scale * B[:, [i, j]], S[:, [i, j]], "euclidean", beta=beta)
            found = found - pair.log() / beta * N * o
        # the logarithm of a number near 1 costs 1/β
        bound = N * o * r**2 * EPS * (1 / beta + scale**2 * H.square().sum().item())
        close(found, scale**2 * wanted, bound)
    if r > 1:
        values = [redundancy(scale * B, S, "euclidean").item() for scale in (1, 2, 4)]
        assert values == sorted(values, reverse=True) and values[0] > values[2]
    for scale in (1, 2):  # equal maps
        twins = scale * B[:, :1].expand(o, 2), S[:, :1].expand(N, 2)
        close(redundancy(*twins, "euclidean"), 1.0, 10 * EPS * H.square().sum())


@given(SEEDS, st.integers(8, 30), st.integers(2, 6), st.sampled_from(METRICS))
@settings(max_examples=25)
def test_R12_linear_and_nonlinear_train_A_alone(seed, N, r, metric):
    """With detach_input, the penalty alone gives B the gradient None in linear and nonlinear, which
    train A from the first step; in euclidean and cosine it trains both, and while B = 0
    neither."""
    generator = seeded(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    modules = adapt(model, ["0", "2"], rank=r, generator=generator).values()
    for filled in (False, True):  # the first step, where B = 0, and a later one
        model.zero_grad()
        if filled:
            for module in modules:
                nn.init.normal_(module.B, generator=generator)
        with ReSoRA(model, metric) as regularizer:
            model(normal(generator, N, 8, dtype=F32))
            regularizer.penalty().backward()
        trained = [(module.A, module.B) for module in modules]
        if metric in CENTRED:
            assert all(B.grad is None for _, B in trained)
            trained = [(A,) for A, _ in trained]
        for p in (p for factors in trained for p in factors):
            assert p.grad is not None and p.grad.isfinite().all()
            close(p.grad.ne(0).any().item(), metric in CENTRED or filled, 0)


@given(SEEDS, st.integers(16, 100), O, st.floats(0, math.pi))
@example(0, 16, 2, math.pi / 2)  # the minimum: codes a quarter turn apart
def test_R13_nonlinear_forbids_some_products(seed, N, o, turn):
    """Nonlinear forbids some ΔW: for a ΔW of rank 2 and 16 or more inputs (cos t, sin t), in equal
    steps around a circle and all of them used, no factors B (o, 2) and A (2, 2) whose codes are
    not null bring it below 0.07."""
    angles = torch.arange(N, dtype=torch.float64) * (2 * math.pi / N)
    x = torch.stack([angles.cos(), angles.sin()], 1)
    B, A = draw(seed, (o, 2), (2, 2))
    turned = torch.tensor([[1.0, 0.0], [math.cos(turn), math.sin(turn)]], dtype=torch.float64)
    for factor in (A, turned):  # lengths and a common turn aside, every A is a `turned` one
        at_least(redundancy(B, x @ factor.T, "nonlinear"), 0.07)
    if o > 1:  # regauge, which makes linear 0 here, cannot do it either
        B2, A2 = regauge(B, A, x)
        at_least(redundancy(B2, x @ A2.T, "nonlinear"), 0.07)
