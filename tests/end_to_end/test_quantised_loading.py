"""transformers loads what was merged from a quantised base, with the weights that the merge computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.quantised_bases import EVEN, Quantised, fp8_block, fp8_moe, fp8_static
from tests.support.quantised_scene import DOWN, Q, Scene

EXPERT = "model.layers.1.mlp.experts.1.up_proj"
#: Bases that transformers loads itself, and the modules that the adapter updates.
LOADED: dict[str, tuple[Callable[[], Quantised], Sequence[str]]] = {
    "blocks": (lambda: fp8_block(EVEN), (Q, DOWN)),
    "blocks with exponents": (lambda: fp8_block(EVEN, torch.float8_e8m0fnu, "scale"), (Q, DOWN)),
    "static": (fp8_static, (Q, DOWN)),
    "experts": (fp8_moe, (Q, EXPERT)),
}


def loaded(folder: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    found: tuple[Any, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    return found


def weight_in(model: Any, name: str) -> Tensor:
    """A weight by its name in the files; a model in memory holds a layer's experts in one tensor."""
    state: dict[str, Tensor] = model.state_dict()
    if name in state:
        return state[name]
    parent, _, rest = name.partition(".experts.")
    number, kind, _ = rest.split(".")
    if kind == "down_proj":
        return state[f"{parent}.experts.down_proj"][int(number)]
    return state[f"{parent}.experts.gate_up_proj"][int(number)].chunk(2)[kind == "up_proj"]


@pytest.mark.parametrize("mode", ["mixed", "dense"])
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "experts" else pytest.mark.slow) for kind in LOADED]
)
def test_transformers_loads_the_merged_weights(tmp_path: Path, kind: str, mode: str) -> None:
    make, modules = LOADED[kind]
    scene = Scene(tmp_path, make(), modules)
    scene.merge(quantized=mode)
    model, info = loaded(tmp_path / "out")
    assert not any(info.values()), info
    for name in scene.made.values:
        assert torch.equal(weight_in(model, name), scene.merged(name.removesuffix(".weight")).bfloat16()), name


@pytest.mark.parametrize("kind", ["blocks", "experts"])
def test_exactly_the_modules_that_are_still_quantised_become_fp8_layers(tmp_path: Path, kind: str) -> None:
    """What transformers does on a GPU: it makes layers of FP8 by config.json, and then loads codes into them."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations import finegrained_fp8
    from transformers.utils.quantization_config import FineGrainedFP8Config

    make, modules = LOADED[kind]
    scene = Scene(tmp_path, make(), modules)
    found = scene.merge(quantized="mixed")
    settings = scene.settings()["quantization_config"]
    config = AutoConfig.from_pretrained(tmp_path / "out")
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kept = {key: settings[key] for key in ("activation_scheme", "weight_block_size", "modules_to_not_convert")}
    finegrained_fp8.replace_with_fp8_linear(
        model, settings["modules_to_not_convert"], FineGrainedFP8Config(**kept), pre_quantized=True
    )
    kinds = (finegrained_fp8.FP8Linear, finegrained_fp8.FP8Experts)
    replaced = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    stored = {name.rpartition(".")[0] for name, tensor in found.items() if tensor.dtype == torch.float8_e4m3fn}
    assert replaced == {name.partition(".experts.")[0] + ".experts" if ".experts." in name else name for name in stored}
