"""Updates that replace: a whole tensor (``modules_to_save``, trained biases, resized embeddings), or rows of one.

W' = V for a replaced tensor; its shape may differ from the base's in the first dimension, as a resized vocabulary's
does. PEFT saves V as the module keeps it, a Conv1D's (in, out). W'[index[k]] = V[k] for trained tokens, V (n, D); which
rows stands only in the config.
Trainable tokens: peft/tuners/trainable_tokens/layer.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from shardmerge.adapters.methods.base import Factors, Family, ModuleUpdate
from shardmerge.spec.updates import Parameter, Update, Window

if TYPE_CHECKING:
    from torch import Tensor


class Replacement(Family):
    """The adapter's tensor in place of the base's. The plan makes it the source, so nothing is left to do by tile."""

    name: ClassVar[str] = "replacement"
    computes: ClassVar[bool] = False
    is_source: ClassVar[bool] = True
    by_rows: ClassVar[frozenset[str]] = frozenset({"whole"})
    by_column_windows: ClassVar[bool] = True
    order: ClassVar[int] = 1

    def orient(self, update: ModuleUpdate, parameter: Parameter) -> ModuleUpdate | str:
        in_memory = bool(parameter.is_transposed) and update.setting("as_in_memory", False)
        return update.changed(transposes=in_memory)

    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        whole = update.factor("whole")
        if len(whole.shape) == len(shape) and whole.shape[1:] == shape[1:]:
            return []
        return [f"{whole.name} is {list(whole.shape)}, but {update.module}'s {update.parameter} is {list(shape)}"]

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        return


class Overwrite(Replacement):
    """The same where the base stores the tensor in parts, in a larger one, or the other way round."""

    name: ClassVar[str] = "overwrite"
    is_source: ClassVar[bool] = False
    by_rows: ClassVar[frozenset[str]] = frozenset({"whole"})
    rows_are_independent: ClassVar[bool] = True

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
        if update.experts:
            part = factors.whole("whole")[window.expert]
            part = part.view(update.rows, update.columns)[window.rows.start : window.rows.stop]
        else:
            part = factors.rows("whole", window.rows).view(len(window.rows), update.columns)
        tile.copy_(part[:, window.columns.start : window.columns.stop])


class TokenRows(Family):
    """Rows of an embedding (or of the output head) replaced."""

    name: ClassVar[str] = "token-rows"
    computes: ClassVar[bool] = False
    #: Where PEFT puts LoRA on a head that is tied, the tokens are in the layer that LoRA wraps.
    order: ClassVar[int] = 2

    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        rows, indices = update.factor("rows"), dict(update.settings)["indices"]
        if rows.shape != (len(indices), *shape[1:]) or len(shape) != 2:
            return [
                f"{rows.name} is {list(rows.shape)}, but the config names {len(indices)} tokens of an embedding of "
                f"{list(shape)}"
            ]
        if outside := [index for index in indices if index >= shape[0]]:
            return [f"{update.module}: token {outside[0]} is beyond the embedding, which has {shape[0]} rows"]
        return []

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        for position, index in enumerate(update.setting("indices")):
            if window.rows.start <= index < window.rows.stop:
                tile[index - window.rows.start].copy_(factors.whole("rows")[position])
