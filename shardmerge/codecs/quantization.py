"""What formats of quantised checkpoints have in common: their settings, and names of the tensors beside a weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shardmerge.spec.tensors import TensorRef

#: Keys of config.json that hold the settings: transformers and vLLM, older compressed-tensors, MLX.
SECTIONS = ("quantization_config", "compression_config", "quantization")
#: The method of settings that MLX writes, which do not name one.
MLX_METHOD = "mlx"
#: Files of settings, beside config.json: modelopt's, GPTQ's and AWQ's.
MODELOPT_SETTINGS = "hf_quant_config.json"
SETTINGS_FILES = (MODELOPT_SETTINGS, "quantize_config.json", "quant_config.json")
#: What a quantised checkpoint stores beside a weight for its activations, after the name of the module.
ACTIVATION_SCALES = ("input_scale", "activation_scale", "input_global_scale", "input_zero_point", "scale_input")


def quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings in a config.json, or its ``text_config``; empty where there are none.

    ``quant_method`` is always there: bitsandbytes and MLX may leave it out.
    """
    inner = config.get("text_config")
    for section in (config, inner) if isinstance(inner, dict) else (config,):
        for key in SECTIONS:
            found = section.get(key)
            if isinstance(found, dict) and found:
                of_mlx = "quant_method" not in found and section.get("quantization")
                if isinstance(of_mlx, dict) and of_mlx:  # ``quantization_config`` is a copy, for other programs
                    return {"quant_method": MLX_METHOD, **of_mlx}
                return {"quant_method": _method(key, found), **found}
    return {}


def _method(key: str, settings: Mapping[str, Any]) -> str:
    """The method of settings that do not name one."""
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    return "compressed-tensors" if key == "compression_config" else ""


def groups(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The ``weights`` settings of every group of compressed-tensors."""
    found = settings.get("config_groups")
    for group in found.values() if isinstance(found, dict) else ():
        if isinstance(group, dict) and isinstance(weights := group.get("weights"), dict):
            yield weights


def owner_of(name: str) -> str:
    """The module of a ``….weight``; of a parameter such as ``experts.gate_up_proj`` the parameter itself."""
    return name.removesuffix(".weight")


def beside(tensors: Mapping[str, TensorRef], name: str, endings: Sequence[str]) -> list[TensorRef]:
    """The tensors that belong to the weight ``name``: ``module.ending``, and ``parameter_ending`` of a parameter."""
    start = owner_of(name) + ("." if name.endswith(".weight") else "_")
    return [ref for ending in endings if (ref := tensors.get(start + ending)) is not None]


def shard_of(ref: TensorRef) -> str:
    """The name of the file that a tensor is in."""
    return ref.uri.rpartition("/")[2]


def described(ref: TensorRef | None) -> str:
    """A tensor's dtype and shape, for a message."""
    return "missing" if ref is None else f"{ref.dtype} {list(ref.shape)}"
