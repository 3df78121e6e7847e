"""What the tests share: seeded numbers, and comparisons that say by how much they hold.

`close`, `within` and `exactly` assert, and note the error as a share of its bound under the name of
the running test. From these notes conftest.py writes the certificate at the end of pytest.
"""

import os
from collections import defaultdict

import torch
from hypothesis import strategies as st
from torch import Tensor

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
EPS = torch.finfo(F64).eps
SEEDS = st.integers(0, 2**32 - 1)
WIDE = st.sampled_from([F64, F32])

NOTES: dict[str, list[float]] = defaultdict(list)  # test: its errors, as shares of their bounds


def seeded(seed: int) -> torch.Generator:
    """A generator of its own for each seed."""
    return torch.Generator().manual_seed(seed)


def normal(source: int | torch.Generator, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    """Standard normal numbers from a seed or a generator, drawn in float64."""
    generator = seeded(source) if isinstance(source, int) else source
    return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)


def eps(dtype: torch.dtype) -> float:
    """The distance from 1 to the next number of this dtype."""
    return torch.finfo(dtype).eps


def within(error: float | Tensor, bound: float | Tensor) -> None:
    """Assert that a number ≥ 0 is finite and at most its bound, and note the share used."""
    error, bound = (float(torch.as_tensor(value).detach()) for value in (error, bound))
    assert 0 <= error < float("inf"), f"an error of {error}"
    assert 0 <= bound < float("inf"), f"a bound of {bound}"
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    share = error / bound if bound else float("inf")
    NOTES[test].append(share if error else 0.0)
    assert error <= bound, f"off by {error:.3g}, allowed {bound:.3g}"


def at_least(found: float | Tensor, floor: float) -> None:
    """Assert that a number is finite and at least `floor` > 0, and note how near it came."""
    within(floor, found)


def close(found: Tensor | float, wanted: Tensor | float, bound: float | Tensor) -> None:
    """Assert the same shape, finite values, and no entry further from the wanted than `bound`."""
    found, wanted = torch.as_tensor(found).detach(), torch.as_tensor(wanted).detach()
    assert found.shape == wanted.shape, f"{tuple(found.shape)}, wanted {tuple(wanted.shape)}"
    assert found.isfinite().all(), "not finite"
    assert wanted.isfinite().all(), "the wanted value is not finite"
    difference = (found.double() - wanted.double()).abs()
    within(difference.max() if difference.numel() else 0.0, bound)


def exactly(found: Tensor, wanted: Tensor) -> None:
    """Assert the same shape, dtype and values, without rounding."""
    assert found.dtype == wanted.dtype, f"{found.dtype}, wanted {wanted.dtype}"
    close(found, wanted, 0.0)
