"""VeRA: W' = W + (λb ∘ B) (λd ∘ A), A and B random and the same for all modules, λb and λd trained.

W is (out, in), λb (out), λd (r). A is (r, in*) and B (out*, r), of the largest sizes that any module has; of them a
module takes A[:, :in] and B[:out]. The file has them as ``base_model.vera_A`` and ``vera_B``, or with
``save_projection`` false not at all. Then they are drawn again from the seed, as PEFT does: in float32 on the CPU, A
first, each number evenly from ±√6 / √n, n being in* for A and r for B; and then rounded to the dtypes of the modules'
weights, as they were in training.
Kopiczko et al. 2023, arXiv:2310.11454. Source: peft/tuners/vera/layer.py and model.py, 0.21.
The bits are those of PEFT's merge.

The sizes in* and out*, and with them all numbers, depend on the whole set of modules: it is taken from the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from shardmerge.adapters.claims import Claims, ModuleUpdate, shown
from shardmerge.adapters.formats.checks import FLAG, OPTIONAL_SEED, RANK
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Factors, Family, all_misshaped, misshaped
from shardmerge.adapters.methods.factored import Factored
from shardmerge.spec.tensors import DTYPE_NAMES, RowRange, TensorRef
from shardmerge.spec.updates import Settings, Update


@dataclass(frozen=True, slots=True)
class ProjectionSettings(Settings):
    """The seed of A and B, out* and in*, and the dtypes of the modules' weights that they were rounded to."""

    seed: int
    sizes: tuple[int, int] = (0, 0)
    dtypes: tuple[str, ...] = ()


class Vera(Factored, PeftFamily):
    name = "vera"
    sides = ("lambda_b", "")
    by_rows = frozenset({"lambda_b", "B"})
    neutral_if_zero = frozenset({"lambda_b"})
    rows_are_independent = True
    adds = True
    peft_type = "VERA"
    selectors = frozenset({"layers_to_transform", "layers_pattern"})
    title = "VeRA"
    updates = "matrices"
    paper = "arXiv:2310.11454"
    roles = {"vera_lambda_b": "lambda_b", "vera_lambda_d": "lambda_d"}
    shared_roles = {"vera_A": "A", "vera_B": "B"}
    settings = {"r": RANK, "save_projection": FLAG, "projection_prng_key": OPTIONAL_SEED, "fan_in_fan_out": FLAG}
    inert = frozenset({"d_initial", "init_weights", "vera_dropout"})

    def claim(self, tensors: Mapping[str, TensorRef], context: Context) -> Claims:
        claims = super().claim(tensors, context)
        return sized(sized(claims, VeraSeeded(), context), self, context)

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        found, rank = module.factors, context.config["r"]
        projections = shared_projections(claims, module, context, "vera_A", "vera_B")
        if projections is None:
            return
        factors = (*found.items(), *projections.items())
        family = self.name if projections else VeraSeeded.name
        settings = ProjectionSettings(context.config.get("projection_prng_key") or 0)
        claims.updates.append(self.update(module, context, family=family, factors=factors, settings=settings))
        b, d = found["lambda_b"], found["lambda_d"]
        if len(b.shape) != 1 or d.shape != (rank,):
            claims.misfit(f"{shown(b, d)}: expected (out) and (r) with r = {rank}, as adapter_config.json says")

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        problems = misshaped(update.factor("lambda_b"), (shape[0],), f"a number for every output of {update.module}")
        if problems or not update.has("A"):
            return problems
        sizes = ProjectionSettings.of(update).sizes
        rows, columns = sizes if any(sizes) else shape
        expected = {"A": (update.rank, columns), "B": (rows, update.rank)}
        return all_misshaped(update, expected, "as large as the largest module")

    def left(self, factors: Factors, update: Update, rows: RowRange) -> Tensor:
        return factors.rows("lambda_b", rows).unsqueeze(1) * self.outputs(factors, update, rows)

    def right(self, factors: Factors, update: Update) -> Tensor:
        return factors.whole("lambda_d").unsqueeze(1) * self.inputs(factors, update)[:, : update.columns]

    def inputs(self, factors: Factors, update: Update) -> Tensor:
        """A."""
        return factors.whole("A")

    def outputs(self, factors: Factors, update: Update, rows: RowRange) -> Tensor:
        """Rows of B."""
        return factors.rows("B", rows)


