"""Any tensor for a public function: a correct finite answer, or an error that says why not.

Drawn are shapes, dtypes, layouts, sizes of numbers, nan, inf, zeros, equal columns, requires_grad.
What does not fit must be refused, what is mild must be answered, and whatever is answered with
finite numbers must be right. Functions of the training step do not look at values, for which a
device would have to be waited for: there nan and inf go through, and must arrive. No argument may
be changed. FUZZ=5000 pytest tests/test_fuzz.py tries as many inputs of each.
"""

import copy
import math
import os
import re

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hra
import resora
from eigenlorax import principal_components
from tests.checks import BF16, F16, F32, F64, SEEDS, close, eps, normal
from tests.test_hostile import answer, every, wrap

SIZE = st.integers(1, 6)
DTYPES = [F32] * 4 + [F64] * 4 + [BF16, F16]
OTHERS = [torch.int64, torch.bool, torch.complex64]
DECADES = [0] * 8 + [-3, 3, -12, 12, -30, 30, -200, 200]
SPOILED = ["no"] * 12 + ["nan", "inf", "zero column", "zeros", "equal columns"]
LAYOUTS = ["plain", "transposed", "strided", "expanded"]


def fuzz(test):
    """A test of many drawn inputs."""
    examples = int(os.environ.get("FUZZ", 20))
    return settings(max_examples=examples)(given(st.data())(test))


# ------------------------------------------------------------------------------- what is drawn


@st.composite
def tensors(draw, *shape, dtype=None):
    """A tensor that mostly has this shape, and that mostly can be computed with."""
    odd = draw(st.integers(0, 9)) if dtype is None else 9
    if odd == 0:
        shape = draw(st.sampled_from([shape[1:], (1, *shape), (0, *shape[1:]), (*shape[:-1], 7)]))
    dtype = dtype or draw(st.sampled_from(OTHERS if odd == 1 else DTYPES))
    X = spoiled(normal(draw(SEEDS), *shape), draw(st.sampled_from(SPOILED)))
    if dtype in DTYPES:
        least, most = torch.finfo(dtype).tiny, torch.finfo(dtype).max
        size = 10.0 ** draw(st.sampled_from(DECADES))
        X = X * min(max(size, 10 * least), most / 10)
    X = arranged(X.to(dtype), draw(st.sampled_from(LAYOUTS)))
    if X.is_floating_point() and draw(st.booleans()):
        X.requires_grad_()
    return X


def spoiled(X, how):
    """X with a few bad numbers, or none."""
    if how in ("nan", "inf") and X.numel():
        X.view(-1)[0] = math.nan if how == "nan" else -math.inf
    elif how == "zero column" or how == "zeros":
        X[..., -1 if how == "zero column" else slice(None)] = 0
    elif how == "equal columns":
        X = X[..., :1].expand(X.shape).clone()
    return X


def arranged(X, layout):
    """The same numbers, otherwise laid out in memory; expanded: the first row of them, repeated."""
    if layout == "transposed":
        return X.mT.contiguous().mT if X.dim() > 1 else X
    if layout == "strided":
        return torch.stack([X, X], -1)[..., 0]
    if layout == "expanded":
        return X[:1].expand(X.shape)
    return X


# ------------------------------------------------------------------------------- how it is judged


def real(*Xs):
    """Whether these are matrices of floats, not empty."""
    return all(X.dtype in DTYPES and X.dim() == 2 and X.numel() for X in Xs)


def finite(*Xs):
    """Whether all numbers are finite."""
    return all(bool(X.isfinite().all()) for X in Xs)


def mild(*Xs):
    """Whether the numbers are finite and the columns of a size that no square leaves the range."""
    sizes = [X.detach().double().abs().reshape(-1, X.shape[-1]).amax(0) for X in Xs]
    return finite(*Xs) and all(((size > 1e-4) & (size < 1e4)).all() for size in sizes)


def wide(X):
    """The numbers in float64, without a gradient."""
    return X.detach().to(F64)


def single(*dtypes):
    """The dtype that is computed in: at least float32."""
    return torch.promote_types(max(dtypes, key=eps), F32)


def state(X):
    """All that a function could change of its argument."""
    kept = X.dtype, X.shape, X.stride(), X.requires_grad, X.grad is None, X._version
    return (*kept, repr(X.tolist()))


def judge(call, given, fits, well, correct, blind=False):
    """Make the call, whose tensors are `given`, and judge its outcome.

    fits: an answer would make sense; well: there has to be one; blind: values are not looked at.
    """
    before = [state(X) for X in given]
    try:
        found = call()
    except (ValueError, TypeError, torch.linalg.LinAlgError) as error:
        assert not (fits and well()), error
        assert re.search("found|want|needs|converge", str(error)), error
    else:
        assert fits, "what does not fit was answered"
        results = found if isinstance(found, tuple) else (found,)
        if finite(*results):
            empty = not any(X.numel() for X in results)
            assert empty or finite(*given), "nan became a number"
            correct(*results)
        else:
            assert blind
            assert not well()
    assert [state(X) for X in given] == before, "an argument was changed"


# ------------------------------------------------------------------------------------------ HRA


def unit(U):
    """The columns in float64 at length 1, whatever their length; nan for zeros."""
    U = wide(U)
    U = U / U.abs().amax(0)
    return U / U.norm(dim=0)


