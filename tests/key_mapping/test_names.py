"""Names of adapters → places in checkpoints, on small checkpoints that are written down here."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from shardmerge.key_mapping.class_names import ModelClasses, NamesOfClass
from shardmerge.key_mapping.names import Names
from shardmerge.spec.tensors import Orientation, transposed_if
from shardmerge.spec.updates import Parameter, Region
from tests.support.names_zoo import State, matrix

Shapes = dict[str, tuple[int, ...]]


def state_of(shapes: Mapping[str, tuple[int, ...]]) -> State:
    """Tensors no two elements of which are equal."""
    state: State = {}
    start = 0
    for name, shape in shapes.items():
        count = int(torch.tensor(shape).prod())
        state[name] = torch.arange(start, start + count).reshape(shape)
        start += count
    return state


def resolved(config: Mapping[str, Any], shapes: Shapes, module: str, parameter: str = "weight") -> Parameter:
    found = Names(config, shapes).resolve(module, parameter)
    assert isinstance(found, Parameter), found
    return found


def refused(config: Mapping[str, Any], shapes: Shapes, module: str, parameter: str = "weight") -> str:
    found = Names(config, shapes).resolve(module, parameter)
    assert isinstance(found, str), found
    return found


def whole(tensor: str, rows: int, **more: Any) -> tuple[Region, ...]:
    return (Region(tensor, rows, **more),)


def config(architecture: str, **more: Any) -> dict[str, Any]:
    return {"architectures": [architecture], **more}


# --- names that stand, prefixes ---------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"


def test_a_name_that_stands() -> None:
    found = resolved(config("LlamaForCausalLM"), {f"{Q}.weight": (8, 4), f"{Q}.bias": (8,)}, Q)
    assert found == Parameter(f"{Q}.weight", (8, 4), whole(f"{Q}.weight", 8), Orientation.SAME)


def test_a_bias_is_a_vector_of_rows() -> None:
    found = resolved(config("LlamaForCausalLM"), {f"{Q}.bias": (8,)}, Q, "bias")
    assert (found.shape, found.regions) == ((8,), whole(f"{Q}.bias", 8))


def test_a_scalar_has_one_row() -> None:
    found = resolved({}, {"scale": ()}, "", "scale")
    assert (found.shape, found.regions) == ((), whole("scale", 1))


def test_nothing_of_that_name_is_no_message() -> None:
    assert refused(config("LlamaForCausalLM"), {f"{Q}.weight": (8, 4)}, "model.layers.1.self_attn.q_proj") == ""


@pytest.mark.parametrize("stored", [Q, Q.removeprefix("model.")])
@pytest.mark.parametrize("spoken", [Q, Q.removeprefix("model.")])
def test_the_base_models_prefix_may_be_missing_on_either_side(stored: str, spoken: str) -> None:
    found = resolved(config("LlamaForCausalLM"), {f"{stored}.weight": (8, 4)}, spoken)
    assert found.regions == whole(f"{stored}.weight", 8)


def test_an_unknown_architecture_is_as_stored() -> None:
    names = Names(config("MyModel", model_type="mine"), {"transformer.h.0.c_attn.weight": (8, 24)})
    found = names.resolve("h.0.c_attn")
    assert isinstance(found, Parameter)
    assert not names.known
    assert found.in_memory is Orientation.UNKNOWN
    assert found.shape == (8, 24)
    assert found.regions[0].orientation is Orientation.SAME


def test_a_custom_class_of_a_known_type_is_known() -> None:
    assert Names(config("MyLlama", model_type="llama"), {}).known


def test_the_names_of_old_layer_norms() -> None:
    name = "bert.encoder.layer.0.output.LayerNorm"
    found = resolved(config("BertForMaskedLM"), {f"{name}.gamma": (8,)}, name)
    assert found.regions == whole(f"{name}.gamma", 8)


# --- Conv1D -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["h.0.attn.c_attn", "transformer.h.0.attn.c_attn"])
def test_gpt2_stores_its_matrices_transposed(stored: str) -> None:
    found = resolved(config("GPT2LMHeadModel"), {f"{stored}.weight": (8, 24)}, "transformer.h.0.attn.c_attn")
    assert (found.shape, found.in_memory) == ((24, 8), Orientation.TRANSPOSED)
    assert found.regions == whole(f"{stored}.weight", 24, orientation=Orientation.TRANSPOSED)


def test_gpt2_has_linear_layers_and_embeddings_too() -> None:
    found = resolved(config("GPT2LMHeadModel"), {"wte.weight": (50, 8)}, "transformer.wte")
    assert (found.shape, found.in_memory) == ((50, 8), Orientation.SAME)


# --- experts: four combinations ---------------------------------------------------------------------------------------

MLP = "model.layers.1.mlp.experts"


def per_expert(gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj", at: str = MLP) -> Shapes:
    shapes: Shapes = {}
    for expert in range(3):
        shapes[f"{at}.{expert}.{gate}.weight"] = (6, 4)
        shapes[f"{at}.{expert}.{up}.weight"] = (6, 4)
        shapes[f"{at}.{expert}.{down}.weight"] = (4, 6)
    return shapes


FUSED: Shapes = {f"{MLP}.gate_up_proj": (3, 12, 4), f"{MLP}.down_proj": (3, 4, 6)}


def test_fused_experts_in_a_checkpoint_of_single_ones() -> None:
    shapes = per_expert()
    found = resolved(config("Qwen3MoeForCausalLM"), shapes, MLP, "gate_up_proj")
    assert (found.shape, found.experts, found.in_memory) == ((3, 12, 4), True, Orientation.SAME)
    assert found.regions[:2] == (
        Region(f"{MLP}.0.gate_proj.weight", 6, expert=0),
        Region(f"{MLP}.0.up_proj.weight", 6, start=6, expert=0),
    )
    state = state_of(shapes)
    expected = torch.stack(
        [torch.cat([state[f"{MLP}.{expert}.{part}_proj.weight"] for part in ("gate", "up")]) for expert in range(3)]
    )
    assert torch.equal(matrix(found, state), expected)


@pytest.mark.parametrize(("part", "start"), [("gate_proj", 0), ("up_proj", 6)])
def test_a_single_expert_in_a_checkpoint_of_fused_ones(part: str, start: int) -> None:
    found = resolved(config("Qwen3MoeForCausalLM"), FUSED, f"{MLP}.2.{part}")
    assert found.shape == (6, 4)
    assert found.regions == whole(f"{MLP}.gate_up_proj", 6, stored_start=start, expert=2)
    assert torch.equal(matrix(found, state_of(FUSED)), state_of(FUSED)[f"{MLP}.gate_up_proj"][2, start : start + 6])


def test_experts_named_as_they_are_stored() -> None:
    single = resolved(config("Qwen3MoeForCausalLM"), per_expert(), f"{MLP}.2.up_proj")
    fused = resolved(config("Qwen3MoeForCausalLM"), FUSED, MLP, "down_proj")
    assert single.regions == whole(f"{MLP}.2.up_proj.weight", 6)
    assert fused.regions == whole(f"{MLP}.down_proj", 4)


def test_mixtral_renames_the_block_as_well() -> None:
    old = "model.layers.1.block_sparse_moe.experts"
    found = resolved(config("MixtralForCausalLM"), per_expert("w1", "w3", "w2", old), MLP, "down_proj")
    assert {region.tensor for region in found.regions} == {f"{old}.{expert}.w2.weight" for expert in range(3)}
    found = resolved(config("MixtralForCausalLM"), FUSED, f"{old}.1.w3")
    assert found.regions == whole(f"{MLP}.gate_up_proj", 6, stored_start=6, expert=1)


def test_an_expert_that_is_not_there() -> None:
    assert "no expert 7" in refused(config("Qwen3MoeForCausalLM"), FUSED, f"{MLP}.7.up_proj")


def test_a_missing_expert_is_told() -> None:
    shapes = per_expert()
    del shapes[f"{MLP}.1.up_proj.weight"]
    assert "missing" in refused(config("Qwen3MoeForCausalLM"), shapes, MLP, "gate_up_proj")
    assert resolved(config("Qwen3MoeForCausalLM"), shapes, f"{MLP}.0.up_proj")


def test_experts_of_unequal_shapes_are_told() -> None:
    shapes = {**per_expert(), f"{MLP}.1.up_proj.weight": (7, 4)}
    assert "differ" in refused(config("Qwen3MoeForCausalLM"), shapes, MLP, "gate_up_proj")


def test_layers_that_the_model_does_not_have_do_not_disturb() -> None:
    shapes = {**per_expert(), **per_expert(at="model.layers.61.mlp.experts"), "model.layers.61.eh_proj.weight": (4, 8)}
    assert len(resolved(config("DeepseekV3ForCausalLM"), shapes, MLP, "gate_up_proj").regions) == 6


def test_experts_in_the_other_orientation() -> None:
    shapes: Shapes = {f"{MLP}.gate_up_proj": (3, 4, 12), f"{MLP}.gate_up_proj_bias": (3, 12)}
    found = resolved(config("GptOssForCausalLM"), shapes, MLP, "gate_up_proj")
    assert (found.shape, found.in_memory) == ((3, 12, 4), Orientation.TRANSPOSED)
    assert found.regions == whole(f"{MLP}.gate_up_proj", 12, orientation=Orientation.TRANSPOSED)


def test_a_bias_of_experts_has_a_vector_each() -> None:
    found = resolved(config("GptOssForCausalLM"), {f"{MLP}.down_proj_bias": (3, 4)}, MLP, "down_proj_bias")
    assert (found.shape, found.experts, found.regions) == ((3, 4), True, whole(f"{MLP}.down_proj_bias", 4))


@pytest.mark.parametrize("stored", [(3, 12, 4), (3, 4, 12)])
def test_experts_are_transposed_if_their_shape_asks_for_it(stored: tuple[int, ...]) -> None:
    at = "model.language_model.layers.0.mlp.experts"
    base = config("Qwen3VLMoeForConditionalGeneration", text_config={"hidden_size": 4})
    found = resolved(base, {f"{at}.gate_up_proj": stored}, at, "gate_up_proj")
    assert found.shape == (3, 12, 4)
    assert found.regions == whole(f"{at}.gate_up_proj", 12, orientation=transposed_if(stored != (3, 12, 4)))
    lacking = config("Qwen3VLMoeForConditionalGeneration")
    assert "hidden_size" in refused(lacking, {f"{at}.gate_up_proj": stored}, at, "gate_up_proj")


def test_the_order_of_an_experts_modules_parameters() -> None:
    assert Names(config("Qwen3MoeForCausalLM"), {}).registered_parameters(MLP) == ("gate_up_proj", "down_proj")
    names = Names(config("MixtralForCausalLM"), {})
    assert names.registered_parameters("model.layers.1.block_sparse_moe.experts") == ("gate_up_proj", "down_proj")
    assert names.registered_parameters("layers.1.mlp.experts") == ("gate_up_proj", "down_proj")
    assert names.registered_parameters("model.layers.1.self_attn") == ()
    assert Names({}, {}).registered_parameters(MLP) == ()


# --- fused and split matrices -----------------------------------------------------------------------------------------


def test_a_row_window_of_a_fused_matrix() -> None:
    shapes: Shapes = {"encoder.layers.0.attn.Wqkv.weight": (24, 8), "encoder.layers.0.attn.Wqkv.bias": (24,)}
    key = resolved(config("NomicBertModel"), shapes, "layers.0.self_attn.k_proj")
    bias = resolved(config("NomicBertModel"), shapes, "layers.0.self_attn.v_proj", "bias")
    assert key.regions == whole("encoder.layers.0.attn.Wqkv.weight", 8, stored_start=8)
    assert (key.shape, bias.shape) == ((8, 8), (8,))
    assert bias.regions == whole("encoder.layers.0.attn.Wqkv.bias", 8, stored_start=16)


def test_a_fused_name_in_a_checkpoint_of_split_matrices() -> None:
    at = "layers.0.self_attn"
    shapes: Shapes = {f"{at}.{part}_proj.weight": (8, 8) for part in "qkv"}
    found = resolved(config("NomicBertModel"), shapes, "encoder.layers.0.attn.Wqkv")
    assert found.shape == (24, 8)
    expected = [Region(f"{at}.{part}_proj.weight", 8, start=8 * i) for i, part in enumerate("qkv")]
    assert list(found.regions) == expected


def test_rows_of_rotary_heads_are_reordered() -> None:
    at = "vision_tower.encoder.blocks.0"
    shapes: Shapes = {f"{at}.wqkv.weight": (24, 8)}
    base = config("Kimi_K25ForConditionalGeneration", vision_config={"num_attention_heads": 2})
    query = resolved(base, shapes, "model.vision_tower.layers.0.attn.q_proj")
    value = resolved(base, shapes, "model.vision_tower.layers.0.attn.v_proj")
    assert query.regions == whole(f"{at}.wqkv.weight", 8, shuffle=(2, 2, 2))
    assert value.regions == whole(f"{at}.wqkv.weight", 8, stored_start=16)
    stored = state_of(shapes)[f"{at}.wqkv.weight"]
    expected = stored[:8].view(2, 2, 2, 8).transpose(1, 2).reshape(8, 8)
    assert torch.equal(matrix(query, {f"{at}.wqkv.weight": stored}), expected)


def test_the_reordering_is_undone_for_a_name_on_disk() -> None:
    shapes: Shapes = {f"model.vision_tower.layers.0.attn.{part}_proj.weight": (8, 8) for part in "qkv"}
    base = config("Kimi_K25ForConditionalGeneration", vision_config={"num_attention_heads": 2})
    found = resolved(base, shapes, "vision_tower.encoder.blocks.0.wqkv")
    stored = state_of(shapes)
    query, key, value = stored.values()
    undone = [part.view(2, 2, 2, 8).transpose(1, 2).reshape(8, 8) for part in (query, key)]
    assert torch.equal(matrix(found, stored), torch.cat([*undone, value]))


def test_heads_that_the_config_does_not_give_are_no_guess() -> None:
    shapes: Shapes = {"vision_tower.encoder.blocks.0.wqkv.weight": (24, 8)}
    for heads in (None, "16", 0, -1, True, 5, 10**9, [2]):
        base = config("Kimi_K25ForConditionalGeneration", vision_config={"num_attention_heads": heads})
        assert refused(base, shapes, "model.vision_tower.layers.0.attn.q_proj")


def test_interleaved_rows() -> None:
    at = "model.llm.layers.0.mlp"
    shapes: Shapes = {f"{at}.experts.w13_weight": (3, 12, 4), f"{at}.w13_dn.weight": (12, 4)}
    base = config("InklingForConditionalGeneration")
    found = resolved(base, shapes, "model.language_model.layers.0.mlp.experts", "gate_up_proj")
    assert found.regions == whole(f"{at}.experts.w13_weight", 12, shuffle=(1, 6, 2))
    assert "interleaved" in refused(base, shapes, "model.language_model.layers.0.mlp.gate_proj")


def test_two_kinds_of_experts_in_one_list() -> None:
    at = "model.layers.0.mlp.experts"
    shapes: Shapes = {f"{at}.{expert}.down_proj.weight": (4, 6) for expert in range(4)}
    base = config("Ernie4_5_VLMoeForConditionalGeneration")
    found = resolved(base, shapes, "model.language_model.layers.0.mlp.vision_moe.experts", "down_proj")
    assert [(region.tensor, region.expert) for region in found.regions] == [
        (f"{at}.2.down_proj.weight", 0),
        (f"{at}.3.down_proj.weight", 1),
    ]


def test_parts_of_unknown_sizes_are_no_guess() -> None:
    at = "model.layers.0.linear_attn"
    message = refused(config("OlmoHybridForCausalLM"), {f"{at}.conv1d.weight": (24, 1, 4)}, f"{at}.q_conv1d")
    assert "sizes" in message


# --- models of parts --------------------------------------------------------------------------------------------------

OLD_LLAVA = "language_model.model.layers.0.self_attn.q_proj"
NEW_LLAVA = "model.language_model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("stored", [OLD_LLAVA, NEW_LLAVA])
@pytest.mark.parametrize("spoken", [OLD_LLAVA, NEW_LLAVA, NEW_LLAVA.removeprefix("model.")])
def test_llava_moved_its_language_model(stored: str, spoken: str) -> None:
    found = resolved(config("LlavaForConditionalGeneration"), {f"{stored}.weight": (8, 4)}, spoken)
    assert found.regions == whole(f"{stored}.weight", 8)


def test_the_rules_of_a_part_follow_the_configs_type_of_it() -> None:
    shapes: Shapes = {f"language_model.model.layers.0.block_sparse_moe.experts.{e}.w2.weight": (4, 6) for e in range(2)}
    base = config("LlavaForConditionalGeneration", text_config={"model_type": "mixtral"})
    found = resolved(base, shapes, "model.language_model.layers.0.mlp.experts", "down_proj")
    assert [region.expert for region in found.regions] == [0, 1]
    assert refused(config("LlavaForConditionalGeneration"), shapes, "model.language_model.layers.0.mlp.experts") == ""


def test_two_meanings_are_refused() -> None:
    at = "model.vision_tower.layers.0.mlp"
    shapes: Shapes = {f"{at}.fc1.weight": (8, 4), "vision_tower.encoder.blocks.0.mlp.fc1.weight": (8, 4)}
    shapes["vision_tower.encoder.blocks.0.mlp.fc0.weight"] = (8, 4)
    message = refused(config("Kimi_K25ForConditionalGeneration"), shapes, f"{at}.fc1")
    assert "could be any of" in message or "ambiguous" in message
    assert "vision_tower.encoder.blocks.0.mlp.fc0.weight" in message


# --- whose names an adapter has ---------------------------------------------------------------------------------------

LAYERS = ("layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.down_proj")


def checkpoint(
    *towers: str, text: str = "llm.model", embedding: str = "embed_tokens", head: str = "llm.lm_head"
) -> Shapes:
    """Layers of the same names in a text model and in towers."""
    shapes: Shapes = {f"{at}.{layer}.weight": (8, 8) for at in (text, *towers) for layer in LAYERS}
    return {**shapes, f"{text}.{embedding}.weight": (50, 8), f"{head}.weight": (50, 8)}


def spoken(base: Mapping[str, Any], shapes: Shapes, *modules: str) -> tuple[NamesOfClass, str]:
    names = Names(base, shapes)
    targets = [(module, "weight") for module in modules]
    return ModelClasses(names).chosen(targets, lambda module, parameter: names.resolve(module, parameter) != "")


UNKNOWN = config("MyVlm", model_type="mine", text_config={"model_type": "mine_text"})


@pytest.mark.parametrize("before", ["model.", "", "language_model.model.", "transformer."])
@pytest.mark.parametrize("text", ["llm.model", "language_model.model", "llm.transformer", "backbone.text", "model"])
def test_an_unknown_architecture_by_the_only_text_model_that_fits(before: str, text: str) -> None:
    shapes = checkpoint("vision.model", "vision", "audio_tower", text=text, head="lm_head")
    who, unclear = spoken(UNKNOWN, shapes, *(before + layer for layer in LAYERS), "lm_head")
    assert not unclear
    for module in LAYERS:
        found = who.resolve(before + module)
        assert isinstance(found, Parameter)
        assert found.regions == whole(f"{text}.{module}.weight", 8)
    found = who.resolve("lm_head")
    assert isinstance(found, Parameter)
    assert found.regions == whole("lm_head.weight", 50)


def test_the_head_of_an_unknown_architecture_is_on_the_way_to_its_text_model() -> None:
    shapes = {**checkpoint("vision"), "talker.lm_head.weight": (9, 8)}
    who, _ = spoken(UNKNOWN, shapes, *(f"model.{layer}" for layer in LAYERS), "lm_head")
    found = who.resolve("lm_head")
    assert isinstance(found, Parameter)
    assert found.regions == whole("llm.lm_head.weight", 50)


@pytest.mark.parametrize("module", ["model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj"])
def test_a_tower_is_no_text_model_even_if_it_is_all_that_fits(module: str) -> None:
    shapes: Shapes = {f"{at}.{LAYERS[0]}.weight": (8, 8) for at in ("vision_tower", "audio.model", "eyes")}
    shapes["llm.model.embed_tokens.weight"] = (50, 8)
    who, unclear = spoken(UNKNOWN, shapes, module)
    assert (who.resolve(module), unclear) == ("", "")


@pytest.mark.parametrize("before", ["vision_tower.", "audio.model.", "visual.", "eyes."])
def test_a_towers_name_becomes_no_text_models(before: str) -> None:
    who, _ = spoken(UNKNOWN, checkpoint(), *(before + layer for layer in LAYERS))
    assert all(who.resolve(before + layer) == "" for layer in LAYERS)


def test_two_text_models_that_fit_are_not_told_apart() -> None:
    shapes = {**checkpoint(), **checkpoint(text="expert.model", head="expert.lm_head")}
    modules = [f"model.{layer}" for layer in LAYERS]
    who, unclear = spoken(UNKNOWN, shapes, *modules)
    assert "llm.model.layers" in unclear
    assert "expert.model.layers" in unclear
    assert who.resolve(modules[0]) == ""


def test_one_change_of_prefix_holds_for_all_names() -> None:
    shapes = {**checkpoint(), "other.model.layers.7.extra.weight": (8, 8), "other.model.embed_tokens.weight": (50, 8)}
    modules = [*(f"model.{layer}" for layer in LAYERS), "model.layers.7.extra"]
    who, unclear = spoken(UNKNOWN, shapes, *modules)
    assert (who.note, unclear) == ("", "")
    assert all(who.resolve(module) == "" for module in modules)


def test_what_a_known_class_explains_in_part_is_read_in_its_names() -> None:
    """So that only what it does not know is refused."""
    base = config("Qwen3_5ForConditionalGeneration", text_config={"model_type": "qwen3_5_text"})
    shapes: Shapes = {f"model.language_model.{layer}.weight": (8, 8) for layer in LAYERS}
    who, unclear = spoken(base, shapes, *(f"model.{layer}" for layer in LAYERS), "model.layers.1.mlp.nothing")
    assert not unclear
    assert "Qwen3_5ForCausalLM" in who.note
    assert isinstance(who.resolve(f"model.{LAYERS[0]}"), Parameter)
    assert who.resolve("model.layers.1.mlp.nothing") == ""


def test_a_text_model_and_a_tower_of_the_same_names_are_not_told_apart() -> None:
    """The talker of an omni model has layers like the thinker's; a name without either could be of both."""
    base = config(
        "Qwen3OmniMoeForConditionalGeneration",
        thinker_config={"text_config": {}},
        talker_config={"text_config": {}},
    )
    name = "layers.0.self_attn.q_proj"
    thinker, talker = f"thinker.model.language_model.{name}.weight", f"talker.model.{name}.weight"
    who, unclear = spoken(base, {thinker: (8, 8), talker: (8, 8)}, f"model.{name}")
    assert "could be" in unclear
    who, unclear = spoken(base, {thinker: (8, 8)}, f"model.{name}")
    assert not unclear
    found = who.resolve(f"model.{name}")
    assert isinstance(found, Parameter)
    assert found.regions == whole(thinker, 8)
    who, unclear = spoken(base, {talker: (8, 8)}, f"model.{name}")
    assert who.resolve(f"model.{name}") == ""


