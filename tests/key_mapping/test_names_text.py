"""A text model alone and inside of a multimodal one: an adapter of either fits a checkpoint of the other.

Names are checked for every multimodal class of transformers whose text model has a causal class of its own; so are
merges, of adapters that PEFT makes on the text-only class. The oracle is PEFT's merge of that class's weights, bit for
bit; where transformers' ``AutoModelForCausalLM`` itself reads the multimodal checkpoint into that class, the merged
checkpoint is loaded back so, and answers as base and adapter do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardmerge
from shardmerge.key_mapping.class_names import ModelClasses, NamesOfClass
from shardmerge.key_mapping.names import Names
from tests.support import names_zoo, text_zoo
from tests.support.names_zoo import State
from tests.support.peft_oracle import assert_same_bits, merge_to, stored

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = (
    "Gemma3ForConditionalGeneration",
    "Llama4ForConditionalGeneration",
    "MllamaForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
)
#: Classes that ``AutoModelForCausalLM`` makes the text-only class of, and whose checkpoints it reads (none of Emu3's).
LOADED = {
    "Llama4ForConditionalGeneration",
    "MllamaForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
}
#: Their own names on disk, spoken to a checkpoint of the text model alone: refused, as conversions stand in between.
CONVERTED = {
    "InklingForConditionalGeneration",
    "MiniMaxM3SparseForConditionalGeneration",
    "Nemotron3_5TranscribeForConditionalGeneration",
}
#: LoRA's targets, where not all Linear layers can be.
TARGETS = {
    "FuyuForCausalLM": r".*(dense|query_key_value|dense_h_to_4h|dense_4h_to_h)",  # else PEFT lists whole names
    "Llama4ForConditionalGeneration": r".*_proj",  # PEFT cannot wrap its router
    # PEFT refuses a Mamba layer's out_proj.
    **dict.fromkeys(
        ("Nemotron3_5TranscribeForConditionalGeneration", "NemotronH_Omni_Reasoning_V3"),
        r".*\.(in|up|down|[qkvo])_proj",
    ),
}
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in text_zoo.multimodal()]


def pair_of(name: str) -> text_zoo.Pair:
    """The two classes; where transformers has no text-only class, there is nothing to test."""
    try:
        return text_zoo.pair(name)
    except LookupError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_every_such_class_of_transformers_is_here() -> None:
    """The list is made from our table."""
    assert text_zoo.multimodal_of_transformers() <= set(text_zoo.multimodal())


def names_of(config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> Names:
    return Names(config, {name: tuple(tensor.shape) for name, tensor in state.items()})


def chosen(names: Names, spoken: Mapping[str, Any]) -> NamesOfClass:
    targets = [(name.rpartition(".")[0], name.rpartition(".")[2]) for name in spoken]
    found, unclear = ModelClasses(names).chosen(
        targets, lambda module, parameter: names.resolve(module, parameter) != ""
    )
    assert not unclear
    return found


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_every_name_of_the_text_model_alone(name: str) -> None:
    of = pair_of(name)
    memory = names_zoo.weights(of.around)
    spoken = text_zoo.spoken_alone(of, memory)
    assert spoken
    for state in (memory, names_zoo.on_disk(of.around, memory)):
        who = chosen(names_of(names_zoo.config_of(of.around), state), spoken)
        outcome = names_zoo.check(who, state, spoken)
        assert not outcome.wrong
        assert not outcome.missing
        # What is stored interleaved with something else is not the fault of names.
        assert all("interleaved" in why for why in outcome.refused.values()), outcome.refused


@pytest.mark.parametrize("name", EVERY)
def test_every_name_of_the_multimodal_model_in_a_checkpoint_of_the_text_model(name: str) -> None:
    of = pair_of(name)
    with torch.device("meta"):
        text = of.alone(of.around.config.text_config)
    memory = names_zoo.weights(text)
    inside = of.all_inside(memory)
    for state in (memory, names_zoo.on_disk(text, memory)):
        names = names_of(names_zoo.config_of(text), state)
        for spoken in (inside, names_zoo.on_disk(of.around, dict(inside))):
            known = {key: inside.get(key, tensor) for key, tensor in spoken.items()}
            outcome = names_zoo.check(chosen(names, known), state, known)
            assert not outcome.wrong
            assert not outcome.refused
            assert not outcome.missing or (spoken is not inside and name in CONVERTED)


@pytest.mark.parametrize("name", EVERY)
def test_what_is_no_text_never_becomes_text(name: str) -> None:
    """The names of towers and projectors, in a checkpoint of the text model alone, are nothing."""
    of = pair_of(name)
    with torch.device("meta"):
        text = of.alone(of.around.config.text_config)
    memory = names_zoo.weights(text)
    names = names_of(names_zoo.config_of(text), memory)
    others = {
        key
        for key in names_zoo.weights(of.around)
        if not any(path and key.startswith(f"{path}.") for path in (of.model[1], of.head[1]))
    }
    for speaker in ModelClasses(names).others:
        for key in others:
            module, _, parameter = key.rpartition(".")
            assert speaker.resolve(module, parameter) == "", (key, speaker.dialect)


# --- merges -----------------------------------------------------------------------------------------------------------


def peft_adapter(folder: Path, text: Any, **settings: Any) -> tuple[State, torch.Tensor | None]:
    """Write an adapter on the text model; PEFT's merge of it, and what the two answer."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{"r": 3, "lora_alpha": 5, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model: Any = get_peft_model(text, config).eval()
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
        answer = answer_of(model)
        return text_zoo.weights_of(model.merge_and_unload()), answer


