# SPDX-License-Identifier: MIT
# HRA (arXiv:2405.17484v3), written from the paper; one self-contained file: copy it.
# Cite: Yuan, Liu, Xu, "Bridging the gap between low-rank and orthogonal adaptation", NeurIPS 2024.
r"""HRA: freeze W, train r vectors u₁…u_r and use W' = W·H₁H₂…H_r with Hᵢ = I − 2·uᵢuᵢᵀ/‖uᵢ‖².

Paper: Yuan, Liu, Xu, NeurIPS 2024, arXiv:2405.17484v3; equation numbers are that version's.
Training minimises the task's loss + λ·Σ penalty(U), summed over layers; λ = ∞ is `strict`. [Eq. 6]
Û is U with columns of length 1, Q is U after Gram–Schmidt, σᵢ are W's singular values.

Symbols (rows, columns; torch's weight is (out, in) = (o, d)):
  paper     | here        | shape  | meaning
  W         | base.weight | (o, d) | the pre-trained weight, frozen
  U_r       | U           | (d, r) | columns uᵢ, trained; any length but 0
  Γ_r       | gamma(U)    | (r, r) | upper triangular, H = I + U Γ Uᵀ
  H⁽ʳ⁾      | chain(U)    | (d, d) | the product H₁H₂…H_r, orthogonal
  W H⁽ʳ⁾    | weight      | (o, d) | the adapted weight W'
  W U_r Γ_r | pair()[0]   | (o, r) | B of the equal LoRA, ΔW = B A
  U_rᵀ      | pair()[1]   | (r, d) | A of the equal LoRA

Derivation:
  1. Hᵢ = I − 2·uᵢuᵢᵀ/‖uᵢ‖² is its own inverse and its own transpose: reflect twice, be back.
  2. H = H₁H₂…H_r is orthogonal, being a product of orthogonal matrices.                    [Eq. 1]
  3. Let H₁…Hᵢ₋₁ = I + U Γ Uᵀ, U the first i − 1 columns; for i = 1, I. Times Hᵢ, u = uᵢ, that is
     I + U Γ Uᵀ − (2/‖u‖²)(u + U Γ Uᵀu) uᵀ: U gains the column u, Γ the last column
     −(2/‖u‖²)·[Γ Uᵀu; 1] and, left of it, a last row of zeros.                        [Eq. 3, 4]
  4. Try Γ = −S⁻¹ with S = ½·diag(UᵀU) + striu(UᵀU), striu = the part above the diagonal. S gains
     the column [Uᵀu; ½‖u‖²], so S⁻¹ gains (2/‖u‖²)·[−S⁻¹Uᵀu; 1], which is step 3's: no recursion.
  5. Replace U by U·D, D diagonal: S becomes D S D, Γ becomes D⁻¹ Γ D⁻¹, and U Γ Uᵀ stays. So no
     column is ever normalised for its own sake and there is no ε; only uᵢ = 0 has no reflection.
  6. x Hᵀ = x + (x U)(U Γ)ᵀ: two thin products, and never a d×d matrix.                      [Eq. 2]
  7. W H = W + (W U Γ) Uᵀ: a LoRA whose B follows from its A.                                [Eq. 5]
  8. Equal neighbours cancel, Hᵢ Hᵢ = I: pairs (u, u, v, v, …) start the chain at H = I.

Claims (a test of each id in tests/test_hra.py):
  H1  chain(U) is orthogonal; max|HᵀH − I| ≤ 10·d·eps in fp32 for r ≤ min(d, 512)  [Eq. 1]
  H2  reflect(x, U) = x·chain(U)ᵀ  [Eq. 2]
  H3  gamma(U) is upper triangular and equals Eq. 4's recursion, D⁻¹ Γ_rec(Û) D⁻¹ with D = diag‖uᵢ‖
  H4  W·H = W + (W U Γ)Uᵀ, ΔW has rank ≤ r, and pair() is (W U Γ, Uᵀ)  [Eq. 5]
  H5  pairs give H = I; the task loss's two gradients of a pair are opposite, the penalty's equal
  H6  (W H)(W H)ᵀ = W Wᵀ: the lengths of the neurons and the angles between them are kept
  H7  penalty(U) = 0 iff the columns are orthogonal, and then Γ = −2·diag(1/‖uᵢ‖²)  [Eq. 6]
  H8  strict (λ = ∞): H = I − 2QQᵀ, symmetric, trace d − 2r, hence never I; rank(U) < r is refused
  H9  for r ≤ d, ‖W − W H‖_F ≤ 2·√(Σ_{i≤r} σᵢ²), met by W's first r right singular vectors  [App. A]
  H10  merge() = forward, in O(d·r·(o + r)) for r ≤ d
  H11  H, the outputs and the penalty do not depend on the lengths ‖uᵢ‖; gradients go with 1/‖uᵢ‖
  H12  gradients are those of the literal chain

Cost of HRALinear: d·r trained numbers (LoRA: (d + o)·r); 4·N·d·r + 4·d·r² + 4·r³ flops forward for
N rows, beyond the base's 2·N·d·o. Saved for backward: x and x U, as LoRA saves x and x Aᵀ. Where x
needs no gradient (a first layer), LoRA's backward skips the base and HRA's cannot: U sits before W.

Differs from the paper: all reflections at once; columns of any length, which changes the size of a
step, not the function; a start as in the authors' NLU code, whose learning rates then fit.
Differs from the authors' code: it multiplies r dense d×d matrices, leaves the penalty's norm
unsquared, runs Gram–Schmidt on equal columns (0/0); its LLaMA part reflects the output, with an ε.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _full_precision(f: Callable) -> Callable:
    """f, which takes a tensor first, kept out of autocast: a half Gram would overflow."""

    @functools.wraps(f)
    def wrapped(X: Tensor, *args):
        """f with autocast off."""
        kind = "cpu" if X.device.type == "meta" else X.device.type
        with torch.autocast(kind, enabled=False):
            return f(X, *args)

    return wrapped


def _rows(U: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(A (r, d), s (r, 1)), A = Uᵀ/s: rows no longer than 1, in ≥ fp32, so that nothing overflows.

    By step 5 any s serves; it is a constant for autograd, because H does not depend on it.
    Rows, because a gradient of shape (r, d) takes a third of the time of one of shape (d, r).
    """
    _check(U, "U", values=False)
    A = U.T.to(torch.promote_types(torch.promote_types(U.dtype, dtype), torch.float32)).contiguous()
    s = A.detach().abs().amax(1, keepdim=True) * len(U) ** 0.5
    s = s.clamp(max=torch.finfo(s.dtype).max)
    return A / s, s


