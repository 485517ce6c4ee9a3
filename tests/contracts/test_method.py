"""What every family of updates promises (`shardmerge.adapters.methods.base`). A new one is a row in `CASES`."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from shardmerge.adapters.methods.base import Effect
from shardmerge.adapters.registry import FAMILIES
from shardmerge.spec.plans import jsonable
from shardmerge.spec.tensors import Orientation, RowRange
from shardmerge.spec.updates import Window
from tests.support import base_roundings, toy_method
from tests.support.builders import slow_but
from tests.support.device_cases import NAMES
from tests.support.method_cases import Given, Subject, subjects

#: Cases whose adapters have updates of every family.
CASES = (*NAMES, toy_method.CASE, base_roundings.CASE)
#: Those that the ordinary suite runs: a plain one, one that looks at all rows first, one that copies, one of groups.
QUICK = ("LoRA", "LoRA, transposed", "LoRA, tokens", "DEFT", "RoAd", "VeRA", toy_method.CASE, base_roundings.CASE)

#: Families whose last bit depends on the tiles, as their docstrings say: W C is multiplied some rows at a time.
BITS_BY_TILE = ("glora-bias",)

F32, F64 = torch.float32, torch.float64


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    with toy_method.registered():
        yield


@pytest.fixture(params=slow_but(CASES, *QUICK))
def every(request: pytest.FixtureRequest) -> tuple[Subject, ...]:
    """The subjects of one case."""
    name: str = request.param
    of_ours = {toy_method.CASE: toy_method.subjects, base_roundings.CASE: base_roundings.subjects}
    return of_ours[name]() if name in of_ours else subjects(name)


def computing(every: tuple[Subject, ...]) -> list[Subject]:
    return [subject for subject in every if subject.family.computes]


def lengths(values: Tensor) -> Tensor:
    found: Tensor = values.norm(dim=1, keepdim=True) if values.shape[1] > 1 else values.norm().expand(len(values), 1)
    return found


# --- data -------------------------------------------------------------------------------------------------------------


def test_an_update_is_data(every: tuple[Subject, ...]) -> None:
    for subject in every:
        assert pickle.loads(pickle.dumps(subject.update)) == subject.update
        json.dumps(jsonable(subject.update.settings))
        assert subject.update.settings is None or dataclasses.is_dataclass(subject.update.settings)


def test_names_are_the_registrys(every: tuple[Subject, ...]) -> None:
    for subject in every:
        assert FAMILIES[subject.update.family].name == subject.update.family


def test_traits_agree_with_each_other(every: tuple[Subject, ...]) -> None:
    for subject in every:
        family = subject.family
        roles = {role for role, _ in subject.update.factors}
        assert not family.adds or family.computes
        assert not family.is_source or family.effect is Effect.REPLACES
        assert not (family.by_rows | family.by_columns) & family.as_stored
        assert family.neutral_if_zero & roles or not family.neutral_if_zero


# --- what it does -----------------------------------------------------------------------------------------------------


def test_any_tiling_has_the_same_bits(every: tuple[Subject, ...]) -> None:
    """Of even tiles of at least 16 rows. What a first pass adds up may differ in the last bit of its sums."""
    for subject in computing(every):
        few = subject.applied(Given(subject.update, F32), subject.windows(2))
        many = subject.applied(Given(subject.update, F32), subject.windows(5))
        if subject.family.needs_prepass(subject.update) or subject.update.family in BITS_BY_TILE:
            torch.testing.assert_close(many, few, rtol=1e-6, atol=1e-6 * float(few.abs().max()))
        else:
            assert torch.equal(many, few), subject.update.family


def test_a_window_by_itself_is_that_of_the_whole(every: tuple[Subject, ...]) -> None:
    """Of rows, whatever their number, if they are whole groups."""
    for subject in computing(every):
        if subject.family.needs_prepass(subject.update) or subject.update.by_columns:
            continue
        (everything,) = subject.whole
        unit = subject.family.row_unit(subject.update)
        rows = RowRange(unit, min(4 * unit, len(everything.rows)))
        whole = subject.applied(Given(subject.update, F64))
        part = subject.applied(Given(subject.update, F64), [Window(rows, everything.columns)])
        where = slice(rows.start, rows.stop)
        torch.testing.assert_close(part[where], whole[where], rtol=1e-10, atol=1e-10)


def test_columns_of_a_weight_that_is_stored_transposed(every: tuple[Subject, ...]) -> None:
    for subject in computing(every):
        if not subject.family.by_column_windows or subject.update.columns < 32 or subject.update.by_columns:
            continue
        region = subject.update.region
        region = dataclasses.replace(region, orientation=region.orientation.then(Orientation.TRANSPOSED))
        turned = dataclasses.replace(subject, update=dataclasses.replace(subject.update, region=region))
        whole = subject.applied(Given(subject.update, F64), subject.windows(1))
        part = turned.applied(Given(turned.update, F64, in_parts=True), turned.windows(2))
        torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-9)


def test_factors_are_read_as_declared(every: tuple[Subject, ...]) -> None:
    for subject in every:
        if subject.family.changes_weight and len(windows := subject.windows(5)) > 1:
            subject.applied(Given(subject.update, F32, in_parts=True), windows)


def test_factors_of_zero_do_nothing_where_the_trait_says_so(every: tuple[Subject, ...]) -> None:
    for subject in computing(every):
        neutral = subject.family.neutral_if_zero
        roles = frozenset(role for role, _ in subject.update.factors if role in neutral)
        if roles:
            result = subject.applied(Given(subject.update, F32, zeros=roles))
            torch.testing.assert_close(result, subject.weight, rtol=2e-7, atol=0, msg=subject.update.family)


def test_what_adds_is_scaled_by_a_weight(every: tuple[Subject, ...]) -> None:
    for subject in computing(every):
        if not subject.family.adds:
            continue
        twice = dataclasses.replace(subject.update, scaling=2 * subject.update.scaling)
        weight = subject.weight.double()
        once = subject.applied(Given(subject.update, F64)) - weight
        double = subject.applied(Given(twice, F64), update=twice) - weight
        assert float(once.abs().max()) > 0
        torch.testing.assert_close(double, 2 * once, rtol=1e-9, atol=1e-11)


def test_float32_is_as_near_to_float64_as_the_traits_say(every: tuple[Subject, ...]) -> None:
    unit = 2.0**-24
    for subject in computing(every):
        exact = subject.applied(Given(subject.update, F64))
        found = subject.applied(Given(subject.update, F32)).double()
        before, family = subject.weight.double(), subject.family
        size = lengths(exact - before)
        if family.mixes_weight:
            size = torch.maximum(lengths(before), lengths(exact))
        bound = unit * (4 * (before.abs() + exact.abs()) + family.sum_units * size)
        wrong = (found - exact).abs() > bound
        assert not bool(wrong.any()), f"{subject.update.family}: {float(((found - exact).abs() / bound).max())}"


# --- memory -----------------------------------------------------------------------------------------------------------


def test_declared_memory_holds_what_is_kept(every: tuple[Subject, ...]) -> None:
    """That it holds all that ``apply`` takes, `tests.adapters.test_family_memory` measures in a process of its own."""
    for subject in computing(every):
        given = Given(subject.update, F32)
        subject.applied(given, subject.windows(5))
        assert given.kept_bytes <= subject.family.kept_bytes(subject.update, 4), subject.update.family


@pytest.mark.slow
def test_every_family_has_a_case() -> None:
    cases = [toy_method.subjects(), base_roundings.subjects(), *(subjects(name) for name in NAMES)]
    seen = {subject.update.family for every in cases for subject in every}
    assert seen == FAMILIES.keys()
