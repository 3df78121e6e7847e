"""hra.py: the claims H1–H12 in order, then the published grids, then what a user expects."""

import copy
import pickle
import time

import accelerate
import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import hra
from hra import HRAConv2d, HRALinear, adapt, chain, gamma, gram_schmidt, penalty, reflect

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
SEEDS = st.integers(0, 2**32 - 1)
WIDE = st.sampled_from([F64, F32])
D, R = st.integers(1, 24), st.integers(1, 8)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A second one saves nothing at these sizes, and on a busy machine it waits tenfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape, dtype=F64):
    return torch.randn(*shape, dtype=F64, generator=generator(seed)).to(dtype)


def spread(seed, d, r, dtype=F64, decades=3):
    """(d, r) of lengths drawn over 10^±decades; their angles are far from 90°."""
    g = generator(seed)
    U = torch.randn(d, r, dtype=F64, generator=g) + torch.randn(d, 1, dtype=F64, generator=g)
    lengths = 10 ** (decades * (2 * torch.rand(r, dtype=F64, generator=g) - 1))
    return (U / U.norm(dim=0) * lengths).to(dtype)


def eye(d, dtype=F64):
    return torch.eye(d, dtype=dtype)


def H_of(U):
    """The fast path's H (d, d): reflect(I, U) is Hᵀ."""
    return reflect(eye(len(U), torch.promote_types(U.dtype, F32)), U).T


def close(found, wanted, tolerance):
    assert found.shape == wanted.shape
    assert found.isfinite().all() and wanted.isfinite().all()
    error = (found.double() - wanted.double()).abs().max().item() if found.numel() else 0.0
    assert error <= tolerance, f"off by {error:.3g}, allowed {tolerance:.3g}"


def eps(dtype):
    return torch.finfo(dtype).eps


def layer(seed, d, o, r, dtype=F64, init="random", **kw):
    """An HRALinear with a drawn base."""
    base = nn.Linear(d, o, dtype=dtype)
    with torch.no_grad():
        base.weight.copy_(normal(seed, o, d))
        base.bias.copy_(normal(seed + 1, o))
    return HRALinear(base, r, init, generator=generator(seed), **kw)


def put(module, U):
    with torch.no_grad():
        module.U.copy_(U)
    return module


# --------------------------------------------------------------------------------------- the claims


@given(D, R, SEEDS, WIDE)
@example(1, 1, 0, F32)
@example(1024, 512, 0, F32)
@example(768, 64, 1, F32)
@example(512, 512, 2, F32)
@example(1024, 1, 3, F32)
@example(24, 24, 4, F32)
@example(64, 64, 27, F32)
@example(64, 64, 5, F32)
def test_H1_the_chain_is_orthogonal(d, r, seed, dtype):
    U = spread(seed, d, r, dtype)
    if d < 500:
        H = chain(U).double()  # r products of d terms: 10·(d + r)·eps
        close(H.T @ H, eye(d), 10 * (d + r) * eps(dtype))
    near = normal(seed, d, 1) * normal(seed + 1, r).sign()  # almost parallel columns
    near += 1e-3 * normal(seed + 2, d, r)
    for columns in (U, near.to(dtype)):
        H = H_of(columns).double()
        close(H.T @ H, eye(d), 10 * max(d, r) * eps(dtype))


@given(D, R, SEEDS, WIDE, st.sampled_from([(), (0,), (1,), (5,), (2, 3), (2, 0, 3)]))
@example(1, 1, 0, F64, ())
@example(7, 7, 0, F64, (4,))
def test_H2_reflect_is_the_chain(d, r, seed, dtype, batch):
    U, x = spread(seed, d, r, dtype), normal(seed + 1, *batch, d, dtype=dtype)
    y = reflect(x, U)
    assert y.dtype == dtype and y.shape == x.shape
    # x Hᵀ keeps |x| ≤ 6√d: 40·(d + r) roundings of that size
    close(y, x @ chain(U).T, 40 * (d + r) * eps(dtype))
    W = normal(seed + 2, 3, d, dtype=dtype)  # z = W H x
    close(y @ W.T, x @ (W @ chain(U)).T, 200 * (d + r) * eps(dtype))


@given(D, R, SEEDS)
@example(1, 1, 0)
def test_H3_gamma_is_the_recursion(d, r, seed):
    U = spread(seed, d, r)
    D = U.norm(dim=0)
    unit = U / D
    recursion = torch.full((1, 1), -2.0, dtype=F64)
    for k in range(1, r):
        column = -2 * recursion @ unit[:, :k].T @ unit[:, k : k + 1]
        below = torch.zeros(1, k, dtype=F64)
        recursion = torch.cat([torch.cat([recursion, column], 1), F.pad(below, (0, 1), value=-2)])
    G = gamma(U)
    assert torch.equal(G, G.triu())
    size = recursion.abs().max().item()
    close(G * D * D[:, None], recursion, 100 * (d + r) * eps(F64) * size)
    close(gamma(unit), recursion, 100 * (d + r) * eps(F64) * size)
    close(unit @ gamma(unit) @ unit.T, chain(U) - eye(d), 100 * (d + r) * eps(F64) * size)