def answer_of(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=torch.arange(3, 23).view(2, 10)).logits)


def renamed(folder: Path, names: Mapping[str, str]) -> None:
    """Give an adapter's keys other module names."""
    file = folder / "adapter_model.safetensors"
    tensors = {}
    for key, tensor in load_file(file).items():
        module, end = key.removeprefix("base_model.model.").split(".lora_")
        bare = module.removesuffix(".base_layer")  # of experts' parameters
        tensors[f"base_model.model.{names[bare]}{module[len(bare) :]}.lora_{end}"] = tensor
    save_file(tensors, file)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("layout", ["disk", pytest.param("memory", marks=pytest.mark.slow)])
def test_an_adapter_of_the_text_model_alone(tmp_path: Path, name: str, layout: str) -> None:
    of = pair_of(name)
    text = text_zoo.small(of)
    base = text_zoo.write_around(tmp_path / "base", of, text, layout)
    merged, answer = peft_adapter(tmp_path / "adapter", text, target_modules=TARGETS.get(name, "all-linear"))
    merge_to(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")
    inside = of.all_inside(merged)
    expected = {**base, **(names_zoo.on_disk(of.around, dict(inside)) if layout == "disk" else inside)}
    assert_same_bits(stored(tmp_path / "out"), expected)
    shardmerge.verify(tmp_path / "out").raise_for_status()  # raises where it is not right
    if name in LOADED and layout == "disk":
        from transformers import AutoModelForCausalLM

        again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert type(again) is of.alone
        torch.testing.assert_close(answer_of(again), answer, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_an_adapter_of_the_multimodal_model_on_the_text_model_alone(tmp_path: Path, name: str) -> None:
    of = pair_of(name)
    text = text_zoo.small(of)
    base = text_zoo.write(tmp_path / "base", text_zoo.weights_of(text), names_zoo.config_of(text))
    merged, _ = peft_adapter(tmp_path / "adapter", text, target_modules=TARGETS.get(name, "all-linear"))
    modules = {key.rpartition(".")[0] for key in base}
    renamed(tmp_path / "adapter", {module: of.inside(f"{module}.weight")[: -len(".weight")] for module in modules})
    merge_to(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")
    assert_same_bits(stored(tmp_path / "out"), merged)
