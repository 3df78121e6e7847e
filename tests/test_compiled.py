"""Compiled and eager modules agree, in one graph; forward, penalty and backward never wait.

Forward and penalty of every method as one function of x, so that a graph break, or a value that
Python asks for, is found wherever it is.
"""

import shutil

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call

import eigenlorax
import hra
import resora

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def base(kind: type = nn.Linear) -> nn.Module:
    layer = nn.Linear(12, 8) if kind is nn.Linear else nn.Conv2d(3, 8, (2, 3), padding=1)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3, generator=seeded())
    return layer.double()


class Step(nn.Module):
    """What a training step asks of adapted layers: outputs and, if there is one, the penalty."""

    def __init__(self, layer: nn.Module, penalty=None, **call):
        super().__init__()
        self.layer, self.penalty, self.call = layer, penalty, call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x, **self.call)
        return y if self.penalty is None else y.square().mean() + self.penalty()


def hra_step(kind: type = nn.Linear, **options) -> Step:
    wrap = hra.HRALinear if kind is nn.Linear else hra.HRAConv2d
    layer = wrap(base(kind), 4, "random", generator=seeded(1), **options)
    return Step(layer, layer.penalty)


def resora_step(metric: str | None, level: str = "feature", samples: int = 64) -> Step:
    torch.manual_seed(0)
    model = nn.Sequential(base(), nn.Tanh(), nn.Linear(8, 12).double(), nn.Tanh(), base())
    for i, layer in enumerate(
        resora.adapt(model, ["0", "2", "4"], 3, generator=seeded(2)).values()
    ):
        nn.init.normal_(layer.B, generator=seeded(i))
    if metric is None:
        return Step(model)
    return Step(model, resora.ReSoRA(model, metric, level, samples=samples).penalty)


def eigenlorax_step() -> Step:
    normal = lambda *size: torch.randn(*size, dtype=torch.float64, generator=seeded(3))  # noqa: E731
    subspace = eigenlorax.recycle([{"q": (normal(8, 6), normal(6, 12))}], k=5)["q"]
    options = dict(rank=2, init="random", generator=seeded(4))
    return Step(eigenlorax.EigenLoRAxLinear(base(), subspace, **options))


STEPS = {
    "HRA": hra_step,
    "HRA strict": lambda: hra_step(strict=True),
    "HRA convolution": lambda: hra_step(nn.Conv2d),
    "LoRA": lambda: resora_step(None),
    **{f"ReSoRA {m}": (lambda m=m: resora_step(m)) for m in resora.METRICS},
    **{f"ReSoRA {m} weight": (lambda m=m: resora_step(m, "weight")) for m in resora.METRICS},
    "ReSoRA nonlinear, drawn": lambda: resora_step("nonlinear", samples=16),
    "EigenLoRAx": eigenlorax_step,
}


def inputs(name: str, rows: int = 40) -> torch.Tensor:
    size = (4, 3, 5, 6) if "convolution" in name else (rows, 12)
    return torch.randn(size, dtype=torch.float64, generator=seeded(5)).requires_grad_()


def value_and_gradients(step: Step, call, x: torch.Tensor) -> list[torch.Tensor]:
    trained = [p for p in step.parameters() if p.requires_grad]
    y = call(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained])]


def agree(name: str, backend: str) -> None:
    torch.compiler.reset()
    plain, other = STEPS[name](), STEPS[name]()  # two, since a draw moves on
    whole = "drawn" not in name  # a generator cannot be made inside of a graph
    compiled = torch.compile(other, fullgraph=whole, backend=backend)
    for _ in range(2):
        eager = value_and_gradients(plain, plain, inputs(name))
        fast = value_and_gradients(other, compiled, inputs(name))
        for a, b in zip(eager, fast, strict=True):
            assert a.isfinite().all()
            scale = 1e3 * torch.finfo(a.dtype).eps * a.abs().max()  # some thousand sums
            assert (a - b).abs().max() <= scale, (name, (a - b).abs().max(), scale)


@pytest.mark.parametrize("name", STEPS)
def test_one_graph_equals_eager(name):
    agree(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here, which inductor needs")
@pytest.mark.parametrize("name", STEPS)
def test_generated_code_equals_eager(name):
    agree(name, "inductor")


@pytest.mark.parametrize("name", STEPS)
def test_nothing_waits_for_a_value(name):
    """Fake tensors have no values, so that .item() and the like raise."""
    step, mode = STEPS[name](), FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        tensors = {n: mode.from_tensor(t) for n, t in step.state_dict(keep_vars=True).items()}
        x = mode.from_tensor(inputs(name))
        y = functional_call(step, tensors, x)
        trained = [t for t in tensors.values() if t.requires_grad]
        assert all(g is not None for g in torch.autograd.grad(y.sum(), [x, *trained]))


@pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA here, whose synchronisations this counts")
@pytest.mark.parametrize("name", STEPS)
def test_nothing_waits_for_the_device(name):
    step, x = STEPS[name]().to(DEVICE), inputs(name).detach().to(DEVICE).requires_grad_()
    step.call = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in step.call.items()}
    value_and_gradients(step, step, x)  # libraries start up
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_gradients(step, step, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
