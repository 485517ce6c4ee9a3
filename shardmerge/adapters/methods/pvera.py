"""PVeRA: W' = W + (λ_b ∘ B) (λ_d ∘ A), the mean of a distribution over VeRA's update.

W is (out, in). A and B are random and shared by all modules: of B, (out_max, r), a module takes the first ``out``
rows; A is (2 r, in_max), of which the first r rows and ``in`` columns make the mean and the others the variance. λ_b
(out) scales rows, the first r of λ_d (2 r) the rows of A. Leygue et al. 2025, arXiv:2512.07703. Source:
peft/tuners/pvera/layer.py, 0.21.

The bits are those of PEFT's merge, for every dtype of the base.
"""

from __future__ import annotations

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.checks import RANK
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily
from shardmerge.adapters.lazy_torch import Tensor
from shardmerge.adapters.methods.base import Factors, misshaped
from shardmerge.adapters.methods.factored import Factored
from shardmerge.spec.tensors import RowRange
from shardmerge.spec.updates import Update


class Pvera(Factored, PeftFamily):
    name = "pvera"
    sides = ("lambda_b", "")
    by_rows = frozenset({"B", "lambda_b"})
    rows_are_independent = True
    neutral_if_zero = frozenset({"lambda_b"})
    adds = True
    peft_type = "PVERA"
    selectors = frozenset({"layers_to_transform", "layers_pattern"})
    title = "PVeRA"
    updates = "Linear layers"
    paper = "arXiv:2512.07703"
    roles = {"pvera_lambda_b": "lambda_b", "pvera_lambda_d": "lambda_d"}
    shared_roles = {"pvera_A": "A", "pvera_B": "B"}
    settings = {"r": RANK}
    inert = frozenset(
        {"d_initial", "generator_seed", "init_weights", "projection_prng_key", "pvera_dropout", "save_projection"}
    )
    refused = {
        "sample_at_inference": "it draws its weights at random for every input, which no weight is equal to; set it to "
        "false in adapter_config.json to merge the mean, as PEFT does"
    }

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        missing = [key for key, role in self.shared_roles.items() if role not in context.shared]
        if missing:
            what = f"base_model.{missing[0]}, which all modules share; save it again with save_projection: true"
            claims.half(module.factors["lambda_b"], what, module.refs)
            return
        factors = (*module.factors.items(), ("A", context.shared["A"]), ("B", context.shared["B"]))
        claims.updates.append(self.update(module, context, factors=factors))

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        rank, a, b = update.rank, update.factor("A"), update.factor("B")
        problems = [
            *misshaped(update.factor("lambda_b"), (shape[0],), f"a number for every output of {update.module}"),
            *misshaped(update.factor("lambda_d"), (2 * rank,), "twice the config's r"),
        ]
        if len(a.shape) != 2 or a.shape[0] != 2 * rank or a.shape[1] < shape[1]:
            problems.append(f"{a.name} is {list(a.shape)}; expected (2 · {rank}, {shape[1]} or more)")
        if len(b.shape) != 2 or b.shape[1] != rank or b.shape[0] < shape[0]:
            problems.append(f"{b.name} is {list(b.shape)}; expected ({shape[0]} or more, {rank})")
        return problems

    def left(self, factors: Factors, update: Update, rows: RowRange) -> Tensor:
        return factors.rows("lambda_b", rows).unsqueeze(1) * factors.rows("B", rows)

    def right(self, factors: Factors, update: Update) -> Tensor:
        a = factors.whole("A")[: update.rank, : update.columns]
        return factors.whole("lambda_d")[: update.rank].unsqueeze(1) * a
