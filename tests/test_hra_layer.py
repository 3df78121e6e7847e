"""hra.py as a layer: published grids, dtypes, compilation, convolutions, whole models."""

import copy
import pickle

import accelerate
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import hra
from hra import HRAConv2d, HRALinear, adapt, chain, gamma, gram_schmidt
from tests.checks import BF16, EPS, F16, F32, F64, SEEDS, close, eps, exactly, normal, seeded
from tests.test_hra import eye, fast_H, layer

# ------------------------------------------------------------------------- the published test grids


def test_the_2d_grid_of_torch_householder():
    """Its sizes, seed and tolerances: float32 against a float64 loop."""
    g = seeded(2021)
    for d in range(1, 101):
        for r in range(1, min(10, d) + 1):
            U = torch.randn(d, r, generator=g).tril(-1) + torch.eye(d, r)
            U.requires_grad_()
            Q = fast_H(U)[:, :r]
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
    U = torch.randn(d, r, generator=seeded(2021)).tril(-1) + torch.eye(d, r)
    Q = fast_H(U)[:, :r]
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
        H = fast_H(m.normals())
        close(H.T @ H, eye(d, dtype), 10 * d * eps(dtype))
        optimizer.zero_grad()
        m(normal(1, 5, d, dtype=dtype)).norm().backward()
        optimizer.step()


def test_the_papers_odd_rank():
    m = HRALinear(nn.Linear(12, 5), 7, "random")
    assert m.U.shape == (12, 7)
    H = fast_H(m.U.detach().double())
    close(torch.det(H), -1.0, 100 * EPS)  # an odd number of mirrors


def test_strict_gradients_are_the_projectors():
    m, x = layer(5, 9, 4, 3, strict=True), normal(1, 5, 9)
    U = m.U.detach().requires_grad_()
    P = U @ torch.linalg.inv(U.T @ U) @ U.T
    (fast,) = torch.autograd.grad(m(x).square().sum(), m.U)
    (slow,) = torch.autograd.grad(m.base(x - 2 * x @ P).square().sum(), U)
    close(fast, slow, 1000 * EPS * slow.abs().max())


# --------------------------------------------------------------------------------- the layer


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


def test_factors_are_as_wide_as_what_they_multiply():
    """U may stay float32 where x or W became float64: the answer is float64's."""
    m, x = layer(3, 32, 8, 4, F32), normal(4, 5, 32)
    m.base.double()
    H = chain(m.U.detach().double())
    W = m.base.weight
    close(m(x), x @ (W @ H).T + m.bias, 1000 * EPS)
    close(m.weight, W @ H, 1000 * EPS)
    close(torch.matmul(*m.pair()), W @ H - W, 1000 * EPS)


def test_no_sum_overflows_in_half():
    """x Uᵀ has d terms of one sign; were U not scaled by √d, they would add up beyond 65,504."""
    d = 4096
    x, U = torch.full((1, d), 20.0), torch.ones(d, 1)
    close(hra.reflect(x.half(), U), -x, 20 * 40 * eps(F16))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast(dtype):
    m, x = layer(3, 32, 8, 4, F32), normal(4, 5, 32, dtype=F32)
    wanted, weight, delta, penalty = m(x), m.weight, torch.matmul(*m.pair()), m.penalty()
    m.U.data *= 1000  # its Gram is beyond fp16
    with torch.autocast("cpu", dtype=dtype):
        y = m(x)
        assert y.dtype == m.base(x).dtype == dtype
        close(y, wanted, 200 * eps(dtype))
        for found, exact in (
            (m.weight, weight),
            (m.penalty(), penalty),
            (gamma(m.U) * 1e6, gamma(m.U / 1e3)),
        ):
            assert found.dtype == F32
            close(found, exact, 1e-4)  # a product in half would be off by 1e-2
        B, A = m.pair()
        assert B.dtype == A.dtype == F32
        Q = gram_schmidt(m.U)
    close(B @ A, delta, 1e-4)
    close(Q.T @ Q, torch.eye(4), 1e-5)
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
        close(g, w, 1e-4 * w.abs().max())


