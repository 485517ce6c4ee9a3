"""Uni-LoRA without ``save_indices``: the file has θ alone, and all else follows from a seed and the model.

Let the modules that the config targets be in the order in which their model registers them, D the number of all
elements of their factors and d the length of θ. A list of D indices has each of 0, …, d − 1 ⌊D / d⌋ times, and D mod d
of them, drawn, once more; it is shuffled, and dealt to A (r, in) and B (out, r) of one module after the other. An
element's scale is 1 / √n, n being how often its index is in the list, rounded to the dtype of the module's weight.
Source: peft/tuners/unilora/model.py, 0.21. It draws and shuffles with numpy's default generator, and so do we.

A wrong order would give other numbers everywhere, and nothing in the file would show it. So it must be known: of which
class the model was that was trained, and of every targeted module where it stands. Otherwise the adapter is refused.
The bits are those of PEFT's merge. The whole list is in memory, and stays for the next weight.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from shardmerge.adapters.claims import ModuleUpdate
from shardmerge.adapters.formats.checks import Config
from shardmerge.adapters.formats.peft_method import Context
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Factors, misshaped
from shardmerge.adapters.methods.factored import Factored
from shardmerge.spec.tensors import DTYPE_NAMES, RowRange, TensorRef
from shardmerge.spec.updates import Settings, Update

_SAVE = "load it with PEFT, set save_indices in the adapter's config, and save it again"
#: What the names of the classes end in that PEFT's task types are for.
_CLASSES: Mapping[str, tuple[str, ...]] = {
    "CAUSAL_LM": ("ForCausalLM", "LMHeadModel"),
    "SEQ_2_SEQ_LM": ("ForConditionalGeneration",),
    "SEQ_CLS": ("ForSequenceClassification",),
    "TOKEN_CLS": ("ForTokenClassification",),
    "QUESTION_ANS": ("ForQuestionAnswering",),
    "FEATURE_EXTRACTION": ("Model",),
}


@dataclass(frozen=True, slots=True)
class UniLoraSeededSettings(Settings):
    """Where a module's indices begin in the list, the dtype of its weight, D, d, and the seed."""

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

    def inner(self, update: Update) -> int:
        return update.rank

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        # While the list is made there are two of 64 bits and one of 32; of A's and some rows of B's indices, 64 bits.
        of, dealt = UniLoraSeededSettings.of(update), update.rank * (update.columns + update.rows)
        return super().kept_bytes(update, itemsize) + 20 * of.count + 24 * of.length + dealt * (8 + 2 * itemsize)


def _numbers(factors: Factors, update: Update, start: int, stop: int) -> Tensor:
    """The elements that the list's indices from ``start`` on make: θ's numbers, scaled."""
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


def deal(theta: TensorRef, context: Context, covers: Callable[[str], bool]) -> list[ModuleUpdate] | str:
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
    """Why the model that was trained may be of another class than the base."""
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
