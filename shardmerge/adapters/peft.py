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

from shardmerge.adapters.base import Claims, ModuleUpdate
from shardmerge.naming import module_name
from shardmerge.patterns import first_match
from shardmerge.patterns import problems as regex_problems
from shardmerge.spec import ModuleOrder, Parameter, TensorRef

Config = Mapping[str, Any]
Check = Callable[[str, Any], list[str]]
Registered = Callable[[str], tuple[str, ...]]
Stored = Callable[[str], tuple[Parameter, str] | None]
Ordered = Callable[[], "ModuleOrder | str"]

#: Settings that no method's merge depends on.
_INERT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "peft_type",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    }
)
#: Settings that are read here, for every method.
_COMMON = frozenset({"bias", "modules_to_save", "target_modules", "fan_in_fan_out"})
_WHOLE = re.compile(r"(?P<module>.+)\.(?P<parameter>[A-Za-z_]\w*)")
_SAVED = re.compile(r"\.modules_to_save(\.(?!weight$|bias$)[^.]+)?(?=\.)")
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
    #: Tells of a module's weight in the base, and its dtype; None where there is none.
    stored: Stored = lambda module: None
    #: How B of fused experts is laid out: ``peft`` or ``unsloth``.
    expert_layout: str = "peft"
    #: Tells of the base's Linear layers in the order of the model; a string says why it is not known.
    ordered: Ordered = no_order

    def in_base(self, module: str) -> bool:
        """Whether the base has a weight of that module."""
        return self.stored(module) is not None


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

    def covers(self, module: str, context: Context) -> bool:
        """Whether the config says that the module is one of the adapter's."""
        return is_target(module, context.config)

    def claim(self, tensors: Mapping[str, TensorRef], context: Context) -> Claims:
        """Check the config, group the factors by module, and have each module claimed."""
        config = context.config
        claims = Claims(problems=[*self._config_problems(config), *self.check_config(config)])
        if claims.problems:
            claims.refused = True
            return claims
        modules, shared = self.grouped(tensors)
        # Each is looked into for every module.
        lists = {key: config.get(key) for key in ("target_modules", "modules_to_save")}
        config = {**config, **{key: frozenset(of) for key, of in lists.items() if isinstance(of, list)}}
        context = dataclasses.replace(context, config=config, shared=shared)
        for module in modules:
            if self._complete(claims, module):
                self.claim_module(claims, module, context)
            if not self.covers(module_name(module.prefix.partition(".base_layer.")[0]), context):
                claims.problems.append(
                    f"adapter_config.json's target_modules do not cover {module.name}, for which the adapter has "
                    "tensors; PEFT would ignore them"
                )
        if modules:
            claims.told |= {ref.name for ref in shared.values() if 0 not in ref.shape}
        self.claim_rest(claims, tensors, config)
        return claims

    def grouped(self, tensors: Mapping[str, TensorRef]) -> tuple[list[Module], dict[str, TensorRef]]:
        """Modules with their factors, in the file's order, and the tensors that all of them share."""
        pattern, names = _key_pattern(tuple(self.roles.items()))
        modules: dict[tuple[str, str], Module] = {}
        shared: dict[str, TensorRef] = {}
        for name, ref in tensors.items():
            if role := self._shared_role(name):
                shared[role] = ref
            elif match := pattern.fullmatch(name):
                index = next(index for index in range(len(names)) if match[f"role{index}"] is not None)
                infix = match[f"adapter{index}"] or ""
                prefix = match["module"]
                # A wrapped layer within a wrapped one, as of nn.MultiheadAttention, has the wrapper in its name.
                plain = module_name(prefix).replace(".base_layer.", ".")
                module = modules.setdefault((prefix, infix), Module(plain, prefix, infix))
                module.factors[names[index]] = ref
        return list(modules.values()), shared

    def _shared_role(self, name: str) -> str | None:
        for key, role in self.shared_roles.items():
            if re.fullmatch(rf"(base_model\.)?(model\.)?{re.escape(key)}(\.[^.]+)?", name):
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
        problems = [f"{key}: {why}" for key, why in self.refused.items() if config.get(key)]
        known = _INERT | _COMMON | self.inert | self.settings.keys() | self.refused.keys()
        problems += [
            f"adapter_config.json: the key {key!r} is unknown to this version, and so is what it does to the weights; "
            "if it does nothing to them, remove it from the file"
            for key, value in config.items()
            if value and key not in known
        ]
        problems += [f"adapter_config.json: {text}" for text in self._setting_problems(config)]
        return problems

    def _setting_problems(self, config: Config) -> Iterator[str]:
        for key, check in self.settings.items():
            yield from check(key, config.get(key, MISSING))
        yield from _check_targets(config)
        saved = config.get("modules_to_save")
        if saved is not None and not is_strings(saved):
            yield f"modules_to_save must be a list of strings, found {reprlib.repr(saved)}"
        bias = config.get("bias")
        if bias is not None and not (isinstance(bias, str) and (bias in ("none", "all") or bias.endswith("_only"))):
            yield f"bias must be none, all or …_only, found {reprlib.repr(bias)}"


