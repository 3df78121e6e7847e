# SPDX-License-Identifier: MIT
# EigenLoRAx (arXiv:2502.04700) in one self-contained file: copy it.
# Cite: P. Kaushik, A. Vaidya, S. Chaudhari, A. Yuille. EigenLoRAx: Recycling Adapters to Find
# Principal Subspaces for Resource-Efficient Adaptation and Inference. arXiv:2502.04700, 2025.
r"""EigenLoRAx: stack the LoRA adapters you have, keep their principal directions V, learn only α.

    h = W₀x + ΔW(task) x,   ΔW(task) = s · V_Bᵀ α_B α_Aᵀ V_A                        [Sec. 3.2]

Paper: Kaushik, Vaidya, Chaudhari, Yuille, arXiv:2502.04700, 2025 (title above).

Symbols: one frozen Linear with weight W₀ (o, d); m is the sum of the recycled adapters' ranks
  paper | here            | shape         | meaning
  W₀    | weight          | (o, d)        | frozen weight, plus ΔW of the active task
  V_A   | V_A             | (K, d)        | principal directions of A, orthonormal rows
  V_B   | V_B             | (K, o)        | principal directions of B; its K may differ
  α_A   | alpha_A         | (tasks, K, r) | what the tasks learn about A, r columns each
  α_B   | alpha_B         | (tasks, K, r) | what the tasks learn about B
  Ŵ     | rows            | (m, n)        | all rows of A (n = d), or all columns of B (n = o)
  μ     | mean            | (n,)          | mean of the rows; 0 unless center
  σ     | singular_values | (min(m, n),)  | of the rows, descending; a Subspace keeps the first K
  P     | pseudo          | number        | random directions appended to V       [Algorithm 1]
  s     | scaling         | number        | LoRA's α/r; 1, as `lora_pairs` folds it into B

Derivation
  1. ΔW = BA = Σⱼ bⱼaⱼᵀ reads x through rows aⱼ of A and writes through columns bⱼ of B. These
     vectors are what adapters can share: per module and side, stack them as the rows of X.
  2. X = UΣVᵀ. No K directions leave less of X than the first K right singular vectors, from
     here on the rows of V: ‖X − XVᵀV‖² = Σ_{i>K} σᵢ².                        [Eckart–Young]
  3. XXᵀ = UΣ²Uᵀ, XᵀX = VᵀΣ²V: the smaller Gram matrix has every σ, and V = Σ⁻¹UᵀX. Squaring
     halves the digits, so float32 rows get a float64 Gram matrix, float64 rows a thin SVD.
  4. VVᵀ = I, so the least-squares coefficients of any rows are X Vᵀ.
  5. V_BᵀV_B·BA·V_AᵀV_A is the orthogonal projection of BA on all matrices V_BᵀMV_A: M is
     (V_B B)(A V_Aᵀ) = α_B α_Aᵀ, and projecting the factors one by one is best for ΔW too.
  6. Centred directions alone lose μ. With the unit part of μ outside V as one more row, the
     span holds every row again, and 0, and step 5 applies.
  7. XᵀX = VᵀΣ²V: the K rows ΣV stand for all rows so far. Append the new rows, start over. If
     centred: x̄ of m new and μ of c old rows meet in one more row, √(cm/(c+m))·(x̄ − μ).
  8. α_B = 0 makes ΔW = 0, and ∂L/∂α_B = s·V_B (∂L/∂W) V_Aᵀ α_A is not 0 for random α_A.

Claims
  E1  V has orthonormal rows; more components than the numerical rank is an error naming it
  E2  singular values are those of the SVD, within eps·σ₁²/σᵢ
  E3  Σ_{i>K} σᵢ² is the squared reconstruction error, the mean restored where it was taken off
  E4  projecting both factors on an uncentred subspace gives the core nearest to ΔW
  E5  the error of the recycled adapters never grows with K and is zero at full rank
  E6  up to n − K pseudo-components are orthonormal to V and to each other, to rounding
  E7  update equals starting over while nothing was dropped; else error ≤ best + dropped
  E8  ranks may differ, and (BQ, QᵀA) with orthogonal Q recycles to the same uncentred subspace
  E9  ΔW(task) = s·V_Bᵀα_Bα_AᵀV_A, merge equals forward, a new task starts at ΔW = 0
  E10  only coefficients train: tasks·(K_A + K_B)·r numbers per Linear, the paper's counts
  E11  K by explained variance and by Gavish–Donoho, exact on planted rank plus white noise
  E12  every task of a mixed batch gets what it gets alone

Cost      components O(mn·min(m, n)) once. The forward adds O(min(NK, (N + K)r)·(d + o)) for N
          samples. T tasks hold K·(d + o) + 2TKr numbers, LoRA Tr·(d + o).
Differs from the paper: adapters are stacked as rows (stacked as columns, V has another length);
          uncentred by default, and a centred subspace contains the mean its forward has not;
          no randomised SVD, for hundreds of adapters neither; α_B starts at 0, not random
          (init="random" does that); A and B of every module may have a K of their own.
Differs from the authors' code: α_A, α_B start uniform in ±½ there. It decomposes by a general,
          not a symmetric, eigensolver or a randomised SVD, ignores each LoRA's scaling, takes
          off a mean that nothing restores, draws pseudo-components uniform in 0..1 and
          orthogonalises once, and holds V once per task. Written from the paper alone.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

Rule = int | float | str | None
Pair = tuple[Tensor, Tensor]
Adapters = Iterable[Mapping[str, Pair]]
Tensors = Mapping[str, Tensor]
Random = torch.Generator | None


def principal_components(rows: Tensor, k: Rule = None, center: bool = True) -> tuple[Tensor, ...]:
    """Return (V (K, n), mean (n,), all min(m, n) singular values) of rows (m, n), K by `choose_k`.

    Exact; in the dtype of rows, at least float32. The mean is 0 if not center. Raises ValueError
    on nan or inf, and for k above the numerical rank.                       [Alg. 1; steps 2, 3]
    >>> V, mean, s = principal_components(torch.tensor([[3.0, 4.0], [6.0, 8.0]]), center=False)
    >>> V.abs(), s[0] ** 2
    (tensor([[0.6000, 0.8000]]), tensor(125.))
    """
    X, dtype = _finite(rows, "rows").to(torch.float64, copy=True), _dtype(rows)
    mean = X.mean(0) * center
    V, s = _top(X.sub_(mean), k, dtype, len(X) - center)
    return V.to(dtype), mean.to(dtype), s.to(dtype)


def _dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays; everything else is held in float32, as half steps lose updates."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _finite(matrix: Tensor, what: str) -> Tensor:
    if matrix.dim() != 2 or not matrix.sum(dtype=torch.float64).isfinite():
        bad = matrix[~matrix.isfinite()][:1].tolist()
        raise ValueError(f"{what} is {tuple(matrix.shape)} with {bad}; want a finite matrix")
    return matrix


def _top(X: Tensor, k: Rule, dtype: torch.dtype, count: int, dropped: float = 0.0) -> Pair:
    """V (K, n), all σ of float64 X (m, n), which stands for count free rows of the given dtype."""
    m, n = X.shape
    if dtype == torch.float64:
        _, s, V = torch.linalg.svd(X, full_matrices=False)
    else:
        eigenvalues, U = torch.linalg.eigh(X @ X.T if m <= n else X.T @ X)
        s, U = eigenvalues.flip(0).clamp(min=0).sqrt(), U.flip(1)
    known = whole = s[:count].to(dtype)
    if isinstance(k, float):  # explained variance: of all there was, also what is gone
        whole = torch.cat([known, known.new_tensor([dropped**0.5])])
    K = min(choose_k(whole, k, (count, n)), choose_k(known, None, (count, n)))
    if dtype == torch.float32:
        V = U[:, :K].T if m > n else (U[:, :K] / s[:K]).T @ X
        V = torch.linalg.solve_triangular(torch.linalg.cholesky(V @ V.T), V, upper=False)
    return V[:K], s


def choose_k(singular_values: Tensor, rule: Rule, shape: tuple[int, int]) -> int:
    """Return K from all singular values, descending, of a stack of this shape (m, n).

    None: the numerical rank, the number of σᵢ > eps·max(m, n)·σ₁, eps of their dtype;
    int: itself; float in (0, 1]: the least K with Σ_{i≤K}σᵢ² ≥ rule·Σσᵢ²;
    "gavish-donoho": the number of σᵢ > ω·median, optimal for low rank plus white noise
    (arXiv:1305.5870), a heuristic on real adapters, whose noise is not white.
    For a centred stack m is one less. Raises ValueError for K = 0 or K > numerical rank.
    >>> choose_k(torch.tensor([3.0, 1.0, 0.0]), 0.9, (3, 8)), choose_k(torch.ones(4), None, (4, 8))
    (1, 4)
    """
    s, (m, n) = singular_values, shape
    K = rank = int((s > max(m, n) * torch.finfo(s.dtype).eps * s[:1]).sum())
    if rule is None:
        return rank
    if isinstance(rule, float) and 0 < rule <= 1:
        energy = s.double().square().cumsum(0)
        K = min(int((energy < rule * energy[-1:]).sum()) + 1, rank)
    elif rule == "gavish-donoho":
        K = min(int((s > _omega(min(m, n) / max(m, n)) * s.quantile(0.5)).sum()), rank)
    elif isinstance(rule, int) and not isinstance(rule, bool):
        K = rule
    else:
        raise ValueError(f"k = {rule!r}; want None, an int, a float in (0, 1] or 'gavish-donoho'")
    if not 1 <= K <= rank:
        raise ValueError(f"k = {rule!r} means {K} of {m} × {n}; want 1 to {rank}, numerical rank")
    return K


def _omega(beta: float) -> float:
    """ω(β): optimal threshold / median singular value of white noise, β = min/max of the shape."""
    cut = 2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1))
    theta = (torch.arange(100_000, dtype=torch.float64) + 0.5) * (math.pi / 100_000)
    t = 1 + beta - 2 * math.sqrt(beta) * theta.cos()  # eigenvalues, from (1 − √β)² to (1 + √β)²
    mass = (theta.sin().square() / t).cumsum(0)  # Marchenko–Pastur, up to a factor
    return math.sqrt(cut / float(t[torch.searchsorted(mass, mass[-1] / 2)]))


def augment(V: Tensor, p: int, generator: Random = None) -> Tensor:
    """Return orthonormal V (K, n) with p pseudo-components below it, (K + p, n), orthonormal.

    Gaussian, orthogonalised twice. Raises ValueError unless 0 <= p <= n − K.     [Algorithm 1]
    >>> augment(torch.tensor([[0.0, 1.0]]), 1).abs()
    tensor([[0., 1.],
            [1., 0.]])
    """
    if not 0 <= p <= V.shape[1] - len(V):
        raise ValueError(f"{p} pseudo-components; want 0 to n − K = {V.shape[1]} − {len(V)}")
    where, W = generator.device if generator else V.device, V.double()
    P = torch.randn(p, V.shape[1], dtype=W.dtype, device=where, generator=generator).to(W.device)
    for _ in range(2):  # once would leave eps times the condition number
        P = torch.linalg.qr((P - P @ W.T @ W).T).Q.T
    return torch.cat([V, P.to(V.dtype)])


def project(rows: Tensor, V: Tensor, mean: Tensor | None = None) -> Tensor:
    """Return least-squares coefficients (m, K) of rows (m, n) on orthonormal V (K, n).  [step 4]

    Not α but its transpose: a module's α is (K, r).
    """
    return (rows.to(V) if mean is None else rows.to(V) - mean) @ V.T


def reconstruct(alpha: Tensor, V: Tensor, mean: Tensor | None = None) -> Tensor:
    """Return the rows (m, n) that coefficients alpha (m, K) on V (K, n) stand for.

    >>> V = torch.tensor([[0.6, 0.8]])
    >>> reconstruct(project(torch.tensor([[5.0, 10.0]]), V), V)
    tensor([[6.6000, 8.8000]])
    """
    return alpha @ V if mean is None else alpha @ V + mean


_PREFIX = "base_model.model."
_HALF = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")
_REFUSED = {  # what a config field=value or a key says: why the adapter is not just B A
    r"peft_type=(?!(PeftType\.)?LORA$)": "no LoRA",
    r"use_dora=|.*\.lora_magnitude": "DoRA also rescales W₀ + ΔW",
    r"bias=(?!none)|lora_bias=|.*\.bias$": "a trained bias is in no subspace of A or B",
    r"trainable_token_indices=|.*\.lora_embedding": "an embedding is no Linear",
    r"init_lora_weights=(?!True|gaussian|orthogonal|eva|mica)": "it may take its start off W₀",
    r"(layer_replication|target_parameters|alora_invocation_tokens|use_(qa|bd)lora)=|.*\.lora_": (
        "not understood"
    ),
}


def lora_pairs(state_dict: Tensors, config: Mapping | None = None) -> dict[str, Pair]:
    """Return {module name: (B (o, r), A (r, d))} of a PEFT LoRA, s folded into B: B A = ΔW.

    config is adapter_config.json; without it s = 1. r may differ by module; s is α/r, or α/√r
    with rslora, α by alpha_pattern. Half precision becomes float32; heads are left alone.
    Raises ValueError, saying why, for what is not B A on the base model: DoRA, trained biases or
    embeddings, convolutions, PiSSA and other starts that change W₀.
    >>> peft = {"q.lora_A.weight": torch.ones(1, 2), "q.lora_B.weight": torch.ones(3, 1)}
    >>> lora_pairs(peft, {"r": 1, "lora_alpha": 2})["q"][0].T
    tensor([[2., 2., 2.]])
    """
    config, halves, others = config or {}, {}, []
    for key in state_dict:
        if match := _HALF.fullmatch(key):
            halves.setdefault(match[1], {}).setdefault(match[2], []).append(key)
        elif ".lora_" in key or key.endswith(".base_layer.bias"):
            others.append(key)
    others += [f"{field}={value}" for field, value in config.items() if value]
    for found in others:
        if why := next((w for pattern, w in _REFUSED.items() if re.match(pattern, found)), None):
            raise ValueError(f"{found}: {why}; want a plain LoRA, B·A on the base model as it is")
    if not halves:
        raise ValueError(
            f"no LoRA among {list(state_dict)}; want NAME.lora_A.weight, .lora_B.weight"
        )
    pairs = {}
    for name, half in halves.items():
        if {side: len(keys) for side, keys in half.items()} != {"A": 1, "B": 1}:
            raise ValueError(f"{name!r} has {half}; want one lora_A.weight and one lora_B.weight")
        B, A = (state_dict[half[side][0]] for side in "BA")
        _fits(B, A, len(B), A.shape[-1], f"{name!r}: ")
        pairs[name] = B.to(_dtype(B)) * _scaling(name, len(A), config), A.to(_dtype(A))
    return pairs


def _scaling(name: str, rank: int, config: Mapping[str, Any]) -> float:
    """PEFT's s for the module called name: the first pattern that matches the name's end."""

    def _pick(field: str, default: Any) -> Any:
        patterns = (config.get(f"{field}_pattern") or {}).items()
        return next((v for p, v in patterns if re.match(rf"(.*\.)?({p})$", name)), default)

    if (r := _pick("rank", config.get("r", rank))) != rank:
        raise ValueError(f"{name!r} has {rank} rows in lora_A; want r = {r}, as in the config")
    alpha = _pick("alpha", config.get("lora_alpha", 8)) if config else rank
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


@dataclass(frozen=True, eq=False)
class Subspace:
    """What the adapters of one module share.

    Rows of V: principal ones, with their singular values; μ's, if center; pseudo-components.
    k and center are `recycle`'s, dropped is the Σσ² that K left out: `update` continues them.
    """

    V_A: Tensor  # (K, d)
    V_B: Tensor  # (K, o)
    mean_A: Tensor  # (d,)
    mean_B: Tensor  # (o,)
    singular_values_A: Tensor  # (at most K,)
    singular_values_B: Tensor
    count: int  # rows stacked so far: the sum of ranks
    k: Rule = None
    center: bool = False
    dropped_A: float = 0.0
    dropped_B: float = 0.0


def recycle(
    adapters: Adapters,
    k: Rule = None,
    center: bool = False,
    pseudo: int = 0,
    generator: Random = None,
) -> dict[str, Subspace]:
    """Return {module name: Subspace} of adapters, each {module name: (B (o, r), A (r, d))}.

    Ranks and sets of modules may differ; mappings that read from disk are asked for one module at
    a time. k by `choose_k`, for A and B of each module on its own; center appends the unit part
    of the mean outside V, one row beyond k; pseudo by `augment`. Raises ValueError for no
    adapter, other base shapes, nan or inf, k above the rank.
    >>> pair = torch.tensor([[1.0], [0.0]]), torch.tensor([[3.0, 4.0]])
    >>> recycle([{"q": pair}], k=1)["q"].V_A.abs()
    tensor([[0.6000, 0.8000]])
    """
    found = _absorb({}, adapters, k, center)
    for name, s in found.items() if pseudo else ():
        V_A, V_B = (augment(V, pseudo, generator) for V in (s.V_A, s.V_B))
        found[name] = replace(s, V_A=V_A, V_B=V_B)
    return found


def update(subspaces: Mapping[str, Subspace], adapters: Adapters) -> dict[str, Subspace]:
    """Return what `recycle` gives for old and new adapters, without the old ones.       [step 7]

    The same while nothing was dropped (k=None), else within `dropped` of the best. An int and
    "gavish-donoho" keep their K, a float chooses again; pseudo rows that new adapters explain
    vanish. Coefficients move by new.set_task(i, *old.pair(i)).
    """
    rule = next(((s.k, s.center) for s in subspaces.values()), (None, False))
    return _absorb(subspaces, adapters, *rule)


def _absorb(subspaces: Mapping, adapters: Adapters, k: Rule, center: bool) -> dict[str, Subspace]:
    """`update`, with k and center for modules that subspaces lack."""
    adapters, out = list(adapters), dict(subspaces)
    if not any(len(adapter) for adapter in adapters):
        raise ValueError(f"{len(adapters)} adapters, no module; want one {{name: (B, A)}} or more")
    for name in dict.fromkeys(name for adapter in adapters for name in adapter):
        old, columns, rows = out.get(name), [], []
        for i, adapter in enumerate(adapters):
            if name in adapter:
                B, A = adapter[name]
                shape = (old.V_B.shape[1], old.V_A.shape[1]) if old else (len(B), A.shape[-1])
                _fits(B, A, *shape, f"adapter {i}, {name!r}: ")
                old = old or Subspace(*_nothing(A, B.T), 0, k, center)
                columns.append(B), rows.append(A)
        try:
            sides = _grow(old, "A", torch.cat(rows)), _grow(old, "B", torch.cat(columns, 1).T)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
        V, mean, s, dropped = zip(*sides, strict=True)
        count = old.count + sum(map(len, rows))
        out[name] = Subspace(*V, *mean, *s, count, old.k, old.center, *dropped)
    return out


def _fits(B: Tensor, A: Tensor, o: int, d: int, what: str = "") -> None:
    if B.shape != (o, len(A)) or A.shape != (len(A), d):
        found = f"B {tuple(B.shape)}, A {tuple(A.shape)}"
        raise ValueError(f"{what}{found}; want ({o}, r) and (r, {d})")
    if not B.is_meta:
        _finite(B, f"{what}B"), _finite(A, f"{what}A")


def _nothing(*sides: Tensor) -> list[Tensor]:
    """V, mean and singular values of no rows, for both sides."""
    starts = [(rows[:0], rows[0] * 0, rows[:0, 0]) for rows in sides]
    return [start[i] for i in range(3) for start in starts]


def _grow(old: Subspace, side: str, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """V, mean, σ and dropped of one side of old after more rows (m, n).                 [step 7]"""
    fields = "V", "mean", "singular_values", "dropped"
    V, mean, s, dropped = (getattr(old, f"{field}_{side}") for field in fields)
    dtype, m, c, p = torch.promote_types(V.dtype, _dtype(rows)), len(rows), old.count, len(s)
    V, mean, X, k = V.double(), mean.double(), rows.to(torch.float64, copy=True), old.k
    shift = (X.mean(0) - mean) * old.center
    X -= mean + shift
    if c:
        bridge = math.sqrt(c * m / (c + m)) * shift
        X = torch.cat([s.double()[:, None] * V[:p], X, bridge[None]])
        k = k if k is None or isinstance(k, float) else p
    W, s = _top(X, k, dtype, c + m - old.center, dropped)
    K, tol = len(W), 64 * math.sqrt(V.shape[1]) * torch.finfo(dtype).eps
    rest = V[p:][(V[p:] @ mean).abs() <= tol * mean.norm()]  # pseudo; μ's own row has a part of μ
    mean += shift * (m / (c + m))
    for row in (mean, *rest):
        new = row - row @ W.T @ W
        new -= new @ W.T @ W
        if new.norm() > tol * row.norm():
            W = torch.cat([W, new[None] / new.norm()])
    return W.to(dtype), mean.to(dtype), s[:K].to(dtype), dropped + float(s[K:].square().sum())


class EigenLoRAxLinear(nn.Module):
    """A frozen nn.Linear plus ΔW(task) = s·V_Bᵀα_Bα_AᵀV_A; only α_A, α_B (tasks, K, r) train.

    α_A starts Gaussian with variance 1/K, α_B at 0 (init "zero": ΔW = 0) or like α_A ("random").
    V_A and V_B are shared by all tasks. A stand-in for base: `weight` is the merged one's.
    Raises ValueError for shapes that do not fit and arguments out of range.
    >>> pair = torch.tensor([[1.0], [0.0]]), torch.tensor([[3.0, 4.0]])
    >>> layer = EigenLoRAxLinear(nn.Linear(2, 2), recycle([{"q": pair}])["q"], scaling=2.0)
    >>> layer.set_task(0, *pair)
    >>> layer.pair()[0] @ layer.pair()[1]
    tensor([[3., 4.],
            [0., 0.]], grad_fn=<MmBackward0>)
    """

    def __init__(
        self,
        base: nn.Linear,
        subspace: Subspace,
        rank: int = 1,
        tasks: int = 1,
        scaling: float = 1.0,
        init: str = "zero",
        generator: Random = None,
    ) -> None:
        super().__init__()
        if not all(type(size) is int and size > 0 for size in (rank, tasks)):
            raise ValueError(f"rank = {rank!r}, tasks = {tasks!r}; want ints >= 1")
        if not 0 < abs(scaling) < math.inf or init not in ("zero", "random"):
            raise ValueError(
                f"scaling {scaling!r}, init {init!r}; want finite != 0, zero or random"
            )
        d, o, shapes = base.in_features, base.out_features, (subspace.V_A.shape, subspace.V_B.shape)
        if [d, o] != [n for _, n in shapes] or not all(K for K, _ in shapes):
            raise ValueError(
                f"V_A, V_B are {[*map(tuple, shapes)]}; want (K, {d}), (K, {o}), K >= 1"
            )
        self.base, self.rank, self.tasks = base.requires_grad_(False), rank, tasks
        self.scaling, self.task = float(scaling), 0
        for side, V in (("A", subspace.V_A), ("B", subspace.V_B)):
            V = V.detach().to(base.weight.device, _dtype(base.weight))
            where = generator.device if generator else V.device
            alpha = torch.randn(
                tasks, len(V), rank, dtype=V.dtype, device=where, generator=generator
            )
            alpha *= 0 if (side, init) == ("B", "zero") else len(V) ** -0.5
            self.register_buffer(f"V_{side}", V)
            setattr(self, f"alpha_{side}", nn.Parameter(alpha.to(V.device)))
        self.train(base.training)

    def forward(self, x: Tensor, task: int | Tensor | None = None) -> Tensor:
        task = self.task if task is None else task
        y, V_A, V_B = self.base(x), self.V_A.to(x.dtype), self.V_B.to(x.dtype)
        if isinstance(task, Tensor):
            a, b = (self._each(alpha, task, x) for alpha in (self.alpha_A, self.alpha_B))
            z = (x @ V_A.T).reshape(len(x), -1, len(V_A))  # (batch, positions, K)
            return y + (z @ a @ (b.mT * self.scaling) @ V_B).view_as(y)
        a, b = (alpha[self._one(task)].to(x.dtype) for alpha in (self.alpha_A, self.alpha_B))
        K, r, b = len(V_A), self.rank, b * self.scaling
        if x.shape[:-1].numel() * (K - r) > K * r:  # many samples: A and B first, then x
            return y + x @ (a.T @ V_A).T @ (b.T @ V_B)
        return y + x @ V_A.T @ a @ b.T @ V_B

    def _each(self, alpha: Tensor, task: Tensor, x: Tensor) -> Tensor:
        if task.shape != x.shape[:1] or task.dtype not in (torch.int64, torch.int32):
            found = f"task {tuple(task.shape)} of {task.dtype} for x {tuple(x.shape)}"
            raise ValueError(f"{found}; want ({len(x)},), an int64 per sample")
        return alpha.index_select(0, task).to(x.dtype)

    def _one(self, task: int | Tensor | None) -> int:
        task = self.task if task is None else task
        if type(task) is not int or not 0 <= task < self.tasks:
            raise ValueError(f"task = {task!r:.40}; want one int from 0 to {self.tasks - 1}")
        return task

    def pair(self, task: int | None = None) -> Pair:
        """Return the LoRA pair (B (o, r), A (r, d)) with B A = ΔW(task), s folded into B."""
        task = self._one(task)
        return self.V_B.T @ self.alpha_B[task] * self.scaling, self.alpha_A[task].T @ self.V_A

    @torch.no_grad()
    def set_task(self, task: int, B: Tensor, A: Tensor) -> None:
        """Zero-shot: set α of task to the projection of the pair B (o, r), A (r, d).    [step 5]

        A rank below the module's is padded with 0. Raises ValueError for one above it, shapes
        that do not fit, nan or inf.
        """
        _fits(B, A, self.out_features, self.in_features)
        task, r = self._one(task), len(A)
        if r > self.rank:
            raise ValueError(f"the pair has rank {r}; want at most this module's {self.rank}")
        self.alpha_A[task], self.alpha_B[task] = 0, 0
        self.alpha_A[task, :, :r] = project(A, self.V_A).T
        self.alpha_B[task, :, :r] = project(B.T / self.scaling, self.V_B).T

    def _weight(self, task: int | None = None) -> Tensor:
        """W₀ + ΔW(task) (o, d), differentiable, in the base's dtype."""
        W, (B, A) = self.base.weight, self.pair(task)
        if not W.is_floating_point():
            raise TypeError(f"the base weight is {W.dtype}; want floating point, to add ΔW")
        return (W.to(B.dtype) + B @ A).to(W.dtype)

    weight = property(_weight, doc="W₀ + ΔW of the active task (o, d), differentiable.")
    bias = property(lambda self: self.base.bias, doc="The base's bias (o,) or None.")
    in_features = property(lambda self: self.base.in_features, doc="d")
    out_features = property(lambda self: self.base.out_features, doc="o")

    @torch.no_grad()
    def merge(self, task: int | None = None) -> nn.Linear:
        """Return a plain nn.Linear with W₀ + ΔW(task), on the base's device and in its dtype."""
        bias = None if self.bias is None else nn.Parameter(self.bias.clone(), requires_grad=False)
        merged = nn.Linear(self.in_features, self.out_features, False, device="meta")
        merged.weight, merged.bias = nn.Parameter(self._weight(task), requires_grad=False), bias
        return merged.train(self.training)

    def extra_repr(self) -> str:
        """K of both sides, rank, tasks, scaling."""
        K = f"K_A={len(self.V_A)}, K_B={len(self.V_B)}"
        return f"{K}, rank={self.rank}, tasks={self.tasks}, scaling={self.scaling}"


