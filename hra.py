# SPDX-License-Identifier: MIT
# HRA (arXiv:2405.17484v3), written from the paper. One file, torch only: copy it.
# Cite: Yuan, Liu, Xu, "Bridging the gap between low-rank and orthogonal adaptation", NeurIPS 2024.
# Version 2.0 (2026-11). Tested with torch 2.11 to 2.14. Known faults, by version: 1.x: nearly
# parallel columns at small d left H less orthogonal than claim 1 says; convolutions of a subclass
# merged into other numbers.
r"""HRA — Householder reflection adaptation.

A frozen linear layer computes z = W x. HRA trains r directions u₁ … u_r and puts one mirror per
direction in front of it:

    z = W H x,    H = H₁H₂…H_r,    Hᵢ = I − 2·uᵢuᵢᵀ/‖uᵢ‖²                                  [Eq. 1]

Hᵢ mirrors x in the hyperplane perpendicular to uᵢ. So H is orthogonal: it keeps every length and
the angle between any two inputs. Training minimises task loss + λ·Σ penalty(U), the sum over the
adapted layers. You choose λ ≥ 0, and penalty(U) is 0 where the uᵢ are perpendicular to each other.
With `strict`, H is made of the uᵢ orthonormalised: the paper's λ = ∞.                    [Eq. 6]

    layers = adapt(model, ["q_proj", "v_proj"], rank=8)  # freezes the rest, a new head too
    optimizer = torch.optim.AdamW([layer.U for layer in layers.values()], weight_decay=0)
    loss = task_loss(model(x)) + 1e-4 * sum(layer.penalty() for layer in layers.values())
    loss.backward()
    optimizer.step()
    merge(model)  # after training: plain layers again

Symbols (rows, columns). torch's weight is (out, in), here (o, d).
  paper     | here        | shape  | meaning
  W         | base.weight | (o, d) | pre-trained weight, frozen
  U_r       | U           | (d, r) | columns uᵢ, trained; any length but 0
  H⁽ʳ⁾      | chain(U)    | (d, d) | the product of the mirrors; orthogonal
  Γ_r       | gamma(U)    | (r, r) | upper triangular, H = I + U Γ Uᵀ
  W H⁽ʳ⁾    | weight      | (o, d) | adapted weight
  W U_r Γ_r | pair()[0]   | (o, r) | B of the equal LoRA, W H = W + B A (the paper's A)
  U_rᵀ      | pair()[1]   | (r, d) | A of the equal LoRA (the paper's B: it swaps LoRA's letters)

What differs from the paper: the r mirrors act at once, as Eq. 3 to 5 allow, where Eq. 2 applies one
after the other; a column may have any length, since only its direction counts; and training starts
as in the authors' code.
What differs from the authors' code: it multiplies r dense (d, d) matrices; it leaves the norm in
the penalty unsquared; with λ = ∞ it runs Gram–Schmidt on the equal columns that it starts with, and
so divides 0 by 0; and its LLaMA part mirrors the output of a layer, with an ε added to ‖u‖², so
that its matrix is not quite orthogonal.

What it costs. A layer trains d·r numbers (LoRA: (d + o)·r). For N rows of x its forward pass adds
4Ndr + 4dr² + 5r³ flops to the 2Ndo of W (r³ for S⁻¹, 4r³ for the Newton step of part 2), and with
`strict` a QR factorisation of U. It keeps x and x U for the backward pass, as LoRA keeps x and x
Aᵀ. Where x needs no gradient, as in a first layer, LoRA's backward pass skips W. HRA's cannot: W
stands between the loss and U.

How to read: 1 the definition, 2 the compact form, 3 the regulariser, 4 the layer, 5 a whole model,
6 convolutions and PEFT, 7 numerics (what guards against half precision and wrong arguments). A
sentence that begins with "Claim" has a test of its number, in floats up to rounding; the order of
the numbers has no meaning.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

# ------------------------------------------------------------------ 1. the definition [Eq. 1, 2]
#
# The part of x along u is (uᵀx/‖u‖²)·u. A mirror perpendicular to u turns that part round and
# leaves the rest of x:
#
#     x − 2·(uᵀx/‖u‖²)·u = (I − 2·uuᵀ/‖u‖²) x.
#
# This matrix is symmetric, and two reflections in one mirror lead back: HᵀH = HH = I, so H is
# orthogonal. A product of orthogonal matrices is orthogonal: (H₁H₂)ᵀ(H₁H₂) = H₂ᵀ(H₁ᵀH₁)H₂ = I.


def reflection(u: Tensor) -> Tensor:
    """H = I − 2·uuᵀ/‖u‖² (d, d) for one direction u (d,) of any length but 0, which gives NaN.

    >>> reflection(torch.tensor([1.0, 1.0]))  # swap and negate
    tensor([[ 0., -1.],
            [-1.,  0.]])
    """
    u = u / u.abs().max()  # the same mirror, and ‖u‖² neither overflows nor becomes 0
    I = torch.eye(len(u), dtype=u.dtype, device=u.device)
    return I - 2 * torch.outer(u, u) / (u @ u)


def chain(U: Tensor) -> Tensor:
    """H = H₁H₂…H_r (d, d) for U (d, r), mirror by mirror. Slow; the tests compare the rest to it.

    In H x the last column acts first.

    >>> chain(torch.tensor([[1.0, 2.0], [1.0, 0.0]]))  # H₂ negates the first, H₁ swaps and negates
    tensor([[ 0., -1.],
            [ 1.,  0.]])
    """
    check_matrix(U, "U")  # part 7: guards that change no number
    H = torch.eye(len(U), dtype=U.dtype, device=U.device)
    for u in U.T:  # u (d,), one column of U
        H = H @ reflection(u)
    return H


# ------------------------------------------------------------ 2. the compact form [Eq. 3, 4, 5]
#
# Applied one after the other, r mirrors are r passes over x, each needing the result of the one
# before. They collapse into two thin products, because
#
#     H₁…H_r = I + U Γ Uᵀ,    Γ = −S⁻¹.
#
# S holds the entries of UᵀU above the diagonal, half of those on it, and 0 below: S + Sᵀ = UᵀU. It
# is triangular with ‖uᵢ‖²/2 ≠ 0 on its diagonal, so S⁻¹ exists, for equal columns and r > d, too.
#
# Proof by induction over the columns. One mirror: S = ‖u‖²/2, so Γ = −2/‖u‖², which is Eq. 1.
# Now let U, S and Γ be those of the first i−1 columns, so H₁…Hᵢ₋₁ = I + U Γ Uᵀ. Multiply by the
# next mirror I − c·uuᵀ, where u = uᵢ and c = 2/‖u‖², and write g = Uᵀu:
#
#     (I + U Γ Uᵀ)(I − c·uuᵀ) = I + U Γ Uᵀ − c·(u + U Γ g)uᵀ
#                             = I + [U u] [[Γ, −c·Γg], [0, −c]] [U u]ᵀ                     [Eq. 4]
#
# By its definition S becomes [[S, g], [0, 1/c]], since half of ‖u‖² is 1/c. The inverse of that is
# [[S⁻¹, −c·S⁻¹g], [0, c]], as the product of the two is I. Its negative, with Γ for −S⁻¹, is
# [[Γ, −c·Γg], [0, −c]]: the matrix that the next mirror has made of Γ. ∎


def gamma(U: Tensor) -> Tensor:
    """Γ (r, r) with chain(U) = I + U Γ Uᵀ, in at least float32.                           [Eq. 4]

    Claim 3. gamma(U) is upper triangular, and is D⁻¹ M D⁻¹ where M is what the paper's recursion,
    Eq. 4 with c = 2, gives for the columns at length 1, and D the diagonal matrix of their lengths.

    Its entries go with 1/(‖uᵢ‖·‖uⱼ‖): in float32, lengths beyond about 1e±19 give inf or NaN.
    (`factors`, below, divides the lengths out first.)

    >>> gamma(torch.tensor([[1.0, 2.0], [1.0, 0.0]]))
    tensor([[-1.0000,  1.0000],
            [ 0.0000, -0.5000]])
    """
    with full_precision(U) as U:  # part 7: U is now in at least float32, and autocast is off
        G = U.T @ U  # (r, r)
        S = G.triu(1) + G.diagonal().diag() / 2  # (r, r), upper triangular
        I = torch.eye(len(S), dtype=S.dtype, device=S.device)
        Γ = -torch.linalg.solve_triangular(S, I, upper=True)
        # One Newton step. The computed Γ is −S⁻¹ but for rounding. Let E = I + SΓ, which would be 0
        # without it. Multiplied by S⁻¹, this says −S⁻¹ = Γ − S⁻¹E. The unknown −S⁻¹ stands on the
        # right too, but times the small E, so that Γ may take its place there: Γ + ΓE. In float32
        # with d = r = 128 and columns v + 0.1·noise, ‖error of H‖₂ fell from 24·d·eps to 3·d·eps
        # on the machine whose solve_triangular was least exact, on another from 6.5 to 3.8.
        return Γ + Γ @ (I + S @ Γ)


# Lengths. Scale the columns, U → U D with D diagonal. Then S → D S D, Γ → D⁻¹ΓD⁻¹, and U Γ Uᵀ stays
# as it is. So a column may have any length but 0. Below, columns are divided by their `sizes` (the
# next function), only so that squares neither overflow nor vanish. As H does not depend on these
# divisors, the gradient through them adds up to 0, and `detach` skips it.
#
# One more use of the proof. The last column of the new U Γ is −c·(u + U Γ g), and u + U Γ g is
# (I + U Γ Uᵀ)u, the product of the earlier mirrors times u. Later mirrors leave this column as it
# is (the 0 in Eq. 4's block matrix), and each column was the last once. So column i of U Γ is
# −(2/‖uᵢ‖²)·H₁…Hᵢ₋₁uᵢ. As mirrors keep lengths, its length is 2/‖uᵢ‖. Rounding disturbs that, most
# where columns are nearly parallel, and we set it again. In exact arithmetic this multiplies by the
# constant 1, so no gradient goes through it.


def sizes(U: Tensor) -> Tensor:
    """(r,) divisors: √d·max|entry| of each column, at least its length where that is finite."""
    s = U.detach().abs().amax(0) * len(U) ** 0.5
    return s.clamp(max=torch.finfo(s.dtype).max)


def factors(U: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A = Uᵀ and C = (U Γ)ᵀ, both (r, d), for U divided by its `sizes`: H = I + CᵀA.

    Claim 13. With aᵢ row i of A, row i of C is −(2/‖aᵢ‖²)·H₁…Hᵢ₋₁aᵢ, and its length is 2/‖aᵢ‖ to a
    few eps, however parallel the columns are.

    Claim 1. H is orthogonal, from chain(U) and as I + CᵀA: max|HᵀH − I| ≤ 10·d·eps for r ≤
    min(d, 512) and ≤ 20·max(d, r)·eps for more mirrors, in float32 and in float64.

    A and C come in the widest of `dtype`, float32 and U's own. They hold rows, not columns: on the
    CPUs where this was timed, the products behind a gradient of shape (r, d) took a third of the
    time of those behind one of shape (d, r).
    """
    with full_precision(U, dtype) as U:
        A = U.T.contiguous() / sizes(U)[:, None]
        C = gamma(A.T).T @ A
        product = A.detach().norm(dim=1) * C.detach().norm(dim=1)  # (r,), 2 without rounding
        return A, C * (2 / product)[:, None]


