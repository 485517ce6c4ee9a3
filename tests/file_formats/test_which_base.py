"""Which files of a directory are the base, and what is said where programs would not agree.

The oracles are transformers, which loads the output and the base, and the table of what it and vLLM look for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import shardmerge
from shardmerge.errors import FormatError
from shardmerge.file_formats import checkpoint_choice
from shardmerge.file_formats.checkpoint import Checkpoint, open_checkpoint
from shardmerge.file_formats.checkpoint_files import index_of_stem, is_index, stem_of_index
from shardmerge.sources.source import open_source
from tests.support.builders import (
    Place,
    llama_tensors,
    make_place,
    model_config,
    read_tensors,
    shard_names,
    split,
    write_base,
    write_index,
    write_json,
    write_shards,
)
from tests.support.hub_stub import HubStub, running_hub

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStub]:
    """A Hub that the client of this process speaks to."""
    from shardmerge.sources import hub as source

    with running_hub() as stub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(source._API, "endpoint", stub.endpoint)
        yield stub


def opened(location: object) -> Checkpoint:
    return open_checkpoint(open_source(str(location)))


def refusal(location: object) -> str:
    with pytest.raises(FormatError) as raised:
        opened(location)
    return str(raised.value)


def beside(base: Path, change: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None) -> None:
    """The whole model in one file beside the shards, changed."""
    tensors = llama_tensors()
    change(tensors)
    save_file(tensors, base / WHOLE)


# --- shards and a whole file ------------------------------------------------------------------------------------------


DIFFERENT: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "first value": (lambda t: t["model.embed_tokens.weight"].view(-1)[:1].add_(1), "has other values"),
    "last value": (lambda t: t["lm_head.weight"].view(-1)[-1:].add_(1), "'lm_head.weight' has other values"),
    "sign of zero": (lambda t: t["model.norm.weight"].zero_().neg_(), "'model.norm.weight' has other values"),
    "dtype": (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].bfloat16()}), "is F32 [64, 32] in the shards"),
    "shape": (
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"].view(32, 64)}),
        "is F32 [64, 32] in the shards",
    ),
    "one less": (lambda t: t.pop("lm_head.weight"), "'lm_head.weight' is only in the shards"),
    "one more": (lambda t: t.update(x=torch.ones(1)), f"'x' is only in {WHOLE}"),
}


@pytest.mark.parametrize(("change", "said"), DIFFERENT.values(), ids=DIFFERENT)
@pytest.mark.parametrize("has_index", [True, False], ids=["index", "no index"])
def test_a_different_whole_file_is_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], said: str, has_index: bool
) -> None:
    base = write_base(tmp_path / "base", index=has_index)
    beside(base, change)
    if not has_index and said.startswith("'x'"):
        assert [shard.name for shard in opened(base).shards] == [WHOLE]  # all that the shards hold is in it
        return
    message = refusal(base)
    assert said in message
    assert f"give the path {base}/{WHOLE}" in message
    # The advice works: the file by itself is the base, and so are the shards once it is gone.
    assert [shard.name for shard in opened(base / WHOLE).shards] == [WHOLE]
    (base / WHOLE).unlink()
    assert len(opened(base).shards) == 2


@pytest.mark.parametrize("block", [16, 1 << 20])
def test_an_equal_whole_file_is_named_and_not_copied(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_choice, "_BLOCK", block)
    place = make_place(tmp_path)
    beside(place.base)
    plan = shardmerge.plan(place.config())
    assert [shard.name for shard in plan.shards] == shard_names(2)
    assert [note for note in plan.warnings if f"{WHOLE} has the same tensors as the shards of {INDEX}" in note]
    assert WHOLE not in {aux.name for aux in plan.aux}


def test_an_index_of_the_whole_file_itself(tmp_path: Path) -> None:
    """Some write an index for one shard."""
    base = write_base(tmp_path / "base", shards=1)
    write_index(base, dict.fromkeys(llama_tensors(), WHOLE))
    assert ([shard.name for shard in opened(base).shards], opened(base).notes) == ([WHOLE], ())


# --- a stale index ----------------------------------------------------------------------------------------------------


def stale(place: Place) -> None:
    """All shards of the index are gone; the model is in one file."""
    for name in shard_names(2):
        (place.base / name).unlink()
    beside(place.base)


def test_a_stale_index_is_not_the_model(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    stale(place)
    report = shardmerge.merge(place.config())
    assert (place.output / WHOLE).is_file()
    assert not (place.output / INDEX).exists()
    assert [note for note in report.warnings if f"{INDEX} is stale" in note]
    assert read_tensors(place.output).keys() == llama_tensors().keys()


def test_a_stale_index_of_another_model(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    stale(place)
    beside(place.base, lambda tensors: tensors.pop("lm_head.weight"))
    message = refusal(place.base)
    assert "none of the shards" in message
    assert "'lm_head.weight'" in message
    assert [shard.name for shard in opened(place.base / WHOLE).shards] == [WHOLE]


def test_one_shard_of_several_is_missing_beside_a_whole_file(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", shards=3)
    (base / shard_names(3)[1]).unlink()
    beside(base)
    message = refusal(base)
    assert shard_names(3)[1] in message
    assert f"then give the path {base}/{WHOLE}" in message


# --- other models beside it -------------------------------------------------------------------------------------------


def test_consolidated_counts_only_where_nothing_else_is(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", shards=1)
    write_shards(base, {"tok_embeddings.weight": torch.ones(4, 4), "x": torch.ones(1)}, stem="consolidated")
    assert opened(base).weights.keys() == llama_tensors().keys()
    (base / WHOLE).unlink()
    assert opened(base).index_name == "consolidated.safetensors.index.json"


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_variant_is_not_the_model(tmp_path: Path, stem: str, shards: int) -> None:
    write_shards(tmp_path, llama_tensors(), shards=shards, stem=stem, index=shards > 1)
    write_shards(tmp_path, llama_tensors(torch.float16), shards=shards, stem=f"{stem}.fp16", index=False)
    if shards > 1:
        (tmp_path / f"{stem}.safetensors.index.fp16.json").write_text((tmp_path / index_of_stem(stem)).read_text())
    assert {weight.tensor.dtype for weight in opened(tmp_path).weights.values()} == {"F32"}


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_a_variant_alone_keeps_the_name_of_its_index(tmp_path: Path, stem: str) -> None:
    place = make_place(tmp_path, index=False)
    for name in shard_names(2):
        (place.base / name).unlink()
    write_shards(place.base, llama_tensors(), stem=f"{stem}.fp16")
    index = f"{stem}.safetensors.index.fp16.json"
    (place.base / f"{stem}.fp16.safetensors.index.json").rename(place.base / index)
    shardmerge.merge(place.config())
    assert {path.name for path in place.output.glob(f"{stem}.*")} == {*shard_names(2, f"{stem}.fp16"), index}
    assert shardmerge.verify(place.output).raise_for_status().complete


def test_two_models_by_the_names_of_two_libraries(tmp_path: Path) -> None:
    for name in ("model", "diffusion_pytorch_model"):
        write_shards(tmp_path, llama_tensors(), shards=1, stem=name)
    assert "are two models" in refusal(tmp_path)


def test_an_index_of_something_beside_the_model(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", shards=1)
    write_shards(base, {"mtp.a": torch.ones(1), "mtp.b": torch.ones(1)}, stem="mtp")
    assert opened(base).weights.keys() == llama_tensors().keys()
    write_shards(base, llama_tensors(torch.float16), stem="other")
    (base / "mtp.safetensors.index.json").unlink()
    assert "different models" in refusal(base)


def test_config_names_the_weights(tmp_path: Path) -> None:
    """transformers loads what ``transformers_weights`` names, so the output must be what it names, too."""
    place = make_place(tmp_path, shards=1, config=model_config(transformers_weights="mine.safetensors"))
    save_file(llama_tensors(), place.base / "mine.safetensors")
    beside(place.base, lambda tensors: tensors["lm_head.weight"].add_(1))
    report = shardmerge.merge(place.config())
    assert torch.equal(
        load_file(place.output / "mine.safetensors")["lm_head.weight"], llama_tensors()["lm_head.weight"]
    )
    assert [note for note in report.warnings if "names mine.safetensors as the model's weights" in note]
    place = make_place(tmp_path / "x", shards=1, config=model_config(transformers_weights=WHOLE))
    shardmerge.merge(place.config(output={"max_shard_size": "20KB"}))
    assert json.loads((place.output / "config.json").read_text())["transformers_weights"] == INDEX


@pytest.mark.parametrize("named", ["gone.safetensors", "../x.safetensors", "config.json", 7, ["a"]])
def test_config_names_weights_that_are_not_there(tmp_path: Path, named: object) -> None:
    base = write_base(tmp_path / "base", config=model_config(transformers_weights=named))
    assert "transformers_weights" in refusal(base)


@pytest.mark.parametrize("name", [INDEX, "a.safetensors.index.json", "model.safetensors.index.fp16.json"])
def test_names_of_indexes(name: str) -> None:
    assert is_index(name)
    assert index_of_stem(stem_of_index(name)) == name


@pytest.mark.parametrize("ending", [".aria2", ".part", ".crdownload", ".incomplete"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_download_that_goes_on(tmp_path: Path, ending: str, shards: int) -> None:
    """The file has its size and its header already, and holes."""
    base = write_base(tmp_path / "base", shards=shards)
    name = WHOLE if shards == 1 else shard_names(2)[1]
    (base / (name + ending)).write_text("x")
    assert f"{name}{ending} is there: the download of that file is incomplete" in refusal(base)
    if shards == 1:
        assert f"{name}{ending}" in refusal(base / WHOLE)


# --- directories that hold no model -----------------------------------------------------------------------------------


def pipeline(folder: Path) -> Path:
    write_base(folder / "transformer")
    write_base(folder / "vae", shards=1)
    write_json(folder / "model_index.json", {"_class_name": "X", "transformer": ["diffusers", "Y"], "vae": ["d", "V"]})
    return folder


def sentence_transformer(folder: Path) -> Path:
    write_base(folder / "0_Transformer", shards=1)
    write_json(folder / "modules.json", [])
    return folder


def pickled_pipeline(folder: Path) -> Path:
    for name in ("vae", "unet"):
        (folder / name).mkdir(parents=True)
        (folder / name / "diffusion_pytorch_model.bin").write_bytes(b"x")
    write_json(folder / "model_index.json", {"_class_name": "X"})
    return folder


def in_snapshots(folder: Path) -> Path:
    write_base(folder / "snapshots" / "abc")
    return folder


def adapter(folder: Path) -> Path:
    make_place(folder)
    return folder / "adapter"


def one_file_of(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        folder.mkdir()
        (folder / name).write_bytes(b"x")
        return folder

    return write


def pipeline_beside_files(folder: Path) -> Path:
    save_file({"x": torch.ones(1)}, pipeline(folder) / "flux1.safetensors")
    return folder


DIRECTORIES: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "pipeline": (pipeline, ["diffusers pipeline", "transformer/, vae/"]),
    "pipeline beside its single files": (pipeline_beside_files, ["pipeline", "transformer/", "flux1.safetensors"]),
    "pipeline of pickles": (pickled_pipeline, ["pipeline", "unet/, vae/"]),
    "sentence-transformers": (sentence_transformer, ["sentence-transformers", "0_Transformer/"]),
    "cache of the Hub": (in_snapshots, ["weights are in folders", "snapshots/abc/"]),
    "adapter": (adapter, ["it is an adapter"]),
    "pickles": (one_file_of("pytorch_model.bin"), ["pickled weights", "pytorch_model.bin"]),
    "GGUF": (one_file_of("m.gguf"), ["it is GGUF, llama.cpp's format; give the safetensors", "m.gguf"]),
    "nothing": (one_file_of("x.txt"), ["nothing to merge into"]),
}


@pytest.mark.parametrize(("build", "parts"), DIRECTORIES.values(), ids=DIRECTORIES)
def test_what_a_directory_is(tmp_path: Path, build: Callable[[Path], Path], parts: list[str]) -> None:
    message = refusal(build(tmp_path / "base"))
    assert [part for part in parts if part not in message] == []


# --- the same from the Hub --------------------------------------------------------------------------------------------


def test_a_repo_of_the_hub_is_chosen_from_in_the_same_way(hub: HubStub, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    beside(base)
    hub.commit("org/equal", base)
    assert [note.replace("org/equal", str(base)) for note in opened("org/equal").notes] == list(opened(base).notes)
    beside(base, lambda tensors: tensors["lm_head.weight"].add_(1))
    hub.commit("org/different", base)
    message = refusal("org/different")
    assert "different models ('lm_head.weight' has other values)" in message
    assert "download org/different and give the path of its model.safetensors" in message
    for name in shard_names(2):
        (base / name).unlink()
    hub.commit("org/stale", base)
    assert [shard.name for shard in opened("org/stale").shards] == [WHOLE]
    hub.commit("org/pipeline", pipeline(tmp_path / "pipeline"))
    assert "transformer/, vae/" in refusal("org/pipeline")


# --- what transformers loads ------------------------------------------------------------------------------------------


def test_output_holds_what_transformers_loads_of_the_base(tmp_path: Path) -> None:
    """In each arrangement that is merged, transformers gets all of the output's weights from it, and the right ones."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    config.num_key_value_heads = 2
    model = LlamaForCausalLM(config)
    place = make_place(tmp_path / "place", aux={}, shards=1)
    shutil.rmtree(place.base)
    tensors = dict(model.state_dict())

    def whole(folder: Path) -> None:
        model.save_pretrained(folder)

    def stale_index(folder: Path) -> None:
        model.save_pretrained(folder)
        write_index(folder, dict.fromkeys(tensors, "gone.safetensors"))

    def both(folder: Path) -> None:
        model.save_pretrained(folder)
        write_shards(folder, {name: tensor.contiguous() for name, tensor in tensors.items()})

    def variant_and_consolidated(folder: Path) -> None:
        model.save_pretrained(folder, max_shard_size="30KB")
        save_file(
            {name: tensor.half() for name, tensor in split(tensors, 1)[0].items()}, folder / "model.fp16.safetensors"
        )
        write_shards(folder, {"x": torch.ones(1), "y": torch.ones(1)}, stem="consolidated")

    expected = None
    for build in (whole, stale_index, both, variant_and_consolidated):
        shutil.rmtree(place.base, ignore_errors=True)
        shutil.rmtree(place.output, ignore_errors=True)
        build(place.base)
        shardmerge.merge(place.config())
        loaded, info = AutoModelForCausalLM.from_pretrained(place.output, output_loading_info=True)
        assert not any(info.values()), (build.__name__, info)
        found = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
        expected = expected or found
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert expected is not None
    assert not torch.equal(
        expected["model.layers.0.self_attn.q_proj.weight"], tensors["model.layers.0.self_attn.q_proj.weight"]
    )
