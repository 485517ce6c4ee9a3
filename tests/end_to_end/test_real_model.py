"""A real trained model and a real trained adapter: what a person gets from `make demo`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import shardmerge
from tests.conftest import ROOT
from tools.demo import PROMPTS, answers

ADAPTER = ROOT / "configs" / "demo" / "adapter"
PURE = ROOT / "configs" / "demo" / "adapter.pt"
SCALING = 1.5

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def merged(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("real") / "merged"
    shardmerge.merge({"base": str(smollm2), "adapters": str(ADAPTER), "output": {"path": str(output)}})
    return output


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def _load(folder: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    return model.eval(), info


def _logits(model: Any, tokenizer: Any) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model(**tokenizer(prompt, return_tensors="pt")).logits for prompt in PROMPTS]


def test_the_scaling_is_the_adapters_own() -> None:
    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == SCALING


def test_pure_pytorch_form_gives_the_same_bytes(smollm2: Path, merged: Path, tmp_path: Path) -> None:
    entry = {"path": str(PURE), "scaling": SCALING}
    shardmerge.merge({"base": str(smollm2), "adapters": [entry], "output": {"path": str(tmp_path / "pure")}})
    assert _digests(tmp_path / "pure") == _digests(merged)


def test_weights_and_logits_are_pefts(smollm2: Path, merged: Path) -> None:
    from peft import PeftModel
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    base, _ = _load(smollm2)
    oracle = PeftModel.from_pretrained(base, ADAPTER).merge_and_unload().eval()
    expected = oracle.state_dict()
    for name, tensor in _tensors(merged).items():
        assert torch.equal(tensor, expected[name]), name
    ours, info = _load(merged)
    assert not any(info.values()), info
    for mine, pefts in zip(_logits(ours, tokenizer), _logits(oracle, tokenizer), strict=True):
        assert torch.equal(mine, pefts)


@pytest.mark.slow
def test_greedy_text_is_that_of_base_and_adapter(smollm2: Path, merged: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = list(PROMPTS)
    with_adapter = answers(smollm2, prompts, tokenizer, ADAPTER)
    assert answers(merged, prompts, tokenizer) == with_adapter
    assert answers(smollm2, prompts, tokenizer) != with_adapter


def test_everything_else_is_the_bases(smollm2: Path, merged: Path) -> None:
    before, after = _tensors(smollm2), _tensors(merged)
    touched = {name for name in before if name.endswith(("q_proj.weight", "v_proj.weight"))}
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == touched
    for path in smollm2.iterdir():
        if path.suffix not in (".safetensors",) and not path.name.endswith(".index.json"):
            assert (merged / path.name).read_bytes() == path.read_bytes(), path.name
    index = "model.safetensors.index.json"
    assert json.loads((merged / index).read_text()) == json.loads((smollm2 / index).read_text())
