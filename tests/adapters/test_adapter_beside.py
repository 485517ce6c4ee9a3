"""Files of weights beside an adapter: merged, refused by name, or left out as the config says; never dropped."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import shardmerge
from shardmerge import PlanError
from shardmerge.config.schema import MergeConfig
from shardmerge.errors import VerifyError
from shardmerge.planning.planner import make_plan
from shardmerge.reporting.inspection import inspect_path
from shardmerge.reporting.starter import starter_config
from tests.support import zoo
from tests.support.builders import (
    HIDDEN,
    Q0,
    VOCAB,
    Place,
    contents,
    layer,
    llama_tensors,
    make_place,
    model_config,
    peft_config,
    peft_tensors,
    random_tensor,
    read_tensors,
    write_base,
    write_json,
    write_peft,
)
from tests.support.peft_oracle import merge_to
from tests.support.zoo import lora

P = "base_model.model."
NORM = layer(0, "input_layernorm") + ".weight"
K0 = layer(0, "self_attn.k_proj") + ".weight"
EMBED = "model.embed_tokens.weight"
VALUE_HEAD = {"v_head.summary.weight": torch.ones(1, HIDDEN)}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


def trained(name: str, seed: int = 70) -> Tensor:
    return random_tensor(llama_tensors()[name].shape, seed, std=1.0)


def put(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as the file's name says."""
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def refusal(place: Place, **changes: Any) -> str:
    with pytest.raises(PlanError) as raised:
        shardmerge.plan(place.config(**changes))
    return str(raised.value)


def entry(place: Place, **changes: Any) -> dict[str, Any]:
    return place.config(adapters=[{"path": str(place.adapter), **changes}])


# --- what fits is merged ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "prefix"),
    [
        ("non_lora_state_dict.bin", P),
        ("non_lora_trainables.bin", P),
        ("norms.safetensors", ""),
        ("trained.pt", "_orig_mod."),
        ("trained.pth", f"{P}_orig_mod."),
        ("trained.ckpt", ""),
    ],
)
def test_trained_weights_beside_it_are_merged(place: Place, file: str, prefix: str) -> None:
    """Under any prefix that wrappers leave, in any file that can be read: W' = V, and LoRA is added where it was."""
    shardmerge.merge(place.config())
    without = read_tensors(place.output)
    put(place.adapter / file, {f"{prefix}{NORM}": trained(NORM), f"{prefix}{K0}": trained(K0, 71)})
    output = place.folder / "with"
    report = shardmerge.merge(place.config(output={"path": str(output)}))
    found = read_tensors(output)
    assert torch.equal(found[NORM], trained(NORM)) and torch.equal(found[K0], trained(K0, 71))
    assert all(torch.equal(found[name], tensor) for name, tensor in without.items() if name not in (NORM, K0))
    assert report.adapter_bytes > (place.adapter / file).stat().st_size
    assert shardmerge.verify(str(output), rows=None).raise_for_status().complete


