"""resora.py alone: numbers in docstrings, dtypes and ranges, LoRA's own, ReSoRA as a model runs.

What all three methods' layers do alike is in test_layers.py.
"""

import copy
import pickle
from itertools import pairwise, product

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from resora import METRICS, LoRALinear, ReSoRA, adapt, draw_tokens, redundancy, regauge
from tests.checks import BF16, F16, F32, F64, close, eps, exactly, normal, seeded, within
from tests.test_layers import fill, trained
from tests.test_resora import gradients

# ------------------------------------------------------------------------- numbers in docstrings


@pytest.mark.parametrize(
    ("metric", "n", "wanted"),
    [
        ("linear", 20, 1 / 19),
        ("nonlinear", 32, 0.074),
        ("nonlinear", 128, 0.019),
        ("nonlinear", 256, 0.0095),
        ("nonlinear", 512, 0.0046),
    ],
)
def test_the_redundancy_of_independent_codes(metric, n, wanted):
    B, values = torch.ones(1, 24), []
    for seed in range(max(2, 1024 // n)):
        values.append(redundancy(B, normal(seed, n, 24, dtype=F32), metric, samples=n).item())
    within(abs(np.mean(values) - wanted), 0.04 * wanted)  # 276 pairs × at least 2 draws


class Sizes(TorchDispatchMode):
    """The number of elements of the largest tensor that torch gives."""

    largest = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_as_large_as_the_feature_maps_is_built(metric):
    N, o, d, r, n = 4000, 500, 3, 4, 32
    layer = fill(LoRALinear(nn.Linear(d, o), r))
    regularizer = ReSoRA(layer, metric, samples=n)
    layer(torch.randn(N, d))
    with Sizes() as sizes:
        regularizer.penalty().backward()
    assert N * d < sizes.largest <= max(N * r, r * n**2) < N * o


def test_drawn_tokens_are_distinct_and_each_as_likely_as_any_other():
    n, k, draws = 425, 128, 2000
    rows = [draw_tokens(torch.arange(n)[:, None], k, i).flatten() for i in range(draws)]
    assert all(len(row.unique()) == k for row in rows[:100])
    counts = torch.cat(rows).bincount(minlength=n)
    spread = (counts - draws * k / n).square().mean() / (draws * k / n * (1 - k / n))
    assert 0.8 < spread < 1.2  # χ² of 424 degrees of freedom, over 424: 1 ± 0.07
    both = [len(set(a.tolist()) & set(b.tolist())) for a, b in pairwise(rows[:400])]
    assert abs(sum(both) / 399 - k * k / n) < 1  # hypergeometric, deviation 4.3/√399


# ------------------------------------------------------------------------------ dtypes and ranges


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_halves_are_summed_in_single_precision(dtype, metric):
    B, S = normal(0, 64, 4, dtype=dtype), normal(1, 5000, 4, dtype=dtype)
    with torch.autocast("cpu", BF16):
        value = redundancy(B, S, metric)
    assert value.dtype == F32
    wanted = redundancy(B.double(), S.double(), metric)
    close(value, wanted, 100 * eps(F32))  # no loss but the input's own rounding


def test_a_wide_kernel_keeps_its_digits():
    B, S = torch.ones(1, 3), normal(0, 40, 3)  # K − 1 is about −1e-6, and float32 has seven digits
    wanted = redundancy(B.double(), S, "nonlinear", sigma=1e3)
    close(redundancy(B, S.float(), "nonlinear", sigma=1e3), wanted, 1e3 * eps(F32))


def test_euclidean_stays_at_most_one_for_large_and_equal_components():
    for seed in range(20):  # rounding makes some of their squared distances negative
        B, S = torch.ones(4, 2) * 1.1e4, torch.ones(6, 2) * 1e3
        S += 1e-3 * normal(seed, 6, 1, dtype=F32)
        B[:, 1] += 1e-2 * normal(seed, 4, dtype=F32)
        assert 0 <= redundancy(B, S, "euclidean") <= 1


@pytest.mark.parametrize("metric", METRICS)
def test_squares_beyond_the_dtype_give_nan_and_no_number(metric):
    B, S = normal(0, 5, 3, dtype=F32), normal(1, 8, 3, dtype=F32)
    assert redundancy(B, S * 1e20, metric).isnan()
    if metric != "euclidean":  # whose value is the distances'
        close(redundancy(B, S * 1e15, metric), redundancy(B, S, metric), 1e3 * eps(F32))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_regauge_in_other_dtypes(dtype):
    g = seeded(0)
    B, A, x = (normal(g, *shape, dtype=dtype) for shape in ((20, 4), (4, 30), (50, 30)))
    with torch.autocast("cpu", BF16):
        B2, A2 = regauge(B, A, x)
    assert B2.dtype == A2.dtype == dtype
    bound = 10 * eps(dtype) * B.double().norm() * A.double().norm()
    close(B2.double() @ A2.double(), B.double() @ A.double(), bound)
    assert redundancy(B2, x.float() @ A2.float().T, "linear") < (100 * eps(dtype)) ** 2
    assert not regauge(B.requires_grad_(), A)[0].requires_grad


# ------------------------------------------------------------------------------------- LoRALinear


def test_A_starts_as_pefts():
    A = LoRALinear(nn.Linear(600, 5), 3).A
    assert 0.99 * 600**-0.5 < A.abs().max() <= 600**-0.5  # uniform in ±1/√d
    close(A.std(), 600**-0.5 / 3**0.5, 0.05 * 600**-0.5)
    assert LoRALinear(nn.Linear(6, 5), 3).scaling == 1


def test_a_model_turned_to_half_merges_without_half_sums():
    layer = fill(LoRALinear(nn.Linear(300, 5), 40, alpha=41)).to(BF16)
    B, A = layer.pair()
    exact = layer.base.weight.double() + B.double() @ A.double()
    for W in (layer.weight, layer.merge().weight):
        within(((W.double() - exact) / exact).abs().max(), eps(BF16) / 2 * 1.01)  # rounded once


def test_dropout_is_on_the_input_of_A_only():
    layer, x = fill(LoRALinear(nn.Linear(6, 5), 3, dropout=0.5)), torch.randn(100, 6)
    assert not torch.equal(layer(x), layer(x))
    exactly(LoRALinear(layer.base, 3, dropout=0.5)(x), layer.base(x))  # where B = 0
    layer.eval()
    close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), 1e3 * eps(F32))
    exactly(layer(x), layer(x))


