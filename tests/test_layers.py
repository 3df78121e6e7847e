"""What the adapted layers of all three methods do alike, each test for every kind of them.

`layer` makes one of a kind, `equation` is the weight that it stands for, by the method's own
equation, and `adapt` is the `adapt` of any method. Other tests borrow them.
"""

import copy
import pickle

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import eigenlorax
import hra
import resora
from eigenlorax import EigenLoRAxLinear, Subspace
from hra import HRAConv2d, HRALinear
from resora import LoRALinear, ReSoRA
from tests.checks import BF16, EPS, F16, F32, F64, close, eps, exactly, normal, seeded, within

METHODS = {"hra": hra, "resora": resora, "eigenlorax": eigenlorax}
LINEARS = ["HRA", "HRA strict", "LoRA", "EigenLoRAx", "EigenLoRAx, mixed"]
KINDS = ["HRA convolution", *LINEARS]


class Mixed(EigenLoRAxLinear):
    """Serves its active task the way a mixed batch is served: one task for each sample."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, torch.full((len(x),), self.task))


def subspace(o: int, d: int, K: int = 4, seed: int = 9) -> Subspace:
    """V_A (K, d) and V_B (K, o) of one random adapter."""
    return eigenlorax.recycle([{"q": (normal(seed, o, K), normal(seed, K, d))}])["q"]


def wrap(
    kind: str, base: nn.Module, generator: torch.Generator | None = None, seed: int = 9
) -> nn.Module:
    """A new layer of this kind around a base."""
    match kind:
        case "HRA":
            return HRALinear(base, 4, generator=generator)
        case "HRA strict":
            return HRALinear(base, 4, "random", strict=True, generator=generator)
        case "HRA convolution":
            return HRAConv2d(base, 4, generator=generator)
        case "LoRA":
            return LoRALinear(base, 4, alpha=6, generator=generator)
    made = Mixed if kind == "EigenLoRAx, mixed" else EigenLoRAxLinear
    V = subspace(base.out_features, base.in_features, seed=seed)
    return made(base, V, rank=2, tasks=3, scaling=0.5, generator=generator)


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every trained number of a model off its start."""
    generator = seeded(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.5 * normal(generator, *p.shape, dtype=p.dtype)
    return model


def layer(kind: str, dtype: torch.dtype = F64, seed: int = 0, bias: bool = True) -> nn.Module:
    """A filled layer on a random base; EigenLoRAx serves the second of three tasks."""
    base = nn.Linear(9, 7, bias=bias, dtype=dtype)
    if kind == "HRA convolution":
        base = nn.Conv2d(2, 7, (2, 3), padding=1, bias=bias, dtype=dtype)
    for p in base.parameters():
        p.data = 0.5 * normal(seed, *p.shape, dtype=dtype)
    made = fill(wrap(kind, base, seeded(seed), seed), seed)
    if isinstance(made, EigenLoRAxLinear):
        made.task = 1
    return made


def inputs(layer: nn.Module, *batch: int, dtype: torch.dtype = F64) -> Tensor:
    """Rows for a layer; images for a convolution."""
    if isinstance(layer, HRAConv2d):
        return normal(5, *batch[:1], 2, 4, 5, dtype=dtype)
    return normal(5, *batch, 9, dtype=dtype)


def equation(layer: nn.Module) -> Tensor:
    """The adapted weight in float64, by the method's equation."""
    W = layer.base.weight.double()
    if isinstance(layer, HRALinear):
        U = layer.U.double()
        H = hra.chain(U)
        if layer.strict:
            H = torch.eye(len(U), dtype=F64) - 2 * U @ torch.linalg.pinv(U)
        return (W.flatten(1) @ H).view_as(W)
    if isinstance(layer, LoRALinear):
        return W + layer.scaling * layer.B.double() @ layer.A.double()
    alpha_A, alpha_B = layer.alpha_A[layer.task].double(), layer.alpha_B[layer.task].double()
    return W + layer.scaling * layer.V_B.double().T @ alpha_B @ alpha_A.T @ layer.V_A.double()


def wanted(layer: nn.Module, x: Tensor) -> Tensor:
    """What the base answers in float64 with the equation's weight in the place of its own."""
    base = copy.deepcopy(layer.base).double()
    return functional_call(base, {"weight": equation(layer)}, (x.double(),))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: what trains}."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def asked(layer: nn.Module) -> list[nn.Parameter]:
    """What trains and has a part in the answer: of EigenLoRAx the α of the active task."""
    if isinstance(layer, EigenLoRAxLinear):
        return [layer.alpha_A[layer.task], layer.alpha_B[layer.task]]
    return [*trained(layer).values()]


