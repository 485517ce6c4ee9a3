"""What was given is something else: another model, base and adapter the wrong way round, nothing at all. Said first."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import shardmerge
from shardmerge.errors import FormatError, MissingError, OtherKindError, PlanError, SourceError
from tests.support.builders import (
    LAYERS,
    LINEAR_SHAPES,
    Place,
    Tensors,
    layer,
    lora_pair,
    make_place,
    model_config,
    peft_config,
    peft_tensors,
    pure_tensors,
    snapshot,
    write_base,
    write_json,
    write_peft,
    write_pure,
)
from tests.support.command_line import invoke, invoke_json

ALL = [layer(number, module) for number in range(LAYERS) for module in LINEAR_SHAPES]


def first(config: dict[str, Any]) -> str:
    """The first problem of the refusal of a plan; the rest must be there, too."""
    with pytest.raises(PlanError) as raised:
        shardmerge.plan(config)
    assert len(raised.value.problems) > 1
    return raised.value.problems[0]


# --- another model ----------------------------------------------------------------------------------------------------


def scaled(times: int, modules: list[str] = ALL) -> Tensors:
    """LoRA of a model whose layers are ``times`` as wide."""
    tensors: Tensors = {}
    for module in modules:
        for role, factor in zip("AB", lora_pair(module), strict=True):
            wide = factor.repeat(*((1, times) if role == "A" else (times, 1)))
            tensors[f"base_model.model.{module}.lora_{role}.weight"] = wide
    return tensors


def test_another_hidden_size(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    write_peft(place.adapter, scaled(9), config=peft_config(base_model_name_or_path="org/Wide-9B"))
    told = first(place.config())
    assert told == (
        f"adapter {place.adapter}: its hidden size is 288, the base's is 32: this base is another model than it was "
        "trained on; it says that it was trained on org/Wide-9B"
    )


def test_another_hidden_size_of_a_multimodal_model(tmp_path: Path) -> None:
    place = make_place(tmp_path, config=model_config(hidden_size=..., text_config={"hidden_size": 32}))
    write_peft(place.adapter, scaled(2))
    assert "its hidden size is 64, the base's is 32" in first(place.config())


def test_sizes_that_no_config_tells(tmp_path: Path) -> None:
    place = make_place(tmp_path, config=model_config(hidden_size=...))
    write_peft(place.adapter, scaled(2))
    told = first(place.config())
    assert f"{len(ALL)} of the {len(ALL)} weights that it updates have another shape in the base" in told


@pytest.mark.parametrize("others", [0, 1])
def test_names_of_another_architecture(tmp_path: Path, others: int) -> None:
    place = make_place(tmp_path)
    tensors = peft_tensors(ALL[:others])
    for number in range(6):
        tensors[f"base_model.model.h.{number}.attn.qqv.lora_A.weight"] = torch.ones(4, 32)
        tensors[f"base_model.model.h.{number}.attn.qqv.lora_B.weight"] = torch.ones(96, 4)
    write_peft(place.adapter, tensors, config=peft_config(target_modules=["qqv", "q_proj"]))
    told = first(place.config())
    count = f"only {others}" if others else "none"
    assert f"{count} of the {6 + others} weights that it updates is in the base, a llama model, by its name" in told
    assert "another model" in told and "h.0.attn.qqv" in told


def test_more_layers_than_the_base_has(tmp_path: Path) -> None:
    place = make_place(tmp_path, config=model_config(num_hidden_layers=LAYERS))
    write_peft(place.adapter, peft_tensors([layer(number, "self_attn.q_proj") for number in range(LAYERS + 1)]))
    told = first(place.config())
    assert f"it updates layer {LAYERS}, the base's last is {LAYERS - 1}: this base is another model" in told


def test_a_slip_is_no_other_model(tmp_path: Path) -> None:
    """One wrong tensor among right ones, and one wrong alone, are told as what they are."""
    place = make_place(tmp_path)
    for tensors in (scaled(2, ALL[:1]) | peft_tensors(ALL[1:]), scaled(2, ALL[:1])):
        write_peft(place.adapter, tensors, config=peft_config(target_modules=None))
        with pytest.raises(PlanError) as raised:
            shardmerge.plan(place.config())
        assert len(raised.value.problems) == 1 and "another model" not in raised.value.problems[0]


# --- the wrong way round ----------------------------------------------------------------------------------------------


def as_gguf(path: Path) -> Path:
    path.write_bytes(b"GGUF" + bytes(100))
    return path


def loose(place: Place) -> Path:
    """An adapter's weights alone, by a name that says nothing."""
    save_file(peft_tensors(), place.folder / "x.safetensors")
    return place.folder / "x.safetensors"


