"""Small bases that are stored as integers and FP4, as compressed-tensors, modelopt and DeepSeek have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.support.peft_oracle import random
from tests.support.quantised_bases import Quantised, Tensors, linears, llama_config, others
from tests.support.quantised_packs import FP4_CODES, fp4_parts, fp4_values, integer_parts, integer_values


def _base(
    settings: dict[str, Any],
    parts_of: Callable[[Tensor], Tensors],
    values_of: Callable[[Tensors, tuple[int, int]], Tensor],
    ignore: str = "ignore",
    **config: Any,
) -> Quantised:
    """A small Llama, each of whose Linear layers is stored by its parts; q_proj's scales are in the second file."""
    tensors, values = others(), {}
    for seed, (module, shape) in enumerate(linears().items()):
        parts = parts_of(random(*shape, seed=seed, scale=0.05))
        tensors |= {f"{module}.{end}": part for end, part in parts.items()}
        values[f"{module}.weight"] = values_of(parts, shape)
    made = llama_config(quantization_config={**settings, ignore: ["lm_head"]}, **config)
    return Quantised(made, tensors, values, lambda name: ".layers.1." in name or name.endswith("q_proj.weight_scale"))


def _compressed(name: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    return {"quant_method": "compressed-tensors", "format": name, "config_groups": {"group_0": group}}


def packed_integers(
    bits: int = 4, group: int | None = 32, symmetric: bool = True, act_order: bool = False
) -> Quantised:
    """``pack-quantized``, as Kimi-K2's experts."""

    def parts_of(weight: Tensor) -> Tensors:
        order = None
        if act_order and group:
            order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(5)) // group
        return integer_parts(weight, bits, group, symmetric, order=order)

    strategy = "group" if group else "channel"
    settings = _compressed(
        "pack-quantized", num_bits=bits, type="int", strategy=strategy, group_size=group, symmetric=symmetric
    )
    return _base(settings, parts_of, lambda parts, shape: integer_values(parts, shape, bits))


def plain_integers(group: int | None = None, symmetric: bool = True) -> Quantised:
    """``int-quantized``: W8A8."""
    strategy = "tensor" if group == -1 else "channel"
    settings = _compressed("int-quantized", num_bits=8, type="int", strategy=strategy, symmetric=symmetric)
    return _base(
        settings,
        lambda weight: integer_parts(weight, 8, group, symmetric, torch.float32, is_packed=False),
        lambda parts, shape: integer_values(parts, shape, 8),
    )


def fp4(kind: str) -> Quantised:
    """FP4 by one of the kinds of `FP4_CODES`."""
    group = 16 if kind.startswith("nvfp4") else 32
    settings = {
        "nvfp4": _compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        "nvfp4-modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        "mxfp4": _compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        "mxfp4-modelopt": {"quant_method": "modelopt", "quant_algo": "MXFP4"},
        "fp4-deepseek": {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
    }[kind]
    ignore = "modules_to_not_convert" if kind == "fp4-deepseek" else "ignore"

    def parts_of(weight: Tensor) -> Tensors:
        parts = fp4_parts(weight, kind)
        if kind.startswith("nvfp4"):
            parts["input_scale" if "modelopt" in kind else "input_global_scale"] = torch.tensor([0.5])
        return parts

    assert group
    return _base(settings, parts_of, lambda parts, shape: fp4_values(parts, kind), ignore)


def mxfp8(method: str) -> Quantised:
    """FP8 with a scale of E8M0, stored as U8, for 32 columns: compressed-tensors', modelopt's and MiniMax's."""
    settings, ignore, key = {
        "compressed-tensors": (
            _compressed("mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32),
            "ignore",
            "weight_scale",
        ),
        "modelopt": ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, "ignore", "weight_scale"),
        "mxfp8": (
            {"quant_method": "mxfp8", "weight_block_size": [1, 32]},
            "modules_to_not_convert",
            "weight_scale_inv",
        ),
    }[method]

    def parts_of(weight: Tensor) -> Tensors:
        blocks = weight.double().view(len(weight), -1, 32)
        power = torch.ceil(torch.log2(blocks.abs().amax(-1) / 448))
        codes = (blocks / torch.exp2(power)[..., None]).clamp(-448, 448).float().to(torch.float8_e4m3fn)
        return {"weight": codes.view(weight.shape), key: (power + 127).to(torch.uint8)}

    def values_of(parts: Tensors, shape: tuple[int, int]) -> Tensor:
        scale = torch.exp2(parts[key].double() - 127).repeat_interleave(32, 1)
        return (parts["weight"].double() * scale).float()

    return _base(settings, parts_of, values_of, ignore)


#: By name.
PACK_BASES: Mapping[str, Callable[[], Quantised]] = {
    "int4-group": packed_integers,
    "int4-group-asymmetric": lambda: packed_integers(symmetric=False),
    "int4-act-order": lambda: packed_integers(act_order=True),
    "int4-channel": lambda: packed_integers(group=None),
    "int3-group": lambda: packed_integers(bits=3),
    "int8-group-packed": lambda: packed_integers(bits=8),
    "int8-channel": plain_integers,
    "int8-tensor-asymmetric": lambda: plain_integers(group=-1, symmetric=False),
    **{kind: partial(fp4, kind) for kind in FP4_CODES},
    **{f"mxfp8-{method}": partial(mxfp8, method) for method in ("compressed-tensors", "modelopt", "mxfp8")},
}