def _gamma(A: Tensor) -> Tensor:
    """Γ of the rows of A (r, d)."""
    G = A @ A.T
    S = G.triu() - torch.diag(G.diagonal() / 2)
    I = torch.eye(len(S), dtype=S.dtype, device=S.device)
    X = torch.linalg.solve_triangular(S, I, upper=True)
    return -X - X @ (I - S @ X)  # one Newton step: else near-parallel columns miss H1


@_full_precision
def gamma(U: Tensor) -> Tensor:
    """Γ with H₁H₂…H_r = I + U Γ Uᵀ.                                                   [Eq. 3, 4]

    U (d, r), columns of any length but 0; out (r, r) upper triangular, in ≥ fp32. Raises ValueError
    if U is not that, or Γ, which goes with 1/(‖uᵢ‖·‖uⱼ‖), leaves fp32 (lengths of 1e±18).

    >>> gamma(torch.tensor([[1.0, 2.0], [1.0, 0.0]]))
    tensor([[-1.0000,  1.0000],
            [ 0.0000, -0.5000]])
    """
    _check(U, "U")
    A, s = _rows(U)
    G = _gamma(A).triu() / s / s.T
    if not (U.is_meta or (G.isfinite().all() and (1 / G.diagonal()).isfinite().all())):
        raise ValueError(f"U: found up to {U.abs().max():g}, want a Γ in the range of {G.dtype}")
    return G


@_full_precision
def chain(U: Tensor) -> Tensor:
    """H₁H₂…H_r, one reflection after the other: slow, and the oracle for all that is fast. [Eq. 1]

    U (d, r), columns of any length but 0, else ValueError; out (d, d), in ≥ fp32.

    >>> chain(torch.tensor([[1.0, 2.0], [1.0, 0.0]]))  # swap and negate, then negate the first
    tensor([[ 0., -1.],
            [ 1.,  0.]])
    """
    _check(U, "U")
    I = torch.eye(len(U), dtype=torch.promote_types(U.dtype, torch.float32), device=U.device)
    H = I
    for u in _rows(U)[0]:
        H = H @ (I - 2 * torch.outer(u, u) / (u @ u))
    return H