def reflect(x: Tensor, U: Tensor) -> Tensor:
    """H x for each row x of a tensor (…, d): as rows, x Hᵀ = x + (x Aᵀ) C, since Hᵀ = I + AᵀC.

    Claim 2. reflect(x, U) = x @ chain(U).T, so that reflect(x, U) @ W.T is W H x for each row.

    Claim 12. The gradients at x and at U are those of the literal chain.

    The dtype is that of x. Raises ValueError if x does not fit U. Values are not looked at, because
    that would wait for the device: a column that is 0 or not finite gives NaN.

    >>> reflect(torch.tensor([3.0, 5.0]), torch.tensor([[1.0, 2.0], [1.0, 0.0]])).round()
    tensor([-5.,  3.])
    """
    check_input(x, U)
    A, C = factors(U, x.dtype)
    return x + (x @ A.T.to(x.dtype)) @ C.to(x.dtype)  # (…, d) @ (d, r) @ (r, d)


# --------------------------------------------------------------------- 3. the regulariser [Eq. 6]
#
# The penalty pushes the mirrors towards being perpendicular to each other, the more so the greater
# λ is. Where they are, UᵀU is diagonal, S is half of it, and Γ = −2·diag(1/‖uᵢ‖²).
#
# In the limit λ = ∞ the columns are orthogonal, which needs r ≤ d. As H ignores their lengths, let
# these be 1, and let the columns be called Q. Then Γ = −2·I, and H = I − 2QQᵀ turns round the part
# of x in the span of Q. Its trace is d − 2·trace(QᵀQ) = d − 2r and that of I is d, so it is never
# I: with λ = ∞ training cannot start from the pre-trained layer.


