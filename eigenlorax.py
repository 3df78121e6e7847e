# SPDX-License-Identifier: MIT
# EigenLoRAx (arXiv:2502.04700) in one self-contained file: copy it.
# Cite: P. Kaushik, A. Vaidya, S. Chaudhari, A. Yuille. EigenLoRAx. arXiv:2502.04700, 2025.
r"""EigenLoRAx: stack the LoRA adapters you have, keep their principal directions V, learn only α.

    h = W₀x + ΔW(task) x,   ΔW(task) = s · V_Bᵀ α_B α_Aᵀ V_A        [arXiv:2502.04700, Sec. 3.2]

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
  1. BA = Σⱼ bⱼaⱼᵀ reads through rows of A, writes through columns of B: stack either as rows of X.
  2. X = UΣVᵀ. No K directions leave less of X than the first K right singular vectors, from
     here on the rows of V: ‖X − XVᵀV‖² = Σ_{i>K} σᵢ².                        [Eckart–Young]
  3. XXᵀ = UΣ²Uᵀ, XᵀX = VᵀΣ²V: the smaller Gram matrix has every σ, and V = Σ⁻¹UᵀX. Squaring
     halves the digits: float32 rows get a Gram matrix in float64, float64 rows a thin SVD. Where
     K is given and σ_K² > σ₁²/1000, float32 is enough for U, and uᵢᵀXXᵀuᵢ gives σᵢ² in float64.
  4. VVᵀ = I, so the least-squares coefficients of any rows are X Vᵀ.
  5. V_BᵀV_B·BA·V_AᵀV_A, BA projected on all V_BᵀMV_A, has M = (V_B B)(A V_Aᵀ) = α_B α_Aᵀ.
  6. Centred directions lose μ; with the unit part of μ outside V as a row, V spans all rows again.
  7. XᵀX = VᵀΣ²V: ΣV stands for all c rows so far; append new rows to it. Centred, so does √c·μ:
     with weights w = (0 …, √c, 1 …) the mean is wX/‖w‖², and X − w·mean has the XᵀX sought.
  8. α_B = 0 makes ΔW = 0, and ∂L/∂α_B = s·V_B (∂L/∂W) V_Aᵀ α_A is not 0 for random α_A.

Claims
  E1  V has orthonormal rows; more components than the numerical rank is an error naming it
  E2  singular values are those of the SVD, within eps·σ₁²/σᵢ, eps of the rows' dtype
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

Cost      components O(mn·min(m, n)) once; forward of N samples O(min(NK, (N + K)r)·(d + o)) more;
          T tasks hold K·(d + o) + 2TKr numbers, LoRA Tr·(d + o).
Differs from the paper: adapters are stacked as rows (as columns, V has another length); centring is
          an option and its mean stays in V; no randomised SVD; α_B starts at 0, not random.
Differs from the authors' code: there α starts uniform in ±½, LoRA's scaling is ignored, the mean
          lost, P uniform in 0..1, and every task has its own V. Written from the paper alone.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

Rule = int | float | str | None
_dtype = lambda X: torch.promote_types(X.dtype, torch.float32)  # noqa: E731 (half loses updates)


def principal_components(rows: Tensor, k: Rule = None, center: bool = True) -> tuple[Tensor, ...]:
    """Return (V (K, n), mean (n,), all min(m, n) singular values) of rows (m, n), K by `choose_k`.

    At least float32; mean 0 if not center. Float32 σᵢ: to eps·σ₁²/σᵢ for an int k, otherwise to
    the last digit. Raises ValueError for nan, inf, k too large.                        [Alg. 1]
    >>> V, mean, s = principal_components(torch.tensor([[3.0, 4.0], [6.0, 8.0]]), center=False)
    >>> V.abs(), s[0] ** 2
    (tensor([[0.6000, 0.8000]]), tensor(125.))
    """
    return _components(_finite(rows, "rows"), torch.ones(len(rows)), k, center)


def _components(rows: Tensor, weight: Tensor, k: Rule, center: bool) -> tuple[Tensor, ...]:
    """The same for rows that are weight (m,) times what the mean is taken of.          [step 7]"""
    X, w, dtype = rows.detach().double(), weight.to(rows.device, torch.float64), _dtype(rows)
    (m, n), count = X.shape, round(float(w @ w)) - center  # centred, one row follows from others
    mean = w @ X / (w @ w).clamp(min=1) if center else X.new_zeros(n)
    X = X - w[:, None] * mean if center else X
    if dtype == torch.float64:
        _, s, V = torch.linalg.svd(X, full_matrices=False)
    else:
        G = X @ X.T if m <= n else X.T @ X
        scale = G.trace().clamp(min=1e-300)
        squares, U = torch.linalg.eigh((G / scale).to(torch.float32 if type(k) is int else X.dtype))
        if type(k) is int and (squares > squares[-1:] / 1000).sum() < k:  # σ_k too near rounding
            squares, U = torch.linalg.eigh(G / scale)
        U = U.double().flip(1)  # σ² are the Rayleigh quotients, to rounding whatever U's error
        s = ((U * (G @ U)).sum(0) / U.square().sum(0)).clamp(min=0).sqrt().sort(descending=True)[0]
    K = choose_k(s[:count].to(dtype), k, (count, n))
    if dtype == torch.float32:
        V = U[:, :K].T if m > n else (U[:, :K] / s[:K]).T @ X
        V = torch.linalg.solve_triangular(torch.linalg.cholesky(V @ V.T), V, upper=False)
    return V[:K].to(dtype), mean.to(dtype), s.to(dtype)


def _finite(X: Tensor, what: str) -> Tensor:
    if X.ndim != 2 or not X.is_floating_point() or not (X.is_meta or X.sum(dtype=float).isfinite()):
        raise ValueError(f"{what} {tuple(X.shape)} sums to {X.sum()}; want finite (m, n) floats")
    return X


def choose_k(singular_values: Tensor, rule: Rule, shape: tuple[int, int]) -> int:
    """Return K from all singular values, descending, of a stack of this shape (m, n).

    None: the numerical rank, the number of σᵢ > eps·max(m, n)·σ₁, eps of their dtype;
    int: itself; float in (0, 1]: the least K with Σ_{i≤K}σᵢ² ≥ rule·Σσᵢ²;
    "gavish-donoho": the number of σᵢ > ω·median, optimal for low rank plus white noise
    (arXiv:1305.5870), a heuristic on real adapters. For a centred stack m is one less. Raises
    ValueError for K = 0 or K > numerical rank.
    >>> choose_k(torch.tensor([3.0, 1.0, 0.0]), 0.9, (3, 8)), choose_k(torch.ones(4), None, (4, 8))
    (1, 4)
    """
    s, (m, n) = singular_values, shape
    if s.dim() != 1 or not s.is_floating_point() or not (s.diff(append=0 * s[:1]) <= 0).all():
        raise ValueError(f"singular values {s.tolist()!r:.80}; want finite ones, descending")
    rank = int((s > max(m, n) * torch.finfo(s.dtype).eps * s[:1]).sum())
    K = rank if rule is None else rule
    if rule == "gavish-donoho":
        # the paper's fit of ω, good to 0.02
        omega = 0.56 * (beta := min(m, n) / max(m, n)) ** 3 - 0.95 * beta**2 + 1.82 * beta + 1.43
        K = rank and min(rank, int((s > omega * s.double().quantile(0.5)).sum()))
    elif isinstance(rule, float) and 0 < rule <= 1:
        energy = (s.double() / s[:1]).square().cumsum(0)  # of σ₁², lest squares overflow
        K = min(rank, int((energy < rule * energy[-1:]).sum()) + 1)
    if type(K) is not int or not (rule is None or 1 <= K <= rank):
        raise ValueError(f"k = {rule!r} means {K!r}; want a rule or 1 to {rank}, numerical rank")
    return K


def augment(V: Tensor, p: int, generator: torch.Generator | None = None) -> Tensor:
    """Return orthonormal V (K, n) with p pseudo-components below it, (K + p, n), orthonormal.

    Gaussian, orthogonalised by reflections. Raises ValueError unless 0 <= p <= n − K.   [Alg. 1]
    >>> augment(torch.tensor([[0.0, 1.0]]), 1)[1].abs()
    tensor([1., 0.])
    """
    if _finite(V, "V").shape[1] - len(V) < p or p < 0 or type(p) is not int:
        raise ValueError(f"{p!r} pseudo-components; want 0 to n − K = {V.shape[1]} − {len(V)}")
    Q = torch.linalg.qr(torch.cat([V, _normal((p, V.shape[1]), V.double(), generator)]).T).Q.T
    return torch.cat([V, Q[len(V) :].to(V)])


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    where = generator.device if generator else like.device
    return torch.randn(shape, dtype=like.dtype, device=where, generator=generator).to(like.device)


def project(rows: Tensor, V: Tensor, mean: Tensor | None = None) -> Tensor:
    """Return least-squares coefficients (m, K), αᵀ, of rows (m, n) on V (K, n).         [step 4]"""
    X = _finite(rows, "rows").to(_finite(V, "V"))
    return (X if mean is None else X - mean.to(V).view(V.shape[1:])) @ V.T


def reconstruct(alpha: Tensor, V: Tensor, mean: Tensor | None = None) -> Tensor:
    """Return the rows (m, n) that coefficients alpha (m, K) on V (K, n) stand for.
    >>> reconstruct(torch.tensor([[11.0]]), torch.tensor([[0.6, 0.8]]))
    tensor([[6.6000, 8.8000]])
    """
    X = _finite(alpha, "alpha").to(_finite(V, "V")) @ V
    return X if mean is None else X + mean.to(V).view(V.shape[1:])


_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")
_REFUSED = {  # a config's field=value or a key: why the adapter is not just B A
    r"peft_type=(?!(PeftType\.)?LORA$)": "no LoRA",
    r"use_dora=|[^=]*\.lora_magnitude": "DoRA also rescales W₀ + ΔW",
    r"bias=(?!none)|lora_bias=|[^=]*\.(lora_\w+|base_layer)\.bias": "a trained bias is no B·A",
    r"trainable_token_indices=|[^=]*\.lora_embedding": "an embedding is no Linear",
    r"init_lora_weights=(?!True|gaussian|orthogonal|eva|mica)": "it may take its start off W₀",
    r"(layer_replication|target_parameters|alora_\w+|use_(qa|bd)lora)=|[^=]*\.lora_": "unknown",
}


def lora_pairs(state_dict: Mapping[str, Tensor], config: Mapping | None = None) -> dict:
    """Return {module name: (B (o, r), A (r, d))} of a PEFT LoRA, s folded into B: B A = ΔW.

    config is adapter_config.json; without it s = 1. r is the tensors'. Half precision becomes
    float32; heads are left alone. Raises ValueError, saying why, for what is not a plain B A.
    >>> peft = {"q.lora_A.weight": torch.ones(1, 2), "q.lora_B.weight": torch.ones(3, 1)}
    >>> lora_pairs(peft, {"r": 1, "lora_alpha": 2})["q"][0].T
    tensor([[2., 2., 2.]])
    """
    config, pairs = config or {}, {}
    facts = [key for key in state_dict if not _FACTOR.fullmatch(key)]
    facts += [f"{field}={value}" for field, value in config.items() if value]
    odd = [f"{fact}: {why}" for fact in facts for p, why in _REFUSED.items() if re.match(p, fact)]
    if odd:
        raise ValueError(f"{odd[0]}; want a plain LoRA, B·A on the base model as it is")
    found = [(*m.groups(), key) for key in state_dict if (m := _FACTOR.fullmatch(key))]
    A, B = ({name: state_dict[key] for name, s, key in found if s == side} for side in "AB")
    if not found or A.keys() != B.keys() or len(found) != 2 * len(A):
        raise ValueError(f"found {list(state_dict)}; want lora_A.weight, lora_B.weight per module")
    patterns, power = config.get("alpha_pattern") or {}, 0.5 if config.get("use_rslora") else 1
    for name in A:
        r = _rank(B[name], A[name], len(B[name]), A[name].shape[-1], f"{name!r}: ")
        hits = [v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", name)]
        s = [*hits, config.get("lora_alpha", r)][0] / r**power
        pairs[name] = B[name].to(_dtype(B[name])) * s, A[name].to(_dtype(A[name]))
    return {name: (_finite(B, f"{name}: s·B"), A) for name, (B, A) in pairs.items()}


def _rank(B: Tensor, A: Tensor, o: int, d: int, at: str = "") -> int:
    """Return the rank r > 0 of finite B (o, r), A (r, d). Raises ValueError for anything else."""
    if _finite(B, f"{at}B").shape != (o, len(A)) or _finite(A, f"{at}A").shape != (len(A) or 1, d):
        raise ValueError(f"{at}B {tuple(B.shape)}, A {tuple(A.shape)}; want ({o}, r) and (r, {d})")
    return len(A)


@dataclass(eq=False)
class Subspace:
    """What the adapters of one module share.

    Rows of V: principal ones, as many as σ; μ's, if center; pseudo-components. dropped: the Σσ²
    that K left out. k, center: `recycle`'s, for `update`.
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