@pytest.mark.parametrize("model", ["gpt2", "mixtral", "qwen2.5-vl"])
def test_it_computes_what_base_and_adapter_compute(tmp_path: Path, model: str) -> None:
    """The oracle is PEFT, with the weights put into the model by the names that they have there: norms and the rest
    that LoRA leaves alone, a Conv1D's among them."""
    adapter = lora("c_fc" if model == "gpt2" else "q_proj")
    folder = shutil.copytree(zoo.adapter_folder(model, adapter), tmp_path / "adapter")
    wrapped = zoo._wrapped(model, adapter, zoo.F32, zoo.F32)
    names = ("norm", "ln_", "bias", "c_proj", "o_proj")
    chosen = {
        name: parameter
        for name, parameter in wrapped.named_parameters()
        if any(part in name for part in names) and "lora_" not in name and "base_layer" not in name
    }
    assert len(chosen) > 4
    with torch.no_grad():
        for parameter in chosen.values():
            parameter += 0.1 * torch.randn_like(parameter)
    torch.save({name: parameter.detach().clone() for name, parameter in chosen.items()}, folder / "non_lora.bin")
    expected = zoo.answer(wrapped, zoo.MODELS[model].inputs())
    merge_to(tmp_path / "out", zoo.base_folder(model), folder)
    ours = zoo.answer(zoo.load(tmp_path / "out"), zoo.MODELS[model].inputs())
    assert not torch.allclose(ours, zoo.adapter_answer(model, adapter), rtol=0, atol=1e-3)
    assert torch.allclose(ours, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_names_of_a_text_model_alone(tmp_path: Path) -> None:
    """What is beside an adapter has its names, whoever's they are; a head with no place does not change whose."""
    folder = shutil.copytree(zoo.adapter_folder("gemma3", lora("q_proj")), tmp_path / "adapter")
    norm = torch.rand(40)
    torch.save({f"{P}{NORM}": norm}, folder / "non_lora.bin")
    merge_to(tmp_path / "out", zoo.base_folder("gemma3-mm"), folder)
    found = zoo.load(tmp_path / "out").model.language_model.layers[0].input_layernorm.weight
    assert torch.equal(found, norm)
    torch.save(VALUE_HEAD, folder / "value_head.bin")
    with pytest.raises(PlanError) as raised:
        merge_to(tmp_path / "again", zoo.base_folder("gemma3-mm"), folder)
    assert [text for text in raised.value.problems if "value_head.bin" not in text] == []


def test_a_wrapped_layers_own_weight_is_what_the_adapter_adds_to(place: Place) -> None:
    """Some trainers write all that is not LoRA's, the frozen base with it, by the names within PEFT's wrappers."""
    copies = {
        f"{P}{name.replace('_proj.weight', '_proj.base_layer.weight')}": tensor
        for name, tensor in ((name, tensor) for name, tensor in llama_tensors().items() if name.startswith(Q0))
    }
    shardmerge.merge(place.config())
    put(place.adapter / "non_lora_state_dict.bin", {**copies, f"{P}{NORM}": trained(NORM)})
    output = place.folder / "with"
    shardmerge.merge(place.config(output={"path": str(output)}))
    found, before = read_tensors(output), read_tensors(place.output)
    assert torch.equal(found[NORM], trained(NORM))
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items() if name != NORM)


