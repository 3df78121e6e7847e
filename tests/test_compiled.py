"""Compiled and eager modules agree, in one graph; forward, penalty and backward never wait.

Forward, penalty and all that is read of a layer are one function of x, so that a graph break, or a
value that Python asks for, is found wherever it is.
"""

import shutil

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call

import resora
from tests.checks import EPS, close, normal, seeded
from tests.test_layers import KINDS, fill, inputs, layer, trained

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Step(nn.Module):
    """What a training step asks of a model: outputs, what is read, and a penalty if it has one."""

    def __init__(self, model: nn.Module, penalty=None):
        super().__init__()
        self.model, self.penalty = model, penalty

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x).square().mean()
        if hasattr(self.model, "pair"):
            B, A = self.model.pair()
            y = y + self.model.weight.square().mean() + B.square().mean() + A.square().mean()
        return y if self.penalty is None else y + self.penalty()


RESORA = {f"ReSoRA {metric}": (metric, "feature") for metric in resora.METRICS}
RESORA |= {f"ReSoRA {metric} weight": (metric, "weight") for metric in resora.METRICS}
RESORA |= {"ReSoRA nonlinear, drawn": ("nonlinear", "feature")}
STEPS = [kind for kind in KINDS if "mixed" not in kind] + [*RESORA]


def make(name: str) -> tuple[Step, Tensor]:
    """A step and an input for it: one layer of a kind, or three LoRAs and their redundancy."""
    if name in KINDS:
        model = layer(name)
        return Step(model, getattr(model, "penalty", None)), inputs(model, 4).requires_grad_()
    linears = [nn.Linear(d, o, dtype=torch.float64) for d, o in ((9, 8), (8, 12), (12, 8))]
    model = nn.Sequential(linears[0], nn.Tanh(), linears[1], nn.Tanh(), linears[2])
    for i, p in enumerate(model.parameters()):
        p.data = 0.3 * normal(i, *p.shape)
    resora.adapt(model, ["0", "2", "4"], 3, generator=seeded(2))
    samples = 16 if "drawn" in name else 64
    regularizer = resora.ReSoRA(fill(model), *RESORA[name], samples=samples)
    return Step(model, regularizer.penalty), normal(5, 40, 9).requires_grad_()


def value_and_gradients(step: Step, call, x: Tensor) -> list[Tensor]:
    """A scalar and its gradients at x and at all that trains."""
    y = call(x)
    parameters = [x, *trained(step).values()]
    return [y.detach(), *torch.autograd.grad(y, parameters, materialize_grads=True)]


def agree(name: str, backend: str) -> None:
    """Values and gradients of two steps, one after the other."""
    torch.compiler.reset()
    (plain, x), (other, _) = make(name), make(name)  # two, since a draw moves on
    whole = "drawn" not in name  # a generator cannot be made inside of a graph
    compiled = torch.compile(other, fullgraph=whole, backend=backend)
    for _ in range(2):
        eager = value_and_gradients(plain, plain, x)
        fast = value_and_gradients(other, compiled, x)
        for one, wanted in zip(fast, eager, strict=True):
            close(one, wanted, 1e3 * EPS * wanted.abs().max())  # some thousand sums


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
    (step, x), mode = make(name), FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        tensors = {n: mode.from_tensor(t) for n, t in step.state_dict(keep_vars=True).items()}
        y = functional_call(step, tensors, mode.from_tensor(x))
        parameters = [t for t in tensors.values() if t.requires_grad]
        torch.autograd.grad(y, parameters, materialize_grads=True)


@pytest.mark.parametrize("name", STEPS)
def test_functional_call_reaches_the_penalty(name):
    """Value and gradients are those of the parameters that it is given, not of the module's own."""
    step, x = make(name)
    own, given = trained(step), {}
    for i, (key, p) in enumerate(own.items()):
        given[key] = (p + normal(i, *p.shape)).detach().requires_grad_()
    value = functional_call(step, given, x)
    found = torch.autograd.grad(value, [*given.values()], materialize_grads=True)
    step, x = make(name)
    for key, p in trained(step).items():
        p.data = given[key].detach()
    exact, _, *wanted = value_and_gradients(step, step, x)
    close(value, exact, 1e3 * EPS * exact.abs())
    for one, other in zip(found, wanted, strict=True):
        close(one, other, 1e3 * EPS * other.abs().max())


@pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA here, whose synchronisations this counts")
@pytest.mark.parametrize("name", STEPS)
def test_nothing_waits_for_the_device(name):
    step, x = make(name)
    step, x = step.to(DEVICE), x.detach().to(DEVICE).requires_grad_()
    value_and_gradients(step, step, x)  # libraries start up
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_gradients(step, step, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
