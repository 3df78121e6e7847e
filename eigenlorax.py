# SPDX-License-Identifier: MIT
# EigenLoRAx (arXiv:2502.04700), written from the paper. One file, torch only: copy it.
# Cite: P. Kaushik, A. Vaidya, S. Chaudhari, A. Yuille. EigenLoRAx. arXiv:2502.04700, 2025.
# Version 2.0 (2026-11), tested with torch 2.11 to 2.14. Known faults of 1.0: training one task
# moved all the others, as they shared a tensor; an update kept less than the share asked for.
r"""EigenLoRAx — recycle the LoRA adapters you have; train only coefficients in their subspace.

A LoRA of one linear layer with d inputs and o outputs is a pair (B (o, r), A (r, d)): it adds
ΔW = B A to the weight. Take the adapters that others trained for many tasks. Stack the rows of
their A, and keep the K principal directions V_A of the stack; do the same with the columns of their
B. The paper's hypothesis is that a new task needs no new directions, only how much of each:

    ΔW(task) = s · V_Bᵀ α_B α_Aᵀ V_A                          [Sec. 3.2, as read in departure 1]

    subspaces = recycle(adapters, k=32)  # adapters: [{layer name: (B, A)}, …], see `lora_pairs`
    layers = adapt(model, subspaces, rank=4)  # freezes everything but the α, a new head too
    model.classifier.requires_grad_(True)  # if there is one
    loss = task_loss(model(x))  # and so on
    merge(model)  # after training: plain Linears again

The recycled adapters have m rows of A, the sum of their ranks. K is the number of directions, which
may differ for A and for B; an argument k is a rule, from which `choose_k` makes K. r is the rank of
the new LoRA. (The paper's App. A.2 calls r the number of columns of α, "not the rank"; the rank of
α_B α_Aᵀ is r at most.)

Symbols (rows, columns). torch's weight is (out, in), here (o, d).
  paper | here              | shape  | meaning
  W₀    | base.weight       | (o, d) | pre-trained weight, frozen
  V_A   | V_A               | (K, d) | principal directions of the rows of A, orthonormal
  V_B   | V_B               | (K, o) | principal directions of the columns of B, orthonormal
  α_A   | alpha_A[task]     | (K, r) | coefficients of one task, trained
  α_B   | alpha_B[task]     | (K, r) | coefficients of one task, trained, zero at first
  Ŵ     | rows              | (m, n) | all rows of A (n = d), or all columns of B (n = o)
  μ     | mean              | (n,)   | mean of the rows where they are centred, else zero
  σ     | singular_values   | (K,)   | of the rows, descending
  s     | scaling           | number | LoRA's lora_alpha / r, absent in the paper; it is no α
  P     | pseudo            | number | random directions that are appended to V

Where this file departs from the paper, and why:
  1. The paper prints h = W₀x + α_Bᵀ V_B α_Aᵀ V_A x. The shapes (r, K)(K, o)(r, K)(K, d) do not
     multiply. We read the B of the LoRA as V_Bᵀ α_B, which has B's shape (o, r).
  2. Algorithm 1 lays matrices (m, n) side by side, which gives directions of another length than
     the n of its V (K, n); we stack rows. It divides the mean by n, the length of a row; we divide
     by the number of rows.
  3. Algorithm 1 subtracts the mean row, and the forward has no term that adds it back. `recycle`
     does not subtract it: (−B, −A) is the same LoRA as (B, A), so a mean row has no meaning.
  4. The paper starts both α at random. We start α_B at zero, so that training starts at W₀.
  5. Where the paper uses a randomised SVD, this one is exact.

How to read: 1 components (Algorithm 1), 2 many adapters, 3 the layer, 4 a whole model,
5 PEFT's adapters, 6 numerics. A sentence that begins with "Claim" has a test of its number; the
order of the numbers has no meaning. Of part 6, `matrix`, `checked` and `listed` return their
argument or raise an error that says what is wrong with it; `naming` puts a layer's name before such
an error, and `normal`, `energy_of`, `at_least_float32`, `full_precision` are what their names say.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]  # (B (o, r), A (r, d)), ΔW = B A
Rule = int | float | str | None  # how many components: see `choose_k`

# ---------------------------------------------------------------- 1. components [Algorithm 1]
#
# Which K directions lose least of a stack X (m, n)? Write its singular value decomposition as
# X = U Σ V. From here on the rows of V are the right singular vectors (most books write Vᵀ), and
# V_K (K, n) is the first K of them. ‖·‖ is the Frobenius norm, ‖X‖² the sum of all squares: the
# energy of X. With uᵢ the columns of U and vᵢ the rows of V, X = Σᵢ σᵢ·uᵢvᵢ is a sum of matrices
# that are orthogonal to each other as lists of numbers, each of energy σᵢ². As vᵢvⱼᵀ is 1 for i = j
# and else 0, X V_KᵀV_K is the sum of the first K. What is lost is the rest,
#     ‖X − X V_KᵀV_K‖² = σ²_{K+1} + σ²_{K+2} + …,
# and no K directions lose less (Eckart and Young).
#
# Which coefficients c (m, K) bring c V_K nearest to rows X? Least squares gives the normal
# equations c·V_KV_Kᵀ = X V_Kᵀ. The rows of V_K are orthonormal, V_KV_Kᵀ = I, hence c = X V_Kᵀ.


@dataclass(eq=False)
class Components:
    """The K principal directions of a stack of rows, and how much of the stack they hold.

    V (K, n)              orthonormal rows; (K + p, n) if p pseudo-components stand below them
    singular_values (K,)  descending, one for each row of V that came from data
    mean (n,)             what was subtracted from every row; zero unless centred
    energy                of the whole stack after centring: Σσ² over all its σ, kept or not

    Claim 3. The K principal components of a stack leave energy − Σσ² of it, whatever K.
    """

    V: Tensor
    singular_values: Tensor
    mean: Tensor
    energy: float

    def project(self, rows: Tensor) -> Tensor:
        """The coefficients c (m, K) for which c V (plus the mean) is nearest to rows (m, n)."""
        return (matrix(rows, "rows").to(self.V) - self.mean) @ self.V.T

    def reconstruct(self, coefficients: Tensor) -> Tensor:
        """The rows (m, n) that coefficients (m, K) stand for.

        >>> held = Components(torch.tensor([[0.6, 0.8]]), torch.ones(1), torch.zeros(2), 1.0)
        >>> held.reconstruct(torch.tensor([[10.0]]))
        tensor([[6., 8.]])
        """
        return matrix(coefficients, "coefficients").to(self.V) @ self.V + self.mean


def choose_k(
    singular_values: Tensor, rule: Rule, shape: tuple[int, int], energy: float | None = None
) -> int:
    """How many components to keep of a stack of this shape (m, n), given all its σ, descending.

    None             the numerical rank: every σᵢ > eps·max(m, n)·σ₁, with eps of the σ's dtype
    an int           that many (the int 1 is one component)
    a float in (0, 1]  the fewest whose Σσ² is at least this share of `energy` (of all Σσ²)
    "gavish-donoho"  every σᵢ above ω·median, see `noise_threshold`

    Of a centred stack, give one σ and one row less: its rows add up to 0. `energy` is by default
    that of the given σ; if even all of them hold less than the share, all are kept. Raises
    ValueError for another rule, and where it asks for no component or for more than the numerical
    rank. (None may answer 0: a stack of zeros has no direction.)

    Claim 11. K by a share is the least K up to the rank that holds it; Gavish and Donoho's K is the
    planted rank where a low rank stands well above white noise, and the cubic is within 0.02 of
    their ω.

    >>> choose_k(torch.tensor([3.0, 1.0, 0.0]), 0.9, (3, 8))  # 9 of 9 + 1 is a share of 0.9
    1
    """
    sigma = singular_values.cpu()  # not every device has float64
    fits = sigma.dim() == 1 and sigma.is_floating_point() and sigma.isfinite().all()
    if not fits or not (sigma.diff(append=sigma.new_zeros(1)) <= 0).all():  # the last is ≥ 0
        raise ValueError(f"singular values {sigma.tolist()!r:.80}; want finite ones, descending")
    rank = int((sigma > max(shape) * torch.finfo(sigma.dtype).eps * sigma[:1]).sum())
    if rule is None:
        return rank
    if rule == "gavish-donoho" and rank:
        threshold = noise_threshold(shape) * sigma.double().quantile(0.5)
        K = min(rank, int((sigma > threshold).sum()))
    elif isinstance(rule, float) and 0 < rule <= 1 and rank:
        held = sigma.double().square().cumsum(0)
        whole = held[-1] if energy is None else energy
        K = min(rank, int((held < rule * whole).sum()) + 1)
    else:
        K = rule
    if type(K) is not int or not 1 <= K <= rank:
        raise ValueError(f"k = {rule!r} means {K!r}; want a rule or 1 to {rank}, numerical rank")
    return K


def noise_threshold(shape: tuple[int, int]) -> float:
    """ω(β): keep the σᵢ above ω times the median σ.                              [arXiv:1305.5870]

    Of all cutoffs this one has the least squared error, in the limit of large stacks, for a low
    rank in white noise. The cubic in β, the quotient of the stack's sides, is that paper's fit of
    it. White noise is a model: on real adapters the rule is a heuristic.
    """
    β = min(shape) / max(shape)
    return 0.56 * β**3 - 0.95 * β**2 + 1.82 * β + 1.43


# How to compute V_K. `by_svd` is the definition, and what float64 rows get. `by_gram` gives the
# same and is faster, if X is long or wide: XXᵀ = U Σ² Uᵀ and XᵀX = Vᵀ Σ² V, so the eigenvectors of
# the smaller of these two Gram matrices are U or V. If they are U, the rows of UᵀX = ΣV are σᵢvᵢ.
# Squaring halves the digits: an eigenvalue σᵢ² in float64 is good to about 1e-16·σ₁², so that a σᵢ
# below 1e-8·σ₁ is noise. The rank of float32 rows is cut at 1e-7·σ₁ or above, so for them that is
# enough; for float64 rows, whose rank is cut near 1e-16·σ₁, it is not.


def by_svd(X: Tensor, k: Rule, free: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """σ (K,) and V_K (K, n) of X (m, n). free is X's shape, one row less if X is centred."""
    _, sigma, V = torch.linalg.svd(X, full_matrices=False)
    K = choose_k(sigma[: min(free)], k, free)
    return sigma[:K], V[:K]