def test_a_resized_vocabulary(place: Place) -> None:
    write_base(place.base, config=model_config(vocab_size=VOCAB))
    rows = {name: random_tensor((VOCAB + 5, HIDDEN), 9) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    put(place.adapter / "embeddings.safetensors", rows)
    shardmerge.merge(place.config())
    found = read_tensors(place.output)
    assert all(torch.equal(found[name], tensor) for name, tensor in rows.items())
    assert json.loads((place.output / "config.json").read_text())["vocab_size"] == VOCAB + 5


@pytest.mark.parametrize("saved", [False, True], ids=["in its place", "PEFT's copy"])
def test_a_tied_embedding(place: Place, saved: bool) -> None:
    """Trained where it is, it is trained for both sides. A copy of PEFT's is apart from the head."""
    tied = model_config(tie_word_embeddings=True, vocab_size=VOCAB)
    shutil.rmtree(place.base)
    write_base(place.base, llama_tensors(tied=True), config=tied)
    name = f"{P}model.embed_tokens.{'modules_to_save.default.' if saved else ''}weight"
    put(place.adapter / "trained.bin", {name: trained(EMBED)})
    shardmerge.merge(place.config())
    found = read_tensors(place.output)
    config = json.loads((place.output / "config.json").read_text())
    assert torch.equal(found[EMBED], trained(EMBED)) and config["tie_word_embeddings"] is not saved
    assert ("lm_head.weight" in found) == saved
    assert not saved or torch.equal(found["lm_head.weight"], llama_tensors()[EMBED])


def test_only_what_the_prefix_chooses(place: Place) -> None:
    put(place.adapter / "trained.safetensors", {f"{P}{NORM}": trained(NORM), f"other.{K0}": trained(K0)})
    shardmerge.merge(entry(place, prefix=P))
    found = read_tensors(place.output)
    assert torch.equal(found[NORM], trained(NORM)) and torch.equal(found[K0], llama_tensors()[K0])


# --- what does not fit is refused -------------------------------------------------------------------------------------

FILES: dict[str, dict[str, Tensor]] = {
    "value_head.safetensors": VALUE_HEAD,
    "value_head.bin": VALUE_HEAD,
    "joint_head.safetensors": {"weight": torch.ones(2, HIDDEN)},
    "new_embeddings.safetensors": {"input_embeddings": torch.ones(2, HIDDEN)},
    "vit.safetensors": {f"vision_model.encoder.layers.{n}.fc.weight": torch.ones(4, 4) for n in range(9)},
    "lora_of_yesterday.safetensors": peft_tensors(),
    "adapters.safetensors": {"model.layers.0.self_attn.q_proj.lora_a": torch.ones(HIDDEN, 4)},
}


@pytest.mark.parametrize("file", FILES)
def test_what_has_no_place_is_refused_by_its_files_name(place: Place, file: str) -> None:
    put(place.adapter / file, FILES[file])
    told = refusal(place)
    first, tensor = next(iter(FILES[file].items()))
    assert f"{file} is beside the adapter" in told and f"{first} {list(tensor.shape)}" in told
    assert f"ignore_files: [{file}]" in told
    assert told.count(file) == 2, "one problem a file"


def test_every_file_is_told_of_at_once(place: Place) -> None:
    files = {file: tensors for file, tensors in FILES.items() if file != "value_head.bin"}
    for file, tensors in files.items():
        put(place.adapter / file, tensors)
    others = ("notes.npz", "model.onnx", "weights.h5", "lora.gguf")
    for file in others:
        (place.adapter / file).write_bytes(b"x")
    told = refusal(place)
    assert [file for file in (*files, *others) if f"{file} is beside the adapter" not in told] == []


def test_some_of_it_fits(place: Place) -> None:
    put(place.adapter / "trained.bin", {f"{P}{NORM}": trained(NORM), **VALUE_HEAD})
    assert "no place for v_head.summary.weight [1, 32]; if" in refusal(place)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({f"{P}{NORM}": torch.ones(7)}, f"trained.safetensors: {P}{NORM} is [7]"),
        ({NORM: torch.ones(HIDDEN, dtype=torch.int32)}, "trained.safetensors: "),
        ({f"{P}{NORM}": torch.ones(HIDDEN), NORM: torch.ones(HIDDEN)}, "both update"),
        ({NORM: torch.ones(0)}, "is empty, [0]"),
    ],
    ids=["shape", "dtype", "twice", "empty"],
)
def test_what_does_not_fit_its_place(place: Place, tensors: dict[str, Tensor], said: str) -> None:
    put(place.adapter / "trained.safetensors", tensors)
    assert said in refusal(place)


def test_two_files_with_the_same(place: Place) -> None:
    for file in ("one.bin", "other.safetensors"):
        put(place.adapter / file, {NORM: trained(NORM)})
    assert f"{NORM} of one.bin and {NORM} of other.safetensors both update {NORM}" in refusal(place)


def test_a_merged_model_beside_it(place: Place) -> None:
    """Its weights have the update already, or are copies of the base: adding it may add it twice."""
    put(place.adapter / "model.safetensors", llama_tensors())
    told = refusal(place)
    assert "model.safetensors holds" in told and f"{Q0}.weight" in told and "is in there already" in told
    assert "ignore_files: [model.safetensors]" in told
    shardmerge.merge(entry(place, ignore_files=["model.safetensors"]))


def test_the_bases_own_files_are_the_base(place: Place) -> None:
    """An adapter that is kept in the folder of its base."""
    shardmerge.merge(place.config())
    for file in place.adapter.iterdir():
        shutil.copy(file, place.base / file.name)
    output = place.folder / "with"
    shardmerge.merge(place.config(adapters=[str(place.base)], output={"path": str(output)}))
    before = read_tensors(place.output)
    assert all(torch.equal(before[name], tensor) for name, tensor in read_tensors(output).items())


def test_the_same_name_in_both_files(place: Place) -> None:
    """A tensor that the adapter does not account for may not hide behind one beside it."""
    write_peft(place.adapter, {**peft_tensors(), f"{P}{NORM}": trained(NORM)}, config=peft_config())
    put(place.adapter / "trained.bin", {f"{P}{NORM}": trained(NORM, 3)})
    told = refusal(place)
    assert "trained.bin is beside the adapter and has 1 tensors that adapter_model.safetensors has, too" in told
    assert f"{P}{NORM} belongs to no update" in told


