# SPDX-License-Identifier: MIT
# ReSoRA (arXiv:2507.20745), formulas inferred. One file, torch only: copy it.
# Cite: "Regularizing Subspace Redundancy of Low-Rank Adaptation", ACM Multimedia 2025.
# Version 2.0 (2026-11). Tested with torch 2.11 to 2.14. Known faults, by version: 1.x kept dropout
# on in a model adapted in eval(), lost the step's inputs to generate(), and took KaSA for LoRA.
r"""ReSoRA — train LoRA so that its rank-one components do not repeat each other.

A LoRA of rank r adds ΔW = BA to a weight W. It is a sum of r components, ΔW = Σᵢ Bᵢ Aᵢᵀ: Bᵢ (o,) is
column i of B, and Aᵢ (d,) is row i of A, both as vectors. In parts 1 to 3, B means scaling·B with
LoRA's factor `scaling`, alpha/r; from part 4 on, B is the parameter. On inputs x (N, d), which are
N tokens, component i reads the number xₙ·Aᵢ from each token. These numbers are its code sᵢ = x Aᵢ
(N,), and the component adds the feature map ΔHᵢ = sᵢ Bᵢᵀ (N, o) to the layer's output. ReSoRA adds
to the loss how alike these maps are:

    L = L_task + λ · mean over layers and over pairs i < j of R(ΔHᵢ, ΔHⱼ)

    layers = adapt(model, ["q_proj", "v_proj"], rank=8)  # or a model with PEFT's LoRA
    regularizer = ReSoRA(model)
    loss = task_loss(model(x)) + 1.0 * regularizer.penalty()  # in each step, after the forward
    regularizer.remove()  # after training
    merge(model)  # plain Linears again

The paper has four kinds of R. Three facts about them, each shown below:
  - linear (the default) and nonlinear depend on the codes alone. They train A and give the B of the
    same layer no gradient at all; euclidean and cosine train both, but do nothing while B = 0.
  - cosine and linear exclude no ΔW. Every ΔW has factors for which cosine is 0 on all inputs, and
    linear on one given set of them; `regauge` computes these. (On other inputs like these linear is
    then about as small as chance lets it be.) What they change is the path of training. Nonlinear
    does exclude some ΔW.
  - euclidean falls when all components grow and cancel each other. Watch ‖Bᵢ‖ or use weight decay.

What differs from the paper. We had only its abstract and two summaries, not its equations; a
summary gives the scale β of its Eq. 5. In the docstrings [paper] marks what these say and
[inferred] what is our reading. A correction belongs in one `*_maps` function of part 1 and its twin
in part 2. Our x has tokens in rows, the paper's in columns: ΔHᵢ = BᵢAᵢᵀX there. We compute R from
codes and never build a feature map. The paper adds R to a LoRA that is already trained; here R may
also be on from the first step, with B = 0.

Symbols (rows, columns). torch's weight is (out, in), here (o, d).
  paper | here        | shape  | meaning
  W     | base.weight | (o, d) | pre-trained weight, frozen
  A     | A           | (r, d) | rows Aᵢ, trained
  B     | B           | (o, r) | columns Bᵢ, trained, zero at first
  W+ΔW  | weight      | (o, d) | adapted weight
  X     | x           | (N, d) | inputs, every leading axis flattened
  S=AX  | S           | (N, r) | codes, S = x Aᵀ, columns sᵢ
  R     | penalty()   | ()     | redundancy, mean over pairs, then over layers

How to read: 1 the four metrics on feature maps, 2 the same in closed form, 3 many factors of one
ΔW, 4 LoRA, 5 the regulariser, 6 a whole model, 7 numerics (guards that the formulas above it call).
"Claim 5" is tested by test_R5_… in tests/test_resora.py; the numbers are not in reading order.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import combinations
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Metric = Literal["euclidean", "cosine", "linear", "nonlinear"]
Level = Literal["feature", "weight"]
METRICS = get_args(Metric)  # the four names

# ------------------------------------------------------- 1. four metrics, on the feature maps
#
# These are slow and literal, one pair at a time: G and H are two feature maps (N, o), and ‖·‖ is
# the Frobenius norm, with inner product ⟨G, H⟩ = Σₙₘ GₙₘHₙₘ. The tests compare part 2 with them.
# All but euclidean are 0/0 where a map is 0, because Bᵢ or its code is 0, and linear and nonlinear
# also where a code is constant. Part 2 returns 0 there.


def euclidean_maps(G: Tensor, H: Tensor, beta: float = 1.0) -> Tensor:
    """exp(−β·d²) with d² the mean of (G − H)²: 1 for equal maps, near 0 for distant ones.

    [Euclidean distance and its scale β: paper, Eq. 5; exp, mean, β = 1: inferred]
    """
    return torch.exp(-beta * (G - H).square().mean())


def cosine_maps(G: Tensor, H: Tensor) -> Tensor:
    """cos² of the angle between the maps, each taken as one vector of N·o numbers.

    [cosine: paper; the square, one vector for all tokens: inferred]
    """
    return ((G * H).sum() / (G.norm() * H.norm())).square()


def linear_maps(G: Tensor, H: Tensor, center: bool = True) -> Tensor:
    """‖GᵀH‖² / (‖GᵀG‖·‖HᵀH‖), with the mean over the tokens subtracted from both maps.

    GᵀH (o, o) is then N times the covariance of G's features with H's. Another reading: ‖GᵀH‖² =
    tr(HᵀG GᵀH) = tr(GGᵀ HHᵀ) = ⟨GGᵀ, HHᵀ⟩. Setting H = G gives ‖GᵀG‖ = ‖GGᵀ‖. So this is the cosine
    of the kernels GGᵀ and HHᵀ (N, N), which hold the inner products of all pairs of tokens. It is
    known as CKA, centred kernel alignment. center=False subtracts nothing; part 5 uses it where the
    rows are coordinates of A and no sample of tokens.

    [norm of the cross-covariance, normalised: paper; square, centring, these norms: inferred]
    """
    if center:
        G, H = G - G.mean(0), H - H.mean(0)
    return (G.T @ H).norm().square() / ((G.T @ G).norm() * (H.T @ H).norm())


def rbf_kernel(H: Tensor, sigma: float) -> Tensor:
    """The RBF kernel exp(−‖hₙ − hₘ‖²/(2σ²v)) of all pairs of rows hₙ, hₘ of H, then centred (N, N).

    v is the mean of ‖hₙ − h̄‖², h̄ the mean row: multiplying H by a number changes nothing.

    To centre means: K holds the inner products of some features, Kₙₘ = ⟨φₙ, φₘ⟩, and wanted are
    those of φₙ minus the mean φ̄ of all φ. Multiplied out, ⟨φₙ − φ̄, φₘ − φ̄⟩ is
    Kₙₘ − (mean of row n) − (mean of column m) + (mean of all).
    """
    v = (H - H.mean(0)).square().sum(1).mean()
    distances = (H[:, None] - H[None]).square().sum(2)  # (N, N)
    K = torch.exp(-distances / (2 * sigma**2 * v))
    return K - K.mean(1, keepdim=True) - K.mean(0) + K.mean()


def nonlinear_maps(G: Tensor, H: Tensor, sigma: float = 1.0) -> Tensor:
    """The cosine of the two centred RBF kernels: as `linear_maps`, with another kernel.

    [RBF kernel: paper; CKA, the width σ·√v, σ = 1: inferred]
    """
    K, L = rbf_kernel(G, sigma), rbf_kernel(H, sigma)
    return (K * L).sum() / (K.norm() * L.norm())


def draw_tokens(S: Tensor, samples: int, generator: torch.Generator | int | None) -> Tensor:
    """At most `samples` rows of S (N, r), without repetition: a kernel of all N may be too large.

    generator: torch's, or the seed of one; None means the seed 0, and so the same rows in each
    call. The global generator is left alone.
    """
    if len(S) <= samples:
        return S
    if not isinstance(generator, torch.Generator):
        generator = torch.Generator().manual_seed(generator or 0)
    rows = torch.randperm(len(S), generator=generator, device=generator.device)[:samples]
    return S.index_select(0, rows.to(S.device, non_blocking=True))


def redundancy_dense(
    B: Tensor,
    S: Tensor,
    metric: Metric = "linear",
    *,
    beta: float = 1.0,
    sigma: float = 1.0,
    samples: int = 128,
    generator: torch.Generator | int | None = None,
    center: bool = True,
) -> Tensor:
    """Mean of R over the pairs i < j, from the feature maps sᵢBᵢᵀ of B (o, r) and codes S (N, r).

    beta belongs to euclidean, center to linear, and sigma, samples, generator to nonlinear.

    >>> B, S = torch.tensor([[1.0, 1], [0, 1]]), torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    >>> redundancy_dense(B, S, "cosine"), redundancy_dense(B, S, "linear")
    (tensor(0.1250), tensor(0.2500))
    """
    check_options(metric, beta, sigma, samples)
    check_factors(B, S)
    if metric == "nonlinear":
        S = draw_tokens(S, samples, generator)
    maps = [torch.outer(s, b) for s, b in zip(S.T, B.T, strict=True)]  # r of (N, o)
    values = [0 * S.sum()]  # what remains for r = 1, where there is no pair
    for G, H in combinations(maps, 2):
        if metric == "euclidean":
            values.append(euclidean_maps(G, H, beta))
        elif metric == "cosine":
            values.append(cosine_maps(G, H))
        elif metric == "linear":
            values.append(linear_maps(G, H, center))
        else:
            values.append(nonlinear_maps(G, H, sigma))
    return sum(values) / max(1, len(values) - 1)


# --------------------------------------------------------- 2. the same, without feature maps
#
# A feature map has rank one, so the inner product of two of them factors:
#
#     ⟨ΔHᵢ, ΔHⱼ⟩ = tr(ΔHᵢᵀ ΔHⱼ) = tr(Bᵢ sᵢᵀsⱼ Bⱼᵀ) = (BᵢᵀBⱼ)·(sᵢᵀsⱼ) = (BᵀB)ᵢⱼ·(SᵀS)ᵢⱼ
#
# So euclidean and cosine need no more than the Gram matrices BᵀB and SᵀS (r, r), and linear SᵀS of
# the centred codes; nonlinear needs the codes. Each function returns the matrix R (r, r) of all
# pairs. No tensor is larger than B, S or R, but for the r kernels (N, N) of nonlinear. All four
# take B and S, also where B is unused.

# A column whose root mean square is at most EPS is null: taken for 0, it repeats nothing.
EPS = 1e-6


def lengths(X: Tensor) -> Tensor:
    """The lengths (r,) of the columns of X (n, r), with ∞ for null ones: root mean square ≤ EPS.

    What is divided by ∞ is 0 and passes no gradient.

    Claim 6. B = 0, the start of LoRA, and any other null component give finite values and gradients
    in every metric.
    """
    length = X.norm(dim=0)
    length = length + 0 * length  # a length that overflowed becomes nan, and is not taken for null
    null = length <= EPS * len(X) ** 0.5
    return length.masked_fill(null, torch.inf)


def cosines(X: Tensor) -> Tensor:
    """The cosines (r, r) of all pairs of columns of X (n, r), 0 for null columns."""
    length = lengths(X)
    return (X.T @ X) / length[:, None] / length[None, :]


def euclidean(B: Tensor, S: Tensor, beta: float = 1.0) -> Tensor:
    """d² from inner products: ‖ΔHᵢ − ΔHⱼ‖² = ⟨ΔHᵢ, ΔHᵢ⟩ + ⟨ΔHⱼ, ΔHⱼ⟩ − 2·⟨ΔHᵢ, ΔHⱼ⟩.

    At B = 0 all maps are equal, so R = 1, and the gradient is 0. All maps times c > 1 multiply
    every d² by c² > 1, so R falls, unless all maps are equal. To see when the d² are large, sum
    that line over the pairs i < j: each ‖ΔHᵢ‖² occurs r − 1 times, and 2·Σ_{i<j} ⟨ΔHᵢ, ΔHⱼ⟩ is
    ‖Σᵢ ΔHᵢ‖² − Σᵢ ‖ΔHᵢ‖². So they are large for large maps whose sum, the output, is small.

    Claim 11. Σ_{i<j} ‖ΔHᵢ − ΔHⱼ‖² = r·Σᵢ ‖ΔHᵢ‖² − ‖Σᵢ ΔHᵢ‖², which quadruples when B doubles, and
    euclidean falls unless all maps are equal.
    """
    inner = (B.T @ B) * (S.T @ S) / (len(B) * len(S))  # (r, r), of all pairs, mean over N·o
    squares = inner.diagonal()
    squares = squares + 0 * squares  # ∞, an overflow, becomes nan
    d2 = squares[:, None] + squares[None, :] - 2 * inner
    return torch.exp(-beta * d2.clamp(min=0))  # rounding can make d² < 0


def cosine(B: Tensor, S: Tensor) -> Tensor:
    """cos² of the maps = (cos of Bᵢ and Bⱼ · cos of sᵢ and sⱼ)², as ‖ΔHᵢ‖ = ‖Bᵢ‖·‖sᵢ‖.

    It is for A's sake that a map is one vector for all tokens. Taken token by token, the codes
    would be single numbers, whose cosine is ±1, and A would train no more:

    Claim 4. For a single token with codes that are not 0, cosine is cos²(Bᵢ, Bⱼ), whatever the
    token, and A gets no gradient.
    """
    return (cosines(B) * cosines(S)).square()


def linear(B: Tensor, S: Tensor, center: bool = True) -> Tensor:
    """The squared correlation of the codes: in `linear_maps` B cancels.

    Subtracting the mean row from ΔHᵢ = sᵢBᵢᵀ subtracts the mean from sᵢ. With centred codes then,
    ΔHᵢᵀΔHⱼ = Bᵢ (sᵢᵀsⱼ) Bⱼᵀ = N·cov(sᵢ, sⱼ)·BᵢBⱼᵀ, and its norm is N·|cov(sᵢ, sⱼ)|·‖Bᵢ‖·‖Bⱼ‖.

    In the quotient of `linear_maps` N, ‖Bᵢ‖ and ‖Bⱼ‖ cancel, so B is unused. What is left is
    cov(sᵢ, sⱼ)² / (var(sᵢ)·var(sⱼ)). Independent normal codes have 1/(N − 1) on average, not 0.

    Claim 3. Centred, linear is ρᵢⱼ², the squared Pearson correlation of two codes, and B gets no
    gradient.
    """
    if center:
        S = centered(S)
    return cosines(S).square()


def nonlinear(B: Tensor, S: Tensor, sigma: float = 1.0) -> Tensor:
    """Rows n and m of ΔHᵢ are sₙᵢBᵢᵀ and sₘᵢBᵢᵀ, so they are ‖Bᵢ‖·|sₙᵢ − sₘᵢ| apart.

    The kernel divides by √v = ‖Bᵢ‖·(standard deviation of sᵢ), so ‖Bᵢ‖ cancels and B is unused.
    expm1 is exp − 1: centring removes the 1 anyway, and digits are kept where K is near 1. Centring
    the r kernels would copy them; it is done on their inner products. Let k and l (N,) be the means
    of the rows of K and L, and κ and μ the means of all their entries. Multiplied out, 1/N² times
    the inner product of the centred K and L is ⟨K, L⟩/N² − 2⟨k, l⟩/N + κ·μ. Independent normal
    codes have 0.074, 0.019, 0.0095, 0.0046 at 32, 128, 256, 512 tokens, not 0.

    Claim 9. Nonlinear sees what linear cannot. Let s₁ be normal numbers and their negatives, and s₂
    = s₁² − 1. Their covariance, the mean of s₁³, is 0, and so is linear; nonlinear was above 0.12
    in each draw of 64 tokens or more, three times what independent codes have on 64.
    """
    S = centered(S)
    N = len(S)
    z = (N / 2) ** 0.5 / sigma * (S / lengths(S)).T  # (r, N), standard deviation 1/(σ√2)
    K = torch.expm1(-(z[:, :, None] - z[:, None, :]).square())  # (r, N, N)
    flat = K.flatten(1)  # (r, N²)
    rows = K.mean(2)  # (r, N); K is symmetric, so these are the means of the columns too
    means = rows.mean(1)
    G = flat @ flat.T / N**2 - 2 * rows @ rows.T / N + torch.outer(means, means)
    squares = G.diagonal()
    length = squares.masked_fill(squares <= 0, torch.inf).sqrt()  # of a null code K is 0
    return G / length[:, None] / length[None, :]


def redundancy(
    B: Tensor,
    S: Tensor,
    metric: Metric = "linear",
    *,
    beta: float = 1.0,
    sigma: float = 1.0,
    samples: int = 128,
    generator: torch.Generator | int | None = None,
    center: bool = True,
) -> Tensor:
    """Mean of R over the pairs i < j of components, for B (o, r) and codes S (N, r).

    Options as for `redundancy_dense`. Half B and S are computed with in float32. A null component
    repeats nothing: its pairs count as 0. For cosine it has Bᵢ = 0 or sᵢ = 0; for linear and
    nonlinear a constant code, whatever Bᵢ. In euclidean two zero maps are equal, which is 1. Raises
    ValueError.

    Claim 1. Where no Bᵢ is null and no code is constant, redundancy equals redundancy_dense in
    every metric: value, gradient of B (None counts as 0) and gradient of S.

    Claim 7. One component, r = 1, gives 0 in every metric, and its gradient is 0.

    Claim 8. cosine, linear and nonlinear are in [0, 1] to rounding. Where no component is null,
    they do not depend on the order, signs and lengths of the components, and are 1 for equal ones.

    >>> B, S = torch.tensor([[1.0, 1], [0, 1]]), torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    >>> redundancy(B, S, "euclidean")  # exp(−(2 + 4 − 2·1·1)/(3·2))
    tensor(0.5134)
    >>> redundancy(B, S, "cosine"), redundancy(B, S, "linear")  # (1/√2)²·(1/2)², (−1/2)²
    (tensor(0.1250), tensor(0.2500))
    """
    check_options(metric, beta, sigma, samples)
    check_factors(B, S)
    with no_autocast(S):
        B, S = at_least_float32(B), at_least_float32(S)
        if metric == "euclidean":
            R = euclidean(B, S, beta)
        elif metric == "cosine":
            R = cosine(B, S)
        elif metric == "linear":
            R = linear(B, S, center)
        else:
            R = nonlinear(B, draw_tokens(S, samples, generator), sigma)
        pairs = len(R) * (len(R) - 1) // 2
        return R.triu(1).sum() / max(1, pairs)


# --------------------------------------------------------------- 3. many factors of one ΔW
#
# For every invertible M (r, r), (BM⁻¹)(MA) = BA: the factors can change while ΔW, and so the whole
# model, does not. Choosing factors is called choosing a gauge. R changes with M, so R is a property
# of the factors and not of ΔW. `regauge` finds factors where cosine is 0, and linear too:
#
# QR gives B = QU, Q (o, k) with orthonormal columns, U (k, r), k the smaller of o and r. Let C be
# UA, so BA = QC. Put any orthogonal V between the two, BA = (QV)(VᵀC), and call the new factors
# B' = QV and A' = VᵀC. The columns of B' are orthonormal, so cosine is 0. The codes are
# x A'ᵀ = (x Cᵀ)V, and centred they are TV with T = x Cᵀ centred. SVD gives T = PΣVᵀ, and with this
# V the codes are TV = PΣ: their columns are orthogonal, that is, uncorrelated, so linear is 0.
#
# Nonlinear cannot always be brought to 0, by any M. If x = (cos t, sin t) runs around a circle, the
# code of every row of A is a wave a·cos(t − φ). Two waves are alike, however far their phases φ are
# apart: least, with 0.071 (computed), a quarter turn apart, where they are uncorrelated.


@torch.no_grad()
def regauge(B: Tensor, A: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Other factors (B', A') of the same ΔW = BA, whose components do not repeat each other.

    B (o, r), A (r, d), x (…, d); B' and A' have the shapes and dtypes of B and A. Without x, T is
    Cᵀ, and A' has orthogonal rows; for level="weight", then, linear is 0. If r > o, the last r − o
    components are 0. If B = 0, both are returned unchanged: A' would be 0, and A is worth keeping.
    It is the control of an experiment with R: same ΔW and R ≈ 0, so does a low R help by itself?
    Raises ValueError.

    Claim 5. B'A' = BA for every N and r, to rounding, and cosine is 0 for B' and A'. Where T has
    full rank k, linear is 0 on the given x.

    (Full rank takes more tokens than k and a ΔW of rank k. Else some codes on x are 0 but for
    rounding, and linear may take the rounding for codes.)

    Claim 13. Nonlinear forbids some ΔW: for a ΔW of rank 2 and 16 or more inputs (cos t, sin t), in
    equal steps around a circle and all of them used, no factors B (o, 2) and A (2, 2) whose codes
    are not null bring it below 0.07.

    >>> B, A = regauge(torch.tensor([[3.0, 3], [4, 4]]), torch.tensor([[1.0, 0], [0, 2]]))
    >>> (B @ A).round(decimals=4)
    tensor([[3., 6.],
            [4., 8.]])
    """
    check_gauge(B, A, x)
    if not B.any():
        return B.clone(), A.clone()
    dtype = torch.promote_types(at_least_float32(B).dtype, at_least_float32(A).dtype)
    with no_autocast(B):
        Q, U = torch.linalg.qr(B.to(dtype))  # (o, k), (k, r), k the smaller of o and r
        C = U @ A.to(dtype)  # (k, d)
        T = C.T  # (d, k)
        if x is not None:
            T = centered(x.reshape(-1, x.shape[-1]).to(dtype) @ C.T)  # (N, k)
        T = torch.linalg.qr(T, mode="r").R  # at most (k, k), with the same TᵀT and so the same V
        V = torch.linalg.svd(T).Vh.T  # (k, k)
        spare = B.shape[1] - V.shape[1]  # r − k columns and rows of zeros
        C = V.T @ C
        size = C.abs().amax(1, keepdim=True)  # (k, 1); a norm's squares could vanish
        rounding = size <= 8 * torch.finfo(dtype).eps * size.max()
        C = C.masked_fill(rounding, 0.0)  # a component that ΔW does not have
        B, A = F.pad(Q @ V, (0, spare)).to(B), F.pad(C, (0, 0, 0, spare)).to(A)
    return B, A


