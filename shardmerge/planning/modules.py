"""An adapter's names for a module → the base's name.

An adapter's names may contain what was around the model in training: wrappers, PEFT's prefix twice, the part of a
pipeline. Each of these may also be a module of the base (GPT-2 has a ``transformer``, some models a ``module``), so a
name is first looked up unchanged. If the base does not have it, all other readings are tried, and those that the base
has must mean the same parameter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from functools import cached_property, lru_cache

from shardmerge.adapters.claims import BaseView, ModuleUpdate
from shardmerge.adapters.formats import parts
from shardmerge.key_mapping.class_names import ModelClasses, NamesOfClass
from shardmerge.key_mapping.names import Names
from shardmerge.key_mapping.naming import module_name, peeled
from shardmerge.planning.tied import tied_parameter
from shardmerge.spec.tensors import TensorRef
from shardmerge.spec.updates import ModuleOrder, Parameter


class Modules:
    """The modules of one base, as one adapter calls them."""

    def __init__(self, names: Names, classes: ModelClasses, stored: Collection[str], prefix: str | None) -> None:
        """``stored`` are the names of the base's tensors, ``prefix`` what chose the adapter's."""
        self._names = names
        self._classes = classes
        self._stored = stored
        self._prefix = module_name(prefix) if prefix else ""
        #: Parts of pipelines that were taken off names.
        self._taken_off: set[str] = set()

    def find(self, update: ModuleUpdate, of_class: NamesOfClass) -> tuple[ModuleUpdate, Parameter] | str:
        """The update by the name that led to a parameter, and that; else why not, "" where nothing is known."""
        if update.flattened:
            names = self._unflattened(update.module)
            if len(names) > 1:
                return f"{update.module} may be any of {', '.join(names[:3])}"
            update = update.changed(module=names[0]) if names else update
        found = self._named(update, of_class)
        if found != "":
            return found
        others = [(other, self._named(update.changed(module=other), of_class)) for other in self.others(update.module)]
        known = [(other, found) for other, found in others if found != ""]
        refused = [found for _, found in known if isinstance(found, str)]
        if refused or not known:
            return refused[0] if refused else ""
        meant = {found[1].regions: other for other, found in known if not isinstance(found, str)}
        if len(meant) > 1:
            return f"{update.module} is ambiguous: it could be {' or '.join(sorted(meant.values()))}"
        self._note(update.module, known[0][0])
        return known[0][1]

    def exists(self, module: str, parameter: str) -> bool:
        """Whether the base has, or could have, a parameter by a name of its own."""
        return self._found(module, parameter)[0] != ""

    def plain(self, module: str, parameter: str) -> str:
        """A module's name by which to see whose names an adapter has: without what stood around the model."""
        names = list(dict.fromkeys(self._less(module)))
        if len(names) == 1:
            return module
        names += self.others(module)
        inner = min(peeled(module), key=len)
        return next((name for name in names if self.exists(name, parameter)), inner)

    def problem(self) -> str:
        """The problem of an adapter whose names lost the prefixes of several parts."""
        return parts.several_parts_problem(self._taken_off)

    # --- one name ---

    def _named(self, update: ModuleUpdate, of_class: NamesOfClass) -> tuple[ModuleUpdate, Parameter] | str:
        """The base's parameter for a module's unchanged name in ``of_class``."""
        for read in self._readings(update):
            for name in of_class.ours(read.module):
                found, parameter = self._found(name, read.parameter)
                if found != "":
                    if isinstance(found, str):
                        return found
                    return (read if parameter == read.parameter else read.changed(parameter=parameter)), found
        return ""

    def _readings(self, update: ModuleUpdate) -> Iterator[ModuleUpdate]:
        yield update
        module, dot, parameter = update.module.rpartition(".")
        if dot and update.or_parameter:
            yield update.changed(module=module, parameter=parameter)

    def _found(self, module: str, parameter: str) -> tuple[Parameter | str, str]:
        """The parameter by a name of the base's own, and what it is called there."""
        found = self._names.resolve(module, parameter)
        if found == "" and parameter == "weight":
            # nn.MultiheadAttention keeps q, k and v as one parameter of its own.
            found = self._names.resolve(module, "in_proj_weight")
            parameter = parameter if found == "" else "in_proj_weight"
        if found == "":
            found = tied_parameter(self._names, module, parameter) or ""
        return found, parameter

    # --- other names ---

    def others(self, module: str) -> Iterator[str]:
        """All names but the module's own that it may have; none twice."""
        seen = {module}
        for name in self._less(module):
            for other in (name, *parts.other_names(name, self._parts_of_base)):
                if other not in seen:
                    seen.add(other)
                    yield other

    def _less(self, module: str) -> Iterator[str]:
        """The name with less and less before it."""
        for name in peeled(module):
            yield name
            yield name.replace(".module.", ".")
            if self._prefix and name.startswith(self._prefix):
                yield from peeled(name.removeprefix(self._prefix))
            if part := parts.part_of(name):
                yield from (part + inner for inner in peeled(name.removeprefix(part)))

    @cached_property
    def _parts_of_base(self) -> list[str]:
        return [part for part in parts.DENOISERS if any(name.startswith(part) for name in self._stored)]

    def _note(self, module: str, name: str) -> None:
        for less in self._less(module):
            part = parts.part_of(less)
            if part and not name.startswith(part) and part != self._prefix:
                self._taken_off.add(part)

    # --- names without dots ---

    @cached_property
    def _flat(self) -> dict[str, list[str]]:
        flat: defaultdict[str, list[str]] = defaultdict(list)
        for stored in self._stored:
            module = stored.removesuffix(".weight")
            if module != stored:
                flat[module.replace(".", "_")].append(module)
        return flat

    def _unflattened(self, name: str) -> list[str]:
        """The modules of the base whose name, or its end, is this with dots for underscores; dots in it are dots."""
        wanted = name.replace(".", "_")
        dots = [place - len(name) for place, character in enumerate(name) if character == "."]

        def fits(module: str) -> bool:
            return all(module[place] == "." for place in dots)

        if whole := self._flat.get(wanted, []):
            return [module for module in whole if fits(module)]
        return [
            module
            for flat, modules in self._flat.items()
            if flat.endswith(f"_{wanted}")
            for module in modules
            if module[len(module) - len(name) - 1] == "." and fits(module)
        ]


