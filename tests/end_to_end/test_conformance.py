"""Conformance: what a merge writes is what PEFT writes, bit for bit, and computes what base and adapter compute.

Each row of the table is a model, a feature of adapters and what the base is stored in, and proves something that no
other row does. A new row is one line. Where PEFT cannot be matched in bits, the row says why:

- ``rounds="twice"``: PEFT rounds the update before it rounds the sum. We round once, so we must be nearer to the exact
  sum, and not just in other bits.
- ``exact=False``: the order of float32 sums differs. We must not be farther from the exact result than PEFT is.
- ``oracle="untied"``: PEFT merges both sides of tied embeddings into one tensor, and the model then computes something
  else than base and adapter. The oracle is PEFT on a base whose output head is a weight of its own.
- ``oracle="direct"``: PEFT loses updates or refuses the adapter. The oracle is W + s·B·A in float64.

Rows of which a neighbour proves most are ``slow``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import shardmerge
from shardmerge.reporting.inspection import inspect_path
from tests.support import zoo
from tests.support.builders import run_python, slow_if
from tests.support.conformance import FAMILIES, Row, merged, row
from tests.support.peft_oracle import _new_folder as new_folder
from tests.support.peft_oracle import assert_same_bits, bits, make_config, stored
from tests.support.zoo import BF16, F16, F32, F64, by_hand, lora, peft

pytestmark = pytest.mark.usefixtures("one_thread")


ALL = "all-linear"
EVERY = lora(ALL)
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
TOKENS = [5, 3, 50]
#: On disk, and as modules were called before transformers fused experts and moved the text models of others.
OLD_LAYERS = r"layers\..*proj"

ARCHITECTURES = (
    row("llama", "all linear", EVERY),
    row("llama", "all linear", EVERY, BF16),
    row("llama", "all linear", EVERY, F16),
    row("llama-tied", "all linear", EVERY, slow=True),
    row("llama-biased", "all linear", EVERY, slow=True),
    row("mistral", "all linear", EVERY, BF16),
    row("qwen2", "all linear", EVERY),
    row("qwen3", "all linear", EVERY, F16),
    row("gemma2", "all linear", EVERY),
    row("gemma3", "all linear", EVERY, BF16),
    row("phi3", "all linear", EVERY),
    row("gpt2", "all linear", EVERY),
    row("gpt2", "all linear", EVERY, BF16, slow=True),
    row("gpt2-bare", "all linear", EVERY),
    row("gpt-neox", "all linear", EVERY),
    row("opt", "all linear", EVERY),
    row("falcon", "all linear", EVERY),
    row("bert", "all linear", EVERY),
    row("bert-gamma", "all linear", EVERY),
    row("t5", "all linear", EVERY),
    row("whisper", "all linear", EVERY),
    row("vit", "all linear", EVERY),
    row("clip", "all linear", EVERY),
    row("resnet", "convolutions and head", lora("convolution", "classifier.1")),
    row("llama4", "linear layers", lora("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    row("qwen2.5-vl", "all linear", EVERY),
    row("qwen2.5-vl-v5", "all linear", EVERY),
    row("llava", "all linear", EVERY),
    row("llava-v5", "all linear", EVERY),
    row("gemma3-mm", "all linear", EVERY),
    row("nomic-bert", "all linear", EVERY),
    row("nomic-bert", "all linear", EVERY, BF16, slow=True),
    row("nomic-bert-v5", "all linear", EVERY),
)

EXPERT_MODELS = (
    row("mixtral", "all linear", EVERY),
    row("mixtral", "both parameters", lora("q_proj", target_parameters=EXPERTS)),
    row("mixtral", "both parameters", lora("q_proj", target_parameters=EXPERTS[::-1]), BF16, rounds="twice"),
    row("mixtral", "gate and up", lora("q_proj", target_parameters=EXPERTS[:1]), slow=True),
    row("mixtral", "down", lora("q_proj", target_parameters=EXPERTS[1:])),
    row("mixtral", "router", lora("q_proj", target_parameters=["gate.weight"])),
    row("mixtral", "names of v4", by_hand(r"proj|experts|gate")),
    row("mixtral-v5", "names of v4", by_hand(r"proj|experts|gate", of="mixtral")),
    row("mixtral-v5", "both parameters", lora("q_proj", target_parameters=EXPERTS), slow=True),
    row("mixtral-v5", "down", lora("q_proj", target_parameters=EXPERTS[1:]), F16, rounds="twice"),
    row("qwen2-moe", "both parameters", lora("q_proj", target_parameters=EXPERTS)),
    row("qwen2-moe", "names of v4", by_hand(OLD_LAYERS), oracle="direct", why="PEFT loses the experts"),
    row("qwen3-moe", "all linear", EVERY),
    row("qwen3-moe", "names of v4", by_hand(r"layers.*(_proj|gate)\."), oracle="direct", why="PEFT loses dense layers"),
    row("deepseek-v3", "all linear", EVERY),
    row("deepseek-v3", "both parameters", lora("q_b_proj", target_parameters=EXPERTS)),
    row("deepseek-v3", "names of v4", by_hand(OLD_LAYERS), oracle="direct", why="PEFT loses dense and shared experts"),
    row("gpt-oss", "all linear", EVERY),
    row("gpt-oss", "both parameters", lora("q_proj", target_parameters=EXPERTS)),
    row("gpt-oss", "gate and up", lora("q_proj", target_parameters=EXPERTS[:1]), BF16, rounds="twice"),
    row("gpt-oss", "down", lora("q_proj", target_parameters=EXPERTS[1:]), slow=True),
    row("gpt-oss", "router", lora("q_proj", target_parameters=["router.weight"])),
    row("llama4", "both parameters", lora("q_proj", target_parameters=EXPERTS)),
)

FEATURES = (
    row("llama", "rsLoRA", lora(ALL, use_rslora=True)),
    row(
        "llama",
        "patterns",
        lora(ALL, rank_pattern={"q_proj": 3, r"layers\.1\.mlp\.down_proj": 7}, alpha_pattern={r".*\.1\..*_proj": 9}),
    ),
    row("llama", "regular expression", lora(target_modules=r".*layers\.1\..*\.(q_proj|down_proj)")),
    row("llama", "one layer", lora("q_proj", "down_proj", layers_to_transform=[1]), slow=True),
    row("llama", "fan_in_fan_out on Linear", lora("q_proj", "down_proj", on_disk={"fan_in_fan_out": True})),
    row("llama", "DoRA", lora(ALL, use_dora=True)),
    row("llama", "DoRA", lora(ALL, use_dora=True), BF16),
    row("llama-biased", "DoRA", lora(ALL, use_dora=True), F16, slow=True),
    row("llama-biased", "lora_bias", lora(ALL, lora_bias=True)),
    row("llama-biased", "lora_bias", lora(ALL, lora_bias=True), BF16),
    row("llama-biased", "bias all", lora("q_proj", "down_proj", bias="all"), slow=True),
    row("llama-biased", "bias lora_only", lora("q_proj", "down_proj", bias="lora_only"), BF16),
    row("bert-gamma", "bias all", lora("query", "output.dense", bias="all")),
    row("llama", "modules_to_save", lora("q_proj", modules_to_save=["lm_head", "embed_tokens"])),
    row("llama", "modules_to_save of norms", lora("q_proj", modules_to_save=["input_layernorm"]), BF16, slow=True),
    row("bert-gamma", "classifier", lora("query", "value", task_type="SEQ_CLS")),
    row("vit", "classifier", lora("q_proj", "fc2", modules_to_save=["classifier"]), slow=True),
    row("gpt2", "Conv1D saved", lora("c_attn", modules_to_save=["c_proj"])),
    row("gpt2-bare", "Conv1D saved", lora("c_attn", modules_to_save=["c_fc"]), slow=True),
    row("gpt-oss", "experts saved", lora("o_proj", modules_to_save=["experts"])),
    row("deepseek-v3", "experts saved by an end of a name", lora("o_proj", modules_to_save=["experts"])),
    row("mixtral", "experts saved", lora("o_proj", modules_to_save=["experts"]), slow=True),
    row("nomic-bert", "first part of a stored tensor saved", lora("o_proj", modules_to_save=["q_proj"])),
    row(
        "nomic-bert",
        "all parts of a stored tensor saved",
        lora("o_proj", modules_to_save=["q_proj", "k_proj", "v_proj"]),
    ),
    row("llama", "embedding", lora("q_proj", "embed_tokens")),
    row("llama", "embedding", lora("q_proj", "embed_tokens"), BF16, rounds="twice"),
    row(
        "llama", "DoRA on embedding", lora("embed_tokens", use_dora=True), exact=False, why="norms over the vocabulary"
    ),
    row("llama", "DoRA on embedding", lora("embed_tokens", use_dora=True), F16, exact=False, slow=True),
    row("bert", "embedding", lora("word_embeddings", "position_embeddings")),
    row("llama", "head", lora("q_proj", "lm_head")),
    row("llama", "head", lora("q_proj", "lm_head"), BF16, slow=True),
    row("gpt-neox", "head and embedding", lora("embed_in", "lm_head")),
    row("gpt-neox", "head by its first name", by_hand("embed_out"), oracle="direct", why="PEFT knows lm_head alone"),
    row("llama", "tokens", lora("q_proj", trainable_token_indices=TOKENS)),
    row("llama", "tokens", lora("q_proj", trainable_token_indices=TOKENS), BF16, slow=True),
    row("llama", "tokens by module", lora("q_proj", trainable_token_indices={"embed_tokens": TOKENS, "lm_head": [4]})),
    row("llama", "TRAINABLE_TOKENS", peft("TrainableTokensConfig", "embed_tokens", token_indices=TOKENS)),
    row("gpt2", "right fan_in_fan_out", lora("c_attn", "c_proj", fan_in_fan_out=True)),
    row("gpt2", "wrong fan_in_fan_out", lora("c_attn", "c_proj", on_disk={"fan_in_fan_out": False})),
    row("gpt2", "DoRA", lora("c_attn", "c_proj", use_dora=True), exact=False, why="norms over rows of tiles"),
    row("gpt2-bare", "lora_bias", lora("c_attn", "c_proj", lora_bias=True), BF16, slow=True),
    row("gpt2", "positions", lora("wpe"), slow=True),
    row("whisper", "Conv1d", lora("conv1", "conv2")),
    row("whisper", "DoRA on Conv1d", lora("conv1", "conv2", use_dora=True)),
    row("resnet", "Conv2d", lora("convolution"), BF16, slow=True),
    row("resnet", "DoRA on Conv2d", lora("convolution", use_dora=True)),
    row("vit", "Conv2d", lora("projection"), slow=True),
    row("qwen2.5-vl", "Conv3d", lora("patch_embed.proj")),
    row("qwen2.5-vl", "DoRA on Conv3d", lora("patch_embed.proj", use_dora=True), F16, slow=True),
    row("nomic-bert", "DoRA on a part of a stored tensor", lora("q_proj", "v_proj", use_dora=True)),
    row("phi3", "DoRA", lora("qkv_proj", "down_proj", use_dora=True), slow=True),
)

TIED = (
    row("llama-tied", "embedding", lora("embed_tokens"), oracle="untied"),
    row("llama-tied", "embedding", lora("embed_tokens"), tied="peft"),
    row("llama-tied", "head", lora("lm_head"), oracle="untied"),
    row("llama-tied", "head", lora("lm_head"), tied="peft"),
    row("llama-tied", "both", lora("lm_head", "embed_tokens"), oracle="untied"),
    row("llama-tied", "both", lora("lm_head", "embed_tokens"), BF16, oracle="untied", rounds="twice", slow=True),
    row("llama-tied", "tying ensured", lora("lm_head", "embed_tokens", ensure_weight_tying=True), oracle="untied"),
    row("llama-tied", "embedding saved", lora("q_proj", modules_to_save=["embed_tokens"])),
    row("llama-tied", "head saved", lora("q_proj", modules_to_save=["lm_head"])),
    row("llama-tied", "saved, tying ensured", lora(modules_to_save=["lm_head"], ensure_weight_tying=True)),
    row("llama-tied", "tokens", lora("q_proj", trainable_token_indices=TOKENS)),
    row("llama-tied", "tokens of the head", lora(trainable_token_indices={"lm_head": TOKENS}), oracle="untied"),
    row(
        "llama-tied",
        "other tokens of the head",
        lora("q_proj", trainable_token_indices={"embed_tokens": [5, 3], "lm_head": [5, 7]}),
        oracle="untied",
        slow=True,
    ),
    row("llama-tied", "TRAINABLE_TOKENS", peft("TrainableTokensConfig", token_indices=TOKENS)),
    row("gpt2-bare", "embedding", lora("wte"), oracle="untied"),
    row("gemma3-mm", "head", lora("lm_head"), oracle="untied", head="language_model.lm_head.weight", slow=True),
    row("opt", "head", lora("lm_head"), oracle="untied", slow=True),
    row("whisper", "head", lora("proj_out"), oracle="untied"),
    row("t5", "head", lora("lm_head"), tied="peft", why="T5 scales its output by whether it says that it is tied"),
    row("t5-1.1", "head", lora("lm_head")),
    row("t5-1.1", "head saved", lora("q", modules_to_save=["lm_head"])),
    row("t5-1.1", "tokens", lora("q", trainable_token_indices=TOKENS), slow=True),
    row("mt5", "head", lora("lm_head")),
    row("mt5", "tokens", lora("q", trainable_token_indices=TOKENS)),
)

VOCABULARY = (
    row("llama", "more tokens", lora("q_proj", more_tokens=4)),
    row("llama", "more tokens, all targeted", lora("q_proj", "embed_tokens", "lm_head", more_tokens=4)),
    row(
        "llama", "more tokens, saved", lora("q_proj", modules_to_save=["lm_head", "embed_tokens"], more_tokens=4), BF16
    ),
    row("llama", "more tokens, trained alone", lora("q_proj", trainable_token_indices=[61, 63, 5], more_tokens=4)),
    row("llama-tied", "more tokens", lora("q_proj", more_tokens=4)),
    row("gptj", "more tokens, bias of the head", lora(ALL, more_tokens=4)),
    row("modernbert", "more tokens", lora(ALL, more_tokens=4)),
    row("whisper", "more tokens", lora(ALL, more_tokens=4), slow=True),
    row("openai-gpt", "more tokens", lora(ALL, more_tokens=4), slow=True),
    row("xlnet", "more tokens", lora(ALL, more_tokens=4), slow=True),
    row("electra", "more tokens", lora(ALL, more_tokens=4), slow=True),
    row("distilbert", "more tokens", lora(ALL, more_tokens=4), slow=True),
    row("biogpt", "more tokens", lora(ALL, more_tokens=4), slow=True),
)

OLD_NAMES = (
    row("qwen2.5-vl", "old names", by_hand(OLD_LAYERS), oracle="direct", why="PEFT loses all of it"),
    row("llava", "old names", by_hand(OLD_LAYERS)),
    row("gemma3-mm", "old names", by_hand("language_model.*proj"), slow=True),
    row("vit", "old names", by_hand("query|value|dense"), oracle="direct", why="PEFT refuses them"),
    row("nomic-bert", "fused names", by_hand("Wqkv|fc|out_proj"), oracle="direct", why="PEFT refuses them"),
    row("llama", "no prefix", by_hand(OLD_LAYERS, strip="model."), oracle="direct", why="PEFT loses all of it"),
)


TABLE = (*ARCHITECTURES, *EXPERT_MODELS, *FEATURES, *TIED, *VOCABULARY, *OLD_NAMES, *FAMILIES)
each_row = pytest.mark.parametrize(
    "row", [pytest.param(row, marks=slow_if(row.slow or row in ARCHITECTURES[1::2]), id=str(row)) for row in TABLE]
)

#: How far a merged model's answer may be from that of base and adapter, relative to the largest of its numbers. Sums in
#: another order leave 3e-6 in float32 (RandLoRA's, of PEFT's own merge too, 2e-5); 16 bits round every weight, which
#: leaves PEFT's merges 2e-2 and 2e-3.
TOLERANCE = {F32: 5e-5, BF16: 0.04, F16: 0.005}


@pytest.mark.slow
def test_plans_import_no_torch() -> None:
    """All rows are planned in one process that has never heard of torch."""
    configs = []
    for each in TABLE:
        if not each.slow and each not in ARCHITECTURES[1:]:
            base, adapter = (
                zoo.base_folder(each.model, each.dtype),
                zoo.adapter_folder(each.model, each.adapter, each.dtype),
            )
            configs.append({**make_config(new_folder("merged") / "out", base, [adapter]), "tied": each.tied})
    program = new_folder("program") / "plan_all.py"
    program.write_text(
        "import json, sys\n"
        "import shardmerge\n"
        "for config in json.load(open(sys.argv[1])):\n"
        "    shardmerge.plan(config)\n"
        "    loaded = {'torch', 'transformers', 'peft', 'numpy'} & sys.modules.keys()\n"
        "    assert not loaded, (config, loaded)\n"
    )
    (program.parent / "configs.json").write_text(json.dumps(configs))
    result = run_python(program, program.parent / "configs.json")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in TABLE if not row.slow and not row.adapter.more_tokens], ids=str)
def test_pickled_views_give_the_same_bytes(row: Row) -> None:
    """An adapter_model.bin whose tensors are all views with strides of their own."""
    folder, source = new_folder("pickled"), zoo.adapter_folder(row.model, row.adapter, row.dtype)
    shutil.copy(source / "adapter_config.json", folder)
    views = {name: _as_view(tensor) for name, tensor in load_file(source / "adapter_model.safetensors").items()}
    torch.save(views, folder / "adapter_model.bin")
    output = new_folder("merged") / "out"
    config = make_config(output, zoo.base_folder(row.model, row.dtype), [folder])
    shardmerge.merge({**config, "tied": row.tied})
    assert_same_bits(stored(output), stored(merged(row)))


def _as_view(tensor: Tensor) -> Tensor:
    if tensor.ndim > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    wide = tensor.new_zeros(2 * tensor.numel())
    wide[::2] = tensor.reshape(-1)
    return wide[::2].view(tensor.shape)


@pytest.mark.slow
def test_inspect_has_no_complaint() -> None:
    """What an adapter is can be told without its base."""
    for each in TABLE:
        if each.slow or each.adapter.stored:
            continue
        found = inspect_path(str(zoo.adapter_folder(each.model, each.adapter, each.dtype)))
        assert found["problems"] == [], (each, found["problems"])
        assert found["updates"] and found["targets"] and found["peft_version"], each


@each_row
def test_tensors(row: Row) -> None:
    ours = stored(merged(row))
    if row.oracle == "direct":
        assert_sums(ours, *zoo.exact_sum(row.model, row.adapter))
        return
    untied = row.oracle == "untied"
    theirs = stored(zoo.merged_by_peft(row.model, row.adapter, row.dtype, untied=untied))
    theirs = {row.head if name == "lm_head.weight" else name: tensor for name, tensor in theirs.items()}
    if row.exact and row.rounds == "once":
        assert_same_bits(ours, theirs)
    else:
        exact = stored(zoo.merged_by_peft(row.model, row.adapter, row.dtype, F64, untied=untied))
        assert_no_worse(ours, theirs, exact)
        if row.rounds == "twice":
            assert any(bits(ours[name]) != bits(theirs[name]) for name in ours), "PEFT rounds once by now"


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=slow_if(row.slow or row in ARCHITECTURES), id=str(row)) for row in TABLE],
)
def test_answer(row: Row) -> None:
    inputs = zoo.MODELS[row.model].inputs()
    if row.oracle == "direct":
        expected = zoo.exact_answer(row.model, row.adapter)
    elif row.tied == "peft":
        expected = zoo.answer(zoo.load(zoo.merged_by_peft(row.model, row.adapter, row.dtype), F32), inputs)
    else:
        expected = zoo.adapter_answer(row.model, row.adapter, row.dtype)
    ours = zoo.answer(zoo.load(merged(row), F32), inputs)
    base = zoo.base_answer(row.model, row.dtype)
    assert ours.shape == expected.shape
    assert distance(ours, expected) < TOLERANCE[row.dtype]
    assert distance(base, expected[..., : base.shape[-1]]) > 5 * TOLERANCE[row.dtype], "the adapter hardly matters"


@each_row
def test_verification(row: Row) -> None:
    """All rows of every touched tensor, computed again in float64 by other code."""
    report = shardmerge.verify(merged(row), rows=None).raise_for_status()
    assert report.complete and not report.notes, report
    assert report.touched + report.untouched == report.tensors and report.worst <= 1


@pytest.mark.parametrize("row", [row for row in TABLE if row.oracle == "direct"], ids=str)
def test_peft_is_no_oracle(row: Row) -> None:
    """What the table says of PEFT is so: it refuses the adapter, or leaves weights as they are that it updates."""
    try:
        theirs = stored(zoo.merged_by_peft(row.model, row.adapter, row.dtype))
    except ValueError:
        return
    base = stored(zoo.base_folder(row.model, row.dtype))
    exact, _ = zoo.exact_sum(row.model, row.adapter)
    lost = [name for name in base if torch.equal(theirs[name], base[name]) and not torch.equal(exact[name], base[name])]
    assert lost, "PEFT can be this row's oracle by now"


def test_rows_have_names_of_their_own() -> None:
    names = [str(row) for row in TABLE]
    assert sorted(names) == sorted(set(names))


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference relative to the largest number."""
    return float((one - other).abs().max() / other.abs().max())


def rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def assert_no_worse(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> None:
    """Of every tensor the error, as a root mean square, is no larger than PEFT's."""
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in ours.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in theirs.items()
    }
    for name, wanted in exact.items():
        assert rms(ours[name] - wanted) <= rms(theirs[name] - wanted), name


def assert_sums(ours: Mapping[str, Tensor], exact: Mapping[str, Tensor], size: Mapping[str, Tensor]) -> None:
    """Every element is the exact sum but for float32's roundings of it: one for each product of rank 5, two after."""
    assert sorted(ours) == sorted(exact)
    for name, wanted in exact.items():
        bound = size[name] * (5 + 2) * torch.finfo(torch.float32).eps / 2
        assert ours[name].dtype == torch.float32
        assert ((ours[name] - wanted).abs() <= bound).all(), name
