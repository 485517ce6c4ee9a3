"""Small bases that are stored as integers and FP4, as compressed-tensors, modelopt and DeepSeek have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.peft_oracle import random
from tests.support.quantised_bases import Quantised, Tensors, linears, llama_config, others
from tests.support.quantised_packs import FP4_CODES, fp4_parts, fp4_values, integer_parts, integer_values, packed


@dataclass
class Packed(Quantised):
    """A base whose weights are read by ``read``, from the parts of a shape."""

    read: Callable[[Tensors, tuple[int, int]], Tensor] = field(kw_only=True)
    #: The end of the codes' name, how many codes there are, and codes of a shape that are all the same.
    codes: str = field(kw_only=True)
    count: int = field(kw_only=True)
    constant: Callable[[int, tuple[int, int]], Tensor] = field(kw_only=True)

    def stored(self, module: str, found: Mapping[str, Tensor]) -> Tensor:
        """What a module's parts are read as."""
        parts = {name.removeprefix(f"{module}."): part for name, part in found.items() if name.startswith(f"{module}.")}
        return self.read(parts, self.shape(module))

    def nearest(self, module: str, exact: Tensor) -> Tensor:
        """How far the nearest code is from each of ``exact`` values: every code is tried."""
        parts = {end.removeprefix(f"{module}."): part for end, part in self.tensors.items() if end.startswith(module)}
        shape, least = self.shape(module), torch.full_like(exact, torch.inf)
        for code in range(self.count):
            values = self.read({**parts, self.codes: self.constant(code, shape)}, shape).double()
            least = torch.fmin(least, (values - exact).abs())
        return least

    def shape(self, module: str) -> tuple[int, int]:
        rows, columns = self.values[f"{module}.weight"].shape
        return rows, columns


def _base(
    settings: dict[str, Any],
    parts_of: Callable[[Tensor], Tensors],
    values_of: Callable[[Tensors, tuple[int, int]], Tensor],
    codes: str,
    count: int,
    constant: Callable[[int, tuple[int, int]], Tensor],
    ignore: str = "ignore",
) -> Packed:
    """A small Llama, each of whose Linear layers is stored by its parts; q_proj's scales are in the second file."""
    tensors, values = others(), {}
    for seed, (module, shape) in enumerate(linears().items()):
        parts = parts_of(random(*shape, seed=seed, scale=0.05))
        tensors |= {f"{module}.{end}": part for end, part in parts.items()}
        values[f"{module}.weight"] = values_of(parts, shape)
    config = llama_config(quantization_config={**settings, ignore: ["lm_head"]})

    def second(name: str) -> bool:
        return ".layers.1." in name or name.endswith("q_proj.weight_scale")

    return Packed(config, tensors, values, second, read=values_of, codes=codes, count=count, constant=constant)


#: What activations are in models whose integers, or NVFP4, are multiplied as they are.
_OF_ACTIVATIONS: Mapping[str, dict[str, Any]] = {
    "int-quantized": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True},
    "nvfp4-pack-quantized": {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "dynamic": "local",
        "symmetric": True,
    },
}


def _compressed(name: str, **weights: Any) -> dict[str, Any]:
    group: dict[str, Any] = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    if name in _OF_ACTIVATIONS:
        group["input_activations"] = _OF_ACTIVATIONS[name]
    settings = {"quant_method": "compressed-tensors", "format": name, "quantization_status": "compressed"}
    return {**settings, "config_groups": {"group_0": group}}


def packed_integers(bits: int = 4, group: int | None = 32, symmetric: bool = True, act_order: bool = False) -> Packed:
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
    return _base(
        settings,
        parts_of,
        lambda parts, shape: integer_values(parts, shape, bits),
        "weight_packed",
        1 << bits,
        lambda code, shape: packed(np.full(shape, code), bits),
    )


def plain_integers(group: int | None = None, symmetric: bool = True) -> Packed:
    """``int-quantized``: W8A8."""
    strategy = "tensor" if group == -1 else "channel"
    settings = _compressed("int-quantized", num_bits=8, type="int", strategy=strategy, symmetric=symmetric)
    return _base(
        settings,
        lambda weight: integer_parts(weight, 8, group, symmetric, torch.float32, is_packed=False),
        lambda parts, shape: integer_values(parts, shape, 8),
        "weight",
        256,
        lambda code, shape: torch.full(shape, code - 128, dtype=torch.int8),
    )


def fp4(kind: str) -> Packed:
    """FP4 by one of the kinds of `FP4_CODES`."""
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

    return _base(
        settings,
        parts_of,
        lambda parts, shape: fp4_values(parts, kind),
        FP4_CODES[kind],
        16,
        lambda code, shape: torch.full((shape[0], shape[1] // 2), 17 * code, dtype=torch.uint8),
        ignore,
    )


def mxfp8(method: str) -> Packed:
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

    def constant(code: int, shape: tuple[int, int]) -> Tensor:
        return torch.full(shape, code, dtype=torch.uint8).view(torch.float8_e4m3fn)

    return _base(settings, parts_of, values_of, "weight", 256, constant, ignore)


#: By name.
PACK_BASES: Mapping[str, Callable[[], Packed]] = {
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
