"""The nearest value of a table, found by look-up, is what a search finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shardmerge.codecs.nearest import count_below, middles
from tests.support.quantised_bnb import FP4, NF4

TABLES = {
    "nf4": tuple(NF4.tolist()),
    "fp4": tuple(sorted(set(FP4.tolist()))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("of", ["middles", "values"])
def test_it_is_what_a_search_finds(name: str, of: str, dtype: torch.dtype) -> None:
    bounds = middles(TABLES[name], dtype) if of == "middles" else TABLES[name]
    at = torch.tensor(bounds, dtype=dtype)
    steps = [at]
    for _ in range(40):  # numbers next to the bounds, on both sides
        steps += [torch.nextafter(steps[-1], torch.full_like(at, 2))]
        steps[:0] = [torch.nextafter(steps[0], torch.full_like(at, -2))]
    cells = (torch.arange(-4100, 4100) / 2048).to(dtype)
    edges = [cells, torch.nextafter(cells, cells + 1), torch.nextafter(cells, cells - 1)]
    wide = torch.tensor([-1e30, -2, 2, 1e30, -torch.inf, torch.inf, 0.0, -0.0], dtype=dtype)
    values = torch.cat([*steps, *edges, wide, torch.linspace(-1.2, 1.2, 100_003, dtype=dtype)])
    found = count_below(bounds, values)
    assert found.dtype == torch.uint8
    expected = np.searchsorted(np.array(bounds), values.double().numpy(), side="left")
    assert np.array_equal(found.numpy(), expected)