@_full_precision
def _wy(U: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(A, C), both (r, d): H = I + CᵀA with A ∝ Uᵀ and C = ΓᵀA."""
    A, _ = _rows(U, dtype)
    return A, _gamma(A).T @ A


def _plus(X: Tensor, A: Tensor, C: Tensor) -> Tensor:
    """X + (X Aᵀ) C for X (…, d), A and C (r, d), in X's dtype."""
    rows, A, C = X.reshape(-1, X.shape[-1]), A.to(X.dtype), C.to(X.dtype)
    return torch.addmm(rows, rows @ A.T, C).view(X.shape)


def reflect(x: Tensor, U: Tensor) -> Tensor:
    """x Hᵀ, so that reflect(x, U) @ W.T is z = W H x row by row.                         [Eq. 2]

    x (…, d), U (d, r); out (…, d), dtype of x, or autocast's. Not x H: reflect(x, U.flip(1)).
    ValueError for other shapes or dtypes. Values are not looked at, as that waits for the device:
    a zero column, nan, inf or an overflow in x's dtype gives nan.

    >>> reflect(torch.tensor([3.0, 5.0]), torch.tensor([[1.0, 2.0], [1.0, 0.0]]))
    tensor([-5.,  3.])
    """
    if (x.shape[-1:], x.device) != (U.shape[:1], U.device) or not x.is_floating_point():
        raise ValueError(f"x: found {x.dtype} {x.shape} {x.device}, want (…, d) of {U.shape}")
    return _plus(x, *_wy(U, x.dtype))


@_full_precision
def penalty(U: Tensor) -> Tensor:
    """‖I − ÛᵀÛ‖_F² with Û = the columns of U at length 1, for one layer.                  [Eq. 6]

    U (d, r), columns of any length but 0 (for r > 1, 0, nan or inf gives nan); out ≥ 0 in ≥ fp32.

    >>> penalty(torch.tensor([[3.0, 1.0], [4.0, 0.0]]))  # 2·cos² = 2·(3/5)²
    tensor(0.7200)
    """
    A, _ = _rows(U)
    G = A @ A.T
    n = G.diagonal().sqrt()
    return 2 * (G / n / n[:, None]).triu(1).square().sum()  # ÛᵀÛ's diagonal is 1


def _orthonormal(U: Tensor) -> Tensor:
    """Gram–Schmidt as the QR of U with R's diagonal positive, without looking at U's rank."""
    Q, R = torch.linalg.qr(_rows(U)[0].T)
    return Q * R.detach().diagonal().sign()


def gram_schmidt(U: Tensor) -> Tensor:
    """Q (d, r): the columns of U made orthonormal from left to right: λ = ∞.           [Sec. 3.4]

    U (d, r); out (d, r) in ≥ fp32. Raises ValueError if U has not full column rank.

    >>> gram_schmidt(torch.tensor([[3.0, 0.0], [4.0, 5.0]]))
    tensor([[ 0.6000, -0.8000],
            [ 0.8000,  0.6000]])
    """
    _check(U, "U", strict=True)
    return _orthonormal(U)


def _check(U: Tensor, what: str, strict: bool = False, values: bool = True) -> None:
    """Raise ValueError unless U's columns are finite and nonzero; strict: and independent."""
    if U.dim() != 2 or not U.numel() or not U.is_floating_point():
        found = f"{U.dtype} of shape {tuple(U.shape)}"
        raise ValueError(f"{what}: found {found}, want floats (d, r), d and r ≥ 1")
    if U.is_meta or not values:
        return
    U = U.detach()
    for i, size in enumerate(U.abs().amax(0).tolist()):
        if not 0 < size < torch.inf:
            kind = "zero" if size == 0 else "not finite"
            raise ValueError(f"{what}: column {i} is {kind}; a reflection needs a direction")
    if strict:
        rank = int(torch.linalg.matrix_rank(F.normalize(_rows(U)[0])))
        if rank < U.shape[1]:
            raise ValueError(f"{what}: found rank {rank}, strict wants r = {U.shape[1]}")


def _draw(d: int, k: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """(d, k) uniform in ±1/√k, drawn where the generator lives."""
    U = torch.empty(d, k, device=generator.device if generator else device)
    return U.uniform_(-(k**-0.5), k**-0.5, generator=generator).to(device)


class HRALinear(nn.Module):
    """z = base(x Hᵀ): a frozen nn.Linear behind r trained reflections of its input.        [Eq. 1]

    base      any module with in_features, out_features, weight and bias; called, never opened,
              by forward, so a quantised or wrapped Linear works (merge needs a float weight)
    rank      r ≥ 1, the number of reflections
    init      "identity": equal pairs, H = I, rank even;  "random": H ≠ I, any rank
    strict    λ = ∞: U passes through Gram–Schmidt first; needs init="random" and rank ≤ d
    generator draws U; the global one if None

    U (d, r) is fp32 for a half or quantised base, else of the base's dtype. Raises ValueError if
    an argument is out of range, TypeError if base has no in_features. With FSDP2, penalty() needs
    reshard_after_forward=False: it reads U between forward and backward.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        init: str = "identity",
        strict: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        d = self._width(base)
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"rank: found {rank!r}, want an integer ≥ 1")
        if init not in ("identity", "random"):
            raise ValueError(f"init: found {init!r}, want 'identity' or 'random'")
        if strict and init == "identity":
            why = "I − 2QQᵀ has trace d − 2r, never I's, and equal columns give 0/0"
            raise ValueError(f"strict: found init='identity', want 'random': {why}")
        if init == "identity" and rank % 2:
            raise ValueError(f"rank: found {rank}, init='identity' wants it even, for equal pairs")
        if strict and rank > d:
            raise ValueError(f"rank: found {rank}, strict wants at most d = {d} orthogonal columns")
        W = base.weight
        copies = 2 if init == "identity" else 1
        U = _draw(d, rank // copies, W.device, generator).repeat_interleave(copies, dim=1)
        _check(U, "U", strict)
        self.strict = strict
        self.U = nn.Parameter(U.to(torch.float64 if W.dtype == torch.float64 else torch.float32))
        self.base = base.requires_grad_(False)

    @staticmethod
    def _width(base: nn.Module) -> int:
        if not hasattr(base, "in_features"):
            raise TypeError(f"base: found {type(base).__name__}, want an nn.Linear")
        return base.in_features

    def _factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(A, C), both (r, d), with H = I + CᵀA."""
        if not self.strict:
            return _wy(self.U, dtype)
        Q = _orthonormal(self.U).T
        return Q, -2 * Q

    def forward(self, x: Tensor) -> Tensor:
        return self.base(_plus(x, *self._factors(x.dtype)))

    @property
    def weight(self) -> Tensor:
        """W' = W H, in the base's shape and dtype, differentiable in U.                  [Eq. 5]"""
        W = self._matrix()
        A, C = self._factors(W.dtype)
        return _full_precision(_plus)(W, C, A).view_as(self.base.weight).to(self.base.weight.dtype)

    def _matrix(self) -> Tensor:
        """W (o, d) in ≥ fp32."""
        W = self.base.weight
        if not W.is_floating_point():
            raise TypeError(f"base.weight: found {W.dtype}, want a float dtype to multiply by H")
        return W.flatten(1).to(torch.promote_types(W.dtype, torch.float32))

    bias = property(lambda self: self.base.bias, doc="The base's bias (o,) or None; HRA has none.")
    in_features = property(lambda self: self.base.in_features, doc="d.")
    out_features = property(lambda self: self.base.out_features, doc="o.")

    def penalty(self) -> Tensor:
        """‖I − ÛᵀÛ‖_F² of the columns in use: 0 up to rounding if strict.                [Eq. 6]"""
        return penalty(_orthonormal(self.U) if self.strict else self.U)

    def pair(self) -> tuple[Tensor, Tensor]:
        """(B, A) = (W U Γ, Uᵀ), so that W' = W + B A; strict: (−2WQ, Qᵀ).                   [Eq. 5]

        B (o, r), A (r, d), in ≥ fp32, differentiable in U; a convolution's W is unfolded to (o, d).
        """
        W = self._matrix()
        A, C = self._factors(W.dtype)
        if not self.strict:  # back from A = Uᵀ/s and C = Γ(Aᵀ)ᵀA to Uᵀ and ΓᵀUᵀ
            A, C = self.U.T.to(W.dtype), C / _rows(self.U, W.dtype)[1]
        return _full_precision(torch.matmul)(W, C.T), A

    def merge(self) -> nn.Module:
        """A new plain layer, frozen, of weight W H, rounded once to the base's dtype."""
        layer, bias = self._plain(), self.bias
        layer.weight = nn.Parameter(self.weight.detach(), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer.train(self.training)

    def _plain(self) -> nn.Module:
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """Refuse a U that has no reflections, before anything of this module is copied."""
        U = state_dict.get(f"{prefix}U")
        if isinstance(U, Tensor) and U.shape == self.U.shape:  # all else is torch's to report
            _check(U.to(self.U.dtype), f"{prefix}U", self.strict)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """What repr() shows beside the base."""
        return f"rank={self.U.shape[1]}, strict={self.strict}"


class HRAConv2d(HRALinear):
    """The same for nn.Conv2d, whose weight (o, c, k, l) is the matrix (o, d) with d = c·k·l.

    Reflecting patches costs k·l times the input, so forward adds B·conv(x, A), with (B, A) = pair()
    and the base's own stride, padding, dilation and padding mode. Raises as HRALinear, and
    ValueError if base.groups > 1 (each group sees other inputs: no one H turns them all).
    """

    @staticmethod
    def _width(base: nn.Module) -> int:
        if not isinstance(base, nn.Conv2d):
            raise TypeError(f"base: found {type(base).__name__}, want an nn.Conv2d")
        if base.groups > 1:
            raise ValueError(f"base.groups: found {base.groups}, want 1")
        return base.weight[0].numel()

    def forward(self, x: Tensor) -> Tensor:
        W = self.base.weight
        A, C = self._factors(W.dtype)
        A = A.reshape(-1, *W.shape[1:]).to(W.dtype)  # (r, c, k, l)
        B = (W.flatten(1) @ C.T.to(W.dtype))[..., None, None]  # (o, r, 1, 1)
        return self.base(x) + F.conv2d(self.base._conv_forward(x, A, None), B)

    def _plain(self) -> nn.Module:
        b = self.base
        shape = b.in_channels, b.out_channels, b.kernel_size, b.stride, b.padding, b.dilation
        return nn.Conv2d(*shape, 1, b.bias is not None, b.padding_mode, "meta")

    in_features = property(lambda self: self.base.weight[0].numel(), doc="d = c·k·l.")
    out_features = property(lambda self: self.base.out_channels, doc="o.")


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


def adapt(model: nn.Module, targets: Iterable[str], rank: int = 8, **kw) -> dict[str, HRALinear]:
    """Freeze `model`, put HRA around each Linear and Conv2d whose dotted name ends in a target.

    Adapters in it are frozen too. Returns {name: module}; kw goes to HRALinear and HRAConv2d.
    Raises ValueError, with the model as it was, for a name or a layer that does not fit.
    """

    def make(name: str, layer: nn.Module) -> HRALinear:
        """The adapted layer."""
        try:
            return (HRAConv2d if isinstance(layer, nn.Conv2d) else HRALinear)(layer, rank, **kw)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    return _replace(model, targets, (nn.Linear, nn.Conv2d), make)


def merge(model: nn.Module) -> nn.Module:
    """Replace each adapted layer of `model` by its merged plain layer, in place; return `model`."""
    modules = model.named_modules(remove_duplicate=False)
    found = {name: m for name, m in modules if name and isinstance(m, HRALinear)}
    plain = {m: m.merge() for m in found.values()}
    for name, m in reversed(found.items()):  # an adapter inside another one goes first
        model.set_submodule(name, plain[m])
    return model.merge() if isinstance(model, HRALinear) else model


def from_peft(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{name: U (d, r)} from the tensors of an adapter that PEFT saved; apply_GS is not among them.

    modules = adapt(model, [*Us], r, init="random", strict=apply_GS), and then for each of them
    modules[name].load_state_dict({"U": Us[name]}, strict=False); KeyError: one name ends another.
    Raises ValueError on any other key (a trained bias, say) and a column zero or not finite.

    >>> from_peft({"base_model.model.encoder.q.hra_u": torch.ones(1, 2)})
    {'encoder.q': tensor([[1., 1.]])}
    """
    head, tail, Us = "base_model.model.", ".hra_u", {}
    for key, U in state_dict.items():
        if not (key.startswith(head) and key.endswith(tail) and len(key) > len(head + tail)):
            kind = "a trained bias" if key.endswith(".bias") else "an unknown key"
            raise ValueError(f"found {kind}, {key!r}; want only {head}NAME{tail}")
        _check(U, key)
        Us[key[len(head) : -len(tail)]] = U
    return Us


def to_peft(modules: Mapping[str, HRALinear]) -> dict[str, Tensor]:
    """The tensors PEFT loads for {name: module}; its config needs r and apply_GS = strict.

    >>> list(to_peft({"encoder.q": HRALinear(nn.Linear(4, 3), 2)}))
    ['base_model.model.encoder.q.hra_u']
    """
    return {f"base_model.model.{n}.hra_u": m.U.detach().clone() for n, m in modules.items()}
