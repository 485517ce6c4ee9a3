"""``base_rounding``: which weights QLoRA rounded to NF4 in training, and the update that does so before all others.

bitsandbytes quantises the Linear layers of a model but for its output head, what is tied to another weight, and what
transformers keeps in float32. Embeddings, norms, convolutions and experts in one tensor stay as they are. Weights
without an update stay, too: training saw them rounded, but as they are they are more exact.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from shardmerge.adapters.methods.base import Effect
from shardmerge.adapters.methods.nf4_rounding import Nf4Rounding, RoundingSettings
from shardmerge.adapters.registry import FAMILIES
from shardmerge.config.schema import MergeConfig
from shardmerge.file_formats.checkpoint import Checkpoint
from shardmerge.key_mapping.names import Names
from shardmerge.planning.several import list_some
from shardmerge.spec.tensors import FLOAT_DTYPES, TensorRef
from shardmerge.spec.updates import Region, Update

#: Names of modules, or the ends of them, that transformers never quantises, as they are kept in float32: of T5 and its
#: relatives, of BLIP-2, and of the indexers of sparse attention.
_KEPT_IN_FLOAT32 = (".wo", ".qformer.", ".indexer.weights_proj", ".scorer.weights_proj", ".compressor.")
#: An adapter names an expert's module where that was a Linear layer, as it was before transformers 5.
_EXPERT = re.compile(r"\.experts\.\d+\.")
_LISTED = 3


class BaseRounding:
    """What ``base_rounding`` comes to for one merge: ``updates`` with another before those of some weights."""

    def __init__(
        self, checkpoint: Checkpoint, names: Names, updates: Mapping[str, Sequence[Update]], config: MergeConfig
    ) -> None:
        self.updates: Mapping[str, Sequence[Update]] = updates
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._checkpoint, self._names, self._kind = checkpoint, names, config.base_rounding
        if config.base_rounding != "none":
            self.problems = list_some([*self._unfit(config), *self._decide()])

    def _unfit(self, config: MergeConfig) -> Iterator[str]:
        if config.compute.dtype == "bfloat16":
            yield f"base_rounding: {self._kind} is computed in float32; compute.dtype bfloat16 cannot be used with it"

    def _decide(self) -> Iterator[str]:
        """Add the updates; what stands against it."""
        rounded: dict[str, Sequence[Update]] = {}
        others: list[str] = []
        for name, of in self.updates.items():
            first = next((update for update in of if FAMILIES[update.family].computes), None)
            if first is None or any(FAMILIES[update.family].effect is Effect.REPLACES for update in of):
                continue  # nothing is added to what training had quantised
            weight = self._checkpoint.weights.get(name)
            if weight is None or not self._is_quantised_in_training(name, weight.tensor, first.module):
                others.append(name)
            elif weight.stored_as is not None or weight.tensor.dtype not in FLOAT_DTYPES:
                stored = weight.stored_as.codec if weight.stored_as else weight.tensor.dtype
                yield (
                    f"base_rounding: {self._kind} is for a base of 16 or 32 bits, but {name} is stored as {stored}; "
                    "remove it: such a base is already what training computed with"
                )
            elif any(update.region != Region(name, weight.tensor.shape[0]) for update in of):
                yield (
                    f"base_rounding: {self._kind} cannot be used: {name} is not stored as the matrix that training had "
                    "quantised by itself, but transposed, or with others in one tensor"
                )
            else:
                rounded[name] = self._with_rounding(of, first, weight.tensor)
        yield from self._explain(rounded, others)

    def _explain(self, rounded: Mapping[str, Sequence[Update]], others: Sequence[str]) -> Iterator[str]:
        shown = f": {', '.join(others[:_LISTED])}{' …' if len(others) > _LISTED else ''}" if others else ""
        if self._names.is_linear("") is None:
            yield (
                f"base_rounding: {self._kind} cannot be used: the base's config.json names no architecture that is "
                "known here, so which of its modules are Linear layers is not known"
            )
        elif not rounded:
            yield f"base_rounding: {self._kind} has no effect: no update is of a weight that QLoRA quantises{shown}"
        self.updates = {**self.updates, **rounded}
        text = f"base_rounding: {self._kind} rounds {len(rounded):,} weights through NF4 before they are updated"
        if others:
            text += f"; {len(others):,} updated tensors stay as they are, as QLoRA does not quantise them{shown}"
        self.notes.append(f"{text}. It is right if training had no llm_int8_skip_modules among them")

    def _is_quantised_in_training(self, name: str, stored: TensorRef, updated: str) -> bool:
        """Whether training quantised a stored weight, which an adapter has ``updated`` as the module of that name."""
        module = name.removesuffix(".weight")
        if len(stored.shape) != 2 or module == name or any(part in f".{module}." for part in _KEPT_IN_FLOAT32):
            return False
        is_tied = name in self._names.tied or name in self._names.tied.values()
        is_linear = bool(self._names.is_linear(name) or _EXPERT.search(updated))
        return is_linear and not is_tied and not self._names.is_output(name)

    def _with_rounding(self, of: Sequence[Update], first: Update, stored: TensorRef) -> list[Update]:
        rounding = Update(
            adapter=first.adapter,
            family=Nf4Rounding.name,
            module=first.module,
            target=stored.name,
            factors=(),
            scaling=1.0,
            rank=0,
            shape=stored.shape,
            region=Region(stored.name, stored.shape[0]),
            parameter=first.parameter,
            settings=RoundingSettings(self._kind == "nf4", stored.dtype),
        )
        compared = [update for update in of if FAMILIES[update.family].effect is Effect.COMPARES]
        return [*compared, rounding, *(update for update in of if update not in compared)]
