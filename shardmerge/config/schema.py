"""The config: YAML and ``-s key=value`` → a validated `MergeConfig`.

Relative paths are relative to the working directory, as on every command line. Sizes are bytes: ``5GB`` is 5·10⁹ (the
Hub's and transformers' meaning), ``5GiB`` is 5·2³⁰.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from shardmerge.config import suggestions
from shardmerge.config.choices import DEVICE, Format, OutputDtype, Quantization
from shardmerge.config.problems import brief as _brief
from shardmerge.config.problems import explain, without_effect
from shardmerge.errors import ConfigError
from shardmerge.system.regular_files import TooLargeError, read_small

if TYPE_CHECKING:
    from typing_extensions import Self

#: A thousand adapters need less, and what is longer keeps PyYAML busy for long.
MAX_CONFIG_BYTES = 100_000
#: Of one merge: each is looked for, opened and matched.
MAX_ADAPTERS = 256
#: Threads that compute. No machine has more cores.
MAX_THREADS = 1024
#: Problems that are told one by one.
_LISTED = 30
#: How a number is written here. YAML 1.1 has others, which mean something else to YAML 1.2: 0777, 1:30, 1_000.
_DECIMAL = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_DIGITS = 20
_SIZE = re.compile(r"((?:0|[1-9][0-9]*)(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE | re.ASCII)
_PREFIXES = "KMGT"
_TOO_LARGE = 1 << 63
_LONGEST = 1000


def parse_size(value: Any) -> int:
    """``"256MB"``, ``"1.5 GiB"`` or a number of bytes → bytes. `ValueError` otherwise."""
    match = _SIZE.fullmatch(str(value).strip()) if isinstance(value, (str, float)) else None
    if isinstance(value, int) and not isinstance(value, bool):
        size = float(min(value, _TOO_LARGE))
    elif match is not None:
        number, prefix, binary = match.groups()
        base = 1024 if binary else 1000
        size = float(number) * base ** (_PREFIXES.index(prefix.upper()) + 1 if prefix else 0)
        if not prefix and not size.is_integer():
            size = math.nan
    else:
        size = math.nan
    if not 1 <= size < _TOO_LARGE:
        raise ValueError(
            f"{_brief.repr(value)} is no size; write for example 256MB, 5GB, 1.5GiB or a number of bytes, above zero"
        )
    return round(size)


def _size_or(word: str) -> BeforeValidator:
    def size(value: Any) -> Any:
        if value == word:
            return value
        if value is None:
            raise ValueError(f"expected a size such as 256MB, or {word}")
        try:
            return parse_size(value)
        except ValueError as error:
            hint = suggestions.hint(value, (word,))
            raise ValueError(f"{error}, or {word}" + (f"; {hint}" if hint else "")) from None

    return BeforeValidator(size)


def _count_or(word: str) -> BeforeValidator:
    def count(value: Any) -> Any:
        if value == word:
            return value
        if value is None:
            raise ValueError(f"expected a number, or {word}")
        number = int(value) if isinstance(value, str) and value.strip().isdecimal() and len(value) < 10 else value
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= MAX_THREADS:
            hint = suggestions.hint(value, (word,))
            problem = f"{_brief.repr(value)} is not a number from 1 to {MAX_THREADS}, or {word}"
            raise ValueError(problem + (f"; {hint}" if hint else ""))
        return number

    return BeforeValidator(count)


def _plain_number(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, str) and not _DECIMAL.fullmatch(value.strip())):
        raise ValueError("expected a number, in decimal digits")
    return value


#: A number; YAML takes 1e-3 for text, so text that is a number will do.
_Number = Annotated[float, BeforeValidator(_plain_number)]
_Whole = Annotated[int, BeforeValidator(_plain_number)]


def _some(value: tuple[Any, ...]) -> tuple[Any, ...]:
    # Not min_length, which complains about an empty tuple wherever an item is wrong.
    if not value:
        raise ValueError("there must be at least one adapter")
    if len(value) > MAX_ADAPTERS:
        raise ValueError(f"there are {len(value):,} adapters; at most {MAX_ADAPTERS} are merged at once")
    return value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AdapterConfig(_Section):
    """One adapter, in the order in which they are applied."""

    path: str = Field(min_length=1, description="A directory, a file, or a Hub id (org/name or org/name@revision).")
    weight: _Number = Field(default=1.0, description="Multiplies the adapter's own scaling.")
    format: Literal["auto", "peft", "pure-pytorch", "kohya", "mlx"] = Field(
        default="auto", description="How the adapter is stored."
    )
    expert_layout: Literal["auto", "peft", "unsloth"] = Field(
        default="auto",
        description="How lora_B of fused experts is laid out: rank by rank as PEFT does it, or expert by expert as "
        "Unsloth's trainer did until September 2026. The shapes are the same. auto is what adapter_config.json says, "
        "and where it says nothing, as PEFT does it; what Unsloth made and does not say is refused.",
    )
    prefix: str | None = Field(
        default=None,
        description="Only tensors whose names begin so are merged: of an adapter for several models, those for this "
        "base. Where the base has no modules by the whole names, they are looked for without it.",
    )
    ignore_files: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        description="Files of weights in the adapter's folder, by their exact names, that are no part of what is "
        "merged. All others are merged or refused.",
    )
    ignore_keys: tuple[str, ...] = Field(
        default=(),
        description="Keys of PEFT's adapter_config.json that are unknown to this version and do nothing to the "
        "weights, as whoever made the adapter says.",
    )
    alpha: _Number | None = Field(
        default=None,
        description="For an adapter that carries no config, or one that says lora_alpha: 0: its alpha; the scaling is "
        "alpha / rank.",
    )
    scaling: _Number | None = Field(default=None, description="For an adapter that carries no config: its scaling.")

    @model_validator(mode="before")
    @classmethod
    def _bare_string(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_scale(self) -> AdapterConfig:
        if self.alpha is not None and self.scaling is not None:
            raise ValueError("give alpha or scaling, not both (scaling is alpha / rank)")
        return self


class OutputConfig(_Section):
    """Where the merged model goes, and how it is stored."""

    path: str = Field(min_length=1, description="A directory. It must be empty or not exist yet.")
    dtype: OutputDtype = Field(
        default="same",
        description="What floating-point weights are stored in. With format: gguf, what merged weights are rounded to "
        "before they are quantised.",
    )
    max_shard_size: Annotated[Literal["same"] | int, _size_or("same")] = Field(
        default="same", description="same keeps the base's shards; a size such as 5GB shards anew."
    )
    rounding: Literal["nearest", "stochastic"] = Field(
        default="nearest",
        description="How updated weights are rounded. stochastic goes up or down by chance, so that an update below "
        "the dtype's resolution is kept on average; the same seed gives the same bytes.",
    )
    seed: _Whole = Field(default=0, ge=0, lt=_TOO_LARGE, description="Of stochastic rounding.")
    format: Format = Field(
        default="safetensors",
        description="A checkpoint, or one file for llama.cpp and Ollama (most tokenizers then need `pip install "
        "tokenizers`).",
    )
    quantization: Quantization = Field(
        default="q8_0", description="What most weights of a GGUF file are stored in; only with format: gguf."
    )
    allow_config_loss: bool = Field(
        default=False,
        description="Write a GGUF file though llama.cpp does not know settings of config.json, and so computes "
        "something else than transformers does; a note names each of them.",
    )
    sha256: bool = Field(
        default=False, description="Write down the sha256 of every shard, too; xxh3_128 is always written down."
    )


class ComputeConfig(_Section):
    """Where and in what the sums are done."""

    device: str = Field(default="auto", pattern=DEVICE, description="auto, cpu, cuda or cuda:1.")
    dtype: Literal["float32", "float64", "bfloat16"] = Field("float32", description="W + ΔW is computed in this.")
    max_memory: Annotated[Literal["auto"] | int, _size_or("auto")] = Field(
        default="auto", description="The working set above the interpreter's own memory, for example 256MB."
    )
    threads: Annotated[Literal["auto"] | int, _count_or("auto")] = Field(
        default="auto",
        description="Threads that compute, each with a work space. auto is one a core, as far as max_memory allows. "
        "The result does not depend on it.",
    )


def checked_compute(key: str, value: Any) -> Any:
    """A value of the section ``compute`` as the config holds it. `ConfigError` where it is wrong."""
    try:
        return getattr(ComputeConfig.model_validate({key: value}), key)
    except ValidationError as error:
        raise ConfigError("; ".join(explain(item, ComputeConfig) for item in error.errors())) from None


class MergeConfig(_Section):
    """A merge: what `shardmerge run` reads from YAML."""

    base: str = Field(
        min_length=1,
        description="A directory, a .safetensors file, a Hub id, or auto: what the adapter was trained on.",
    )
    adapters: Annotated[tuple[AdapterConfig, ...], AfterValidator(_some)]
    output: OutputConfig
    tied: Literal["auto", "untie", "peft"] = Field(
        default="auto",
        description="Where the base ties weights, its output head to the input embedding say, and an adapter updates "
        "one of them: untie writes each, so that the merged model computes what base and adapter computed; peft does "
        "as PEFT's merge does; auto unties, and where the architecture is not known refuses until one is chosen.",
    )
    compute: ComputeConfig = Field(default_factory=lambda: ComputeConfig.model_validate({}))

    @model_validator(mode="before")
    @classmethod
    def _one_adapter(cls, value: Any) -> Any:
        return _with_list(value) if isinstance(value, dict) else value

    @classmethod
    def from_dict(
        cls,
        value: Mapping[str, Any],
        where: str = "config",
        overrides: Sequence[str] = (),
        compute: Mapping[str, Any] | None = None,
    ) -> Self:
        """Validate a mapping, with ``key.path=value`` overrides on top.

        ``compute`` has values of that section for keys of which neither says anything. `ConfigError` lists everything
        that is wrong, and settings that have no effect.
        """
        found = _with_list(dict(value))
        for override in overrides:
            _override(found, override)
        if compute and isinstance(found.setdefault("compute", {}), dict):
            found["compute"] = {**compute, **found["compute"]}
        return cls._validated(found, where, without_effect(found))

    @classmethod
    def _validated(cls, value: Mapping[str, Any], where: str, idle: Sequence[str] = ()) -> Self:
        problems: list[str] = []
        try:
            config = cls.model_validate(dict(value))
        except ValidationError as error:
            problems = [explain(item, cls) for item in error.errors()]
        problems += idle
        if not problems:
            return config
        if len(problems) > _LISTED:
            problems[_LISTED:] = [f"… and {len(problems) - _LISTED} more"]
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{where}: the config is wrong; nothing was written:\n{listed}", problems)

    @classmethod
    def from_file(
        cls, path: str | Path, overrides: Sequence[str] = (), compute: Mapping[str, Any] | None = None
    ) -> Self:
        """`from_dict` of a YAML file."""
        return cls.from_dict(load_yaml(Path(path)), str(path), overrides, compute)

    @classmethod
    def from_text(
        cls,
        text: bytes,
        overrides: Sequence[str] = (),
        compute: Mapping[str, Any] | None = None,
        where: str = "config",
    ) -> Self:
        """`from_dict` of a YAML text, of at most `MAX_CONFIG_BYTES`."""
        return cls.from_dict(_mapping(text, where), where, overrides, compute)


class ExportConfig(MergeConfig):
    """A checkpoint written anew, in another dtype, other shards or another format, without an adapter."""

    adapters: tuple[AdapterConfig, ...] = ()


def recorded_config(value: Any, where: str) -> MergeConfig:
    """The config in a record: of a merge, or of an export, which has no adapter. Raises `ConfigError`."""
    found = value if isinstance(value, dict) else {}
    # A record has every key, also those that the merge had no use for.
    return (ExportConfig if found.get("adapters") == [] else MergeConfig)._validated(found, where)


def relocated(config: MergeConfig, record: Mapping[str, Any], base: str | None, adapters: Sequence[str]) -> MergeConfig:
    """A recorded config with base and adapters where the merge found them, or where ``base`` and ``adapters`` say.

    `ConfigError` where ``adapters``, which are all of them, are not as many as were merged.
    """
    if adapters and len(adapters) != len(config.adapters):
        raise ConfigError(
            f"{len(adapters)} adapters are given, but {len(config.adapters)} were merged: give a place for each, in "
            "their order"
        )
    infos = record.get("adapters")
    places: list[str | None] = list(adapters) or [_place(info) for info in (infos if isinstance(infos, list) else [])]
    entries = tuple(
        entry.model_copy(update={"path": place}) if place else entry
        for entry, place in itertools.zip_longest(config.adapters, places[: len(config.adapters)])
    )
    return config.model_copy(update={"base": base or _place(record.get("base")) or config.base, "adapters": entries})


def _place(info: Any) -> str | None:
    """Where a base or an adapter was found: an absolute path, or a Hub id with the commit."""
    location = info.get("location") if isinstance(info, dict) else None
    if not isinstance(location, str) or not location:
        return None
    revision = info.get("revision")
    return f"{location}@{revision}" if revision else location


def _with_list(value: dict[str, Any]) -> dict[str, Any]:
    """The only adapter need not stand in a list."""
    alone = isinstance(value.get("adapters"), (str, dict))
    return {**value, "adapters": [value["adapters"]]} if alone else value


# --- YAML -------------------------------------------------------------------------------------------------------------


#: What is a word here, and to YAML 1.1 a date or a flag. Where a flag is expected, yes and on are read as one later.
_WORDS = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:bool")


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that makes of a value what stands there, and refuses a key given twice.

    YAML would let the last one win without a word, and make the number 90 of 1:30, and ``true`` of a folder's name, on.
    """