@given(D, st.integers(1, 9), R, SEEDS)
def test_H4_it_is_a_lora(d, o, r, seed):
    m = put(layer(seed, d, o, r), U := spread(seed, d, r))
    W = m.base.weight
    B, A = m.pair()
    assert torch.equal(A, U.T) and B.shape == (o, r)
    bound = 400 * (d + r) * eps(F64)
    close(B * U.norm(dim=0), W @ U @ gamma(U) * U.norm(dim=0), bound)
    close(W + B @ A, W @ chain(U), bound)
    close(m.weight, W @ chain(U), bound)
    delta = m.weight - W
    assert torch.linalg.matrix_rank(delta, atol=bound, rtol=0.0) <= r


@given(D, st.integers(1, 4), SEEDS, WIDE)
@example(1, 1, 0, F32)
@example(768, 4, 0, F32)
def test_H5_pairs_start_at_the_identity(d, half, seed, dtype):
    m, x = layer(seed, d, 5, 2 * half, dtype, "identity"), normal(seed + 2, 6, d, dtype=dtype)
    assert torch.equal(m.U[:, 0::2], m.U[:, 1::2])
    close(chain(m.U), eye(d, dtype), 20 * half * eps(dtype))
    close(H_of(m.U), eye(d, dtype), 20 * half * eps(dtype))
    close(m(x), m.base(x), 100 * d * eps(dtype))
    m, x = m.double(), x.double()
    (m(x) - normal(seed + 3, 6, 5)).square().sum().backward()
    grad = m.U.grad.clone()
    size = grad.abs().max().item() + d * 5 * 6  # the terms that cancel are of this size
    close(grad[:, 0::2], -grad[:, 1::2], 1000 * size * eps(F64))
    if d > 1:  # for d = 1 there is no direction to turn to
        assert grad.abs().max() > 0
    (grad,) = torch.autograd.grad(m.penalty(), m.U)
    close(grad[:, 0::2], grad[:, 1::2], 1000 * eps(F64) * (1 + grad.abs().max().item()))


@given(D, st.integers(1, 9), R, SEEDS)
def test_H6_angles_between_neurons_are_kept(d, o, r, seed):
    m = put(layer(seed, d, o, r), spread(seed, d, r))
    W = m.base.weight
    assert d == 1 or (m.weight - W).abs().max() > 1e-9  # it does turn
    close(m.weight @ m.weight.T, W @ W.T, 400 * d * (d + r) * eps(F64))


@given(st.integers(1, 24), st.integers(1, 8), SEEDS)
@example(8, 8, 0)
@example(1, 1, 0)
def test_H7_the_penalty_vanishes_at_orthogonal_columns_only(d, r, seed):
    r = min(d, r)
    lengths = spread(seed, d, r).norm(dim=0)
    U = torch.linalg.qr(normal(seed, d, r))[0] * lengths
    assert 0 <= penalty(U) <= (100 * d * eps(F64)) ** 2
    close(gamma(U) * lengths * lengths[:, None], -2 * eye(r), 100 * d * eps(F64))
    U = spread(seed, d, r)  # and for any columns it is Eq. 6, word for word
    unit = U / U.norm(dim=0)
    literal = (eye(r) - unit.T @ unit).norm() ** 2
    close(penalty(U), literal, 100 * d * r * r * eps(F64))
    assert (penalty(U) > 0) == (r > 1)


@given(st.integers(1, 24), st.integers(1, 8), SEEDS)
@example(1, 1, 0)
@example(6, 6, 0)
def test_H8_strict_is_one_reflection_of_a_subspace(d, r, seed):
    r = min(d, r)
    m, x = layer(seed, d, d, r, strict=True), normal(seed, 4, d)
    U, W = m.U.detach(), m.base.weight
    P = U @ torch.linalg.pinv(U)  # onto the span of U
    size = torch.linalg.cond(U).item()
    Q = gram_schmidt(U)
    close(Q.T @ Q, eye(r), 100 * d * eps(F64))
    close(Q @ Q.T, P, 100 * d * size * eps(F64))
    assert ((Q.T @ U).diagonal() > 0).all()  # Gram–Schmidt's signs
    assert (Q.T @ U).tril(-1).abs().max() <= 100 * d * eps(F64) * U.abs().max()
    H = torch.linalg.solve(W, m.weight)
    bound = 1000 * d * size * torch.linalg.cond(W).item() * eps(F64)
    close(H, eye(d) - 2 * P, bound)
    close(H, H.T, 2 * bound)
    assert abs(H.trace().item() - (d - 2 * r)) <= d * bound
    close(m(x), x @ (eye(d) - 2 * Q @ Q.T).T @ W.T + m.bias, 1000 * d * eps(F64))
    close(m.weight, W + torch.matmul(*m.pair()), 1000 * d * eps(F64))
    assert m.penalty() <= (100 * d * eps(F64)) ** 2
    refused = [lambda: layer(seed, d, 3, d + 1, strict=True)]
    refused += [lambda: layer(seed, d, 3, 2, init="identity", strict=True)]
    if r > 1:
        flat = U.clone()
        flat[:, -1] = 2 * flat[:, 0]
        refused += [
            lambda: m.load_state_dict({"U": flat}, strict=False),
            lambda: gram_schmidt(flat),
        ]
    for call in refused:
        with pytest.raises(ValueError, match="strict"):
            call()
    assert torch.equal(m.U, U)


