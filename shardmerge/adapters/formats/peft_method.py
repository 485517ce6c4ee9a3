"""The seam of a method of PEFT: ``adapter_config.json`` and the keys of ``adapter_model.safetensors`` → updates.

Keys are ``base_model.model.<module>.<factor>``, at times with the adapter's name after the factor's. Here is what all
methods have in common: checks of the config, ``modules_to_save``, trained biases, embeddings that were saved whole. A
method has factors and settings, and defines what a module's factors mean.
Source: peft/utils/save_and_load.py and peft/tuners/tuners_utils.py, 0.21.
"""

from __future__ import annotations

import dataclasses
import itertools
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
from shardmerge.key_mapping.naming import PEFT_PREFIX, peeled, unwrapped
from shardmerge.spec.light import light_dataclass
from shardmerge.spec.tensors import TensorRef, transposed_if
from shardmerge.spec.updates import Settings

#: Settings of every method.
_COMMON = frozenset({"bias", "modules_to_save", "target_modules", "fan_in_fan_out"})
#: Wrappers of a module in the names of modules below it; not at the end of a name.
BELOW_WRAPPERS = re.compile(r"((?:\.base_layer)+)(?=\.(?!base_layer(?:\.|$)))")


@light_dataclass(frozen=True, slots=True)
class Module:
    """The factors of one module, by role."""

    name: str
    #: The part of its keys before the factor's name, for messages about missing keys.
    prefix: str
    infix: str
    factors: dict[str, TensorRef]
    #: The module whose name decides the settings: another one, if PEFT has wrapped this one with it.
    configured: str

    @property
    def refs(self) -> Collection[TensorRef]:
        return self.factors.values()

    @property
    def first(self) -> TensorRef:
        return next(iter(self.factors.values()))

    @property
    def is_empty(self) -> bool:
        """Whether a factor is empty."""
        return any(0 in ref.shape for ref in self.refs)

    def key(self, end: str) -> str:
        """The key of another factor, such as ``lora_B.weight``."""
        factor, dot, rest = end.partition(".")
        return f"{self.prefix}.{factor}{f'.{self.infix}' if self.infix else ''}{dot}{rest}"


@dataclass(frozen=True, slots=True)
class Context:
    """The adapter and the base around a module's factors."""

    config: Config
    base: BaseView = NO_BASE
    #: Tensors that all modules share, by role.
    shared: Mapping[str, TensorRef] = field(default_factory=dict)
    #: The layout of B of fused experts, ``peft`` or ``unsloth``, if our config says it.
    expert_layout: str | None = None
    #: Keys of the config that our config ignores.
    ignored: tuple[str, ...] = ()


