"""eigenlorax.py and bad input: one line that names what was found and what is wanted."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import eigenlorax
from eigenlorax import (
    EigenLoRAxLinear,
    adapt,
    augment,
    choose_k,
    principal_components,
    recycle,
    serving,
    update,
)
from tests.checks import normal, seeded
from tests.test_eigenlorax import layer

PAIR = torch.ones(4, 2), torch.ones(2, 3)
NESTED = nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 4))})
LAYER, FITTING = layer(seeded(0)), (torch.ones(7, 1), torch.ones(1, 9))
PAIR_7 = torch.ones(7, 1).double(), torch.ones(1, 9).double()


class Wrapper(nn.Module):
    """A layer that holds its Linear under another name."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 4)


HALF = nn.ModuleDict(
    {"a": nn.ModuleDict({"q": nn.Linear(3, 4)}), "b": nn.ModuleDict({"q": Wrapper()})}
)
NAMED_0 = recycle([{"0": PAIR}])
ZERO = torch.zeros(4, 1), torch.ones(1, 3)


def served(task):
    """Enter a block that serves `task` on a layer of two."""
    with serving({"q": layer(seeded(0), tasks=2)}, task):
        pass


def x(*shape):
    """Ones of this shape, of width 9."""
    return torch.ones(*shape, 9, dtype=torch.float64)


