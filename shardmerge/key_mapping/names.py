"""The names of one checkpoint: where a parameter is stored, what is tied, in which order a model has its layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property

from shardmerge.key_mapping import order
from shardmerge.key_mapping import table as tables
from shardmerge.key_mapping import ties as tying
from shardmerge.key_mapping.naming import numberless
from shardmerge.key_mapping.resolver import LEGACY, Resolver
from shardmerge.key_mapping.rules import Rules
from shardmerge.spec.updates import ModuleOrder, Parameter


class Names(Resolver):
    """Everything that follows from a checkpoint's config.json and the names and shapes of its tensors."""

    @property
    def knows_ties(self) -> bool:
        """Whether the table says which weights are tied. It does not for a model with code of its own."""
        if self._architecture is None:
            return False
        named = self.config.get("architectures")
        is_named = isinstance(named, list) and self._architecture.name in named[:1]
        return is_named or "auto_map" not in self.config

    @cached_property
    def ties(self) -> tuple[tying.Tie, ...]:
        """Weights that are one in memory, of which one at least is stored.

        A weight that is not stored has the name that it would have beside the one that is, in this checkpoint's style.
        """
        if not self.knows_ties:
            return tuple(tying.guessed(self.config, self.stored))
        groups = self._tied_in_memory
        found = (tying.tie_of(source, groups[source], self._stored_whole, self._style) for source in sorted(groups))
        return tuple(tie for tie in found if tie)

    @cached_property
    def tied_in_parts(self) -> frozenset[str]:
        """Names in memory of tied weights that the checkpoint does not store as one tensor, or not by themselves."""
        names = (name for source, targets in self._tied_in_memory.items() for name in (source, *targets))
        return frozenset(name for name in names if not self._stored_whole(name) and self._resolved(name) != "")

    @cached_property
    def _tied_in_memory(self) -> Mapping[str, list[str]]:
        pairs: dict[str, str] = {}
        for part in self._tying_parts:
            prefix = f"{part.path}." if part.path else ""
            declared = {prefix + target: prefix + source for target, source in part.architecture.tied.items()}
            pairs |= dict(tying.expanded(declared, self._numbers if any("#" in name for name in declared) else {}))
        return tying.grouped(pairs)

    @cached_property
    def tied(self) -> Mapping[str, str]:
        """`ties` by name: every other name of a weight → the one that is stored."""
        return dict(sorted((other, tie.main) for tie in self.ties for other in tie.others))

    @cached_property
    def tied_by_name(self) -> Mapping[str, str]:
        """Other names of weights, in the checkpoint and in memory → those in the checkpoint."""
        return {
            **{name: name for name in self.tied},
            **{in_memory: name for tie in self.ties for in_memory, name in tie.in_memory},
        }

    @cached_property
    def across(self) -> frozenset[str]:
        """Names in memory, # for numbers, of weights that are tied across layers; the table does not say how many."""
        prefixes = {part.path: f"{part.path}." if part.path else "" for part in self._tying_parts}
        return frozenset(prefixes[part.path] + name for part in self._tying_parts for name in part.architecture.across)

    def is_tied_across(self, stored: str) -> bool:
        """Whether a stored tensor is one of the weights in `across`."""
        return bool(self.across) and not self.across.isdisjoint(map(numberless, self._in_memory(stored)))

    @property
    def _tying_parts(self) -> Iterator[tables.Part]:
        return (part for part in self.parts if tables.ties(part))

    @cached_property
    def _numbers(self) -> Mapping[str, Collection[tuple[str, ...]]]:
        return tying.numbers_of(name for stored in self.stored for name in self._in_memory(stored))

    def _in_memory(self, stored: str) -> Iterator[str]:
        """The names that a stored tensor can have in memory."""
        image = self._images.of(stored)
        for name in image.targets or (image.name,):
            yield name
            yield from self._with_other_prefix(name)

    def _resolved(self, name: str) -> Parameter | str:
        module, _, parameter = name.rpartition(".")
        return self.resolve(module, parameter)

    def _stored_whole(self, name: str) -> str | None:
        """The stored tensor that is all of a parameter, and nothing else."""
        found = self._resolved(name)
        if not isinstance(found, Parameter) or len(found.regions) != 1:
            return None
        tensor = found.regions[0].tensor
        return tensor if math.prod(self.stored[tensor]) == math.prod(found.shape) else None

    def _style(self, name: str, stored: str) -> Callable[[str], str]:
        """The renaming from names in memory to this checkpoint's names, by the example of one."""
        rules = Rules(self._rules.rules[: -len(tables.table().rules[LEGACY])])
        renamings: tuple[Callable[[str], str], ...] = (
            lambda name: name,
            lambda name: rules.backward(name, with_prefixes=False),
            lambda name: rules.backward(name, with_prefixes=True),
        )
        for rename in renamings:
            if rename(name) == stored:
                return rename
        for prefix in self._prefixes:
            for rename in renamings:
                if rename(name).removeprefix(f"{prefix}.") == stored:
                    return lambda name, rename=rename, prefix=prefix: rename(name).removeprefix(f"{prefix}.")  # type: ignore[misc]
        return renamings[0]

    def is_linear(self, stored: str) -> bool | None:
        """Whether a stored tensor is the weight of a Linear layer; None where the model's class is not known."""
        classes = {part.path: part.architecture.name for part in self.parts}
        tree = order.tree_of(classes.get("", ""))
        if tree is None:
            return None
        part: order.Part = {path: order.tree_of(name) for path, name in classes.items() if path}.get
        return any(
            name.endswith(".weight") and order.has(tree, name.removesuffix(".weight"), part)
            for name in self._in_memory(stored)
        )

    def is_output(self, stored: str) -> bool:
        """Whether a stored tensor is the weight of the model's output head."""
        found = ((part.path, part.architecture.output) for part in self.parts)
        heads = {f"{path}.{output}".lstrip(".") for path, output in found if output}
        return any(name.removesuffix(".weight") in heads for name in self._in_memory(stored))

    def module_order(self) -> ModuleOrder | str:
        """The Linear layers in the order in which transformers registers them; a string says why it is not known."""
        classes = {part.path: part.architecture.name for part in self.parts}
        return order.module_order(classes, self._index.in_memory(), self.resolve, self._with_other_prefix)