# ---------------------------------------------------------------------------------- 4. LoRA


class LoRALinear(nn.Module):
    """y = base(x) + scaling·(x Aᵀ)Bᵀ with `base` frozen, A random and B = 0 at first.

    base       an nn.Linear, or a module with in_features, out_features, weight and bias; forward
               calls it and never opens it, so it may be quantised
    rank       r, the number of components
    alpha      scaling = alpha/rank; None: scaling = 1
    dropout    on the input of A
    generator  draws A, uniform in ±1/√d as PEFT does

    A and B are float32 for a half or quantised base. The layer is in the mode, train or eval, that
    `base` is in. Dropout acts in forward alone: a module that reads `weight` instead of calling the
    layer, as nn.MultiheadAttention does with out_proj, trains without it.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_layer(base, rank, alpha, dropout)
        W, d, o = base.weight, base.in_features, base.out_features
        dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
        A = torch.empty(rank, d, dtype=dtype, device=generator.device if generator else W.device)
        A.uniform_(-(d**-0.5), d**-0.5, generator=generator)
        self.A = nn.Parameter(A.to(W.device))  # (r, d)
        self.B = nn.Parameter(torch.zeros(o, rank, dtype=dtype, device=W.device))  # (o, r)
        self.scaling = 1.0 if alpha is None else alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.base = base.requires_grad_(False)
        self.train(base.training)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """y (…, o) for x (…, d), in the dtype of base's y. Further arguments go to base."""
        check_input(x, self.in_features, A=self.A, B=self.B)
        y = self.base(x, *args, **kwargs)
        S = F.linear(self.dropout(x), self.A.to(x.dtype)).to(y.dtype)  # (…, r)
        return y + F.linear(self.scaling * S, self.B.to(y.dtype))

    def pair(self) -> tuple[Tensor, Tensor]:
        """(B, A) with ΔW = B A: scaling·B (o, r) and A (r, d), differentiable."""
        return self.scaling * self.B, self.A

    @property
    def weight(self) -> Tensor:
        """W + ΔW (o, d), differentiable, in W's dtype. Of a quantised base it is the base's own."""
        W = self.base.weight
        if W.dtype not in FLOATS or W.shape != (self.out_features, self.in_features) or W.is_meta:
            return W
        return plus_product(W, *self.pair())

    @property
    def bias(self) -> Tensor | None:
        """The base's bias (o,), or None."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        """d."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """o."""
        return self.base.out_features

    def merge(self) -> nn.Linear:
        """A plain frozen Linear with weight W + ΔW, which shares no memory with this layer.

        A LoRALinear as base is merged too. Raises TypeError for a base that is quantised, or that
        computes something else than nn.Linear: its weight does not say what it does. Raises
        ValueError if one of its tensors is on the meta device and another is not.
        """
        base = self.base.merge() if isinstance(self.base, LoRALinear) else self.base
        check_mergeable(base, A=self.A, B=self.B)
        W = plus_product(base.weight, *self.pair()).detach()
        plain = nn.Linear(*W.T.shape, bias=False, device="meta")  # draws no random numbers
        plain.weight = nn.Parameter(W)
        if base.bias is not None:
            plain.bias = nn.Parameter(base.bias.detach().clone())
        return plain.requires_grad_(False).train(self.training)

    def extra_repr(self) -> str:
        """What repr() shows beside the base."""
        return f"rank={len(self.A)}, scaling={self.scaling:g}"


# ------------------------------------------------------------------------- 5. the regulariser
#
# Hooks record each layer's input x while the model runs, and `penalty` computes the codes x Aᵀ
# afterwards. Codes that were recorded instead would carry no gradient where gradient checkpointing
# runs the layers under no_grad. The mean over layers is [inferred], as is level="weight": [paper]
# compares it with the feature level, and our form of it is S = Aᵀ.


def codes(inputs: list[Tensor], A: Tensor) -> Tensor:
    """S = x Aᵀ (N, r) for the inputs of all calls of a layer, each (N, d)."""
    x = torch.cat(inputs) if len(inputs) > 1 else inputs[0]
    check_input(x, A.shape[1], A=A)
    with no_autocast(x):
        return x @ A.T.to(x.dtype)


def is_lora(module: nn.Module) -> bool:
    """LoRALinear, or a PEFT layer with an active adapter: it has {adapter: A} in lora_A."""
    if isinstance(module, LoRALinear):
        return True
    if not isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
        return False
    # PEFT keeps an embedding's factors apart; `check_peft` then says that it is no Linear.
    adapters = [*module.lora_A, *getattr(module, "lora_embedding_A", {})]
    return any(name in adapters for name in getattr(module, "active_adapters", []))


def lora_pair(name: str, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """(B (o, r), A (r, d)) of the layer of this name, with the scaling in B.

    The active adapters of a PEFT layer stand side by side. Raises ValueError if they are not plain.
    """
    if isinstance(layer, LoRALinear):
        return layer.pair()
    check_peft(name, layer)
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    B = [layer.scaling[adapter] * layer.lora_B[adapter].weight for adapter in active]
    A = [layer.lora_A[adapter].weight for adapter in active]
    return torch.cat(B, 1), torch.cat(A)


class ReSoRA:
    """Mean of R over every LoRA in `model`, LoRALinear and PEFT's, on the latest forward's inputs.

    metric        "linear", "euclidean", "cosine" or "nonlinear"; its options are `redundancy`'s
    level         "feature": codes of the inputs; "weight": codes S = Aᵀ of the inputs x = I, where
                  linear is not centred, as these rows are no sample (nonlinear is); needs no
                  forward and sets no hook
    detach_input  the R of a layer has no gradient on the layers before it (False: it has, but not
                  through reentrant checkpointing)

    The latest forward is the last call of `model` itself, not of a part of it, that had gradients.
    What runs under no_grad before `penalty`, such as generate() or a reference pass, is not
    recorded and erases nothing. Codes are of the input before dropout. A layer called twice in one
    forward has the tokens of both calls. A layer that does not run, or gets no token, is left out
    of the mean, and so is one whose weight is read without a call. Padding tokens count. Nothing
    may change a layer's input in place before the penalty, as x += layer(x) does. Nonlinear draws
    other tokens in each step, unless `generator` is a number.

    With other tools:
      PEFT             the active adapters of a layer are one set of components; attach anew after
                       set_adapter
      copies           a copy (copy.deepcopy, AveragedModel) needs a ReSoRA of its own: this one,
                       like what `adapt` returned, means the original's layers
      Trainer          add the penalty in compute_loss only `if model.training`, divided by
                       self.current_gradient_accumulation_steps where Trainer normalises the loss by
                       items in a batch
      torch.compile    attach before it; with fullgraph=True nonlinear cannot draw other tokens
      functional_call  (torch.func) call `penalty` within the function that it runs: after it the
                       model has its own parameters again, and the gradient is 0 without a word
      DDP              each process has its own R; with find_unused_parameters=True and
                       level="weight" compute it within the wrapped forward
      FSDP2            needs reshard_after_forward=False

    Claim 2. The weight level equals the feature level if xᵀx = c·I: for euclidean c = N/d, for
    cosine any c > 0, for linear any c > 0 if the columns of x have mean 0, and for nonlinear, with
    samples ≥ d, if x itself is a multiple of I up to the order of its rows.

    Claim 10. Attaching ReSoRA and computing a penalty changes no bit of an output, of a merged
    weight and of the global random state.

    Claim 12. With detach_input, the penalty alone gives B the gradient None in linear and
    nonlinear, which train A from the first step; in euclidean and cosine it trains both, and while
    B = 0 neither.
    """

    def __init__(
        self,
        model: nn.Module,
        metric: Metric = "linear",
        level: Level = "feature",
        detach_input: bool = True,
        **options,
    ) -> None:
        check_options(metric, **options)
        if level not in get_args(Level):
            raise ValueError(f"level: found {level!r}, want one of {get_args(Level)}")
        self.layers = {name: m for name, m in model.named_modules() if is_lora(m)}
        if not self.layers:
            raise ValueError(f"found no LoRALinear and no PEFT LoRA in {type(model).__name__}")
        for name, layer in self.layers.items():
            lora_pair(name, layer)  # raises if it must
        self.metric, self.level, self.detach_input = metric, level, detach_input
        self.options = {"center": level == "feature", **options}
        self.draws = 0  # calls of `penalty`; their number is the seed of nonlinear's draw of tokens
        self.inputs = {}  # layer's name: its inputs, each (N, d)
        self.recording = False
        self.hooks = []
        if level == "feature":
            self.attach(model)

    def attach(self, model: nn.Module) -> None:
        """Let the model say when its forward begins and ends, and the layers what they get."""
        self.hooks.append(model.register_forward_pre_hook(self.begin))
        for name, layer in self.layers.items():
            record = partial(self.record, name)
            self.hooks.append(layer.register_forward_pre_hook(record, with_kwargs=True))
        self.hooks.append(model.register_forward_hook(self.end, always_call=True))

    def begin(self, model: nn.Module, args: tuple) -> None:
        """Forget the last forward's inputs and record, if this forward has gradients."""
        self.recording = torch.is_grad_enabled()
        if self.recording:
            self.inputs = {}

    def end(self, model: nn.Module, args: tuple, output: object) -> None:
        """Record no more: backward may run the layers again, for checkpointing."""
        self.recording = False

    def record(self, name: str, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Keep the input of a layer."""
        if not self.recording or getattr(layer, "disable_adapters", False):
            return
        x = args[0] if args else kwargs["x"]
        x = x.reshape(-1, x.shape[-1])  # (N, d)
        if self.detach_input:
            x = x.detach()
        if len(x) > 0:
            self.inputs.setdefault(name, []).append(x)

    def penalty(self) -> Tensor:
        """The mean of R over the layers that ran; at level "feature" call it once after a forward.

        It forgets the inputs. Raises ValueError if there are none, or if a PEFT layer is merged.
        """
        inputs, self.inputs = self.inputs, {}
        self.draws += 1
        options = {"generator": self.draws, **self.options}
        values = []
        for name, layer in self.layers.items():
            if self.level == "feature" and name not in inputs:
                continue  # it did not run
            B, A = lora_pair(name, layer)
            S = A.T if self.level == "weight" else codes(inputs[name], A)  # (d or N, r)
            values.append(redundancy(B, S, self.metric, **options))
        if not values:
            raise ValueError(
                f"found no input of {few(self.layers)}; want a forward of the model with gradients"
                " before each penalty(): use `if model.training`, compile after ReSoRA(model)"
            )
        return torch.stack([value.to(values[0].device) for value in values]).mean()

    def remove(self) -> None:
        """Take the hooks off the model and forget the inputs; a second time does no harm."""
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.inputs = [], {}

    def __enter__(self) -> "ReSoRA":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


# --------------------------------------------------------------------------- 6. a whole model


def few(names: Iterable[str]) -> str:
    """The first five of `names` and how many there are, for an error message."""
    names = list(names)
    if len(names) <= 5:
        return ", ".join(names)
    return ", ".join(names[:5]) + f" … ({len(names)} in all)"


def find_layers(model: nn.Module, targets: str | Iterable[str], kinds) -> dict[str, nn.Module]:
    """{dotted name: layer} for the layers of the class or classes `kinds` that `targets` name.

    A target is a layer's whole name, which means that layer alone, or the end of one, in whole
    parts: "q" fits "encoder.q" and not "freq". Raises ValueError if there is no target, or if a
    target fits nothing, or something that is not of `kinds`.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    if not targets:
        raise ValueError("found no targets; want the name of a layer, or its end, at least once")
    modules = dict(model.named_modules(remove_duplicate=False))
    # A container has a name too, but nobody means it; a wrapper of one's own is refused below.
    containers = nn.Sequential, nn.ModuleList, nn.ModuleDict
    layers = {name: m for name, m in modules.items() if name and not isinstance(m, containers)}
    found = {}
    for target in targets:
        hits = [name for name in layers if f".{name}".endswith(f".{target}")]
        if target in layers:
            hits = [target]
        misfits = [name for name in hits if not isinstance(layers[name], kinds)]
        if misfits:
            kind = type(layers[misfits[0]]).__name__
            raise ValueError(f"{target!r} fits {few(misfits)}, a {kind}; want a layer to adapt")
        if not hits:
            names = [name for name, m in layers.items() if isinstance(m, kinds)]
            raise ValueError(f"no layer is named {target!r}; want names, no patterns: {few(names)}")
        found |= {name: layers[name] for name in hits}
    return found


def replace_layers(
    model: nn.Module, layers: Mapping[str, nn.Module], make: Callable[[str, nn.Module], nn.Module]
) -> dict[str, nn.Module]:
    """Freeze `model` and put make(name, layer) in the place of each layer; {name: new layer}.

    All of them are made before the first is put in its place: an error leaves the model as it was.
    A layer that has two names gets one new layer, under both.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    made = {}  # layer: its new layer
    for name, layer in layers.items():
        if layer in made:
            continue
        try:
            made[layer] = make(name, layer)
        except Exception as error:
            for p in trainable:
                p.requires_grad_(True)  # `make` freezes the layer that it takes
            if isinstance(error, TypeError | ValueError):
                raise type(error)(f"{name}: {error}") from None
            raise
    model.requires_grad_(False)  # the new layers are not part of it yet
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if layer in made:
            model.set_submodule(name, made[layer])
    return {name: made[layer] for name, layer in layers.items()}


def adapt(
    model: nn.Module, targets: str | Iterable[str], rank: int = 8, **options
) -> dict[str, LoRALinear]:
    """Freeze `model` and put a LoRALinear around each Linear that `targets` name; {name: layer}.

    options are those of LoRALinear. Raises ValueError or TypeError, with the model as it was.
    Merge before transformers' save_pretrained, tie_weights or resize_token_embeddings: they do not
    know these layers. A second `adapt` freezes the layers of the first.
    """
    layers = find_layers(model, targets, nn.Linear)

    def make(name: str, layer: nn.Module) -> LoRALinear:
        """A LoRALinear around this layer."""
        return LoRALinear(layer, rank, **options)

    return replace_layers(model, layers, make)


def merge(model: nn.Module) -> nn.Module:
    """Replace each LoRALinear of `model` by its merged Linear, in place; return `model`.

    All are merged before the first is replaced: an error leaves the model as it was. If `model` is
    a LoRALinear itself, its merged Linear is returned.
    """
    modules = model.named_modules(remove_duplicate=False)
    layers = {name: m for name, m in modules if isinstance(m, LoRALinear)}
    merged = {}  # layer: its Linear; a layer that has two names is merged once
    for name, layer in layers.items():
        try:
            merged[layer] = merged.get(layer) or layer.merge()
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    if model in merged:
        return merged[model]
    for name in reversed(layers):  # a LoRALinear that is the base of another goes first
        model.set_submodule(name, merged[layers[name]])
    return model


# -------------------------------------------------------------------------------- 7. numerics
#
# Nothing here belongs to the method. These are the guards that the parts above call in one line:
# for half precision, for PEFT's variants, for a tensor without numbers, and for wrong arguments.

# What one can compute with. Quantised weights are integers, or floats of 8 bits.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def at_least_float32(X: Tensor) -> Tensor:
    """X, in float32 if it is half: half sums over thousands of tokens are noise."""
    return X.to(torch.promote_types(X.dtype, torch.float32))


def no_autocast(X: Tensor) -> torch.autocast:
    """A block in which autocast does not turn the matrix products on X's device to half."""
    device = "cpu" if X.is_meta else X.device.type
    return torch.autocast(device, enabled=False)


def plus_product(W: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """W + B A in W's dtype, computed in at least float32 and rounded once."""
    with no_autocast(W):
        product = at_least_float32(B) @ at_least_float32(A)
        return (at_least_float32(W) + product).to(W.dtype)


def centered(S: Tensor) -> Tensor:
    """S (N, r) minus its mean over the tokens; a code within 64·eps of its mean becomes exactly 0.

    Subtracting the mean c of a constant code leaves rounding errors of some eps·|c|. Divided by
    their length, they would be a code like any other.
    """
    mean = S.mean(0)
    difference = S - mean
    rounding = 64 * torch.finfo(S.dtype).eps * mean.abs()
    constant = difference.detach().abs().amax(0) <= rounding
    return difference.masked_fill(constant, 0.0)


def check_options(
    metric: str,
    beta: float = 1.0,
    sigma: float = 1.0,
    samples: int = 128,
    generator: torch.Generator | int | None = None,
    center: bool = True,
) -> None:
    """Raise ValueError for an option that is out of range, and TypeError for an unknown one."""
    if metric not in METRICS:
        raise ValueError(f"metric: found {metric!r}, want one of {METRICS}")
    if not (0 < beta < torch.inf and 0 < sigma < torch.inf and samples >= 2):
        raise ValueError(f"found {beta=}, {sigma=}, {samples=}, want > 0, > 0, ≥ 2")


def check_factors(B: Tensor, S: Tensor) -> None:
    """Raise ValueError unless B (o, r) and S (N, r) are floats and not empty."""
    fit = B.dim() == S.dim() == 2 and B.shape[1] == S.shape[1]
    if not fit or not all(X.dtype in FLOATS and X.numel() for X in (B, S)):
        found = f"{tuple(B.shape)}, {tuple(S.shape)}, {B.dtype}, {S.dtype}"
        raise ValueError(f"B, S: found {found}, want floats (o, r), (N, r)")


def check_gauge(B: Tensor, A: Tensor, x: Tensor | None) -> None:
    """Raise ValueError unless B (o, r), A (r, d), x (…, d) fit, are finite and are not empty."""
    given = [B, A] if x is None else [B, A, x]
    fit = B.dim() == A.dim() == 2 and B.shape[1] == len(A)
    fit = fit and given[-1].shape[-1:] == A.shape[1:]
    fit = fit and all(X.dtype in FLOATS and X.numel() for X in given)
    if not fit or not all(X.isfinite().all() for X in given):
        found = [(tuple(X.shape), X.dtype) for X in given]
        raise ValueError(f"B, A, x: found {found}, want finite floats (o, r), (r, d), (…, d)")


def check_layer(base: nn.Module, rank: int, alpha: float | None, dropout: float) -> None:
    """Raise TypeError if base cannot be wrapped, ValueError for a number that is out of range."""
    if not (getattr(base, "in_features", 0) and base.out_features and hasattr(base, "weight")):
        raise TypeError(f"base: found {type(base).__name__}, want an nn.Linear, not empty")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank: found {rank!r}, want an integer ≥ 1")
    if not (abs(alpha or 0) < torch.inf and 0 <= dropout <= 1):
        raise ValueError(f"found {alpha=}, {dropout=}, want a number, 0 to 1")


def check_input(x: Tensor, d: int, **factors: Tensor) -> None:
    """Raise ValueError unless x is (…, d) and no factor is on meta if x is not.

    torch would multiply by unset memory.
    """
    if not isinstance(x, Tensor) or x.shape[-1:] != (d,):
        found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: found {found}, want (…, {d})")
    for name, factor in factors.items():
        if factor.is_meta and not x.is_meta:
            raise ValueError(f"{name}: found it on the meta device, without numbers; want it real")


def check_mergeable(base: nn.Module, **factors: Tensor) -> None:
    """Raise TypeError for a base whose weight does not say what it does, ValueError on meta."""
    if base.weight.dtype not in FLOATS:
        raise TypeError(f"base.weight: found {base.weight.dtype}, want one of {FLOATS} to merge")
    if type(base).forward is not nn.Linear.forward:
        kind = type(base).__name__
        raise TypeError(f"base: found a {kind}, want nn.Linear's forward; merge or unwrap it first")
    if base._forward_pre_hooks or base._forward_hooks:
        raise TypeError("base: found a hook, as of weight_norm, want none: it would be lost")
    tensors = {"base.weight": base.weight, **factors}
    offloaded = hasattr(base, "_hf_hook")  # by accelerate
    mixed = len({tensor.is_meta for tensor in tensors.values()}) > 1
    for name, tensor in tensors.items():
        if tensor.is_meta and (offloaded or mixed):
            raise ValueError(f"{name}: found it on the meta device, without numbers; want it real")


def check_peft(name: str, layer: nn.Module) -> None:
    """Raise ValueError unless ΔW of this PEFT layer is B A of its active adapters, not merged."""
    factors = [key for key, _ in layer.named_parameters() if key.startswith("lora_")]
    other = [key for key in factors if not key.startswith(("lora_A.", "lora_B."))]
    variants = getattr(layer, "lora_variant", {}).values()
    found = [type(variant).__name__ for variant in variants] + other
    if layer.merged:
        found.append("a merged adapter")
    if not all(isinstance(A, nn.Linear) for A in layer.lora_A.values()):
        found.append(f"a {type(layer).__name__} that is no Linear")
    if isinstance(layer.get_base_layer(), nn.MultiheadAttention):  # reads query, key and value
        found.append("an nn.MultiheadAttention")
    if hasattr(layer, "parameter_name"):  # an adapter of a bare parameter
        found.append(f"target_parameters {layer.parameter_name}")
    if not any(adapter in layer.lora_A for adapter in layer.active_adapters):
        found.append("no active adapter")
    if found:
        raise ValueError(f"{name}: found {few(found)}; want plain, unmerged LoRA of a Linear")