def readings(layer: nn.Module) -> list[Tensor]:
    """All that one can ask of a layer without calling it."""
    found = [layer.weight, *layer.pair(), layer.merge().weight]
    if isinstance(layer, HRALinear):
        found += [layer.penalty(), hra.gamma(layer.U), hra.gram_schmidt(layer.U)]
    if isinstance(layer, LoRALinear):
        found += [ReSoRA(layer, metric, level="weight").penalty() for metric in resora.METRICS]
    return found


# -------------------------------------------------------------------------------------- one layer


def gradients(value: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Of a sum of sines, which tells every entry from the others; 0 where there is none."""
    total = value.sin().sum()
    return torch.autograd.grad(total, tensors, retain_graph=True, materialize_grads=True)


BOUND = 100 * EPS  # sums of up to 12 products of size 1, in a few steps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "batch, bias", [((), True), ((0,), True), ((5,), False), ((2, 3), True), ((2, 0, 3), True)]
)
def test_forward_weight_and_pair_are_the_equation(kind, batch, bias):
    """And so are their gradients at x and at all that trains."""
    m = layer(kind, bias=bias)
    if kind == "EigenLoRAx, mixed":
        batch = (3, *batch)  # one of them must be the sample
    x = inputs(m, *batch).requires_grad_()
    B, A = m.pair()
    sum_W = (m.base.weight.flatten(1) + B @ A).view_as(m.base.weight)
    W = equation(m)
    for found, exact in ((m(x), wanted(m, x)), (m.weight, W), (sum_W, W)):
        close(found, exact, BOUND)
        ours, theirs = gradients(found, x, *asked(m)), gradients(exact, x, *asked(m))
        for one, other in zip(ours, theirs, strict=True):
            close(one, other, 20 * BOUND)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_is_forward_and_a_plain_layer_of_its_own(kind, bias):
    m = layer(kind, bias=bias).eval()
    x, base = inputs(m, 4), copy.deepcopy(m.base)
    plain = m.merge()
    assert type(plain) is type(base) and str(plain) == str(base)
    assert not plain.training and not trained(plain)
    close(plain(x), m(x), BOUND)
    for p in plain.parameters():
        p.data.zero_()
    for p, before in zip(m.base.parameters(), base.parameters(), strict=True):
        exactly(p, before)


@pytest.mark.parametrize("kind", KINDS)
def test_it_stands_in_the_place_of_its_base(kind):
    """Attributes, names, what trains and what is frozen; and it starts at W, but for strict."""
    m = layer(kind)
    assert m.bias is m.base.bias and not trained(m.base)
    assert (m.in_features, m.out_features) == (m.base.weight[0].numel(), 7)
    own = {HRALinear: ["U"], HRAConv2d: ["U"], LoRALinear: ["A", "B"]}.get(type(m))
    frozen = ["base.weight", "base.bias"]
    if isinstance(m, EigenLoRAxLinear):
        own = [f"alpha_{side}.{task}" for side in "AB" for task in range(3)]
        frozen += ["V_A", "V_B"]
    assert [*trained(m)] == own
    assert {*m.state_dict()} == {*own, *frozen}
    assert all(value.is_contiguous() for value in m.state_dict().values())  # safetensors' wish
    assert isinstance(m, EigenLoRAxLinear) or "rank=4" in repr(m)
    new, x = wrap(kind, m.base), inputs(m, 3)
    if kind != "HRA strict":
        close(new(x), new.base(x), BOUND)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind, dtype):
    """What trains is at least float32, the answer is in the base's dtype, W' is rounded once."""
    m = layer(kind, dtype)
    x = inputs(m, 4, dtype=dtype)
    y, wide = m(x), torch.promote_types(dtype, F32)
    y.float().square().sum().backward()
    for p in asked(m):
        assert p.dtype == p.grad.dtype == wide
        assert p.grad.isfinite().all() and p.grad.any()
    assert y.dtype == m.weight.dtype == m.merge().weight.dtype == dtype
    close(y, wanted(m, x), 20 * eps(dtype))  # values to about 5, some ten roundings
    W = equation(m)
    rounded_once = eps(dtype) / 2 * W.abs() + 40 * eps(wide) * W.abs().max()
    within(((m.merge().weight - W).abs() / rounded_once).max(), 1.0)
    half, x = copy.deepcopy(m).to(BF16), x.to(BF16)  # what trains as well
    close(half(x), wanted(half, x), 20 * eps(BF16))
    assert {p.dtype for p in [*half.parameters(), *half.buffers()]} == {BF16}


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_rounds_the_answer_and_nothing_that_is_read(kind, dtype):
    m = layer(kind, F32)
    if isinstance(m, HRALinear):
        m.U.data *= 1000  # products of its columns are beyond float16
    x, before = inputs(m, 4, dtype=F32), readings(m)
    with torch.autocast("cpu", dtype=dtype):
        y, after = m(x), readings(m)
    assert y.dtype == dtype
    close(y, wanted(m, x), 20 * eps(dtype))
    for found, other in zip(after, before, strict=True):
        exactly(found, other)
    y.float().sum().backward()
    for p in asked(m):
        assert p.grad.isfinite().all() and p.grad.any()


@pytest.mark.parametrize("kind", ["LoRA", "EigenLoRAx", "EigenLoRAx, mixed"])
def test_a_base_that_stays_in_float32_under_autocast_keeps_its_digits(kind):
    class Exact(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    m = wrap(kind, Exact(9, 7))  # ΔW = 0
    m.base.bias.data.fill_(1000.1)
    x = inputs(m, 4, dtype=F32)
    with torch.autocast("cpu", BF16):
        exactly(m(x), m.base(x))


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_export_with_a_dynamic_batch(kind):
    m = layer(kind, F32)
    example, batch = inputs(m, 4, dtype=F32), torch.export.Dim("batch")
    exported = torch.export.export(m, (example,), dynamic_shapes=({0: batch},))
    for n in (2, 9):
        x = inputs(m, n, dtype=F32)
        close(exported.module()(x), m(x), 100 * eps(F32))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_bit(kind, reentrant):
    m = layer(kind)
    x = inputs(m, 4).requires_grad_()
    found = []
    for y in (m(x), checkpoint(m, x, use_reentrant=reentrant)):
        m.zero_grad()
        x.grad = None
        y.square().sum().backward()
        found.append([x.grad, *(p.grad for p in asked(m))])
    for one, other in zip(*found, strict=True):
        exactly(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_answer_alike_and_are_on_their_own(kind):
    m, loaded = layer(kind), layer(kind, seed=1)
    loaded.load_state_dict(m.state_dict())
    x = inputs(m, 4)
    y = m(x)
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), loaded):
        exactly(twin(x), y)
        assert trained(twin).keys() == trained(m).keys()
        fill(twin)
        exactly(m(x), y)


@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_is_all_that_is_consumed(kind):
    base, state = layer(kind).base, torch.get_rng_state()
    one, other = (wrap(kind, base, seeded(1)) for _ in range(2))
    one.merge()
    exactly(torch.get_rng_state(), state)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        exactly(p, q)
    one, other = (torch.cat([p.flatten() for p in asked(wrap(kind, base))]) for _ in range(2))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_on_meta_nothing_is_allocated_and_no_number_drawn(kind):
    base, state = layer(kind).base.to("meta"), torch.get_rng_state()
    for generator in (None, seeded(0)):
        m = wrap(kind, base, generator)
        found = [m(inputs(m, 4).to("meta")), *readings(m)]
        assert all(tensor.is_meta for tensor in [*found, *m.parameters(), *m.buffers()])
    assert found[0].shape == m.base(inputs(m, 4).to("meta")).shape
    exactly(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["HRA", "LoRA"])
def test_a_layer_around_a_layer_is_merged_with_it(kind):
    inner = layer(kind)
    model, x = nn.Sequential(fill(wrap(kind, inner), 1)), inputs(inner, 4)
    y = model(x)
    METHODS["hra" if kind == "HRA" else "resora"].merge(model)
    assert type(model[0]) is nn.Linear
    close(model(x), y, BOUND)


# -------------------------------------------------------------------------------------- a model


def adapt(
    method: str, model: nn.Module, targets: list[str], rank: int = 2, seed: int = 0, **options
) -> dict[str, nn.Module]:
    """A method's `adapt`. EigenLoRAx gets a random subspace for each target, which must be one."""
    if method == "eigenlorax":
        ends = {name: m for name, m in model.named_modules() if hasattr(m, "out_features")}
        named = {t: next(m for n, m in ends.items() if f".{n}".endswith(f".{t}")) for t in targets}
        targets = {t: subspace(m.out_features, m.in_features) for t, m in named.items()}
    return METHODS[method].adapt(model, targets, rank, generator=seeded(seed), **options)


class Net(nn.Module):
    """Two Linears, one of which has two names and is called twice, and a head."""

    def __init__(self):
        super().__init__()
        self.q, self.v, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.again = self.v

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(torch.tanh(self.v(torch.tanh(self.q(x))))))