def _with_code() -> bytes:
    file = io.BytesIO()
    torch.save({"x": slice}, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"x", _with_code(), b"PK\x03\x04", json.dumps({"a": 1}).encode()],
    ids=["no pickle", "code", "cut", "JSON"],
)
@pytest.mark.parametrize("file", ["trained.bin", "trained.safetensors"])
def test_a_file_that_cannot_be_read(place: Place, file: str, content: bytes) -> None:
    (place.adapter / file).write_bytes(content)
    told = refusal(place)
    assert f"{file} is beside the adapter" in told and "cannot be read" in told and f"ignore_files: [{file}]" in told


# --- training state, other formats of the same, folders ---------------------------------------------------------------

STATE = (
    "optimizer.pt",
    "optimizer.bin",
    "optimizer_1.bin",
    "scheduler.pt",
    "scheduler.bin",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_7.pth",
    "random_states_0.pkl",
    "sampler.bin",
    "training_args.bin",
    "mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "recipe_state.pt",
)


def test_training_state_is_no_part_of_it(place: Place) -> None:
    shardmerge.merge(place.config())
    for name in STATE:
        (place.adapter / name).write_bytes(b"x")
    for folder in ("checkpoint-500", "global_step500", "runs"):
        (place.adapter / folder).mkdir()
        (place.adapter / folder / "adapter_model.safetensors").write_bytes(b"x")
    output = place.folder / "with"
    report = shardmerge.merge(place.config(output={"path": str(output)}))
    assert contents(output) == contents(place.output)
    assert not any("global_step" in warning or "checkpoint" in warning for warning in report.warnings)


@pytest.mark.parametrize("first", ["adapter_model.safetensors", "adapter_model.bin"])
def test_the_same_adapter_in_both_formats(place: Place, first: str) -> None:
    """PEFT loads the safetensors. Of one that is named by itself, the other is the second."""
    write_peft(place.adapter, pickled=True)
    path = place.adapter if first.endswith(".safetensors") else place.adapter / first
    plan = shardmerge.plan(place.config(adapters=[str(path)]))
    (note,) = [warning for warning in plan.warnings if "adapter_model.bin" in warning]
    assert f"has the same tensors as {first}" in note
    assert {file.uri.rpartition("/")[2] for file in plan.adapters[0].files} == {first, "adapter_config.json"}


def test_another_adapter_in_the_other_format(place: Place) -> None:
    torch.save(peft_tensors((Q0,)), place.adapter / "adapter_model.bin")
    told = refusal(place)
    assert "adapter_model.bin has other tensors than adapter_model.safetensors" in told
    assert "ignore_files: [adapter_model.bin]" in told
    shardmerge.plan(entry(place, ignore_files=["adapter_model.bin"]))


def test_a_file_beside_it_in_both_formats(place: Place) -> None:
    for ending in ("safetensors", "bin"):
        put(place.adapter / f"trained.{ending}", {NORM: trained(NORM)})
    report = shardmerge.merge(place.config())
    assert torch.equal(read_tensors(place.output)[NORM], trained(NORM))
    assert any("trained.bin has the same tensors as trained.safetensors" in warning for warning in report.warnings)


def test_folders_below_it_are_named(place: Place) -> None:
    """PEFT's other adapters, and modules of a pipeline."""
    write_peft(place.adapter / "reference")
    (warning,) = [warning for warning in shardmerge.plan(place.config()).warnings if "reference" in warning]
    assert "reference/adapter_model.safetensors" in warning and "not merged" in warning


def test_the_usual_file_by_name_has_its_folder_around_it(place: Place) -> None:
    put(place.adapter / "value_head.safetensors", VALUE_HEAD)
    path = place.adapter / "adapter_model.safetensors"
    assert "value_head.safetensors" in refusal(place, adapters=[str(path)])


def test_any_other_file_by_name_is_all(place: Place) -> None:
    put(place.adapter / "mine.safetensors", peft_tensors())
    put(place.adapter / "value_head.safetensors", VALUE_HEAD)
    shardmerge.plan(place.config(adapters=[{"path": str(place.adapter / "mine.safetensors"), "alpha": 8}]))