@given(D, st.integers(1, 9), R, SEEDS)
@example(9, 3, 7, 0)
def test_H9_how_far_r_reflections_reach(d, o, r, seed):
    r = min(d, r)
    W = normal(seed, o, d)
    _, sigma, Vh = torch.linalg.svd(W, full_matrices=True)
    bound = 2 * sigma[:r].square().sum().sqrt()
    slack = 1 + 1000 * (d + r) * eps(F64)
    for k in range(4):
        moved = (W - W @ H_of(spread(seed + k, d, r))).norm()
        assert moved.isfinite() and moved <= bound * slack
    close((W - W @ H_of(Vh[:r].T)).norm() / bound, torch.tensor(1.0, dtype=F64), slack - 1)


@given(D, st.integers(1, 9), st.integers(1, 4), SEEDS, st.sampled_from([F64, F32, BF16, F16]))
def test_H10_merge_is_forward(d, o, r, seed, dtype):
    m, x = layer(seed, d, o, r, dtype).eval(), normal(seed, 6, d, dtype=dtype)
    before = copy.deepcopy(m.base.state_dict())
    with FlopCounterMode(display=False) as flops:
        plain = m.merge()
    assert flops.get_total_flops() <= 4 * d * r * (o + r) + 4 * r**3
    assert type(plain) is nn.Linear and plain.weight.dtype == dtype and not plain.training
    close(plain(x), m(x), 400 * (d + r) * eps(dtype))
    exact = m.base.weight.double() @ chain(
        m.U.double()
    )  # rounded once: half a unit in the last place
    allowed = exact.abs() * eps(dtype) / 2 + 400 * (d + r) * eps(torch.promote_types(dtype, F32))
    assert ((plain.weight.double() - exact).abs() <= allowed + torch.finfo(dtype).tiny).all()
    plain.weight.data += 1  # nothing is shared with the base
    plain.bias.data += 1
    assert all(torch.equal(t, m.base.state_dict()[k]) for k, t in before.items())


@given(D, R, SEEDS, st.sampled_from([F64, F32, BF16, F16]))
@example(4096, 8, 0, F16)
@example(4096, 8, 0, BF16)
@example(4096, 8, 0, F32)
def test_H11_lengths_do_not_matter(d, r, seed, dtype):
    x, wide = normal(seed + 1, 4, d, dtype=dtype), torch.promote_types(dtype, F32)
    W, few = normal(seed + 2, 3, d, dtype=dtype) / d**0.5, 40 * (d + r) ** 0.5 * r
    for decades in (0, 3, {F64: 250, F32: 28, BF16: 28, F16: 3}[dtype]):
        U = spread(seed, d, r, dtype, decades)
        unit = U.double() / U.double().abs().amax(0)  # the stored directions, to 2e-16
        y = x.double()
        for u in reversed(unit.T):  # Eq. 2
            y = y - 2 * torch.outer(y @ u, u) / (u @ u)
        close(reflect(x, U), y, few * eps(dtype))
        unit = unit / unit.norm(dim=0)
        close(penalty(U), (eye(r) - unit.T @ unit).square().sum(), few * r * r * eps(wide))
        m = put(HRALinear(nn.Linear(d, 3, dtype=dtype), r, "random"), U)
        m.base.weight.copy_(W)
        close(m(x), y @ W.T.double() + m.bias, few * eps(dtype))
        if d < 100:
            close(H_of(U), chain(unit), few * eps(wide))
            close(chain(U), chain(unit), few * eps(wide))
    if dtype is F64:
        U, L, T = normal(seed, d, r), spread(seed, d, r).norm(dim=0), normal(seed + 2, 4, d)
        gradients = []
        for V in (U, U * L):
            V.requires_grad_()
            gradients += torch.autograd.grad((reflect(x, V) * T).sum() + penalty(V), V)
        size = gradients[0].abs().max().item() + 1
        close(gradients[1] * L, gradients[0], 1e4 * (d + r) * eps(F64) * size)


