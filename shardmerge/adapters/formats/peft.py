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
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from shardmerge.adapters.formats.peft_keys import FOREIGN, GENERAL, ignored_problems, unknown_key
from shardmerge.adapters.formats.peft_targets import SELECTORS, left_out, target_problems
from shardmerge.adapters.methods.base import Claims, ModuleUpdate
from shardmerge.key_mapping.naming import WRAPPER, module_name, peeled, unwrapped
from shardmerge.spec.tensors import TensorRef
from shardmerge.spec.updates import ModuleOrder, Parameter
from shardmerge.system.bounded_regex import first_match
from shardmerge.system.bounded_regex import problems as regex_problems

Config = Mapping[str, Any]
Check = Callable[[str, Any], list[str]]
Registered = Callable[[str], tuple[str, ...]]
#: Of a module's parameter by name: where it is in the base, and its dtype.
Stored = Callable[[str, str], tuple[Parameter, str] | None]
Ordered = Callable[[], "ModuleOrder | str"]

#: Settings that are read here, for every method.
_COMMON = frozenset({"bias", "modules_to_save", "target_modules", "fan_in_fan_out"})
_WHOLE = re.compile(r"(?P<module>.+)\.(?P<parameter>[A-Za-z_]\w*)")
_SAVED = re.compile(r"\.modules_to_save(\.(?!weight$|bias$)[^.]+)?(?=\.)")
#: Wrappers of a module in the name of what is below it; not those that a name ends in.
BELOW_WRAPPERS = re.compile(r"((?:\.base_layer)+)(?=\.(?!base_layer(?:\.|$)))")
_WRAPPED = re.compile(r"(\.token_adapter)?\.base_layer(?=\.)")
#: Modules that PEFT saves whole by itself when the vocabulary was resized or they were targeted.
_EMBEDDINGS = frozenset(
    {
        *("embed_in", "embed_tokens", "shared", "tok_embeddings", "tokens_embed", "word_embedding", "word_embeddings"),
        *("wte", "decoder", "embed_out", "generator_lm_head", "lm_head", "lm_loss", "output", "output_layer"),
        *("output_projection", "proj_out", "vocab_projector"),
    }
)


@dataclass(slots=True)
class Module:
    """The factors of one module, by role."""

    name: str
    #: What stands before the factor's name in the file, to speak of keys that are missing.
    prefix: str
    infix: str
    factors: dict[str, TensorRef] = field(default_factory=dict)
    #: The module by whose name PEFT asks the settings; another where that one's wrapper brings this along.
    asked: str = ""

    def key(self, end: str) -> str:
        """The key of another of its factors, ``lora_B.weight`` say."""
        factor, dot, rest = end.partition(".")
        return f"{self.prefix}.{factor}{f'.{self.infix}' if self.infix else ''}{dot}{rest}"


def no_order() -> ModuleOrder | str:
    """Where nobody knows the base."""
    return "the base is not known"