Modules = Mapping[str, EigenLoRAxLinear]


def _replace(model: nn.Module, targets, kinds, make) -> dict[str, nn.Module]:
    """Freeze `model`, put make(name, layer) for each layer whose dotted name ends in a target."""
    # the same in every method file
    ends = tuple(f".{t}" for t in ([targets] if isinstance(targets, str) else targets))
    layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, kinds)}
    found = {n: m for n, m in layers.items() if n and f".{n}".endswith(ends)}
    missing = [end[1:] for end in ends if not any(f".{n}".endswith(end) for n in found)]
    if missing or not found:
        raise ValueError(
            f"no layer's name ends in {missing or targets}; layers found: {sorted(layers)}"
        )
    new = {}
    for name, layer in found.items():  # all are made before any is put: an error changes nothing
        new[layer] = new.get(layer) or make(name, layer)  # a layer with two names gets one adapter
    model.requires_grad_(False)
    for name, layer in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new[layer])
    return {name: new[layer] for name, layer in found.items()}


def adapt(model: nn.Module, subspaces: Mapping, rank: int = 1, **kw: Any) -> Modules:
    """Freeze model, replace the Linears named in subspaces, return {dotted name: module}.

    A name may lack its front ("0.query" finds "layer.0.query"). kw goes to EigenLoRAxLinear.
    Raises ValueError, changing nothing, for a name that no Linear has.
    """
    whole = {n for n, _ in model.named_modules(remove_duplicate=False) if n in subspaces}

    def _make(name: str, layer: nn.Module) -> nn.Module:
        key = max((key for key in subspaces if f".{name}".endswith(f".{key}")), key=len)
        other = key != name and key in whole  # key is another layer's whole name
        return layer if other else EigenLoRAxLinear(layer, subspaces[key], rank, **kw)

    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        new = _replace(model, list(subspaces), nn.Linear, _make)
    except ValueError:
        for p in trainable:  # a constructor may have frozen its layer before another one failed
            p.requires_grad_(True)
        raise
    return {name: module for name, module in new.items() if isinstance(module, EigenLoRAxLinear)}