@given(st.integers(1, 7), st.integers(1, 5), SEEDS)
@settings(max_examples=15)
def test_H12_gradients_are_the_chains(d, r, seed):
    U, x, T = normal(seed, d, r), normal(seed + 1, 3, d), normal(seed + 2, 3, d)
    U, x = (U / U.norm(dim=0)).requires_grad_(), x.requires_grad_()
    fast = torch.autograd.grad((reflect(x, U) * T).sum(), (x, U))
    slow = torch.autograd.grad((x @ chain(U).T * T).sum(), (x, U))
    for f, s in zip(fast, slow, strict=True):
        close(f, s, 1e5 * (d + r) * eps(F64) * (1 + s.abs().max().item()))
    m, T = put(layer(seed, d, 3, r), U), normal(seed + 2, 3, d)
    (fast,) = torch.autograd.grad((m.weight * T).sum(), m.U)
    (slow,) = torch.autograd.grad((m.base.weight @ chain(m.U) * T).sum(), m.U)
    close(fast, slow, 1e5 * (d + r) * eps(F64) * (1 + slow.abs().max().item()))
    assert torch.autograd.gradcheck(reflect, (x, U), raise_exception=False)
    assert torch.autograd.gradcheck(gamma, (U,), raise_exception=False)
    assert torch.autograd.gradcheck(penalty, (U,), raise_exception=False)


# ------------------------------------------------------------------------- the published test grids


def test_the_2d_grid_of_torch_householder():
    """Its sizes, seed and tolerances: fp32 against a float64 loop."""
    g = generator(2021)
    for d in range(1, 101):
        for r in range(1, min(10, d) + 1):
            U = torch.randn(d, r, generator=g).tril(-1) + torch.eye(d, r)
            U.requires_grad_()
            Q = H_of(U)[:, :r]
            U64 = U.detach().double().requires_grad_()
            Q64 = torch.eye(d, r, dtype=F64)
            for u in reversed(U64.T):
                Q64 = Q64 - torch.outer(u, 2 / (u @ u) * (u @ Q64))
            close(Q.T @ Q, torch.eye(r), 1e-5)
            close(Q, Q64, 1e-5)
            (grad,) = torch.autograd.grad(Q.sum(), U)
            (grad64,) = torch.autograd.grad(Q64.sum(), U64)
            close(grad, grad64, 1e-4)


@pytest.mark.parametrize("d, r", [(2048, 128), (2048, 512)])
def test_the_large_cases_of_torch_householder(d, r):
    U = torch.randn(d, r, generator=generator(2021)).tril(-1) + torch.eye(d, r)
    Q = H_of(U)[:, :r]
    close(Q.T @ Q, torch.eye(r), 1e-5)
    A = U.T.double()  # householder_product wants the same columns with tau = 2/‖u‖²
    close(Q, torch.linalg.householder_product(A.T, 2 / A.square().sum(1)), 1e-5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("d, r", [(4, 4), (5, 3), (3, 5), (64, 7)])
def test_orthogonal_after_two_steps(d, r, dtype, strict):
    """The tolerance of torch's own orthogonal parametrization: 10·n·eps, after each SGD step."""
    m = layer(0, d, 6, min(d, r) if strict else r, dtype, strict=strict)
    optimizer = torch.optim.SGD([m.U], lr=0.1)
    for _ in range(3):
        H = hra._plus(eye(d, dtype), *m._factors(dtype)[::-1]).detach()
        close(H.T @ H, eye(d, dtype), 10 * d * eps(dtype))
        optimizer.zero_grad()
        m(normal(1, 5, d, dtype=dtype)).norm().backward()
        optimizer.step()


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "kw, text",
    [
        ({"rank": 0}, "rank: found 0"),
        ({"rank": 2.0}, "rank: found 2.0"),
        ({"rank": True}, "rank: found True"),
        ({"rank": 7}, "rank: found 7.*even"),
        ({"init": "zeros"}, "init: found 'zeros'"),
        ({"strict": True}, "trace d − 2r"),
        ({"rank": 13, "init": "random", "strict": True}, "found 13.*at most d = 12"),
    ],
)
def test_arguments_out_of_range(kw, text):
    base = nn.Linear(12, 5)
    with pytest.raises(ValueError, match=text):
        HRALinear(base, **kw)
    assert base.weight.requires_grad and base.bias.requires_grad


def test_the_papers_odd_rank():
    m = HRALinear(nn.Linear(12, 5), 7, "random")
    assert m.U.shape == (12, 7)
    H = H_of(m.U.detach().double())
    close(torch.det(H), torch.tensor(-1.0, dtype=F64), 1000 * eps(F64))  # an odd number of mirrors


