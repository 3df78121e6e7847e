# SPDX-License-Identifier: MIT
# ReSoRA (arXiv:2507.20745) in closed form, for any LoRA; one self-contained file: copy it.
# Cite: "Regularizing Subspace Redundancy of Low-Rank Adaptation", ACM Multimedia 2025.
r"""ReSoRA: train LoRA with L = L_task + λ·R(ΔH₁ … ΔH_r), where ΔH_i = s_i B_iᵀ is the output of one
rank-one component and R says how much the components repeat each other.

Paper: "Regularizing Subspace Redundancy of Low-Rank Adaptation", ACM Multimedia 2025,
arXiv:2507.20745, doi 10.1145/3746027.3755359. Its equations were not available to us, only the
components, four families of R, two stages (LoRA, then with R) and the default, linear: every
formula of R below is inferred, and marked so term by term.

Symbols (rows, columns; torch's weight is (out, in) = (o, d), where the paper writes d×k):
  paper | here        | shape  | meaning
  W     | base.weight | (o, d) | the pre-trained weight, frozen
  A     | A           | (r, d) | rows A_i, trained
  B     | B           | (o, r) | columns B_i, trained, zero at first
  W+ΔW  | weight      | (o, d) | the adapted weight, ΔW = scaling·B A
  X     | x           | (N, d) | inputs: N tokens, every leading axis flattened (paper: columns)
  S=AX  | S           | (N, r) | codes, S = x Aᵀ, columns s_i (paper: rows)
  R     | penalty()   | ()     | redundancy, mean over the pairs i < j, then over layers

Derivation (cᴮ_ij and cˢ_ij are the cosines of columns i and j of B and of S):
  1. x ΔWᵀ = Σ_i s_i B_iᵀ: a sum of r matrices ΔH_i (N, o), each of rank one.              [paper]
  2. ⟨ΔH_i, ΔH_j⟩ = tr(B_i s_iᵀ s_j B_jᵀ) = (BᵀB)_ij·(SᵀS)_ij =: h_ij: two r×r Grams hold it all.
  3. euclidean: R_ij = exp(−β·d²), d² = ‖ΔH_i − ΔH_j‖²/(N·o) = (h_ii + h_jj − 2·h_ij)/(N·o).
     [Euclidean distance, β: paper; mean square, exp, β = 1: inferred]
  4. cosine: R_ij = h_ij²/(h_ii·h_jj) = (cᴮ_ij·cˢ_ij)²  [cosine: paper; square, flat ΔH_i: inferred]
  5. linear: R_ij = ‖C_ij‖²/(‖C_ii‖·‖C_jj‖), C_ij = ΔH_iᵀ ΔH_j after centring over the tokens.
     C_ij = N·cov(s_i, s_j)·B_i B_jᵀ has rank one, so ‖B_i‖, ‖B_j‖ cancel and R_ij = ρ_ij², the
     squared Pearson correlation of two codes: centred linear CKA.
     [Frobenius norm of the cross-covariance, normalised: paper; centring, square, norms: inferred]
  6. nonlinear: step 5 in the feature space of an RBF kernel. Tokens n, m are ‖B_i‖·|s_ni − s_mi|
     apart in ΔH_i; with bandwidth σ·(rms distance of its rows from their mean), B_i cancels again:
     K_i = exp(−(z_ni − z_mi)²/(2σ²)), z_i = (s_i − mean)/std, and R_ij is the cosine of K_i and
     K_j, both centred on both sides. K − 1 centred is the same and does not cancel as K → 1.
     [RBF kernel: paper; CKA, this bandwidth, σ = 1: inferred]
  7. level="weight": S := Aᵀ, as if the tokens were the d unit inputs; linear then not centred.
     [weight level: paper; this form of it: inferred]

Claims (a test of each id in tests/test_resora.py):
  R1  closed form = redundancy_dense in every metric: value, gradient of B, gradient of S
  R2  weight = feature level if xᵀx ∝ I; euclidean: (N/d)·I; linear: zero mean; nonlinear: x ∝ I
  R3  linear is the squared Pearson correlation of the codes and has no gradient in B
  R4  per token, the squared cosine is cos²(B_i, B_j) where codes are non-zero: it cannot see x
  R5  regauge keeps BA for every N and r, brings cosine to 0 and, given x, linear on x to 0
  R6  B = 0, the LoRA start, gives finite values and gradients in every metric
  R7  rank 1 gives 0 in every metric
  R8  cosine, linear, nonlinear: in [0, 1], whatever the order, sign and scale of components
  R9  nonlinear sees s₂ = s₁² − 1 for s₁ symmetric about 0, linear does not
  R10  penalty changes no bit of the output, no merged weight and no global random state
  R11  Σ_{i<j}‖ΔH_i − ΔH_j‖² = r·Σ‖ΔH_i‖² − ‖ΣΔH_i‖²: euclidean pays for growing components

Beware: (BG⁻¹, GA) has the same ΔW for every invertible G, and R5 is one with R = 0. So cosine
restricts no ΔW, and linear does at most through inputs it was not gauged on: both change the path
of training. By R11 euclidean falls as components grow and cancel: watch ‖B_i‖, use weight decay.

Cost: trained numbers r·(d + o) a layer, LoRA's own; at inference nothing. penalty() adds x Aᵀ and
O(N·r²) work, memory O(N·r + r²), nonlinear r·n² more for n = min(N, samples) tokens; never N·o·r.
For independent Gaussian codes nonlinear is not 0 but 0.074, 0.019, 0.0095, 0.0046 at n = 32, 128,
256, 512 (σ = 1), and linear 1/(N − 1). Without that floor, but no longer ≥ 0: diagonals of K and L
set to 0, ⟨K, L⟩ := [ΣK∘L + ΣK·ΣL/((n−1)(n−2)) − 2·ΣKL/(n−2)]/(n(n−3)), Σ over all entries.
Differs from the paper: formulas inferred; codes for feature maps (the paper reports 18–34 % more
training time); R may be on from the first step (R6). The authors' code was not consulted.
"""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

