"""hra.py on bad input and in what users met: each case has the right value or a refusal.

A refusal names what was found and what is wanted, and leaves everything as it was.
"""

import copy

import accelerate
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations, weight_norm

import hra
import resora
from hra import HRAConv2d, HRALinear, adapt, reflect
from tests.checks import BF16, EPS, F32, F64, close, exactly, normal, seeded
from tests.test_hra import layer
from tests.test_hra_layer import net

# ------------------------------------------------------------------------------ wrong arguments


@pytest.mark.parametrize(
    "kw, text",
    [
        ({"rank": 0}, "rank: found 0"),
        ({"rank": 2.0}, "rank: found 2.0"),
        ({"rank": True}, "rank: found True"),
        ({"rank": 7}, "rank: found 7.*even"),
        ({"init": "zeros"}, "init: found 'zeros'"),
        ({"strict": True}, "trace d − 2r"),
        ({"rank": 13, "init": "random", "strict": True}, "found 13.*at most d = 12"),
    ],
)
def test_arguments_out_of_range(kw, text):
    base = nn.Linear(12, 5)
    with pytest.raises(ValueError, match=text):
        HRALinear(base, **kw)
    assert base.weight.requires_grad and base.bias.requires_grad


def test_other_kinds_of_layer():
    with pytest.raises(TypeError, match="found Conv2d"):
        HRALinear(nn.Conv2d(3, 4, 1))
    with pytest.raises(TypeError, match="found Linear"):
        HRAConv2d(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="groups: found 2, want 1"):
        HRAConv2d(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match=r"found torch.float32 of shape \(0, 8\)"):
        HRALinear(nn.Linear(0, 3))


@pytest.mark.parametrize(
    "x, text",
    [
        (torch.ones(2, 7), r"x: found torch.float32 of shape \(2, 7\), want floats .* d = 6"),
        (torch.ones(()), r"x: found torch.float32 of shape \(\)"),
        (torch.ones(2, 6, dtype=torch.int64), "x: found torch.int64"),
        (torch.ones(2, 6, dtype=torch.complex64), "x: found torch.complex64"),
        (np.ones((2, 6), dtype=np.float32), "x: found ndarray, want a tensor"),
        ([[1.0] * 6], "x: found list, want a tensor"),
    ],
)
def test_inputs_that_do_not_fit(x, text):
    m = HRALinear(nn.Linear(6, 5), 4)
    for call in (lambda: m(x), lambda: reflect(x, m.U)):
        with pytest.raises(ValueError, match=text):
            call()


@pytest.mark.parametrize(
    "U, text",
    [
        (torch.ones(6), r"U: found torch.float32 of shape \(6,\), want floats \(d, r\)"),
        (torch.ones(6, 0), r"U: found torch.float32 of shape \(6, 0\)"),
        (torch.ones(6, 2, dtype=torch.int64), "U: found torch.int64"),
        (torch.ones(6, 2).to(torch.float8_e4m3fn), "U: found torch.float8_e4m3fn"),
        (np.ones((6, 2)), "U: found ndarray, want a tensor"),
    ],
)
def test_columns_that_are_no_matrix_of_floats(U, text):
    calls = [hra.gamma, hra.penalty, hra.gram_schmidt, lambda U: reflect(torch.ones(2, 6), U)]
    for call in calls:
        with pytest.raises(ValueError, match=text):
            call(U)


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf, -torch.inf])
def test_columns_without_a_direction(bad, monkeypatch):
    m = HRALinear(nn.Linear(6, 5), 4)
    U = normal(0, 6, 4, dtype=F32)
    if bad == 0:
        U[:, 2] = 0
    else:
        U[3, 2] = bad
    before = copy.deepcopy(m.state_dict())
    with pytest.raises(ValueError, match="column 2 is"):
        m.load_state_dict(before | {"U": U})
    with pytest.raises(ValueError, match=r"1\.U: column 2 is"):
        nn.Sequential(nn.ReLU(), m).load_state_dict({"1.U": U}, strict=False)
    assert all(torch.equal(t, before[k]) for k, t in m.state_dict().items())
    with pytest.raises(ValueError, match="column 2 is"):
        hra.from_peft({"base_model.model.q.hra_u": U})
    with pytest.raises(ValueError, match="column 2 is"):
        hra.gram_schmidt(U)
    for found in (hra.gamma(U), hra.chain(U), hra.penalty(U), reflect(torch.ones(2, 6), U)):
        assert not found.isfinite().all()  # where values are not looked at, nan arrives
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda t, *a, **k: t.copy_(U[:, : t.shape[1]]))
    base = nn.Linear.__new__(nn.Linear)  # its own start draws too
    nn.Module.__init__(base)
    base.in_features, base.weight, base.bias = 6, nn.Parameter(torch.ones(5, 6)), None
    with pytest.raises(ValueError, match="column 2 is"):
        HRALinear(base, 4, "random")
    assert base.weight.requires_grad


