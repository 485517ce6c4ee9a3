"""Uni-LoRA: W' = W + B A, whose every element is one of a few numbers: A = θ[I_A] ∘ S_A and B = θ[I_B] ∘ S_B.

W is (out, in). θ, (d), is shared by all modules; I_A (r, in) and I_B (out, r) are the numbers of its elements, S_A
and S_B their scales. Li et al. 2025, arXiv:2506.00799. Source: peft/tuners/unilora/layer.py and model.py, 0.21.

Without ``save_indices`` I and S are not in the file, and are drawn again: see `adapters.methods.unilora_seeded`.
The bits are those of PEFT's merge, for every dtype of the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.checks import FLAG, RANK, checked
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily
from shardmerge.adapters.lazy_torch import Tensor
from shardmerge.adapters.methods.base import Factors, all_misshaped, check_indices, oriented
from shardmerge.adapters.methods.factored import Factored
from shardmerge.adapters.methods.unilora_seeded import deal
from shardmerge.spec.tensors import RowRange, TensorRef
from shardmerge.spec.updates import Parameter, Settings, Update


@dataclass(frozen=True, slots=True)
class UniLoraSettings(Settings):
    """d, θ's length by the config."""

    length: int


class UniLora(Factored, PeftFamily):
    name = "unilora"
    by_rows = frozenset({"indices_B", "scales_B"})
    whole_numbers = frozenset({"indices_A", "indices_B"})
    rows_are_independent = True
    neutral_if_zero = frozenset({"theta"})
    adds = True
    peft_type = "UNILORA"
    selectors = frozenset({"layers_to_transform", "layers_pattern"})
    title = "Uni-LoRA"
    updates = "Linear layers"
    paper = "arXiv:2506.00799"
    roles = {
        "unilora_indices_A": "indices_A",
        "unilora_indices_B": "indices_B",
        "unilora_scales_A": "scales_A",
        "unilora_scales_B": "scales_B",
    }
    kept_once = ("unilora_theta_d",)
    shared_roles = {"unilora_theta_d": "theta"}
    settings = {
        "r": RANK,
        "theta_d_length": RANK,
        "save_indices": FLAG,
        "proj_seed": checked(lambda value: type(value) is int and 0 <= value < 1 << 64, "a whole number of 64 bits"),
    }
    inert = frozenset({"init_theta_d_bound", "init_weights", "unilora_dropout"})

    def claim(self, tensors: Mapping[str, TensorRef], context: Context) -> Claims:
        claims = super().claim(tensors, context)
        theta = next((ref for name, ref in tensors.items() if self._shared_role(name)), None)
        if claims.refused or context.config.get("save_indices"):
            return claims
        if theta is None:
            claims.problems.append("base_model.unilora_theta_d, which all modules share, is missing")
            return claims
        dealt = deal(theta, context, lambda module: not self.left_out(module, context))
        if isinstance(dealt, str):
            claims.reject([theta], f"{theta.name}: {dealt}")
        else:
            claims.updates += dealt
        return claims

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        if not context.config.get("save_indices"):
            first = min(ref.name for ref in module.refs)
            says = "adapter_config.json does not say save_indices; PEFT would ignore it"
            claims.reject(module.refs, f"{first} is there, but {says}")
            return
        if "theta" not in context.shared:
            what = "base_model.unilora_theta_d, which all modules share"
            claims.half(module.factors["indices_A"], what, module.refs)
            return
        factors = (*module.factors.items(), ("theta", context.shared["theta"]))
        settings = UniLoraSettings(context.config["theta_d_length"])
        claims.updates.append(self.update(module, context, factors=factors, settings=settings))

    def orient(self, update: ModuleUpdate, parameter: Parameter) -> ModuleUpdate | str:
        a, b = update.factor("indices_A"), update.factor("indices_B")
        return oriented(update, parameter, (*b.shape, 0)[0], (0, *a.shape)[-1])

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        a, b, theta = (update.rank, shape[1]), (shape[0], update.rank), (UniLoraSettings.of(update).length,)
        expected = {"indices_A": a, "scales_A": a, "indices_B": b, "scales_B": b, "theta": theta}
        return all_misshaped(update, expected, "by r, theta_d_length and the weight's shape")

    def left(self, factors: Factors, update: Update, rows: RowRange) -> Tensor:
        return _picked(factors, update, factors.rows("indices_B", rows), "indices_B") * factors.rows("scales_B", rows)

    def right(self, factors: Factors, update: Update) -> Tensor:
        return _picked(factors, update, factors.whole("indices_A"), "indices_A") * factors.whole("scales_A")

    def inner(self, update: Update) -> int:
        return 3 * update.rank  # for indices are of eight bytes


def _picked(factors: Factors, update: Update, indices: Tensor, role: str) -> Tensor:
    theta = factors.whole("theta")
    check_indices(update, role, indices, len(theta))
    return theta[indices]