@dataclass(frozen=True, slots=True)
class Context:
    """What a module's factors are read against."""

    config: Config
    #: Tensors that all modules share, by role.
    shared: Mapping[str, TensorRef] = field(default_factory=dict)
    #: Tells in which order a module registers parameters of its own; empty where nobody knows.
    registered: Registered = lambda module: ()
    #: Tells of a module's parameter in the base, None where there is none; None where no base is at hand.
    stored: Stored | None = None
    #: How B of fused experts is laid out, ``peft`` or ``unsloth``, where our config says it.
    expert_layout: str | None = None
    #: Keys of the config that our config says to leave out.
    ignored: tuple[str, ...] = ()
    #: Tells of the base's Linear layers in the order of the model; a string says why it is not known.
    ordered: Ordered = no_order

    def weight(self, module: str) -> Parameter | None:
        """The base's weight of that module, if it has one."""
        found = None if self.stored is None else self.stored(module, "weight")
        return None if found is None else found[0]


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

    def unwrap(self, module: Module, context: Context) -> str:
        """Tell what wraps the modules around a module, for `Module.asked`; a string says why that cannot be told."""
        if BELOW_WRAPPERS.search(module.prefix):
            return f"what its .base_layer stands for is not known: {self.peft_type} has no layers below wrapped ones"
        return ""

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
            module = modules.pop()
            if why := self.unwrap(module, context):
                first = next(iter(module.factors.values()))
                claims.problems.append(f"{first.name}: {why}")
                claims.told |= {ref.name for ref in module.factors.values()}
                continue
            if self._complete(claims, module):
                self.claim_module(claims, module, context)
            # Wrappers before PEFT's prefix were not there when the config was written.
            reasons = [self.left_out(name, context) for name in peeled(module.asked)]
            if all(reasons):
                claims.problems.append(
                    f"adapter_config.json's {reasons[-1]} {module.name}, for which the adapter has tensors; PEFT "
                    "would ignore them"
                )
        if has_modules:
            claims.told |= {ref.name for ref in shared.values() if 0 not in ref.shape}
        self.claim_rest(claims, tensors, config)
        return claims

    def grouped(self, tensors: Mapping[str, TensorRef]) -> tuple[list[Module], dict[str, TensorRef]]:
        """Modules with their factors, in the file's order, and the tensors that all of them share."""
        pattern, names = _key_pattern(tuple(self.roles.items()))
        modules: dict[tuple[str, str, int], Module] = {}
        shared: dict[str, TensorRef] = {}
        for written, ref in tensors.items():
            name = unwrapped(written)
            if role := self._shared_role(name):
                shared[role] = ref
            elif match := pattern.fullmatch(name):
                index = next(index for index in range(len(names)) if match[f"role{index}"] is not None)
                infix = match[f"adapter{index}"] or ""
                prefix = match["module"]
                # What is below a wrapped module has the wrapper in its name.
                plain = BELOW_WRAPPERS.sub("", module_name(prefix))
                key = (prefix, infix, 0)
                while key in modules and names[index] in modules[key].factors:
                    key = (prefix, infix, key[2] + 1)  # the same key but for its wrappers: a second update
                module = modules.setdefault(key, Module(plain, prefix, infix, asked=plain))
                module.factors[names[index]] = ref
        return list(modules.values()), shared

    def _shared_role(self, name: str) -> str | None:
        for key, role in self.shared_roles.items():
            if re.fullmatch(rf"((module|model|base_model)\.)*{re.escape(key)}(\.[^.]+)?", name):
                return role
        return None

    def _complete(self, claims: Claims, module: Module) -> bool:
        required = {role: key for key, role in self.roles.items() if not role.endswith("?")}
        missing = [key for role, key in required.items() if role not in module.factors]
        if missing:
            there = next(iter(module.factors.values()))
            claims.half(there, module.key(missing[0]))
            claims.told |= {ref.name for ref in module.factors.values()}
        return not missing

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


def _is_set(key: str, value: Any) -> bool:
    """Whether a setting is on. Of an empty mapping PEFT makes a sub-config with its defaults, which is on, too."""
    return bool(value) or (value == {} and key.endswith("_config"))


def _anchored(config: Config, modules: Collection[Module]) -> list[str]:
    """Patterns of whole names say nothing certain where wrappers stand before a module's name."""
    # A method may not read them, and then nobody has checked what they are.
    patterns = [of for key in ("rank_pattern", "alpha_pattern") if isinstance(of := config.get(key), dict)]
    anchored = [key for of in patterns for key in of if str(key).startswith("^")]
    wrapped = [module for module in modules if len(list(peeled(module.asked))) > 1]
    if not anchored or not wrapped:
        return []
    return [
        f"{wrapped[0].prefix} has a wrapper's name before the module's, and adapter_config.json's pattern "
        f"{reprlib.repr(anchored[0])} is of whole names, so that what it matches cannot be told; save the adapter with "
        "PEFT's save_pretrained"
    ]


def _key_pattern(roles: tuple[tuple[str, str], ...]) -> tuple[re.Pattern[str], list[str]]:
    """``lora_A.weight`` matches itself and ``lora_A.<adapter>.weight``; ``ia3_l`` itself and ``ia3_l.<adapter>``.

    A factor may be wrapped, too: ``lora_A.module.<adapter>.weight``, ``lora_A.<adapter>.module.weight``.
    """
    parts, names = [], []
    for index, (key, role) in enumerate(roles):
        factor, dot, end = key.partition(".")
        parts.append(
            rf"(?P<role{index}>{re.escape(factor)}(?:\.{WRAPPER})*?(?:\.(?P<adapter{index}>(?!weight$|bias$)[^.]+))??"
            rf"(?:\.{WRAPPER})*?{re.escape(dot + end)})"
        )
        names.append(role.removesuffix("?"))
    return re.compile(rf"(?P<module>.+)\.(?:{'|'.join(parts)})"), names


# --- modules that were saved whole ------------------------------------------------------------------------------------


def claim_wholes(claims: Claims, tensors: Mapping[str, TensorRef], config: Config) -> None:
    """Whole tensors in place of the base's: ``modules_to_save``, trained biases, embeddings, wrapped base layers.

    Where the vocabulary was resized, PEFT writes all that a trained embedding's wrapper holds, beside the tensor
    itself: the copy under ``modules_to_save`` and the untrained original. It reads neither, and nor do we.
    """
    known = {unwrapped(name) for name in tensors}
    for written in claims.leftovers(tensors):
        name = unwrapped(written)
        if ".original_module." in name and _SAVED.sub("", name.replace(".original_module.", ".")) in known:
            claims.told.add(written)
            continue
        plain = _SAVED.sub("", name)
        if plain != name and plain in known:
            claims.told.add(written)
            continue
        match = _WHOLE.fullmatch(_WRAPPED.sub("", plain))
        if match is None:
            continue
        module, parameter = module_name(match["module"]), match["parameter"]
        saved = plain != name or _is_saved(module, config)
        bias = parameter == "bias" and config.get("bias") not in (None, "none")
        embedding = parameter in ("weight", "bias") and is_embedding(module)
        wrapped = _WRAPPED.search(plain) is not None
        if saved or bias or embedding or wrapped:
            settings = (("saved", saved), ("copy", wrapped and not (saved or bias)), ("as_in_memory", True))
            factors = (("whole", tensors[written]),)
            claims.updates.append(ModuleUpdate(module, parameter, "replacement", factors, settings=settings))


