"""Updates by whole tensors of W's shape, or by rows of one.

W' = V for a replaced tensor (``modules_to_save``, trained biases, resized embeddings); its shape may differ from the
base's in the first dimension, as a resized vocabulary's does. PEFT saves V as the module keeps it, of a Conv1D (in,
out). W' = W + D for a difference, as trainers of image models keep small layers that they tune whole. W' = W for a
frozen copy of the base's tensor. W'[index[k]] = V[k] for trained tokens, V (n, D); only the config states which rows.
Source: peft/tuners/trainable_tokens/layer.py; LyCORIS, lycoris/modules/full.py and norms.py; ComfyUI, comfy/lora.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardmerge.adapters.claims import ModuleUpdate
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Effect, Factors, Family, add_scaled
from shardmerge.errors import FormatError
from shardmerge.spec.tensors import Orientation
from shardmerge.spec.updates import HasSettings, Parameter, Settings, Update, Window


@dataclass(frozen=True, slots=True)
class WholeSettings(Settings):
    """Where a whole tensor is from, and what it is."""

    #: Whether PEFT saved it for a module of its own, apart from what is tied to that.
    saved: bool = False
    #: Whether it is a copy of what the adapter was trained on, rather than what was trained.
    copy: bool = False
    #: Whether it is as the module keeps it in memory: a Conv1D's is (in, out).
    as_in_memory: bool = False
    #: The file beside the adapter that it is from; empty where it is the adapter's own.
    beside: str = ""


def whole_settings(update: HasSettings) -> WholeSettings:
    """Where an update's whole tensor is from; of an update that has none, nothing is true."""
    return update.settings if isinstance(update.settings, WholeSettings) else _NONE


_NONE = WholeSettings()


def _window_of(factors: Factors, role: str, update: Update, window: Window) -> Tensor:
    """The window's part of a factor that has the shape of the parameter, (rows, columns)."""
    if update.experts:
        part = factors.whole(role)[window.expert].reshape(update.rows, update.columns)
        part = part[window.rows.start : window.rows.stop]
    else:
        part = factors.rows(role, window.rows).reshape(len(window.rows), update.columns)
    return part[:, window.columns.start : window.columns.stop]


class Replacement(Family):
    """The adapter's tensor in place of the base's. The plan makes it the source, so nothing is left to do by tile."""

    name = "replacement"
    effect = Effect.REPLACES
    is_source = True
    by_rows = frozenset({"whole"})
    by_column_windows = True

    def orient(self, update: ModuleUpdate, parameter: Parameter) -> ModuleUpdate | str:
        in_memory = parameter.in_memory.assumed if whole_settings(update).as_in_memory else Orientation.SAME
        return update.changed(orientation=in_memory)

    def as_applied(self, update: ModuleUpdate, *, can_be_source: bool) -> ModuleUpdate:
        is_source = can_be_source and update.factor("whole").strides is None
        return update if is_source else update.changed(family=Overwrite.name)

    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        whole = update.factor("whole")
        if len(whole.shape) == len(shape) and whole.shape[1:] == shape[1:]:
            return []
        return [f"{whole.name} is {list(whole.shape)}, but {update.module}'s {update.parameter} is {list(shape)}"]

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        return


class Overwrite(Replacement):
    """The same where the base stores the tensor in parts, in a larger one, or the other way round."""

    name = "overwrite"
    is_source = False
    by_rows = frozenset({"whole"})
    rows_are_independent = True

    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        whole = update.factor("whole")
        if whole.shape == shape:
            return []
        hint = "; it is pickled as a view, which can replace but not resize: save it with .contiguous()"
        return [
            f"{whole.name} is {list(whole.shape)}, but {update.module}'s {update.parameter} is {list(shape)}"
            + (hint if whole.strides is not None else "")
        ]

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        tile.copy_(_window_of(factors, "whole", update, window))


class Difference(Family):
    """W' = W + s · D, by rows or by columns; s is the adapter's weight in our config, as there is no α."""

    name = "difference"
    by_rows = frozenset({"difference"})
    neutral_if_zero = frozenset({"difference"})
    by_column_windows = True
    rows_are_independent = True
    adds = True

    def orient(self, update: ModuleUpdate, parameter: Parameter) -> ModuleUpdate | str:
        """D is as the module keeps W in memory, a Conv1D's (in, out)."""
        return update.changed(orientation=parameter.in_memory.assumed)

    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        difference = update.factor("difference")
        if difference.shape == shape and shape:
            return []
        return [
            f"{difference.name} is {list(difference.shape)}, but {update.module}'s {update.parameter} is {list(shape)}"
        ]

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        scratch.copy_(_window_of(factors, "difference", update, window))
        add_scaled(tile, scratch, update.scaling)


class FrozenCopy(Family):
    """Raises FormatError where the copy and the base differ.

    Training scripts that wrap a layer often save its own weight with the factors, and PEFT does so with embeddings. The
    copy shows which base the adapter was trained on; PEFT's is compared for every adapter but the first.
    """

    name = "frozen-copy"
    effect = Effect.COMPARES
    by_rows = frozenset({"copy"})
    by_column_windows = True
    rows_are_independent = True

    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        copy = update.factor("copy")
        if copy.shape != shape:
            return [
                f"{copy.name}: a frozen copy of {update.module}.{update.parameter}, but it is {list(copy.shape)} and "
                f"the base's is {list(shape)}; the adapter was trained on another base"
            ]
        return []

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        copy = _window_of(factors, "copy", update, window)
        # A copy in a narrower dtype than the base's can only agree within that dtype's rounding.
        narrow = getattr(torch, {"F16": "float16", "BF16": "bfloat16"}.get(update.factor("copy").dtype, "float64"))
        if not torch.equal(scratch.copy_(tile).to(narrow), copy.to(narrow)):
            raise FormatError(
                f"{update.factor('copy').name}: the adapter's copy of {update.target} differs from the base's in rows "
                f"{window.rows.start} to {window.rows.stop - 1}: it was trained on another base, or it trained this "
                "weight too"
            )


@dataclass(frozen=True, slots=True)
class TokenSettings(Settings):
    """The tokens whose rows were trained, and whether a head that is tied to the embedding has the same rows."""

    indices: tuple[int, ...]
    for_both_sides: bool


class TokenRows(Family):
    """Rows of an embedding (or of the output head) replaced."""

    name = "token-rows"
    effect = Effect.REPLACES_ROWS

    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        rows, indices = update.factor("rows"), TokenSettings.of(update).indices
        if rows.shape != (len(indices), *shape[1:]) or len(shape) != 2:
            return [
                f"{rows.name} is {list(rows.shape)}, but the config names {len(indices)} tokens of an embedding of "
                f"{list(shape)}"
            ]
        if outside := [index for index in indices if index >= shape[0]]:
            return [f"{update.module}: token {outside[0]} is beyond the embedding, which has {shape[0]} rows"]
        return []

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        for position, index in enumerate(TokenSettings.of(update).indices):
            if window.rows.start <= index < window.rows.stop:
                tile[index - window.rows.start].copy_(factors.whole("rows")[position])