def merge(model: nn.Module, task: int | None = None) -> nn.Module:
    """Replace every EigenLoRAxLinear of model by its `merge(task)`, in place; return the model."""
    new = {m: m.merge(task) for m in model.modules() if isinstance(m, EigenLoRAxLinear)}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # all names of a shared layer
            if child in new:
                setattr(parent, name, new[child])
    return new.get(model, model)


@contextmanager
def serving(modules: Modules, task: int | Tensor | list[int]) -> Iterator[None]:
    """Within the with block all modules serve task: an int, or one index per sample.

    For whole models, whose forward cannot hand `task` on. Raises ValueError for other values.
    """
    before, ids = [(module, module.task) for module in modules.values()], torch.as_tensor(task)
    last = min(module.tasks for module, _ in before) - 1
    if ids.is_floating_point() or ids.dim() > 1 or not ((ids >= 0) & (ids <= last)).all():
        raise ValueError(f"task = {ids.tolist()}; want an int from 0 to {last}, or one per sample")
    try:
        for module, _ in before:
            module.task = ids.to(module.V_A.device) if ids.dim() else int(ids)
        yield
    finally:
        for module, old in before:
            module.task = old


def to_peft(modules: Modules, task: int = 0, head: Tensors | None = None) -> tuple[Tensors, dict]:
    """Return (state_dict, config dict) of one task as a plain LoRA that PEFT loads.

    s is folded in, so lora_alpha = r. head {parameter name: tensor}: layers trained whole.
    """
    state, ranks = {}, {name: module.rank for name, module in modules.items()}
    for name, module in modules.items():
        for side, factor in zip("BA", module.pair(task), strict=True):
            state[f"{_PREFIX}{name}.lora_{side}.weight"] = factor.detach().contiguous()
    state |= {_PREFIX + name: tensor.detach().clone() for name, tensor in (head or {}).items()}
    r, whole = max(ranks.values()), sorted({name.rpartition(".")[0] for name in head or {}})
    odd = {name: ranks[name] for name in sorted(ranks, key=len, reverse=True)}  # first match wins
    odd = odd if min(ranks.values()) < r else {}
    config = {"peft_type": "LORA", "target_modules": list(ranks), "r": r, "lora_alpha": r}
    config |= {"rank_pattern": odd, "alpha_pattern": dict(odd), "modules_to_save": whole or None}
    return state, config | {"lora_dropout": 0.0, "bias": "none", "inference_mode": True}