def by_gram(X: Tensor, k: Rule, free: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The same through the smaller Gram matrix, for float32 numbers X (m, n) held in float64."""
    wide = X.shape[0] < X.shape[1]
    G = X @ X.T if wide else X.T @ X
    squares, E = torch.linalg.eigh(G)  # ascending; the eigenvectors are columns
    sigma = squares.flip(0).clamp(min=0).sqrt()
    K = choose_k(sigma[: min(free)].float(), k, free)
    E = E.flip(1)[:, :K].T  # (K, m) or (K, n): the first K eigenvectors, as rows
    along = E @ X if wide else E  # (K, n), row i is σᵢvᵢ or vᵢ, orthogonal but for rounding
    V = torch.linalg.qr(along.T).Q.T  # orthonormal now; qr may turn a sign, which is free
    return sigma[:K], V


def principal_components(rows: Tensor, k: Rule = None, center: bool = True) -> Components:
    """The principal components of rows (m, n), as many as `choose_k` says.          [Algorithm 1]

    center=True, the default, is Algorithm 1 (as read in departure 2): V and μ, apart. Then V spans
    the rows less μ, and not the rows: for that it needs one row more, the unit vector along
    μ − μVᵀV, which is our remark. `recycle` does not centre.
    The computation is in float64 on the CPU; the answer is at least float32, on the rows' device.
    Rows in half precision have their rounding as further directions: give a k. Raises ValueError
    for nan, inf, or a k that `choose_k` refuses.

    Claim 1. V has orthonormal rows, and asking for more of them than the numerical rank is an error
    that names the rank.
    Claim 2. The singular values are those of an SVD in float64, up to max(m, n)·ε·σ₁²/σᵢ with the ε
    of float64, and up to their own rounding.

    >>> found = principal_components(torch.tensor([[3.0, 4.0], [6.0, 8.0]]), center=False)
    >>> found.V.abs(), found.singular_values.square()
    (tensor([[0.6000, 0.8000]]), tensor([125.]))
    """
    X = matrix(rows, "rows").detach().cpu().double()
    m, n = X.shape
    if not m or not n:
        raise ValueError(f"rows ({m}, {n}); want at least one row of at least one number")
    mean = X.new_zeros(n)
    if center:
        mean = X.mean(0)
        X = X - mean
    free = m - 1 if center else m  # centred rows add up to 0: one follows from the others
    decompose = by_svd if rows.dtype == torch.float64 else by_gram
    sigma, V = decompose(X, k, (free, n))
    like = torch.empty(0, dtype=at_least_float32(rows.dtype), device=rows.device)
    V = V.to(like).contiguous()  # safetensors wants it so
    return Components(V, sigma.to(like), mean.to(like), energy_of(X))


def augment(V: Tensor, p: int, generator: torch.Generator | None = None) -> Tensor:
    """V (K, n) and p random directions below it, (K + p, n).                        [Algorithm 1]

    They give a new task directions that the recycled adapters lack. They are drawn from a normal
    distribution and made orthonormal by qr, which is a stable Gram–Schmidt. Raises ValueError
    unless 0 ≤ p ≤ n − K.

    Claim 6. Up to n − K pseudo-components are orthogonal to V and orthonormal among themselves, to
    rounding.

    >>> augment(torch.tensor([[0.0, 1.0]]), 1)[1].abs()
    tensor([1., 0.])
    """
    K, n = matrix(V, "V").shape
    if type(p) is not int or not 0 <= p <= n - K:
        raise ValueError(f"{p!r} pseudo-components; want 0 to n − K = {n} − {K}")
    if p == 0:
        return V
    noise = normal((p, n), V, generator)
    Q = torch.linalg.qr(torch.cat([V.cpu().double(), noise.cpu().double()]).T).Q.T
    return torch.cat([V, Q[K:].to(V)])  # the first K rows of Q are ±V


# ---------------------------------------------------------------------------- 2. many adapters
#
# ΔW = B A = Σⱼ bⱼaⱼ reads its input through the rows aⱼ of A and writes through the columns bⱼ of
# B. So one layer has two stacks: all rows of A (m, d) and all columns of B (m, o), m the sum of the
# ranks. The size of a pair decides its weight in them: (cB, A/c) is the same LoRA as (B, A), yet it
# counts c² times as much in the stack of B and 1/c² times as much in that of A. Adapters of one
# recipe differ little in this. If yours do differ, balance each pair that is not 0, so that
# ‖A‖ = ‖B‖:    c = (A.norm() / B.norm()).sqrt();  B, A = c * B, A / c
# Or divide each factor by its own norm, and all adapters count alike: V needs directions only.


@dataclass(eq=False)
class Subspace:
    """What the adapters of one layer share: two Components, which are no factors of a LoRA."""

    A: Components  # A.V (K, d): the directions of the input that they read
    B: Components  # B.V (K, o): the directions of the output that they write


def recycle(
    adapters: Iterable[Mapping[str, Pair]],
    k: Rule = None,
    pseudo: int = 0,
    generator: torch.Generator | None = None,
) -> dict[str, Subspace]:
    """{layer name: Subspace} of adapters, each of them {layer name: (B (o, r), A (r, d))}.

    k is `choose_k`'s rule, for each stack; pseudo is the p of `augment`. An adapter need not have
    every layer, and ranks may differ. A mapping that reads from a file when it is asked for a layer
    is asked for one layer at a time. The stacks are not centred: other factors of the same ΔW, such
    as those of claim 8, have another mean. Raises ValueError for no adapter, shapes that do not
    fit, nan and inf, and for a k above the numerical rank; TypeError for what is no list of such
    mappings. An adapter much smaller than the others may lie below that rank: see above.

    Claim 5. The error of a recycled adapter, ‖ΔW − V_BᵀV_B ΔW V_AᵀV_A‖, never grows with K, and is
    zero at the rank of the stacks (not the numerical rank, below which a tiny adapter may lie).
    Claim 8. Ranks may differ, and (BQ, QᵀA) with an orthogonal Q recycles to the same subspace.

    >>> B, A = torch.tensor([[1.0], [2.0], [2.0]]), torch.tensor([[3.0, 4.0]])
    >>> found = recycle([{"q": (B, A)}, {"q": (2 * B, 2 * A)}])["q"]
    >>> found.B.V.abs(), found.A.V.abs()  # every ΔW here is a multiple of (1, 2, 2)ᵀ(3, 4)
    (tensor([[0.3333, 0.6667, 0.6667]]), tensor([[0.6000, 0.8000]]))
    """
    subspaces = {}
    for name, rows, columns in stacks(adapters):
        with naming(name):
            found = subspace_of(rows, columns, k)
            found.A.V = augment(found.A.V, pseudo, generator)
            found.B.V = augment(found.B.V, pseudo, generator)
        subspaces[name] = found
    return subspaces


def subspace_of(rows: Tensor, columns: Tensor, k: Rule) -> Subspace:
    """The components of all rows of A (m, d) and of all columns of B (m, o), not centred."""
    read = principal_components(rows, k, center=False)
    written = principal_components(columns, k, center=False)
    return Subspace(A=read, B=written)


def stacks(adapters: Iterable[Mapping[str, Pair]]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, all rows of A (m, d), all columns of B (m, o)) of each layer, one after the other."""
    adapters = listed(adapters)
    names = dict.fromkeys(name for adapter in adapters for name in adapter)  # each once, in order
    for name in names:
        rows, columns, shape = [], [], None
        for i, adapter in enumerate(adapters):
            if name in adapter:
                B, A = checked(adapter[name], shape, f"adapter {i}, {name!r}: ")
                rows.append(A)
                columns.append(B.T)
                shape = len(B), A.shape[1]  # the first one's: the others must have it as well
        yield name, stack(rows), stack(columns)


def stack(parts: list[Tensor]) -> Tensor:
    """Matrices (r, n), one below the other (m, n), in float32 if any of them is less than float64.

    In float64 the float32 rounding of some of them would count as further directions.
    """
    if any(X.dtype != torch.float64 for X in parts):
        parts = [X.float() for X in parts]
    return torch.cat(parts)


# Adapters that come later. V and σ depend on the stack X only through XᵀX, so that the stack itself
# need not be kept: the K rows diag(σ)V stand for it, since (diag(σ)V)ᵀdiag(σ)V = XᵀX if only
# rounding was dropped. If more was, XᵀX = (diag(σ)V)ᵀdiag(σ)V + R, where R, what was dropped, only
# adds: yᵀRy ≥ 0 for every y. Let V' and σ' be those of diag(σ)V with new rows Y below it. They hold
# ‖X V'ᵀ‖² + ‖Y V'ᵀ‖² of all the rows, which is at least ‖diag(σ)V V'ᵀ‖² + ‖Y V'ᵀ‖² = Σσ'². So V'
# misses at most energy − Σσ'². The next update adds another R, and the same follows again.
#     A share q can be kept for ever: if Σσ² ≥ q·energy, then with new rows of energy e all σ' hold
# together Σσ² + e ≥ q·(energy + e). K grows for it where the new rows have new directions.


def append(old: Components, rows: Tensor, k: Rule) -> Components:
    """The components of `old`'s stack, uncentred, with rows (m, n) below it; K by `choose_k`."""
    if rows.shape[1] != old.V.shape[1]:
        raise ValueError(f"rows {tuple(rows.shape)}; want (m, {old.V.shape[1]}), as before")
    if old.mean.any() or k == "gavish-donoho":  # its median needs the small σ, which were dropped
        raise ValueError("want uncentred components, and a k that is None, an int or a share")
    sigma = old.singular_values
    stands_for = sigma[:, None] * old.V[: len(sigma)]  # (K, n); pseudo-components are left out
    X = stack([stands_for, rows.to(old.V.device)])
    every = principal_components(X, None, center=False)
    energy = old.energy + energy_of(rows)
    K = choose_k(every.singular_values, k, X.shape, energy)
    return Components(every.V[:K], every.singular_values[:K], every.mean, energy)


def update(
    subspaces: Mapping[str, Subspace], adapters: Iterable[Mapping[str, Pair]], k: Rule = None
) -> dict[str, Subspace]:
    """What `recycle` gives for old and new adapters together, without the old ones.

    k is None, an int or a share. Layers that the new adapters lack stay as they are; new ones join.
    Layers that grow lose their pseudo-components: call `augment` again. Their V changes, and
    trained α do not fit it: move a task by new_layer.set_task(task, *old_layer.pair(task)). Raises
    what `recycle` raises.

    Claim 7. An update equals starting over while nothing was dropped. After any number of truncated
    updates V misses at most energy − Σσ² of all the rows ever stacked, and where every step asked
    for a share k, Σσ² is at least k·energy.
    """
    grown = dict(subspaces)
    for name, rows, columns in stacks(adapters):
        with naming(name):
            if name in subspaces:
                old = subspaces[name]
                grown[name] = Subspace(append(old.A, rows, k), append(old.B, columns, k))
            else:
                grown[name] = subspace_of(rows, columns, k)
    return grown


# -------------------------------------------------------------------------------- 3. the layer
#
# If the rows of a ΔW are combinations of V_A's rows, and its columns of V_B's rows, then ΔW is
# V_Bᵀ M V_A for a core M (K_B, K_A). A LoRA of rank r has the core M = s·α_B α_Aᵀ, and its factors
# are B = s·V_Bᵀ α_B and A = α_Aᵀ V_A. (α_A is the transpose of the coefficients of A's rows.)
#
# Served one task, a layer is a LoRA: B and A are formed, then y = W₀x + B A x. Served one task per
# sample, that would take a B and an A per sample. There the samples share the two products with V,
# and each has its own α between them: x → V_A x (K_A) → α_Aᵀ · (r) → α_B · (K_B) → V_Bᵀ · (o).
#
# Training starts at ΔW = 0, because α_B = 0. Let G (o, d) be the loss's gradient with respect to
# ΔW. That of α_A is s·V_A Gᵀ V_Bᵀ α_B, here 0; that of α_B is s·V_B G V_Aᵀ α_A. As α_A is random,
# it is 0 only if V_B G V_Aᵀ is: if no step within the subspaces helps.


class EigenLoRAxLinear(nn.Module):
    """y = base(x) + ΔW(task) x with ΔW(task) = s·V_Bᵀ α_B α_Aᵀ V_A. Only the α train.

    base      an nn.Linear, or a module with its in_features, out_features, weight and bias; frozen
    subspace  V_A and V_B, shared by all tasks
    rank      r, the columns of each α
    tasks     how many tasks this layer serves
    scaling   s; pairs from `lora_pairs` have it in B already, so the default is 1
    init      "zero": α_B = 0, ΔW = 0;  "random": both α random, as the paper starts
    task      (attribute) the active task: 0 at first; within `serving`, what that serves

    α_A and α_B are one Parameter per task. All of torch's optimisers but LBFGS skip a Parameter
    whose gradient is None, so that neither weight decay nor momentum moves a task that is not in
    the batch. Hence call zero_grad(), not zero_grad(set_to_none=False), which leaves zeros. (Before
    torch 2.13 a compiled mixed batch leaves them, too.) Raises ValueError or TypeError for
    arguments that do not fit.

    Claim 9. ΔW(task) = s·V_Bᵀ α_B α_Aᵀ V_A, merging changes outputs only by the rounding of W₀ + ΔW
    to W₀'s dtype, and with init="zero" a new task has ΔW = 0.
    Claim 12. In a batch of mixed tasks each sample gets from a layer, to rounding, what it gets
    alone.
    Claim 13. While some tasks train, with weight decay and momentum, the others keep every bit.

    >>> B, A = torch.tensor([[1.0], [2.0], [2.0]]), torch.tensor([[3.0, 4.0]])  # as at `recycle`
    >>> layer = EigenLoRAxLinear(nn.Linear(2, 3, bias=False), recycle([{"q": (B, A)}])["q"])
    >>> layer.set_task(0, torch.tensor([[3.0], [0.0], [0.0]]), torch.tensor([[5.0, 0.0]]))
    >>> layer.alpha_B[0].data.abs(), layer.alpha_A[0].data.abs()  # 3·1/3 and 5·3/5
    (tensor([[1.]]), tensor([[3.]]))
    >>> (layer.weight - layer.base.weight).detach()  # 1·3·(1, 2, 2)ᵀ/3·(3, 4)/5
    tensor([[0.6000, 0.8000],
            [1.2000, 1.6000],
            [1.2000, 1.6000]])
    """

    def __init__(
        self,
        base: nn.Module,
        subspace: Subspace,
        rank: int = 1,
        tasks: int = 1,
        scaling: float = 1.0,
        init: Literal["zero", "random"] = "zero",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_options(base, subspace, rank, tasks, scaling, init)
        device, dtype = base.weight.device, at_least_float32(base.weight.dtype)
        self.register_buffer("V_A", subspace.A.V.to(device, dtype, copy=True))  # (K_A, d)
        self.register_buffer("V_B", subspace.B.V.to(device, dtype, copy=True))  # (K_B, o)
        self.alpha_A = nn.ParameterList()
        self.alpha_B = nn.ParameterList()
        for _ in range(tasks):
            self.alpha_A.append(random_alpha(self.V_A, rank, generator))  # (K_A, r)
            self.alpha_B.append(random_alpha(self.V_B, rank, generator))  # (K_B, r)
        if init == "zero":
            for alpha in self.alpha_B:
                alpha.data.zero_()
        self.rank, self.tasks, self.scaling = rank, tasks, float(scaling)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.task: int | Tensor = 0
        self.gathered: tuple[Tensor, Tensor] | None = None  # of `serving`, for a batch of tasks
        self.base = base.requires_grad_(False)
        self.train(base.training)  # the mode of the layer that it replaces

    def pair(self, task: int | None = None) -> Pair:
        """The LoRA pair (B (o, r), A (r, d)) of one task, s folded into B; None: the active one."""
        task = one_task(self.task if task is None else task, self.tasks)
        alpha_A, alpha_B = self.alpha_A[task], self.alpha_B[task]
        refuse_unset(V_A=self.V_A, V_B=self.V_B, alpha_A=alpha_A, alpha_B=alpha_B)
        with full_precision(self.V_A):
            return self.scaling * self.V_B.T @ alpha_B, alpha_A.T @ self.V_A

    def forward(self, x: Tensor, task: int | Sequence[int] | Tensor | None = None) -> Tensor:
        """x (…, d) → (…, o). task: one for all, or one for each x[i]; None: the active one."""
        if not isinstance(x, Tensor) or x.shape[-1:] != (self.in_features,):
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x is {found}; want a tensor (…, {self.in_features})")
        y = self.base(x)
        x = x.to(y.dtype)  # a base, or autocast, may answer in another dtype
        if task is None and self.gathered is not None and not torch.is_grad_enabled():
            return y + self.delta_per_sample(x, *self.gathered)
        task = task_ids(self.task if task is None else task, self.tasks)
        if isinstance(task, Tensor):
            return y + self.delta_per_sample(x, *self.gather(task))
        B, A = self.pair(task)
        refuse_unset(x=x, A=A)
        return y + x @ A.T.to(x.dtype) @ B.T.to(x.dtype)

    def gather(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """α_A (batch, K_A, r) and s·α_B (batch, K_B, r) of the tasks ids (batch,).

        With gradients, only the tasks present are read, so that an absent one gets None and not
        zeros, which would still let it decay and drift. (An exported program reads all.)
        """
        every = range(self.tasks)
        if torch.is_grad_enabled() and not torch.compiler.is_exporting() and len(ids):
            alpha_A = torch.stack([self.alpha_A[task] for task in ids.tolist()])
            alpha_B = torch.stack([self.alpha_B[task] for task in ids.tolist()])
        else:
            alpha_A = torch.stack([self.alpha_A[task] for task in every])[ids]
            alpha_B = torch.stack([self.alpha_B[task] for task in every])[ids]
        refuse_unset(V_A=self.V_A, V_B=self.V_B, alpha_A=alpha_A, alpha_B=alpha_B)
        return alpha_A, self.scaling * alpha_B

    def delta_per_sample(self, x: Tensor, alpha_A: Tensor, s_alpha_B: Tensor) -> Tensor:
        """ΔW of its own task times x[i], for each x[i] of x (batch, …, d): (batch, …, o)."""
        if x.dim() < 2 or x.shape[0] != alpha_A.shape[0]:
            raise ValueError(f"{len(alpha_A)} tasks for x {tuple(x.shape)}; want one for each x[i]")
        if x.is_meta != alpha_A.is_meta:
            refuse_unset(x=x, alpha_A=alpha_A)
        codes = x @ self.V_A.T.to(x.dtype)
        codes = codes[:, None].flatten(1, -2)  # (batch, tokens, K_A), one token if x is (batch, d)
        codes = codes @ alpha_A.to(x.dtype) @ s_alpha_B.mT.to(x.dtype)  # (batch, tokens, K_B)
        return (codes @ self.V_B.to(x.dtype)).view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def set_task(self, task: int, B: Tensor, A: Tensor) -> None:
        """Give one task the ΔW in the subspace nearest to BA, without training.           [Table 4]

        The paper says "zero-shot" in two meanings: in its Table 4 for this projection of an adapter
        that exists, and in its Table 1 for a model with random, untrained α (init="random"), of
        which only the head is trained.

        The nearest is V_BᵀV_B·BA·V_AᵀV_A = V_Bᵀ M V_A with the core M = (V_B B)(A V_Aᵀ), as V_BᵀV_B
        and V_AᵀV_A are the orthogonal projections. So α_B = V_B B/s and α_A = V_A Aᵀ. Needs r ≤
        rank. Columns that the pair does not fill get α_B = 0 and keep their α_A: they add nothing
        to ΔW and can still train. (A column that is 0 in both α gets no gradient, ever.) A task
        moves to another subspace by new_layer.set_task(task, *old_layer.pair(task)). Raises
        ValueError for a larger r, other shapes, nan and inf.

        Claim 4. Projecting both factors gives the core M for which V_Bᵀ M V_A is nearest to ΔW.
        """
        task = one_task(task, self.tasks)
        alpha_A, alpha_B = self.nearest(B, A)
        r = alpha_A.shape[1]
        old_A, old_B = self.alpha_A[task], self.alpha_B[task]
        refuse_unset(B=B, alpha_A=old_A, alpha_B=old_B)
        filled = alpha_A.any(0) | alpha_B.any(0)  # (r,)
        old_A[:, :r] = torch.where(filled, alpha_A, old_A[:, :r])
        old_B.zero_()
        old_B[:, :r] = alpha_B

    @torch.no_grad()
    def nearest(self, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """The α_A (K_A, r) and α_B (K_B, r) of a pair, as `set_task` explains."""
        B, A = checked((B, A), (self.out_features, self.in_features), "")
        if len(A) > self.rank:
            raise ValueError(f"the pair has rank {len(A)}; want at most this layer's {self.rank}")
        with full_precision(self.V_A):
            alpha_A = self.V_A @ A.T.to(self.V_A)
            alpha_B = self.V_B @ B.to(self.V_B) / self.scaling
        return matrix(alpha_A, "α_A"), matrix(alpha_B, "α_B")

    def weight_of(self, task: int | None = None) -> Tensor:
        """W₀ + ΔW(task) (o, d), differentiable, in W₀'s dtype; task None: the active one."""
        W = self.base.weight
        B, A = self.pair(task)
        refuse_unset(weight=W, A=A)
        with full_precision(W):
            return (W.to(A.dtype) + B @ A).to(W.dtype)

    @property
    def weight(self) -> Tensor:
        """W₀ + ΔW of the active task (o, d).

        For torch modules that read a layer's weight and do not call it: nn.MultiheadAttention reads
        that of out_proj. Some models only look at its dtype in their forward (T5), so that reading
        raises nothing where there is no such weight: of a quantised base, to which ΔW cannot be
        added, it is the base's own, and with one task per sample it is empty.
        """
        if isinstance(self.task, Tensor):  # there is no one W₀ + ΔW: products with this fail
            return self.base.weight.new_empty(0)
        W = self.base.weight
        packed = W.shape != (self.out_features, self.in_features)  # as 4-bit weights are
        return W if packed or not is_plain(W) else self.weight_of()

    @property
    def bias(self) -> Tensor | None:
        """The base's bias (o,), or None."""
        return self.base.bias

    def merge(self, task: int | None = None) -> nn.Linear:
        """A plain frozen nn.Linear with the weight W₀ + ΔW(task); task None: the active one.

        W₀ + ΔW is rounded to W₀'s dtype; in bfloat16 an entry of ΔW below 1/256 of W₀'s is mostly
        lost. Raises TypeError for a quantised base, and for one whose forward is not nn.Linear's.
        """
        check_mergeable(self)
        bias = self.base.bias
        plain = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        plain.weight = nn.Parameter(self.weight_of(task).detach())
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach().clone())
        return plain.requires_grad_(False).train(self.training)


def random_alpha(V: Tensor, r: int, generator: torch.Generator | None) -> nn.Parameter:
    """α (K, r), normal with variance 1/K, so that a row of αᵀV has a length of about 1."""
    return nn.Parameter(normal((len(V), r), V, generator) / len(V) ** 0.5)


# ----------------------------------------------------------------------------- 4. a whole model


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


def layers_named(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """{dotted name in the model: the one of `names` that it fits}. Each must fit just one Linear.

    A layer's name in an adapter may lack the front that the model gives it.
    """
    fits = {}
    for name in names:
        found = find_layers(model, [name], nn.Linear)
        several = len(set(found.values())) > 1  # a shared layer has several names and is one
        if several or found.keys() & fits.keys():
            raise ValueError(
                f"{name!r} fits {few(found)}; want one layer of its own: name more of it"
            )
        fits |= dict.fromkeys(found, name)
    return fits


def adapt(
    model: nn.Module,
    subspaces: Mapping[str, Subspace],
    rank: int = 1,
    tasks: int = 1,
    scaling: float = 1.0,
    init: Literal["zero", "random"] = "zero",
    generator: torch.Generator | None = None,
) -> dict[str, EigenLoRAxLinear]:
    """Freeze `model` and wrap each Linear that `subspaces` names; {its whole name: wrapped layer}.

    The name of a subspace is the layer's whole name or the end of it ("0.query" finds
    "layer.0.query"), and must fit one layer. Raises ValueError, with the model as it was, if it
    does not, or if the shapes do not. What is returned means this model: after copy.deepcopy or
    AveragedModel, gather the EigenLoRAxLinear of the copy's named_modules() anew.

    Claim 10. Only coefficients train: tasks·(K_A + K_B)·r numbers a Linear. With query and value of
    12 blocks adapted, these are the paper's 24·(2 + 2)·1 = 96 (ViT, Appendix A.1.1) and
    24·(32 + 32)·8 = 12,288 (RoBERTa, Table 2: 12K).
    """
    fits = layers_named(model, subspaces)

    def wrap(name: str, linear: nn.Module) -> EigenLoRAxLinear:
        """The Linear with its subspace."""
        subspace = subspaces[fits[name]]
        return EigenLoRAxLinear(linear, subspace, rank, tasks, scaling, init, generator)

    return replace_layers(model, find_layers(model, fits, nn.Linear), wrap)


def set_task(
    layers: Mapping[str, EigenLoRAxLinear], task: int, adapter: Mapping[str, Pair]
) -> None:
    """`set_task` of every layer: task becomes the projection of a whole adapter {name: (B, A)}.

    Names may lack their front, as in `adapt`. A layer that the adapter lacks gets ΔW = 0. Raises
    ValueError, and changes nothing, if a pair fits no layer, or several, or not the one it names.
    """
    pairs = {}
    if not adapter:
        raise ValueError("the adapter has no pair; want one {layer name: (B, A)} or more")
    for name in adapter:
        hits = [full for full in layers if f".{full}".endswith(f".{name}")]
        if name in layers:
            hits = [name]
        if len({layers[full] for full in hits}) != 1 or hits[0] in pairs:
            found = few(hits) or "no layer"
            raise ValueError(f"{name!r} fits {found}; want one of its own of {few(layers)}")
        pairs[hits[0]] = adapter[name]
    for name, pair in pairs.items():
        with naming(name):
            layers[name].nearest(*checked(pair, None, ""))  # raises before anything is changed
    for name, layer in layers.items():
        layer.alpha_B[one_task(task, layer.tasks)].data.zero_()
        if name in pairs:
            layer.set_task(task, *pairs[name])


def merge(model: nn.Module, task: int | None = None) -> nn.Module:
    """Replace each EigenLoRAxLinear by its merged Linear, in place; return `model`.

    task None: each layer's active one. All are merged before the first is replaced: an error, which
    names its layer, leaves the model as it was. Merge before save_pretrained (from_pretrained would
    make the adapted layers anew, at random), tie_weights, resize_token_embeddings, and all else
    that takes a layer for a plain Linear.
    """
    modules = model.named_modules(remove_duplicate=False)
    layers = {name: m for name, m in modules if isinstance(m, EigenLoRAxLinear)}
    plain = {}  # layer: its Linear
    for name, layer in layers.items():
        try:
            plain[layer] = layer.merge(task)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    for name, layer in layers.items():
        if not name:  # the model is itself an adapted layer
            return plain[layer]
        model.set_submodule(name, plain[layer])
    return model


@contextmanager
def serving(
    layers: Mapping[str, EigenLoRAxLinear], task: int | Sequence[int] | Tensor
) -> Iterator[None]:
    """Within the block every layer serves `task`: an int, or one for each sample of the batch.

        with torch.no_grad(), serving(layers, [0, 2, 1]):  # x[0] is of task 0, x[1] of task 2, …
            y = model(x)

    The first axis of every adapted layer's input must be the sample. One block at a time in a
    process. Where gradients are off when the block begins, the coefficients are gathered once for
    all its forwards without gradients, which then do not see a change of α within the block. Raises
    ValueError if `task` is none of the layers' tasks.

    With other tools:
      checkpointing  call backward() within the block, as it runs the forward again
      torch.compile  give one id per sample, as an int makes a graph for each task; a mixed batch
                     with gradients breaks the graph
      FSDP2          turn gradients off inside the block
    """
    before = {layer: (layer.task, layer.gathered) for layer in layers.values()}
    ids = task_ids(task, min(layer.tasks for layer in before))
    try:
        for layer in before:
            layer.task, layer.gathered = ids, None
            if isinstance(ids, Tensor):
                layer.task = ids.to(layer.V_A.device)
                if not torch.is_grad_enabled():
                    layer.gathered = layer.gather(layer.task)
        yield
    finally:
        for layer, state in before.items():
            layer.task, layer.gathered = state


# A bank is what several tasks have in common, V, and what each has of its own, its α. Saved as
# {"NAME.V_A": …}, with safetensors or torch.save, it needs no other file beside the model. The
# trained parameters alone lack V: loaded over another V, they give another ΔW without an error.

FIELDS = {"V_A": 2, "V_B": 2, "alpha_A": 3, "alpha_B": 3, "scaling": 0}  # with their axes


def to_bank(layers: Mapping[str, EigenLoRAxLinear]) -> dict[str, Tensor]:
    """All that `layers` add to a model: V_A (K, d), V_B (K, o), α_A and α_B (tasks, K, r), s ()."""
    bank = {}
    for name, layer in layers.items():
        alphas = torch.stack([*layer.alpha_A]), torch.stack([*layer.alpha_B])
        values = (layer.V_A, layer.V_B, *alphas, torch.tensor(layer.scaling, dtype=torch.float64))
        for field, value in zip(FIELDS, values, strict=True):
            bank[f"{name}.{field}"] = value.detach().clone()
    return bank


def from_bank(model: nn.Module, bank: Mapping[str, Tensor]) -> dict[str, EigenLoRAxLinear]:
    """Adapt `model` with a bank from `to_bank`: {whole name: layer}, every task as it was saved.

    Raises ValueError, with the model as it was, if a tensor is missing, is none of a bank's, or
    does not fit the others or the model.
    """
    names = list(dict.fromkeys(key.rpartition(".")[0] for key in bank))
    wanted = {f"{name}.{field}": axes for name in names for field, axes in FIELDS.items()}
    odd = sorted(wanted.keys() ^ bank.keys())
    if odd:
        raise ValueError(f"the bank lacks, or has beside its own: {few(odd)}; want {few(FIELDS)}")
    for key, axes in wanted.items():
        if not isinstance(bank[key], Tensor) or bank[key].dim() != axes:
            raise ValueError(f"{key} is {bank[key]!r:.60}; want a tensor of {axes} axes")
    fits = layers_named(model, names)

    def load(name: str, linear: nn.Module) -> EigenLoRAxLinear:
        """The Linear with its part of the bank."""
        V_A, V_B, alpha_A, alpha_B, scaling = (bank[f"{fits[name]}.{field}"] for field in FIELDS)
        tasks, rank = alpha_A.shape[0], alpha_A.shape[-1]
        shapes = (tasks, len(V_A), rank), (tasks, len(V_B), rank)
        if (alpha_A.shape, alpha_B.shape) != shapes:
            found = f"α {tuple(alpha_A.shape)}, {tuple(alpha_B.shape)}"
            raise ValueError(f"found {found} with V of {len(V_A)}, {len(V_B)} rows; want {shapes}")
        subspace = Subspace(directions(V_A), directions(V_B))
        layer = EigenLoRAxLinear(linear, subspace, rank, tasks, float(scaling))
        for task in range(tasks):
            layer.alpha_A[task].data.copy_(matrix(alpha_A[task], "α_A"))
            layer.alpha_B[task].data.copy_(matrix(alpha_B[task], "α_B"))
        return layer

    return replace_layers(model, find_layers(model, fits, nn.Linear), load)


def directions(V: Tensor) -> Components:
    """Given directions V (K, n), which need not come from data, as Components."""
    return Components(V, V.new_zeros(0), V.new_zeros(V.shape[-1]), energy=0.0)


# --------------------------------------------------------------------------- 5. PEFT's adapters
#
# PEFT saves a LoRA as adapter_model.safetensors, tensors named NAME.lora_A.weight (r, d) and
# NAME.lora_B.weight (o, r), and adapter_config.json. Its ΔW is s·BA with s = lora_alpha/r, or
# lora_alpha/√r with use_rslora. Here s is folded into B. A pair holds nothing else that an adapter
# may have trained, so that everything else but a head is refused by name.

PREFIX = "base_model.model."
HEADS = ("classifier", "pre_classifier", "classification_head", "score", "qa_outputs", "head", "fc")
# Starts of names that no head has: of other methods' tensors, and to_q, to_k … of an attention.
OTHER_METHODS = ("lora", "lokr", "hada", "oft", "boft", "hra", "ia3", "vera", "dora", "to_")
PLAIN_STARTS = (None, False, True, "gaussian", "eva", "orthogonal", "mica")  # they leave W₀ alone
REFUSED = {  # field of the config: why an adapter that has it is not just W₀ + BA
    "use_dora": "DoRA also rescales W₀ + ΔW",
    "lora_bias": "a trained bias is no B·A",
    "trainable_token_indices": "an embedding is no Linear",
    "target_parameters": "its factors belong to parameters, not to Linears",
    "layer_replication": "its layers are not those of the base model",
    "kasa_config": "KaSA has a diagonal between B and A",
    "monteclora_config": "MonteCLoRA samples its factors",
    "arrow_config": "Arrow mixes several adapters for each token",
    "alora_invocation_tokens": "aLoRA acts on some tokens only",
    "use_qalora": "QALoRA pools the input of A",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
}


def lora_pairs(
    state_dict: Mapping[str, Tensor], config: Mapping[str, object] | None = None
) -> dict[str, Pair]:
    """{layer name: (B (o, r), A (r, d))} of a PEFT LoRA, with s folded into B, so that ΔW = B A.

    config is adapter_config.json; without one s = 1, or alpha/r where a file has NAME.alpha beside
    the pair. r is taken from the tensors, for each layer. Half precision becomes float32. Tensors
    of a head (see HEADS) are left alone. Raises ValueError for all that is not plainly W₀ + BA,
    TypeError for what is no tensor.

    >>> peft = {"q.lora_A.weight": torch.ones(1, 2), "q.lora_B.weight": torch.ones(3, 1)}
    >>> lora_pairs(peft, {"r": 1, "lora_alpha": 2})["q"][0].T
    tensor([[2., 2., 2.]])
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is a {type(state_dict).__name__}; want {{name: tensor}}")
    check_config({} if config is None else config)
    keys_A, keys_B, alphas = keys_by_kind(state_dict)
    if alphas and config is not None:
        raise ValueError(f"{few(alphas)}: alpha is in the file and in the config; want it once")
    pairs = {}
    for name in keys_A:
        B, A = state_dict[keys_B[name]], state_dict[keys_A[name]]
        B, A = checked((B, A), None, f"{name!r}: ")
        if name in alphas:
            s = float(state_dict[alphas[name]]) / len(A)
        else:
            s = peft_scale(name, len(A), config)
        sB = s * B.to(at_least_float32(B.dtype))
        pairs[name] = matrix(sB, f"{name!r}: s·B"), A.to(at_least_float32(A.dtype))
    return pairs


def keys_by_kind(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, str], ...]:
    """Three {layer name: key}: of the A, of the B, and of the alphas. Raises for other keys."""
    found = {"A": {}, "B": {}}
    others, labels = [], set()
    for key in state_dict:
        name, side, label = parse_key(key)
        labels.add(label)
        if side is None:
            others.append(key)
        elif name in found[side] or len(labels - {None}) > 1:
            raise ValueError(f"{key!r} is of a second adapter; want those of one adapter")
        else:
            found[side][name] = key
    A, B = found["A"], found["B"]
    alphas = {}
    for key in others:
        name, _, last = key.removeprefix(PREFIX).rpartition(".")
        if last == "alpha" and name in A:
            alphas[name] = key
        elif last in ("lora_A", "lora_B"):
            raise ValueError(f"{key!r} lacks '.weight' (loralib?); rename it, and give lora_alpha")
        elif name in A or not of_a_head(key):
            kinds = f"no lora_A.weight, no lora_B.weight, and in no head ({', '.join(HEADS)})"
            raise ValueError(f"{key!r} would be lost: it is {kinds}")
    if not A or A.keys() != B.keys():
        lone = sorted(A.keys() ^ B.keys())
        names = few(lone or state_dict)
        raise ValueError(f"found {names}; want lora_A.weight, lora_B.weight of each")
    return A, B, alphas


def parse_key(key: str) -> tuple[str, str | None, str | None]:
    """("encoder.q", "A", "") of "base_model.model.encoder.q.lora_A.weight", else (key, None, None).

    PEFT may put the adapter's own name between, as in "q.lora_A.default.weight"; it comes third.
    """
    name, _, tail = key.removeprefix(PREFIX).rpartition(".lora_")
    side, _, rest = tail.partition(".")  # "A", and "weight" or "default.weight"
    label, _, last = rest.rpartition(".")
    if name and side in ("A", "B") and last == "weight":
        return name, side, label
    return key, None, None


def of_a_head(key: str) -> bool:
    """Whether a tensor is a head's own: not another method's, nor of a layer deep in the trunk."""
    parts = key.removeprefix(PREFIX).split(".")
    foreign = any(part.startswith(OTHER_METHODS) for part in parts)
    return parts[0] in HEADS and parts[-1] in ("weight", "bias") and not foreign


def peft_scale(name: str, r: int, config: Mapping[str, object] | None) -> float:
    """s of one layer; 1 without a config. 8 is PEFT's own default for lora_alpha."""
    if config is None:
        return 1.0
    alpha, patterns = config.get("lora_alpha", 8), config.get("alpha_pattern") or {}
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):  # PEFT's patterns are regular expressions
            alpha = value
            break  # the first one counts
    if not isinstance(alpha, int | float):
        raise ValueError(f"{name!r}: lora_alpha is {alpha!r:.40}; want a number")
    return alpha / r**0.5 if config.get("use_rslora") else alpha / r


def check_config(config: Mapping[str, object]) -> None:
    """Raise ValueError, with the reason, if a PEFT config is not that of a plain LoRA."""
    if not isinstance(config, Mapping):
        raise TypeError(f"config is a {type(config).__name__}; want a mapping, as its to_dict()")
    kind, bias = config.get("peft_type", "LORA"), config.get("bias", "none")
    start = config.get("init_lora_weights")
    if kind != "LORA":
        raise ValueError(f"peft_type={kind}: no LoRA; want LORA")
    if bias != "none":
        raise ValueError(f"bias={bias}: a trained bias is no B·A; want none")
    if start not in PLAIN_STARTS:
        raise ValueError(
            f"init_lora_weights={start}: it may take its start off W₀; want a plain one"
        )
    for field, why in REFUSED.items():
        if config.get(field):
            raise ValueError(f"{field}={config[field]!r:.60}: {why}; want a plain LoRA")


def to_peft(
    layers: Mapping[str, EigenLoRAxLinear], task: int = 0, head: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """(state_dict, config) of one task, which PEFT loads as a LoRA; head {name: tensor} goes along.

    The task becomes pairs of factors, so that PEFT needs neither V nor α. s is in B already, and
    lora_alpha = r makes PEFT's own scale 1. Save them as adapter_model.safetensors and
    adapter_config.json.
    """
    state = {}
    for name, layer in layers.items():
        B, A = layer.pair(task)
        state[f"{PREFIX}{name}.lora_B.weight"] = B.detach().contiguous()
        state[f"{PREFIX}{name}.lora_A.weight"] = A.detach().contiguous()
    head = head or {}
    for name, tensor in head.items():
        state[PREFIX + name] = tensor.detach().clone()
    longest_first = sorted(layers, key=len, reverse=True)  # PEFT takes the first name that fits
    ranks = {name: layers[name].rank for name in longest_first}
    r = max(ranks.values())
    heads = sorted({name.rpartition(".")[0] for name in head})
    config = {
        "peft_type": "LORA",
        "target_modules": list(layers),
        "modules_to_save": heads or None,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
    }
    return state, config


# --------------------------------------------------------------------------------- 6. numerics
#
# What keeps the parts above true for half precision, autocast, quantised and meta tensors, and
# what refuses input that would give a wrong answer without a word.


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 of float64, float32 of everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(X: Tensor) -> torch.autocast:
    """A block without autocast, which would round products to half precision."""
    return torch.autocast("cpu" if X.is_meta else X.device.type, enabled=False)


def normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers in the dtype and on the device of `like`, drawn by `generator`."""
    where = generator.device if generator else like.device
    return torch.randn(shape, dtype=like.dtype, device=where, generator=generator).to(like.device)


def energy_of(X: Tensor) -> float:
    """‖X‖². Raises ValueError if X is so large or so small that its squares leave float64."""
    flat = X.detach().cpu().double().flatten()
    energy = float(flat @ flat)
    if flat.any() and not 1e-300 < energy < float("inf"):
        raise ValueError(
            f"rows up to {float(X.abs().max()):.3g}; want 1e-150 to 1e150, to be squared"
        )
    return energy


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Puts a layer's name in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None


def matrix(X: Tensor, what: str) -> Tensor:
    """X, if it is a finite floating-point matrix; else ValueError, TypeError if it is no tensor."""
    if not isinstance(X, Tensor):
        raise TypeError(f"{what} is a {type(X).__name__}; want a torch tensor")
    if X.dim() != 2 or not is_plain(X) or not (X.is_meta or X.isfinite().all()):
        total = X.sum().item() if is_plain(X) and not X.is_meta else "no number"
        found = f"{X.dtype} {tuple(X.shape)} summing to {total}"
        raise ValueError(f"{what}: found {found}; want finite floats (m, n)")
    return X


def checked(pair: Pair, shape: tuple[int, int] | None, where: str) -> Pair:
    """pair, if it is a finite (B (o, r), A (r, d)), of this shape (o, d) where one is given."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"{where}found a {type(pair).__name__}; want a pair (B, A), see lora_pairs")
    B, A = matrix(pair[0], f"{where}B"), matrix(pair[1], f"{where}A")
    o, d = shape or (len(B), A.shape[1])
    r = len(A)
    if B.shape != (o, r) or A.shape != (r, d) or B.numel() == 0 or A.numel() == 0:
        found = f"B {tuple(B.shape)}, A {tuple(A.shape)}"
        raise ValueError(f"{where}{found}; want ({o}, r) and (r, {d}), r ≥ 1")
    return B, A


def listed(adapters: Iterable[Mapping[str, Pair]]) -> list[Mapping[str, Pair]]:
    """The adapters as a list, if they are mappings and one of them has a layer."""
    if isinstance(adapters, Mapping):
        raise TypeError(f"found one {type(adapters).__name__}; want a list of adapters")
    adapters = list(adapters)
    for adapter in adapters:
        if not isinstance(adapter, Mapping):
            raise TypeError(
                f"found a {type(adapter).__name__}; want adapters {{layer name: (B, A)}}"
            )
    if not any(len(adapter) for adapter in adapters):
        raise ValueError(f"{len(adapters)} adapters, no layer; want {{layer name: (B, A)}}")
    return adapters


def check_options(
    base: nn.Module, subspace: Subspace, rank: int, tasks: int, scaling: float, init: str
) -> None:
    """Raise TypeError or ValueError for arguments of EigenLoRAxLinear that do not fit."""
    if not (getattr(base, "in_features", 0) and base.out_features and hasattr(base, "weight")):
        raise TypeError(f"the base is {type(base).__name__}; want an nn.Linear, not empty")
    if not isinstance(subspace, Subspace):
        raise TypeError(f"the subspace is a {type(subspace).__name__}; want what recycle returns")
    if not all(type(size) is int and size > 0 for size in (rank, tasks)):
        raise ValueError(f"rank = {rank!r}, tasks = {tasks!r}; want ints ≥ 1")
    if not 0 < abs(scaling) < float("inf") or init not in ("zero", "random"):
        raise ValueError(f"scaling {scaling}, init {init!r}; want finite ≠ 0, zero or random")
    for side, V, n in (
        ("V_A", subspace.A.V, base.in_features),
        ("V_B", subspace.B.V, base.out_features),
    ):
        if matrix(V, side).shape[1] != n or not len(V):
            hint = "; were all of its adapters 0?" if not len(V) else ""
            raise ValueError(f"{side} is {tuple(V.shape)}; want (K, {n}), K ≥ 1{hint}")


def task_ids(task: int | Sequence[int] | Tensor, tasks: int) -> int | Tensor:
    """task as an int, or as an int64 tensor of one per sample; ValueError if it is neither."""
    if isinstance(task, int) and not isinstance(task, bool):
        if 0 <= task < tasks:
            return task
        raise no_task(task, tasks)
    if isinstance(task, list | tuple) and any(isinstance(one, bool) for one in task):
        raise no_task(task, tasks)
    try:
        ids = torch.as_tensor(task)
    except (TypeError, ValueError, RuntimeError):
        raise no_task(task, tasks) from None
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not whole or ids.dim() > 1:
        raise no_task(task, tasks)
    ids = ids.long()
    if torch.compiler.is_compiling():  # there are no values yet: torch will refuse an index beyond
        return ids.where(ids >= 0, tasks)
    if not ((ids >= 0) & (ids < tasks)).all():
        raise no_task(task, tasks)
    return ids if ids.dim() else int(ids)


def no_task(task: object, tasks: int) -> ValueError:
    """The error for what is no task, or no list of tasks."""
    wanted = f"an int from 0 to {tasks - 1}, or one for each sample"
    hint = "for the base alone: a task with α_B = 0"
    return ValueError(f"task = {task!r:.60}; want {wanted} ({hint})")


def one_task(task: int, tasks: int) -> int:
    """task, if it is one task and not one per sample; ValueError otherwise."""
    ids = task_ids(task, tasks)
    if isinstance(ids, Tensor):
        raise ValueError(f"task = {task!r:.60}; want one int, not one for each sample")
    return ids


def refuse_unset(**tensors: Tensor) -> None:
    """Raise ValueError if some tensors are on the meta device and others are not.

    An offloaded weight is on meta, and cpu @ meta gives unset memory without an error.
    """
    meta = [name for name, X in tensors.items() if X.is_meta]
    if meta and len(meta) < len(tensors):
        raise ValueError(
            f"{few(meta)} on the meta device (offloaded?), unlike the rest; want values"
        )


def is_plain(W: Tensor) -> bool:
    """Whether ΔW can be added to W: not if it is quantised, or in float8 with a scale elsewhere."""
    return W.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_mergeable(layer: EigenLoRAxLinear) -> None:
    """Raise if the weight of a layer is not all that its base does."""
    base = layer.base
    if type(base).forward is not nn.Linear.forward:
        raise TypeError(
            f"the base is {type(base).__name__} with a forward of its own; want nn.Linear's"
        )
    if base._forward_pre_hooks or base._forward_hooks:
        raise TypeError("the base has a hook, as of weight_norm; want none: it would be lost")
    if base.weight.is_meta and hasattr(base, "_hf_hook"):  # accelerate offloaded it
        raise ValueError(
            "base.weight is on the meta device (offloaded?); want its values, to merge"
        )
    if not is_plain(base.weight):
        raise TypeError(f"the base weight is {base.weight.dtype}; want a float dtype, to add ΔW")
