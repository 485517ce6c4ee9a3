"""PEANuT: W' = W + s · B f(A W), f a small network that is applied to every column of A W by itself.

W is (out, in), A (r, out), B (out, r). With σ the activation and ``depth`` d, f(x) is h₀ = σ(x), h_i = σ(E_i h_{i−1})
for d encoders E, and then y ← σ(D_i y) + h_{d−i} for d decoders D, i = 1 … d, all of them (r, r). Zhong et al. 2024,
arXiv:2410.01870. Source: peft/tuners/peanut/layer.py, 0.21.

A W needs all rows, so a first pass adds it up; that and the rest is computed in float64, and rounded once. PEFT
computes in float32, and on a 16-bit base rounds the update before it adds it, so bits can differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.checks import OPTIONAL_NUMBER, RANK, Config, checked, is_count, one_of
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily
from shardmerge.adapters.lazy_torch import Tensor
from shardmerge.adapters.methods.base import Factors, all_misshaped
from shardmerge.adapters.methods.factored import TwoPass
from shardmerge.spec.tensors import RowRange
from shardmerge.spec.updates import Settings, Update

_DEEPEST = 32


def _tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


#: Activations by their names in transformers.
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: 0.5 * x * (1 + (x / math.sqrt(2)).erf()),
    "gelu_fast": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu_python": lambda x: 0.5 * x * (1 + (x / math.sqrt(2)).erf()),
    "leaky_relu": lambda x: x.where(x > 0, 0.01 * x),
    "linear": lambda x: x,
    "mish": lambda x: x * x.clamp(min=0).add((-x.abs()).exp().log1p()).tanh(),
    "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
    "relu": lambda x: x.relu(),
    "relu2": lambda x: x.relu().square(),
    "relu6": lambda x: x.clamp(0, 6),
    "sigmoid": lambda x: x.sigmoid(),
    "silu": lambda x: x * x.sigmoid(),
    "swish": lambda x: x * x.sigmoid(),
    "tanh": lambda x: x.tanh(),
}


@dataclass(frozen=True, slots=True)
class PeanutSettings(Settings):
    """d, and σ by transformers' name."""

    depth: int
    activation: str


class Peanut(TwoPass, PeftFamily):
    name = "peanut"
    mixes_weight = True  # a network looks at W
    by_rows = frozenset({"B"})
    neutral_if_zero = frozenset({"B"})
    peft_type = "PEANUT"
    title = "PEANuT"
    updates = "Linear layers"
    paper = "arXiv:2410.01870"
    roles = {
        "peanut_A.weight": "A",
        "peanut_B.weight": "B",
        **{f"peanut_encoders.{index}.weight": f"encoder{index}?" for index in range(_DEEPEST)},
        **{f"peanut_decoders.{index}.weight": f"decoder{index}?" for index in range(_DEEPEST)},
    }
    settings = {
        "r": RANK,
        "depth": checked(lambda value: is_count(value) and value <= _DEEPEST, f"a whole number up to {_DEEPEST}"),
        "scaling": OPTIONAL_NUMBER,
        "act_fn": one_of(*_ACTIVATIONS),
    }
    inert = frozenset({"init_weights"})

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        config, there = context.config, module.factors
        depth = config.get("depth") or 0
        wanted = {"A", "B", *(f"{part}coder{index}" for part in ("en", "de") for index in range(depth))}
        if there.keys() != wanted:
            odd = sorted(wanted ^ there.keys())
            what = there[odd[0]].name + " is one too many" if odd[0] in there else f"{module.name} is without {odd[0]}"
            claims.reject(module.refs, f"{what}: adapter_config.json says depth {depth}")
            return
        settings = PeanutSettings(depth, config.get("act_fn") or "relu")
        claims.updates.append(self.update(module, context, settings=settings))

    def scaling_of(self, config: Config, module: Module) -> float:
        return 1.0 if config.get("scaling") is None else float(config["scaling"])

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        rank = update.rank
        expected = {role: (rank, rank) for role, _ in update.factors} | {"A": (rank, shape[0]), "B": (shape[0], rank)}
        return all_misshaped(update, expected, "by the config's r and the weight's shape")

    def view(self, factors: Factors, update: Update, rows: RowRange) -> Tensor:
        return factors.whole("A")[:, rows.start : rows.stop]

    def left(self, factors: Factors, update: Update, rows: RowRange) -> Tensor:
        return factors.rows("B", rows)

    def made(self, seen: Tensor, factors: Factors, update: Update, columns: RowRange) -> Tensor:
        of = PeanutSettings.of(update)
        activate, depth = _ACTIVATIONS[of.activation], of.depth
        hidden = activate(seen)
        before = []
        for index in range(depth):
            before.append(hidden)
            hidden = activate(factors.whole(f"encoder{index}").double() @ hidden)
        for index in range(depth):
            hidden = activate(factors.whole(f"decoder{index}").double() @ hidden) + before.pop()
        return hidden

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        # The results of the encoders, for the decoders.
        steps = PeanutSettings.of(update).depth + 2
        return super().kept_bytes(update, itemsize) + steps * update.rank * update.columns * 8
