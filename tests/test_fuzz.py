"""Any tensor for any public function: a correct finite result, or a ValueError that says why not.

Ranks, shapes, dtypes, devices, layouts, sizes of numbers, nan, inf and requires_grad are drawn.
A call fails here that answers a bad input with finite numbers, a good one with a wrong number, nan
or inf, raises anything but ValueError or TypeError, does not name what it found, or changes what
it was given. Functions of the training step do not look at values, because a device would have to
be waited for: there nan and inf go through, and must arrive. FUZZ=5000 pytest -s tests/test_fuzz.py
tries as many inputs of each and counts.
"""

import copy
import math
import os
import re
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import eigenlorax
import hra
import resora

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
REAL = [F32] * 5 + [F64] * 5 + [BF16, F16]
OTHER = [torch.int64, torch.bool, torch.complex64]
SIZE = st.integers(1, 6)
SEED = st.integers(0, 2**32 - 1)
COUNTS = Counter()
eps = lambda dtype: torch.finfo(dtype).eps  # noqa: E731


@pytest.fixture(scope="module", autouse=True)
def counts():
    yield
    print("\n" + ", ".join(f"{kind} {n}" for kind, n in sorted(COUNTS.items())), "silent 0")


# ------------------------------------------------------------------------------- what is drawn


def wrong_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """A dimension fewer, more, empty, longer by one; nothing at all."""
    longer = [tuple(n + (i == j) for j, n in enumerate(shape)) for i in range(len(shape))]
    empty = [tuple(n * (i != j) for j, n in enumerate(shape)) for i in range(len(shape))]
    return [shape[1:], shape[:-1], (1, *shape), (*shape, 2), (), *longer, *empty]


SCALES = [0] * 6 + [-3, 3, -12, 12, -18, 18, -30, 30, -44, 38, -200, 200, -310, 307]
SPOILED = [None] * 16 + ["nan", "inf", "zero column", "zeros", "equal"]
LAYOUTS = ["plain", "transposed", "strided", "expanded"]


@st.composite
def tensors(draw, *shape: int, wild: bool = True):
    """A tensor that mostly has this shape, and mostly is fit to compute with."""
    if wild and draw(st.integers(0, 9)) == 9:
        shape = draw(st.sampled_from(wrong_shapes(shape)))
    dtype = draw(st.sampled_from(REAL + OTHER if wild else REAL[:7]))
    generator = torch.Generator().manual_seed(draw(SEED))
    X = torch.randn(shape, dtype=F64, generator=generator)
    X = X + X.sign() * 1e-3  # away from 0
    kind, scale = draw(st.sampled_from(SPOILED)), draw(st.sampled_from(SCALES))
    if dtype in (F64, F32, BF16, F16):
        top = math.log10(torch.finfo(dtype).max) - 1
        X *= 10.0 ** max(min(scale, top), math.log10(torch.finfo(dtype).tiny) - 1)
    X = X.to(dtype)
    if X.numel() and kind:
        flat = X.view(-1)
        if kind in ("nan", "inf") and dtype not in (torch.int64, torch.bool):
            flat[draw(st.integers(0, X.numel() - 1))] = math.nan if kind == "nan" else -math.inf
        elif kind == "zero column" and X.dim():
            X[..., draw(st.integers(0, X.shape[-1] - 1))] = 0
        elif kind == "zeros":
            X.zero_()
        elif kind == "equal" and X.dim():
            X[..., 1:] = X[..., :1]
    layout = draw(st.sampled_from(LAYOUTS))
    if layout == "transposed":
        X = X.mT.contiguous().mT if X.dim() > 1 else X
    elif layout == "strided" and X.dim():
        X = torch.stack([X, X], -1)[..., 0]
    elif layout == "expanded" and X.dim() > 1 and len(X):
        X = X[:1].expand(X.shape)
    if X.is_floating_point() and draw(st.booleans()):
        X.requires_grad_()
    return X.to("meta") if wild and draw(st.integers(0, 39)) == 39 else X


def real(*Xs: Tensor, dim: int | None = 2) -> bool:
    """True for floats on the CPU, not empty, of so many dimensions."""
    return all(
        X.is_floating_point() and X.numel() and not X.is_meta and dim in (None, X.dim()) for X in Xs
    )