def recycle(adapters: Iterable, k: Rule = None, center=False, pseudo=0, generator=None) -> dict:
    """Return {module name: Subspace} of adapters, each {module name: (B (o, r), A (r, d))}.

    Ranks and modules may differ; a lazy mapping is asked for one module at a time. k: `choose_k`'s
    rule, for each A and B; center: one more row, for the mean; pseudo: `augment`'s p. Raises
    ValueError for no adapter, other base shapes, nan or inf, k above the rank.
    >>> pair = torch.tensor([[1.0], [0.0]]), torch.tensor([[3.0, 4.0]])
    >>> recycle([{"q": pair}], k=1)["q"].V_A.abs()
    tensor([[0.6000, 0.8000]])
    """
    found = update({}, adapters, k, center)
    for s in found.values() if pseudo else ():
        s.V_A, s.V_B = augment(s.V_A, pseudo, generator), augment(s.V_B, pseudo, generator)
    return found


def update(subspaces: Mapping, adapters: Iterable, k: Rule = None, center: bool = False) -> dict:
    """Return what `recycle` gives for old and new adapters, without the old ones.       [step 7]

    The same while nothing was dropped, else within `dropped` of the best. Modules keep k and center
    (the arguments are for new ones): "gavish-donoho" keeps its K, a float chooses among what is
    kept; pseudo rows go. α moves by new.set_task(i, *old.pair(i)).
    """
    adapters, out = list(adapters), dict(subspaces)
    if not any(len(adapter) for adapter in adapters):
        raise ValueError(f"{len(adapters)} adapters, no module; want one {{name: (B, A)}} or more")
    for name in dict.fromkeys(name for adapter in adapters for name in adapter):
        pairs = {i: adapter[name] for i, adapter in enumerate(adapters) if name in adapter}
        B, A = zip(*pairs.values(), strict=True)
        o, d = len(B[0]) or 1, A[0].shape[-1:].numel() or 1
        empty = (A[0].new_zeros(size) for size in ((0, d), (0, o), d, o, 0, 0))
        old = out.get(name) or Subspace(*empty, 0, k, center)
        (o,), (d,) = old.mean_B.shape, old.mean_A.shape
        m = sum(_rank(*pair, o, d, f"adapter {i}, {name!r}: ") for i, pair in pairs.items())
        sides = _grow(old, "A", A) | _grow(old, "B", [columns.T for columns in B])
        out[name] = replace(old, count=old.count + m, **sides)
        del pairs, B, A  # before the next module's are read
    return out


