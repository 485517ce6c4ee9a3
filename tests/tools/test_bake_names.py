"""The table of names against transformers itself: what it stores of a model, we put together again.

Of every model class both ways to store it (as transformers does, and under its names in memory) are tried with both
ways to speak of its parameters. A name may be refused, never be taken for another.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("transformers.conversion_mapping")
transformers = pytest.importorskip("transformers")

from shardmerge.key_mapping.names import Names  # noqa: E402
from shardmerge.key_mapping.naming import numberless  # noqa: E402
from tests.support import names_zoo  # noqa: E402
from tests.support.builders import slow_but  # noqa: E402
from tools import bake_names  # noqa: E402

BAKED = json.loads(bake_names.TARGET.read_text())
pytestmark = pytest.mark.skipif(
    transformers.__version__ != BAKED["transformers"], reason=f"the table is of transformers {BAKED['transformers']}"
)

SAMPLE = (
    "BarkFineModel",
    "BartForConditionalGeneration",
    "BertForMaskedLM",
    "CLIPModel",
    "CLIPVisionModel",
    "DeepseekV3ForCausalLM",
    "Dinov2Model",
    "DeformableDetrForObjectDetection",
    "DiffusionGemmaForBlockDiffusion",
    "Ernie4_5_VLMoeForConditionalGeneration",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "Gemma3ForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "GptOssForCausalLM",
    "InklingForConditionalGeneration",
    "Kimi_K25ForConditionalGeneration",
    "Llama4ForConditionalGeneration",
    "LlamaForCausalLM",
    "LlavaForConditionalGeneration",
    "MiniMaxM3SparseForConditionalGeneration",
    "MixtralForCausalLM",
    "MllamaForConditionalGeneration",
    "Molmo2ForConditionalGeneration",
    "NemotronHForCausalLM",
    "NomicBertModel",
    "OlmoHybridForCausalLM",
    "PhimoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3MoeForCausalLM",
    "Qwen3VLMoeForConditionalGeneration",
    "SiglipModel",
    "Step3p7ForConditionalGeneration",
    "SeamlessM4TModel",
    "T5ForConditionalGeneration",
    "UdopForConditionalGeneration",
    "ViTForImageClassification",
    "WhisperForConditionalGeneration",
)
#: Names that are refused, of how they are spoken and stored, and why. Every other name is served.
REFUSED = {
    # gate and up lie in turns, row by row, which no place can say.
    ("Inkling", "memory in disk"): "interleaved with those of another parameter",
    ("Inkling", "disk in memory"): "reordered together",
    # q, k and v of a convolution, joined, are of sizes that differ.
    ("BailingHybrid", "disk in memory"): "sizes of the parts are not known",
    ("Glm5Next", "disk in memory"): "sizes of the parts are not known",
    ("KimiLinear", "disk in memory"): "sizes of the parts are not known",
    ("OlmoHybrid", "disk in memory"): "sizes of the parts are not known",
}
#: Experts that are transposed if the config's hidden_size asks for it keep their widths, so these are small.
_TEXT = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "num_experts": 4}
CHANGES: dict[str, dict[str, Any]] = {
    name: {"text_config": {**_TEXT, "moe_intermediate_size": 12, "intermediate_size": 24}}
    for name in ("Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeModel")
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    bake_names.quiet()


def problems(name: str, model: Any) -> list[str]:
    """What is wrong with a model's names."""
    found: list[str] = []
    for combination, outcome in names_zoo.combinations(model):
        found += [f"{name}, {combination}: wrong: {wrong}" for wrong in outcome.wrong]
        found += [f"{name}, {combination}: missing: {missing}" for missing in outcome.missing]
        known = [why for (start, which), why in REFUSED.items() if name.startswith(start) and which == combination]
        found += [
            f"{name}, {combination}: refused: {refusal}"
            for refusal in outcome.refused.values()
            if not any(why in refusal for why in known)
        ]
    return [*found, *ties(name, model)]


def ties(name: str, model: Any) -> list[str]:
    """Tied weights against transformers', with the config's flag and without.

    Of a class that ties across numbers it is enough to know of all that are tied, since they are not undone.
    """
    expected = names_zoo.tied(model)
    shapes = {
        param: tuple(value.shape)
        for param, value in model.named_parameters(remove_duplicate=False)
        if param not in expected
    }
    config = names_zoo.config_of(model)
    bare = {key: value for key, value in config.items() if key != "tie_word_embeddings"}
    expected = {target: source for target, source in expected.items() if source in shapes}
    wrong = []
    for names in (Names(config, shapes), Names(bare, shapes)):
        strange = [target for target in expected.keys() - names.tied.keys() if numberless(target) not in names.across]
        if strange or (not names.across and names.tied != expected):
            wrong.append(f"{name}: tied: {names.tied}, not {expected}")
    return wrong


@pytest.mark.parametrize("name", slow_but(SAMPLE, *SAMPLE[::3]))
def test_every_name_of_a_model_is_served(name: str) -> None:
    assert not problems(name, bake_names.build(getattr(transformers, name), **CHANGES.get(name, {})))


@pytest.mark.slow
def test_every_name_of_every_model_is_served() -> None:
    found: list[str] = []
    built = 0
    for name, cls in sorted(bake_names.classes().items()):
        if name.endswith("PreTrainedModel"):
            continue
        try:
            model = bake_names.build(cls, **CHANGES.get(name, {}))
        except bake_names.BuildError:
            continue
        built += 1
        found += problems(name, model)
    assert not found, "\n".join(found[:50])
    assert built > 1900


@pytest.mark.slow
def test_the_table_is_up_to_date() -> None:
    assert bake_names.bake()[0] == bake_names.TARGET.read_text()


def test_the_table_is_small_and_every_class_in_it_leads_somewhere() -> None:
    assert len(bake_names.TARGET.read_bytes()) < 1_000_000
    architectures = BAKED["architectures"]
    for name, entry in architectures.items():
        assert {part for _, part, _ in entry.get("parts", ())} <= architectures.keys(), name
    for entry in BAKED["types"].values():
        assert set(entry.get("roles", {}).values()) <= architectures.keys()
    for key, rules in BAKED["rules"].items():
        assert not isinstance(rules, str) or isinstance(BAKED["rules"][rules], list), key


def test_the_rules_are_those_of_the_installed_transformers() -> None:
    assert json.loads(json.dumps(bake_names.rules())) == BAKED["rules"]