def penalty(U: Tensor) -> Tensor:
    """‖I − ÛᵀÛ‖_F² with Û the columns of U at length 1: one number ≥ 0, in at least float32.

    Claim 7. penalty(U) = 0 exactly where the columns are orthogonal, and there
    Γ = −2·diag(1/‖uᵢ‖²).

    >>> penalty(torch.tensor([[3.0, 1.0], [4.0, 0.0]]))  # 2·cos² = 2·(3/5)²
    tensor(0.7200)
    """
    with full_precision(U) as U:
        U = U / sizes(U)  # so that the squares within the norm neither overflow nor vanish
        Û = U / U.norm(dim=0)
        return 2 * (Û.T @ Û).triu(1).square().sum()  # the diagonal of ÛᵀÛ is 1


def orthonormal(U: Tensor) -> Tensor:
    """Q (d, r) by Gram–Schmidt, from left to right, for columns that are known to be independent.

    Gram–Schmidt is the QR factorisation whose R has a positive diagonal. So multiplying the columns
    of Q by the signs of R's diagonal gives it.
    """
    with full_precision(U) as U:
        Q, R = torch.linalg.qr(U / sizes(U))
        return Q * R.detach().diagonal().sign()


def gram_schmidt(U: Tensor) -> Tensor:
    """Q (d, r), the columns of U made orthonormal from left to right (λ = ∞).           [Sec. 3.4]

    Claim 8. With Q in the place of U, H = I − 2QQᵀ, symmetric and of trace d − 2r, hence never I;
    columns that are not independent are refused.

    Raises ValueError unless U has full rank, up to rounding: an SVD, which waits for the device.

    >>> gram_schmidt(torch.tensor([[3.0, 0.0], [4.0, 5.0]]))
    tensor([[ 0.6000, -0.8000],
            [ 0.8000,  0.6000]])
    """
    check_columns(U, "U", strict=True)
    return orthonormal(U)


