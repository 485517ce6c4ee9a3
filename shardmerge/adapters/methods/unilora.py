"""Uni-LoRA: W' = W + B A, whose every element is one of a few numbers: A = θ[I_A] ∘ S_A and B = θ[I_B] ∘ S_B.

W is (out, in). θ, (d), is shared by all modules; I_A (r, in) and I_B (out, r) are the numbers of its elements, S_A
and S_B their scales. Li et al. 2025, arXiv:2506.00799. Source: peft/tuners/unilora/layer.py and model.py, 0.21.

The bits are those of PEFT's merge, for every dtype of the base.

Without ``save_indices`` the file has θ alone, and all else follows from a seed and the model. Let the modules that the
config targets be in the order in which their model registers them, D the number of all elements of their factors and d
the length of θ. A list of D indices has each of 0, …, d − 1 ⌊D / d⌋ times, and D mod d of them, drawn, once more; it is
shuffled, and dealt to A (r, in) and B (out, r) of one module after the other. An element's scale is 1 / √n, n being how
often its index is in the list, rounded to the dtype of the module's weight. PEFT draws and shuffles with numpy's
default generator, and so do we.

A wrong order would give other numbers everywhere, and nothing in the file would show it. So it must be known: of which
class the model was that was trained, and of every targeted module where it stands. Otherwise the adapter is refused.
The whole list is in memory, and stays for the next weight.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.checks import FLAG, RANK, Config, checked
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Factors, all_misshaped, check_indices, misshaped
from shardmerge.adapters.methods.factored import Factored
from shardmerge.spec.tensors import DTYPE_NAMES, RowRange, TensorRef
from shardmerge.spec.updates import Settings, Update

_SAVE = "load it with PEFT, set save_indices in the adapter's config, and save it again"
#: PEFT's task types → the ends of the names of their classes.
_CLASSES: Mapping[str, tuple[str, ...]] = {
    "CAUSAL_LM": ("ForCausalLM", "LMHeadModel"),
    "SEQ_2_SEQ_LM": ("ForConditionalGeneration",),
    "SEQ_CLS": ("ForSequenceClassification",),
    "TOKEN_CLS": ("ForTokenClassification",),
    "QUESTION_ANS": ("ForQuestionAnswering",),
    "FEATURE_EXTRACTION": ("Model",),
}


@dataclass(frozen=True, slots=True)
class UniLoraSettings(Settings):
    """d, θ's length by the config."""

    length: int


class UniLora(Factored, PeftFamily):
    name = "unilora"
    sides = ("indices_B", "indices_A")
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
        dealt = _deal(theta, context, lambda module: not self.left_out(module, context))
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


# --- without indices --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UniLoraSeededSettings(Settings):
    """The first of a module's indices in the list, the dtype of its weight, D, d, and the seed."""

    first: int
    dtype: str
    count: int
    length: int
    seed: int


class UniLoraSeeded(Factored):
    """Uni-LoRA whose indices and scales are drawn again."""

    name = "unilora-seeded"
    neutral_if_zero = frozenset({"theta"})
    adds = True

    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        length = UniLoraSeededSettings.of(update).length
        return misshaped(update.factor("theta"), (length,), "theta_d_length in adapter_config.json")

    def left(self, factors: Factors, update: Update, rows: RowRange) -> Tensor:
        first = UniLoraSeededSettings.of(update).first + update.rank * update.columns
        start, stop = (first + row * update.rank for row in (rows.start, rows.stop))
        return _numbers(factors, update, start, stop).view(len(rows), update.rank)

    def right(self, factors: Factors, update: Update) -> Tensor:
        first = UniLoraSeededSettings.of(update).first
        return _numbers(factors, update, first, first + update.rank * update.columns).view(update.rank, update.columns)

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        # The list, twice in 64 bits and once in 32 while it is made; indices of A and some rows of B, in 64 bits.
        of, dealt = UniLoraSeededSettings.of(update), update.rank * (update.columns + update.rows)
        return super().kept_bytes(update, itemsize) + 20 * of.count + 24 * of.length + dealt * (8 + 2 * itemsize)


def _numbers(factors: Factors, update: Update, start: int, stop: int) -> Tensor:
    """The elements by some of the list's indices: θ's numbers, scaled."""
    of = UniLoraSeededSettings.of(update)
    indices, scales = _list(of.count, of.length, of.seed)
    theta, part = factors.whole("theta"), indices[start:stop].long()
    scaled = scales[part].to(getattr(torch, DTYPE_NAMES[of.dtype]))
    return theta[part.to(theta.device)] * scaled.to(theta)


@lru_cache(maxsize=1)
def _list(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """The indices, (D), and every index's scale, (d)."""
    import numpy

    generator = numpy.random.default_rng(seed)
    dealt = numpy.repeat(numpy.arange(length), count // length)
    if more := count % length:
        dealt = numpy.concatenate([dealt, generator.choice(length, size=more, replace=False)])
    generator.shuffle(dealt)
    indices = torch.from_numpy(dealt)
    times = torch.bincount(indices, minlength=length)
    scales = torch.zeros(length)
    scales[times > 0] = times[times > 0].float().rsqrt()
    return indices.int(), scales


def _deal(theta: TensorRef, context: Context, covers: Callable[[str], bool]) -> list[ModuleUpdate] | str:
    """The updates of all modules that the config targets; a string says why they cannot be known."""
    config, order = context.config, context.base.ordered()
    if config.get("target_modules") in (None, "all-linear"):
        return f"adapter_config.json does not say by their names which modules share it; {_SAVE}"
    if isinstance(order, str):
        return f"save_indices is not true, so what goes where follows from the order of the modules: {order}; {_SAVE}"
    if problem := _other_class(config, order.architecture):
        return f"{problem}, so which modules it had in which order is not known; {_SAVE}"
    if unknown := [module for module in (*order.others, *order.absent) if covers(module)]:
        return f"target_modules cover {unknown[0]}, whose place among {order.architecture}'s is not known; {_SAVE}"
    if importlib.util.find_spec("numpy") is None:
        return "its indices were drawn by numpy, which is not installed: pip install numpy"
    return _dealt(theta, context, [module for module in order.modules if covers(module)])


def _other_class(config: Config, architecture: str) -> str | None:
    """Why the trained model may be of another class than the base; None if it is not."""
    mapping, task = config.get("auto_mapping"), config.get("task_type")
    named = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    if named is not None:
        return None if named == architecture else f"it was trained on {str(named)[:80]}, and the base is {architecture}"
    if not isinstance(task, str):
        return "adapter_config.json has neither auto_mapping nor task_type"
    if architecture.endswith(_CLASSES.get(task, ())):
        return None
    return f"its task_type is {task[:80]}, and the base {architecture}"


def _dealt(theta: TensorRef, context: Context, modules: list[str]) -> list[ModuleUpdate]:
    config, rank = context.config, context.config["r"]
    first, starts = 0, []
    for module in modules:
        weight = context.base.stored(module, "weight")
        if weight is None:
            raise AssertionError(f"{module} is in the order of the base's modules, but not in the base")
        starts.append((module, first, weight[1]))
        first += rank * sum(weight[0].shape)
    factors, shared = (("theta", theta),), (first, config["theta_d_length"], config.get("proj_seed", 42))
    return [
        ModuleUpdate(
            *(module, "weight", UniLoraSeeded.name, factors),
            rank=rank,
            settings=UniLoraSeededSettings(start, dtype, *shared),
        )
        for module, start, dtype in starts
    ]
