"""Reading what PEFT saves: ``adapter_config.json`` and the keys of ``adapter_model.safetensors`` → updates.

Keys are ``base_model.model.<module>.<factor>``, at times with the adapter's name behind the factor's. What every method
of PEFT has in common is read here: the config's checks, ``modules_to_save``, trained biases, embeddings that were saved
whole. A method says which factors it has, which settings it reads, and what a module's factors mean.
Source: peft/utils/save_and_load.py and peft/tuners/tuners_utils.py, 0.21.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from shardmerge.adapters.claims import NO_BASE, BaseView, Claims, ModuleUpdate
from shardmerge.adapters.formats.checks import MISSING, RANK, Check, Config, rank_of
from shardmerge.adapters.formats.peft_keys import FOREIGN, GENERAL, ignored_problems, key_reader, unknown_key
from shardmerge.adapters.formats.peft_targets import SELECTORS, left_out, target_problems
from shardmerge.adapters.formats.wholes import claim_wholes
from shardmerge.adapters.methods.base import Family
from shardmerge.key_mapping.naming import module_name, peeled, unwrapped
from shardmerge.spec.light import light_dataclass
from shardmerge.spec.tensors import TensorRef, transposed_if
from shardmerge.spec.updates import Settings

#: Settings that are read here, for every method.
_COMMON = frozenset({"bias", "modules_to_save", "target_modules", "fan_in_fan_out"})
#: Wrappers of a module in the name of what is below it; not those that a name ends in.
BELOW_WRAPPERS = re.compile(r"((?:\.base_layer)+)(?=\.(?!base_layer(?:\.|$)))")


@light_dataclass(frozen=True, slots=True)
class Module:
    """The factors of one module, by role."""

    name: str
    #: What stands before the factor's name in the file, for messages about keys that are missing.
    prefix: str
    infix: str
    factors: dict[str, TensorRef]
    #: The module by whose name PEFT asks the settings; another where that one's wrapper brings this along.
    asked: str

    @property
    def refs(self) -> Collection[TensorRef]:
        return self.factors.values()

    @property
    def first(self) -> TensorRef:
        return next(iter(self.factors.values()))

    @property
    def is_empty(self) -> bool:
        """Whether a factor has no numbers."""
        return any(0 in ref.shape for ref in self.refs)

    def key(self, end: str) -> str:
        """The key of another of its factors, ``lora_B.weight`` say."""
        factor, dot, rest = end.partition(".")
        return f"{self.prefix}.{factor}{f'.{self.infix}' if self.infix else ''}{dot}{rest}"


@dataclass(frozen=True, slots=True)
class Context:
    """What a module's factors are read against."""

    config: Config
    base: BaseView = NO_BASE
    #: Tensors that all modules share, by role.
    shared: Mapping[str, TensorRef] = field(default_factory=dict)
    #: How B of fused experts is laid out, ``peft`` or ``unsloth``, where our config says it.
    expert_layout: str | None = None
    #: Keys of the config that our config says to leave out.
    ignored: tuple[str, ...] = ()