CASES = {
    "no adapter": (lambda: recycle([]), "0 adapters, no layer; want"),
    "no layer": (lambda: recycle([{}]), "1 adapters, no layer; want"),
    "other shape": (
        lambda: recycle([{"q": PAIR}, {"q": (torch.ones(4, 2), torch.ones(2, 5))}]),
        r"adapter 1, 'q': B \(4, 2\), A \(2, 5\); want \(4, r\) and \(r, 3\)",
    ),
    "other rank": (
        lambda: recycle([{"q": (torch.ones(4, 2), torch.ones(1, 3))}]),
        r"adapter 0, 'q': B \(4, 2\), A \(1, 3\); want",
    ),
    "rank 0": (
        lambda: recycle([{"q": PAIR}, {"q": (torch.zeros(4, 0), torch.zeros(0, 3))}]),
        r"adapter 1, 'q': B \(4, 0\), A \(0, 3\); want",
    ),
    "nan": (
        lambda: recycle([{"q": PAIR}, {"q": (PAIR[0] * math.nan, PAIR[1])}]),
        r"adapter 1, 'q': B: found .*\(4, 2\) summing to nan; want finite",
    ),
    "inf": (
        lambda: recycle([{"q": (PAIR[0], PAIR[1] * math.inf)}]),
        r"adapter 0, 'q': A: found .*\(2, 3\) summing to inf; want finite",
    ),
    "k above the rank": (
        lambda: recycle([{"layer.q": PAIR}], k=2),
        "'layer.q': k = 2 means 2; want a rule or 1 to 1, numerical rank",
    ),
    "k of an untrained layer": (
        lambda: recycle([{"v": ZERO}], k=1),
        "'v': k = 1 means 1; want a rule or 1 to 0",
    ),
    "an update of another shape": (
        lambda: update(recycle([{"q": PAIR}]), [{"q": (torch.ones(4, 1), torch.ones(1, 5))}]),
        r"'q': rows \(1, 5\); want \(m, 3\), as before",
    ),
    "an update by the median": (
        lambda: update(recycle([{"q": PAIR}]), [{"q": PAIR}], "gavish-donoho"),
        "'q': want uncentred components, and a k that is None, an int or a share",
    ),
    "an update of centred components": (
        lambda: eigenlorax.append(principal_components(torch.eye(3) + 1), torch.ones(1, 3), 1),
        "want uncentred components",
    ),
    "a vector": (
        lambda: principal_components(torch.ones(3)),
        r"rows: found .*\(3,\) summing to 3.0; want finite floats \(m, n\)",
    ),
    "integers": (lambda: principal_components(torch.ones(3, 3).long()), "want finite floats"),
    "no rows": (
        lambda: principal_components(torch.ones(0, 3)),
        r"rows \(0, 3\); want at least one",
    ),
    "squares that overflow": (
        lambda: principal_components(1e200 * normal(0, 3, 4), 0.9),
        r"rows up to .*e\+200; want 1e-150 to 1e150, to be squared",
    ),
    "squares that vanish": (
        lambda: principal_components(1e-200 * normal(0, 3, 4), 0.9),
        r"rows up to .*e-200; want 1e-150 to 1e150, to be squared",
    ),
    "noise alone": (
        lambda: principal_components(normal(0, 60, 90), "gavish-donoho", False),
        "k = 'gavish-donoho' means 0; want a rule or 1 to 60, numerical rank",
    ),
    "k = 0": (lambda: choose_k(torch.ones(3), 0, (3, 4)), "k = 0 means 0; want a rule or 1 to 3"),
    "k < 0": (lambda: choose_k(torch.ones(3), -1, (3, 4)), "k = -1 means -1; want a rule or 1"),
    "k a bool": (lambda: choose_k(torch.ones(3), True, (3, 4)), "k = True means True; want a rule"),
    "k a large share": (lambda: choose_k(torch.ones(3), 1.5, (3, 4)), "k = 1.5 means 1.5; want a"),
    "k a word": (lambda: choose_k(torch.ones(3), "elbow", (3, 4)), "k = 'elbow' means 'elbow'"),
    "no σ": (
        lambda: choose_k(torch.ones(0), 0.9, (3, 4)),
        "k = 0.9 means 0.9; want a rule or 1 to",
    ),
    "σ that grow": (
        lambda: choose_k(torch.tensor([1.0, 2.0]), 1, (3, 4)),
        "want finite ones, desc",
    ),
    "σ infinite": (lambda: choose_k(torch.tensor([math.inf]), 1, (3, 4)), "want finite ones"),
    "no room": (lambda: augment(torch.eye(3), 1), "1 pseudo-components; want 0 to n − K = 3 − 3"),
    "no room to recycle": (lambda: recycle([{"q": PAIR}], pseudo=3), "'q': 3 pseudo-components"),
    "rank = 0": (lambda: layer(seeded(0), rank=0), "rank = 0, tasks = 1; want ints ≥ 1"),
    "rank a bool": (lambda: layer(seeded(0), rank=True), "rank = True, tasks = 1; want ints ≥ 1"),
    "tasks a float": (lambda: layer(seeded(0), tasks=1.0), "rank = 2, tasks = 1.0; want ints ≥ 1"),
    "scaling 0": (lambda: layer(seeded(0), scaling=0), "scaling 0, init 'random'; want finite ≠ 0"),
    "init": (lambda: layer(seeded(0), init="ones"), "scaling 1.0, init 'ones'; want finite ≠ 0"),
    "a base of another shape": (
        lambda: EigenLoRAxLinear(nn.Linear(9, 9), recycle([{"q": PAIR}])["q"]),
        r"V_A is \(1, 3\); want \(K, 9\), K ≥ 1",
    ),
    "an untrained layer": (
        lambda: adapt(nn.Sequential(nn.Linear(3, 4)), recycle([{"0": ZERO}])),
        r"0: V_B is \(0, 4\); want \(K, 4\), K ≥ 1; were all of its adapters 0\?",
    ),
    "task too large": (lambda: layer(seeded(0)).set_task(1, *PAIR), "task = 1; want an int from 0"),
    "task < 0": (lambda: layer(seeded(0)).merge(-1), "task = -1; want an int from 0 to 0"),
    "a pair of another shape": (
        lambda: layer(seeded(0)).set_task(0, *PAIR),
        r"want \(7, r\) and \(r, 9\)",
    ),
    "a pair of larger rank": (
        lambda: layer(seeded(0)).set_task(0, torch.ones(7, 3), torch.ones(3, 9)),
        "the pair has rank 3; want at most this layer's 2",
    ),
    "a pair that is nan": (
        lambda: layer(seeded(0)).set_task(0, torch.ones(7, 1) * math.nan, torch.ones(1, 9)),
        r"B: found .*\(7, 1\) summing to nan; want finite",
    ),
    "forward, another width": (
        lambda: layer(seeded(0))(torch.ones(2, 4, dtype=torch.float64)),
        r"x \(2, 4\); want \(…, 9\)",
    ),
    "a pair beyond float32": (
        lambda: layer(seeded(0), dtype=torch.float32).set_task(0, 1e200 * PAIR_7[0], PAIR_7[1]),
        "α_B: found",
    ),
    "no pair": (lambda: eigenlorax.set_task({"0": LAYER}, 0, {}), "the adapter has no pair"),
    "half of a name's layers": (
        lambda: adapt(HALF, recycle([{"q": PAIR}])),
        "'q' fits b.q, a Wrapper; want a layer to adapt",
    ),
    "forward, task too large": (lambda: layer(seeded(0))(x(2), 1), "task = 1; want an int from 0"),
    "forward, too many tasks": (
        lambda: layer(seeded(0))(x(2), torch.zeros(3, dtype=torch.long)),
        r"3 tasks for x \(2, 9\); want one for each x\[i\]",
    ),
    "forward, one task for many": (
        lambda: layer(seeded(0))(x(3), torch.zeros(1, dtype=torch.long)),
        r"1 tasks for x \(3, 9\)",
    ),
    "forward, many tasks for one": (
        lambda: layer(seeded(0))(x(1), torch.zeros(3, dtype=torch.long)),
        r"3 tasks for x \(1, 9\)",
    ),
    "forward, a mask": (
        lambda: layer(seeded(0), tasks=2)(x(2), torch.ones(2, dtype=torch.bool)),
        r"task = tensor\(\[True, True\]\); want an int from 0 to 1",
    ),
    "forward, tasks < 0": (
        lambda: layer(seeded(0), tasks=2)(x(2), torch.tensor([0, -1])),
        r"task = tensor\(\[ 0, -1\]\); want an int from 0 to 1",
    ),
    "one task of many": (
        lambda: layer(seeded(0), tasks=2).pair([0, 1]),
        r"task = \[0, 1\]; want one int, not one for each sample",
    ),
    "another name": (
        lambda: adapt(nn.Sequential(nn.Linear(3, 4)), recycle([{"q": PAIR}])),
        "no layer is named 'q'; want names, no patterns: 0",
    ),
    "no subspace": (
        lambda: adapt(nn.Sequential(nn.Linear(3, 4)), {}),
        "found no targets; want the name of a layer",
    ),
    "a name of two layers": (
        lambda: adapt(nn.Sequential(*(nn.Sequential(nn.Linear(3, 4)) for _ in "ab")), NAMED_0),
        "'0' fits 0.0, 1.0; want one layer",
    ),
    "two names of one layer": (
        lambda: adapt(NESTED, recycle([{"a.0": PAIR, "0": PAIR}])),
        "'0' fits a.0; want one layer of its own",
    ),
    "two pairs of one layer": (
        lambda: eigenlorax.set_task({"a.0": LAYER}, 0, {"a.0": FITTING, "0": FITTING}),
        "'0' fits a.0; want one of its own of a.0",
    ),
    "a name of something else": (
        lambda: adapt(nn.Sequential(nn.LayerNorm(3)), recycle([{"0": PAIR}])),
        "'0' fits 0, a LayerNorm; want a layer to adapt",
    ),
    "a pair without a layer": (
        lambda: eigenlorax.set_task({"0": layer(seeded(0))}, 0, {"0": PAIR, "1": PAIR}),
        "'1' fits no layer; want one of its own of 0",
    ),
}


