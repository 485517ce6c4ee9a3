"""transformers loads what was merged from a quantised base, with the weights that the merge computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmerge
from shardmerge.errors import FormatError
from shardmerge.inference import hf
from tests.support.gguf_zoo import write_spm_tokenizer
from tests.support.quantised_bases import EVEN, Quantised, fp8_block, fp8_modelopt, fp8_moe, fp8_static, linears
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


def test_what_transformers_would_read_wrongly_is_refused(tmp_path: Path) -> None:
    """32 × 64 does not divide 48 × 96, so it takes blocks of 24 × 48 for what has others."""
    scene = Scene(tmp_path, fp8_block())
    scene.merge(quantized="mixed")
    with pytest.raises(FormatError, match=r"such FP8 weights wrongly on a CPU: .* is not whole blocks of 32 × 64"):
        hf.load_model(str(tmp_path / "out"))
    scene.merge("dense", quantized="dense")
    assert hf.load_model(str(tmp_path / "dense")) is not None
    other = Scene(tmp_path / "modelopt", fp8_modelopt())
    with pytest.raises(FormatError, match="codes of modelopt without their scales"):
        hf.load_model(str(other.base))


def test_a_gguf_file_is_the_dense_checkpoints(tmp_path: Path) -> None:
    """Merged in one pass it has the bytes that converting the dense merge has."""
    scene = Scene(tmp_path, fp8_block())
    scene.config()
    write_spm_tokenizer(scene.base)
    scene.merge("gguf/Model", format="gguf", quantization="q8_0")
    scene.merge("dense/Model", quantized="dense")
    shardmerge.export(
        tmp_path / "dense" / "Model", {"path": tmp_path / "again" / "Model", "format": "gguf", "quantization": "q8_0"}
    )
    (one,), (other,) = (list((tmp_path / of / "Model").glob("*.gguf")) for of in ("gguf", "again"))
    assert one.read_bytes() == other.read_bytes()


def test_inspect_says_what_is_quantised(tmp_path: Path) -> None:
    scene = Scene(tmp_path, fp8_block())
    ((codec, found),) = shardmerge.inspect(scene.base)["quantised"].items()
    size = sum(t.nbytes for name, t in scene.made.tensors.items() if name.rpartition(".")[0] in linears())
    elements = sum(value.numel() for value in scene.made.values.values())
    assert (codec, found["weights"], found["bytes"]) == ("fp8", 14, size)
    assert found["bits_per_element"] == pytest.approx(8 * size / elements, abs=5e-4)