class PeftMethod(ABC):
    """One value of ``peft_type``."""

    peft_type: ClassVar[str]
    #: Its name, its paper and a note, for the table in docs/formats.md.
    title: ClassVar[str]
    paper: ClassVar[str] = ""
    note: ClassVar[str] = ""
    #: The end of a key (without the adapter's name) → the factor's role. An optional role ends in ``?``.
    roles: ClassVar[Mapping[str, str]]
    #: Keys of tensors that all modules share → role, without ``base_model.``.
    shared_roles: ClassVar[Mapping[str, str]] = {}
    #: Settings that it reads, with their checks.
    settings: ClassVar[Mapping[str, Check]] = {}
    #: Settings that only matter in training.
    inert: ClassVar[frozenset[str]] = frozenset()
    #: Settings that narrow down the targets; see `shardmerge.adapters.formats.peft_targets`.
    selectors: ClassVar[frozenset[str]] = SELECTORS
    #: Settings that it reads, and that our config may ignore.
    ignorable: ClassVar[frozenset[str]] = frozenset()
    #: Keys of tensors that PEFT stores once, but reports as missing from every layer.
    kept_once: ClassVar[tuple[str, ...]] = ()
    #: Settings with which an adapter cannot be merged → why, and the way out.
    refused: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        """Append the module's updates, or report problems of its factors."""

    def check_config(self, config: Config) -> list[str]:
        """Problems of the config beyond those of single settings."""
        return []

    def claim_rest(self, claims: Claims, tensors: Mapping[str, TensorRef], config: Config) -> None:
        """Claim tensors that were saved whole, whose keys have another form."""
        claim_wholes(claims, tensors, config)

    def left_out(self, module: str, context: Context) -> str:
        """The setting that excludes the module, with its verb; empty where it is a target."""
        return left_out(module, context.config)

    def configured_name(self, module: Module, context: Context) -> tuple[str, str]:
        """The module whose name decides the settings of one below wrapped modules, or why it is unknown."""
        return "", f"what its .base_layer stands for is not known: {self.peft_type} has no layers below wrapped ones"

    def weighs(self, config: Config) -> bool:
        """Whether ΔW is linear in the ``scaling`` of PEFT's layers, so that it can take our weight."""
        return False

    def composes(self, config: Config) -> bool:
        """Whether PEFT applies several such adapters one after the other, as a merge does."""
        return False

    def claim(self, tensors: Mapping[str, TensorRef], context: Context) -> Claims:
        """Check the config, group the factors by module, and claim each module."""
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
        # Looked up for every module.
        lists = {key: config.get(key) for key in ("target_modules", "exclude_modules", "modules_to_save")}
        config = {**config, **{key: frozenset(of) for key, of in lists.items() if isinstance(of, list)}}
        context = dataclasses.replace(context, config=config, shared=shared)
        has_modules = bool(modules)
        modules.reverse()
        while modules:  # popped, to free their memory: an adapter of experts has a hundred thousand
            self._claim_one(claims, modules.pop(), context)
        if has_modules:
            claims.account_for(ref for ref in shared.values() if 0 not in ref.shape)
        self.claim_rest(claims, tensors, config)
        return claims

    def _claim_one(self, claims: Claims, module: Module, context: Context) -> None:
        if ".base_layer" in module.prefix and BELOW_WRAPPERS.search(module.prefix):
            configured, why = self.configured_name(module, context)
            if why:
                claims.reject(module.refs, f"{module.first.name}: {why}")
                return
            module = dataclasses.replace(module, configured=configured)
        if self._complete(claims, module):
            self.claim_module(claims, module, context)
        # The config was written before wrappers came before PEFT's prefix.
        for name in peeled(module.configured):
            if not (reason := self.left_out(name, context)):
                return
        claims.problems.append(
            f"adapter_config.json's {reason} {module.name}, for which the adapter has tensors; PEFT would ignore them"
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
                key = (prefix, infix, 0)
                while (module := modules.get(key)) is not None and role in module.factors:
                    key = (prefix, infix, key[2] + 1)  # the same key but for its wrappers: a second update
                if module is None:
                    # What is below a wrapped module has the wrapper in its name.
                    plain = prefix.removeprefix(PEFT_PREFIX)
                    if ".base_layer" in plain:
                        plain = BELOW_WRAPPERS.sub("", plain)
                    module = modules[key] = Module(plain, prefix, infix, {}, plain)
                module.factors[role] = ref
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
        """Key and role of the required factors."""
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
        """Settings of this method, and those of all methods."""
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
    """Whether a setting is on. PEFT takes an empty mapping for a sub-config of defaults, which is on, too."""
    return bool(value) or (value == {} and key.endswith("_config"))


def _anchored(config: Config, modules: Collection[Module]) -> list[str]:
    """Refuse patterns of whole names where wrappers come before a module's name."""
    # Methods that do not read the patterns have not checked their type.
    patterns = [of for key in ("rank_pattern", "alpha_pattern") if isinstance(of := config.get(key), dict)]
    anchored = [key for of in patterns for key in of if str(key).startswith("^")]
    wrapped = (module for module in modules if len(list(peeled(module.configured))) > 1)
    return [
        f"{module.prefix} has a wrapper's name before the module's, and adapter_config.json's pattern "
        f"{reprlib.repr(anchored[0])} is of whole names, so what it matches is unknown; save the adapter with "
        "PEFT's save_pretrained"
        for module in itertools.islice(wrapped if anchored else (), 1)
    ]


def key_of(roles: Mapping[str, str], role: str) -> str:
    """The end of a factor's key, by its role; the first of two."""
    return next(key for key, known in roles.items() if known.removesuffix("?") == role)


def contradiction(roles: Mapping[str, str], module: Module, role: str, setting: str, wanted: bool) -> str:
    """The problem of a factor without its setting, or of a setting without its factor."""
    ref = module.factors.get(role)
    if ref is None and wanted:
        return f"adapter_config.json says {setting}, but {module.key(key_of(roles, role))} is missing"
    if ref is not None and not wanted:
        return f"{ref.name} is there, but adapter_config.json does not say {setting}; PEFT would ignore it"
    return ""


class PeftFamily(Family, PeftMethod):
    """A method that makes one update of each module's weight, by a family of its own."""

    #: What it updates, for the message about other parameters; empty if `misfits` reports them.
    updates: ClassVar[str] = ""
    #: The numbers of dimensions that a parameter may have, and whether kernels of two dimensions must be square.
    dims: ClassVar[frozenset[int]] = frozenset({2})
    square_kernels: ClassVar[bool] = False

    def settings_of(self, config: Config, module: Module) -> Settings | None:
        """The settings of a module's update."""
        return None

    def scaling_of(self, config: Config, module: Module) -> float:
        """s of a module; 1 for a method without a scale."""
        return 1.0

    def update(self, module: Module, context: Context, **changes: Any) -> ModuleUpdate:
        """The update of a module's weight by all of its factors; ``changes`` replace fields of it."""
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
        """Why the factors do not fit the parameter, whose number of dimensions is right."""
        raise NotImplementedError