# ----------------------------------------------------------------------- ReSoRA: what is counted


def tiny(**options):
    """A model of three adapted layers whose B is not zero, and its {name: module}."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    layers = adapt(model, ["0", "2", "4"], rank=3, generator=seeded(0), **options)
    return fill(model), layers


def by_hand(layers, inputs, metric="linear", **options):
    """The mean of R over layers, each with its input."""
    values = []
    for layer, x in zip(layers.values(), inputs, strict=True):
        B, A = layer.pair()
        codes = x.detach().reshape(-1, x.shape[-1]) @ A.T
        values.append(redundancy(B, codes, metric, **options))
    return sum(values) / len(values)


def layer_inputs(model, x):
    """What each layer of `tiny` gets."""
    return [x, model[:2](x), model[:4](x)]


class Calls(nn.Module):
    """Layers, and a function that says how they are called."""

    def __init__(self, call, *layers):
        super().__init__()
        self.layers, self.call = nn.ModuleList(layers), call

    def forward(self, *args):
        return self.call(self.layers, *args)


@pytest.mark.parametrize("metric", METRICS)
def test_penalty_is_the_mean_over_layers_of_each_ones_codes(metric):
    model, layers = tiny(alpha=5)
    x = normal(1, 6, 5, 8, dtype=F32)
    with ReSoRA(model, metric, beta=0.5, sigma=0.8) as regularizer:
        model(x)
        value = regularizer.penalty()
    wanted = by_hand(layers, layer_inputs(model, x), metric, beta=0.5, sigma=0.8)
    close(value, wanted, 1000 * eps(F32))
    factors = trained(model).values()
    for found, g in zip(gradients(value, *factors), gradients(wanted, *factors), strict=True):
        close(found, g, 1000 * eps(F32) * (1 + g.abs().max()))


def test_layers_of_other_dtypes_and_sizes_count_alike():
    layers = LoRALinear(nn.Linear(8, 5), 3), LoRALinear(nn.Linear(5, 4, dtype=F64), 3)
    model, x = Calls(lambda m, x: m[1](m[0](x).double()), *layers), torch.randn(30, 8)
    with ReSoRA(model) as regularizer:
        model(x)
        wanted = by_hand(dict(enumerate(layers)), [x, layers[0](x).double()])
        close(regularizer.penalty(), wanted, 10 * eps(F32))


def test_a_layer_called_twice_has_the_tokens_of_both_calls():
    layer, x = LoRALinear(nn.Linear(8, 8), 3), torch.randn(9, 8)
    model = Calls(lambda m, x: m[0](m[0](x)), layer)
    with ReSoRA(model) as regularizer:
        model(x)
        wanted = by_hand({"": layer}, [torch.cat([x, layer(x)])])
        close(regularizer.penalty(), wanted, 100 * eps(F32))


def test_inputs_by_keyword():
    layer, x = LoRALinear(nn.Linear(8, 8), 3), torch.randn(9, 8)
    model = Calls(lambda m, x: m[0](x=x), layer)
    with ReSoRA(model) as regularizer:
        model(x)
        close(regularizer.penalty(), by_hand({"": layer}, [x]), 10 * eps(F32))


def test_layers_that_do_not_run_are_left_out_of_the_mean():
    def experts(layers, x, rows):
        for expert, n in zip(layers, rows, strict=True):
            if n is not None:
                expert(x[:n])

    first, second, third = layers = [LoRALinear(nn.Linear(8, 8), 3) for _ in range(3)]
    model, x = Calls(experts, *layers), torch.randn(20, 8)
    with ReSoRA(model) as regularizer:
        model(x, [20, None, 0])  # skipped, as by LayerDrop; an expert that got no token
        close(regularizer.penalty(), by_hand({"": first}, [x]), 10 * eps(F32))
        model(x, [None, 20, 10])
        wanted = by_hand({"1": second, "2": third}, [x, x[:10]])
        close(regularizer.penalty(), wanted, 10 * eps(F32))
        for rows in ([None] * 3, [0] * 3):
            model(x, rows)
            with pytest.raises(ValueError, match="no input of layers.0, .*use `if model.training`"):
                regularizer.penalty()


@pytest.mark.parametrize("detach", [True, False])
def test_detached_inputs_move_a_layers_own_factors_only(detach):
    model, layers = tiny()
    h = model[:4](torch.randn(20, 8))
    with ReSoRA(model[4], detach_input=detach) as regularizer:
        model[4](h)
        own, earlier = gradients(regularizer.penalty(), layers["4"].A, layers["0"].B)
    assert own.abs().max() > 0
    assert (earlier.abs().max() == 0) == detach


@pytest.mark.parametrize("mode", [True, False])
def test_only_the_latest_forward_with_gradients_counts(mode):
    """Not those under no_grad, as generate() and a reference pass are, and none twice."""
    model, layers = tiny()
    model.train(mode)  # from_pretrained returns a model in evaluation mode, and it is trained so
    x = torch.randn(9, 8)
    wanted = by_hand(layers, layer_inputs(model, x))
    with ReSoRA(model) as regularizer:
        for context in (torch.no_grad, torch.inference_mode):
            model(x)
            with context():
                for _ in range(3):
                    model(torch.randn(7, 8))
            close(regularizer.penalty(), wanted, 100 * eps(F32))
            with context():
                model(torch.randn(7, 8))
            assert regularizer.inputs == {}
        for _ in range(4):  # λ = 0 for a while
            model(torch.randn(7, 8))
        model(x)
        assert [len(kept) for kept in regularizer.inputs.values()] == [1, 1, 1]
        close(regularizer.penalty(), wanted, 100 * eps(F32))


def test_nonlinear_draws_other_tokens_in_each_step_and_the_same_in_each_run():
    model, _ = tiny()
    x = torch.randn(100, 8)

    def values(**options):
        found = []
        with ReSoRA(model, "nonlinear", samples=20, **options) as regularizer:
            for _ in range(2):
                model(x)
                found.append(regularizer.penalty().item())
        return found

    first = values()
    assert first[0] != first[1] and values() == first
    assert values(generator=seeded(7)) == values(generator=seeded(7)) != first


def test_autocast_and_half_models():
    model, _ = tiny()
    x = normal(1, 40, 8, dtype=F32)
    with ReSoRA(model) as regularizer:
        model(x)
        wanted = regularizer.penalty()
        with torch.autocast("cpu", BF16):
            model(x)
            inside = regularizer.penalty()
            model(x)
        outside = regularizer.penalty()
        model.to(BF16)(x.to(BF16))
        half = regularizer.penalty()
    assert inside.dtype == outside.dtype == half.dtype == F32
    close(inside, outside, 10 * eps(F32))
    close(inside, wanted, 10 * eps(BF16))
    close(half, wanted, 10 * eps(BF16))


def hooks(model):
    return [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


def test_remove_leaves_nothing_behind():
    model, _ = tiny()
    own = model[1].register_forward_hook(lambda *_: None)
    regularizer = ReSoRA(model)
    model(torch.randn(3, 8))
    assert len(hooks(model)) == 6  # three layers, two of the model, and the user's own
    for _ in range(2):
        regularizer.remove()
        assert len(hooks(model)) == 1 and regularizer.inputs == {}
    own.remove()
    with pytest.raises(RuntimeError, match="from the block"), ReSoRA(model):
        raise RuntimeError("from the block")
    ReSoRA(model, level="weight")
    assert hooks(model) == []


def test_copies_of_a_watched_model_are_on_their_own():
    model, _ = tiny()
    with ReSoRA(model) as regularizer:
        twin = copy.deepcopy(model)
        for other in (twin, pickle.loads(pickle.dumps(model))):
            other(torch.randn(3, 8))
        assert regularizer.inputs == {}
    weight = ReSoRA(twin, level="weight")  # a copy needs its own
    twin[0].A.data += 1
    assert weight.penalty() != ReSoRA(model, level="weight").penalty()


# ------------------------------------------------------------------- ReSoRA: how the model runs


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.query(x)) * self.value(x)


class Stack(nn.Module):
    """Three blocks, checkpointed if `reentrant` is not None."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.blocks, self.reentrant = nn.ModuleList(Block() for _ in range(3)), reentrant

    def forward(self, x):
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def stack(reentrant=None):
    torch.manual_seed(0)
    model = Stack(reentrant)
    adapt(model, ["query", "value"], rank=3)
    return fill(model)