def _resolvers() -> dict[Any, Any]:
    """By first letter what a plain word may be, as PyYAML has it, without dates, and with flags by two words."""
    resolvers = {
        letter: [item for item in items if item[0] not in _WORDS]
        for letter, items in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for letter in "tTfF":
        resolvers[letter].append((_WORDS[1], re.compile("(?:true|True|TRUE|false|False|FALSE)$")))
    return resolvers


def _construct_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    # Merge keys (<<) are not obeyed: nested, they grow without bound, and a config has no use for them.
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
            raise _refusal("a key must be a plain word", key_node)
        key = loader.construct_object(key_node)
        if key in result:
            raise _refusal(f"the key {_brief.repr(key)} stands twice", key_node)
        result[key] = loader.construct_object(value_node, deep=True)
    return result


def _construct_int(loader: _UniqueKeyLoader, node: yaml.ScalarNode) -> int:
    if not _DECIMAL.fullmatch(node.value) or "." in node.value:
        raise _refusal(_not_decimal(node.value), node)
    # So many digits as Python neither reads nor prints.
    if len(node.value) > _DIGITS or not -_TOO_LARGE <= (value := int(node.value)) < _TOO_LARGE:
        raise _refusal("a whole number must fit into 64 bits", node)
    return value


def _construct_float(loader: _UniqueKeyLoader, node: yaml.ScalarNode) -> float:
    if not _DECIMAL.fullmatch(node.value):
        raise _refusal(_not_decimal(node.value), node)
    return float(node.value)


def _not_decimal(text: str) -> str:
    """What is said of 0777, 0x1F, 1_000, 1:30 and .inf, which are other numbers, or texts, to other readers of YAML."""
    return f"{_brief.repr(text)} is not a plain decimal number; write one, or put it into quotes if it is a text"


def _refusal(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_UniqueKeyLoader.yaml_implicit_resolvers = _resolvers()


def _parse(text: str | bytes, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        # PyYAML lets what int(), datetime() and the like raise pass through.
        raise ConfigError(f"{where}: not valid YAML: {str(error)[:_LONGEST]}") from None


def load_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file; `ConfigError` where it is none."""
    try:
        text = read_small(path, MAX_CONFIG_BYTES)
    except TooLargeError:
        raise ConfigError(f"{path}: over {MAX_CONFIG_BYTES} bytes long; this is no config") from None
    except OSError as error:
        there = "" if path.is_absolute() else f" (in {os.getcwd()})"
        raise ConfigError(f"{path}: the config cannot be read: {error.strerror}{there}") from None
    return _mapping(text, str(path))


def _mapping(text: bytes, where: str) -> dict[str, Any]:
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{where}: over {MAX_CONFIG_BYTES} bytes long; this is no config")
    value = _parse(text, where)
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: a config is a mapping with the keys {', '.join(MergeConfig.model_fields)}")
    return value


def _override(value: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise ConfigError(f"-s {override}: write it as key.path=value, for example output.path=/mnt/merged")
    new = _parse(text, f"-s {dotted}")
    *folders, last = dotted.split(".")
    place: Any = value
    for step in folders:
        place = _step(place, step, override)
    if isinstance(place, list):
        place[_list_index(place, last, override)] = new
    elif isinstance(place, dict):
        place[last] = new
    else:
        raise ConfigError(f"-s {override}: {'.'.join(folders)} is no section of the config")


def _step(place: Any, step: str, override: str) -> Any:
    if isinstance(place, list):
        index = _list_index(place, step, override)
        if isinstance(place[index], str):  # the short form of an adapter
            place[index] = {"path": place[index]}
        return place[index]
    if isinstance(place, dict):
        if place.get(step) is None:
            place[step] = {}
        return place[step]
    raise ConfigError(f"-s {override}: nothing can be set below {step!r}")


def _list_index(place: list[Any], step: str, override: str) -> int:
    if not step.isdecimal() or int(step) >= len(place):
        raise ConfigError(f"-s {override}: {step!r} is no number from 0 to {len(place) - 1}")
    return int(step)