def finite(*Xs: Tensor) -> bool:
    return all(not X.is_meta and bool(X.isfinite().all()) for X in Xs)


def wide(X: Tensor) -> Tensor:
    return X.detach().to(F64)


def wider(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, F32)


def near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """|found − wanted| ≤ tolerance everywhere; nan fails."""
    assert found.shape == wanted.shape
    assert ((wide(found) - wanted).abs() <= tolerance).all(), (found, wanted)


# --------------------------------------------------------------------------------- the verdict


def every_tensor(value) -> list[Tensor]:
    """All tensors in what a function takes or gives."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, nn.Module):
        return [*value.parameters(), *value.buffers()]
    if isinstance(value, dict):
        value = value.values()
    elif isinstance(value, eigenlorax.Subspace | eigenlorax.Components):
        value = vars(value).values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [X for item in value for X in every_tensor(item)]


def state(X: Tensor) -> tuple:
    kept = X.dtype, X.shape, X.stride(), X.requires_grad, X.grad is None, X._version
    return (*kept, "" if X.is_meta else repr(X.tolist()))


def verdict(
    call: Callable,
    given,
    good: bool | None,
    correct: Callable = lambda found: None,
    blind: bool = False,
    base: Callable | None = None,
) -> None:
    """Make the call and judge it.

    good: None where an answer, if it is correct, and a refusal are right; blind: values are not
    looked at, so that nan and inf may come out, and of nan must; base: a call whose own error is
    right as well, as that of an nn.Linear.
    """
    before = [state(X) for X in every_tensor(given)]
    try:
        found = call()
    except (ValueError, TypeError) as error:
        text = str(error)
        assert not good, text
        named = (
            "found|want|needs|got|0-d"
            if isinstance(error, ValueError)
            else "want|type|0-d|instances|must"
        )
        assert re.search(named, text) and ("\n" not in text or "meta" in text), text
        COUNTS["refused"] += 1
    except (RuntimeError, IndexError) as error:
        there = not any(X.is_meta for X in every_tensor(given))
        assert not good and not (there and base is None), repr(error)
        with pytest.raises((RuntimeError, IndexError)):
            base() if there else call()
        COUNTS["refused by torch"] += 1
    else:
        results = every_tensor(found)
        if any(X.is_meta for X in every_tensor(given)):
            COUNTS["shapes only"] += 1
        elif finite(*results):
            assert good is not False or not sum(X.numel() for X in results), found
            correct(found)
            COUNTS["correct"] += 1
        else:
            assert blind and not good, found
            COUNTS["nan of nan" if good is False else "beyond the range"] += 1
    assert [state(X) for X in every_tensor(given)] == before, "an argument was changed"


CASES = {}


def case(f: Callable) -> Callable:
    CASES[f.__name__] = f
    return f


# ----------------------------------------------------------------------------------------- HRA


def unit(U: Tensor) -> Tensor:
    """The columns in float64 at length 1, whatever their length."""
    U = wide(U)
    U = U / U.abs().amax(0)
    return U / U.norm(dim=0)  # nan for a column of zeros


def literal(U: Tensor) -> Tensor:
    U, I = unit(U), torch.eye(len(U), dtype=F64)
    H = I
    for u in U.T:
        H = H @ (I - 2 * torch.outer(u, u))
    return H


def directed(U: Tensor) -> bool:
    return real(U) and finite(U) and bool((U != 0).any(0).all())


@case
def gamma(draw):
    U = draw(tensors(draw(SIZE), draw(SIZE)))
    good = directed(U)
    if good:  # the range that its docstring gives; beyond it inf or nan arrive
        lengths = wide(U).abs().amax(0)
        low, high = (1e-17, 1e17) if wider(U.dtype) == F32 else (1e-150, 1e150)
        good = True if ((lengths > low) & (lengths < high)).all() else None

    def correct(G):
        n = wide(U).norm(dim=0)
        S = unit(U).T @ unit(U)
        wanted = -torch.linalg.inv(S.triu() - S.diagonal().diag() / 2)
        size = wanted.abs().max().item()
        near(wide(G) * n * n[:, None], wanted, 1e3 * eps(wider(U.dtype)) * size**2)
        assert G.dtype == wider(U.dtype)

    verdict(lambda: hra.gamma(U), U, good, correct, blind=real(U))


@case
def chain(draw):
    U = draw(tensors(draw(SIZE), draw(SIZE)))
    correct = lambda H: near(H, literal(U), 1e2 * eps(U.dtype))  # noqa: E731
    verdict(lambda: hra.chain(U), U, directed(U), correct, blind=real(U))


def small(X: Tensor) -> bool:
    """So far below the largest number that sums of a few terms stay finite."""
    return X.numel() == 0 or bool(X.abs().max() < torch.finfo(X.dtype).max / 50)


@case
def reflect(draw):
    d = draw(SIZE)
    U, x = (
        draw(tensors(d, draw(SIZE))),
        draw(tensors(*draw(st.sampled_from([(), (3,), (2, 2)])), d)),
    )
    fits = real(U) and x.is_floating_point() and x.dim() and x.shape[-1] == len(U) and not x.is_meta

    def correct(y):
        assert y.dtype == x.dtype
        size = wide(x).abs().max() if x.numel() else 0
        near(y, wide(x) @ literal(U).T, 2e2 * eps(x.dtype) * size + 1e2 * torch.finfo(x.dtype).tiny)

    good = bool(fits and directed(U) and finite(x)) and (small(x) or None)
    verdict(lambda: hra.reflect(x, U), (U, x), good, correct, blind=bool(fits))


@case
def penalty(draw):
    U = draw(tensors(draw(SIZE), draw(SIZE)))

    def correct(R):
        wanted = (torch.eye(U.shape[1], dtype=F64) - unit(U).T @ unit(U)).square().sum()
        near(R, wanted, 1e2 * eps(wider(U.dtype)) * (1 + wanted))

    one = real(U) and U.shape[1] == 1  # nothing to compare: 0, whatever the column
    exactly = lambda R: near(R, torch.zeros((), dtype=F64), 0)  # noqa: E731
    good, correct = (None, exactly) if one else (directed(U), correct)
    verdict(lambda: hra.penalty(U), U, good, correct, blind=real(U))


@case
def gram_schmidt(draw):
    U = draw(tensors(draw(SIZE), draw(SIZE)))
    good = directed(U)
    if good:
        s = torch.linalg.svdvals(unit(U))
        tight = s[-1] < 1e-3 * s[0] or len(U) < U.shape[1]
        good = None if tight and len(s) == U.shape[1] and s[-1] > 1e-18 else not tight

    def correct(Q):
        near(Q.T @ Q, torch.eye(U.shape[1], dtype=F64), 1e2 * eps(wider(U.dtype)))
        R = wide(Q).T @ unit(U)
        near(R.tril(-1), 0 * R, 1e2 * eps(wider(U.dtype)))
        near(wide(Q) @ R, unit(U), 1e2 * eps(wider(U.dtype)))
        assert (R.diagonal() > 0).all()

    verdict(lambda: hra.gram_schmidt(U), U, good, correct)


RANKS = [1, 2, 2, 2, 3, 4, 0, -1, 7, 2.0, True, None, "2", math.nan]


def base_of(draw, *kinds) -> nn.Module:
    """A layer to adapt, or something that is none."""
    d, o = draw(SIZE), draw(SIZE)
    dtype = draw(st.sampled_from(REAL))
    torch.manual_seed(draw(SEED))
    layers = {
        "linear": lambda: nn.Linear(d, o, draw(st.booleans()), dtype=dtype),
        "conv": lambda: nn.Conv2d(d, o, draw(st.sampled_from([1, 2, (1, 3)])), dtype=dtype),
        "norm": lambda: nn.LayerNorm(d),
        "embedding": lambda: nn.Embedding(o, d),
        "empty": lambda: nn.Linear(0, 3) if draw(st.booleans()) else nn.Linear(3, 0),
    }
    return layers[draw(st.sampled_from([*kinds * 4, *layers]))]()


def works(layer: nn.Module, x: Tensor) -> bool:
    """What its base does with x: True if there is an answer."""
    try:
        layer(x)
    except (RuntimeError, ValueError, IndexError, NotImplementedError):
        return False
    return True


def adapted_layer(draw, make: Callable, base: nn.Module, sound: Callable, *given) -> None:
    """Make a layer, and if that is right, call and merge it with any x."""
    made = []
    verdict(lambda: made.append(make(base)), given, sound(base))
    if not made:
        return
    (layer,) = made
    with torch.no_grad():
        for p in layer.parameters():
            if p.requires_grad:
                p += 0.5 * torch.randn_like(p)
    W = layer.base.weight
    plain = layer.merge()
    if isinstance(base, nn.Conv2d):
        x = draw(tensors(2, base.in_channels, 3, 4))
    else:
        x = draw(tensors(3, base.in_features))
    if draw(st.booleans()) and x.is_floating_point() and x.dtype != W.dtype:
        x = x.detach().to(W.dtype)
    answered = works(base, x)
    good = answered and not x.is_meta and finite(x) and (small(x.detach() * 1e4) or None)

    def correct(y):
        assert y.dtype == W.dtype
        exact = copy.deepcopy(plain).to(F64)
        exact.weight.data = wide_weight(layer)
        wanted = exact(wide(x))
        top = 1 + sum(wide(V).abs().max() for V in (W, exact.weight) if V.numel())
        size = wide(x).abs().max() * top if x.numel() else 0
        near(y, wide(wanted), 5e3 * eps(W.dtype) * size + eps(W.dtype) * 50)

    # numbers near the largest may overflow, as they may in the base
    verdict(lambda: layer(x), (x, layer), good, correct, blind=answered, base=lambda: base(x))


def wide_weight(layer) -> Tensor:
    """W' in float64 by the method's oracle."""
    W = wide(layer.base.weight)
    if isinstance(layer, hra.HRALinear):
        if layer.strict:
            Q = torch.linalg.qr(unit(layer.U))[0]
            H = torch.eye(len(Q), dtype=F64) - 2 * Q @ Q.T
        else:
            H = literal(layer.U)
        return (W.flatten(1) @ H).view_as(W)
    if isinstance(layer, resora.LoRALinear):
        return W + layer.scaling * wide(layer.B) @ wide(layer.A)
    a, b = wide(layer.alpha_A[0]), wide(layer.alpha_B[0])
    return W + layer.scaling * wide(layer.V_B).T @ b @ a.T @ wide(layer.V_A)


def is_rank(rank) -> bool:
    return type(rank) is int and rank >= 1


@case
def hra_linear(draw):
    rank, strict = draw(st.sampled_from(RANKS)), draw(st.sampled_from([False, False, True]))
    init = draw(st.sampled_from(["identity", "random", "random", "zero", None]))

    def sound(base):
        if not isinstance(base, nn.Linear) or not is_rank(rank) or not base.in_features:
            return False
        paired = init == "identity" and rank % 2 == 0 and not strict
        return paired or (init == "random" and (not strict or rank <= base.in_features))

    make = lambda base: hra.HRALinear(base, rank, init, strict)  # noqa: E731
    adapted_layer(draw, make, base_of(draw, "linear"), sound)


@case
def hra_conv2d(draw):
    rank = draw(st.sampled_from(RANKS))
    sound = lambda base: isinstance(base, nn.Conv2d) and is_rank(rank)  # noqa: E731
    make = lambda base: hra.HRAConv2d(base, rank, "random")  # noqa: E731
    adapted_layer(draw, make, base_of(draw, "conv"), sound)


@case
def from_peft(draw):
    key = draw(
        st.sampled_from(["base_model.model.q.hra_u"] * 5 + ["q", "", "base_model.model.hra_u"])
    )
    U = draw(tensors(draw(SIZE), draw(SIZE)))
    good = key.endswith("q.hra_u") and directed(U)

    def correct(Us):
        assert Us["q"] is U

    verdict(lambda: hra.from_peft({key: U}), U, good, correct)


# --------------------------------------------------------------------------------------- ReSoRA

NUMBERS = [1.0] * 30 + [0.5, 2, 2.5, 4, 1e-3, 0.0, -1.0, math.nan, math.inf]
METRICS = [*resora.METRICS * 4, "spearman", None]


@case
def redundancy(draw):
    r = draw(SIZE)
    B, S = draw(tensors(draw(SIZE), r)), draw(tensors(draw(st.integers(2, 8)), r))
    metric = draw(st.sampled_from(METRICS))
    beta, sigma = draw(st.sampled_from(NUMBERS)), draw(st.sampled_from(NUMBERS))
    samples = draw(st.sampled_from([128] * 30 + [2, 5, 1, 0, -3, 2.5, math.nan]))
    center = draw(st.booleans())
    options = dict(beta=beta, sigma=sigma, samples=samples, center=center)
    fits = real(B, S) and B.shape[1] == S.shape[1] and metric in resora.METRICS
    fits = fits and 0 < beta < math.inf and 0 < sigma < math.inf
    fits = bool(fits and samples >= 2)
    good = fits and finite(B, S)
    if good:
        # columns that are null, or nearly, and sums that overflow, are for the docstring
        b, s = (wide(X).square().mean(0).sqrt() for X in (B, S))
        c = (wide(S) - wide(S).mean(0)).square().mean(0).sqrt()
        size = 1e3 * eps(wider(S.dtype)) * wide(S).abs().max()
        inside = 1e-5 < min(b.min(), s.min()) and max(b.max(), s.max()) < 1e8
        centred = metric == "nonlinear" or (metric == "linear" and center)
        inside = inside and (c.min() > 1e-5 + size or not centred)
        inside = inside and sigma >= 0.5  # a narrow kernel is the identity: cosines of little else
        good = True if inside else None

    if fits and B.shape[1] == 1:
        good = None  # nothing to compare: 0, whatever the component
    if fits and metric in ("linear", "nonlinear") and not finite(B) and finite(S):
        good = None  # which B cannot change
    if real(B, S) and samples == 2.5:
        good = good and None  # as good where no token is left out

    def correct(R):
        assert 0 <= R <= (r > 1) + 1e-3
        if good is None or (metric == "nonlinear" and samples < len(S)):
            return
        wanted = resora.redundancy_dense(wide(B), wide(S), metric, **options)
        near(R, wanted, 1e-3 if wider(S.dtype) == F32 else 1e-7)

    verdict(lambda: resora.redundancy(B, S, metric, **options), (B, S), good, correct, blind=fits)


@case
def regauge(draw):
    r, d = draw(SIZE), draw(SIZE)
    B, A = draw(tensors(draw(SIZE), r)), draw(tensors(r, d))
    x = draw(st.none() | tensors(draw(SIZE), d))
    fits = all(X.dim() == 2 and X.is_floating_point() and not X.is_meta for X in (B, A))
    fits = fits and B.shape[1] == len(A) and finite(B, A)
    if x is not None:
        fits = fits and x.is_floating_point() and finite(x) and x.shape[-1:] == A.shape[1:]
    if fits:  # what overflows its dtype is inf, in A' which has the scale of both
        largest = [wide(X).norm().item() for X in (B, A, *([] if x is None else [x]))]
        top = min(torch.finfo(X.dtype).max for X in (B, A))
        inside = max(largest) < min(1e15, top / 4) and largest[0] * largest[1] < top / 4
        empty = not all(X.numel() for X in (B, A) + (() if x is None else (x,)))
        fits = True if inside and not empty else None

    def correct(pair):
        b, a = (wide(X).abs().max() * X.numel() ** 0.5 if X.numel() else 0 for X in (B, A))
        worst = max(eps(B.dtype), eps(A.dtype))
        least = max(torch.finfo(X.dtype).tiny for X in (B, A))
        near(wide(pair[0]) @ wide(pair[1]), wide(B) @ wide(A), 1e2 * worst * b * a + 10 * least)

    call = (lambda: resora.regauge(B, A, x)) if fits is None else None  # torch's own: overflow
    verdict(
        lambda: resora.regauge(B, A, x), (B, A, x), fits, correct, blind=fits is None, base=call
    )


@case
def lora_linear(draw):
    rank = draw(st.sampled_from(RANKS))
    alpha = draw(st.sampled_from([None, None, 1, 2.5, 0, -1, math.nan, math.inf, "1"]))
    dropout = draw(st.sampled_from([0.0, 0.0, 0.0, 1.5, -1, math.nan]))

    def sound(base):
        number = alpha is None or (isinstance(alpha, int | float) and math.isfinite(alpha))
        layer = isinstance(base, nn.Linear) and base.weight.numel()
        return bool(layer and is_rank(rank) and number and dropout == 0.0)

    make = lambda base: resora.LoRALinear(base, rank, alpha, dropout)  # noqa: E731
    adapted_layer(draw, make, base_of(draw, "linear"), sound)


# ----------------------------------------------------------------------------------- EigenLoRAx

RULES = [None] * 4 + [1, 1, 2, 0.5, 1.0, "gavish-donoho", 0, -1, 99, 1.5, math.nan, True, "x", [1]]


@case
def principal_components(draw):
    m, n = draw(SIZE), draw(SIZE)
    rows, k, center = draw(tensors(m, n)), draw(st.sampled_from(RULES)), draw(st.booleans())
    good = real(rows) and finite(rows)
    if good:
        X = wide(rows) - wide(rows).mean(0) * center
        s = torch.linalg.svdvals(X)
        rank = int((s > 1e-4 * s[0]).sum()) if wide(rows).abs().max() < 1e100 else 0
        plain = (k is None or k in (1, 0.5)) and k is not True
        good = True if plain and rank == min(m - center, n) > 0 else None

    def correct(found):
        V, mean, sigma = found.V, found.mean, found.singular_values
        dtype = wider(rows.dtype)
        assert V.dtype == mean.dtype == sigma.dtype == dtype
        near(V @ V.T, torch.eye(len(V), dtype=F64), 1e2 * eps(dtype))
        near(mean, wide(rows).mean(0) * center, 1e2 * eps(dtype) * wide(rows).abs().max())
        near(sigma, s[: len(V)], 1e2 * eps(dtype) * s[0] + 1e-45)
        unit, top = s / s[0].clamp(min=1e-300), X.abs().max().clamp(min=1e-300)
        left = (X / top - X / top @ wide(V).T @ wide(V)).norm()
        near(left, unit[len(V) :].norm() * (s[0] / top), 1e2 * eps(dtype) * (1 + s[0] / top))

    verdict(lambda: eigenlorax.principal_components(rows, k, center), rows, good, correct)


@case
def choose_k(draw):
    s = draw(tensors(draw(SIZE)))
    s = s.detach().abs().sort(descending=True)[0] if real(s, dim=1) and draw(st.booleans()) else s
    rule, (m, n) = draw(st.sampled_from(RULES)), (draw(SIZE), draw(SIZE))
    descending = real(s, dim=1) and finite(s) and bool((s.diff() <= 0).all() and s[-1] >= 0)
    empty = s.dim() == 1 and s.is_floating_point() and not s.numel()
    good = None if descending or empty else False

    def call():
        K = eigenlorax.choose_k(s, rule, (m, n))
        assert type(K) is int and 0 <= K <= len(s)
        if descending and isinstance(rule, float):
            energy = (wide(s) / wide(s)[0]).square()
            assert energy[:K].sum() >= (rule - 1e-9) * energy.sum() or K == len(s) or K > 0
        return torch.tensor(K)

    verdict(call, s, good)


@case
def augment(draw):
    n, p = draw(SIZE), draw(st.sampled_from([0, 1, 1, 2, 3, -1, 9, 1.0, True, None, math.nan]))
    V = draw(tensors(draw(st.integers(0, n)), n))
    sound = V.dim() == 2 and V.is_floating_point() and not V.is_meta and finite(V)
    good = bool(sound and type(p) is int and 0 <= p <= V.shape[1] - len(V))

    def correct(found):
        assert torch.equal(found[: len(V)], V)
        new, size = wide(found[len(V) :]), wide(V).abs().sum()  # a norm's squares vanish
        near(new @ new.T, torch.eye(p, dtype=F64), 40 * eps(V.dtype))
        near(new @ wide(V).T, 0 * new @ wide(V).T, 40 * eps(V.dtype) * size)

    verdict(lambda: eigenlorax.augment(V, p), V, good, correct)


@case
def project_and_reconstruct(draw):
    m, n, K = draw(SIZE), draw(SIZE), draw(SIZE)
    back = draw(st.booleans())
    X = draw(tensors(m, K if back else n))
    V, mean = draw(tensors(K, n)), draw(st.none() | tensors(n))
    given = [X, V] + ([] if mean is None else [mean])
    if not real(*given[1:], dim=None):  # V and the mean are those of a function of ours
        return
    fits = real(X, V) and finite(*given) and X.shape[1] == V.shape[not back]
    good = fits and (mean is None or (real(mean, dim=1) and len(mean) == V.shape[1]))
    top = max((wide(Y).abs().max() for Y in given if Y.numel()), default=0) if fits else 0
    good = (None if top > 1e3 else True) if good else False
    if fits or (not real(X, V) and X.dim() == V.dim() == 2):
        good = good or None  # no rows; a mean of integers or of a row: as good

    def correct(found):
        mu = 0 if mean is None else wide(mean).view(V.shape[1:])
        wanted = wide(X) @ wide(V) + mu if back else (wide(X) - mu) @ wide(V).T
        rounding = max(eps(Y.dtype) for Y in given if Y.is_floating_point())
        near(found, wanted, 40 * rounding * (1 + top) ** 2)

    def call():
        zero = V.new_zeros(V.shape[-1:])
        held = eigenlorax.Components(V, V, zero if mean is None else mean, 0.0)
        return held.reconstruct(X) if back else held.project(X)

    verdict(call, given, good, correct, blind=real(X, V), base=call)  # torch's own errors


@case
def recycle_and_update(draw):
    o, d = draw(SIZE), draw(SIZE)
    pairs = []
    for _ in range(draw(st.integers(1, 3))):
        r = draw(st.integers(1, 3))
        pairs.append((draw(tensors(o, r)), draw(tensors(r, d))))
    k, pseudo = draw(st.sampled_from(RULES)), draw(st.sampled_from([0, 0, 0, 1, -1, 99, 1.5]))
    adapters = [{"q": pair} for pair in pairs]
    flat = [X for pair in pairs for X in pair]
    fits = real(*flat) and finite(*flat)
    fits = fits and all(B.shape == (o, len(A)) and A.shape[1] == d for B, A in pairs)
    good = None if fits else False

    def correct_one(s):
        for V, n in ((s.A.V, d), (s.B.V, o)):
            assert V.shape[1] == n
            near(V @ V.T, torch.eye(len(V), dtype=F64), 1e2 * eps(V.dtype))
        if k is None and not pseudo:
            for i, V in enumerate((s.B.V, s.A.V)):
                for pair in pairs:
                    X = wide(pair[1]) if i else wide(pair[0]).T
                    top = max(wide(p[i]).norm() for p in pairs)
                    left = X - X @ wide(V).T @ wide(V)
                    near(left, 0 * left, 1e3 * eps(F32) * top + 1e-40)

    at_once = draw(st.booleans())

    def call():
        if at_once:
            found = eigenlorax.recycle(adapters, k, pseudo)
        else:
            found = eigenlorax.update({}, adapters[:1], k)
            found = eigenlorax.update(found, adapters[1:], k) if len(adapters) > 1 else found
        if fits:
            correct_one(found["q"])
        return found

    verdict(call, flat, good)


def some_subspace(draw, o: int, d: int) -> eigenlorax.Subspace:
    V_A, V_B = draw(tensors(draw(SIZE), d)), draw(tensors(draw(SIZE), o))
    sides = (eigenlorax.Components(V, torch.zeros(0), torch.zeros(0), 0.0) for V in (V_A, V_B))
    return eigenlorax.Subspace(*sides)


@case
def eigenlorax_linear(draw):
    base = base_of(draw, "linear")
    o, d = getattr(base, "out_features", 3), getattr(base, "in_features", 3)
    s = some_subspace(draw, o, d)
    rank, tasks = draw(st.sampled_from(RANKS)), draw(st.sampled_from([1, 2, 2, 3, 0, 1.0, None]))
    scaling = draw(st.sampled_from([1.0, 1.0, 2, -0.5, 0, math.nan, math.inf, "1", None]))

    def sound(base):
        V = s.A.V, s.B.V
        fits = isinstance(base, nn.Linear) and base.weight.numel() and real(*V) and finite(*V)
        fits = fits and s.A.V.shape[1] == d and s.B.V.shape[1] == o
        number = isinstance(scaling, int | float) and 0 < abs(scaling) < math.inf
        fits = fits and is_rank(rank) and is_rank(tasks) and number
        small_V = fits and max(X.abs().max() for X in V) < 10
        return (True if small_V else None) if fits else False

    make = lambda base: eigenlorax.EigenLoRAxLinear(base, s, rank, tasks, scaling)  # noqa: E731
    if sound(base) is None:
        return
    adapted_layer(draw, make, base, sound, s)


@case
def tasks_of_a_layer(draw):
    o, d = draw(SIZE), draw(SIZE)
    torch.manual_seed(draw(SEED))
    pair = torch.randn(o, 2), torch.randn(2, d)
    subspace = eigenlorax.recycle([{"q": pair}])["q"]
    layer = eigenlorax.EigenLoRAxLinear(nn.Linear(d, o), subspace, 2, tasks=3, init="random")
    often, once = ["forward", "serving"], ["pair", "merge", "set_task", "to_peft"]
    kind = draw(st.sampled_from(3 * often + once))
    if kind == "set_task":
        r, task = draw(st.integers(1, 3)), draw(st.sampled_from([0, 1, 2, 3, -1]))
        B, A = draw(tensors(o, r)), draw(tensors(r, d))
        good = real(B, A) and B.shape == (o, len(A)) and A.shape[1] == d and finite(B, A)
        good = bool(good and len(A) <= 2 and 0 <= task < 3)
        largest = good and max(wide(X).abs().max() for X in (B, A))
        before = copy.deepcopy(layer.state_dict())
        verdict(lambda: layer.set_task(task, B, A), (B, A), good and (largest < 1e30 or None))
        if not good:
            assert all(torch.equal(v, before[key]) for key, v in layer.state_dict().items())
        return
    tasks = [0, 1, 2, 3, -1, None, True, 1.0, "0", torch.tensor(1), torch.tensor([0, 1, 2, 0])]
    tasks += [torch.tensor([0, 1]), torch.tensor([0.0] * 4), torch.tensor([0, 1, 2, 0]).int()]
    tasks += [torch.tensor([0, 1, 2, 3]), torch.tensor([0, -1, 2, 0]), [0, 1, 2, 0], [0, 3, 0, 0]]
    tasks += [[], [[0, 1, 2, 0]], torch.zeros(0, dtype=torch.int64), math.nan]
    mixed = st.sampled_from([torch.tensor([0, 1, 2, 0]), torch.tensor([2, 1, 1, 0])])
    task, x = draw(mixed | st.sampled_from(tasks)), torch.randn(4, d)
    ids = [task] * 4 if type(task) is int else None
    if kind == "forward" and task is None:
        ids = [0] * 4
    if isinstance(task, list | Tensor):
        flat = torch.as_tensor(task)
        if not flat.is_floating_point():
            ids = flat.tolist() if flat.shape == (4,) else ids
            ids = [int(flat)] * 4 if flat.shape == () else ids
    good = ids is not None and all(0 <= i < 3 for i in ids)
    calls = {
        "forward": lambda: layer(x, task),
        "pair": lambda: layer.pair(task),
        "merge": lambda: layer.merge(task),
        "to_peft": lambda: eigenlorax.to_peft({"q": layer}, task)[0],
    }

    def serve():
        with eigenlorax.serving({"q": layer}, task):
            return layer(x)

    def correct(y):
        wanted = [layer.weight_of(i) @ x[j] + layer.bias for j, i in enumerate(ids)]
        near(y, wide(torch.stack(wanted)), 1e-4)

    if kind in ("forward", "serving"):
        verdict(calls.get(kind, serve), (x, layer), good, correct)
    else:
        integer = isinstance(task, Tensor) and task.dim() == 0
        number = type(task) is int or (integer and not task.is_floating_point())
        verdict(calls[kind], layer, task is None or (number and 0 <= task < 3))


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=int(os.environ.get("FUZZ", 20)), deadline=None)
@given(data=st.data())
def test_any_input_is_answered_correctly_or_refused(name, data):
    CASES[name](data.draw)