def folder_with(name: str, content: bytes = b"x") -> Callable[[Place], Path]:
    def make(place: Place) -> Path:
        path = place.folder / "given" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        return place.folder / "given"

    return make


def pipeline(place: Place) -> Path:
    folder = folder_with("model_index.json", b"{}")(place)
    write_base(folder / "unet")
    return folder


def unfinished(place: Place) -> Path:
    folder = place.folder / "given"
    (folder / ".shardmerge").mkdir(parents=True)
    write_json(folder / ".shardmerge" / "journal.json", {})
    return folder


def finished(place: Place) -> Path:
    shardmerge.merge(place.config())
    return place.output


def nested(place: Place) -> Path:
    write_peft(place.folder / "given" / "sft")
    return place.folder / "given"


def empty(place: Place) -> Path:
    (place.folder / "given").mkdir()
    return place.folder / "given"


ADAPTER = "it is an adapter, not a model; give the model that it was trained on"
MODEL = "it is a model, not an adapter; give the directory that training wrote"

#: What is given as the base → what its message begins with, after the place.
AS_BASE: dict[str, tuple[Callable[[Place], Path], str]] = {
    "PEFT's folder": (lambda place: place.adapter, ADAPTER),
    "PEFT's file": (lambda place: place.adapter / "adapter_model.safetensors", ADAPTER),
    "factors alone": (loose, ADAPTER),
    "a pickle of factors": (lambda place: write_pure(place.folder / "x.pt"), "it has pickled weights"),
    "GGUF": (lambda place: as_gguf(place.folder / "x.gguf"), "it is GGUF, llama.cpp's format"),
    "a folder of GGUF": (folder_with("x.gguf"), "it is GGUF, llama.cpp's format"),
    "a pipeline": (pipeline, "it is a diffusers pipeline"),
    "an unfinished merge": (unfinished, "holds a merge that was not finished"),
    "an empty folder": (empty, "it is empty"),
    "other files": (folder_with("notes.txt"), "it has no file of weights"),
}
AS_ADAPTER: dict[str, tuple[Callable[[Place], Path], str]] = {
    "a base": (lambda place: place.base, MODEL),
    "a base in one file": (lambda place: write_base(place.folder / "one", shards=1), MODEL),
    "weights alone": (lambda place: write_base(place.folder / "one", shards=1) / "model.safetensors", MODEL),
    "a merge": (finished, "it is a finished merge of shardmerge, not an adapter"),
    "GGUF": (lambda place: as_gguf(place.folder / "x.gguf"), "it is a GGUF file"),
    "a folder of GGUF": (folder_with("x.gguf"), "it is GGUF, llama.cpp's format; give the adapter as safetensors"),
    "a pipeline": (pipeline, "it is a diffusers pipeline, not an adapter"),
    "an unfinished merge": (unfinished, "holds a merge that was not finished"),
    "an adapter in a folder of its own": (nested, "the adapter is in a folder of it; give that: sft/"),
    "an empty folder": (empty, "it is empty"),
    "other files": (folder_with("notes.txt"), "it has no file of weights (notes.txt)"),
}