def _key_pattern(roles: tuple[tuple[str, str], ...]) -> tuple[re.Pattern[str], list[str]]:
    """``lora_A.weight`` matches itself and ``lora_A.<adapter>.weight``; ``ia3_l`` itself and ``ia3_l.<adapter>``."""
    parts, names = [], []
    for index, (key, role) in enumerate(roles):
        factor, dot, end = key.partition(".")
        parts.append(
            rf"(?P<role{index}>{re.escape(factor)}(?:\.(?P<adapter{index}>(?!weight$|bias$)[^.]+))?"
            rf"{re.escape(dot + end)})"
        )
        names.append(role.removesuffix("?"))
    return re.compile(rf"(?P<module>.+)\.(?:{'|'.join(parts)})"), names


# --- modules that were saved whole ------------------------------------------------------------------------------------


def claim_wholes(claims: Claims, tensors: Mapping[str, TensorRef], config: Config) -> None:
    """Whole tensors in place of the base's: ``modules_to_save``, trained biases, embeddings, wrapped base layers.

    Where the vocabulary was resized, PEFT writes all that a trained embedding's wrapper holds, beside the tensor
    itself: the copy under ``modules_to_save`` and the untrained original. It reads neither, and nor do we.
    """
    for name in claims.leftovers(tensors):
        if ".original_module." in name and _SAVED.sub("", name.replace(".original_module.", ".")) in tensors:
            claims.told.add(name)
            continue
        plain = _SAVED.sub("", name)
        if plain != name and plain in tensors:
            claims.told.add(name)
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
            factors = (("whole", tensors[name]),)
            claims.updates.append(ModuleUpdate(module, parameter, "replacement", factors, settings=settings))


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


def is_target(module: str, config: Config) -> bool:
    """Whether ``target_modules`` cover a module."""
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return True
    return matches(targets, module)


def matches(targets: str | Collection[str], module: str) -> bool:
    """Whether a module is named by a regular expression, or by one of a list of ends of names."""
    if isinstance(targets, str):
        return first_match([targets], module, "fullmatch") is not None
    return any(end in targets for end in _ends(module))


def _ends(name: str) -> Iterator[str]:
    """The name, and what is left of it after each of its dots."""
    while name:
        yield name
        name = name.partition(".")[2]


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
TEXT = checked(lambda value: isinstance(value, str), "a string")
STRINGS = checked(lambda value: isinstance(value, str) or is_strings(value), "a string or a list of strings")
SUBCONFIG = checked(lambda value: isinstance(value, dict), "a mapping of settings, or null")
ANYTHING = checked(lambda value: True, "anything")


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


def _check_targets(config: Config) -> list[str]:
    targets = config.get("target_modules")
    if isinstance(targets, str):
        wrong = regex_problems([targets]) if targets != "all-linear" else ()
        return [f"target_modules is no regular expression: {why}" for _, why in wrong]
    if targets is None or is_strings(targets):
        return []
    return [f"target_modules must be a string or a list of strings, found {reprlib.repr(targets)}"]