def test_a_column_that_the_dtype_rounds_to_zero():
    m = HRALinear(nn.Linear(6, 5), 4)
    with pytest.raises(ValueError, match="column 0 is zero"):
        m.load_state_dict({"U": torch.full((6, 4), 1e-60, dtype=F64)}, strict=False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        m.load_state_dict({"U": torch.zeros(6, 5)}, strict=False)


# ----------------------------------------------------------------------------- names and models


@pytest.mark.parametrize(
    "targets, rank, kw, text",
    [
        (["body.0", "nowhere"], 4, {}, "no layer is named 'nowhere'"),
        ([], 4, {}, "found no targets"),
        (["body.0"], 3, {}, r"body\.0: rank: found 3"),
        (["body.0", "grouped"], 4, {}, r"grouped: base\.groups: found 2"),
        (["body.0", "conv"], 28, {"init": "random", "strict": True}, "body.0: rank: found 28"),
        (["body.0", "head"], 9, {"init": "random", "strict": True}, "body.0: rank: found 9"),
        (["body.0", "standardised"], 4, {}, "standardised: base: found StdConv2d"),
        (["body.0", "norm"], 4, {}, "'norm' fits norm, a LayerNorm"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(targets, rank, kw, text):
    model, _ = net()
    model.grouped = nn.Conv2d(4, 4, 3, groups=2)
    model.standardised = StdConv2d(4, 4, 3)
    model.norm = nn.LayerNorm(4)
    model.head.weight.requires_grad_(False)
    before = {n: (id(m), type(m)) for n, m in model.named_modules()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises((TypeError, ValueError), match=text):
        adapt(model, targets, rank, **kw)
    assert before == {n: (id(m), type(m)) for n, m in model.named_modules()}
    assert flags == [p.requires_grad for p in model.parameters()]


def test_a_name_that_fits_a_wrapper_as_well_is_refused():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

    blocks = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(4, 4)}) for _ in range(9))
    for i in range(1, 9):
        blocks[i]["q_proj"] = Wrapper()
    with pytest.raises(ValueError, match=r"'q_proj' fits 1.q_proj, .* \(8 in all\), a Wrapper"):
        adapt(blocks, ["q_proj"], 2)
    assert type(blocks[0]["q_proj"]) is nn.Linear


def test_an_unknown_name_in_a_large_model_is_a_short_message():
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(500))
    with pytest.raises(ValueError, match=r"\(500 in all\)") as error:
        adapt(model, ["query"], 2)
    assert len(str(error.value)) < 200


def test_the_new_layer_takes_the_mode_of_the_old_one():
    model, _ = net()
    model.body.eval()
    modules = adapt(model, ["conv", "body.0"], 2)
    assert modules["conv"].training and not modules["body.0"].training
    hra.merge(model)
    assert model.conv.training and not model.body[0].training


# --------------------------------------------------------------- bases with a forward of their own


class StdConv2d(nn.Conv2d):
    """Convolves with another weight than it shows, as timm's does."""

    def forward(self, x):
        W = self.weight
        W = (W - W.mean((1, 2, 3), keepdim=True)) / W.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, W, self.bias)


class Doubled(nn.Linear):
    """Another function than x Wᵀ + b, with an argument of its own."""

    def forward(self, x, times=2, *, shift=0.0):
        return times * super().forward(x) + shift