# ------------------------------------------------------------------------------- 4. the layer
#
# Where training starts. With equal neighbours, U = (u, u, v, v, …), each pair cancels, H₁H₂ =
# H₁H₁ = I, and the adapted model is the pre-trained one. It can leave that point. Let f(u, v) be
# the loss as a function of one pair. Moving both columns by the same δ leaves them equal and H = I:
# f(u + δ, u + δ) = f(u, u), and so ∂f/∂u + ∂f/∂v = 0 at u = v. The two gradients are opposite. In
# general neither is 0: move the first column alone, by a small δ perpendicular to u. To first order
# H₁, which was H₂, becomes H₂ − (2/‖u‖²)·(δuᵀ + uδᵀ). With H₂H₂ = I, uᵀH₂ = −uᵀ and δᵀH₂ = δᵀ,
#
#     H₁H₂ = I + (2/‖u‖²)·(δuᵀ − uδᵀ) + terms of order ‖δ‖²,
#
# a small rotation in the plane of u and δ. W turns with it, and a loss is seldom flat along every
# such turn; where it is not, ∂f/∂u ≠ 0, and a step moves u and v apart. The penalty cannot part a
# pair: it stays the same when two columns are exchanged, so equal columns get equal gradients.
#
# How long the columns are at the start. The authors' code calls kaiming_uniform_(a=√5) on a tensor
# (d, k) of the k different columns. That takes k for the number of inputs, and draws uniformly
# within ±√(6/((1 + a²)·k)) = ±1/√k. H ignores lengths: with the other columns held, f(tu) = f(u)
# for t > 0. The derivative of that by u is t·∇f(tu) = ∇f(u): gradients go with 1/‖u‖. So a learning
# rate from the paper is right only with these lengths. And weight decay on U regularises nothing:
# it shortens the columns, and angles then move faster. Use 0.
#
# How far r mirrors can move W [App. A], in the Frobenius norm, the root of the sum of the squared
# entries. All that I − H = −U Γ Uᵀ gives lies in the span of U. Let P be the projector on that
# span; its rank is at most r, and I − H = P(I − H). As ‖x − Hx‖ ≤ ‖x‖ + ‖Hx‖ = 2‖x‖, and the same
# holds of Hᵀ, a row times I − H is at most twice as long. With σ₁ ≥ σ₂ ≥ … the singular values of
# W, 0 beyond min(o, d), therefore
#
#     ‖W − W H‖_F = ‖W P (I − H)‖_F ≤ 2·‖W P‖_F ≤ 2·√(σ₁² + … + σ_r²).
#
# The last step is Ky Fan's: ‖W P‖_F² = trace(P WᵀW P), and on no r-dimensional subspace does WᵀW
# have a greater trace than on that of its first r eigenvectors, W's right singular vectors. With
# these for columns, I − H = 2P, and both ≤ are =.