def test_a_sole_candidate_beside_training_state_and_its_other_format(place: Place) -> None:
    """It need not be called as PEFT calls it."""
    for file in place.adapter.iterdir():
        file.unlink()
    put(place.adapter / "pytorch_lora_weights.safetensors", peft_tensors())
    put(place.adapter / "pytorch_lora_weights.bin", peft_tensors())
    (place.adapter / "optimizer.pt").write_bytes(b"x")
    plan = shardmerge.plan(entry(place, alpha=8))
    assert plan.adapters[0].files[0].uri.endswith("pytorch_lora_weights.safetensors")


def test_steps_of_mlx_are_the_same_adapter_earlier(place: Place) -> None:
    for file in place.adapter.iterdir():
        file.unlink()
    factors = {f"{Q0}.lora_a": torch.ones(HIDDEN, 4), f"{Q0}.lora_b": torch.ones(4, HIDDEN)}
    for name in ("adapters.safetensors", "0000100_adapters.safetensors", "0000200_adapters.safetensors"):
        put(place.adapter / name, factors)
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    write_json(place.adapter / "adapter_config.json", {"fine_tune_type": "lora", "lora_parameters": parameters})
    shardmerge.plan(place.config())


# --- ignore_files -----------------------------------------------------------------------------------------------------


def test_ignored_files_are_named_in_plan_and_record(place: Place) -> None:
    shardmerge.merge(place.config())
    put(place.adapter / "value_head.safetensors", VALUE_HEAD)
    (place.adapter / "trained.bin").write_bytes(b"cannot be read")
    config = entry(place, ignore_files=["value_head.safetensors", "trained.bin"])
    config["output"]["path"] = str(place.folder / "with")
    report = shardmerge.merge(config)
    said = [warning for warning in report.warnings if "ignored" in warning]
    assert said and "trained.bin, value_head.safetensors" in said[0]
    record = json.loads((place.folder / "with" / "shardmerge.json").read_text())
    assert record["config"]["adapters"][0]["ignore_files"] == ["value_head.safetensors", "trained.bin"]
    assert contents(place.folder / "with") == contents(place.output)
    assert shardmerge.verify(str(place.folder / "with"), rows=None).raise_for_status().complete


@pytest.mark.parametrize("name", ["value_haed.safetensors", "adapter_config.json", "sub/adapter_model.safetensors"])
def test_a_name_that_is_none_of_its_files(place: Place, name: str) -> None:
    put(place.adapter / "value_head.safetensors", VALUE_HEAD)
    write_peft(place.adapter / "sub")
    told = refusal(place, adapters=[{"path": str(place.adapter), "ignore_files": [name]}])
    assert f"ignore_files names {name!r}" in told and "value_head.safetensors" in told


# --- changes ----------------------------------------------------------------------------------------------------------


def test_another_file_beside_it_is_another_merge(place: Place) -> None:
    def digest() -> str:
        return make_plan(MergeConfig.from_dict(place.config())).digest

    before = digest()
    put(place.adapter / "trained.bin", {NORM: trained(NORM)})
    first = digest()
    put(place.adapter / "trained.bin", {NORM: trained(NORM, 3), K0: trained(K0)})
    assert len({before, first, digest()}) == 3


def test_verify_finds_that_it_was_trained_anew(place: Place) -> None:
    put(place.adapter / "trained.bin", {NORM: trained(NORM)})
    shardmerge.merge(place.config())
    put(place.adapter / "trained.bin", {NORM: trained(NORM, 3)})
    with pytest.raises(VerifyError, match=f"{NORM}, row 0"):
        shardmerge.verify(str(place.output), rows=None).raise_for_status()


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_names_them(place: Place) -> None:
    put(place.adapter / "value_head.safetensors", VALUE_HEAD)
    assert inspect_path(str(place.adapter))["trained beside it"] == ["value_head.safetensors (1 tensor)"]
    assert "# value_head.safetensors (1 tensor): trained with it" in starter_config(str(place.adapter), "config.yaml")