@pytest.mark.parametrize("call, message", CASES.values(), ids=CASES)
def test_bad_input_is_a_one_line_error_with_the_value_found_and_wanted(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


NO_TASKS = [None, "1", "tasks", [None, 0], ["0"], -1, 2, [0, 2], 0.5, [0.5], True, [True, 2]]
NO_TASKS += [np.array([True, False]), torch.tensor([[0]]), torch.tensor(1j)]


@pytest.mark.parametrize("task", NO_TASKS, ids=repr)
def test_what_is_no_task_is_refused_with_a_hint(task):
    hint = r"want an int from 0 to 1, or one for each sample \(for the base alone: a task with α_B"
    with pytest.raises(ValueError, match=hint) as error:
        served(task)
    assert "\n" not in str(error.value)


def test_a_base_that_is_no_linear_is_refused():
    subspace = recycle([{"q": PAIR}])["q"]
    for base in (nn.LayerNorm(3), nn.Linear(0, 4), nn.Conv2d(3, 4, 1)):
        with pytest.raises(TypeError, match="want an nn.Linear, not empty"):
            EigenLoRAxLinear(base, subspace)


def test_a_linear_with_a_forward_of_its_own_serves_and_does_not_merge():
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    module = EigenLoRAxLinear(Doubling(3, 4), recycle([{"q": PAIR}])["q"])
    assert torch.equal(module(torch.ones(2, 3)), module.base(torch.ones(2, 3)))
    with pytest.raises(TypeError, match="Doubling with a forward of its own; want nn.Linear's"):
        module.merge()
    attention = nn.MultiheadAttention(4, 2)  # its out_proj is of a subclass of Linear
    pairs = {"out_proj": (torch.ones(4, 1), torch.ones(1, 4))}
    adapt(attention, recycle([pairs]))
    assert type(eigenlorax.merge(attention).out_proj) is nn.Linear


def test_an_error_in_adapt_or_merge_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    subspaces = recycle([{"0": PAIR, "1": PAIR}])
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="1: V_A is"):
        adapt(model, subspaces)
    assert dict(model.named_modules()) == before
    assert all(p.requires_grad for p in model.parameters())
    square = {"1": (torch.ones(4, 1), torch.ones(1, 4))}
    layers = adapt(model, recycle([{"0": PAIR} | square]))
    layers["1"].base.weight.data = layers["1"].base.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="want a float dtype"):
        eigenlorax.merge(model)
    assert model[0] is layers["0"] and model[1] is layers["1"]