def directions(
    d: int, k: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """k columns (d, k), entries uniform in [−1/√k, 1/√k], drawn where the generator lives."""
    where = device if generator is None else generator.device
    U = torch.empty(d, k, dtype=torch.float32, device=where)
    return U.uniform_(-(k**-0.5), k**-0.5, generator=generator).to(device)


def equal_pairs(
    d: int, r: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """U (d, r) = (u, u, v, v, …) for an even r.

    Claim 5. Equal pairs give H = I; there the gradients of a task's loss at the two columns of a
    pair are opposite, and those of the penalty are equal.
    """
    return directions(d, r // 2, device, generator).repeat_interleave(2, dim=1)


class HRALinear(nn.Module):
    """z = base(H x): a frozen Linear behind r trained mirrors of its input.               [Eq. 1]

    base       a Linear, or any module with its in_features, out_features, weight and bias. The
               forward pass calls it and never reads its weight, so it may be quantised.
    rank       r, the number of mirrors
    init       "identity": equal pairs, H = I, r even;  "random": any r, H ≠ I
    strict     λ = ∞: U passes through Gram–Schmidt; needs init="random" and r ≤ d
    generator  draws U; torch's global one if None

    Claim 11. H, the outputs and the penalty do not depend on the lengths ‖uᵢ‖, and the gradient at
    uᵢ goes with 1/‖uᵢ‖.

    U (d, r) is the one trained tensor: float64 if W is, else float32. Use no weight decay on it.
    The layer takes the mode of its base, training or evaluation. Raises TypeError for a base of
    another kind, and ValueError for an argument out of range or a loaded U without directions.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        init: Literal["identity", "random"] = "identity",
        strict: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        d = self.width(base)
        check_options(d, rank, init, strict)
        W = base.weight
        draw = equal_pairs if init == "identity" else directions
        U = draw(d, rank, W.device, generator)
        check_columns(U, "U", strict)
        self.U = nn.Parameter(U.to(torch.float64 if W.dtype == torch.float64 else torch.float32))
        self.base = base.requires_grad_(False)
        self.strict = strict
        self.training = base.training
        self.register_load_state_dict_pre_hook(check_loaded)

    @staticmethod
    def width(base: nn.Module) -> int:
        """d, the number of inputs that W multiplies."""
        if not (hasattr(base, "in_features") and hasattr(base, "weight")):
            raise TypeError(f"base: found {type(base).__name__}, want an nn.Linear or its like")
        return base.in_features

    def normals(self) -> Tensor:
        """The normals of the mirrors (d, r): U, or its Gram–Schmidt."""
        return orthonormal(self.U) if self.strict else self.U

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.base(reflect(x, self.normals()), *args, **kwargs)

    def pair(self) -> tuple[Tensor, Tensor]:
        """(B (o, r), A (r, d)): HRA is a LoRA whose B follows from its A.                   [Eq. 5]

        Claim 4. W H = W + B A with B = W U Γ and A = Uᵀ, so W H − W has rank at most r.

        In at least float32, differentiable. U stands for `normals()`, so with `strict` for Q. A
        convolution's W is (o, d) here, d = c·k·l.
        """
        W = weight_of(self)
        with full_precision(self.normals(), W.dtype) as U:
            _, C = factors(U)
            B = W.flatten(1).to(C.dtype) @ C.T  # W U Γ, its columns multiplied by sizes(U)
            return B / sizes(U), U.T

    @property
    def weight(self) -> Tensor:
        """W H in the shape and dtype of W, differentiable.

        Claim 6. (W H)(W H)ᵀ = W Wᵀ: the lengths of the neurons, which are the rows of W, and the
        angles between them are kept.

        Claim 9. For r ≤ d, ‖W − W H‖_F ≤ 2·√(σ₁² + … + σ_r²), with equality where U holds the first
        r right singular vectors of W.

        torch reads it where it uses a layer's weight without calling the layer: MultiheadAttention
        always, TransformerEncoderLayer in evaluation. Of a quantised base it is the base's own
        weight, since some models look at its dtype; `merge` refuses that.
        """
        W = self.base.weight
        # Quantised, or packed into another number of elements.
        if W.dtype not in FLOATS or W.numel() != self.out_features * len(self.U):
            return W
        W = weight_of(self)
        with full_precision(self.normals(), W.dtype) as U:
            A, C = factors(U)
            rows = W.flatten(1).to(C.dtype)
            return (rows + (rows @ C.T) @ A).view_as(W).to(W.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base (o,), or None: HRA has none of its own."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        """d."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """o."""
        return self.base.out_features

    def penalty(self) -> Tensor:
        """penalty(U), or 0 up to rounding if strict.                                        [Eq. 6]

        It reads U after the forward pass. Therefore:
        - with FSDP2, shard with reshard_after_forward=False;
        - in DDP with find_unused_parameters=True, call it within the wrapped forward, else backward
          ends in "ready only once";
        - with torch.func.functional_call, call it within the function that this runs, else it reads
          the module's own U and the gradient is 0;
        - where a trainer sums the losses of several batches for a step, divide λ by their number.
        """
        return penalty(self.normals())

    def plain_layer(self) -> nn.Module:
        """A layer of the base's shape, without numbers."""
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")

    def merge(self) -> nn.Module:
        """A new plain layer, frozen, with weight W H, rounded once to the dtype of W.

        Claim 10. The merged layer computes what forward computes, and merging costs O(d·r·(o + r))
        for r ≤ d.

        Raises TypeError if the base is quantised or has another forward than a plain layer, and
        ValueError if its weight or U alone is on the meta device, which holds no numbers. Of a
        layer wholly on meta it returns one on meta.
        """
        plain = self.plain_layer()
        check_mergeable(self, type(plain))
        plain.weight = nn.Parameter(self.weight.detach())
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone())
        return plain.requires_grad_(False).train(self.training)

    def extra_repr(self) -> str:
        """What repr() shows beside the base."""
        return f"rank={self.U.shape[1]}, strict={self.strict}"


# --------------------------------------------------------------------------- 5. a whole model


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
    model: nn.Module, targets: str | Iterable[str], rank: int = 8, **options: Any
) -> dict[str, HRALinear]:
    """Freeze `model` and put HRA around each Linear and Conv2d that `targets` name.

    A target is a layer's whole name or its end, as in `find_layers`; `options` are those of the
    layers. Returns {name: layer}. Raises TypeError or ValueError, with the model as it was, for a
    name or a layer that does not fit.

    Merge first if you then want to tie weights, resize embeddings, or save_pretrained the whole
    model: an adapted layer's tensors have other names ("q.base.weight", "q.U"), which
    from_pretrained does not find, and it would start the layer at random. A second `adapt` freezes
    the layers of the first: call requires_grad_(True) on their U. With reentrant checkpointing call
    the model's enable_input_require_grads(): a checkpoint none of whose inputs has a gradient gives
    none to U, and the penalty alone would train. And if you copy the model, gather the copy's
    layers from its named_modules(): what `adapt` returned still means the original's.
    """

    def make(name: str, layer: nn.Module) -> HRALinear:
        """The adapted layer."""
        kind = HRAConv2d if isinstance(layer, nn.Conv2d) else HRALinear  # HRAConv2d: part 6
        return kind(layer, rank, **options)

    layers = find_layers(model, targets, (nn.Linear, nn.Conv2d))
    return replace_layers(model, layers, make)


def merge(model: nn.Module) -> nn.Module:
    """Replace each adapted layer of `model` by its merged plain layer, in place; return `model`.

    All are merged before the first is replaced: an error, which names its layer, leaves the model
    as it was. If `model` is an adapted layer itself, its merged layer is returned.
    """
    modules = model.named_modules(remove_duplicate=False)
    layers = {name: m for name, m in modules if isinstance(m, HRALinear)}
    merged = {}
    for name, layer in layers.items():
        try:
            merged[layer] = layer.merge()
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    for name, layer in reversed(
        layers.items()
    ):  # "q.base", an adapter within "q", while "q" has it
        if name:
            model.set_submodule(name, merged[layer])
    return merged.get(model, model)


# ------------------------------------------------------------------ 6. convolutions and PEFT
#
# A convolution cuts patches of d = c·k·l numbers out of its input, c channels of k·l pixels, and
# multiplies each of them by its weight, seen as a matrix (o, d). HRA mirrors the patches. They
# overlap, so that mirroring the input itself cannot do it; the base runs with the weight W H.


class HRAConv2d(HRALinear):
    """z = conv(x; W H): a frozen nn.Conv2d whose patches are mirrored; else like HRALinear.

    The base's own stride, padding, dilation and padding mode hold. It must have one group: with
    more, each sees patches of its own channels, and which H each should have is not said. Raises
    TypeError for a class with a forward of its own, and for a weight that is quantised or computed
    from other tensors.
    """

    @staticmethod
    def width(base: nn.Module) -> int:
        """d = c·k·l."""
        kind = type(base)
        own = (kind.forward, kind._conv_forward) if isinstance(base, nn.Conv2d) else None
        if own != (nn.Conv2d.forward, nn.Conv2d._conv_forward):
            raise TypeError(f"base: found {kind.__name__}, want nn.Conv2d and its forward")
        if not isinstance(base.weight, nn.Parameter) or base.weight.dtype not in FLOATS:
            found = f"{type(base.weight).__name__} of {base.weight.dtype}"
            raise TypeError(f"base.weight: found a {found}, want a Parameter of floats")
        if base.groups > 1:
            raise ValueError(f"base.groups: found {base.groups}, want 1")
        return base.weight[0].numel()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        W = self.weight
        if not isinstance(x, Tensor) or x.shape[-3:-2] != W.shape[1:2]:
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x: found {found}, want (…, {W.shape[1]}, height, width)")
        if x.device != W.device:
            raise ValueError(f"x is on {x.device} and base.weight on {W.device}; want one device")
        return functional_call(self.base, {"weight": W}, (x, *args), kwargs)

    def plain_layer(self) -> nn.Module:
        """A layer of the base's geometry, without numbers."""
        b = self.base
        return nn.Conv2d(
            b.in_channels,
            b.out_channels,
            b.kernel_size,
            b.stride,
            b.padding,
            b.dilation,
            bias=b.bias is not None,
            padding_mode=b.padding_mode,
            device="meta",
        )

    @property
    def in_features(self) -> int:
        """d = c·k·l."""
        return self.base.weight[0].numel()

    @property
    def out_features(self) -> int:
        """o."""
        return self.base.out_channels


PREFIX = "base_model.model."  # of every name in an adapter that PEFT saved
HEADS = ("classifier", "pre_classifier", "classification_head", "score", "qa_outputs", "head", "fc")
# Starts of names that no head has: of other methods' tensors, and to_q, to_k … of an attention.
OTHER_METHODS = ("lora", "lokr", "hada", "oft", "boft", "hra", "ia3", "vera", "dora", "to_")


def is_head(name: str) -> bool:
    """Whether a tensor is a head's own: not another method's, nor of a layer deep in the trunk."""
    parts = name.split(".")
    foreign = any(part.startswith(OTHER_METHODS) for part in parts)
    return parts[0] in HEADS and parts[-1] in ("weight", "bias") and not foreign


def from_peft(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{layer's name: U (d, r)} of the tensors of an HRA adapter that PEFT saved.

        Us = from_peft(tensors)  # of adapter_model.safetensors; config of adapter_config.json
        layers = adapt(model, list(Us), config["r"], init="random", strict=config["apply_GS"])
        for name, U in Us.items():  # torch's own strict=False: the base's weights are not given
            layers[name].load_state_dict({"U": U}, strict=False)

    A head that was trained beside the adapter is left out: load it into the model yourself. Raises
    ValueError for every other key, such as a trained bias, norm or embedding, or the factors of
    another method, and for a column that is zero or not finite.

    >>> from_peft({"base_model.model.encoder.q.hra_u": torch.ones(1, 2)})
    {'encoder.q': tensor([[1., 1.]])}
    """
    Us = {}
    beside = []
    for key, tensor in state_dict.items():
        name = key.removeprefix(PREFIX)
        if key.startswith(PREFIX) and name.endswith(".hra_u") and name != ".hra_u":
            check_columns(tensor, key)
            Us[name.removesuffix(".hra_u")] = tensor
        else:
            beside.append(name)
    if not Us:
        raise ValueError(f"found {few(state_dict)}; want {PREFIX}NAME.hra_u")
    for name in beside:
        adapted = any(name.startswith(f"{layer}.") for layer in Us)
        if adapted or not is_head(name):
            kind = "a trained bias" if name.endswith(".bias") else "an unknown key"
            raise ValueError(f"found {kind}, {name!r}; want U's and a head: {', '.join(HEADS)}")
    return Us


def to_peft(
    modules: Mapping[str, HRALinear], head: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors that PEFT loads for {name: layer}, and for a head {parameter's name: tensor}.

    PEFT's HRAConfig then needs r, apply_GS = strict, the names as target_modules, and the names of
    the head's modules as modules_to_save.

    >>> list(to_peft({"encoder.q": HRALinear(nn.Linear(4, 3), 2)}))
    ['base_model.model.encoder.q.hra_u']
    """
    tensors = {f"{name}.hra_u": layer.U for name, layer in modules.items()}
    tensors |= head or {}
    return {PREFIX + name: tensor.detach().clone() for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------- 7. numerics
#
# Nothing below changes the mathematics above. On matrices that train, shapes and dtypes are looked
# at and values are not, because a value on a device must be waited for.

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def full_precision(U: Tensor, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """Give U in the widest of `dtype`, float32 and its own; within the block autocast is off.

    In half precision UᵀU loses its digits, and torch has no half solve_triangular and qr.
    """
    check_matrix(U, "U")
    kind = "cpu" if U.is_meta else U.device.type  # autocast knows no meta device
    with torch.autocast(kind, enabled=False):
        yield U.to(torch.promote_types(torch.promote_types(U.dtype, dtype), torch.float32))


def check_matrix(U: Tensor, name: str) -> None:
    """Raise ValueError unless U is a matrix of floats."""
    if not isinstance(U, Tensor):
        raise ValueError(f"{name}: found {type(U).__name__}, want a tensor (d, r)")
    if U.dim() != 2 or not U.numel() or U.dtype not in FLOATS:
        found = f"{U.dtype} of shape {tuple(U.shape)}"
        raise ValueError(f"{name}: found {found}, want floats (d, r), d and r ≥ 1")


def check_columns(U: Tensor, name: str, strict: bool = False) -> None:
    """Raise ValueError unless each column has a direction; strict: unless they are independent.

    Of a tensor without values, or of a DTensor, only the shape is looked at.
    """
    check_matrix(U, name)
    U = U.detach()
    if U.is_meta or type(U) is not Tensor:
        return
    for i, size in enumerate(U.abs().amax(0).tolist()):
        if not 0 < size < float("inf"):
            kind = "zero" if size == 0 else "not finite"
            raise ValueError(f"{name}: column {i} is {kind}; a mirror needs a direction")
    if strict:
        with full_precision(U) as U:
            U = U / sizes(U)
            rank = int(torch.linalg.matrix_rank(U / U.norm(dim=0)))
        if rank < U.shape[1]:
            raise ValueError(f"{name}: found rank {rank}, strict wants r = {U.shape[1]}")


def check_options(d: int, rank: int, init: str, strict: bool) -> None:
    """Raise ValueError unless these options of a layer of d inputs fit each other."""
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank: found {rank!r}, want an integer ≥ 1")
    if init not in ("identity", "random"):
        raise ValueError(f"init: found {init!r}, want 'identity' or 'random'")
    if strict and init == "identity":
        why = "I − 2QQᵀ has trace d − 2r, never I's, and equal columns are not independent"
        raise ValueError(f"strict: found init='identity', want 'random': {why}")
    if init == "identity" and rank % 2:
        raise ValueError(f"rank: found {rank}, init='identity' wants it even, for equal pairs")
    if strict and rank > d:
        raise ValueError(f"rank: found {rank}, strict wants at most d = {d} orthogonal columns")


def check_input(x: Tensor, U: Tensor) -> None:
    """Raise ValueError unless the rows of x have U's length and are where U is."""
    check_matrix(U, "U")
    if not isinstance(x, Tensor):
        raise ValueError(f"x: found {type(x).__name__}, want a tensor (…, {len(U)})")
    if x.shape[-1:] != U.shape[:1] or x.dtype not in FLOATS:
        found = f"{x.dtype} of shape {tuple(x.shape)}"
        raise ValueError(f"x: found {found}, want floats (…, d) with U's d = {len(U)}")
    if x.device != U.device:
        raise ValueError(f"U: found on {U.device}, want it where x is, on {x.device}")


def check_loaded(layer: HRALinear, state_dict: Mapping, prefix: str, *args: Any) -> None:
    """Before load_state_dict copies anything into a layer, refuse a U that has no mirrors."""
    U = state_dict.get(f"{prefix}U")
    if isinstance(U, Tensor) and U.shape == layer.U.shape:  # all else is torch's to report
        check_columns(U.to(layer.U.dtype), f"{prefix}U", layer.strict)


def weight_of(layer: HRALinear) -> Tensor:
    """W, if it can be multiplied by H; else TypeError or ValueError."""
    U, W = layer.U, layer.base.weight
    if W.dtype not in FLOATS:
        raise TypeError(f"base.weight: found {W.dtype}, quantised; want floats to multiply by H")
    if U.is_meta != W.is_meta:
        raise ValueError(f"found U on {U.device} and base.weight on {W.device}; want one device")
    return W


def check_mergeable(layer: HRALinear, kind: type) -> None:
    """Raise unless a plain layer of this kind with the weight W H does what `layer` does."""
    base = layer.base
    if weight_of(layer).is_meta and hasattr(base, "_hf_hook"):  # accelerate offloaded it
        raise ValueError("found U and base.weight on meta, without numbers; load them, then merge")
    if isinstance(base, HRALinear):  # an adapter inside this one is merged with it
        check_mergeable(base, kind)
    elif base._forward_pre_hooks or base._forward_hooks:
        raise TypeError("base: found a hook, as of weight_norm, want none: it would be lost")
    elif type(base).forward is not kind.forward:
        found = f"{type(base).__name__}, whose forward is not that of nn.{kind.__name__}"
        raise TypeError(f"base: found {found}; if it is an adapter, merge that one first")