@pytest.mark.parametrize("method", METHODS)
def test_a_model_is_adapted_trained_and_merged(method):
    """It starts where it was, only the adapters train, and all of it ends in plain Linears."""
    model, x = Net(), normal(0, 5, 6, dtype=F32)
    before, W = model(x).detach(), model.q.weight.detach().clone()
    layers = adapt(method, model, ["q", "v"])
    assert list(layers) == ["q", "v"] and type(model.head) is nn.Linear
    assert model.q is layers["q"] and model.v is model.again is layers["v"]
    own = {id(p) for m in layers.values() for p in trained(m).values()}
    assert {id(p) for p in trained(model).values()} == own
    close(model(x), before, 100 * eps(F32))
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.05, weight_decay=0)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    after = model(x).detach()
    assert (after - before).abs().max() > 1e-3
    exactly(layers["q"].base.weight, W)
    assert METHODS[method].merge(model) is model
    assert [type(m) for m in model.children()] == [nn.Linear] * 3 and model.v is model.again
    close(model(x), after, 100 * eps(F32))
    assert type(METHODS[method].merge(layers["q"])) is nn.Linear


@pytest.mark.parametrize("method", METHODS)
def test_two_names_of_a_layer_are_one_adapter(method):
    inner = nn.ModuleDict({"q": nn.Linear(4, 4)})
    layers = adapt(method, nn.ModuleDict({"a": inner, "b": inner}), ["q"])
    assert list(layers) == ["a.q", "b.q"] and layers["a.q"] is layers["b.q"] is inner["q"]