class PeftMethod(ABC):
    """One value of ``peft_type``: its keys, its settings, and what a module's factors mean."""

    peft_type: ClassVar[str]
    #: What it is called, and where it is described; for the table of what is supported.
    title: ClassVar[str]
    paper: ClassVar[str] = ""
    #: What else a user must know, for the table of what is supported.
    note: ClassVar[str] = ""
    #: The end of a key (without the adapter's name) → the factor's role. An optional role ends in ``?``.
    roles: ClassVar[Mapping[str, str]]
    #: Keys of tensors that all modules share → role, without ``base_model.``.
    shared_roles: ClassVar[Mapping[str, str]] = {}
    #: Settings that the method reads, and how each is checked.
    settings: ClassVar[Mapping[str, Check]] = {}
    #: Settings that only matter in training.
    inert: ClassVar[frozenset[str]] = frozenset()
    #: Settings that narrow down the targets; see `shardmerge.adapters.formats.peft_targets`.
    selectors: ClassVar[frozenset[str]] = SELECTORS
    #: Settings that are read, and that our config may yet say to leave out.
    ignorable: ClassVar[frozenset[str]] = frozenset()
    #: Keys of tensors that PEFT keeps once, and yet reports as missing from every layer.
    kept_once: ClassVar[tuple[str, ...]] = ()
    #: Settings that, set, make the adapter something that cannot be merged; why, and the way out.
    refused: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        """Append the module's updates, or say what is wrong with its factors."""

    def check_config(self, config: Config) -> list[str]:
        """What is wrong with the config beyond single settings."""
        return []

    def claim_rest(self, claims: Claims, tensors: Mapping[str, TensorRef], config: Config) -> None:
        """Claim tensors whose keys are of another form: those that were saved whole."""
        claim_wholes(claims, tensors, config)

    def left_out(self, module: str, context: Context) -> str:
        """The setting that leaves the module out, with its verb; empty where the module is one of the adapter's."""
        return left_out(module, context.config)

    def asked_name(self, module: Module, context: Context) -> tuple[str, str]:
        """The module by whose name PEFT asks the settings, and why that is unknown: one of the two."""
        if BELOW_WRAPPERS.search(module.prefix):
            what = f"what its .base_layer stands for is not known: {self.peft_type} has no layers below wrapped ones"
            return "", what
        return module.asked, ""

    def weighs(self, config: Config) -> bool:
        """Whether ΔW is linear in a ``scaling`` that PEFT's layers have by adapter, so that it can take our weight."""
        return False

    def composes(self, config: Config) -> bool:
        """Whether PEFT applies several such adapters as merges do, one after the other."""
        return False

    def claim(self, tensors: Mapping[str, TensorRef], context: Context) -> Claims:
        """Check the config, group the factors by module, and have each module claimed."""
        read = _COMMON | self.selectors | self.settings.keys() | self.refused.keys()
        problems = ignored_problems(context.ignored, context.config, read - self.ignorable)
        config = {key: value for key, value in context.config.items() if key not in context.ignored}
        claims = Claims(problems=[*problems, *self._config_problems(config), *self.check_config(config)])
        if foreign := [key for key in config if key in FOREIGN and key not in self._known]:
            claims.warnings.append(
                f"adapter_config.json: {', '.join(foreign)} of another program's training are not read, as PEFT does "
                "not read them"
            )
        if claims.problems:
            claims.refused = True
            return claims
        modules, shared = self.grouped(tensors)
        claims.problems += _anchored(config, modules)
        # Each is looked into for every module.
        lists = {key: config.get(key) for key in ("target_modules", "exclude_modules", "modules_to_save")}
        config = {**config, **{key: frozenset(of) for key, of in lists.items() if isinstance(of, list)}}
        context = dataclasses.replace(context, config=config, shared=shared)
        has_modules = bool(modules)
        modules.reverse()
        while modules:  # which takes back its memory: an adapter of experts has a hundred thousand of them
            self._claim_one(claims, modules.pop(), context)
        if has_modules:
            claims.account_for(ref for ref in shared.values() if 0 not in ref.shape)
        self.claim_rest(claims, tensors, config)
        return claims

    def _claim_one(self, claims: Claims, module: Module, context: Context) -> None:
        asked, why = self.asked_name(module, context)
        if why:
            claims.reject(module.refs, f"{module.first.name}: {why}")
            return
        if asked != module.asked:
            module = dataclasses.replace(module, asked=asked)
        if self._complete(claims, module):
            self.claim_module(claims, module, context)
        # Wrappers before PEFT's prefix were not there when the config was written.
        reasons = [self.left_out(name, context) for name in peeled(module.asked)]
        if all(reasons):
            claims.problems.append(
                f"adapter_config.json's {reasons[-1]} {module.name}, for which the adapter has tensors; PEFT would "
                "ignore them"
            )

    def grouped(self, tensors: Mapping[str, TensorRef]) -> tuple[list[Module], dict[str, TensorRef]]:
        """Modules with their factors, in the file's order, and the tensors that all of them share."""
        role_of = key_reader(tuple(self.roles.items()))
        modules: dict[tuple[str, str, int], Module] = {}
        shared: dict[str, TensorRef] = {}
        for written, ref in tensors.items():
            name = unwrapped(written)
            if role := self._shared_role(name):
                shared[role] = ref
            elif (found := role_of(name)) is not None:
                prefix, infix, role = found
                # What is below a wrapped module has the wrapper in its name.
                plain = module_name(prefix)
                if ".base_layer" in plain:
                    plain = BELOW_WRAPPERS.sub("", plain)
                key = (prefix, infix, 0)
                while key in modules and role in modules[key].factors:
                    key = (prefix, infix, key[2] + 1)  # the same key but for its wrappers: a second update
                if key not in modules:
                    modules[key] = Module(plain, prefix, infix, {}, plain)
                modules[key].factors[role] = ref
        return list(modules.values()), shared

    def _shared_role(self, name: str) -> str | None:
        for key, role in self.shared_roles.items():
            if re.fullmatch(rf"((module|model|base_model)\.)*{re.escape(key)}(\.[^.]+)?", name):
                return role
        return None

    def _complete(self, claims: Claims, module: Module) -> bool:
        missing = [key for key, role in self._required if role not in module.factors]
        if missing:
            claims.half(module.first, module.key(missing[0]), module.refs)
        return not missing

    @cached_property
    def _required(self) -> tuple[tuple[str, str], ...]:
        """Key and role of the factors that every module must have."""
        return tuple((key, role) for key, role in self.roles.items() if not role.endswith("?"))

    def _config_problems(self, config: Config) -> list[str]:
        problems = [f"{key}: {why}" for key, why in self.refused.items() if _is_set(key, config.get(key))]
        problems += [
            unknown_key(key, value)
            for key, value in config.items()
            # PEFT writes null for what is not set, whatever its version.
            if value is not None and key not in self._known and key not in FOREIGN
        ]
        problems += [f"adapter_config.json: {text}" for text in self._setting_problems(config)]
        return problems

    @property
    def _known(self) -> frozenset[str]:
        """All settings that say something to this method, or nothing to any."""
        own = self.inert | self.selectors | self.settings.keys() | self.refused.keys()
        return GENERAL | _COMMON | own

    def _setting_problems(self, config: Config) -> Iterator[str]:
        for key, check in self.settings.items():
            yield from check(key, config.get(key, MISSING))
        yield from target_problems(config)
        bias = config.get("bias")
        if bias is not None and not (isinstance(bias, str) and (bias in ("none", "all") or bias.endswith("_only"))):
            yield f"bias must be none, all or …_only, found {reprlib.repr(bias)}"


