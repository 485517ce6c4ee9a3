"""The configurations that `tools.digests` merges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tools.digest_tables import ADAPTERS, METHODS


@dataclass(frozen=True)
class Case:
    """One configuration: what is merged, and what it ends with.

    ``adapters`` are names, or pairs of a name and an entry's other keys. ``options`` are other sections of the config.
    ``export`` are arguments of an export of the merged model, or of the base where there are no adapters.
    ``exit`` is the expected exit code.
    """

    name: str
    base: str
    adapters: tuple[str | tuple[str, Mapping[str, Any]], ...] = ()
    output: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    export: tuple[str, ...] = ()
    exit: int = 0

    def adapter_names(self) -> list[str]:
        return [entry if isinstance(entry, str) else entry[0] for entry in self.adapters]


def _case(name: str, base: str, *adapters: Any, exit: int = 0, export: str = "", **sections: Any) -> Case:
    output = sections.pop("output", {})
    return Case(name, base, adapters, output, sections, tuple(export.split()), exit)


def _dtypes() -> list[Case]:
    """Dtypes of base, sums and output; and how they are rounded."""
    rows: list[tuple[str, str, dict[str, Any]]] = [
        ("f32", "float32", {}),
        ("f32", "float64", {}),
        ("f32", "bfloat16", {}),
        ("f32", "float32", {"dtype": "bfloat16"}),
        ("f32", "float64", {"dtype": "float16"}),
        ("f32", "float32", {"dtype": "bfloat16", "rounding": "stochastic", "seed": 7}),
        ("f16", "float32", {}),
        ("f16", "float64", {"dtype": "bfloat16"}),
        ("f16", "bfloat16", {"dtype": "float32"}),
        ("f16", "float64", {"rounding": "stochastic", "seed": 3}),
        ("bf16", "float32", {}),
        ("bf16", "bfloat16", {}),
        ("bf16", "float64", {"dtype": "float32"}),
        ("bf16", "float32", {"dtype": "float16", "sha256": True}),
        ("bf16", "float32", {"rounding": "stochastic"}),
    ]
    found = []
    for base, compute, output in rows:
        end = "-".join(str(value) for key, value in output.items() if key != "sha256")
        name = f"dtype-{base}-{compute}{'-to-' if end else ''}{end}"
        found.append(_case(name, f"llama-{base}", "lora", output=output, compute={"dtype": compute}))
    return found


def _methods() -> list[Case]:
    return [_case(f"method-{name}", ADAPTERS[name].base, name) for name in METHODS]


#: Settings of LoRA, places of its weights, and architectures: an adapter on the base that it was made on.
_PLAIN = (
    "lora-odd", "rslora", "patterns", "dora", "dora-embedding", "lora-bias", "bias-all", "saved", "embedding", "tokens",
    "more-tokens", "kasa", "lora-bin", "gemma3", "phi3", "phi3-dora", "gpt2", "gpt2-dora", "gpt2-hira", "bert", "t5",
    "mixtral", "mixtral-down", "qwen3-moe", "qwen3-moe-experts", "qwen3-moe-fused", "gpt-oss", "llama4", "deepseek-v3",
    "nomic-bert", "net", "net-dora", "net-loha", "net-lokr", "kohya", "mlx", "mlx-dora", "hand",
)  # fmt: skip


def _plain() -> list[Case]:
    return [_case(name, ADAPTERS[name].base, name) for name in _PLAIN]


def _more_places() -> list[Case]:
    """The same adapters on bases that are stored otherwise, and the formats that need more of a config."""
    return [
        _case("bf16-dora", "llama-bf16", "dora"),
        _case("bf16-embedding", "llama-bf16", "embedding"),
        _case("f16-oft", "llama-f16", "oft"),
        _case("bf16-ia3", "llama-bf16", "ia3"),
        _case("bf16-loha", "llama-bf16", "loha"),
        _case("bf16-net", "net-bf16", "net"),
        _case("experts-apart-on-fused", "mixtral-fused", "mixtral"),
        _case("experts-fused-on-apart", "qwen3-moe", "qwen3-moe-fused"),
        _case("pure-alpha", "small", ("pure", {"alpha": 12})),
        _case("pure-scaling", "small", ("pure", {"format": "pure-pytorch", "scaling": 0.7})),
        _case("mixed", "mixed", "hand"),
        _case("mixed-to-bf16", "mixed", "hand", output={"dtype": "bfloat16", "max_shard_size": "100KB"}),
    ]


def _ties() -> list[Case]:
    """Ties that are undone, and kept as PEFT keeps them."""
    found = [
        _case(f"{name}-{tied}", "llama-tied", name, tied=tied)
        for name in ("tied-embedding", "tied-head", "tied-saved")
        for tied in ("auto", "untie", "peft")
    ]
    return [*found, _case("qwen2-head", "qwen2-tied", "qwen2-head"), _case("tied-lora", "llama-tied", "lora")]


def _several() -> list[Case]:
    """Several adapters, with weights."""
    return [
        _case("two", "llama-f32", "lora", ("lora-2", {"weight": 0.4})),
        _case("two-bf16", "llama-bf16", ("lora-2", {"weight": -1.5}), ("lora", {"weight": 0.3})),
        _case("three-methods", "llama-f32", "loha", "rslora", ("lokr", {"weight": 0.5})),
        _case("lora-then-oft", "llama-f32", "lora", "oft"),
        _case("twice-saved", "llama-f32", "saved", ("lora-2", {"weight": 2})),
    ]


def _shards() -> list[Case]:
    """Shards as the base has them, smaller and larger ones; exports."""
    return [
        _case("shards-same", "llama-shards", "lora"),
        _case("shards-small", "llama-f32", "lora", output={"max_shard_size": "60KB"}),
        _case("shards-tiny", "llama-shards", "lora", output={"max_shard_size": 20_000}),
        _case("shards-joined", "llama-shards", "lora", output={"max_shard_size": "5GB"}),
        _case("shards-experts", "mixtral", "mixtral", output={"max_shard_size": "30KB", "dtype": "float32"}),
        _case("export-base", "llama-shards", export="--dtype float32 --max-shard-size 150KB"),
        _case("export-merged", "llama-f32", "lora", export="--dtype bfloat16"),
        _case("export-gguf", "llama-spm", "llama-spm", export="--format gguf --quantization q5_1"),
    ]


def _least(memory: str) -> dict[str, Any]:
    """Slightly more than the least memory in which a case can be merged, so that buffers and tiles are small."""
    return {"max_memory": memory}


def _tiles() -> list[Case]:
    """Tensors of several tiles, in several buffers."""
    stochastic = {"rounding": "stochastic", "seed": 5}
    return [
        _case("tiles", "tall", "tall", compute=_least("11.5MB")),
        _case(
            "tiles-f32",
            "tall",
            "tall",
            output={"dtype": "float32", "max_shard_size": "700KB"},
            compute=_least("11.5MB"),
        ),
        _case("tiles-stochastic", "tall", "tall", output=stochastic, compute=_least("13.8MB")),
        _case("tiles-and-auto", "tall", "tall"),
        _case("large", "large", "large"),
        _case("large-stochastic", "large", "large", output=stochastic),
        _case("large-in-little", "large", "large", output={"max_shard_size": "20MB"}, compute=_least("14.9MB")),
        _case("large-float64", "large", "large", compute={"dtype": "float64", **_least("20.6MB")}),
    ]


def _gguf() -> list[Case]:
    """One GGUF file, in every type and of several architectures."""
    types = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
    rows = [("llama", kind) for kind in types]
    rows += [("qwen2", "q8_0"), ("qwen2", "q4_1"), ("gemma2", "q8_0"), ("gemma3", "f16"), ("gemma3", "q5_0")]
    rows += [("phi3", "q8_0"), ("mixtral", "q8_0"), ("mixtral", "q4_0"), ("mixtral", "bf16")]
    found = [
        _case(f"gguf-{of}-{kind}", f"{of}-spm", f"{of}-spm", output={"format": "gguf", "quantization": kind})
        for of, kind in rows
    ]
    rounded = {"format": "gguf", "quantization": "q8_0", "dtype": "bfloat16"}
    return [*found, _case("gguf-rounded", "llama-spm", "llama-spm", output=rounded)]


def _refusals() -> list[Case]:
    return [
        _case("refused-dtype", "llama-f64", "lora", exit=3),
        _case("refused-method", "small", "prompt", exit=3),
        _case("refused-base", "small", "kohya", exit=3),
        _case("refused-pickled-base", "small-bin", "hand", exit=4),
        _case("refused-scale", "small", "pure", exit=3),
        _case("refused-key", "small", "hand", output={"speed": 2}, exit=2),
    ]


CASES = [
    *_dtypes(), *_methods(), *_plain(), *_more_places(), *_ties(), *_several(), *_shards(), *_tiles(), *_gguf(),
    *_refusals(),
]  # fmt: skip
