"""(IA)³: W' = l ∘ W and b' = l ∘ b, l a number for every output; on a feedforward module W' = W ∘ l, l for every input.

W is (out, in). l is (out, 1), or of a feedforward module (1, in); on a convolution, whose W is
(out, in / groups, k…), it is (1, out, 1…) or (1, in, 1…). Which modules are feedforward is in the config; their
biases stay as they are.
Liu et al. 2022, arXiv:2205.05638. Source: peft/tuners/ia3/layer.py and model.py, 0.21.
The bits are those of PEFT's merge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.checks import FLAG, STRINGS, Config
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily
from shardmerge.adapters.lazy_torch import Tensor
from shardmerge.adapters.methods.base import Factors, as_vector, is_vector, misshaped, oriented
from shardmerge.spec.updates import Parameter, Settings, Update, Window
from shardmerge.system.bounded_regex import first_match
from shardmerge.system.bounded_regex import problems as regex_problems


@dataclass(frozen=True, slots=True)
class Ia3Settings(Settings):
    """Whether l is of the inputs, and how many dimensions it has."""

    feedforward: bool
    dims: int


class Ia3(PeftFamily):
    name = "ia3"
    builds = True
    by_column_windows = True
    rows_are_independent = True
    peft_type = "IA3"
    selectors = frozenset({"exclude_modules"})
    title = "(IA)³"
    paper = "arXiv:2205.05638"
    roles = {"ia3_l": "l"}
    settings = {"feedforward_modules": STRINGS, "fan_in_fan_out": FLAG}
    inert = frozenset({"init_ia3_weights"})

    def check_config(self, config: Config) -> list[str]:
        named = config.get("feedforward_modules")
        wrong = regex_problems([named]) if isinstance(named, str) else ()
        return [f"adapter_config.json: feedforward_modules is not a regular expression: {why}" for _, why in wrong]

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        ref = module.factors["l"]
        dims, forward = len(ref.shape), _is_feedforward(module.name, context.config)
        if forward is None and dims == 2:
            forward = ref.shape[0] == 1
        update = self.update(module, context, settings=Ia3Settings(bool(forward), dims))
        claims.updates.append(update)
        if module.is_empty:
            return
        axis = 1 if forward or dims > 2 else 0
        if dims not in (2, 4, 5) or not is_vector(ref) or ref.shape[axis] != math.prod(ref.shape):
            claims.misfit(
                f"{ref.name} is {list(ref.shape)}; expected (out, 1), of a feedforward module (1, in), of a convolution"
                f" (1, out, 1…) or (1, in, 1…); feedforward_modules in adapter_config.json say that {module.name} is "
                f"{'' if forward else 'not '}feedforward"
            )
            return
        if forward is None:
            claims.misfit(
                f"{ref.name}, {list(ref.shape)} is for the outputs or the inputs: adapter_config.json has no "
                "feedforward_modules, which would say so"
            )
            return
        claims.updates[-1] = update = update.changed(factors=(("l", as_vector(ref)),))
        if not forward:
            claims.updates.append(update.changed(parameter="bias", optional=True))

    def orient(self, update: ModuleUpdate, parameter: Parameter) -> ModuleUpdate | str:
        size = update.factor("l").shape[0]
        return oriented(update, parameter, *((None, size) if Ia3Settings.of(update).feedforward else (size, None)))

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        ref, of = update.factor("l"), Ia3Settings.of(update)
        if update.parameter == "weight" and len(shape) != of.dims:
            return [f"{ref.name} has {of.dims} dimensions, but {update.module}.{update.parameter} is {list(shape)}"]
        if not of.feedforward:
            return misshaped(ref, (shape[0],), f"a number for every output of {update.module}")
        groups, rest = divmod(ref.shape[0], max(1, shape[1]))
        if len(shape) > 2 and groups and not rest and not shape[0] % groups:
            return []  # a convolution of several groups has but a part of the inputs in each row
        return misshaped(ref, (shape[1],), f"a number for every input of {update.module}")

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        if not Ia3Settings.of(update).feedforward:
            tile.mul_(factors.rows("l", window.rows).view(-1, 1))
            return
        inputs = update.shape[1]
        kernel = update.columns // inputs
        scales = factors.kept("scales", lambda: factors.whole("l").repeat_interleave(kernel).view(-1, inputs * kernel))
        rows = update.rows // len(scales)
        for group, scale in enumerate(scales):
            start, stop = (max(0, edge - window.rows.start) for edge in (group * rows, (group + 1) * rows))
            tile[start:stop].mul_(scale[window.columns.start : window.columns.stop])

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        groups = max(1, update.factor("l").shape[0] // update.shape[1]) if Ia3Settings.of(update).feedforward else 0
        return groups * update.columns * itemsize


def _is_feedforward(module: str, config: Config) -> bool | None:
    """Whether the config says so, by ends of names as in PEFT; None if it does not say."""
    named = config.get("feedforward_modules")
    if named is None:
        return None
    if isinstance(named, str):
        return first_match([named], module, "fullmatch") is not None
    return any(module.endswith(end) for end in named)