def _grow(old: Subspace, side: str, rows: Iterable[Tensor]) -> dict[str, Tensor | float]:
    """The fields of one side of old after more blocks of rows (r, n).                  [step 7]"""
    fields = "V", "mean", "singular_values", "dropped"
    V, mean, s, dropped = (getattr(old, f"{field}_{side}") for field in fields)
    p, root = len(s), old.count**0.5
    X = torch.cat([s[:, None] * V[:p], root * mean[None], *rows])
    weight = torch.tensor([0] * p + [root] + [1] * (len(X) - p - 1), dtype=torch.float64)
    k = p if old.count and isinstance(old.k, str) else old.k
    V, mean, s = _components(X, weight, k, old.center)
    K, tol = len(V), 64 * V.shape[1] ** 0.5 * torch.finfo(V.dtype).eps
    if (mean - mean @ V.T @ V).abs().max() > tol * mean.abs().max():
        V = torch.linalg.qr(torch.cat([V, mean[None]]).T).Q.T
    values = V, mean, s[:K], dropped + float(s[K:].double().square().sum())
    return {f"{field}_{side}": value for field, value in zip(fields, values, strict=True)}


class EigenLoRAxLinear(nn.Module):
    """A frozen nn.Linear base plus ΔW(task) = s·V_Bᵀα_Bα_AᵀV_A; only α_A, α_B (tasks, K, r) train.

    α_A starts Gaussian with variance 1/K, α_B at 0 (init "zero": ΔW = 0) or like α_A ("random").
    forward's task: an int, an int64 tensor with one per sample, or None, the attribute `task`. Not:
    checked, in a tensor (that waits for a device): beyond the tasks, torch raises its own error.
    `weight` is the merged one. Raises ValueError for shapes that do not fit, other arguments.
    >>> pair = torch.tensor([[1.0], [0.0]]), torch.tensor([[3.0, 4.0]])
    >>> layer = EigenLoRAxLinear(nn.Linear(2, 2), recycle([{"q": pair}])["q"], scaling=2.0)
    >>> layer.set_task(0, *pair)
    >>> (layer.pair()[0] @ layer.pair()[1])[0].detach()
    tensor([3., 4.])
    """

    def __init__(self, base, subspace, rank=1, tasks=1, scaling=1.0, init="zero", generator=None):
        super().__init__()
        if not (getattr(base, "in_features", 0) and base.out_features):
            raise TypeError(f"the base is {type(base).__name__}; want an nn.Linear, not empty")
        if not all(type(size) is int and size > 0 for size in (rank, tasks)):
            raise ValueError(f"rank = {rank!r}, tasks = {tasks!r}; want ints >= 1")
        if not 0 < abs(scaling) < float("inf") or init not in ("zero", "random"):
            raise ValueError(f"scaling {scaling}, init {init!r}; want finite != 0, zero or random")
        for side, n in (("A", base.in_features), ("B", base.out_features)):
            V = getattr(subspace, f"V_{side}").detach().to(base.weight.device, _dtype(base.weight))
            if _finite(V, f"V_{side}").shape[1] != n or not len(V):
                raise ValueError(f"V_{side} is {tuple(V.shape)}; want (K, {n}), K >= 1")
            std = 0.0 if (side, init) == ("B", "zero") else len(V) ** -0.5
            alpha = std * _normal((tasks, len(V), rank), V, generator)
            self.register_buffer(f"V_{side}", V.clone(memory_format=torch.contiguous_format))
            setattr(self, f"alpha_{side}", nn.Parameter(alpha))
        self.rank, self.tasks, self.scaling, self.task = rank, tasks, float(scaling), 0
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base, self.training = base.requires_grad_(False), base.training

    def forward(self, x: Tensor, task: int | Tensor | None = None) -> Tensor:
        y, A, B, s = self.base(x), self.V_A.to(x.dtype), self.V_B.to(x.dtype), self.scaling
        a, b = (alpha.to(x.dtype) for alpha in self._alphas(task, len(x)))
        if a.dim() == 2 and x.shape[:-1].numel() * (len(a) - self.rank) > a.numel():
            codes, B = x @ (a.T @ A).T, b.T @ B  # many samples: A and B first, then x
        else:
            codes = (x @ A.T if a.dim() == 2 else (x @ A.T)[:, None].flatten(1, -2)) @ a @ b.mT
        return torch.addmm(y.view(-1, len(B.T)), codes.view(-1, len(B)), B, alpha=s).view(y.shape)

    def _alphas(self, task: int | Tensor | None, n: int | None = None) -> tuple[Tensor, Tensor]:
        """α_A, α_B of one task (K, r), or of n tasks in a tensor (n, K, r)."""
        task = self.task if task is None else task
        if isinstance(task, Tensor) and (task.shape, task.dtype) == ((n,), torch.int64):
            return self.alpha_A.index_select(0, task), self.alpha_B.index_select(0, task)
        if type(task) is not int or not 0 <= task < self.tasks:
            raise ValueError(f"task = {task!r:.40}; want 0 to {self.tasks - 1}, or {n} such int64")
        return self.alpha_A[task], self.alpha_B[task]

    def pair(self, task: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the LoRA pair (B (o, r), A (r, d)) with B A = ΔW(task), s folded into B."""
        a, b, V_A, V_B = (X.double() for X in (*self._alphas(task), self.V_A, self.V_B))
        return (V_B.T @ b * self.scaling).to(self.V_B), (a.T @ V_A).to(self.V_A)

    @torch.no_grad()
    def set_task(self, task: int, B: Tensor, A: Tensor) -> None:
        """Zero-shot: set α of task to B (o, r), A (r, d) projected; ValueError if r > rank.  [5]"""
        a, b = self._alphas(task)
        if (r := _rank(B, A, self.out_features, self.in_features)) > self.rank:
            raise ValueError(f"the pair has rank {r}; want at most this module's {self.rank}")
        a[:, :r], a[:, r:] = project(A, self.V_A.double()).T, 0
        b[:, :r], b[:, r:] = project(B.T, self.V_B.double()).T / self.scaling, 0

    def _weight(self, task: int | None = None) -> Tensor:
        """W₀ + ΔW(task) (o, d), differentiable, in the base's dtype."""
        W, (B, A) = self.base.weight, self.pair(task)
        if not W.is_floating_point():
            raise TypeError(f"the base weight is {W.dtype}; want floating point, to add ΔW")
        return (W.double() + B.double() @ A.double()).to(W.dtype)  # double: no autocast

    weight = property(_weight, doc="W₀ + ΔW of the active task (o, d), differentiable.")
    bias = property(lambda self: self.base.bias, doc="The base's bias (o,) or None.")

    def merge(self, task: int | None = None) -> nn.Linear:
        """Return a plain nn.Linear with W₀ + ΔW(task), on the base's device and in its dtype."""
        merged = nn.Linear(self.in_features, self.out_features, device="meta")
        merged.weight = nn.Parameter(self._weight(task))
        merged.bias = None if self.bias is None else nn.Parameter(self.bias.clone())
        return merged.requires_grad_(False).train(self.training)


def _replace(model: nn.Module, targets, kinds, make) -> dict[str, nn.Module]:
    """Freeze `model`, put make(name, layer) for each layer whose dotted name ends in a target."""
    # the same in every method file
    ends = [f".{t}" for t in ([targets] if isinstance(targets, str) else targets)]
    named, new = {n: m for n, m in model.named_modules(remove_duplicate=False) if n}, {}
    layers = {n: m for n, m in named.items() if isinstance(m, kinds)}
    found = {n: m for n, m in layers.items() if f".{n}".endswith(tuple(ends))}
    missing = [t for t in ends if not any(f".{n}".endswith(t) for n in found)]
    if missing or not found:
        other = {n: type(m) for n, m in named.items() if f".{n}".endswith(tuple(missing))}
        raise ValueError(f"no layer's name ends in {missing}; found: {other or sorted(layers)}")
    with ExitStack() as undo:  # all are made before any is put: an error changes nothing
        for p in model.parameters():
            undo.callback(p.requires_grad_, p.requires_grad)
        for name, layer in found.items():  # a layer with two names gets one adapter
            new[layer] = new.get(layer) or make(name, layer)
        undo.pop_all()
    model.requires_grad_(False)
    for name, layer in found.items():
        model.set_submodule(name, new[layer])
    return {name: new[layer] for name, layer in found.items()}


def adapt(model: nn.Module, subspaces: Mapping, rank: int = 1, **kw) -> dict[str, nn.Module]:
    """Freeze model, replace the Linears named in subspaces, return {dotted name: module}.

    A name that no Linear has may lack its front ("0.query" finds "layer.0.query"); of several the
    longest counts. kw: EigenLoRAxLinear's. ValueError, replacing nothing, for a name not found.
    """
    own = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}

    def make(name: str, layer: nn.Linear) -> nn.Module:
        """The adapted layer; the layer itself where the name is another's whole name."""
        key = max((key for key in subspaces if f".{name}".endswith(f".{key}")), key=len)
        return layer if key in own - {name} else EigenLoRAxLinear(layer, subspaces[key], rank, **kw)

    new = _replace(model, list(subspaces), nn.Linear, make)
    return {name: m for name, m in new.items() if isinstance(m, EigenLoRAxLinear)}


