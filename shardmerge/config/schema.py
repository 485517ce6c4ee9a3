"""The config: the keys of a merge, with their defaults and descriptions, validated.

Relative paths are relative to the working directory, as on every command line. Sizes are bytes: ``5GB`` is 5·10⁹ (the
Hub's and transformers' meaning), ``5GiB`` is 5·2³⁰.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from shardmerge.config import suggestions
from shardmerge.config.choices import DEVICE, Format, OutputDtype, Quantization, Quantized
from shardmerge.config.problems import brief as _brief
from shardmerge.config.problems import explain, without_effect
from shardmerge.config.yaml_text import DECIMAL, TOO_LARGE, override, parse_mapping, read_text
from shardmerge.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

#: Of one merge: each is looked for, opened and matched.
MAX_ADAPTERS = 256
#: Threads that compute. No machine has more cores.
MAX_THREADS = 1024
#: Problems that are listed one by one.
_LISTED = 30
_SIZE = re.compile(r"((?:0|[1-9][0-9]*)(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE | re.ASCII)
_PREFIXES = "KMGT"
_SIZE_EXPECTED = "a size such as 256MB"


def parse_size(value: Any) -> int:
    """``"256MB"``, ``"1.5 GiB"`` or a number of bytes → bytes. `ValueError` otherwise."""
    match = _SIZE.fullmatch(str(value).strip()) if isinstance(value, (str, float)) else None
    if isinstance(value, int) and not isinstance(value, bool):
        size = float(min(value, TOO_LARGE))
    elif match is not None:
        number, prefix, binary = match.groups()
        base = 1024 if binary else 1000
        size = float(number) * base ** (_PREFIXES.index(prefix.upper()) + 1 if prefix else 0)
        if not prefix and not size.is_integer():
            size = math.nan
    else:
        size = math.nan
    if not 1 <= size < TOO_LARGE:
        raise ValueError(
            f"{_brief.repr(value)} is not a size; write for example 256MB, 5GB, 1.5GiB or a number of bytes, above zero"
        )
    return round(size)


def _parse_count(value: Any) -> int:
    """A number from 1 to `MAX_THREADS`. `ValueError` otherwise."""
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() and len(value) < 10 else value
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= MAX_THREADS:
        raise ValueError(f"{_brief.repr(value)} is not a number from 1 to {MAX_THREADS}")
    return number


def _or(word: str, parse: Callable[[Any], int], expected: str) -> BeforeValidator:
    """The ``word``, or what ``parse`` reads."""

    def read(value: Any) -> Any:
        if value == word:
            return value
        if value is None:
            raise ValueError(f"expected {expected}, or {word}")
        try:
            return parse(value)
        except ValueError as error:
            hint = suggestions.hint(value, (word,))
            raise ValueError(f"{error}, or {word}" + (f"; {hint}" if hint else "")) from None

    return BeforeValidator(read)


def _plain_number(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, str) and not DECIMAL.fullmatch(value.strip())):
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
        description="How lora_B of fused experts is laid out: rank by rank, as PEFT's, or expert by expert, as that of "
        "Unsloth's trainer until September 2026. The shapes are the same. auto follows adapter_config.json, else PEFT; "
        "an adapter of Unsloth's trainer that does not state its layout is refused.",
    )
    prefix: str | None = Field(
        default=None,
        description="For an adapter for several models: only tensors whose names begin with the prefix are merged. "
        "Where the base has no modules by the whole names, the prefix is removed.",
    )
    ignore_files: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        description="Files of weights in the adapter's directory, by their exact names, that are not merged. All other "
        "files of weights are merged or refused.",
    )
    ignore_keys: tuple[str, ...] = Field(
        default=(),
        description="Keys of PEFT's adapter_config.json that this version does not know and that do nothing to the "
        "weights. Other unknown keys are refused.",
    )
    alpha: _Number | None = Field(
        default=None,
        description="The alpha of an adapter without a config, or whose config has lora_alpha: 0; the scaling is "
        "alpha / rank.",
    )
    scaling: _Number | None = Field(default=None, description="The scaling of an adapter without a config.")

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

    path: str = Field(
        min_length=1,
        description="A directory: a new or an empty one, or one with an unfinished merge of the same config.",
    )
    dtype: OutputDtype = Field(
        default="same",
        description="What F32, F16 and BF16 weights are stored in. With format: gguf, what merged weights are rounded "
        "to before they are quantised.",
    )
    max_shard_size: Annotated[Literal["same"] | int, _or("same", parse_size, _SIZE_EXPECTED)] = Field(
        default="same", description="same keeps the base's shards; a size such as 5GB makes new ones."
    )
    rounding: Literal["nearest", "stochastic"] = Field(
        default="nearest",
        description="How updated weights are rounded. stochastic rounds up or down at random, in proportion, so that "
        "an update below the dtype's resolution is kept on average; the same seed gives the same bytes.",
    )
    seed: _Whole = Field(default=0, ge=0, lt=TOO_LARGE, description="The seed of stochastic rounding.")
    format: Format = Field(
        default="safetensors",
        description="A checkpoint, or one file for llama.cpp and Ollama (most tokenizers then need `pip install "
        "tokenizers`).",
    )
    quantization: Quantization = Field(
        default="q8_0", description="GGUF quantization type of most weights (only with format: gguf)."
    )
    quantized: Quantized = Field(
        default="auto",
        description="What becomes of a quantised base. mixed stores what is updated, and what programs fuse with it, "
        "in 16 bits, and keeps the bytes of all else; dense stores everything in 16 bits; same rounds what is updated "
        "to the base's own codes, which loses most of a small update (rounding: stochastic keeps it on average). auto "
        "is mixed where programs that load the format follow its list of exceptions, else dense.",
    )
    allow_config_loss: bool = Field(
        default=False,
        description="Write a GGUF file although llama.cpp ignores settings of config.json, and so computes something "
        "else than transformers; a note names each of them.",
    )
    sha256: bool = Field(
        default=False, description="Record the sha256 of every file of the output, too; xxh3_128 is always recorded."
    )


class ComputeConfig(_Section):
    """The device, the dtype and the memory of the computation."""

    device: str = Field(default="auto", pattern=DEVICE, description="auto, cpu, cuda or cuda:1.")
    dtype: Literal["float32", "float64", "bfloat16"] = Field("float32", description="W + ΔW is computed in this.")
    max_memory: Annotated[Literal["auto"] | int, _or("auto", parse_size, _SIZE_EXPECTED)] = Field(
        default="auto", description="The working set above the interpreter's own memory, for example 256MB."
    )
    threads: Annotated[Literal["auto"] | int, _or("auto", _parse_count, "a number")] = Field(
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
        description="What happens where the base ties weights (its output head to the input embedding, say) and an "
        "adapter updates one. untie writes each, so that the merged model computes what base and adapter computed; "
        "peft adds everything to the one tensor, as PEFT's merge; auto unties, and where the architecture is not known "
        "refuses until one is chosen, unless the right one is certain.",
    )
    base_rounding: Literal["none", "nf4", "nf4-single"] = Field(
        default="none",
        description="For adapters that were trained with QLoRA on a base that was loaded in 4 bits: every updated "
        "weight that training had quantised is rounded through NF4 before the update is added, as bitsandbytes did it. "
        "nf4 is with double quantization (bnb_4bit_use_double_quant: true), nf4-single without.",
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
        for text in overrides:
            override(found, text)
        if compute and isinstance(found.setdefault("compute", {}), dict):
            found["compute"] = {**compute, **found["compute"]}
        return cls.validated(found, where, without_effect(found))

    @classmethod
    def validated(cls, value: Mapping[str, Any], where: str, idle: Sequence[str] = ()) -> Self:
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
        return cls.from_dict(parse_mapping(text, where, cls.model_fields), where, overrides, compute)


class ExportConfig(MergeConfig):
    """A checkpoint written anew, in another dtype, other shards or another format, without an adapter."""

    adapters: tuple[AdapterConfig, ...] = ()


def _with_list(value: dict[str, Any]) -> dict[str, Any]:
    """The only adapter need not stand in a list."""
    alone = isinstance(value.get("adapters"), (str, dict))
    return {**value, "adapters": [value["adapters"]]} if alone else value


def load_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file; `ConfigError` where the file is something else."""
    return parse_mapping(read_text(path), str(path), MergeConfig.model_fields)