def test_other_kinds_of_layer():
    with pytest.raises(TypeError, match="found Conv2d"):
        HRALinear(nn.Conv2d(3, 4, 1))
    with pytest.raises(TypeError, match="found Linear"):
        HRAConv2d(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="groups: found 2, want 1"):
        HRAConv2d(nn.Conv2d(4, 4, 3, groups=2))


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf, -torch.inf])
def test_columns_without_a_direction(bad, monkeypatch):
    m = HRALinear(nn.Linear(6, 5), 4)
    U = normal(0, 6, 4, dtype=F32)
    if bad == 0:
        U[:, 2] = 0
    else:
        U[3, 2] = bad
    before = copy.deepcopy(m.state_dict())
    with pytest.raises(ValueError, match="column 2 is"):
        m.load_state_dict(before | {"U": U})
    with pytest.raises(ValueError, match=r"1\.U: column 2 is"):
        nn.Sequential(nn.ReLU(), m).load_state_dict({"1.U": U}, strict=False)
    assert all(torch.equal(t, before[k]) for k, t in m.state_dict().items())
    with pytest.raises(ValueError, match="column 2 is"):
        hra.from_peft({"base_model.model.q.hra_u": U})
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda t, *a, **k: t.copy_(U[:, : t.shape[1]]))
    base = nn.Linear.__new__(nn.Linear)  # its own start draws too
    nn.Module.__init__(base)
    base.in_features, base.weight, base.bias = 6, nn.Parameter(torch.ones(5, 6)), None
    with pytest.raises(ValueError, match="column 2 is"):
        HRALinear(base, 4, "random")
    assert base.weight.requires_grad


def test_a_column_that_the_dtype_rounds_to_zero():
    m = HRALinear(nn.Linear(6, 5), 4)
    with pytest.raises(ValueError, match="column 0 is zero"):
        m.load_state_dict({"U": torch.full((6, 4), 1e-60, dtype=F64)}, strict=False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        m.load_state_dict({"U": torch.zeros(6, 5)}, strict=False)


# --------------------------------------------------------------------------------------- the module


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("strict", [False, True])
def test_base_dtypes(dtype, strict):
    m, x = layer(3, 32, 8, 4, dtype, strict=strict), normal(4, 2, 5, 32, dtype=dtype)
    assert m.U.dtype == (F64 if dtype == F64 else F32)
    y = m(x)
    y.float().square().sum().backward()
    assert y.dtype == dtype and m.U.grad.dtype == m.U.dtype
    reference = copy.deepcopy(m).double()
    close(y, reference(x.double()), 200 * eps(dtype))  # |y| < 30, a few roundings of x, U, UΓ and y
    half = copy.deepcopy(m).to(BF16)  # U too
    close(half(x.to(BF16)), reference(x.double()), 200 * eps(BF16))
    assert m.weight.dtype == dtype and m.merge().weight.dtype == dtype


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast(dtype):
    m, x = layer(3, 32, 8, 4, F32), normal(4, 5, 32, dtype=F32)
    wanted, weight, delta, p = m(x), m.weight, torch.matmul(*m.pair()), m.penalty()
    put(m, m.U * 1000)  # its Gram is beyond fp16
    with torch.autocast("cpu", dtype=dtype):
        y = m(x)
        assert y.dtype == m.base(x).dtype == dtype
        close(y, wanted, 200 * eps(dtype))
        for found, exact in (
            (m.weight, weight),
            (m.penalty(), p),
            (gamma(m.U) * 1e6, gamma(m.U / 1e3)),
        ):
            assert found.dtype == F32
            close(found, exact, 1e-4)  # a product in half would be off by 1e-2
        B, A = m.pair()
        assert B.dtype == A.dtype == F32
    close(B @ A, delta, 1e-4)
    y.float().sum().backward()
    assert m.U.grad.isfinite().all() and m.U.grad.abs().max() > 0


def test_compile_without_graph_breaks():
    x = normal(4, 5, 16, dtype=F32)
    for m in (layer(3, 16, 8, 4, F32), layer(3, 16, 8, 3, F32, strict=True)):

        def loss(x, m=m):
            return m(x).square().sum() + m.penalty() + m.weight.sum() + m.pair()[0].sum()

        fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
        close(fast(x), loss(x), 1e-3)  # sums of some 200 terms of size 10 in fp32
        (g,), (w,) = (torch.autograd.grad(f(x), m.U) for f in (fast, loss))
        close(g, w, 1e-4 * w.abs().max().item())


def test_a_step_under_accelerate():
    accelerate.state.AcceleratorState._reset_state(True)  # other tests have made theirs, in fp32
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    (m,) = adapt(model, ["0"], 4, generator=generator(0)).values()
    U = m.U.detach().clone()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW([m.U], lr=0.1))
    accelerator.backward(model(normal(0, 5, 16, dtype=F32)).square().mean())
    optimizer.step()
    assert m.U.dtype == F32 and m.U.isfinite().all() and (m.U - U).abs().max() > 0.01
    accelerate.state.AcceleratorState._reset_state(True)


