"""`shardmerge init`: a config that is valid, that plans once it knows the base, and that overwrites nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

import shardmerge
from shardmerge.config.schema import MergeConfig, load_yaml
from tests.support.builders import make_place, peft_config, peft_tensors, write_peft, write_pure
from tests.support.command_line import invoke


def test_config_of_a_peft_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    write_peft(place.adapter, config=peft_config(base_model_name_or_path=str(place.base)))
    monkeypatch.chdir(tmp_path)
    result = invoke(monkeypatch, "init", "adapter")
    assert result.stdout == ""
    assert "config.yaml: written" in result.stderr
    assert MergeConfig.from_file("config.yaml") == MergeConfig.from_dict(
        {"base": "auto", "adapters": ["adapter"], "output": {"path": "adapter-merged"}}
    )
    text = Path("config.yaml").read_text()
    for part in ("a LORA adapter, rank 4, scaling 2", json.dumps(str(place.base)), "shardmerge plan config.yaml"):
        assert part in text
    assert len(list(shardmerge.plan("config.yaml").updates())) == 3


def test_config_of_an_adapter_that_names_no_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    monkeypatch.chdir(tmp_path)
    invoke(monkeypatch, "init", place.adapter, "-o", "new.yaml")
    config = MergeConfig.from_file("new.yaml", [f"base={place.base}"])
    assert config.base == str(place.base)
    assert len(list(shardmerge.plan(config).updates())) == 3


def test_config_of_a_pure_pytorch_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    write_pure(tmp_path / "sft.pt")
    monkeypatch.chdir(tmp_path)
    invoke(monkeypatch, "init", "sft.pt")
    config = MergeConfig.from_file("config.yaml", [f"base={place.base}"])
    assert config.adapters[0].alpha is not None
    assert config.output.path == "sft-merged"
    assert "what was alpha in training?" in Path("config.yaml").read_text()
    assert {update.scaling for _, update in shardmerge.plan(config).updates()} == {config.adapters[0].alpha / 4}


def test_nothing_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_peft(tmp_path / "adapter")
    target = tmp_path / "config.yaml"
    target.write_text("mine")
    result = invoke(monkeypatch, "init", tmp_path / "adapter", "-o", target, code=2)
    assert "exists already; nothing was written" in result.stderr
    assert target.read_text() == "mine"
    (tmp_path / "link").symlink_to("gone")
    invoke(monkeypatch, "init", tmp_path / "adapter", "-o", tmp_path / "link", code=2)
    assert not (tmp_path / "gone").exists()


def test_target_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_peft(tmp_path / "adapter")
    result = invoke(monkeypatch, "init", tmp_path / "adapter", "-o", tmp_path / "gone" / "x.yaml", code=2)
    assert "x.yaml: cannot be written: No such file" in result.stderr


def test_name_of_the_config_cannot_write_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_peft(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    invoke(monkeypatch, "init", "adapter", "-o", "x\nbase: evil")
    assert load_yaml(Path("x\nbase: evil"))["base"] == "path/to/base"


def test_to_stdout_and_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = write_peft(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    printed = invoke(monkeypatch, "init", adapter, "-o", "-").stdout
    told = json.loads(invoke(monkeypatch, "init", adapter, "-o", "-", "--json").stdout)
    assert told == {"config": printed, "path": None}
    assert os.listdir(tmp_path) == ["adapter"]
    told = json.loads(invoke(monkeypatch, "init", adapter, "--json").stdout)
    assert told["path"] == "config.yaml"
    assert Path("config.yaml").read_text() == told["config"]


NAMES = [
    "sft",
    "500",
    "1e5",
    "0x1F",
    "1_000",
    "2024-01-01",
    "true",
    "no",
    "null",
    "with space",
    "ключ",
    "a: b",
    "a #b",
    "{a}",
    "[a",
    "'",
    '"',
    "*a",
    "%a",
    "@a",
    "-a",
    "~a",
    ".a",
    "a\\b",
    "line\nbreak",
    "tab\t",
    "del\x7f",
    "emoji\U0001f600",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_of_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    place = make_place(tmp_path)
    place.adapter.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    invoke(monkeypatch, "init", "-o", "config.yaml", "--", name)
    config = MergeConfig.from_file("config.yaml", [f"base={place.base}"])
    assert config.adapters[0].path == name
    assert config.output.path == f"{name}-merged"


@pytest.mark.parametrize("key", ["peft_type", "base_model_name_or_path"])
@pytest.mark.parametrize("text", ["x\nbase: evil\n#", "x\u2028base: evil", "x\x85base: evil", "{base}"], ids=ascii)
def test_adapter_cannot_write_into_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, text: str
) -> None:
    adapter = write_peft(tmp_path / "adapter", peft_tensors(), config=peft_config(**{key: text}))
    monkeypatch.chdir(tmp_path)
    invoke(monkeypatch, "init", adapter)
    value: dict[str, Any] = load_yaml(Path("config.yaml"))
    assert value.keys() == {"base", "adapters", "output", "compute"}
    assert value["base"] == ("auto" if key == "base_model_name_or_path" else "path/to/base")
    assert yaml.safe_load(Path("config.yaml").read_text()) == value
