"""Symbol tables: every row of a module docstring has the shape of the thing that it names."""

import importlib
import random
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import eigenlorax
import hra
import resora

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23)
HEADER = ["paper", "here", "shape", "meaning"]


def rows(docstring: str) -> list[list[str]]:
    """The cells of each row of the docstring's one table, below its header."""
    block = re.search(r"^Symbols.*\n((?:  .*\n)+)\n", docstring, flags=re.M)[1]
    cells = [[cell.strip() for cell in line.split("|")] for line in block.splitlines()]
    assert all(len(row) == 4 and all(row) for row in cells), cells
    assert cells[0] == HEADER
    assert docstring.count(" | ") == 3 * len(cells), "a row stands outside of the table"
    return cells[1:]


def sizes(seed: int, letters: str) -> dict[str, int]:
    """A different prime for each letter."""
    return dict(zip(letters, random.Random(seed).sample(PRIMES, len(letters)), strict=True))


def hra_symbols(n: dict[str, int]) -> dict[str, object]:
    """{here: the object} for d, o and r."""
    m = hra.HRALinear(nn.Linear(n["d"], n["o"]), n["r"], "random")
    B, A = m.pair()
    return {
        "base.weight": m.base.weight,
        "U": m.U,
        "chain(U)": hra.chain(m.U),
        "gamma(U)": hra.gamma(m.U),
        "weight": m.weight,
        "pair()[0]": B,
        "pair()[1]": A,
    }


def resora_symbols(n: dict[str, int]) -> dict[str, object]:
    """{here: the object} for d, o, r and N."""
    m = resora.LoRALinear(nn.Linear(n["d"], n["o"]), n["r"])
    with resora.ReSoRA(m) as regularizer:
        m(torch.randn(n["N"], 1, n["d"]))
        (x,) = regularizer.inputs[""]
        return {
            "base.weight": m.base.weight,
            "A": m.A,
            "B": m.B,
            "weight": m.weight,
            "x": x,
            "S": resora.codes([x], m.A),
            "penalty()": regularizer.penalty(),
        }


def eigenlorax_symbols(n: dict[str, int]) -> dict[str, object]:
    """{here: the object} for d, o, K, r and m; n is d, as for the rows of A."""
    least = min(n, key=n.get)  # there are no more components than rows
    n["K"], n[least] = n[least], n["K"]
    n["n"] = n["d"]
    ranks = [1, n["m"] - 1]
    adapters = [{"q": (torch.randn(n["o"], r), torch.randn(r, n["d"]))} for r in ranks]
    subspace = eigenlorax.recycle(adapters, k=n["K"])["q"]
    rows = torch.cat([A for adapter in adapters for _, A in adapter.values()])
    m = eigenlorax.EigenLoRAxLinear(nn.Linear(n["d"], n["o"]), subspace, n["r"], tasks=2)
    wider = eigenlorax.recycle(adapters, k=n["K"], pseudo=1)["q"]
    return {
        "base.weight": m.base.weight,
        "V_A": m.V_A,
        "V_B": m.V_B,
        "alpha_A[task]": m.alpha_A[1],
        "alpha_B[task]": m.alpha_B[1],
        "rows": rows,
        "mean": subspace.A.mean,
        "singular_values": subspace.A.singular_values,
        "scaling": m.scaling,
        "pseudo": len(wider.A.V) - len(subspace.A.V),
    }


METHODS: dict[str, tuple[str, Callable]] = {
    "hra": ("dor", hra_symbols),
    "resora": ("dorN", resora_symbols),
    "eigenlorax": ("doKrm", eigenlorax_symbols),
}


@pytest.mark.parametrize("seed", [1, 11])
@pytest.mark.parametrize("name", METHODS)
def test_every_row_has_the_shape_that_it_says(name, seed):
    letters, symbols = METHODS[name]
    n = sizes(seed, letters)
    found, table = symbols(n), rows(importlib.import_module(name).__doc__)
    assert [here for _, here, _, _ in table] == [*found]
    for _, here, shape, _ in table:
        if shape == "number":
            assert isinstance(found[here], int | float), here
        else:
            assert isinstance(found[here], Tensor), here
            wanted = eval(shape, {"__builtins__": {}, "min": min, **n})
            assert found[here].shape == wanted, f"{here}: {shape} at {n}"


def test_a_row_that_is_broken_or_elsewhere_is_not_skipped():
    good = "Symbols:\n  paper | here | shape | meaning\n  W | w | (o, d) | weight\n\nThe end\n"
    assert rows(good) == [["W", "w", "(o, d)", "weight"]]
    for bad in (
        good.replace("(o, d) | weight", "(o, d)"),
        good.replace("| w |", "| |"),
        good.replace("The end", "V | v | (d,) | far"),
    ):
        with pytest.raises(AssertionError):
            rows(bad)