def test_gradient_checkpointing():
    m, x = layer(3, 16, 8, 4), normal(4, 5, 16).requires_grad_()
    wanted = torch.autograd.grad(m(x).square().sum(), (x, m.U))
    for reentrant in (False, True):
        y = checkpoint(m, x, use_reentrant=reentrant)
        m.U.grad = x.grad = None
        y.square().sum().backward()
        assert torch.equal(x.grad, wanted[0]) and torch.equal(m.U.grad, wanted[1])


def test_copies():
    m, x = layer(3, 16, 8, 4), normal(4, 5, 16)
    fresh = layer(9, 16, 8, 4)
    fresh.load_state_dict(m.state_dict())
    assert sorted(m.state_dict()) == ["U", "base.bias", "base.weight"]
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), fresh):
        assert torch.equal(other(x), m(x)) and not other.base.weight.requires_grad
    assert [n for n, p in m.named_parameters() if p.requires_grad] == ["U"]
    assert "rank=4, strict=False" in repr(m)


def test_only_the_generator_is_consumed():
    state = torch.get_rng_state()
    base = nn.Linear(6, 5, device="meta").to_empty(device="cpu")
    a, b = (HRALinear(base, 4, generator=generator(1)).U for _ in range(2))
    assert torch.equal(a, b) and torch.equal(state, torch.get_rng_state())


def test_the_base_is_called_not_read():
    class Quantised(nn.Module):
        """Integer weights, and a forward of its own."""

        def __init__(self):
            super().__init__()
            self.in_features, self.out_features, self.bias = 16, 8, None
            codes = torch.randint(-9, 9, (8, 16), dtype=torch.int8, generator=generator(0))
            self.weight = nn.Parameter(codes, requires_grad=False)

        def forward(self, x):
            return x @ self.weight.to(x.dtype).T / 10

    m, x = HRALinear(Quantised(), 4, "random"), normal(4, 5, 16, dtype=F32)
    close(m(x), m.base(reflect(x, m.U)), 0)
    m(x).sum().backward()
    assert m.U.grad.abs().max() > 0
    for call in (m.merge, m.pair, lambda: m.weight):
        with pytest.raises(TypeError, match=r"found torch\.int8"):
            call()


def test_saved_for_backward_is_loras():
    """In bytes, parameters left out, at d = o = 4096, 512 rows, r = 8: within 5 % of x and x Aᵀ."""

    def saved(f, x, parameters):
        own = {p.untyped_storage().data_ptr() for p in parameters}
        found = {}

        def pack(t):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = f(x)
        assert y.requires_grad
        return sum(size for storage, size in found.items() if storage not in own)

    d, r, x = 4096, 8, torch.zeros(512, 4096, requires_grad=True)
    m = HRALinear(nn.Linear(d, d, device="meta").to_empty(device="cpu"), r)
    A, B = torch.zeros(r, d, requires_grad=True), torch.zeros(d, r, requires_grad=True)
    lora = saved(lambda x: m.base(x) + x @ A.T @ B.T, x, [A, B, *m.parameters()])
    assert lora == 4 * 512 * (d + r)
    assert saved(m, x, m.parameters()) <= 1.05 * lora


def test_weight_is_what_stock_modules_read():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    adapt(encoder, ["linear1", "linear2", "out_proj"], 3, init="random", generator=generator(1))
    plain, x = copy.deepcopy(encoder).eval(), torch.randn(3, 5, 16)
    for m in encoder.modules():
        m.p = 0.0 if isinstance(m, nn.Dropout) else getattr(m, "p", None)
        if isinstance(m, nn.MultiheadAttention):
            m.dropout = 0.0
    trained = encoder.train()(x)
    with torch.no_grad():
        close(plain(x), trained.detach(), 1e-5)  # the fused path, on layer-normed values of size 1
    close(hra.merge(plain)(x), trained.detach(), 1e-5)
    trained.square().sum().backward()
    for name, p in encoder.named_parameters():
        assert p.requires_grad == name.endswith(".U")
        assert not p.requires_grad or p.grad.abs().max() > 0  # out_proj's among them


def test_attention_keeps_its_adapter():
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(3, 5, 16)
    before = attention(x, x, x)[0]
    (m,) = adapt(attention, "out_proj", 3, init="random").values()
    after = attention(x, x, x)[0]
    assert (after - before).abs().max() > 1e-3
    heads = F.linear(after - m.bias, torch.linalg.pinv(m.weight))  # before the projection
    close(F.linear(heads, m.base.weight @ chain(m.U), m.bias), after, 1e-5)


