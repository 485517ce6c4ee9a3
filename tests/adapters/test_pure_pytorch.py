"""The adapter of a training script without PEFT: A (in, r), B (r, out), and at times frozen copies of the base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmerge
from shardmerge.adapters.claims import Claims
from shardmerge.adapters.formats.pure_pytorch import looks_like
from shardmerge.adapters.registry import FAMILIES, FORMATS
from shardmerge.errors import FormatError
from shardmerge.spec.tensors import RowRange, TensorRef
from shardmerge.spec.updates import Window
from tests.support.builders import (
    GATE0,
    Q0,
    V0,
    Place,
    content,
    llama_tensors,
    lora_pair,
    make_place,
    pure_tensors,
    read_tensors,
    refs_of,
    update_of,
    write_pure,
)


def claim_pure(tensors: dict[str, TensorRef], alpha: float | None = 8.0, scaling: float | None = None) -> Claims:
    return FORMATS["pure-pytorch"].claim(content(tensors, None, alpha, scaling))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["m.A", "m.B"], True),
        (["m.A", "m.B", "m.original.weight", "m.original.bias"], True),
        (["m.original.weight"], True),
        (["m.A", "m.B", "m.weight"], False),
        (["A", "B"], False),
        (["m.lora_A.weight", "m.lora_B.weight"], False),
        ([], False),
    ],
    ids=str,
)
def test_looks_like(names: list[str], expected: bool) -> None:
    assert looks_like(refs_of(dict.fromkeys(names, (1,)))) is expected


@pytest.mark.parametrize(
    ("alpha", "scaling", "expected"),
    [(12.0, None, 3.0), (None, 0.5, 0.5), (0.0, None, 0.0), (None, 0.0, 0.0)],
    ids=["alpha", "scaling", "alpha 0", "scaling 0"],
)
def test_factors_are_seen_transposed(alpha: float | None, scaling: float | None, expected: float) -> None:
    tensors = refs_of({V0 + ".A": (32, 4), V0 + ".B": (4, 16)})
    claims = claim_pure(tensors, alpha, scaling)
    assert claims.problems == []
    assert claims.leftovers(tensors) == []
    (update,) = claims.updates
    a, b = (update.factors[number][1] for number in (0, 1))
    assert (update.module, update.family, update.rank, update.scaling) == (V0, "lora", 4, expected)
    assert (a.name, a.shape, a.strides) == (V0 + ".A", (4, 32), (1, 4))
    assert (b.name, b.shape, b.strides) == (V0 + ".B", (16, 4), (1, 16))
    assert FAMILIES["lora"].check(update, (16, 32)) == []


def test_view_that_is_stored_transposed_is_dense_again() -> None:
    a = refs_of({"A": (4, 32)})["A"].transposed()
    assert (a.shape, a.strides) == ((32, 4), (1, 32))
    assert (a.transposed().shape, a.transposed().strides) == ((4, 32), (32, 1))


@pytest.mark.parametrize(
    ("a", "b", "parts"),
    [
        ((4, 32), (16, 4), ["expected (in, r) and (r, out)", "PEFT's layout", "lora_A and lora_B"]),
        ((32, 4), (5, 16), ["[32, 4]", "[5, 16]", "expected (in, r) and (r, out) of one rank"]),
        ((32,), (4, 16), ["expected (in, r)"]),
        ((32, 4, 1), (4, 16, 1), ["expected (in, r)"]),
        ((), (), ["expected (in, r)"]),
    ],
    ids=["PEFT's layout", "ranks differ", "vector", "three dimensions", "scalars"],
)
def test_factors_that_do_not_fit(a: tuple[int, ...], b: tuple[int, ...], parts: list[str]) -> None:
    tensors = refs_of({V0 + ".A": a, V0 + ".B": b})
    claims = claim_pure(tensors)
    (problem,) = claims.problems
    for part in (V0 + ".A", V0 + ".B", *parts):
        assert part in problem
    assert ("PEFT" in problem) == (parts[-1] == "lora_A and lora_B")
    assert [update.fits for update in claims.updates] == [False]


@pytest.mark.parametrize(("there", "missing"), ["AB", "BA"])
def test_missing_half(there: str, missing: str) -> None:
    tensors = refs_of({f"{Q0}.{there}": (32, 32), V0 + ".A": (32, 4), V0 + ".B": (4, 16)})
    claims = claim_pure(tensors)
    assert claims.problems == [f"{Q0}.{there} is there without {Q0}.{missing}"]
    assert [update.module for update in claims.updates] == [V0]


def test_no_scale() -> None:
    claims = claim_pure(refs_of({V0 + ".A": (32, 4), V0 + ".B": (4, 16)}), None, None)
    (problem,) = claims.problems
    assert "its scale is unknown: give alpha (or scaling)" in problem


def test_frozen_copies() -> None:
    tensors = refs_of({f"_orig_mod.{Q0}.original.weight": (32, 32), Q0 + ".original.bias": (32,)})
    claims = claim_pure(tensors, None)
    assert claims.problems == []
    assert [(update.module, update.parameter, update.family) for update in claims.updates] == [
        (Q0, "weight", "frozen-copy"),
        (Q0, "bias", "frozen-copy"),
    ]


@pytest.mark.parametrize(("shape", "fits"), [((32, 32), True), ((32, 33), False), ((32,), False)], ids=str)
def test_frozen_copy_has_the_shape_of_the_base(shape: tuple[int, ...], fits: bool) -> None:
    (update,) = claim_pure(refs_of({Q0 + ".original.weight": (32, 32)})).updates
    problems = FAMILIES["frozen-copy"].check(update, shape)
    assert (problems == []) == fits
    assert all("trained on another base" in problem for problem in problems)


class Copy:
    """Factors of one frozen copy."""

    def __init__(self, copy: Tensor) -> None:
        self.copy = copy

    def whole(self, role: str) -> Tensor:
        return self.copy

    def as_stored(self, role: str) -> Tensor:
        return self.copy

    def rows(self, role: str, rows: RowRange) -> Tensor:
        return self.copy[rows.start : rows.stop]

    def columns(self, role: str, columns: RowRange) -> Tensor:
        return self.copy[:, columns.start : columns.stop]

    def kept(self, name: str, build: Callable[[], Tensor]) -> Tensor:
        return build()


def compare(base: Tensor, copy: Tensor, stored: str) -> None:
    refs = refs_of({"m.original.weight": tuple(copy.shape)}, stored)
    copied = (("copy", refs["m.original.weight"]),)
    update = update_of("m.weight", tuple(base.shape), copied, family="frozen-copy")
    window = Window(RowRange(1, 3), RowRange(0, base.shape[1]))
    tile = base[1:3].clone()
    FAMILIES["frozen-copy"].apply(tile, Copy(copy), update, window, torch.empty_like(tile))
    assert torch.equal(tile, base[1:3])


@pytest.mark.parametrize(("stored", "dtype"), [("F32", torch.float32), ("BF16", torch.bfloat16)], ids=["F32", "BF16"])
def test_copy_agrees_within_its_own_dtype(stored: str, dtype: torch.dtype) -> None:
    base = torch.linspace(-1, 1, 12).view(4, 3)
    copy = base.to(dtype).float()
    compare(base, copy, stored)
    changed = copy.clone()
    changed[2, 1] = torch.nextafter(changed[2, 1].to(dtype), torch.tensor(9.0, dtype=dtype)).float()
    with pytest.raises(FormatError, match=r"copy of m.weight differs from the base's in rows 1 to 2"):
        compare(base, changed, stored)


# --- a merge ----------------------------------------------------------------------------------------------------------


def config_with_copies(place: Place, change: float) -> dict[str, Any]:
    """An adapter with copies of two weights, of which one may differ in an element."""
    base = llama_tensors()
    copies = {f"{name}.original.weight": base[name + ".weight"].clone() for name in (Q0, GATE0)}
    copies[GATE0 + ".original.weight"][40, 3] += change
    path = write_pure(place.folder / "adapter.pt", {**pure_tensors((Q0, V0)), **copies})
    return place.config(adapters=[{"path": str(path), "alpha": 8}])


def test_merge_beside_equal_copies(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    shardmerge.merge(config_with_copies(place, 0.0))
    merged, expected = read_tensors(place.output), llama_tensors()
    for number, module in enumerate((Q0, V0)):
        a, b = lora_pair(module, seed=number)
        expected[module + ".weight"] += (b @ a) * (8 / 4)
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor), name


def test_merge_stops_at_a_copy_that_differs(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    config = config_with_copies(place, 1e-3)
    with pytest.raises(FormatError, match=GATE0.replace(".", r"\.")):
        shardmerge.merge(config)
    assert not list(place.output.glob("*.safetensors*"))