def test_a_set_task_that_fails_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 4))
    layers = adapt(model, recycle([{"0": PAIR}]), init="random")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="'elsewhere' fits no layer"):
        eigenlorax.set_task(layers, 0, {"0": PAIR, "elsewhere": PAIR})
    for call in (layers["0"].set_task, lambda *pair: eigenlorax.set_task(layers, *pair)):
        given = (0, *PAIR) if call == layers["0"].set_task else (0, {"0": PAIR})
        with pytest.raises(ValueError, match="rank 2; want at most this layer's 1"):
            call(*given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_long_list_of_names_is_cut():
    model = nn.ModuleList(nn.Linear(3, 4) for _ in range(2000))
    with pytest.raises(ValueError, match=r"0, 1, 2, 3, 4 … \(2000 in all\)") as error:
        adapt(model, recycle([{"q": PAIR}]))
    assert len(str(error.value)) < 200


def test_an_untrained_layer_recycles_to_no_direction():
    found = recycle([{"q": PAIR, "v": ZERO}])
    assert found["v"].B.V.shape == (0, 4) and found["q"].B.V.shape == (1, 4)


def test_a_base_with_a_hook_serves_and_does_not_merge():
    module = layer(seeded(0))
    module.base.register_forward_hook(lambda module, args, y: 2 * y)
    with pytest.raises(TypeError, match="the base has a hook"):
        module.merge()


def test_a_packed_weight_is_read_as_it_is():
    module = layer(seeded(0))
    module.base.weight = nn.Parameter(torch.zeros(30, 1), requires_grad=False)
    assert module.weight is module.base.weight