def test_a_7b_stack_on_meta_takes_seconds():
    with torch.device("meta"):
        block = {f"{n}_proj": nn.Linear(4096, 4096) for n in "qkvo"}
        block |= {n: nn.Linear(4096, 11008) for n in ("gate", "up")} | {
            "down": nn.Linear(11008, 4096)
        }
        model = nn.ModuleList(nn.ModuleDict(copy.deepcopy(block)) for _ in range(32))
    state, start = torch.get_rng_state(), time.perf_counter()
    modules = adapt(model, ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "up", "down"], 8)
    assert (
        time.perf_counter() - start < 10
    )  # measured 0.1 s; a copy of the weights would take minutes
    assert len(modules) == 7 * 32 and torch.equal(state, torch.get_rng_state())
    assert sum(m.U.numel() for m in modules.values()) == 32 * 8 * (6 * 4096 + 11008)
    assert modules["0.q_proj"](torch.empty(2, 4096, device="meta")).shape == (2, 4096)


# ------------------------------------------------------------------------------------------- Conv2d


@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.sampled_from(["same", "valid", 0, 1, (0, 1), (1, 0)]),
    dilation=st.sampled_from([1, 2, (1, 2)]),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    bias=st.booleans(),
    seed=SEEDS,
)
def test_conv2d_geometries(kernel, stride, padding, dilation, mode, bias, seed):
    stride = 1 if padding == "same" else stride
    conv = nn.Conv2d(
        3, 5, kernel, stride, padding, dilation, bias=bias, padding_mode=mode, dtype=F64
    )
    with torch.no_grad():
        conv.weight.copy_(normal(seed, *conv.weight.shape))
    x = normal(seed + 1, 2, 3, 11, 12)
    d = conv.weight[0].numel()
    same = HRAConv2d(conv, 4, generator=generator(seed))
    close(same(x), conv(x), 1000 * d * eps(F64))
    for strict in (False, True):
        m = HRAConv2d(conv, min(3, d), "random", strict, generator(seed))
        turned, Q = copy.deepcopy(conv), gram_schmidt(m.U)
        H = eye(d) - 2 * Q @ Q.T if strict else chain(m.U)
        with torch.no_grad():
            turned.weight.copy_((conv.weight.flatten(1) @ H).view_as(conv.weight))
        plain = m.merge()
        assert type(plain) is nn.Conv2d and str(plain) == str(conv)
        for found in (m, plain):
            close(found(x), turned(x), 1000 * d * eps(F64))
        close(m(x[0]), turned(x[0]), 1000 * d * eps(F64))  # without a batch
        B, A = m.pair()
        close(B @ A, (turned.weight - conv.weight).flatten(1), 1000 * d * eps(F64))
    assert (m.in_features, m.out_features) == (d, 5)


def test_conv2d_gradient_is_the_merged_weights():
    m, x = HRAConv2d(nn.Conv2d(2, 3, (3, 2), dtype=F64), 3, "random"), normal(0, 2, 2, 6, 6)
    (fast,) = torch.autograd.grad(m(x).square().sum(), m.U)
    (slow,) = torch.autograd.grad(F.conv2d(x, m.weight, m.bias).square().sum(), m.U)
    close(fast, slow, 1e5 * eps(F64) * slow.abs().max().item())


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_conv2d_in_half(dtype):
    m, x = HRAConv2d(nn.Conv2d(4, 6, 3, padding=1), 4, "random"), normal(0, 2, 4, 8, 8, dtype=F32)
    put(m, m.U * 1000)
    wanted = m(x).detach()
    with torch.autocast("cpu", dtype=dtype):
        assert m(x).dtype == dtype
        close(m(x), wanted, 40 * eps(dtype))
    m.base.to(dtype)
    close(m(x.to(dtype)), wanted, 40 * eps(dtype))
    assert m.merge().weight.dtype == dtype


# ------------------------------------------------------------------------------------- whole models


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.body(self.conv(x).mean((2, 3))))


def net(seed=0):
    torch.manual_seed(seed)
    return Net(), torch.randn(6, 3, 8, 8)


