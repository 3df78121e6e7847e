"""resora.py: the claims R1–R11 in order, then LoRALinear, then ReSoRA where it has to work."""

import copy
import gc
import math
import pickle
import random
import weakref
from itertools import pairwise

import numpy as np
import peft
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import resora
from resora import METRICS, LoRALinear, ReSoRA, adapt, merge, redundancy, redundancy_dense, regauge

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
EPS = torch.finfo(F64).eps
SEEDS = st.integers(0, 2**32 - 1)
O, D, R = st.integers(1, 12), st.integers(1, 12), st.integers(1, 6)
CENTRED = ("linear", "nonlinear")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A second one saves nothing at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def draw(seed, *shapes, dtype=F64):
    g = generator(seed)
    return [torch.randn(shape, dtype=F64, generator=g).to(dtype) for shape in shapes]


def close(found, wanted, tolerance):
    found, wanted = torch.as_tensor(found), torch.as_tensor(wanted)
    assert found.shape == wanted.shape
    assert found.isfinite().all() and wanted.isfinite().all()
    error = (found.double() - wanted.double()).abs().max().item() if found.numel() else 0.0
    assert error <= tolerance, f"off by {error:.3g}, allowed {tolerance:.3g}"


def gradients(value, *tensors):
    """None (no path in the graph) counts as 0."""
    found = torch.autograd.grad(value, tensors, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def condition(S):
    """How many times centring enlarges a relative error of the squares of S (N, r)."""
    return (S.square().mean(0) / S.var(0, correction=0)).max().item()


def squared_cosines(X):
    """Mean over i < j of cos² of the columns of X."""
    X = X / X.norm(dim=0)
    r = X.shape[1]
    return (X.T @ X).square().triu(1).sum() / max(1, r * (r - 1) / 2)


# ---------------------------------------------------------------------------------- the claims


@given(SEEDS, st.integers(3, 20), O, R, st.sampled_from(METRICS), st.booleans())
@example(0, 3, 1, 6, "nonlinear", True)
@example(0, 20, 12, 1, "linear", False)
def test_R1_closed_form_is_the_materialised_one(seed, N, o, r, metric, center):
    B, S = draw(seed, (o, r), (N, r))
    S = S + 1.0  # a mean, so that centring matters
    B.requires_grad_(), S.requires_grad_()
    options = dict(beta=0.7, sigma=1.3, samples=10, center=center)  # N > 10: some are drawn
    fast = redundancy(B, S, metric, **options, generator=generator(5))
    dense = redundancy_dense(B, S, metric, **options, generator=generator(5))
    drawn = resora._sample(S.detach(), 10, generator(5)) if metric == "nonlinear" else S.detach()
    # sums of at most N·o terms; the kernel of 3 nearly equal tokens is the worst conditioned
    c = 1000 * N * o * EPS * (condition(drawn) ** 2 if metric in CENTRED else 1)
    close(fast, dense, c)
    if r > 1:
        for f, g in zip(gradients(fast, B, S), gradients(dense, B, S), strict=True):
            # entries of size 1/‖B_i‖ and 1/‖s_i‖
            size = 1 / B.detach().norm(dim=0).min() + 1 / drawn.std(0, correction=0).min()
            close(f, g, c * (1 + size.item()))


@given(SEEDS, st.integers(2, 10), st.integers(0, 6), O, st.integers(2, 6))
def test_R2_weight_level_is_the_feature_level_on_isotropic_inputs(seed, d, more, o, r):
    layer = LoRALinear(nn.Linear(d, o, dtype=F64), r)
    B, A, noise, shift = draw(seed, (o, r), (r, d), (d + 1 + more, d), ())
    layer.B.data, layer.A.data = B, A
    N = len(noise)
    Q = torch.linalg.qr(noise)[0]  # (N, d), QᵀQ = I
    centred = torch.linalg.qr(noise - noise.mean(0))[0]  # and no mean
    inputs = {
        "cosine": (1 + shift.abs()) * Q,
        "euclidean": math.sqrt(N / d) * Q,
        "linear": (1 + shift.abs()) * centred,
        "nonlinear": -3 * torch.eye(d, dtype=F64)[torch.randperm(d, generator=generator(seed))],
    }
    # cond(noise) is what is left of d columns after centring; generous: no square of it appears
    cond = torch.linalg.cond(noise - noise.mean(0)).item() if d > 1 else 1.0
    for metric, x in inputs.items():
        with ReSoRA(layer, metric) as feature:
            layer(x)
            found = feature.penalty()
        weight = ReSoRA(layer, metric, level="weight").penalty()
        c = 1000 * N * EPS * (condition(A.T) ** 2 if metric == "nonlinear" else cond)
        close(found, weight, c)
    if d > r:  # not a coincidence: on other inputs the two differ
        with ReSoRA(layer, "cosine") as feature:
            layer(Q * torch.arange(1.0, d + 1, dtype=F64) ** 2)
            other = feature.penalty()
        assert other != ReSoRA(layer, "cosine", level="weight").penalty()


@given(SEEDS, st.integers(3, 30), O, st.integers(2, 6))
def test_R3_linear_is_the_squared_correlation_of_the_codes(seed, N, o, r):
    B, S = draw(seed, (o, r), (N, r))
    S = (S + 2).requires_grad_()
    B.requires_grad_()
    value = redundancy(B, S, "linear")
    rho = np.corrcoef(S.detach().numpy(), rowvar=False)
    wanted = np.mean(rho[np.triu_indices(r, 1)] ** 2)
    close(value, torch.tensor(wanted), 100 * N * EPS * condition(S.detach()))
    assert torch.autograd.grad(value, B, allow_unused=True) == (None,)


@given(SEEDS, st.integers(1, 12), O, st.integers(2, 6))
def test_R4_per_token_squared_cosine_sees_only_B(seed, N, o, r):
    B, S = draw(seed, (o, r), (N, r))
    S = S.sign() * (0.1 + S.abs())  # no code near 0
    wanted = squared_cosines(B)
    S.requires_grad_()
    H = S.T[:, :, None] * B.T[:, None, :]  # (r, N, o), the maps themselves
    H = H / H.norm(dim=-1, keepdim=True)
    cosines = torch.einsum("ino,jno->nij", H, H)
    pairs = r * (r - 1) / 2
    per_token = cosines.square().triu(1).sum((1, 2)) / pairs
    # the same from the module: every token is a layer of one token
    ours = redundancy(B.expand(N, o, r), S[:, None, :], "cosine")
    tolerance = 100 * o * EPS
    close(per_token, wanted.expand(N), tolerance)
    close(ours, wanted, tolerance)
    for value in (per_token.mean(), ours):
        (gradient,) = gradients(value, S)
        close(gradient, torch.zeros_like(S), tolerance / 0.1)  # 1/|s| ≤ 1/0.1


@given(SEEDS, st.integers(1, 20), O, D, st.integers(1, 12), st.booleans())
@example(0, 1, 5, 5, 4, True)
@example(0, 3, 12, 12, 8, True)  # fewer tokens than components
@example(0, 9, 3, 12, 8, True)  # fewer outputs than components
def test_R5_regauge_keeps_the_product_and_removes_the_redundancy(seed, N, o, d, r, given_x):
    B, A, x, mean = draw(seed, (o, r), (r, d), (N, d), (1, d))
    x = x + 3 * mean
    before = B.clone(), A.clone()
    B2, A2 = regauge(B, A, x.reshape(1, N, d) if given_x else None)
    assert B2.shape == B.shape and A2.shape == A.shape
    assert torch.equal(B, before[0]) and torch.equal(A, before[1])
    size = B.norm().item() * A.norm().item()
    close(B2 @ A2, B @ A, 100 * (r + o + d) * EPS * size)
    k = min(o, r)
    close(B2[:, :k].T @ B2[:, :k], torch.eye(k, dtype=F64), 100 * (r + o) * EPS)
    S = x @ A2.T
    # |cosines| ≤ c·eps·‖codes‖/EPS, the smallest code that counts; and they enter squared
    tolerance = (100 * (N + r + o + d) * EPS * size * x.norm().item() / resora.EPS) ** 2
    close(redundancy(B2, S, "cosine"), 0.0 * S.sum(), 1e-20)
    if given_x:
        close(redundancy(B2, S, "linear"), 0.0 * S.sum(), tolerance)
    else:
        G = A2 @ A2.T
        close(G - G.diag().diag(), 0 * G, 100 * (r + o + d) * EPS * size**2)


@given(SEEDS, st.integers(1, 12), O, st.integers(1, 6), st.sampled_from(METRICS))
def test_R6_zero_B_is_finite(seed, N, o, r, metric):
    B, S, some = draw(seed, (o, r), (N, r), (o, r))
    one_null, constant = some.clone(), S.clone()
    one_null[:, 0], constant[:, 0] = 0, 3100.7
    for B0, S0 in [(0 * B, S), (one_null, S), (some, 0 * S), (some, constant), (0 * B, 0 * S)]:
        B0, S0 = B0.clone().requires_grad_(), S0.clone().requires_grad_()
        value = redundancy(B0, S0, metric)
        assert value.isfinite()
        assert all(g.isfinite().all() for g in gradients(value, B0, S0))
    pairs = r > 1
    wanted = {"euclidean": float(pairs), "cosine": 0.0}
    if metric in wanted:
        assert redundancy(0 * B, S, metric) == wanted[metric]
    if metric in CENTRED:  # a constant code: what centring leaves is rounding
        codes = torch.full((1000, 2), 3100.7)
        assert (codes - codes.mean(0)).ne(0).all()
        assert redundancy(torch.ones(o, 2), codes, metric, samples=1000) == 0
    # and as it happens in training: a fresh adapter
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    adapt(model, ["0", "2"], rank=r, generator=generator(seed))
    with ReSoRA(model, metric) as regularizer:
        loss = model(torch.randn(N, 5, generator=generator(seed))).square().mean()
        (loss + regularizer.penalty()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@given(SEEDS, st.integers(1, 12), O, st.sampled_from(METRICS))
def test_R7_rank_one_gives_zero(seed, N, o, metric):
    B, S = draw(seed, (o, 1), (N, 1))
    S.requires_grad_()
    value = redundancy(B, S, metric)
    assert value.shape == () and value == 0
    assert redundancy_dense(B, S, metric) == 0
    assert gradients(value, S)[0].eq(0).all()


@given(SEEDS, st.integers(4, 30), O, st.integers(2, 6), st.sampled_from(METRICS[1:]))
def test_R8_range_and_invariance(seed, N, o, r, metric):
    B, S = draw(seed, (o, r), (N, r))
    drawn = resora._sample(S, 16, None)
    value = redundancy(B, S, metric, samples=16)
    tolerance = 1000 * N * o * EPS * condition(drawn) ** 2
    assert -tolerance <= value <= 1 + tolerance
    g = generator(seed)
    order = torch.randperm(r, generator=g)
    factors = 10 ** (4 * torch.rand(2, r, dtype=F64, generator=g) - 2)  # 10^±2
    factors *= torch.randint(0, 2, (2, r), generator=g) * 2 - 1
    close(redundancy(B[:, order], S[:, order], metric, samples=16), value, tolerance)
    close(redundancy(B * factors[0], S * factors[1], metric, samples=16), value, tolerance)
    twins = S[:, :1].expand(N, 2), B[:, :1].expand(o, 2)
    close(redundancy(twins[1], twins[0], metric, samples=16), torch.tensor(1.0), tolerance)


@given(SEEDS, st.integers(32, 100))
def test_R9_nonlinear_sees_what_linear_does_not(seed, half):
    (h,) = draw(seed, (half,))
    s = torch.cat([h, -h])
    S = torch.stack([s, s.square() - 1], 1)
    B = torch.eye(3, 2, dtype=F64)
    close(redundancy(B, S, "linear"), torch.tensor(0.0), (100 * half * EPS) ** 2)
    independent = 0.04  # its value for independent codes at the smallest n here, 64
    assert redundancy(B, S, "nonlinear") > 3 * independent


@given(SEEDS, st.sampled_from(METRICS), st.sampled_from(["feature", "weight"]))
@settings(max_examples=12)
def test_R10_nothing_else_changes(seed, metric, level):
    model, modules = tiny(seed)
    (x,) = draw(seed, (7, 30, 8), dtype=F32)
    plain = model(x)
    merged = {name: m.merge().weight for name, m in modules.items()}
    states = torch.get_rng_state(), random.getstate()
    with ReSoRA(model, metric, level, samples=50) as regularizer:  # 210 tokens: 50 are drawn
        out = model(x)
        regularizer.penalty().backward()
        again = model(x)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert torch.equal(out, plain) and torch.equal(again, plain) and torch.equal(model(x), plain)
    assert all(torch.equal(m.merge().weight, merged[name]) for name, m in modules.items())


@given(SEEDS, st.integers(1, 20), O, R)
def test_R11_euclidean_pays_for_growth(seed, N, o, r):
    B, S = draw(seed, (o, r), (N, r))
    H = S.T[:, :, None] * B.T[:, None, :]
    wanted = r * H.square().sum() - H.sum(0).square().sum()
    beta, found = 1e-3, torch.zeros((), dtype=F64)
    for j in range(r):
        for i in range(j):
            pair = redundancy(B[:, [i, j]], S[:, [i, j]], "euclidean", beta=beta)
            found = found - pair.log() / beta * N * o
    # the logarithm of a number near 1 costs 1/β
    close(found, wanted, 100 * N * o * r**2 * EPS * (1 / beta + H.square().sum().item()))
    if r > 1:
        values = [redundancy(t * B, S, "euclidean").item() for t in (1, 2, 4)]
        assert values == sorted(values, reverse=True)


# ------------------------------------------------------------------------- numbers in the docstring


@pytest.mark.parametrize(("n", "wanted"), [(32, 0.074), (128, 0.019), (256, 0.0095), (512, 0.0046)])
def test_floor_of_independent_codes(n, wanted):
    B = torch.ones(1, 24)
    biased, debiased = [], []
    for seed in range(max(2, 2048 // n // 4)):
        (S,) = draw(seed, (n, 24), dtype=F32)
        biased.append(redundancy(B, S, "nonlinear", samples=n).item())
        debiased.append(debiased_alignment(S.double()))
        assert 0 < biased[-1] < 1
    assert np.mean(biased) == pytest.approx(wanted, rel=0.06)  # 276 pairs × ≥ 2 draws
    assert abs(np.mean(debiased)) < wanted / 10


def debiased_alignment(S):
    """The formula under "Cost", literally."""
    n = len(S)
    z = (S - S.mean(0)) / S.std(0, correction=0)
    K = torch.exp(-(z.T[:, :, None] - z.T[:, None, :]).square() / 2)
    K.diagonal(dim1=1, dim2=2).zero_()

    def product(K, L):
        sums = K.sum() * L.sum() / ((n - 1) * (n - 2))
        return ((K * L).sum() + sums - 2 * (K @ L).sum() / (n - 2)) / (n * (n - 3))

    pairs = [(i, j) for j in range(6) for i in range(j)]
    norms = [product(k, k).sqrt() for k in K[:6]]
    return np.mean([(product(K[i], K[j]) / norms[i] / norms[j]).item() for i, j in pairs])


def test_floor_of_linear():
    values = [redundancy(torch.ones(1, 30), draw(s, (20, 30))[0]).item() for s in range(40)]
    assert np.mean(values) == pytest.approx(1 / 19, rel=0.03)  # 435 pairs × 40 draws


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


def test_no_control_flow_depends_on_data():
    for metric in METRICS:  # tensors without data
        B, S = torch.empty(5, 3, device="meta"), torch.empty(9, 3, device="meta")
        assert redundancy(B, S, metric).shape == ()
        compiled = torch.compile(redundancy, fullgraph=True, backend="eager")
        B, S = draw(0, (5, 3), (9, 3))
        close(compiled(B, S, metric), redundancy(B, S, metric), 10 * EPS)


def test_layers_are_averaged():
    B, S = draw(0, (2, 3, 5, 4), (2, 3, 9, 4))
    for metric in METRICS:
        pairs = zip(B.reshape(6, 5, 4), S.reshape(6, 9, 4), strict=True)
        each = [redundancy(b, s, metric) for b, s in pairs]
        close(redundancy(B, S, metric), sum(each) / 6, 100 * EPS)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_halves_are_summed_in_single_precision(dtype):
    B, S = draw(0, (64, 4), (5000, 4), dtype=dtype)
    for metric in METRICS:
        with torch.autocast("cpu", BF16):
            value = redundancy(B, S, metric)
        assert value.dtype == F32
        wanted = redundancy(B.double(), S.double(), metric)
        close(value, wanted, 100 * torch.finfo(F32).eps)  # no loss but the input's own rounding


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (dict(metric="cosin"), "'cosin'"),
        (dict(sigma=0.0), "sigma=0.0"),
        (dict(beta=-1.0), "beta=-1.0"),
        (dict(samples=1), "samples=1"),
        (dict(S=torch.ones(4, 3)), r"\(5, 2\), \(4, 3\)"),
        (dict(S=torch.ones(0, 2)), r"\(0, 2\)"),
        (dict(B=torch.ones(2)), r"\(2,\)"),
    ],
)
def test_wrong_arguments(arguments, wanted):
    arguments = dict(B=torch.ones(5, 2), S=torch.ones(4, 2)) | arguments
    with pytest.raises(ValueError, match=wanted):
        redundancy(**arguments)
    with pytest.raises(ValueError, match=wanted):
        redundancy_dense(**arguments)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_regauge_in_other_dtypes(dtype):
    B, A, x = draw(0, (20, 4), (4, 30), (50, 30), dtype=dtype)
    with torch.autocast("cpu", BF16):
        B2, A2 = regauge(B, A, x)
    assert B2.dtype == A2.dtype == dtype
    eps = torch.finfo(dtype).eps
    wanted = (B.double() @ A.double()).float()
    close(B2.float() @ A2.float(), wanted, 10 * eps * B.norm().item() * A.norm().item())
    assert redundancy(B2, x.float() @ A2.float().T, "linear") < (100 * eps) ** 2
    assert not regauge(B.requires_grad_(), A)[0].requires_grad


# -------------------------------------------------------------------------------------- LoRALinear


def tiny(seed=0, rank=3, **kw):
    """A model of three adapted layers whose B is not zero, and its {name: module}."""
    g = generator(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    modules = adapt(model, ["0", "2", "4"], rank=rank, generator=g, **kw)
    for m in modules.values():
        nn.init.normal_(m.B, generator=g)
    return model, modules


def test_starts_as_the_base():
    base = nn.Linear(6, 5)
    layer = LoRALinear(base, 3)
    x = torch.randn(2, 7, 6)
    assert torch.equal(layer(x), base(x))
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
    layer = LoRALinear(base, r, alpha=2.0 * r + 1, generator=generator(seed)).eval()
    B, x = draw(seed, (o, r), (*shape, d))
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
    x, B = draw(0, (5, 4), (3, 2))
    parameters = [layer.A.detach().clone().requires_grad_(), B.requires_grad_()]

    def call(A, B):
        state = {"A": A, "B": B}
        weight = torch.func.functional_call(
            Weight(layer), {f"layer.{k}": v for k, v in state.items()}
        )
        return torch.func.functional_call(layer, state, (x,)), weight

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
    layer = LoRALinear(base, 3, generator=generator(0))
    assert layer.A.dtype == layer.B.dtype == (F64 if dtype == F64 else F32)
    nn.init.normal_(layer.B, generator=generator(0))
    x = torch.randn(4, 6).to(dtype)
    eps = torch.finfo(dtype).eps
    wanted = F.linear(x.double(), base.weight.double() + layer.B.double() @ layer.A.double())
    assert layer(x).dtype == layer.weight.dtype == layer.merge().weight.dtype == dtype
    close(layer(x), wanted + base.bias.double(), 50 * eps)
    layer(x).sum().backward()
    assert layer.A.grad.dtype == layer.A.dtype
    exact = base.weight.double() + layer.B.double() @ layer.A.double()
    close(layer.merge().weight, exact, eps * exact.abs().max().item())  # rounded once


def test_autocast():
    layer = LoRALinear(nn.Linear(6, 5), 3)
    nn.init.normal_(layer.B)
    x = torch.randn(4, 6)
    with torch.autocast("cpu", BF16):
        y, plain, W = layer(x), layer.base(x), layer.weight
    assert y.dtype == plain.dtype == BF16 and W.dtype == F32
    close(y, layer(x), 50 * torch.finfo(BF16).eps)
    close(W, layer.merge().weight, 0)


def test_dropout_is_on_the_input_of_A_only():
    layer = LoRALinear(nn.Linear(6, 5), 3, dropout=0.5)
    nn.init.normal_(layer.B)
    x = torch.randn(100, 6)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    close(layer(x), F.linear(x, layer.weight, layer.bias), 1e3 * torch.finfo(F32).eps)
    assert torch.equal(layer(x), layer(x))


class Wrapped(nn.Module):
    """A base that is not an nn.Linear and keeps no float weight."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.abs().max() / 127
        self.register_buffer("weight", (linear.weight / self.scale).round().to(torch.int8))
        self.bias, self.in_features, self.out_features = None, 6, 5

    def forward(self, x):
        return F.linear(x, self.weight.float() * self.scale)


def test_base_is_called_not_opened():
    base = Wrapped(nn.Linear(6, 5).requires_grad_(False))
    layer = LoRALinear(base, 2)
    nn.init.normal_(layer.B)
    x = torch.randn(3, 6)
    close(layer(x), base(x) + x @ layer.A.T @ layer.B.T, 50 * torch.finfo(F32).eps)
    with pytest.raises(TypeError, match="int8"):
        layer.merge()


def test_stock_modules_that_read_the_weight_get_the_adapted_one():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    modules = adapt(attention, "out_proj", rank=2)
    nn.init.normal_(modules["out_proj"].B)
    x = torch.randn(2, 3, 8)
    before = attention(x, x, x)[0]
    after = merge(attention)(x, x, x)[0]
    assert type(attention.out_proj) is nn.Linear
    close(before, after, 100 * torch.finfo(F32).eps)


def test_copies_and_devices():
    layer = LoRALinear(nn.Linear(6, 5), 3, alpha=6)
    nn.init.normal_(layer.B)
    x = torch.randn(4, 6)
    other = LoRALinear(nn.Linear(6, 5), 3, alpha=6)
    other.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(twin(x), layer(x)) and twin.B is not layer.B
    assert layer.to(F64)(x.double()).dtype == F64
    meta = LoRALinear(nn.Linear(6, 5, device="meta"), 3)
    assert meta(torch.empty(2, 6, device="meta")).shape == (2, 5)
    assert LoRALinear(nn.Linear(6, 5, device="meta"), 3, generator=generator(0)).A.is_meta


def test_generator_leaves_the_global_state_alone():
    base, state = nn.Linear(6, 5), torch.get_rng_state()
    a, b = (LoRALinear(base, 3, generator=generator(1)) for _ in range(2))
    a.merge()
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(a.A, b.A)
    c, d = LoRALinear(base, 3), LoRALinear(base, 3)
    assert not torch.equal(c.A, d.A)


def test_compiles_into_one_graph():
    layer = LoRALinear(nn.Linear(6, 5), 3, alpha=2)
    nn.init.normal_(layer.B)
    x = torch.randn(4, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    close(compiled(x), layer(x), 10 * torch.finfo(F32).eps)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "8"])
def test_wrong_rank(rank):
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=f"rank: found {rank!r}"):
        adapt(model, "0", rank)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_adapt_changes_what_it_should():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"query": shared, "key": nn.Linear(4, 4), "also_query": shared})
    model = nn.ModuleDict({"block": model, "head": nn.Linear(4, 2)})
    with pytest.raises(ValueError, match="value"):
        adapt(model, ["query", "value"])
    with pytest.raises(ValueError, match="dropout"):
        adapt(model, "query", dropout=2.0)
    with pytest.raises(TypeError, match="Tanh"):
        LoRALinear(nn.Tanh())
    assert all(p.requires_grad for p in model.parameters())
    modules = adapt(model, ["block.query", "also_query"], rank=2, alpha=4)
    assert set(modules) == {"block.query", "block.also_query"}
    assert modules["block.query"] is modules["block.also_query"] is model.block.query
    assert modules["block.query"].scaling == 2 and type(model.block.key) is nn.Linear
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"block.query.A", "block.query.B"}
    x = torch.randn(3, 4)
    before = model.block.query(x)
    assert merge(model) is model and model.block.query is model.block.also_query
    assert type(model.block.query) is nn.Linear and torch.equal(model.block.query(x), before)
    assert type(merge(LoRALinear(nn.Linear(2, 2)))) is nn.Linear


# ------------------------------------------------------------------------------------------ ReSoRA


def by_hand(modules, inputs, metric="linear", **kw):
    pairs = zip(modules.values(), inputs, strict=True)
    return sum(redundancy(*codes(m, x), metric, **kw) for m, x in pairs) / len(inputs)


def codes(module, x):
    B, A = module.pair()
    return B, x.detach().reshape(-1, x.shape[-1]) @ A.T


def layer_inputs(model, x):
    return [x, model[:2](x), model[:4](x)]


def all_gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("metric", METRICS)
def test_penalty_is_the_mean_over_layers_of_each_ones_codes(metric):
    model, modules = tiny(alpha=5)
    (x,) = draw(1, (6, 5, 8), dtype=F32)
    with ReSoRA(model, metric, beta=0.5, sigma=0.8) as regularizer:
        model(x)
        value = regularizer.penalty()
    wanted = by_hand(modules, layer_inputs(model, x), metric, beta=0.5, sigma=0.8)
    tolerance = 1000 * torch.finfo(F32).eps
    close(value, wanted, tolerance)
    factors = [p for m in modules.values() for p in (m.A, m.B)]
    for found, g in zip(gradients(value, *factors), gradients(wanted, *factors), strict=True):
        close(found, g, tolerance * (1 + g.abs().max().item()))


def test_detached_inputs_move_a_layers_own_factors_only():
    for detach in (True, False):
        model, modules = tiny()
        with ReSoRA(model, detach_input=detach) as regularizer:
            model(torch.randn(20, 8))
            value = regularizer.penalty()
        last = modules["4"].A
        # the last layer's term alone: what it does to the first layer
        model2, modules2 = copy.deepcopy((model, modules))
        with ReSoRA(model2[4], detach_input=detach) as regularizer:
            model2(torch.randn(20, 8))
            term = regularizer.penalty()
        gradient = gradients(term, modules2["0"].B)[0].abs().max()
        assert (gradient == 0) == detach
        assert gradients(value, last)[0].abs().max() > 0


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


def stack(reentrant=None, **kw):
    torch.manual_seed(0)
    model = Stack(reentrant)
    for m in adapt(model, ["query", "value"], rank=3, **kw).values():
        nn.init.normal_(m.B)
    return model


def train(model, call=None, steps=2, metric="linear", regularizer=None):
    """(gradients, what ReSoRA still holds) after `steps` accumulated steps."""
    regularizer = regularizer or ReSoRA(model, metric)
    call = model if call is None else call  # a compiled model has no truth value
    for step in range(steps):
        (x,) = draw(step, (4, 6, 8), dtype=F32)
        loss = call(x.requires_grad_()).square().mean()
        (loss + regularizer.penalty()).backward()
    return all_gradients(model), regularizer._inputs


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, metric):
    wanted, _ = train(stack(), metric=metric)
    found, held = train(stack(reentrant), metric=metric)
    close(found, wanted, 1e3 * torch.finfo(F32).eps)
    assert held == {}  # the second forward, inside backward, recorded nothing


def test_gradient_accumulation():
    model = stack()
    total, _ = train(model, steps=3)
    single = torch.zeros_like(total)
    for step in range(3):
        model.zero_grad()
        regularizer = ReSoRA(model)
        (x,) = draw(step, (4, 6, 8), dtype=F32)
        (model(x).square().mean() + regularizer.penalty()).backward()
        single += all_gradients(model)
        regularizer.remove()
    close(total, single, 1e3 * torch.finfo(F32).eps)


def test_autocast_and_half_models():
    model, _ = tiny()
    (x,) = draw(1, (40, 8), dtype=F32)
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
    close(inside, outside, 10 * torch.finfo(F32).eps)
    close(inside, wanted, 10 * torch.finfo(BF16).eps)
    close(half, wanted, 10 * torch.finfo(BF16).eps)


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
    close(found, wanted, 1e3 * torch.finfo(F32).eps)
    assert held == {}
    regularizer.remove()
    compiled(torch.randn(4, 6, 8))
    assert regularizer._inputs == {}  # the graph with the hooks in it is not used any more
    torch.compiler.reset()


def test_compiled_and_checkpointed():
    wanted, _ = train(stack())
    model = stack(reentrant=False)
    regularizer = ReSoRA(model)
    found, held = train(model, torch.compile(model, backend="aot_eager"), regularizer=regularizer)
    close(found, wanted, 1e3 * torch.finfo(F32).eps)
    assert held == {}
    torch.compiler.reset()


def test_hooks_that_a_compiled_graph_never_calls_are_noticed():
    model = stack()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(4, 6, 8)
    compiled(x)
    regularizer = ReSoRA(model)
    compiled(x)
    with pytest.raises(ValueError, match=r"blocks.0.query: found no input.*compiled after ReSoRA"):
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
            close(found, wanted, 1e3 * torch.finfo(F32).eps)
            assert held == {}
    finally:
        distributed.destroy_process_group()


def _worker(rank, folder):
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    parallel = nn.parallel.DistributedDataParallel(stack())
    regularizer = ReSoRA(parallel)
    (x,) = draw(rank, (4, 6, 8), dtype=F32)
    (parallel(x).square().mean() + regularizer.penalty()).backward()
    torch.save(all_gradients(parallel), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_their_own_statistics(tmp_path):
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    a, b = (torch.load(f"{tmp_path}/{rank}.pt") for rank in range(2))
    assert torch.equal(a, b)
    singles = []
    for rank in range(2):
        model = stack()
        regularizer = ReSoRA(model)
        (x,) = draw(rank, (4, 6, 8), dtype=F32)
        (model(x).square().mean() + regularizer.penalty()).backward()
        singles.append(all_gradients(model))
    close(a, (singles[0] + singles[1]) / 2, 1e3 * torch.finfo(F32).eps)


def hooks(model):
    return [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


def test_remove_leaves_nothing_behind():
    model, _ = tiny()
    own = model[1].register_forward_hook(lambda *_: None)
    regularizer = ReSoRA(model)
    model(torch.randn(3, 8))
    assert len(hooks(model)) == 5  # three layers, the model, and the user's own
    regularizer.remove()
    regularizer.remove()
    assert len(hooks(model)) == 1 and regularizer._inputs == {}
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
    assert regularizer._inputs == {}
    # λ = 0 for a while: penalty() is not called, and only the latest forward is kept
    for _ in range(4):
        model(torch.randn(5, 8))
    assert [len(x) for x in regularizer._inputs.values()] == [1, 1, 1]
    model.eval()
    with torch.no_grad():
        model(torch.randn(7, 8))  # an evaluation in between is not recorded
    assert {x[0].shape for x in regularizer._inputs.values()} == {(5, 8)}
    regularizer.penalty()
    with torch.no_grad():
        model(torch.randn(7, 8))
    assert regularizer._inputs == {}


def test_training_in_evaluation_mode():
    model, _ = tiny()
    model.eval()  # as from_pretrained returns it
    with ReSoRA(model) as regularizer:
        model(torch.randn(9, 8))
        assert regularizer.penalty().requires_grad


def test_penalty_needs_a_forward():
    model, modules = tiny()
    regularizer = ReSoRA(model)
    with pytest.raises(ValueError, match="0: found no input"):
        regularizer.penalty()
    model(torch.randn(5, 8))
    regularizer.penalty()
    with pytest.raises(ValueError, match="want a forward"):
        regularizer.penalty()
    modules["0"](torch.randn(5, 8))  # one layer alone
    with pytest.raises(ValueError, match="2: found no input"):
        regularizer.penalty()
    assert regularizer._inputs == {}
    regularizer.remove()
    model(torch.randn(5, 8))
    with pytest.raises(ValueError, match="found no input"):
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
    close(value, redundancy(*codes(layer, tokens)), 100 * torch.finfo(F32).eps)


def test_inputs_by_keyword():
    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = LoRALinear(nn.Linear(8, 8), 3)

        def forward(self, x):
            return self.layer(x=x)

    model = Caller()
    with ReSoRA(model) as regularizer:
        model(torch.randn(9, 8))
        assert regularizer.penalty() > 0


def test_nonlinear_draws_other_tokens_in_each_step_and_the_same_in_each_run():
    model, _ = tiny()
    x = torch.randn(100, 8)

    def values(**kw):
        with ReSoRA(model, "nonlinear", samples=20, **kw) as regularizer:
            found = []
            for _ in range(2):
                model(x)
                found.append(regularizer.penalty().item())
        return found

    first = values()
    assert first[0] != first[1] and values() == first
    assert values(generator=generator(7)) == values(generator=generator(7)) != first


def test_drawn_tokens_are_distinct_and_each_as_likely_as_any_other():
    n, k, draws = 425, 128, 2000
    rows = [resora._sample(torch.arange(n)[:, None], k, i).flatten() for i in range(draws)]
    assert all(len(row.unique()) == k for row in rows[:100])
    counts = torch.cat(rows).bincount(minlength=n)
    spread = (counts - draws * k / n).square().mean() / (draws * k / n * (1 - k / n))
    assert 0.8 < spread < 1.2  # χ² of 424 degrees of freedom, over 424: 1 ± 0.07
    both = [len(set(a.tolist()) & set(b.tolist())) for a, b in pairwise(rows[:400])]
    assert abs(sum(both) / 399 - k * k / n) < 1  # hypergeometric, deviation 4.3/√399


def test_copies_of_a_watched_model_are_on_their_own():
    model, _ = tiny()
    with ReSoRA(model) as regularizer:
        twin = copy.deepcopy(model)
        pickle.loads(pickle.dumps(model))(torch.randn(3, 8))
        twin(torch.randn(3, 8))
        assert regularizer._inputs == {}


def test_without_lora():
    with pytest.raises(ValueError, match="found no LoRALinear, no PEFT LoRA in Linear"):
        ReSoRA(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="level: found 'features'"):
        ReSoRA(tiny()[0], level="features")
    with pytest.raises(ValueError, match="metric: found 'cka'"):
        ReSoRA(tiny()[0], "cka")
    with pytest.raises(TypeError, match="lamda"):
        ReSoRA(tiny()[0], lamda=1)


# -------------------------------------------------------------------------------------------- PEFT


def with_peft(name="default", layers=("0", "2", "4"), **kw):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    config = dict(r=3, target_modules=list(layers), init_lora_weights=False) | kw
    return peft.get_peft_model(base, peft.LoraConfig(**config), adapter_name=name), config


def peft_codes(layer, x, *names):
    B = torch.cat([layer.lora_B[n].weight * layer.scaling[n] for n in names], 1)
    return B, x.detach() @ torch.cat([layer.lora_A[n].weight for n in names]).T


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("extra", [{}, dict(lora_dropout=0.5), dict(use_rslora=True, lora_alpha=5)])
def test_peft(metric, extra):
    model, _ = with_peft("my_adapter", **extra)
    base, x = model.base_model.model, torch.randn(50, 8)
    seen = []
    for i in (0, 2, 4):
        base[i].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with ReSoRA(model, metric) as regularizer:
        model(x)
        value = regularizer.penalty()
    pairs = [peft_codes(base[i], h, "my_adapter") for i, h in zip((0, 2, 4), seen, strict=True)]
    wanted = sum(redundancy(B, S, metric) for B, S in pairs) / 3
    close(value, wanted, 1000 * torch.finfo(F32).eps)
    value.backward()
    assert all(base[i].lora_A["my_adapter"].weight.grad.abs().max() > 0 for i in (0, 2, 4))
    assert hooks(base[1]) == []


def test_peft_several_active_adapters():
    model, config = with_peft("one")
    model.add_adapter("two", peft.LoraConfig(**config | dict(r=2)))
    x, base = torch.randn(50, 8), model.base_model.model
    with ReSoRA(model) as regularizer:
        for active in (["one"], ["two"], ["one", "two"]):
            model.base_model.set_adapter(active)
            model(x)
            value = regularizer.penalty()
            with torch.no_grad():
                inputs = [x, base[:2](x), base[:4](x)]
            pairs = [
                peft_codes(base[i], h, *active) for i, h in zip((0, 2, 4), inputs, strict=True)
            ]
            close(value, sum(redundancy(*p) for p in pairs) / 3, 1e3 * torch.finfo(F32).eps)
        value.backward()
    assert all(base[0].lora_A[n].weight.grad.abs().max() > 0 for n in ("one", "two"))


def test_peft_adapters_on_different_layers():
    model, _ = with_peft("one", layers=("0",))
    model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["4"], init_lora_weights=False))
    x, base = torch.randn(50, 8), model.base_model.model
    with ReSoRA(model) as regularizer:
        model.set_adapter("one")
        model(x)
        B, S = peft_codes(base[0], x, "one")
        close(regularizer.penalty(), redundancy(B, S), 1e3 * torch.finfo(F32).eps)


def test_peft_merged_or_disabled():
    model, _ = with_peft()
    regularizer = ReSoRA(model)
    x = torch.randn(9, 8)
    with model.disable_adapter():
        model(x)
    with pytest.raises(ValueError, match="found no input"):
        regularizer.penalty()
    model(x)
    model.merge_adapter()
    with pytest.raises(ValueError, match="0: found .*layer.merged=True"):
        regularizer.penalty()
    assert regularizer._inputs == {}
    regularizer.remove()
    with pytest.raises(ValueError, match="0: found .*layer.merged=True"):
        ReSoRA(model)
    assert hooks(model) == []
    model.unmerge_adapter()
    with ReSoRA(model) as regularizer:
        model(x)
        assert regularizer.penalty() > 0


def test_peft_convolution_is_refused():
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    with pytest.raises(ValueError, match="0: found .*Conv2d.*want plain"):
        ReSoRA(model)


def test_peft_compiled_and_half():
    model, _ = with_peft(lora_dropout=0.0)
    x = torch.randn(9, 8)
    with ReSoRA(model) as regularizer:
        model(x)
        wanted = regularizer.penalty()
        compiled = torch.compile(model, backend="aot_eager")
        compiled(x)
        close(regularizer.penalty(), wanted, 100 * torch.finfo(F32).eps)
        torch.compiler.reset()
        model.base_model.model.to(BF16)(x.to(BF16))
        close(regularizer.penalty(), wanted, 20 * torch.finfo(BF16).eps)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_transformer_with_checkpointing(reentrant):
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
        pixels = torch.randn(2, 3, 16, 16, generator=generator(0)).requires_grad_()
        loss = model(pixel_values=pixels, labels=torch.tensor([0, 1])).loss
        (loss + 0.1 * regularizer.penalty()).backward()
        assert regularizer._inputs == {}
        found.append(all_gradients(model))
    close(found[1], found[0], 1e3 * torch.finfo(F32).eps)


def test_euclidean_stays_at_most_one_for_large_and_equal_components():
    B = torch.ones(4, 2) * 1e4
    S = torch.ones(6, 2) * 1e3
    S[:, 1] += 1e-4 * draw(0, (6,), dtype=torch.float32)[0]
    value = redundancy(B, S, "euclidean")
    assert 0 <= value <= 1


@pytest.mark.parametrize("metric", METRICS)
def test_squares_beyond_the_dtype_give_nan_and_no_number(metric):
    B, S = (draw(i, (n, 3), dtype=torch.float32)[0] for i, n in ((0, 5), (1, 8)))
    assert redundancy(B, S * 1e20, metric).isnan()
    if metric != "euclidean":  # whose value is the distances'
        close(
            redundancy(B, S * 1e15, metric),
            redundancy(B, S, metric),
            1e3 * torch.finfo(torch.float32).eps,
        )


def test_dora_and_layers_that_only_look_like_lora():
    config = peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
    with pytest.raises(ValueError, match="want plain, unmerged LoRA"):
        ReSoRA(model)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_A = nn.Linear(4, 2)

    with pytest.raises(ValueError, match="found no LoRALinear"):
        ReSoRA(nn.Sequential(Own()))