class VeraSeeded(Vera):
    """The same with A and B drawn from the seed."""

    name = "vera-seeded"
    rows_are_independent = False

    def inputs(self, factors: Factors, update: Update) -> Tensor:
        _, columns = ProjectionSettings.of(update).sizes
        return self._drawn(factors, update)[: update.rank * columns].view(update.rank, columns)

    def outputs(self, factors: Factors, update: Update, rows: RowRange) -> Tensor:
        _, columns = ProjectionSettings.of(update).sizes
        return self._drawn(factors, update)[update.rank * columns :].view(-1, update.rank)[rows.start : rows.stop]

    def _drawn(self, factors: Factors, update: Update) -> Tensor:
        """A, then B."""
        return factors.kept("projections", lambda: _draw(update).to(factors.rows("lambda_b", RowRange(0, 1))))

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        # In the compute dtype, in float32, and once more while they are rounded.
        numbers = update.rank * sum(ProjectionSettings.of(update).sizes)
        return super().kept_bytes(update, itemsize) + numbers * (itemsize + 8)


def _draw(update: Update) -> Tensor:
    rank, (rows, columns) = update.rank, ProjectionSettings.of(update).sizes
    generator = torch.Generator().manual_seed(ProjectionSettings.of(update).seed)
    numbers = torch.empty(rank * (columns + rows), dtype=torch.float32)
    for part, inputs in ((numbers[: rank * columns], columns), (numbers[rank * columns :], rank)):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(inputs))
        part.uniform_(-bound, bound, generator=generator)
    return rounded(numbers, update)


def rounded(numbers: Tensor, update: Update) -> Tensor:
    """Numbers rounded to the dtypes of the modules' weights, one after the other."""
    for name in ProjectionSettings.of(update).dtypes:
        numbers = numbers.to(getattr(torch, DTYPE_NAMES[name])).to(numbers.dtype)
    return numbers


def shared_projections(claims: Claims, module: Module, context: Context, *names: str) -> dict[str, TensorRef] | None:
    """A and B of the file, the module's own copies or those of all modules; empty where a seed makes them.

    None if one is missing, which is reported once.
    """
    roles, there = dict(zip(("A", "B"), names, strict=True)), {**context.shared, **module.factors}
    found = {role: there[role] for role in roles if role in there}
    wanted = context.config.get("save_projection") is not False
    if len(found) == len(roles) or not (wanted or found):
        return found
    missing = " and ".join(f"base_model.{name}" for role, name in roles.items() if role not in found)
    why = "save_projection in adapter_config.json says that it is there" if wanted else "its other half is there"
    problem = f"{missing} is missing, but {why}"
    if problem not in claims.problems:
        claims.problems.append(problem)
    claims.account_for(there.values())
    return None


def sized(claims: Claims, family: Family, context: Context) -> Claims:
    """The claims, with the largest out and in and the dtypes of a family's weights in its settings."""
    rows, columns = 0, 0
    dtypes: dict[str, None] = {}
    for update in claims.updates:
        is_meant = update.family == family.name and update.fits
        stored = context.base.stored(update.module, "weight") if is_meant else None
        if stored is None or len(stored[0].shape) != 2:
            continue  # what is not a matrix of the base, the match reports
        oriented = family.orient(update, stored[0])
        shape = stored[0].shape if isinstance(oriented, str) else oriented.orientation.shape(stored[0].shape)
        rows, columns = max(rows, shape[0]), max(columns, shape[1])
        if stored[1] in DTYPE_NAMES and stored[1] != "F32":
            dtypes[stored[1]] = None
    for index, update in enumerate(claims.updates):
        if update.family == family.name:
            settings = replace(ProjectionSettings.of(update), sizes=(rows, columns), dtypes=tuple(dtypes))
            claims.updates[index] = update.changed(settings=settings)
    return claims