def test_a_name_that_stands_is_never_read_otherwise() -> None:
    shapes = {**checkpoint(), **{f"model.{layer}.weight": (8, 8) for layer in LAYERS}}
    who, unclear = spoken(UNKNOWN, shapes, *(f"model.{layer}" for layer in LAYERS))
    assert (who.note, unclear) == ("", "")


# --- tied weights -----------------------------------------------------------------------------------------------------

EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("more", "tied"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({}, False),
        ({"tie_word_embeddings": "yes"}, False),
    ],
)
def test_tied_heads_follow_the_config_and_its_default(more: dict[str, Any], tied: bool) -> None:
    heads = Names(config("LlamaForCausalLM", **more), {EMBEDDING: (50, 8)}).tied
    assert heads == ({"lm_head.weight": EMBEDDING} if tied else {})


def test_tied_heads_by_the_classes_default() -> None:
    assert Names(config("GemmaForCausalLM"), {EMBEDDING: (50, 8)}).tied == {"lm_head.weight": EMBEDDING}
    assert Names(config("GPT2LMHeadModel"), {"wte.weight": (50, 8)}).tied == {"lm_head.weight": "wte.weight"}


def test_a_stored_head_is_tied_all_the_same() -> None:
    shapes: Shapes = {EMBEDDING: (50, 8), "lm_head.weight": (50, 8)}
    assert Names(config("GemmaForCausalLM"), shapes).tied == {"lm_head.weight": EMBEDDING}


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
        ("model.language_model.embed_tokens.weight", "lm_head.weight"),
    ],
)
def test_a_tied_head_has_the_name_of_its_checkpoints_style(embedding: str, head: str) -> None:
    for flag in ({"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}):
        names = Names(config("LlavaForConditionalGeneration", **flag), {embedding: (50, 8)})
        assert names.tied == {head: embedding}


def test_an_encoder_and_a_decoder_share_an_embedding() -> None:
    heads = Names(config("T5ForConditionalGeneration"), {"shared.weight": (50, 8)}).tied
    assert heads["lm_head.weight"] == heads["encoder.embed_tokens.weight"] == "shared.weight"


def test_a_tied_head_is_spoken_of_as_it_is_called_in_memory() -> None:
    """On disk it would be ``output.weight``."""
    names = Names(
        config("MistralLarge4ForConditionalGeneration", tie_word_embeddings=True), {"tok_embeddings.weight": (50, 8)}
    )
    assert names.tied == {"output.weight": "tok_embeddings.weight"}
    assert names.tied_by_name["lm_head.weight"] == "output.weight"


def test_ties_of_biases_of_layers_and_across_numbers() -> None:
    bert = Names(
        config("BertForMaskedLM"), {"cls.predictions.bias": (50,), "bert.embeddings.word_embeddings.weight": (50, 8)}
    )
    assert bert.tied == {
        "cls.predictions.decoder.bias": "cls.predictions.bias",
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    }
    query = "layers.7.self_attn.q_proj.weight"
    gemma = Names(config("DiffusionGemmaForBlockDiffusion"), {f"model.decoder.{query}": (8, 8)})
    assert gemma.tied == {f"model.encoder.language_model.{query}": f"model.decoder.{query}"}
    zamba = Names(config("ZambaForCausalLM"), {"model.layers.2.shared_transf.self_attn.q_proj.weight": (8, 8)})
    assert zamba.is_tied_across("model.layers.2.shared_transf.self_attn.q_proj.weight") and not zamba.tied
    assert not zamba.is_tied_across("model.layers.2.mamba.in_proj.weight")


# --- files from strangers ---------------------------------------------------------------------------------------------

HOSTILE: list[Any] = [
    {"architectures": None},
    {"architectures": "LlamaForCausalLM"},
    {"architectures": [["x"]]},
    {"architectures": [{}], "model_type": ["llama"]},
    {"model_type": {"a": 1}, "text_config": 3},
    {"architectures": ["LlavaForConditionalGeneration"], "text_config": [1], "vision_config": {"model_type": []}},
    {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": "nothing"}},
    {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "text_config": {"hidden_size": "4"}},
    {"architectures": ["Qwen3OmniMoeForConditionalGeneration"], "thinker_config": {"text_config": []}},
    {"architectures": ["__class__"], "tie_word_embeddings": {}},
]


@pytest.mark.parametrize("base", HOSTILE, ids=range(len(HOSTILE)))
def test_a_config_of_wrong_types_is_no_bug(base: dict[str, Any]) -> None:
    shapes: Shapes = {**FUSED, **per_expert(), "a": (), "b": (0,), "c.weight": (0, 0), "%s.9.weight": (1, 2, 3, 4, 5)}
    names = Names(base, shapes)
    for name in [*shapes, "", ".", "a.b", f"{MLP}.99999999999999999999.up_proj.weight", "%s.9.weight"]:
        module, _, parameter = name.rpartition(".")
        assert names.resolve(module, parameter) is not None
    assert names.registered_parameters("%s") == ()
    assert names.tied is not None
    targets = [
        (module, "weight") for module in ("a.layers.0.b", "layers.99999999999999999999.b", "", "0", "..", "lm_head")
    ]
    who, _ = ModelClasses(names).chosen(targets, lambda module, parameter: names.resolve(module, parameter) != "")
    assert all(who.resolve(*target) is not None for target in targets)


def test_names_that_look_like_our_own_marks_do_not_change_what_others_mean() -> None:
    odd: Shapes = {
        f"model.layers.{mark}.mlp.experts.{mark}.up_proj.weight": (6, 4) for mark in ("#", "900000000", "x900000001")
    }
    found = resolved(config("Qwen3MoeForCausalLM"), {**odd, **per_expert()}, MLP, "gate_up_proj")
    assert found.regions == resolved(config("Qwen3MoeForCausalLM"), per_expert(), MLP, "gate_up_proj").regions


@pytest.mark.parametrize("name", ["w13_dn.weight", "experts.w13_weight", "w2_md.weight"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (0, 0), (3, 3), (0, 0, 0), (1, 3, 3), (2, 2, 2, 2)])
def test_shapes_that_do_not_fit_a_conversion_are_refused(name: str, shape: tuple[int, ...]) -> None:
    at = "model.language_model.layers.0.mlp"
    names = Names(config("InklingForConditionalGeneration"), {f"model.llm.layers.0.mlp.{name}": shape})
    for module, parameter in ((f"{at}.gate_proj", "weight"), (f"{at}.experts", "gate_up_proj")):
        found = names.resolve(module, parameter)
        assert isinstance(found, (str, Parameter))


# --- cost -------------------------------------------------------------------------------------------------------------


def test_a_large_mixture_of_experts_takes_no_time() -> None:
    shapes: Shapes = {}
    for layer in range(61):
        for expert in range(256):
            for part in ("gate_proj", "up_proj", "down_proj"):
                shapes[f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"] = (8, 8)
    names = Names(config("DeepseekV3ForCausalLM"), shapes)
    started = time.process_time()
    assert isinstance(names.resolve("model.layers.60.mlp.experts", "gate_up_proj"), Parameter)
    assert isinstance(names.resolve("model.layers.3.mlp.experts.200.up_proj"), Parameter)
    assert time.process_time() - started < 5  # 0.3 s here; the bound is for machines that are busy
    assert "_index" not in Names(config("LlamaForCausalLM"), {f"{Q}.weight": (8, 4)}).__dict__
