"""Suggestions for unknown values, from the names that other programs have for the same thing.

A guess is printed and never acted upon. A dtype or a quantization that is known, but not allowed at its place, gets no
guess by its letters: float16 is not a misspelt bfloat16.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence

#: Names of one thing. The first that is allowed at a place is what was meant there.
_SAME: tuple[tuple[str, ...], ...] = (
    ("bfloat16", "bf16", "bfloat", "brain", "b16"),
    ("float16", "f16", "fp16", "half"),
    ("float32", "f32", "fp32", "float", "single", "full"),
    ("float64", "f64", "fp64", "double"),
    ("q8_0", "q8", "int8", "8bit", "i8"),
    ("q4_0", "q4", "int4", "4bit"),
    ("q5_0", "q5", "5bit"),
    ("cuda", "gpu", "nvidia", "rocm", "hip"),
    ("cpu", "host"),
    ("safetensors", "safetensor", "st", "hf", "huggingface", "transformers", "pytorch", "torch", "bin", "checkpoint"),
    ("gguf", "ggml", "llama.cpp", "llama_cpp", "llamacpp", "ollama"),
    ("peft", "lora", "hf_peft"),
    ("kohya", "sd_scripts", "kohya_ss", "lycoris", "a1111", "comfyui", "webui"),
    ("pure_pytorch", "pytorch", "torch", "pt", "pth"),
    ("mlx", "mlx_lm"),
    ("stochastic", "random", "sr"),
    ("nearest", "round", "rne", "even", "default"),
    ("untie", "untied", "no", "false"),
    ("same", "keep", "base", "auto", "original", "none"),
    ("auto", "default", "same", "detect", "none"),
)
#: Those of numbers and devices, and words that could mean either: none of these is a misspelling.
_KNOWN = (*_SAME[:9], ("mps", "tpu", "xpu", "npu", "hpu", "metal", "vulkan", "directml"), ("tied", "tie"))
_NUMBERED = re.compile(r"(?:cuda|gpu|nvidia)[ :_-]*0*(\d{1,2})")
_K_QUANT = re.compile(r"(i?q\d_?(k|xxs|xs|s|m|nl|l)(_[a-z]+)?|tq\d_\d|mxfp4.*|nvfp4.*)")
_PACKED = re.compile(r"(u?int[248]|nf4|fp4|fp8.*|float8.*|[248]_?bit|gptq.*|awq.*|bnb.*|i?q\d.*|k_?quant.*)")
_GGUF_OF_A_TYPE = re.compile(r"(?:gguf|ggml)[ :_-]+(.+)")
_BY_LLAMA_CPP = (
    "llama.cpp's llama-quantize makes this type: write a file with output.format: gguf and output.quantization: f16, "
    "then run llama-quantize on it"
)
_BY_GGUF = "numbers of so few bits are written with output.format: gguf and output.quantization, for example q8_0"


def hint(value: object, allowed: Sequence[str], key: str = "", types: Sequence[str] = ()) -> str:
    """``did you mean bfloat16?``, or what to do instead; empty where nothing is known of the value.

    ``key`` is what the value was given for, by its dotted path; ``types`` are the quantizations of a GGUF file.
    """
    if not isinstance(value, (str, bool)) or len(str(value)) > 80:
        return ""
    word = _word(value)
    if key == "output.format" and (match := _GGUF_OF_A_TYPE.fullmatch(word)):
        kind = meant(match[1], types)
        if _K_QUANT.fullmatch(match[1]):
            return _BY_LLAMA_CPP
        return f"write format: gguf and quantization: {kind}" if kind else "did you mean gguf?"
    if key in ("output.quantization", "output.dtype") and _K_QUANT.fullmatch(word):
        return _BY_LLAMA_CPP
    if (guess := meant(value, allowed)) is not None:
        return f"did you mean {guess}?"
    return _BY_GGUF if key == "output.dtype" and _PACKED.fullmatch(word) else ""


def meant(value: object, allowed: Sequence[str]) -> str | None:
    """Which of the allowed values was meant; None where that is unclear."""
    word = _word(value)
    if any(name.startswith("cuda:") for name in allowed) and (match := _NUMBERED.fullmatch(word)):
        return f"cuda:{int(match[1])}"
    by_word = {_word(name): name for name in allowed}
    if found := next((by_word[name] for name in _names_of(word) if name in by_word), None):
        return found
    if any(word in names for names in _KNOWN):
        return None
    near = difflib.get_close_matches(word, by_word, 1)
    return by_word[near[0]] if near else None


def _names_of(word: str) -> Iterator[str]:
    """The word, and its other names, the most usual first."""
    yield word
    for names in _SAME:
        if word in names:
            yield from names


def _word(value: object) -> str:
    """A value as the table has it: ``torch.bfloat16`` and ``BFloat16`` are ``bfloat16``."""
    word = str(value).strip().lower().removeprefix("torch.")
    return re.sub(r"[-\s]+", "_", word)


def near_key(key: object, valid: Mapping[str, object] | Sequence[str]) -> str:
    """`` (did you mean dtype?)`` where a key resembles one that is valid; else empty."""
    near = difflib.get_close_matches(str(key)[:80], list(valid), 1)
    return f" (did you mean {near[0]}?)" if near else ""