def test_export_with_a_dynamic_batch():
    m, batch = layer(3, 16, 8, 4, F32), torch.export.Dim("batch")
    exported = torch.export.export(m, (normal(4, 5, 16, dtype=F32),), dynamic_shapes=({0: batch},))
    x = normal(5, 9, 16, dtype=F32)
    close(exported.module()(x), m(x), 1e-5)


def test_a_step_under_accelerate():
    accelerate.state.AcceleratorState._reset_state(True)  # other tests have made theirs, in fp32
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    (m,) = adapt(model, ["0"], 4, generator=seeded(0)).values()
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
        exactly(x.grad, wanted[0])
        exactly(m.U.grad, wanted[1])


def test_the_penalty_has_a_gradient_within_functional_call():
    m, x = layer(3, 16, 8, 3), normal(4, 5, 16)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = m

        def forward(self, x):
            return 0 * self.m(x).sum() + self.m.penalty()

    U = m.U.detach().clone().requires_grad_()
    (within,) = torch.autograd.grad(functional_call(Loss(), {"m.U": U}, (x,)), U)
    (own,) = torch.autograd.grad(m.penalty(), m.U)
    close(within, own, 10 * EPS)
    assert own.abs().max() > 0


def test_copies():
    m, x = layer(3, 16, 8, 4), normal(4, 5, 16)
    fresh = layer(9, 16, 8, 4)
    fresh.load_state_dict(m.state_dict())
    assert sorted(m.state_dict()) == ["U", "base.bias", "base.weight"]
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), fresh):
        exactly(other(x), m(x))
        assert not other.base.weight.requires_grad
        with pytest.raises(ValueError, match="column 0 is zero"):
            other.load_state_dict({"U": torch.zeros(16, 4)}, strict=False)
    assert [n for n, p in m.named_parameters() if p.requires_grad] == ["U"]
    assert "rank=4, strict=False" in repr(m)


def test_only_the_generator_is_consumed():
    state = torch.get_rng_state()
    base = nn.Linear(6, 5, device="meta").to_empty(device="cpu")
    a, b = (HRALinear(base, 4, generator=seeded(1)).U for _ in range(2))
    exactly(a, b)
    assert torch.equal(state, torch.get_rng_state())


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


def test_saved_for_backward_is_loras():
    """In bytes, parameters left out, at d = o = 4096, 512 rows, r = 8: within 5 % of x and x Aᵀ."""

    def saved(f, x, parameters):
        own = {p.untyped_storage().data_ptr() for p in parameters}
        found = {}
        alive = []

        def pack(t):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t)  # an address must not be used twice
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


# ------------------------------------------------------- layers that are read and not called


def test_weight_is_what_stock_modules_read():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    adapt(encoder, ["linear1", "linear2", "out_proj"], 3, init="random", generator=seeded(1))
    plain, x = copy.deepcopy(encoder).eval(), torch.randn(3, 5, 16)
    for m in encoder.modules():
        m.p = 0.0 if isinstance(m, nn.Dropout) else getattr(m, "p", None)
        if isinstance(m, nn.MultiheadAttention):
            m.dropout = 0.0
    trained = encoder.train()(x)
    with torch.no_grad():
        close(plain(x), trained, 1e-5)  # the fused path, on layer-normed values of size 1
    close(hra.merge(plain)(x), trained, 1e-5)
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
    hra.merge(attention)  # out_proj is a NonDynamicallyQuantizableLinear, with nn.Linear's forward
    assert type(attention.out_proj) is nn.Linear
    close(attention(x, x, x)[0], after, 1e-5)


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
    same = HRAConv2d(conv, 4, generator=seeded(seed))
    close(same(x), conv(x), 100 * d * EPS)
    for strict in (False, True):
        m = HRAConv2d(conv, min(3, d), "random", strict, seeded(seed))
        turned, Q = copy.deepcopy(conv), gram_schmidt(m.U)
        H = eye(d) - 2 * Q @ Q.T if strict else chain(m.U)
        with torch.no_grad():
            turned.weight.copy_((conv.weight.flatten(1) @ H).view_as(conv.weight))
        plain = m.merge()
        assert type(plain) is nn.Conv2d and str(plain) == str(conv)
        for found in (m, plain):
            close(found(x), turned(x), 100 * d * EPS)
        close(m(x[0]), turned(x[0]), 100 * d * EPS)  # without a batch
        B, A = m.pair()
        close(B @ A, (turned.weight - conv.weight).flatten(1), 100 * d * EPS)
    assert (m.in_features, m.out_features) == (d, 5)