@fuzz
def test_reflect(data):
    d = data.draw(SIZE)
    U, x = data.draw(tensors(d, data.draw(SIZE))), data.draw(tensors(3, d))
    fits = real(U) and x.dtype in DTYPES and x.shape[-1:] == U.shape[:1]

    def correct(y):
        assert y.dtype == x.dtype
        size = wide(x).abs().max() if x.numel() else 0.0
        bound = 200 * eps(x.dtype) * size + 100 * torch.finfo(x.dtype).tiny
        close(y, wide(x) @ hra.chain(unit(U)).T, bound)

    judge(lambda: hra.reflect(x, U), [U, x], fits, lambda: mild(U, x), correct, blind=True)


@fuzz
def test_gram_schmidt(data):
    U = data.draw(tensors(data.draw(SIZE), data.draw(st.integers(1, 3))))

    def well():
        s = torch.linalg.svdvals(unit(U)) if mild(U) else torch.zeros(1)
        return U.shape[1] <= U.shape[0] and s[-1] > 1e-3

    def correct(Q):
        bound = 100 * eps(single(U.dtype))
        close(Q.T @ Q, torch.eye(U.shape[1]), bound)
        R = wide(Q).T @ unit(U)
        close(R.tril(-1), 0 * R, bound)
        close(wide(Q) @ R, unit(U), bound)
        assert (R.diagonal() > 0).all()

    judge(lambda: hra.gram_schmidt(U), [U], real(U) and finite(U), well, correct)


# --------------------------------------------------------------------------------------- ReSoRA


@fuzz
def test_redundancy(data):
    r, metric = data.draw(st.integers(2, 4)), data.draw(st.sampled_from(resora.METRICS))
    B, S = data.draw(tensors(data.draw(SIZE), r)), data.draw(tensors(data.draw(SIZE), r))
    fits = real(B, S) and B.shape[1] == S.shape[1]

    def well():
        spread = wide(S) - wide(S).mean(0)
        return mild(B, S) and (spread.abs().amax(0) > 1e-2 * wide(S).abs().amax(0)).all()

    def correct(R):
        assert 0 <= R <= 1 + 1e-3
        if well():
            wanted = resora.redundancy_dense(wide(B), wide(S), metric)
            close(R, wanted, 1e4 * eps(single(B.dtype, S.dtype)))

    read = [S] if metric in ("linear", "nonlinear") else [B, S]
    judge(lambda: resora.redundancy(B, S, metric), read, fits, well, correct, blind=True)


@fuzz
def test_regauge(data):
    r, d = data.draw(SIZE), data.draw(SIZE)
    B, A, x = (data.draw(tensors(*shape)) for shape in ((data.draw(SIZE), r), (r, d), (4, d)))
    fits = B.dim() == A.dim() == 2 and B.shape[1] == len(A) and x.shape[-1:] == A.shape[1:]
    fits = fits and all(X.dtype in DTYPES and X.numel() and finite(X) for X in (B, A, x))

    def correct(B_new, A_new):
        size = r * wide(B).abs().max() * wide(A).abs().max()
        least = max(torch.finfo(X.dtype).tiny for X in (B, A))
        if size < math.inf:
            bound = 100 * eps(max(B.dtype, A.dtype, key=eps)) * size + 10 * least
            close(wide(B_new) @ wide(A_new), wide(B) @ wide(A), bound)

    def well():
        product = wide(B).norm() * wide(A).norm()  # all of it goes into A'
        return real(B, A) and mild(B, A, x) and product < torch.finfo(A.dtype).max

    judge(lambda: resora.regauge(B, A, x), [B, A, x], fits, well, correct, blind=True)


# ----------------------------------------------------------------------------------- EigenLoRAx


@fuzz
def test_principal_components(data):
    rows, center = data.draw(tensors(data.draw(SIZE), data.draw(SIZE))), data.draw(st.booleans())

    def correct(V, mean, sigma):
        X = wide(rows) - wide(rows).mean(0) * center
        size, bound = X.abs().max().clamp(min=1e-300), 100 * eps(single(rows.dtype))
        _, s, _ = torch.linalg.svd(X / size)
        close(V @ V.T, torch.eye(len(V)), bound)
        close(mean, wide(rows).mean(0) * center, bound * wide(rows).abs().max())
        close(sigma, size * s[: len(V)], bound * size + 1e-45)
        left = X / size - X / size @ wide(V).T @ wide(V)
        close(left.norm(), s[len(V) :].norm(), bound)

    def call():
        found = principal_components(rows, None, center)
        return found.V, found.mean, found.singular_values

    judge(call, [rows], real(rows) and finite(rows), lambda: mild(rows), correct)


# --------------------------------------------------------------------------------------- layers


@every
@fuzz
def test_layers(method, data):
    dtype = data.draw(st.sampled_from([F64, F32, BF16, F16]))
    base = nn.Linear(6, 5, bias=data.draw(st.booleans()), dtype=dtype)
    layer = wrap(method, base, data.draw(st.sampled_from([2, 4])))
    shape = data.draw(st.sampled_from([(6,), (3, 6), (2, 0, 6), (2, 3, 6), (2, 7)]))
    x = data.draw(tensors(*shape, dtype=dtype))

    def correct(y):
        assert y.dtype == dtype
        wanted = answer(copy.deepcopy(layer).double(), wide(x))
        size = 1 + (wide(x).abs().max() if x.numel() else 0.0)
        close(y, wanted, 1000 * eps(dtype) * size)

    judge(lambda: layer(x), [x], shape[-1] == 6, lambda: mild(x), correct, blind=True)