@pytest.mark.parametrize("method", METHODS)
def test_a_whole_name_is_that_layer_alone_and_an_end_finds_it_too(method):
    inner = nn.ModuleDict({"q": nn.Linear(4, 4)})
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "block": inner})
    for target in ("q", "block.q"):
        assert list(adapt(method, copy.deepcopy(model), [target])) == [target]
    assert list(adapt(method, nn.ModuleDict({"block": inner}), ["q"])) == ["block.q"]


@pytest.mark.parametrize("method", METHODS)
def test_modules_that_read_a_weight_and_do_not_call_the_layer(method):
    """Attention reads out_proj.weight, and the encoder in evaluation linear1's and linear2's."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder, x = nn.TransformerEncoder(block, 2, enable_nested_tensor=False), torch.randn(3, 5, 16)
    before = encoder(x)
    ends = "linear1", "linear2", "out_proj"
    names = [name for name, _ in encoder.named_modules() if name.endswith(ends)]
    assert len(adapt(method, encoder, names)) == 6
    y = fill(encoder)(x)
    assert (y - before).abs().max() > 0.01
    y.square().sum().backward()
    for name, p in trained(encoder).items():
        assert p.grad.abs().max() > 0, name
    with torch.no_grad():
        close(encoder.eval()(x), y, 1e-5)  # the fused path, on layer-normed values of size 1
        merged = METHODS[method].merge(encoder)
    close(merged(x), y, 1e-5)
    assert type(merged.layers[0].self_attn.out_proj) is nn.Linear


@pytest.mark.parametrize("method", METHODS)
def test_a_step_under_accelerate(method):
    accelerate.state.AcceleratorState._reset_state(True)  # other tests have made theirs, in fp32
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    adapt(method, model, ["0"])
    before = {name: p.detach().clone() for name, p in fill(model).named_parameters()}
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(prepared(normal(0, 5, 16, dtype=F32)).square().mean())
    optimizer.step()
    for name, p in model.named_parameters():
        assert p.dtype == F32 and p.isfinite().all()
        assert ((p - before[name]).abs().max() > 0.01) == p.requires_grad, name
    accelerate.state.AcceleratorState._reset_state(True)