class KnownBase(BaseView):
    """The base as an adapter's readers see it: by the names of one class, or of any class that has a module."""

    is_known = True

    def __init__(
        self,
        names: Names,
        modules: Modules,
        classes: ModelClasses,
        stored: Callable[[str], TensorRef],
        of_class: NamesOfClass,
    ) -> None:
        """``stored`` finds a stored tensor by its name."""
        self._names = names
        self._modules = modules
        self._template = lru_cache(maxsize=8)(classes.template)  # a module is asked for several times in a row
        self._stored = stored
        self._class_names = classes if of_class is classes.own else of_class
        #: What was asked, and the answers. Of modules that differ in numbers only, one is looked up.
        self._orders: dict[str, tuple[str, tuple[str, ...]]] = {}
        self._found: dict[tuple[str, str], tuple[Parameter, str] | None] = {}

    def registered(self, module: str) -> tuple[str, ...]:
        """See `BaseView`: by any of the module's names."""
        if not self._names.has_experts:  # saves the search through all classes, which takes 60 ms
            return ()
        key = self._template(module)
        if key not in self._orders:
            names = (module, *self._modules.others(module))
            self._orders[key] = module, next(filter(None, map(self._class_names.registered_parameters, names)), ())
        return self._orders[key][1]

    def stored(self, module: str, parameter: str) -> tuple[Parameter, str] | None:
        """See `BaseView`: by the module's name, unchanged or without the wrappers before it."""
        if (module, parameter) not in self._found:
            found = (self._class_names.resolve(name, parameter) for name in peeled(module))
            known = next((item for item in found if isinstance(item, Parameter)), None)
            answer = None if known is None else (known, self._stored(known.regions[0].tensor).dtype)
            self._found[module, parameter] = answer
        return self._found[module, parameter]

    def agrees_with(self, other: KnownBase) -> bool:
        """Whether the other gives the same answers to all that this one was asked."""
        return all(other.registered(module) == names for module, names in self._orders.values()) and all(
            other.stored(*asked) == found for asked, found in self._found.items()
        )

    def ordered(self) -> ModuleOrder | str:
        return self._names.module_order()