def test_adapt_and_merge_a_model():
    model, x = net()
    before = model(x)
    modules = adapt(model, ["conv", "body.0", "body.2"], 4, generator=generator(0))
    assert list(modules) == ["conv", "body.0", "body.2"]
    assert isinstance(model.conv, HRAConv2d) and model.body[2] is modules["body.2"]
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == ["conv.U", "body.0.U", "body.2.U"]
    close(model(x), before, 1e-6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        loss = model(x).square().sum() + sum(m.penalty() for m in modules.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = model(x).detach()
    assert (after - before).abs().max() > 1e-3
    assert hra.merge(model) is model and type(model.conv) is nn.Conv2d
    assert not any(isinstance(m, HRALinear) for m in model.modules())
    close(model(x), after, 1e-5)
    assert type(hra.merge(modules["body.0"])) is nn.Linear


def test_a_layer_with_two_names_gets_one_adapter():
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    modules = adapt(model, ["a", "b"], 2)
    assert modules["a"] is modules["b"] is model["a"] is model["b"]
    hra.merge(model)
    assert model["a"] is model["b"] and type(model["a"]) is nn.Linear


@pytest.mark.parametrize(
    "targets, rank, kw",
    [
        (["body.0", "nowhere"], 4, {}),
        ([], 4, {}),
        (["body.0"], 3, {}),
        (["body.0", "grouped"], 4, {}),
        (["body.0", "conv"], 28, {"init": "random", "strict": True}),
        (["body.0", "head"], 9, {"init": "random", "strict": True}),
    ],
)
def test_an_error_leaves_the_model_as_it_was(targets, rank, kw):
    model, _ = net()
    model.grouped = nn.Conv2d(4, 4, 3, groups=2)
    model.head.weight.requires_grad_(False)
    before = {n: (id(m), type(m)) for n, m in model.named_modules()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError):
        adapt(model, targets, rank, **kw)
    assert before == {n: (id(m), type(m)) for n, m in model.named_modules()}
    assert flags == [p.requires_grad for p in model.parameters()]


# --------------------------------------------------------------------------------------------- PEFT

TARGETS = ["conv", "body.0", "body.2"]


@pytest.mark.parametrize("gs, rank", [(False, 4), (False, 7), (True, 4)])
def test_an_adapter_of_pefts_gives_the_same_here(gs, rank, tmp_path):
    model, x = net()
    config = peft.HRAConfig(r=rank, apply_GS=gs, init_weights=False, target_modules=TARGETS)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        theirs(x).square().sum().backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path)
    Us = hra.from_peft(safetensors.torch.load_file(tmp_path / "adapter_model.safetensors"))
    assert sorted(Us) == sorted(TARGETS)
    modules = adapt(model, list(Us), rank, init="random", strict=gs)
    for name, U in Us.items():
        modules[name].load_state_dict({"U": U}, strict=False)
    close(model(x), theirs(x), 1e-5)
    theirs.zero_grad()
    for m in (model, theirs):
        m(x).square().sum().backward()
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            mine = modules[name.removeprefix("base_model.model.").removesuffix(".hra_u.default")]
            close(mine.U.grad, p.grad, 1e-4 * p.grad.abs().max().item())


@pytest.mark.parametrize("gs, rank", [(False, 4), (False, 7), (True, 4)])
def test_an_adapter_of_ours_loads_in_peft(gs, rank, tmp_path):
    model, x = net()
    bare = copy.deepcopy(model)
    modules = adapt(model, TARGETS, rank, init="random", strict=gs, generator=generator(1))
    config = peft.HRAConfig(r=rank, apply_GS=gs, target_modules=TARGETS)
    config.save_pretrained(tmp_path)
    safetensors.torch.save_file(hra.to_peft(modules), tmp_path / "adapter_model.safetensors")
    theirs = peft.PeftModel.from_pretrained(bare, tmp_path)
    close(theirs(x), model(x), 1e-5)
    close(theirs.merge_and_unload()(x), model(x), 1e-5)


def test_strict_gradients_are_the_projectors():
    m, x = layer(5, 9, 4, 3, strict=True), normal(1, 5, 9)
    U = m.U.detach().requires_grad_()
    P = U @ torch.linalg.inv(U.T @ U) @ U.T
    (fast,) = torch.autograd.grad(m(x).square().sum(), m.U)
    (slow,) = torch.autograd.grad(m.base(x - 2 * x @ P).square().sum(), U)
    close(fast, slow, 1e5 * eps(F64) * slow.abs().max().item())


def test_what_from_peft_refuses(tmp_path):
    U = torch.ones(4, 2)
    for key, text in [
        ("base_model.model.q.base_layer.bias", "trained bias"),
        ("base_model.model.q.lora_A.weight", "unknown key"),
        ("base_model.model.q.hra_u.default", "unknown key"),
        ("base_model.model..hra_u"[:-6], "unknown key"),
        ("q.hra_u", "unknown key"),
    ]:
        with pytest.raises(ValueError, match=text):
            hra.from_peft({"base_model.model.p.hra_u": U, key: U})
    for bad in (torch.ones(4), torch.ones(4, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"want floats \(d, r\)"):
            hra.from_peft({"base_model.model.q.hra_u": bad})
    shared = HRALinear(nn.Linear(4, 3), 2)
    tensors = hra.to_peft(
        {"a": shared, "b": shared}
    )  # two names, two tensors: safetensors wants that
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert torch.equal(hra.from_peft(tensors)["b"], shared.U)
    assert not tensors["base_model.model.a.hra_u"].requires_grad
