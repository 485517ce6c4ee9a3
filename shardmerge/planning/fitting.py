"""Check whether updates fit the parameters of the base."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from shardmerge.adapters.claims import ModuleUpdate
from shardmerge.adapters.methods.base import check_dtypes
from shardmerge.adapters.methods.whole import whole_settings
from shardmerge.adapters.registry import FAMILIES
from shardmerge.codecs.registry import CODECS
from shardmerge.file_formats.checkpoint import Checkpoint
from shardmerge.key_mapping.heads import LABELS, Head
from shardmerge.key_mapping.names import Names
from shardmerge.planning.quantised import DENSE_COPY, is_quantised
from shardmerge.planning.tied import stands_for
from shardmerge.planning.vocabulary import may_resize
from shardmerge.spec.tensors import FACTOR_DTYPES, FLOAT_DTYPES, Orientation, TensorRef, Weight
from shardmerge.spec.updates import Parameter, Region


@dataclass(frozen=True)
class StoredWeights:
    """The base's weights by name; for one that is tied and so not stored, the one that is."""

    checkpoint: Checkpoint
    names: Names

    def weight(self, name: str) -> Weight:
        weights = self.checkpoint.weights
        return weights[name if name in weights else stands_for(self.names, name) or name]

    def tensor(self, name: str) -> TensorRef:
        return self.weight(name).tensor

    def decoded(self, name: str) -> TensorRef:
        """A weight with the dtype that its values have when they are decoded."""
        weight = self.weight(name)
        if weight.stored_as is None:
            return weight.tensor
        return dataclasses.replace(weight.tensor, dtype=CODECS[weight.stored_as.codec].values)

    def as_factor(self, parameter: Parameter) -> TensorRef | None:
        """A parameter of the base as a factor, in the matrix's orientation; None if it is not rows of one tensor."""
        region, stored = parameter.regions[0], self.tensor(parameter.regions[0].tensor)
        if self.weight(region.tensor).stored_as is not None:
            return None
        if len(parameter.regions) > 1 or region.expert is not None or region.shuffle or parameter.experts:
            return None
        if region.orientation is Orientation.TRANSPOSED:
            return stored.transposed() if stored.shape == parameter.shape[::-1] else None
        if stored.shape[1:] != parameter.shape[1:] or not stored.shape[0]:
            return None
        row = stored.nbytes // stored.shape[0]
        return dataclasses.replace(
            stored, shape=parameter.shape, offset=stored.offset + region.stored_start * row, nbytes=region.rows * row
        )