def test_a_base_with_its_own_forward_is_called_with_all_arguments():
    model, x = nn.Sequential(Doubled(6, 5, dtype=F64)), normal(0, 3, 6)
    (m,) = adapt(model, "0", 3, init="random").values()
    y = reflect(x, m.U) @ m.base.weight.T + m.bias
    close(model(x), 2 * y, 100 * EPS)
    close(m(x, 3, shift=1.0), 3 * y + 1, 100 * EPS)
    with pytest.raises(TypeError, match=r"0: base: found Doubled, whose forward is not"):
        hra.merge(model)
    assert model[0] is m


def test_a_convolution_with_its_own_forward_is_refused():
    with pytest.raises(TypeError, match="found StdConv2d, want nn.Conv2d and its forward"):
        HRAConv2d(StdConv2d(3, 4, 3))


def test_a_subclass_with_torchs_forward_is_merged():
    m = HRALinear(NonDynamicallyQuantizableLinear(6, 5, dtype=F64), 3, "random")
    x = normal(0, 3, 6)
    assert type(m.merge()) is nn.Linear
    close(m.merge()(x), m(x), 100 * EPS)


def test_weights_that_are_computed_from_others():
    """A Linear's is merged as it is, unless a hook computes it, which may be late. A convolution
    would compute it again, without H: refused."""
    for norm in (weight_norm, parametrizations.weight_norm):
        m = HRALinear(norm(nn.Linear(6, 5, dtype=F64)), 3, "random")
        x = normal(0, 3, 6)
        if norm is weight_norm:
            with pytest.raises(TypeError, match="found a hook"):
                m.merge()
        else:
            close(m.merge()(x), m(x), 100 * EPS)
        with pytest.raises(TypeError, match="found a Tensor of torch.float32, want a Parameter"):
            HRAConv2d(norm(nn.Conv2d(3, 4, 3)))


def test_an_adapter_of_another_kind_inside_is_not_merged_over():
    m = HRALinear(resora.LoRALinear(nn.Linear(6, 5), 2), 2)
    with pytest.raises(TypeError, match="found LoRALinear.*merge that one first"):
        m.merge()


def test_one_layer_that_cannot_be_merged_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(6, 6), Doubled(6, 6))
    modules = adapt(model, ["0", "1"], 2)
    with pytest.raises(TypeError, match="^1: base: found Doubled"):
        hra.merge(model)
    assert [*model] == [*modules.values()]


# ------------------------------------------------------------------------------ quantised bases