@pytest.mark.parametrize("name", AS_BASE)
def test_what_was_given_as_the_base(tmp_path: Path, name: str) -> None:
    place = make_place(tmp_path)
    make, what = AS_BASE[name]
    given = make(place)
    with pytest.raises(FormatError) as raised:
        shardmerge.plan(place.config(base=str(given)))
    assert str(raised.value).startswith(f"{given}: {what}")
    assert isinstance(raised.value, OtherKindError) == (what == ADAPTER)


@pytest.mark.parametrize("name", AS_ADAPTER)
def test_what_was_given_as_an_adapter(tmp_path: Path, name: str) -> None:
    place = make_place(tmp_path)
    make, what = AS_ADAPTER[name]
    given = make(place)
    with pytest.raises(FormatError) as raised:
        shardmerge.plan(place.config(adapters=[str(given)], output={"path": str(tmp_path / "elsewhere")}))
    assert str(raised.value).startswith(f"{given}: {what}")


def test_base_and_adapter_swapped(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    told = first(place.config(base=str(place.adapter), adapters=[str(place.base)]))
    assert told == f"base and adapter are swapped: {place.adapter} is an adapter, and {place.base} is a model"


def test_adapters_of_every_kind_are_taken_for_adapters(tmp_path: Path) -> None:
    """Those that carry no config most of all."""
    place = make_place(tmp_path)
    save_file(pure_tensors(), tmp_path / "pure.safetensors")
    for given in (place.adapter, loose(place), tmp_path / "pure.safetensors", write_pure(tmp_path / "x.pt")):
        config = place.config(adapters=[{"path": str(given), **({} if given.is_dir() else {"alpha": 8})}])
        assert len(list(shardmerge.plan(config).updates())) == 3


# --- what is not there ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["base", "adapter", "both", "base and another problem"])
def test_a_missing_place_is_one_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str) -> None:
    place = make_place(tmp_path)
    changes: dict[str, Any] = {}
    if gone != "adapter":
        changes["base"] = "gone base"
    if gone in ("adapter", "both"):
        changes["adapters"] = ["gone-adapter", str(place.adapter)]
    if gone == "base and another problem":
        (place.adapter / "adapter_model.safetensors").write_bytes(b"x")
    config = place.config_file(**changes)
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    for command in ("plan", "run"):
        told = invoke_json(monkeypatch, command, config, code=3)
        assert told["error"] == "PlanError"
        missing = [text for text in told["problems"] if f"no such file or directory in {tmp_path} " in text]
        assert len(missing) == (2 if gone == "both" else 1)
        assert len(told["problems"]) == len(missing) + ("another" in gone)
    assert snapshot(tmp_path) == before


def test_what_else_is_known_is_said_as_well(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    write_json(place.adapter / "adapter_config.json", peft_config(peft_type="PREFIX_TUNING"))
    place.output.write_text("a file")
    gpu = f"cuda:{max(7, torch.cuda.device_count())}"
    with pytest.raises(PlanError) as raised:
        shardmerge.plan(place.config(base="/gone", compute={"device": gpu}))
    base, adapter, device, output = raised.value.problems
    assert base.startswith("base /gone: no such file or directory (and")  # an absolute path is in no directory
    assert "PREFIX_TUNING" in adapter and "CUDA devices here" in device and "is a file" in output


@pytest.mark.parametrize("command", ["inspect", "init"])
def test_other_commands_say_where_they_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"gone: no such file or directory in {tmp_path}" in invoke(monkeypatch, command, "gone", code=5).stderr
    assert issubclass(MissingError, SourceError)


def test_a_config_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"No such file or directory (in {tmp_path})" in invoke(monkeypatch, "plan", "gone.yaml", code=2).stderr
    assert json.loads(invoke(monkeypatch, "plan", "gone.yaml", "--json", code=2).stdout)["problems"]
    assert os.listdir(tmp_path) == []