@dataclass(frozen=True)
class Fitting:
    """Checks of one adapter's updates against the base.

    ``weight`` is the adapter's in the config, ``head`` the one of its task.
    """

    stored: StoredWeights
    weight: float
    head: Head | str

    def problems(self, update: ModuleUpdate, parameter: Parameter) -> list[str]:
        """Decided by shapes, dtypes and settings; names are for the messages, but for those of quantised weights."""
        if is_refused(update):
            return []
        family = FAMILIES[update.family]
        refs = [self.stored.decoded(region.tensor) for region in parameter.regions]
        problems = [problem for ref in refs for problem in check_dtypes(update, ref, family)][:1]
        quantised = [is_quantised(self.stored.checkpoint, update.module, update.parameter, ref) for ref in refs]
        if packed := next(filter(None, quantised), None):
            return [packed]
        if family.is_source:
            problems = _dtype_of_whole(update, refs[0])
        misfits = family.check(update, shape_of(update, parameter))
        stored_as = self.stored.weight(parameter.regions[0].tensor).stored_as
        if misfits and stored_as is not None and any(role == "whole" for role, _ in update.factors):
            misfits = [f"{misfits[0]}; it is stored as {stored_as.codec}, which cannot be resized: {DENSE_COPY}"]
        problems += misfits
        if not math.isfinite(update.scaling * self.weight):
            problems.append(
                f"{update.module}: its scaling of {update.scaling:g} times the weight {self.weight:g} is not a number"
            )
        # A copy of what the adapter was trained on is not part of what it learned.
        is_copy = whole_settings(update).copy
        if self.weight != 1 and family.changes_weight and not family.adds and not is_copy:
            problems.append(
                f"{update.module}: weight {self.weight:g} has no meaning for {update.family}, which does "
                f"not add to the {update.parameter}; remove the weight"
            )
        by_columns = any(region.orientation is not update.orientation for region in parameter.regions)
        if by_columns and len(parameter.shape) > 1 and not family.by_column_windows:
            problems.append(
                f"{update.module}: the base stores its {update.parameter} transposed, which {update.family} cannot "
                "update"
            )
        if any(region.shuffle for region in parameter.regions) and not family.rows_are_independent:
            problems.append(
                f"{update.module}: the base stores the rows of its {update.parameter} in another order, which "
                f"{update.family} cannot update"
            )
        unit = family.row_unit(update) if not problems else 1
        for region in parameter.regions:
            if region.orientation is update.orientation and (region.start % unit or region.rows % unit):
                problems.append(
                    f"{update.module}: {update.family} updates {unit} rows together, but {region.tensor} stores rows "
                    f"{region.start} to {region.start + region.rows - 1} of its {update.parameter} by themselves"
                )
                break
        if family.is_source and not problems and not self._has_label_rows(update):
            problems += may_resize(self.stored.checkpoint, update, refs[0])
        return problems

    @property
    def head_shapes(self) -> Mapping[str, tuple[object, ...]]:
        """The dimensions of the tensors of the head that the adapter's task has, by name."""
        return {} if isinstance(self.head, str) else self.head.shapes

    def _has_label_rows(self, update: ModuleUpdate) -> bool:
        """Whether the rows of a tensor are the labels of the base's own head, of which training may have had others."""
        is_there = not isinstance(self.head, str) and self.head.is_there
        return is_there and self.head_shapes.get(f"{update.module}.{update.parameter}", ())[:1] == (LABELS,)


def is_refused(update: ModuleUpdate) -> bool:
    """Whether it is refused already: its factors do not fit each other or are empty; shapes may be anything."""
    return not update.fits or any(0 in ref.shape for _, ref in update.factors)


def _dtype_of_whole(update: ModuleUpdate, stored: TensorRef) -> list[str]:
    """Floats replace floats, whatever their width; other numbers only their own kind."""
    whole = update.factor("whole")
    floats = whole.dtype in FACTOR_DTYPES and stored.dtype in FLOAT_DTYPES
    if floats or whole.dtype == stored.dtype:
        return []
    return [f"{whole.name} is stored as {whole.dtype}, but the base's {stored.name} as {stored.dtype}"]


def as_matrix(parameter: Parameter) -> Parameter | str:
    """Experts' biases (E, n) as one matrix, which they are to LoRA; a string where they are stored in parts."""
    region, (experts, width) = parameter.regions[0], parameter.shape
    if parameter.regions != (Region(region.tensor, width),):
        return f"the base stores {parameter.name} in parts, which LoRA on all of it cannot update"
    return dataclasses.replace(parameter, regions=(Region(region.tensor, experts),), experts=False)


def has_experts(update: ModuleUpdate, parameter: Parameter) -> bool:
    return update.experts or parameter.experts


def as_stack(parameter: Parameter) -> Parameter:
    """A tensor (E, rows, columns) whose name does not say so, seen as a stack of experts: they have its rows."""
    if len(parameter.shape) != 3:
        return parameter  # of which the family says that it does not hold experts' matrices
    regions = tuple(dataclasses.replace(region, rows=parameter.shape[1]) for region in parameter.regions)
    return dataclasses.replace(parameter, regions=regions, experts=True)


def shape_of(update: ModuleUpdate, parameter: Parameter) -> tuple[int, ...]:
    """The shape of the matrix that the update's factors describe."""
    return update.orientation.shape(parameter.shape)
