"""hra.py: claims 1 to 13, a test each. The first mirror is H₁; the first claim's test is test_H1_….

A bound is a small number, times how many terms are summed, times the size of a term, times eps.
"""

import copy

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hra import HRALinear, chain, factors, gamma, gram_schmidt, penalty, reflect
from tests.checks import BF16, EPS, F16, F32, F64, SEEDS, WIDE, close, eps, normal, seeded, within

D, R = st.integers(1, 24), st.integers(1, 8)  # the sizes that are drawn


def eye(d: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.eye(d, dtype=dtype)


def fast_H(U: Tensor) -> Tensor:
    """H (d, d) without the chain: the rows of reflect(I, U) are H's columns."""
    return reflect(eye(len(U), torch.promote_types(U.dtype, F32)), U).T


def spread(seed: int, d: int, r: int, dtype: torch.dtype = F64, decades: float = 3) -> Tensor:
    """U (d, r) of lengths drawn over 10^±decades; its angles are far from 90°."""
    g = seeded(seed)
    U = normal(g, d, r) + normal(g, d, 1)
    lengths = 10 ** (decades * (2 * torch.rand(r, dtype=F64, generator=g) - 1))
    return (U / U.norm(dim=0) * lengths).to(dtype)


def parallel(seed: int, d: int, r: int, noise: float) -> Tensor:
    """U (d, r): one direction up to its sign, and noise."""
    return normal(seed, d, 1) * normal(seed + 1, r).sign() + noise * normal(seed + 2, d, r)


def layer(seed, d, o, r, dtype=F64, init="random", strict=False, U=None) -> HRALinear:
    """An HRALinear on a drawn base, with these columns if they are given."""
    base = nn.Linear(d, o, dtype=dtype)
    with torch.no_grad():
        base.weight.copy_(normal(seed + 10, o, d))  # no seed that a test uses for U or x
        base.bias.copy_(normal(seed + 11, o))
        m = HRALinear(base, r, init, strict, seeded(seed))
        if U is not None:
            m.U.copy_(U)
    return m


@given(D, R, SEEDS, WIDE, st.sampled_from([1.0, 1e-1, 1e-2, 1e-3, 1e-6, 0.0]))
@example(1, 1, 0, F32, 1.0)
@example(2, 8, 1, F32, 1.0)
@example(3, 3, 4882, F32, 1e-2)  # 1.1 of the bound if the rows of C keep their rounded lengths
@example(8, 8, 2, F32, 1e-2)
@example(64, 64, 3, F32, 1e-3)
@example(512, 512, 4, F32, 1e-1)
@example(600, 600, 5, F32, 1e-3)
@example(1024, 512, 6, F32, 1e-3)
@example(1024, 1, 7, F32, 1.0)
def test_H1_the_product_is_orthogonal(d, r, seed, dtype, noise):
    """H is orthogonal, from chain(U) and as I + CᵀA: max|HᵀH − I| ≤ 10·d·eps for r ≤ min(d, 512)
    and ≤ 20·max(d, r)·eps for more mirrors, in float32 and in float64."""
    few_mirrors = r <= min(d, 512)
    bound = (10 * d if few_mirrors else 20 * max(d, r)) * eps(dtype)
    for U in (spread(seed, d, r, dtype), parallel(seed, d, r, noise).to(dtype)):
        for form in (fast_H, chain) if d < 500 else (fast_H,):  # the chain is slow
            H = form(U).double()
            close(H.T @ H, eye(d), bound)


@given(D, R, SEEDS, WIDE, st.sampled_from([(), (0,), (1,), (5,), (2, 3), (2, 0, 3)]))
@example(1, 1, 0, F64, ())
@example(7, 7, 0, F64, (4,))
def test_H2_reflect_is_the_chain(d, r, seed, dtype, batch):
    """reflect(x, U) = x @ chain(U).T, so that reflect(x, U) @ W.T is W H x for each row."""
    U, x = spread(seed, d, r, dtype), normal(seed + 1, *batch, d, dtype=dtype)
    W = normal(seed + 2, 3, d, dtype=dtype)
    H, y = chain(U), reflect(x, U)
    assert y.dtype == dtype
    close(y, x @ H.T, 10 * (d + r) * eps(dtype))
    close(y @ W.T, x @ (W @ H).T, 40 * (d + r) * eps(dtype))


@given(D, R, SEEDS)
@example(1, 1, 0)
def test_H3_gamma_is_the_recursion(d, r, seed):
    """gamma(U) is upper triangular, and is D⁻¹ M D⁻¹ where M is what the paper's recursion, Eq. 4
    with c = 2, gives for the columns at length 1, and D the diagonal matrix of their lengths."""
    U = spread(seed, d, r)
    lengths = U.norm(dim=0)
    unit = U / lengths
    M = torch.full((1, 1), -2.0, dtype=F64)
    for k in range(1, r):
        column = -2 * M @ unit[:, :k].T @ unit[:, k : k + 1]
        below = torch.tensor([[0.0] * k + [-2.0]], dtype=F64)
        M = torch.cat([torch.cat([M, column], 1), below])
    bound = 10 * (d + r) * EPS * M.abs().max()
    assert torch.equal(gamma(U), gamma(U).triu())
    close(gamma(U) * lengths * lengths[:, None], M, bound)
    close(gamma(unit), M, bound)
    close(unit @ gamma(unit) @ unit.T, chain(U) - eye(d), bound)


@given(D, st.integers(1, 9), R, SEEDS)
def test_H4_it_is_a_lora(d, o, r, seed):
    """W H = W + B A with B = W U Γ and A = Uᵀ, so W H − W has rank at most r."""
    U = spread(seed, d, r)
    m = layer(seed, d, o, r, U=U)
    W, lengths = m.base.weight, U.norm(dim=0)
    B, A = m.pair()
    assert torch.equal(A, U.T)
    bound = 40 * (d + r) * EPS
    close(B * lengths, W @ U @ gamma(U) * lengths, bound)
    close(W + B @ A, W @ chain(U), bound)
    close(m.weight, W @ chain(U), bound)
    assert torch.linalg.matrix_rank(m.weight - W, atol=5 * bound, rtol=0.0) <= r


@given(D, st.integers(1, 4), SEEDS, WIDE)
@example(1, 1, 0, F32)
@example(768, 4, 0, F32)
def test_H5_pairs_start_at_the_identity(d, half, seed, dtype):
    """Equal pairs give H = I; there the gradients of a task's loss at the two columns of a pair
    are opposite, and those of the penalty are equal."""
    m, x = layer(seed, d, 5, 2 * half, dtype, "identity"), normal(seed + 2, 6, d, dtype=dtype)
    assert torch.equal(m.U[:, 0::2], m.U[:, 1::2])
    close(chain(m.U), eye(d, dtype), 20 * half * eps(dtype))
    close(fast_H(m.U), eye(d, dtype), 20 * half * eps(dtype))
    close(m(x), m.base(x), 20 * (d + half) * eps(dtype))
    m, x = m.double(), x.double()
    error = m(x) - normal(seed + 3, 6, 5)
    lengths = m.U.detach().norm(dim=0)  # gradients go with 1/‖u‖
    (task,) = torch.autograd.grad(error.square().sum(), m.U)
    size = error.detach().norm() * m.base.weight.norm() * x.norm()  # of the loss's derivative at H
    close(task[:, 0::2] * lengths[::2], -task[:, 1::2] * lengths[::2], 40 * half * EPS * size)
    assert d == 1 or task.abs().max() > 0  # for d = 1 there is no direction to turn to
    (own,) = torch.autograd.grad(m.penalty(), m.U)
    close(own[:, 0::2] * lengths[::2], own[:, 1::2] * lengths[::2], 40 * half * d * EPS)


@given(D, st.integers(1, 9), R, SEEDS)
def test_H6_angles_between_neurons_are_kept(d, o, r, seed):
    """(W H)(W H)ᵀ = W Wᵀ: the lengths of the neurons, which are the rows of W, and the angles
    between them are kept."""
    m = layer(seed, d, o, r, U=spread(seed, d, r))
    W = m.base.weight
    assert d == 1 or (m.weight - W).abs().max() > 1e-9  # it does turn
    size = W.norm(dim=1).max() ** 2
    close(m.weight @ m.weight.T, W @ W.T, 10 * (d + r) * EPS * size)


@given(D, R, SEEDS)
@example(8, 8, 0)
@example(1, 1, 0)
def test_H7_the_penalty_vanishes_at_orthogonal_columns_only(d, r, seed):
    """penalty(U) = 0 exactly where the columns are orthogonal, and there Γ = −2·diag(1/‖uᵢ‖²)."""
    r = min(d, r)
    lengths = spread(seed, d, r).norm(dim=0)  # any lengths will do
    U = torch.linalg.qr(normal(seed, d, r))[0] * lengths
    within(penalty(U), (20 * d * EPS) ** 2)
    close(gamma(U) * lengths * lengths[:, None], -2 * eye(r), 20 * d * EPS)
    # For any columns it is Eq. 6, word for word.
    U = spread(seed, d, r)
    unit = U / U.norm(dim=0)
    close(penalty(U), (eye(r) - unit.T @ unit).norm() ** 2, 10 * (d + r) * r * EPS)
    assert r == 1 or penalty(U) > 0


@given(D, R, SEEDS)
@example(1, 1, 0)
@example(6, 6, 0)
def test_H8_strict_is_one_reflection_of_a_subspace(d, r, seed):
    """With Q in the place of U, H = I − 2QQᵀ, symmetric and of trace d − 2r, hence never I;
    columns that are not independent are refused."""
    r = min(d, r)
    m, x = layer(seed, d, d, r, strict=True), normal(seed, 4, d)
    U, W = m.U.detach().clone(), m.base.weight
    Q = gram_schmidt(U)
    P = U @ torch.linalg.pinv(U)  # onto the span of U
    cond = torch.linalg.cond(U / U.norm(dim=0))
    close(Q.T @ Q, eye(r), 20 * d * EPS)
    close(Q @ Q.T, P, 40 * d * EPS * cond)
    assert ((Q.T @ U).diagonal() > 0).all()  # Gram–Schmidt's signs, and its order
    close((Q.T @ U).tril(-1), 0 * eye(r), 20 * d * EPS * U.norm(dim=0).max())

    for decades in (18, 28):  # lengths whose squares overflow
        single = gram_schmidt(spread(seed, d, r, F32, decades))
        close(single.T @ single, eye(r), 20 * d * eps(F32))

    H = fast_H(m.normals())  # the normals are Q here
    close(H, eye(d) - 2 * Q @ Q.T, 40 * d * EPS)
    close(H, H.T, 40 * d * EPS)
    close(H.trace(), torch.tensor(d - 2.0 * r, dtype=F64), 40 * d * EPS)
    size = W.norm(dim=1).max()
    close(m.weight, W - 2 * W @ Q @ Q.T, 40 * d * EPS * size)
    close(m.weight, W + torch.matmul(*m.pair()), 40 * d * EPS * size)
    close(m(x), x @ m.weight.T + m.bias, 40 * d * EPS * size * x.norm(dim=1).max())
    within(m.penalty().detach(), (20 * d * EPS) ** 2)

    dependent = U.clone()
    dependent[:, -1] = 2 * dependent[:, 0]
    if r > 1:
        with pytest.raises(ValueError, match="strict"):
            gram_schmidt(dependent)
        with pytest.raises(ValueError, match="strict"):
            m.load_state_dict({"U": dependent}, strict=False)
    with pytest.raises(ValueError, match="strict"):
        layer(seed, d, 3, d + 1, strict=True)
    with pytest.raises(ValueError, match="strict"):
        layer(seed, d, 3, 2, init="identity", strict=True)
    assert torch.equal(m.U, U)


@given(D, st.integers(1, 9), R, SEEDS)
@example(9, 3, 7, 0)
def test_H9_how_far_r_mirrors_reach(d, o, r, seed):
    """For r ≤ d, ‖W − W H‖_F ≤ 2·√(σ₁² + … + σ_r²), with equality where U holds the first r right
    singular vectors of W."""
    r = min(d, r)
    m = layer(seed, d, o, r)
    W = m.base.weight
    _, sigma, Vh = torch.linalg.svd(W, full_matrices=True)
    bound = 2 * sigma[:r].square().sum().sqrt()
    for k in range(4):
        m.U.data.copy_(spread(seed + k, d, r))
        within((W - m.weight).norm().detach(), bound * (1 + 40 * (d + r) * EPS))
    m.U.data.copy_(Vh[:r].T)
    close((W - m.weight).norm(), bound, 40 * (d + r) * EPS * bound)


@given(D, st.integers(1, 9), st.integers(1, 4), SEEDS, st.sampled_from([F64, F32, BF16, F16]))
def test_H10_merge_is_forward(d, o, r, seed, dtype):
    """The merged layer computes what forward computes, and merging costs O(d·r·(o + r)) for r ≤
    d."""
    m, x = layer(seed, d, o, r, dtype).eval(), normal(seed, 6, d, dtype=dtype)
    before = copy.deepcopy(m.base.state_dict())
    with FlopCounterMode(display=False) as flops:
        plain = m.merge()
    assert 0 < flops.get_total_flops() <= 4 * d * r * (o + r) + 4 * r**3
    assert type(plain) is nn.Linear and plain.weight.dtype == dtype and not plain.training
    # Weights, inputs and outputs are rounded to dtype, sums to at least float32.
    rounding = 40 * (d + r) * eps(torch.promote_types(dtype, F32))
    size = 1 + m.base.weight.norm(dim=1).max() * x.norm(dim=1).max()
    close(plain(x), m(x), (4 * eps(dtype) + rounding) * size)
    exact = m.base.weight.double() @ chain(m.U.detach().double())
    half_a_digit = exact.abs() * eps(dtype) / 2 + torch.finfo(dtype).tiny  # rounded once
    excess = (plain.weight.double() - exact).abs() - half_a_digit
    within(excess.max().clamp(min=0), rounding)
    plain.weight.data += 1  # nothing is shared with the base
    plain.bias.data += 1
    assert all(torch.equal(t, m.base.state_dict()[name]) for name, t in before.items())


DECADES = {F64: 250, F32: 28, BF16: 28, F16: 3}


@given(D, R, SEEDS, st.sampled_from([F64, F32, BF16, F16]))
@example(4096, 8, 0, F16)
@example(4096, 8, 0, BF16)
@example(4096, 8, 0, F32)
def test_H11_lengths_do_not_matter(d, r, seed, dtype):
    """H, the outputs and the penalty do not depend on the lengths ‖uᵢ‖, and the gradient at uᵢ
    goes with 1/‖uᵢ‖."""
    x, wide = normal(seed + 1, 4, d, dtype=dtype), torch.promote_types(dtype, F32)
    W = normal(seed + 2, 3, d, dtype=dtype) / d**0.5
    # Sums are in `wide`. What is rounded to dtype are r codes, up to ‖x‖, times rows of C·‖a‖ = 2.
    sums = 10 * (d + r) * r * eps(wide)
    bound = sums + 4 * r * eps(dtype) * x.double().abs().max()
    for decades in (0, 3, DECADES[dtype]):
        U = spread(seed, d, r, dtype, decades)
        unit = U.double() / U.double().abs().amax(0)  # the stored directions, to 2e-16
        unit = unit / unit.norm(dim=0)
        y = x.double()
        for u in reversed(unit.T):  # Eq. 2
            y = y - 2 * torch.outer(y @ u, u)
        close(reflect(x, U), y, bound)
        close(penalty(U), (eye(r) - unit.T @ unit).square().sum(), sums * r)
        m = layer(seed, d, 3, r, dtype, U=U)
        m.base.weight.copy_(W)
        close(m(x), y @ W.T.double() + m.bias, 4 * bound)
        if d < 100:
            close(fast_H(U), chain(unit), sums)
            close(chain(U.to(wide)), chain(unit), sums)
    if dtype is F64:
        U, L, T = normal(seed, d, r), spread(seed, d, r).norm(dim=0), normal(seed + 2, 4, d)
        scaled = []
        for V in (U, U * L):
            V.requires_grad_()
            (gradient,) = torch.autograd.grad((reflect(x, V) * T).sum() + penalty(V), V)
            scaled.append(gradient * V.detach().norm(dim=0))
        close(scaled[1], scaled[0], 100 * (d + r) * r * EPS * (x.norm() * T.norm() + r))


@given(st.integers(1, 7), st.integers(1, 5), SEEDS)
def test_H12_gradients_are_the_chains(d, r, seed):
    """The gradients at x and at U are those of the literal chain."""
    U, x, T = normal(seed, d, r), normal(seed + 1, 3, d), normal(seed + 2, 3, d)
    U, x = (U / U.norm(dim=0)).requires_grad_(), x.requires_grad_()
    m = layer(seed, d, 3, r, U=U)
    W = m.base.weight
    size = (1 + x.detach().norm() + W.norm()) * T.norm()
    bound = 10 * (d + r) * r * EPS * size

    fast = torch.autograd.grad((reflect(x, U) * T).sum(), (x, U))
    slow = torch.autograd.grad((x @ chain(U).T * T).sum(), (x, U))
    for ours, wanted in zip(fast, slow, strict=True):
        close(ours, wanted, bound)

    H = chain(U)
    forms = (m.weight, W @ H), (torch.matmul(*m.pair()), W @ H), (m(x), x @ H.T @ W.T)
    for ours, wanted in forms:
        T = normal(seed + 2, *ours.shape)
        (fast,) = torch.autograd.grad((ours * T).sum(), m.U)
        (slow,) = torch.autograd.grad((wanted * T).sum(), U, retain_graph=True)
        close(fast, slow, bound * (1 + W.norm()))

    assert torch.autograd.gradcheck(reflect, (x, U), raise_exception=False)
    assert torch.autograd.gradcheck(gamma, (U,), raise_exception=False)
    assert torch.autograd.gradcheck(penalty, (U,), raise_exception=False)


@given(D, R, SEEDS, WIDE, st.sampled_from([1.0, 1e-1, 1e-2, 1e-3, 1e-6, 0.0]))
@example(8, 8, 0, F32, 1e-2)
def test_H13_the_rows_of_C(d, r, seed, dtype, noise):
    """With aᵢ row i of A, row i of C is −(2/‖aᵢ‖²)·H₁…Hᵢ₋₁aᵢ, and its length is 2/‖aᵢ‖ to a few
    eps, however parallel the columns are."""
    A, C = (X.double() for X in factors(parallel(seed, d, r, noise).to(dtype)))
    close(A.norm(dim=1) * C.norm(dim=1), torch.full((r,), 2.0), 10 * eps(dtype))
    before = eye(d)
    for a, c in zip(A, C, strict=True):
        mirrored = -2 / a.norm() * before @ a
        close(a.norm() * c, mirrored, 10 * (d + r) * r * eps(dtype))
        before = before - 2 / (a @ a) * torch.outer(before @ a, a)
