"""LoRA on experts whose matrices are stored together, in one tensor or in one matrix.

Of fused experts, W (E, out, in), A is (r·E, in) with experts outermost and B (out, r·E) with experts *innermost*.
Source: peft/tuners/lora/layer.py, ParamWrapper.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from shardmerge.adapters.claims import ModuleUpdate, shown
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Factors, Family, add_scaled
from shardmerge.adapters.methods.lora import Lora
from shardmerge.spec.tensors import Orientation, RowRange, transposed_if
from shardmerge.spec.updates import Parameter, Settings, Update, Window


@dataclass(frozen=True, slots=True)
class ExpertSettings(Settings):
    """The layout of B's columns, ``peft`` or ``unsloth``, and the PEFT that saved the adapter, or ""."""

    layout: str
    peft_version: str


class LoraExperts(Family):
    """LoRA on fused experts: every expert e has its own A, rows e·r and following, and its own B, every E-th column."""

    name = "lora-experts"
    scales_by_alpha = True
    has_expert_layout = True
    by_columns = frozenset()
    by_rows = frozenset({"A"})
    as_stored = frozenset({"B"})
    neutral_if_zero = frozenset({"B"})
    by_column_windows = True
    rows_are_independent = True
    adds = True

    def orient(self, update: ModuleUpdate, parameter: Parameter) -> ModuleUpdate | str:
        """A parameter of two dimensions is a matrix as PEFT sees it in memory; of three, see `_orientation`."""
        if len(parameter.shape) == 2:
            return update.changed(family=Lora.name, orientation=parameter.in_memory.assumed)
        if len(parameter.shape) != 3:
            return update
        orientation = _orientation(update, parameter)
        if not isinstance(orientation, Orientation):
            return orientation
        return update.changed(orientation=orientation, experts=True)

    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        a, b = update.factor("A"), update.factor("B")
        if len(shape) != 3:
            return [f"{update.module}: its {update.parameter} {list(shape)} does not hold experts' matrices"]
        experts, out_features, in_features = shape
        if a.shape != (update.rank * experts, in_features) or b.shape != (out_features, update.rank * experts):
            expected = f"[{update.rank * experts}, {in_features}] and [{out_features}, {update.rank * experts}]"
            what = f"{experts} experts of ({out_features}, {in_features}) at rank {update.rank}"
            return [f"{update.module}: {shown(a, b)} do not fit {what}: expected {expected}"]
        return []

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        rank, first = update.rank, window.expert * update.rank
        a = factors.rows("A", RowRange(first, first + rank))[:, window.columns.start : window.columns.stop]
        b = factors.as_stored("B")
        if ExpertSettings.of(update).layout == "unsloth":  # (out, E, r)
            b = b.view(update.rows, update.experts, rank)[:, window.expert]
        else:
            b = b.view(update.rows, rank, update.experts)[:, :, window.expert]
        b = b[window.rows.start : window.rows.stop].to(device=tile.device, dtype=tile.dtype)
        torch.mm(b.contiguous(), a.contiguous(), out=scratch)
        add_scaled(tile, scratch, update.scaling)


def _orientation(update: ModuleUpdate, parameter: Parameter) -> Orientation | str:
    """Transposed if A takes the outputs and B the inputs. PEFT has changed it twice.

    Up to 0.18.1 A took the parameter's second dimension, whatever it was; in 0.19.0 it took the outputs; since 0.19.1
    it takes the inputs. The shapes show which, except where they are square.
    """
    _, out_features, in_features = parameter.shape
    made = (update.factor("B").shape[0], update.factor("A").shape[-1])
    if out_features != in_features:
        return transposed_if(made == (in_features, out_features))
    version = _version(ExpertSettings.of(update).peft_version)
    if parameter.in_memory is Orientation.UNKNOWN or version is None:
        return (
            f"{update.module}: its {update.parameter} is square, so shapes do not distinguish inputs from outputs, "
            "and "
            + ("adapter_config.json has no peft_version" if version is None else "the base's architecture is not known")
        )
    if version < (0, 19, 0):
        return transposed_if(parameter.in_memory is Orientation.SAME)
    return transposed_if(version < (0, 19, 1))


def _version(text: str) -> tuple[int, int, int] | None:
    match = re.match(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})", text)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


class LoraGated(Lora):
    """LoRA on two matrices, gate and up, whose rows are interleaved: gate's first, up's first, gate's second, …

    Gate has A (r, in) and B (out / 2, r), up has A_up and B_up; either may be missing, and its rows then stay.
    """

    name = "lora-gated"
    stacks_vectors = False
    by_rows = frozenset()
    by_columns = frozenset()
    neutral_if_zero = frozenset({"B", "B_up"})
    rows_are_independent = False

    def orient(self, update: ModuleUpdate, parameter: Parameter) -> ModuleUpdate | str:
        return update

    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        problems = []
        for end in ("", "_up"):
            if not update.has(f"A{end}"):
                continue
            a, b = update.factor(f"A{end}"), update.factor(f"B{end}")
            if len(shape) != 2 or (2 * b.shape[0], a.shape[1]) != shape:
                made = f"every second row of ({2 * b.shape[0]}, {a.shape[1]})"
                problems.append(f"{update.module}: {shown(a, b)} make {made}, but the weight is {shape}")
        return problems

    def product(self, factors: Factors, update: Update, window: Window, out: Tensor) -> None:
        for parity, end in enumerate(("", "_up")):
            rows = out[(parity - window.rows.start) % 2 :: 2]
            if not update.has(f"A{end}"):
                rows.zero_()
                continue
            first = (window.rows.start - parity + 1) // 2
            b = factors.whole(f"B{end}")[first : first + len(rows)]
            a = factors.whole(f"A{end}")[:, window.columns.start : window.columns.stop]
            torch.mm(b, a.contiguous(), out=rows)