METRICS = ("euclidean", "cosine", "linear", "nonlinear")
EPS = 1e-6  # a column with a smaller root mean square is null: it repeats nothing


def redundancy(
    B: Tensor,
    S: Tensor,
    metric: str = "linear",
    *,
    beta: float = 1.0,
    sigma: float = 1.0,
    samples: int = 128,
    generator: torch.Generator | int | None = None,
    center: bool = True,
) -> Tensor:
    """Mean of R_ij over the pairs i < j of components s_i B_iᵀ, never building one.    [Steps 3–6]

    B (o, r), S (N, r); out a scalar in ≥ fp32, 0 for r = 1. Leading axes (…, o, r), (…, N, r) are
    layers, averaged. beta is euclidean's, center linear's; sigma, samples and generator are
    nonlinear's, which takes at most `samples` tokens, the same for every component (generator:
    torch's, or a draw's number). A null component (EPS; if codes are centred, a constant code) adds
    0; in euclidean two are equal, 1. Padding counts. Raises ValueError for other shapes or metrics.

    >>> B, S = torch.tensor([[1.0, 1], [0, 1]]), torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    >>> redundancy(B, S, "euclidean")  # exp(−(2 + 4 − 2·1·1)/(3·2))
    tensor(0.5134)
    >>> redundancy(B, S, "cosine"), redundancy(B, S, "linear")  # (1/√2)²·(1/2)², (−1/2)²
    (tensor(0.1250), tensor(0.2500))
    """
    _check(B, S, metric, beta, sigma, samples)
    with _full_precision(S):
        B, S = (X.to(torch.promote_types(X.dtype, torch.float32)) for X in (B, S))
        if metric == "euclidean":
            h = _gram(B) * _gram(S)
            g = h.diagonal(dim1=-2, dim2=-1)
            R = torch.exp(-beta * (g[..., :, None] + g[..., None, :] - 2 * h).clamp(min=0))
        elif metric == "cosine":
            R = (_cosines(_gram(B)) * _cosines(_gram(S))).square()
        elif metric == "linear":
            C, floor = _centered(S) if center else (S, EPS**2)
            R = _cosines(_gram(C), floor).square()
        else:
            R = _alignments(_sample(S, samples, generator), sigma)
    return R.triu(1).sum((-2, -1)).mean() / max(1, B.shape[-1] * (B.shape[-1] - 1) // 2)


def redundancy_dense(B: Tensor, S: Tensor, metric: str = "linear", **options) -> Tensor:
    """The same mean from the feature maps themselves: slow, and the oracle for `redundancy`.

    B (o, r), S (N, r), options as for `redundancy`, no null component (0/0). Builds ΔH (r, N, o).
    >>> B, S = torch.tensor([[1.0, 1], [0, 1]]), torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    >>> redundancy_dense(B, S, "cosine"), redundancy_dense(B, S, "linear")
    (tensor(0.1250), tensor(0.2500))
    """
    beta, sigma, samples, generator, center = (redundancy.__kwdefaults__ | options).values()
    _check(B, S, metric, beta, sigma, samples)
    S = _sample(S, samples, generator) if metric == "nonlinear" else S
    H = S.T[:, :, None] * B.T[:, None, :]  # (r, N, o), H[i] = s_i B_iᵀ
    H = H - H.mean(1, keepdim=True) if center and metric == "linear" else H
    H = [_kernel(h, sigma) for h in H] if metric == "nonlinear" else H
    R = {
        "euclidean": lambda g, h: torch.exp(-beta * (g - h).square().mean()),
        "cosine": lambda g, h: ((g * h).sum() / g.norm() / h.norm()).square(),
        "linear": lambda g, h: (g.T @ h).norm().square() / (g.T @ g).norm() / (h.T @ h).norm(),
        "nonlinear": lambda g, h: (g * h).sum() / g.norm() / h.norm(),
    }[metric]
    values = [R(g, h) for g, h in combinations(H, 2)]
    return sum(values, S.new_zeros(())) / max(1, len(values))


def _kernel(h: Tensor, sigma: float) -> Tensor:
    """h (n, o) → the RBF kernel of its rows, centred on both sides (n, n), as step 6 writes it."""
    variance = (h - h.mean(0)).square().sum(1).mean()
    K = torch.exp(-(h[:, None] - h[None]).square().sum(-1) / (2 * sigma**2 * variance))
    J = torch.eye(len(h), dtype=h.dtype, device=h.device) - 1 / len(h)
    return J @ K @ J


def _check(B: Tensor, S: Tensor, metric: str, beta: float, sigma: float, samples: int) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric: found {metric!r}, want one of {METRICS}")
    if not (0 < beta < torch.inf and 0 < sigma < torch.inf and samples >= 2):
        raise ValueError(f"found {beta=}, {sigma=}, {samples=}, want > 0, > 0, ≥ 2")
    fit = B.dim() == S.dim() > 1 and B.shape[:-2] == S.shape[:-2] and B.shape[-1] == S.shape[-1]
    if not fit or not all(X.is_floating_point() and X.numel() for X in (B, S)):
        found = f"{tuple(B.shape)}, {tuple(S.shape)}, {B.dtype}, {S.dtype}"
        raise ValueError(f"B, S: found {found}, want floats (o, r), (N, r)")


def _full_precision(X: Tensor) -> torch.autocast:
    """Keeps autocast out: half sums over thousands of tokens would be noise."""
    return torch.autocast("cpu" if X.device.type == "meta" else X.device.type, enabled=False)


def _gram(X: Tensor) -> Tensor:
    return X.mT @ X / X.shape[-2]  # (…, n, r) → (…, r, r)


def _lengths(G: Tensor, floor: Tensor | float) -> Tensor:
    """√G_ii (…, r); ∞, so that dividing gives 0 and no gradient, where G_ii ≤ floor."""
    g = (G + 0 * G).diagonal(dim1=-2, dim2=-1)  # 0·∞: what overflowed is nan
    return g.masked_fill(g <= floor, torch.inf).sqrt()


def _cosines(G: Tensor, floor: Tensor | float = EPS**2) -> Tensor:
    n = _lengths(G, floor)
    return G / n[..., :, None] / n[..., None, :]


def _centered(S: Tensor) -> tuple[Tensor, Tensor]:
    """S minus its token mean, and the variance (…, r) up to which that is only rounding."""
    mean = S.mean(-2, keepdim=True)
    return S - mean, (64 * torch.finfo(S.dtype).eps * mean.detach().squeeze(-2)).square() + EPS**2


def _alignments(S: Tensor, sigma: float) -> Tensor:
    """RBF CKA of the columns of S (…, n, r) → (…, r, r).                               [Step 6]"""
    C, floor = _centered(S)
    z = (C / _lengths(_gram(C), floor)[..., None, :]).mT / (sigma * 2**0.5)  # (…, r, n)
    E = (z[..., :, None] - z[..., None, :]).square().neg_().expm1_()  # (…, r, n, n), K − 1
    flat, rows = E.flatten(-2), E.mean(-1)
    every = rows.mean(-1, keepdim=True)
    G = flat @ flat.mT / flat.shape[-1] - 2 * _gram(rows.mT) + every @ every.mT
    return _cosines(G, 0.0)


def _sample(X: Tensor, samples: int, generator: torch.Generator | int | None) -> Tensor:
    """At most `samples` rows of X (…, n, k), drawn without the global generator."""
    if (n := X.shape[-2]) <= samples:
        return X
    if isinstance(generator, torch.Generator):
        rows = torch.randperm(n, generator=generator, device=generator.device)
    else:  # in the order of a hash, which a compiled graph can compute
        rows = torch.arange(n, device=X.device) + n * (generator or 0) ^ 0x5DEECE66D
        rows = (rows * rows * 6364136223846793005).argsort()
    return X.index_select(-2, rows[:samples].to(X.device, non_blocking=True))


@torch.no_grad()
def regauge(B: Tensor, A: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(B', A') with B'A' = BA whose components do not repeat each other: the control experiment.

    B (o, r), A (r, d), x (…, d); out: shapes and dtypes of B and A. B' has orthonormal columns, so
    cosine is 0. Without x, A' has orthogonal rows; with x, the codes x A'ᵀ are uncorrelated and
    linear is 0 on x. If r > o, the last r − o components are zero. Not unique. Raises ValueError.

    >>> B, A = regauge(torch.tensor([[3.0, 3], [4, 4]]), torch.tensor([[1.0, 0], [0, 2]]))
    >>> (B @ A).round(decimals=4)
    tensor([[3., 6.],
            [4., 8.]])
    """
    given = [X for X in (B, A, x) if X is not None]
    fit = B.dim() == A.dim() == 2 and B.shape[1] == len(A) and given[-1].shape[-1:] == A.shape[1:]
    if not fit or not all(X.is_floating_point() and X.isfinite().all() for X in given):
        found = [(tuple(X.shape), X.dtype) for X in given]
        raise ValueError(f"B, A, x: found {found}, want finite floats (o, r), (r, d), (…, d)")
    dtype = torch.promote_types(torch.promote_types(B.dtype, A.dtype), torch.float32)
    with _full_precision(B):
        Q, R = torch.linalg.qr(B.to(dtype))  # (o, k), (k, r), k = min(o, r)
        C = R @ A.to(dtype)  # BA = QC
        T = C.T if x is None else _centered(x.reshape(-1, x.shape[-1]).to(dtype) @ C.T)[0]
        V = torch.linalg.svd(torch.linalg.qr(T)[1])[2].T  # (k, k): all k directions, if N < k too
        null = B.shape[1] - Q.shape[1]
        return F.pad(Q @ V, (0, null)).to(B), F.pad(V.T @ C, (0, 0, 0, null)).to(A)


class LoRALinear(nn.Module):
    """LoRA: y = base(x) + scaling·B A x, with `base` frozen and B = 0 at first.            [Step 1]

    base: any module with in_features, out_features, weight and bias; called by forward, never
    opened, so a quantised or wrapped Linear works (merge needs a float weight). scaling is
    alpha/rank, or 1. dropout: on the input of A. generator: draws A, uniform in ±1/√d. A (r, d) and
    B (o, r) are fp32 for a half or quantised base. Raises ValueError (rank) or TypeError (base).
    """

    def __init__(
        self, base: nn.Module, rank=8, alpha: float | None = None, dropout=0.0, generator=None
    ) -> None:
        super().__init__()
        if not (getattr(base, "in_features", 0) and base.out_features):
            raise TypeError(f"base: found {type(base).__name__}, want an nn.Linear, not empty")
        if type(rank) is not int or rank < 1:
            raise ValueError(f"rank: found {rank!r}, want an integer ≥ 1")
        if not (abs(alpha or 0) < torch.inf and 0 <= dropout <= 1):
            raise ValueError(f"found {alpha=}, {dropout=}, want a number, 0 to 1")
        d, W = base.in_features, base.weight
        kw = {"dtype": torch.float64 if W.dtype == torch.float64 else torch.float32}
        A = torch.empty(rank, d, device=generator.device if generator else W.device, **kw)
        self.scaling = 1.0 if alpha is None else alpha / rank
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.A = nn.Parameter(A.uniform_(-(d**-0.5), d**-0.5, generator=generator).to(W.device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=W.device, **kw))
        self.base = base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        S = F.linear(self.dropout(x), self.A.to(x.dtype)).to(y.dtype)  # (…, r)
        rows, codes = y.reshape(-1, y.shape[-1]), S.reshape(-1, S.shape[-1])
        return torch.addmm(rows, codes, self.B.T.to(y.dtype), alpha=self.scaling).view(y.shape)

    def pair(self) -> tuple[Tensor, Tensor]:
        """(B, A) with ΔW = B A: scaling·B (o, r) and A (r, d), differentiable."""
        return self.scaling * self.B, self.A

    @property
    def weight(self) -> Tensor:
        """W + scaling·B A (o, d) in the base's dtype, rounded once, differentiable in A and B."""
        W, (B, A) = self.base.weight, self.pair()
        if not W.is_floating_point():
            raise TypeError(f"base.weight: found {W.dtype}, want a float dtype to add B A to")
        dtype = torch.promote_types(torch.promote_types(W.dtype, A.dtype), torch.float32)
        with _full_precision(W):
            return torch.addmm(W.to(dtype), B.to(dtype), A.to(dtype)).to(W.dtype)

    bias = property(lambda self: self.base.bias, doc="The base's bias (o,) or None.")
    in_features = property(lambda self: self.base.in_features, doc="d.")
    out_features = property(lambda self: self.base.out_features, doc="o.")

    def merge(self) -> nn.Linear:
        """A new nn.Linear with the weight W + scaling·B A; shares no memory with the base."""
        W, bias = self.weight.detach(), self.bias
        plain = nn.Linear(*W.T.shape, False, device="meta")
        plain.weight = nn.Parameter(W, False)
        plain.bias = bias if bias is None else nn.Parameter(bias.detach().clone(), False)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """What repr() shows beside the base."""
        return f"rank={self.A.shape[0]}, scaling={self.scaling:g}"


class ReSoRA(AbstractContextManager):
    """R of every LoRA in `model`: LoRALinear layers and PEFT's LoRA layers.

        regularizer = ReSoRA(model)  # before torch.compile; then remove(), or `with`
        loss = task_loss(model(x)) + 0.1 * regularizer.penalty()  # each step

    Hooks keep each layer's input (before dropout) of the latest forward of `model`; penalty()
    computes the codes from it, so that a checkpointed forward loses no gradient (compiled as well,
    it breaks the graph). Calls of one layer in one forward add their tokens. Nothing is kept in
    evaluation mode under no_grad. The active adapters of a PEFT layer are one set of components.
    Attach anew after set_adapter; no layer may change its input in place. Each process of DDP has
    its own R; FSDP2: reshard_after_forward=False. level="weight" needs no input, sets no hook.
    detach_input: R moves a layer's own A and B only; False, not for reentrant checkpointing: what
    is before, too. options are those of `redundancy`; nonlinear draws anew in each step. Raises
    ValueError if no LoRA is found, one is merged, DoRA or not linear, or an argument is wrong.
    """

    def __init__(
        self, model: nn.Module, metric="linear", level="feature", detach_input=True, **options
    ) -> None:
        redundancy(torch.ones(1, 1), torch.ones(1, 1), metric, **options)  # raises if it must
        if level not in ("feature", "weight"):
            raise ValueError(f"level: found {level!r}, want 'feature' or 'weight'")
        layers = {name: m for name, m in model.named_modules() if _is_lora(m)}
        if not layers:
            raise ValueError(f"model: found no LoRALinear, no PEFT LoRA in {type(model).__name__}")
        for name, layer in layers.items():
            _pair(name, layer)
        self.layers, self.metric, self.level = layers, metric, level
        self.detach_input, self._on = detach_input, True  # a compiled graph outlives its hooks
        self.options, self._draws = {"center": level == "feature", **options}, 0
        self._inputs: dict[str, list[Tensor]] = {}
        hooks = [(model, self._start), *((m, partial(self._record, n)) for n, m in layers.items())]
        hooks = hooks if level == "feature" else []
        self._handles = [m.register_forward_pre_hook(f, with_kwargs=True) for m, f in hooks]

    def _start(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if _recording(model):
            self._inputs = {}

    def _record(self, name: str, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        if not (self._on and _recording(layer)) or getattr(layer, "disable_adapters", False):
            return
        x = args[0] if args else next(iter(kwargs.values()))
        x = x.detach() if self.detach_input else x
        self._inputs.setdefault(name, []).append(x.reshape(-1, x.shape[-1]))

    def penalty(self) -> Tensor:
        """Mean over the layers of R on the inputs of the latest forward, which are then forgotten.

        Scalar in ≥ fp32; once per forward. Raises ValueError if a layer has no input or is merged.
        """
        inputs, self._inputs, self._draws = self._inputs, {}, self._draws + 1
        options = {"generator": self._draws, **self.options}
        groups = defaultdict(list)  # layers of one shape are computed together
        for name, layer in self.layers.items():
            B, A = _pair(name, layer)
            S = A.T if self.level == "weight" else self._codes(name, A, inputs)
            groups[B.shape, B.dtype, S.shape, S.dtype, S.device].append((B, S))
        R = []
        for group in groups.values():
            B, S = map(torch.stack, zip(*group, strict=True))
            R += [redundancy(B, S, self.metric, **options)] * len(group)
        return torch.stack([value.to(R[0].device) for value in R]).mean()

    def _codes(self, name: str, A: Tensor, inputs: dict[str, list[Tensor]]) -> Tensor:
        if name not in inputs:
            raise ValueError(f"{name}: found no input, want a forward, compiled after ReSoRA()")
        x = inputs[name][0] if len(inputs[name]) == 1 else torch.cat(inputs[name])
        with _full_precision(x):
            return x @ A.T.to(x.dtype)  # (N, r)

    def remove(self) -> None:
        """Take every hook off the model and forget what was recorded; twice does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._inputs, self._on = [], {}, False

    def __exit__(self, *error: object) -> None:
        self.remove()


def _recording(module: nn.Module) -> bool:
    """True in a forward for training, not in evaluation nor where checkpointing repeats it."""
    again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
    return not again and (module.training or torch.is_grad_enabled())


def _is_lora(module: nn.Module) -> bool:
    parts = getattr(module, "lora_A", None)  # PEFT: {adapter name: A}
    active = isinstance(parts, nn.ModuleDict) and any(a in parts for a in module.active_adapters)
    return active or isinstance(module, LoRALinear)


def _pair(name: str, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """(B (o, r), A (r, d)) of a layer, scaling folded in; PEFT's active adapters side by side."""
    if isinstance(layer, LoRALinear):
        return layer.pair()
    active = [a for a in layer.active_adapters if a in layer.lora_A]
    odd = layer.merged or layer.lora_magnitude_vector or hasattr(layer, "parameter_name")
    if odd or not active or not all(isinstance(part, nn.Linear) for part in layer.lora_A.values()):
        raise ValueError(f"{name}: found {type(layer)}, {layer.merged=}, want plain, unmerged LoRA")
    B = torch.cat([layer.lora_B[a].weight * layer.scaling[a] for a in active], 1)
    return B, torch.cat([layer.lora_A[a].weight for a in active])


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


def adapt(model: nn.Module, targets: Iterable[str], rank: int = 8, **kw) -> dict[str, LoRALinear]:
    """Freeze `model`, put LoRALinear around each Linear whose dotted name ends in a target.

    targets: a name or several; kw goes to LoRALinear. Returns {name: module}. Raises ValueError,
    with the model as it was, if a target names no Linear or an argument is out of range.
    """
    return _replace(model, targets, nn.Linear, lambda _, layer: LoRALinear(layer, rank, **kw))


def merge(model: nn.Module) -> nn.Module:
    """Replace each LoRALinear of `model` by its merged Linear, in place; return `model`."""
    new = {m: m.merge() for m in model.modules() if isinstance(m, LoRALinear)}
    for parent in list(model.modules()):  # every name of a shared layer
        parent._modules.update({n: new[m] for n, m in parent._modules.items() if m in new})
    return new.get(model, model)
