"""A method that PEFT does not have, in one file: W' = W + s · g · u vᵀ, an update of rank one with a gain.

W is (out, in), u (out), v (in); g is the setting ``gain`` of adapter_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file

import shardmerge
from shardmerge.adapters.claims import ModuleUpdate
from shardmerge.adapters.formats.checks import NUMBER, Check, Config
from shardmerge.adapters.formats.peft_method import Module, PeftFamily
from shardmerge.adapters.lazy_torch import Tensor
from shardmerge.adapters.methods.base import Factors, add_scaled, all_misshaped
from shardmerge.adapters.registry import FAMILIES, METHODS, register
from shardmerge.spec.updates import Settings, Update, Window
from tests.support.method_cases import Subject, first_of_each
from tests.support.peft_oracle import make_config, random, write_base


@dataclass(frozen=True, slots=True)
class ToySettings(Settings):
    """g."""

    gain: float


class Toy(PeftFamily):
    """``peft_type: TOY``, and what it does to a matrix."""

    name = "toy"
    peft_type = "TOY"
    title = "Toy"
    updates = "matrices"
    by_rows = frozenset({"u"})
    neutral_if_zero = frozenset({"u"})
    by_column_windows = True
    rows_are_independent = True
    adds = True
    roles: ClassVar[Mapping[str, str]] = {"toy_u": "u", "toy_v": "v"}
    settings: ClassVar[Mapping[str, Check]] = {"gain": NUMBER}

    def settings_of(self, config: Config, module: Module) -> Settings:
        return ToySettings(float(config["gain"]))

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        return all_misshaped(update, {"u": (shape[0],), "v": (shape[1],)}, f"of {update.module} {list(shape)}")

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        v = factors.whole("v")[window.columns.start : window.columns.stop]
        scratch.copy_(factors.rows("u", window.rows).unsqueeze(1) * v)
        add_scaled(tile, scratch, ToySettings.of(update).gain * update.scaling)


# --- what a test needs around it --------------------------------------------------------------------------------------

CASE = "toy"
GAIN = 3.0
SHAPES = {"tall.weight": (768, 96), "wide.weight": (96, 768)}


@contextmanager
def registered() -> Iterator[None]:
    """Within, the package knows the method."""
    register(Toy)
    try:
        yield
    finally:
        del FAMILIES[Toy.name], METHODS[Toy.peft_type]


def write(folder: Path) -> tuple[Path, Path]:
    """A base of two matrices and an adapter on both."""
    weights = {name: random(*shape, seed=seed) for seed, (name, shape) in enumerate(SHAPES.items())}
    base = write_base(folder / "base", [weights])
    factors = {}
    for seed, (name, (rows, columns)) in enumerate(SHAPES.items(), 10):
        module = name.removesuffix(".weight")
        factors[f"base_model.model.{module}.toy_u"] = random(rows, seed=seed)
        factors[f"base_model.model.{module}.toy_v"] = random(columns, seed=seed + 10)
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "TOY", "gain": GAIN, "target_modules": ["tall", "wide"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


def exact(
    base: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor], weight: float = 1.0
) -> dict[str, torch.Tensor]:
    """W' in float64, by the formula."""
    result = {}
    for name, tensor in base.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        u, v = (adapter[f"{module}.toy_{letter}"].double() for letter in "uv")
        result[name] = tensor.double() + weight * GAIN * torch.outer(u, v)
    return result


_SUBJECTS: list[Subject] = []


def subjects() -> tuple[Subject, ...]:
    """Its updates, for the contract; the method must be registered."""
    if not _SUBJECTS:
        from tests.support.peft_oracle import _new_folder as new_folder

        folder = new_folder("toy")
        base, adapter = write(folder)
        plan = shardmerge.plan(make_config(folder / "out", base, [adapter]))
        _SUBJECTS.extend(first_of_each((tensor.source, update) for tensor, update in plan.updates()))
    return tuple(_SUBJECTS)
