"""TinyLoRA: W' = W + B R A, R = Σᵢ vᵢ Pᵢ: a handful of numbers v choose among random mixtures of W's main directions.

W is (out, in), or of an embedding (V, D). A (r, in) and B (out, r) are W's largest singular vectors and are in the
file; so is P (u, r, r), random. v (u) is shared by a group of modules, and stands under the group's number. The
group of a module follows from its number among all targets in the order of the model, which no file has; but P was
drawn from the config's ``projection_seed`` plus that number, so P itself shows it. Morris et al. 2026,
arXiv:2602.04118. Source: peft/tuners/tinylora/layer.py and model.py, 0.21.

Without ``save_projection`` P is not in the file, and such adapters are refused. The bits are those of PEFT's merge,
for every dtype of the base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.checks import RANK, Config, checked, is_number
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Factors, all_misshaped
from shardmerge.adapters.methods.factored import Factored
from shardmerge.errors import FormatError
from shardmerge.spec.tensors import RowRange, TensorRef
from shardmerge.spec.updates import Settings, Update

_VECTOR = re.compile(r"(?:base_model\.)?(?:model\.)?tinylora_v(?:\.[^.]+)?\.(?P<group>\d{1,9})")
#: Modules times groups; only a hostile file has more.
_MOST = 1 << 22


@dataclass(frozen=True, slots=True)
class TinyLoraSettings(Settings):
    """u, the seed, and the numbers of modules and groups."""

    numbers: int
    seed: int
    modules: int = 0
    groups: int = 0


class TinyLora(Factored, PeftFamily):
    name = "tinylora"
    sides = ("B", "A")
    by_rows = frozenset({"B"})
    rows_are_independent = True
    adds = True
    peft_type = "TINYLORA"
    selectors = frozenset({"layers_to_transform", "layers_pattern"})
    title = "TinyLoRA"
    updates = "matrices"
    paper = "arXiv:2602.04118"
    roles = {"tinylora_A": "A", "tinylora_B": "B", "tinylora_P": "P?"}
    settings = {
        "r": RANK,
        "u": RANK,
        "weight_tying": checked(lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
        "projection_seed": checked(
            lambda value: type(value) is int and abs(value) < 1 << 62, "a whole number of 62 bits", required=True
        ),
    }
    inert = frozenset({"init_v_bound", "init_weights", "save_projection", "tinylora_dropout"})

    def _shared_role(self, name: str) -> str | None:
        match = _VECTOR.fullmatch(name)
        return f"v{int(match['group'])}" if match else None

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        factors = module.factors
        if "P" not in factors:
            missing = module.key("tinylora_P")
            claims.half(factors["A"], f"{missing}; save it again with save_projection: true", module.refs)
            return
        settings = TinyLoraSettings(context.config["u"], context.config["projection_seed"])
        claims.updates.append(self.update(module, context, settings=settings))

    def claim_rest(self, claims: Claims, tensors: Mapping[str, TensorRef], config: Config) -> None:
        """Give every update the vectors that may be its own, now that the number of modules is known."""
        vectors = {role: ref for name, ref in tensors.items() if (role := self._shared_role(name))}
        claims.account_for(vectors.values())
        count = len(claims.updates)
        groups = max(1, round(count * (1 - (config.get("weight_tying") or 0))))
        wanted, problem = [f"v{group}" for group in range(min(groups, count))], ""
        if missing := [role for role in wanted if role not in vectors]:
            problem = f"base_model.tinylora_v.{missing[0][1:]}, which modules share, is missing"
        elif count * groups > _MOST:
            problem = f"{count} modules of {groups} groups are more than this version looks through"
        if problem:
            claims.problems.append(problem)
            claims.updates = [update.changed(fits=False) for update in claims.updates]
        else:
            shared = tuple((role, vectors[role]) for role in wanted)
            claims.updates = [
                update.changed(
                    factors=(*update.factors, *shared),
                    settings=replace(TinyLoraSettings.of(update), modules=count, groups=groups),
                )
                for update in claims.updates
            ]
        super().claim_rest(claims, tensors, config)

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        rank, numbers = min(update.rank, *shape), TinyLoraSettings.of(update).numbers
        expected: dict[str, tuple[int, ...]] = {role: (numbers,) for role, _ in update.factors}
        expected |= {"A": (rank, shape[1]), "B": (shape[0], rank), "P": (numbers, rank, rank)}
        return all_misshaped(update, expected, "by r, u and the weight's shape")

    def left(self, factors: Factors, update: Update, rows: RowRange) -> Tensor:
        mixture = factors.kept("mixture", lambda: _mixture(factors, update))
        return factors.rows("B", rows) @ mixture

    def right(self, factors: Factors, update: Update) -> Tensor:
        return factors.whole("A")

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        numbers, rank, _ = update.factor("P").shape
        return super().kept_bytes(update, itemsize) + (2 * numbers + 1) * rank * rank * max(itemsize, 4)


def _mixture(factors: Factors, update: Update) -> Tensor:
    """R, (r, r)."""
    projections = factors.whole("P")
    vector = factors.whole(f"v{_group(projections, update)}")
    return torch.einsum("i,ijk->jk", vector, projections)


def _group(projections: Tensor, update: Update) -> int:
    """The group of the module, by the seed that its P was drawn from."""
    of = TinyLoraSettings.of(update)
    modules, groups = of.modules, of.groups
    if groups == 1:
        return 0
    dtypes = (torch.float32, torch.bfloat16, torch.float16)  # beside a 16-bit base P has been rounded
    for index in range(modules):
        generator = torch.Generator().manual_seed(of.seed + index)
        drawn = torch.normal(0.0, 1.0 / projections.shape[1] ** 0.5, tuple(projections.shape), generator=generator)
        if any(torch.equal(drawn.to(dtype).to(projections.dtype), projections.cpu()) for dtype in dtypes):
            return int(min(index // max(1, modules // groups), groups - 1))
    ref = update.factor("P")
    raise FormatError(
        f"{ref.uri}: {ref.name} was not drawn from projection_seed {of.seed} for any of {modules} "
        "modules, so which of the shared vectors is this module's is unknown"
    )