#: By ``peft_type``; `shardmerge.adapters.registry` fills this.
METHODS: dict[str, PeftMethod] = {}


def _is_set(key: str, value: Any) -> bool:
    """Whether a setting is on. Of an empty mapping PEFT makes a sub-config with its defaults, which is on, too."""
    return bool(value) or (value == {} and key.endswith("_config"))


def _anchored(config: Config, modules: Collection[Module]) -> list[str]:
    """Patterns of whole names say nothing certain where wrappers stand before a module's name."""
    # A method that does not read them has not checked what they are.
    patterns = [of for key in ("rank_pattern", "alpha_pattern") if isinstance(of := config.get(key), dict)]
    anchored = [key for of in patterns for key in of if str(key).startswith("^")]
    wrapped = [module for module in modules if len(list(peeled(module.asked))) > 1]
    if not anchored or not wrapped:
        return []
    return [
        f"{wrapped[0].prefix} has a wrapper's name before the module's, and adapter_config.json's pattern "
        f"{reprlib.repr(anchored[0])} is of whole names, so what it matches is unknown; save the adapter with "
        "PEFT's save_pretrained"
    ]


def key_of(roles: Mapping[str, str], role: str) -> str:
    """The end of the key of a factor, by its role; of two, the first."""
    return next(key for key, known in roles.items() if known.removesuffix("?") == role)


def contradiction(roles: Mapping[str, str], module: Module, role: str, setting: str, wanted: bool) -> str:
    """What is wrong where a factor is there without the setting that goes with it, or the other way round."""
    ref = module.factors.get(role)
    if ref is None and wanted:
        return f"adapter_config.json says {setting}, but {module.key(key_of(roles, role))} is missing"
    if ref is not None and not wanted:
        return f"{ref.name} is there, but adapter_config.json does not say {setting}; PEFT would ignore it"
    return ""


# --- a method that is a family, too -----------------------------------------------------------------------------------


class PeftFamily(Family, PeftMethod):
    """A method whose modules' factors make one update of the weight each, by a family of its own."""

    #: What it can update, for the message about other parameters; empty if `misfits` says it.
    updates: ClassVar[str] = ""
    #: How many dimensions what it can update has, and whether kernels of two dimensions must be square.
    dims: ClassVar[frozenset[int]] = frozenset({2})
    square_kernels: ClassVar[bool] = False

    def settings_of(self, config: Config, module: Module) -> Settings | None:
        """What the family needs to know of a module besides its factors."""
        return None

    def scaling_of(self, config: Config, module: Module) -> float:
        """s of a module; what a method without a scale has is 1."""
        return 1.0

    def update(self, module: Module, context: Context, **changes: Any) -> ModuleUpdate:
        """The update of a module's weight by all of its factors; ``changes`` are other fields of it.

        Its rank is that of ``r`` and ``rank_pattern``, if ``r`` is a rank to this method.
        """
        config = context.config
        fields: dict[str, Any] = {
            "family": self.name,
            "factors": tuple(module.factors.items()),
            "scaling": self.scaling_of(config, module),
            "rank": rank_of(config, module.name) if self.settings.get("r") is RANK else 0,
            "settings": self.settings_of(config, module),
            "in_memory": transposed_if(config.get("fan_in_fan_out")),
        }
        return ModuleUpdate(module.name, "weight", **{**fields, **changes})

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        claims.updates.append(self.update(module, context))

    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        is_square = not self.square_kernels or shape[2:3] == shape[3:4]
        if self.updates and (len(shape) not in self.dims or not is_square):
            return [f"{update.module}.{update.parameter} is {list(shape)}; {self.title} updates {self.updates}"]
        return self.misfits(update, shape)

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        """What does not fit between the factors and the parameter, whose number of dimensions is right."""
        raise NotImplementedError