def claim_beside(claims: Claims, file: str, tensors: Mapping[str, TensorRef]) -> None:
    """Whole tensors of a file beside the adapter: weights that were trained in full, in their own place in the model.

    So a tied one was trained for both sides, but for PEFT's copy of a module, which is apart. The weight within a layer
    that PEFT has wrapped is what LoRA adds to; see `claim_wholes`.
    """
    for name, ref in tensors.items():
        whole = unwrapped(name)
        plain = _SAVED.sub("", whole)
        module, _, parameter = module_name(_WRAPPED.sub("", plain)).rpartition(".")
        copy = _WRAPPED.search(whole) is not None
        settings = (("saved", plain != whole), ("copy", copy), ("as_in_memory", True), ("beside", file))
        claims.updates.append(ModuleUpdate(module, parameter, "replacement", (("whole", ref),), settings=settings))


def is_embedding(module: str) -> bool:
    """Whether a module is called as input embeddings and output heads are."""
    return module.rpartition(".")[2] in _EMBEDDINGS


def _is_saved(module: str, config: Config) -> bool:
    """Whether a module or one around it is in ``modules_to_save``, by the end of its name as PEFT compares it."""
    saved = config.get("modules_to_save") or ()
    segments = module.split(".")
    paths = [".".join(segments[: count + 1]) for count in range(len(segments))]
    return any(path.endswith(tuple(saved)) for path in paths)


# --- names in the config ----------------------------------------------------------------------------------------------


def pattern_value(pattern: Any, module: str, default: Any) -> Any:
    """The value of the first key, in the file's order, that matches the end of the module's name, as PEFT does it."""
    if not pattern:
        return default
    found = first_match([_whole_pattern(key) for key in pattern], module)
    return default if found is None else list(pattern.values())[found]


def _whole_pattern(key: str) -> str:
    """What PEFT makes of a key of rank_pattern or alpha_pattern."""
    return rf"(.*\.)?({key})$"


# --- checks of settings -----------------------------------------------------------------------------------------------

MISSING: Any = object()


def checked(valid: Callable[[Any], bool], expected: str, *, required: bool = False) -> Check:
    """A check of one setting. One that is missing or null is the method's default, unless it is required."""

    def check(key: str, value: Any) -> list[str]:
        if (value is MISSING or value is None) and not required:
            return []
        if value is not MISSING and valid(value):
            return []
        found = "nothing" if value is MISSING else reprlib.repr(value)
        return [f"{key} must be {expected}, found {found}"]

    return check


def is_number(value: Any) -> bool:
    # Compared rather than asked isfinite, which fails on a whole number beyond all floats.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


RANK = checked(is_rank, "a whole number above zero", required=True)
COUNT = checked(is_count, "a whole number")
NUMBER = checked(is_number, "a finite number", required=True)
OPTIONAL_NUMBER = checked(is_number, "a finite number")
FLAG = checked(lambda value: isinstance(value, bool), "true or false")
STRINGS = checked(lambda value: isinstance(value, str) or is_strings(value), "a string or a list of strings")
SUBCONFIG = checked(lambda value: isinstance(value, dict), "a mapping of settings, or null")


def pattern_of(valid: Callable[[Any], bool], expected: str) -> Check:
    """A check of a setting that maps ends of module names to values."""

    def check(key: str, value: Any) -> list[str]:
        if value is MISSING or not value:
            return []
        if not isinstance(value, dict):
            return [f"{key} must map module names to values, found {reprlib.repr(value)}"]
        problems = []
        for pattern, item in value.items():
            place = f"{key}[{reprlib.repr(pattern)}]"
            if not valid(item):
                problems.append(f"{place} must be {expected}, found {reprlib.repr(item)}")
        texts = {_whole_pattern(pattern): pattern for pattern in value}
        for text, why in regex_problems(list(texts)):
            problems.append(f"{key}[{reprlib.repr(texts[text])}] is no regular expression: {why}")
        return problems

    return check


RANK_PATTERN = pattern_of(is_rank, "a whole number above zero")
NUMBER_PATTERN = pattern_of(is_number, "a finite number")
