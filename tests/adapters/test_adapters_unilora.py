"""Uni-LoRA without its indices against PEFT: all architectures whose order is known, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmerge
from shardmerge.adapters.methods import unilora as unilora_module
from shardmerge.adapters.registry import FAMILIES
from tests.support import zoo
from tests.support.family_oracle import Net, write_case
from tests.support.family_oracle import refusal as refusal_of_case
from tests.support.peft_oracle import assert_same_bits, least_memory, make_config, merge_to, stored
from tests.support.zoo import BF16, F16, F32, Adapter

ALL = "all-linear"


def unilora(*targets: str, **settings: Any) -> Adapter:
    return zoo.peft("UniLoraConfig", *(targets or (ALL,)), **{"r": 3, "theta_d_length": 40, **settings})


def merged_by_peft(model: str, adapter: Path, dtype: str = F32) -> dict[str, Tensor]:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = PeftModel.from_pretrained(zoo.load(zoo.base_folder(model, dtype)), adapter)
        return dict(wrapped.merge_and_unload().state_dict())


def assert_equals_peft(model: str, adapter: Path, output: Path, dtype: str = F32) -> None:
    base = zoo.base_folder(model, dtype)
    merge_to(output, base, adapter)
    before, ours = stored(base), stored(output)
    assert any(not torch.equal(ours[name], before[name]) for name in before), "the adapter changes nothing"
    assert_same_bits(dict(zoo.load(output).state_dict()), merged_by_peft(model, adapter, dtype))


#: Models of text; those of several parts are below.
TEXT = [
    *("llama", "llama-tied", "llama-biased", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt2-bare"),
    *("gpt-neox", "opt", "falcon", "bert", "t5", "bart", "gptj", "biogpt", "roberta", "electra", "distilbert"),
    *("mixtral", "qwen3-moe", "deepseek-v3", "gpt-oss", "modernbert", "whisper", "vit", "clip", "llava", "qwen2.5-vl"),
]
QUICK = ("llama", "gpt2-bare", "llava")


@pytest.mark.parametrize(
    "model", [pytest.param(model, marks=[] if model in QUICK else [pytest.mark.slow]) for model in TEXT]
)
def test_bits_are_pefts(model: str, tmp_path: Path) -> None:
    assert_equals_peft(model, zoo.adapter_folder(model, unilora()), tmp_path / "out")


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_bits_of_16_bit_bases(dtype: str, tmp_path: Path) -> None:
    """The scales are rounded to the base's dtype."""
    assert_equals_peft("llama", zoo.adapter_folder("llama", unilora(), dtype), tmp_path / "out", dtype)


@pytest.mark.parametrize(
    "settings",
    [
        {"proj_seed": 7},
        {"theta_d_length": 100_000},  # more than there are to deal: every one once at most
        {"r": 1, "theta_d_length": 1},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["k_proj"]},  # a target, too, but what is saved whole takes no share
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
    ],
    ids=str,
)
def test_settings(settings: dict[str, Any], tmp_path: Path) -> None:
    adapter = zoo.adapter_folder("llama-biased", unilora("q_proj", "down_proj", "k_proj", **settings))
    assert_equals_peft("llama-biased", adapter, tmp_path / "out")


def test_targets_by_a_pattern(tmp_path: Path) -> None:
    adapter = zoo.adapter_folder("llama", unilora(target_modules=r".*\.(mlp\.up_proj|1\.self_attn\.[kv]_proj)"))
    assert_equals_peft("llama", adapter, tmp_path / "out")


def test_tiles_agree(tmp_path: Path) -> None:
    adapter, base = zoo.adapter_folder("llama", unilora()), zoo.base_folder("llama")
    merge_to(tmp_path / "out", base, adapter)
    config = make_config(tmp_path / "tiles", base, [adapter])
    config["compute"]["max_memory"] = least_memory(config)
    shardmerge.merge(config)
    assert_same_bits(stored(tmp_path / "tiles"), stored(tmp_path / "out"))


def test_indices_are_dealt_evenly() -> None:
    for count, length in ((10, 4), (4, 10), (12, 4), (1, 1)):
        indices, scales = unilora_module._list(count, length, 3)
        times = torch.bincount(indices.long(), minlength=length)
        assert len(indices) == count and int(times.max() - times.min()) <= 1
        assert torch.equal(scales > 0, times > 0)
    assert "unilora-seeded" in FAMILIES


# --- what cannot be known is refused ----------------------------------------------------------------------------------


def refusal(tmp_path: Path, base: Path, adapter: Path, **changes: Any) -> str:
    folder = tmp_path / "changed"
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(shardmerge.PlanError) as told:
        shardmerge.plan(make_config(tmp_path / "out", base, [folder]))
    return str(told.value)


def test_an_architecture_that_is_not_known(tmp_path: Path) -> None:
    from peft import UniLoraConfig

    case = write_case(tmp_path, UniLoraConfig(r=3, target_modules=["wide", "square"]), make=Net)
    said = refusal_of_case(case)
    assert (
        "the order of the modules is not known of the base's architecture; load it with PEFT, set save_indices" in said
    )


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"target_modules": None}, "does not say by their names which modules share it"),
        ({"target_modules": "all-linear"}, "does not say by their names which modules share it"),
        (
            {"auto_mapping": {"base_model_class": "LlamaModel"}},
            "trained on LlamaModel, and the base is LlamaForCausalLM",
        ),
        ({"auto_mapping": None}, "has neither auto_mapping nor task_type"),
        ({"auto_mapping": None, "task_type": "SEQ_CLS"}, "task_type is SEQ_CLS, and the base LlamaForCausalLM"),
        ({"auto_mapping": None, "task_type": "FEATURE_EXTRACTION"}, "task_type is FEATURE_EXTRACTION"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "cover model.embed_tokens, whose place"),
        ({"theta_d_length": 41}, "expected [41], theta_d_length"),
        ({"proj_seed": -1}, "proj_seed must be a whole number of 64 bits"),
        ({"save_indices": True}, "unilora_theta_d"),
    ],
    ids=str,
)
def test_what_is_not_known_is_refused(changes: dict[str, Any], part: str, tmp_path: Path) -> None:
    adapter = zoo.adapter_folder("llama", unilora("q_proj", "v_proj"))
    assert part in refusal(tmp_path, zoo.base_folder("llama"), adapter, **changes)


def test_a_tied_head_that_is_not_stored(tmp_path: Path) -> None:
    """It is one of the model's Linear layers, and takes its share."""
    adapter = zoo.adapter_folder("llama-tied", unilora("q_proj"))
    said = refusal(tmp_path, zoo.base_folder("llama-tied"), adapter, target_modules=["q_proj", "lm_head"])
    assert "target_modules cover lm_head, whose place" in said


def test_a_text_model_alone_of_several_parts(tmp_path: Path) -> None:
    adapter = zoo.adapter_folder("llava", unilora("q_proj"))
    said = refusal(tmp_path, zoo.base_folder("llava"), adapter, auto_mapping=None, task_type="CAUSAL_LM")
    assert "task_type is CAUSAL_LM, and the base LlavaForConditionalGeneration" in said


def test_indices_that_peft_would_ignore(tmp_path: Path) -> None:
    adapter = zoo.adapter_folder("llama", unilora("q_proj", save_indices=True))
    assert "does not say save_indices; PEFT would ignore it" in refusal(
        tmp_path, zoo.base_folder("llama"), adapter, save_indices=False
    )


def test_without_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    adapter = zoo.adapter_folder("llama", unilora("q_proj"))
    assert "pip install numpy" in refusal(tmp_path, zoo.base_folder("llama"), adapter)
