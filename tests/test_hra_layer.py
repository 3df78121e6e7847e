"""hra.py alone: published test grids, dtypes, where training starts, memory, convolutions.

What all three methods' layers do alike is in test_layers.py.
"""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

import hra
from hra import HRAConv2d, HRALinear, adapt, chain, gram_schmidt
from tests.checks import EPS, F16, F32, F64, SEEDS, close, eps, normal, seeded
from tests.test_hra import eye, fast_H, layer

# ------------------------------------------------------------------------------ the mathematics

GRID = [(d, r) for d in range(1, 101) for r in range(1, min(10, d) + 1)]


def test_the_grid_of_torch_householder():
    """Its sizes, seed and tolerances: float32 against torch's own product in float64."""
    generator = seeded(2021)
    for d, r in [*GRID, (2048, 128), (2048, 512)]:
        below = torch.randn(d, r, generator=generator).tril(-1).requires_grad_()
        Q = fast_H(below + torch.eye(d, r))[:, :r]
        close(Q.T @ Q, torch.eye(r), 1e-5)
        exact = below.detach().double().requires_grad_()
        columns = exact + torch.eye(d, r)
        Q64 = torch.linalg.householder_product(columns, 2 / columns.square().sum(0))
        close(Q, Q64, 1e-5)
        if d <= 100:
            (gradient,) = torch.autograd.grad(Q.sum(), below)
            (gradient64,) = torch.autograd.grad(Q64.sum(), exact)
            close(gradient.tril(-1), gradient64.tril(-1), 1e-4)


def test_moving_one_column_of_a_pair_is_a_rotation():
    """H₁H₂ = I + (2/‖u‖²)·(δuᵀ − uδᵀ) to first order, for δ ⊥ u."""
    u, δ = normal(0, 7), normal(1, 7)
    δ = δ - u * (u @ δ) / (u @ u)
    R = 2 / (u @ u) * (torch.outer(δ, u) - torch.outer(u, δ))
    for t in (1e-3, 1e-4):
        H = chain(torch.stack([u + t * δ, u], 1))
        close(H, eye(7) + t * R, 10 * t * t * (δ @ δ) / (u @ u))


def test_columns_start_as_long_as_the_authors():
    """kaiming_uniform_(a=√5) of a (d, k) tensor, the call in their code, is uniform in ±1/√k."""
    theirs = nn.init.kaiming_uniform_(torch.zeros(4000, 3), a=5**0.5)
    for init, rank in (("identity", 6), ("random", 3)):
        U = HRALinear(nn.Linear(4000, 2), rank, init, generator=seeded(0)).U
        for found in (U, theirs):
            assert found.abs().max() <= 3**-0.5
            close(found.abs().max(), 3**-0.5, 1e-3)  # of 12,000 draws
            close(found.std(), 3**-0.5 / 3**0.5, 0.01)


# ----------------------------------------------------------------------------------- the layer


def test_factors_are_as_wide_as_what_they_multiply():
    """U may stay float32 where x or W became float64: the answer is float64's."""
    m, x = layer(3, 32, 8, 4, F32), normal(4, 5, 32)
    m.base.double()
    W = m.base.weight
    WH = W @ chain(m.U.detach().double())
    close(m(x), x @ WH.T + m.bias, 1000 * EPS)
    close(m.weight, WH, 1000 * EPS)
    close(torch.matmul(*m.pair()), WH - W, 1000 * EPS)


def test_no_sum_overflows_in_half():
    """x Uᵀ has d terms of one sign; were U not scaled by √d, they would add up beyond 65,504."""
    d = 4096
    x, U = torch.full((1, d), 20.0), torch.ones(d, 1)
    close(hra.reflect(x.half(), U), -x, 20 * 40 * eps(F16))


def test_a_copy_too_refuses_columns_without_a_direction():
    m = layer(3, 16, 8, 4)
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        with pytest.raises(ValueError, match="column 0 is zero"):
            twin.load_state_dict({"U": torch.zeros(16, 4)}, strict=False)


def test_what_is_saved_for_the_backward_pass_is_what_lora_saves():
    """x and x Aᵀ, to 5 % of their bytes; parameters are there anyway. d = o = 4096, 512 rows."""

    def saved(f, parameters):
        """The bytes of the storages that autograd keeps."""
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
            y = f(torch.zeros(512, d, requires_grad=True))
        assert y.requires_grad
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in kept}
        own = {p.untyped_storage().data_ptr() for p in parameters}
        return sum(s.nbytes() for place, s in storages.items() if place not in own)

    d, r = 4096, 8
    m = HRALinear(nn.Linear(d, d, device="meta").to_empty(device="cpu"), r)
    A, B = torch.zeros(r, d, requires_grad=True), torch.zeros(d, r, requires_grad=True)
    lora = saved(lambda x: m.base(x) + x @ A.T @ B.T, [A, B, *m.parameters()])
    assert lora == 4 * 512 * (d + r)
    assert 0 < saved(m, m.parameters()) <= 1.05 * lora


# -------------------------------------------------------------------------------- convolutions


@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.sampled_from(["same", "valid", 0, 1, (0, 1), (1, 0)]),
    dilation=st.sampled_from([1, 2, (1, 2)]),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    bias=st.booleans(),
    strict=st.booleans(),
    seed=SEEDS,
)
def test_conv2d_geometries(kernel, stride, padding, dilation, mode, bias, strict, seed):
    """Forward, merge and pair are the base's with the weight W H, on the patches that it cuts."""
    stride = 1 if padding == "same" else stride
    options = dict(bias=bias, padding_mode=mode, dtype=F64)
    conv = nn.Conv2d(3, 5, kernel, stride, padding, dilation, **options)
    conv.weight.data = normal(seed, *conv.weight.shape)
    x, d = normal(seed + 1, 2, 3, 11, 12), conv.weight[0].numel()
    bound = 100 * d * EPS
    same = HRAConv2d(conv, 4, generator=seeded(seed))
    close(same(x), conv(x), bound)
    m = HRAConv2d(conv, min(3, d), "random", strict, seeded(seed))
    Q = gram_schmidt(m.U)
    H = eye(d) - 2 * Q @ Q.T if strict else chain(m.U)
    W = conv.weight.flatten(1)
    y = functional_call(conv, {"weight": (W @ H).view_as(conv.weight)}, x)
    plain = m.merge()
    assert type(plain) is nn.Conv2d and str(plain) == str(conv)
    close(m(x), y, bound)
    close(plain(x), y, bound)
    close(m(x[0]), y[0], bound)  # without a batch
    close(torch.matmul(*m.pair()), W @ H - W, bound)
    assert (m.in_features, m.out_features) == (d, 5)


class Net(nn.Module):
    """A convolution, two Linears and a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.body(self.conv(x).mean((2, 3))))


def net(seed=0):
    """The model above and images for it."""
    torch.manual_seed(seed)
    return Net(), torch.randn(6, 3, 8, 8)


def test_adapt_and_merge_know_convolutions():
    model, x = net()
    layers = adapt(model, ["conv", "body.0"], 4, init="random")
    assert isinstance(model.conv, HRAConv2d) and type(model.body[0]) is HRALinear
    assert [*layers] == ["conv", "body.0"] and type(model.body[2]) is nn.Linear
    after = model(x)
    hra.merge(model)
    assert type(model.conv) is nn.Conv2d and type(model.body[0]) is nn.Linear
    close(model(x), after, 100 * eps(F32))