def merge(model: nn.Module, task: int | None = None) -> nn.Module:
    """Replace every EigenLoRAxLinear of model by its `merge(task)`, in place; return the model."""
    new = {m: m.merge(task) for m in model.modules() if isinstance(m, EigenLoRAxLinear)}
    for parent in list(model.modules()):  # every name of a shared layer
        parent._modules.update({n: new[m] for n, m in parent._modules.items() if m in new})
    return new.get(model, model)


@contextmanager
def serving(modules: Mapping[str, EigenLoRAxLinear], task: int | Tensor | list) -> Iterator[None]:
    """Within the block all modules serve task: an int, or one per sample; else ValueError."""
    ids, last = torch.as_tensor(task), min(module.tasks for module in modules.values()) - 1
    if ids.is_floating_point() or ids.dim() > 1 or not ((ids >= 0) & (ids <= last)).all():
        raise ValueError(f"task = {task!r:.60}; want an int from 0 to {last}, or one per sample")
    with ExitStack() as undo:
        for module in modules.values():
            undo.callback(setattr, module, "task", module.task)
            module.task = ids.to(module.V_A.device, torch.int64) if ids.dim() else int(ids)
        yield


def to_peft(modules: Mapping, task: int = 0, head: Mapping | None = None) -> tuple[dict, dict]:
    """Return (state_dict, config) that PEFT loads as a LoRA; head: {name: parameter} beside it."""
    prefix, state, head = "base_model.model.", {}, head or {}
    for name, module in modules.items():
        for side, factor in zip("BA", module.pair(task), strict=True):
            state[f"{prefix}{name}.lora_{side}.weight"] = factor.detach().contiguous()
    state |= {prefix + name: tensor.detach().clone() for name, tensor in head.items()}
    ranks = {name: modules[name].rank for name in sorted(modules, key=len, reverse=True)}
    whole = sorted({name.rpartition(".")[0] for name in head}) or None
    config = {"peft_type": "LORA", "target_modules": list(modules), "modules_to_save": whole}
    r = max(ranks.values())
    return state, config | {"r": r, "lora_alpha": r, "rank_pattern": ranks, "alpha_pattern": ranks}