def test_a_convolution_mirrors_its_patches():
    """By hand: cut the patches out, mirror each, multiply by W."""
    m, x = HRAConv2d(nn.Conv2d(2, 3, (3, 2), 2, 1, dtype=F64), 3, "random"), normal(0, 2, 2, 6, 6)
    patches = F.unfold(x, (3, 2), stride=2, padding=1).mT  # (2, places, d)
    y = hra.reflect(patches, m.U) @ m.base.weight.flatten(1).T + m.bias
    close(m(x), y.mT.view_as(m(x)), 100 * EPS)
    (fast,) = torch.autograd.grad(m(x).square().sum(), m.U)
    (slow,) = torch.autograd.grad(y.square().sum(), m.U)
    close(fast, slow, 1000 * EPS * slow.abs().max())


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_conv2d_in_half(dtype):
    m, x = HRAConv2d(nn.Conv2d(4, 6, 3, padding=1), 4, "random"), normal(0, 2, 4, 8, 8, dtype=F32)
    m.U.data *= 1000
    wanted = m(x).detach()
    with torch.autocast("cpu", dtype=dtype):
        assert m(x).dtype == dtype
        close(m(x), wanted, 40 * eps(dtype))
    m.base.to(dtype)
    close(m(x.to(dtype)), wanted, 40 * eps(dtype))
    assert m.merge().weight.dtype == dtype


# ------------------------------------------------------------------------------------- whole models


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
    torch.manual_seed(seed)
    return Net(), torch.randn(6, 3, 8, 8)


def test_adapt_and_merge_a_model():
    model, x = net()
    before = model(x)
    modules = adapt(model, ["conv", "body.0", "body.2"], 4, generator=seeded(0))
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


def test_a_whole_name_means_that_layer_alone():
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "block": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    assert list(adapt(copy.deepcopy(model), "q", 2)) == ["q"]
    assert list(adapt(model, "block.q", 2)) == ["block.q"]


def test_an_adapter_inside_another_is_merged_with_it():
    model, x = nn.Sequential(nn.Linear(6, 5, dtype=F64)), normal(0, 3, 6)
    adapt(model, "0", 2, init="random")
    model[0] = HRALinear(model[0], 3, "random")
    before = model(x)
    U, V = model[0].base.U, model[0].U
    close(model[0].weight, model[0].base.base.weight @ chain(U) @ chain(V), 100 * EPS)
    hra.merge(model)
    assert type(model[0]) is nn.Linear
    close(model(x), before, 100 * EPS)


def test_a_7b_stack_on_meta():
    """Nothing is allocated, and no random number is drawn."""
    with torch.device("meta"):
        block = {f"{n}_proj": nn.Linear(4096, 4096) for n in "qkvo"}
        block |= {n: nn.Linear(4096, 11008) for n in ("gate", "up")}
        block["down"] = nn.Linear(11008, 4096)
        model = nn.ModuleList(nn.ModuleDict(copy.deepcopy(block)) for _ in range(32))
    state = torch.get_rng_state()
    modules = adapt(model, ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "up", "down"], 8)
    assert len(modules) == 7 * 32 and torch.equal(state, torch.get_rng_state())
    assert sum(m.U.numel() for m in modules.values()) == 32 * 8 * (6 * 4096 + 11008)
    m = modules["0.q_proj"]
    assert m(torch.empty(2, 4096, device="meta")).shape == (2, 4096)
    assert m.weight.is_meta and m.penalty().is_meta and m.pair()[0].shape == (4096, 8)