class Quantised(nn.Module):
    """Integer weights, and a forward of its own."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features, self.bias = 16, 8, None
        codes = torch.randint(-9, 9, (8, 16), dtype=torch.int8, generator=seeded(0))
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x):
        return x @ self.weight.to(x.dtype).T / 10


class Float8(nn.Linear):
    """A float8 weight beside its scale."""

    def __init__(self, d, o):
        super().__init__(d, o)
        self.scale = self.weight.detach().abs().max() / 448
        codes = (self.weight.detach() / self.scale).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("make", [Quantised, lambda: Float8(16, 8)])
def test_a_quantised_base_is_called_and_not_read(make):
    m, x = HRALinear(make(), 4, "random"), normal(4, 5, 16, dtype=F32)
    exactly(m(x), m.base(reflect(x, m.U)))
    m(x).sum().backward()
    assert m.U.dtype == F32 and m.U.grad.abs().max() > 0
    assert m.weight is m.base.weight  # some models ask for its dtype, as T5's wo does
    kind = str(m.base.weight.dtype)
    for call in (m.merge, m.pair):
        with pytest.raises(TypeError, match=f"found {kind}, quantised; want floats"):
            call()


def test_a_quantised_convolution_is_refused():
    conv = nn.Conv2d(3, 4, 3)
    conv.weight = nn.Parameter(conv.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TypeError, match="found a Parameter of torch.float8_e4m3fn, want"):
        HRAConv2d(conv)


def test_a_base_that_answers_in_another_dtype():
    class Casts(nn.Linear):
        def forward(self, x):
            return super().forward(x.to(self.weight.dtype))

    m, x = HRALinear(Casts(16, 8, dtype=BF16), 4, "random"), normal(4, 5, 16, dtype=F32)
    assert m(x).dtype == BF16
    exactly(m(x), m.base(reflect(x, m.U)))


# --------------------------------------------------------------------------------------- devices


def test_tensors_that_were_left_on_meta():
    real, meta = nn.Linear(6, 5), nn.Linear(6, 5, device="meta")
    x = torch.ones(2, 6)
    left = HRALinear(meta, 2)  # adapted after the model was offloaded
    with pytest.raises(ValueError, match="U: found on meta, want it where x is, on cpu"):
        left(x)
    assert left(x.to("meta")).shape == (2, 5)
    assert left.merge().weight.is_meta  # a model wholly on meta goes on working
    half = HRALinear(real, 2)
    half.U = nn.Parameter(half.U.to("meta"))
    for call in (half.merge, half.pair, lambda: half.weight):
        with pytest.raises(ValueError, match="found U on meta and base.weight on cpu"):
            call()
    conv = HRAConv2d(nn.Conv2d(3, 4, 3, device="meta"), 2)
    with pytest.raises(ValueError, match=r"x is on cpu and base\.weight on meta"):
        conv(torch.ones(1, 3, 5, 5))


def test_a_model_that_accelerate_offloads():
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)), normal(0, 3, 6, dtype=F32)
    adapt(model, ["0", "1"], 3, init="random")
    wanted = model(x)
    accelerate.cpu_offload(model)
    close(model(x), wanted, 0.0)
    with pytest.raises(ValueError, match="^0: found U and base.weight on meta"):
        hra.merge(model)


@pytest.fixture
def one_process():
    """A process group of one, for what needs a group at all."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("strict", [False, True])
def test_loading_into_fsdp2(one_process, strict):
    model, x = nn.Sequential(layer(0, 6, 5, 3, strict=strict)), normal(0, 4, 6)
    other = nn.Sequential(layer(1, 6, 5, 3, strict=strict))
    wanted, state = model(x), copy.deepcopy(model.state_dict())
    fully_shard(other)
    assert isinstance(other[0].U, DTensor)
    sharded = copy.deepcopy(other.state_dict())
    set_model_state_dict(other, state, options=StateDictOptions(full_state_dict=True))
    close(other(x), wanted, 100 * EPS)
    other.load_state_dict(sharded)  # DTensors
    assert (other(x) - wanted).abs().max() > 1e-3


def test_a_base_with_a_hook_serves_and_does_not_merge():
    layer = HRALinear(nn.Linear(4, 3), 2)
    layer.base.register_forward_hook(lambda module, args, y: 2 * y)
    x = normal(0, 5, 4, dtype=F32)
    close(layer(x), layer.base(x), 1e-5)  # it starts at the identity; float32, of order 1
    with pytest.raises(TypeError, match="found a hook"):
        layer.merge()


def test_a_convolution_with_a_step_of_its_own_is_refused():
    class Doubling(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, 2 * weight, bias)

    with pytest.raises(TypeError, match="found Doubling, want nn.Conv2d and its forward"):
        hra.HRAConv2d(Doubling(3, 4, 3), 2)


def test_an_image_of_another_kind_is_refused_by_a_sentence():
    layer = hra.HRAConv2d(nn.Conv2d(3, 4, 3), 2)
    for x, found in ((torch.ones(1, 4, 5, 5), r"\(1, 4, 5, 5\)"), ([1.0], "list")):
        with pytest.raises(ValueError, match=f"x: found {found}, want \\(…, 3, height, width"):
            layer(x)


def test_a_packed_weight_is_read_as_it_is():
    base = nn.Linear(4, 3)
    layer = HRALinear(base, 2)
    base.weight = nn.Parameter(torch.zeros(6, 1), requires_grad=False)  # two numbers in one
    assert layer.weight is base.weight


def test_a_base_without_a_weight_is_refused():
    class Packed(nn.Module):
        in_features, out_features, bias = 4, 3, None

    with pytest.raises(TypeError, match="base: found Packed, want an nn.Linear"):
        HRALinear(Packed(), 2)