def step(call, regularizer, seed):
    """Add a step's gradients to those that there are."""
    x = normal(seed, 4, 6, 8, dtype=F32).requires_grad_()
    (call(x).square().mean() + regularizer.penalty()).backward()


def all_gradients(model):
    return torch.cat([p.grad.flatten() for p in trained(model).values()])


@pytest.fixture
def one_process(tmp_path):
    """A process group of one."""
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


CHECKPOINTED = {"checkpointed": False, "reentrant": True, "compiled and checkpointed": False}
WAYS = [*CHECKPOINTED, "accumulated", "compiled", "compiled blocks", "DDP", "in DDP"]


@pytest.mark.parametrize(
    "way, metric", [*product(WAYS[:2], METRICS), *product(WAYS[2:], ["linear"])]
)
def test_the_penalty_is_the_same_however_the_model_runs(way, metric, one_process):
    """Over two accumulated steps; nothing is held after them, and nothing recorded once removed."""
    wanted = 0
    for seed in range(2):
        plain = stack()
        step(plain, ReSoRA(plain, metric), seed)
        wanted = wanted + all_gradients(plain)

    model = stack(CHECKPOINTED.get(way))
    call = DistributedDataParallel(model) if "DDP" in way else model
    regularizer = ReSoRA(model if way == "in DDP" else call, metric)
    if way == "compiled blocks":
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    elif way.startswith("compiled"):
        call = torch.compile(model, fullgraph=way == "compiled", backend="aot_eager")
    for seed in range(2):
        step(call, regularizer, seed)
    close(all_gradients(model), wanted, 1e3 * eps(F32))
    assert regularizer.inputs == {}  # a second forward, inside backward, recorded nothing
    regularizer.remove()
    call(torch.randn(4, 6, 8))
    assert regularizer.inputs == {}
    torch.compiler.reset()


