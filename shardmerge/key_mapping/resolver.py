"""An adapter's name of a parameter → the regions of stored tensors that hold it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shardmerge.key_mapping import conversions, divided, pieces
from shardmerge.key_mapping import table as tables
from shardmerge.key_mapping.dialects import below, join
from shardmerge.key_mapping.divided import Experts
from shardmerge.key_mapping.index import Images, Index, number_in, numbers_in, template_of
from shardmerge.key_mapping.naming import NUMBER, numberless
from shardmerge.key_mapping.pieces import RefusalError, View
from shardmerge.key_mapping.rules import Rules, compose
from shardmerge.spec.tensors import Orientation, transposed_if
from shardmerge.spec.updates import Parameter

#: Prefixes of base models that are tried where the architecture is not known.
_COMMON_PREFIXES = ("model", "transformer")
#: The rules that every model has, for names of old checkpoints.
LEGACY = "legacy"
#: Trainers' own names for modules, tried where the base has no module of that name: gpt-oss's attention in Tinker, and
#: its router in unsloth's 4-bit model.
_OTHER_NAMES = (
    (re.compile(r"(?<=\.)attn(?=\.[qkvo]_proj$)"), "self_attn"),
    (re.compile(r"(?<=\.mlp\.router)\.linear$"), ""),
)


@dataclass(frozen=True, slots=True)
class _Kind:
    """A module in the table: its experts, if it has any, and whether its weight is (in, out)."""

    experts: Experts | None
    is_conv1d: bool


class Resolver:
    """Where a checkpoint stores its parameters, by its config.json (untrusted) and its tensors' shapes by name."""

    def __init__(self, config: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]]) -> None:
        self.config = config
        self.stored = stored
        self._architecture = tables.find(config)
        self._views: dict[str, list[View] | RefusalError] = {}
        self._kinds: dict[str, _Kind] = {}
        #: Template → whether a stored name of it can only mean the tensor of that name.
        self._plain: dict[str, bool] = {}

    @property
    def known(self) -> bool:
        """Whether the architecture is in the table."""
        return self._architecture is not None

    @property
    def lacks_text(self) -> bool:
        """Whether the config has a text model that is not in the table."""
        return isinstance(self.config.get("text_config"), Mapping) and not any(part.is_text for part in self.parts)

    # --- the table's entries for this model ---

    @cached_property
    def parts(self) -> list[tables.Part]:
        """The model and the models inside it, parents first; none where it is not in the table."""
        return list(tables.parts(self._architecture, self.config)) if self._architecture else []

    @cached_property
    def _rules(self) -> Rules:
        known = tables.table().rules
        modules = [(part.path, part.architecture.name, part.architecture.model_type) for part in self.parts]
        prefix = self._architecture.base_prefix if self._architecture else ""
        return Rules([*compose(known, modules, prefix), *known[LEGACY]])

    @cached_property
    def _images(self) -> Images:
        return Images(self._rules, self._numbers_in_paths)

    @cached_property
    def numbers(self) -> frozenset[str]:
        """The numbers in the rules for this checkpoint's names."""
        return numbers_in(self._rules.rules)

    @cached_property
    def _is_plain(self) -> bool:
        """Whether the only rules are those for the LayerNorms of old checkpoints."""
        return len(self._rules.rules) == len(tables.table().rules[LEGACY])

    @cached_property
    def _index(self) -> Index:
        return Index(Rules(self._rules.rules), self._templates, self._numbers_in_paths)

    @cached_property
    def _templates(self) -> Mapping[str, str]:
        """Stored name → its template; a name without one is its own template."""
        found = ((name, self._images.template(name)) for name in self.stored)
        return {name: template[0] if template else name for name, template in found}

    @cached_property
    def _prefixes(self) -> tuple[str, ...]:
        if self._architecture is None:
            return _COMMON_PREFIXES
        return (self._architecture.base_prefix,) if self._architecture.base_prefix else ()

    @cached_property
    def _experts(self) -> dict[str, Experts]:
        """Modules of experts, with # for numbers → their entry in the table."""
        return {
            join(part.path, module): Experts(names, part.architecture.experts_in_memory, part.architecture.gates)
            for part in self.parts
            for module, names in part.architecture.experts.items()
        }

    @property
    def has_experts(self) -> bool:
        """Whether the table has a module of this model with parameters (E, out, in)."""
        return bool(self._experts)

    @cached_property
    def output(self) -> str:
        """The module that is the output head: the text model's, else the model's; "" where that is not known."""
        around = [part for part in self.parts if part.architecture.output]
        texts = [part.path for part in self.parts if part.is_text]
        of_text = [part for part in around if any(below(path, part.path) is not None for path in texts)]
        if chosen := of_text[-1:] or around[:1]:
            return join(chosen[0].path, chosen[0].architecture.output)
        heads = [name.removesuffix(".weight") for name in self.stored if f".{name}".endswith(".lm_head.weight")]
        return heads[0] if len(heads) == 1 else ""

    # --- resolving ---

    def resolve(self, module: str, parameter: str = "weight") -> Parameter | str:
        """The parameter and its regions; else why there are none, "" where the base has nothing of that name.

        Names in memory go first, then names on disk, then both with the base model's prefix added or removed. Where a
        name means different places, it is refused.
        """
        name = f"{module}.{parameter}" if module else parameter
        if self._is_plain and name in self.stored:
            return self._parameter(name, name, self._as_stored(name))
        try:
            for candidates in ((name,), tuple(self._with_other_prefix(name))):
                readings = [reading for candidate in candidates for reading in self._readings(candidate)]
                if readings:
                    return _agreed(name, readings)
            part = divided.part(module, parameter, self._known)
            if part is not None:
                interleaved = divided.is_interleaved(module, self._known)
                return dataclasses.replace(self._parameter(name, name, part), interleaved=interleaved)
        except RefusalError as error:
            return f"{name}: {error}"
        return ""

    def stands(self, name: str) -> str | None:
        """The template of a stored tensor's name, if the name can only mean all of that tensor; else None.

        For names of one template and tensors of one shape, `resolve` finds the same but for the names.
        """
        template = self._templates.get(name)
        if template is None:
            return None
        if template not in self._plain:
            image = self._images.of(name)
            # No other stored tensor has that name in memory.
            makers = [template] if name == image.name else []
            self._plain[template] = self._is_plain or (
                name not in image.targets and self._index.makers(template) == makers
            )
        return template if self._plain[template] else None

    def other_names(self, module: str) -> Iterator[str]:
        """Further names of a module: `_OTHER_NAMES`, and the output head for ``unembed_tokens``."""
        if module.rpartition(".")[2] == "unembed_tokens" and self.output:
            yield self.output
        for pattern, name in _OTHER_NAMES:
            if pattern.search(module):
                yield pattern.sub(name, module)

    @cached_property
    def _known(self) -> divided.Known:
        return divided.Known(self._view_with_any_prefix, self._experts_of, self._config_around)

    def _config_around(self, module: str) -> Mapping[str, Any]:
        """The config of the innermost model around a module, completed by the configs of the models around that."""
        names = (module, *self._with_other_prefix(module))
        inside = [part.config for part in self.parts if any(below(name, part.path) is not None for name in names)]
        text = self.config.get("text_config")
        merged = dict(self.config)
        for config in (text if isinstance(text, Mapping) else {}, *inside[1:]):
            merged |= config
        return merged

    def _with_other_prefix(self, name: str) -> Iterator[str]:
        for prefix in self._prefixes:
            if name.startswith(prefix + "."):
                yield name.removeprefix(prefix + ".")
            yield f"{prefix}.{name}"

    def _readings(self, name: str) -> Iterator[Parameter]:
        """The parameters that a name can mean: as a name in memory, as a stored name, or after the rules."""
        image = self._images.of(name)
        stands = name in self.stored and name != image.name and name not in image.targets
        if not stands or self._index.target(name) or self._index.sources(name):
            in_memory = self._view(name)
            if in_memory is not None:
                yield self._parameter(name, name, in_memory)
        if stands:
            # A checkpoint may well store names in memory that the rules do not fit.
            kind = self._kind(name.rpartition(".")[0])
            alias = name if image.rule or kind.experts is not None or kind.is_conv1d else image.name
            yield self._parameter(name, alias, self._as_stored(name, alias))
        if name in self.stored or name == image.name or name in image.targets:
            return
        if any(other in self.stored for other in self._with_other_prefix(name)):
            return  # it stands but for the prefix, and the next round finds it
        targets = image.targets or (image.name,)
        found = [self._view_with_any_prefix(target) for target in targets]
        views = [view for view in found if view is not None]
        if len(views) < len(targets):
            return
        if image.rule is None:
            yield self._parameter(image.name, image.name, views[0])
            return
        number = number_in(image)
        member = None if number is None or number < 0 else number
        view = conversions.revert(image.rule, views, image.source, member, self.config)
        yield self._parameter(name, name, view)

    def _view_with_any_prefix(self, name: str) -> View | None:
        """As transformers does when a renamed name is not one of the model's."""
        names = (name, *self._with_other_prefix(name))
        return next((view for candidate in names if (view := self._view(candidate)) is not None), None)

    def _view(self, name: str) -> View | None:
        """The tensor of that name in memory, if the checkpoint has it."""
        if target := self._index.target(name):
            first, i = target
            views = self._converted(first)
            if isinstance(views, RefusalError):
                raise views
            return views[i]
        sources = self._index.sources(name)
        if len(sources) > 1:
            raise RefusalError(f"it could be any of {', '.join(sorted(sources))}")
        if sources:
            return self._as_stored(sources[0], name)
        return self._as_stored(name) if name in self.stored else None

    def _converted(self, first: str) -> list[View] | RefusalError:
        if first not in self._views:
            try:
                self._views[first] = conversions.convert_group(self._index.group(first), self.stored, self.config)
            except RefusalError as error:
                self._views[first] = error
        return self._views[first]

    def _as_stored(self, name: str, in_memory: str | None = None) -> View:
        shape = self.stored[name]
        return pieces.stored(name, shape, self._is_stack(in_memory or name, shape))

    def _is_stack(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a parameter's first dimension counts experts."""
        if len(shape) not in (2, 3):
            return False
        module, _, parameter = name.rpartition(".")
        found = self._experts_of(module)
        if found:
            # Of the matrices beside experts' (E, out, in) only their biases, (E, n), have a row per expert.
            return parameter in found.parameters and (len(shape) == 3 or "bias" in parameter)
        return len(shape) == 3 and shape[0] > 1 and parameter != "weight"

    def _orientation(self, name: str, view: View) -> Orientation:
        """How the matrix (out, in) is turned against the module's own tensor."""
        module, _, parameter = name.rpartition(".")
        if view.stacked:
            found = self._experts_of(module)
            return (
                found.in_memory
                if len(view.shape) == 3 and found and parameter in found.parameters
                else Orientation.SAME
            )
        return transposed_if(parameter == "weight" and len(view.shape) == 2 and self._kind(module).is_conv1d)

    def _experts_of(self, module: str) -> Experts | None:
        return self._kind(module).experts

    def _kind(self, module: str) -> _Kind:
        """A module in memory in the table; of modules that differ only in numbers, one is looked up."""
        template, _ = template_of(module, self._numbers_in_paths)
        kind = self._kinds.get(template)
        if kind is None:
            names = (module, *self._with_other_prefix(module))
            found = (self._experts.get(numberless(name)) for name in names)
            kind = self._kinds[template] = _Kind(next(filter(None, found), None), self._is_conv1d(module))
        return kind

    @cached_property
    def _numbers_in_paths(self) -> frozenset[str]:
        return frozenset(number for part in self.parts for number in NUMBER.findall(part.path))

    def _is_conv1d(self, module: str) -> bool:
        last = module.rpartition(".")[2]
        for part in self.parts:
            if last in part.architecture.conv1d:
                inside = (part.path, part.path.removeprefix(f"{self._prefixes[0]}.") if self._prefixes else "")
                if any(not path or module.startswith(f"{path}.") for path in inside):
                    return True
                # A checkpoint without the base model's prefix: the part is the base model itself.
                if self._prefixes and part.path == self._prefixes[0]:
                    return True
        return False

    def _parameter(self, name: str, in_memory: str, view: View) -> Parameter:
        """The parameter in matrix orientation."""
        if not self.known:
            return Parameter(name, view.shape, pieces.regions(view), Orientation.UNKNOWN, view.stacked)
        orientation = self._orientation(in_memory, view)
        if orientation is Orientation.TRANSPOSED:
            view = pieces.transpose(view, view.row_axis, view.row_axis + 1)
        return Parameter(name, view.shape, pieces.regions(view), orientation, view.stacked)

    def in_memory(self, stored: str) -> str:
        """A stored tensor's name in memory, without the base model's prefix."""
        name = self._images.of(stored).name
        return next((name.removeprefix(f"{prefix}.") for prefix in self._prefixes), name)

    def registered_parameters(self, module: str) -> tuple[str, ...]:
        """Parameters of two and more dimensions, as registered, of a module that has parameters (E, out, in).

        PEFT nests the wrappers of ``target_parameters`` in that order. () where the module is not in the table.
        """
        renamed = self._images.of(f"{module}.gate_up_proj").name.rpartition(".")[0]
        found = self._experts_of(module) or self._experts_of(renamed)
        return found.parameters if found else ()


def _agreed(name: str, readings: list[Parameter]) -> Parameter | str:
    """The one parameter that all readings of a name mean, or a refusal."""
    first = readings[0]
    if all((other.shape, other.regions) == (first.shape, first.regions) for other in readings):
        return first
    meant = sorted({", ".join(sorted({region.tensor for region in reading.regions})) for reading in readings})
    if len(meant) == 1:
        return f"{name} could be read in two ways, of different parts of {meant[0]}"
    return f"{name} is ambiguous: it could be {' or '.join(meant)}"