def test_hooks_that_a_compiled_graph_never_calls_are_noticed():
    model, x = stack(), torch.randn(4, 6, 8)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    regularizer = ReSoRA(model)
    compiled(x)
    with pytest.raises(ValueError, match=r"no input of blocks.0.query, .*compile after ReSoRA"):
        regularizer.penalty()
    torch.compiler.reset()


def test_a_level_weight_penalty_inside_a_ddp_forward_that_skips_layers(one_process):
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = stack()
            self.regularizer = ReSoRA(self.model, level="weight")

        def forward(self, x):
            return self.model.blocks[0](x).square().mean() + self.regularizer.penalty()

    plain, loss = Loss(), Loss()
    parallel = DistributedDataParallel(loss, find_unused_parameters=True)
    for call in (plain, parallel):
        call(torch.ones(4, 6, 8)).backward()
    for p, q in zip(loss.parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            exactly(p.grad, q.grad)
        assert q.grad is not None or p.grad is None or not p.grad.any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_transformer_with_checkpointing(reentrant):
    """What a user writes, on PEFT's LoRA of every Linear of a ViT."""
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(transformers.ViTForImageClassification(config), lora).train()
        if checkpointing:
            model.enable_input_require_grads()
            keywords = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)
        regularizer = ReSoRA(model)
        pixels = normal(0, 2, 3, 16, 16, dtype=F32).requires_grad_()
        loss = model(pixel_values=pixels, labels=torch.tensor([0, 1])).loss
        (loss + 0.1 * regularizer.penalty()).backward()
        assert regularizer.inputs == {}
        found.append(all_gradients(model))
    close(found[1], found[0], 1e3 * eps(F32))
