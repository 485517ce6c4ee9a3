"""Which of an adapter's files are read, and what is said where that cannot be told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shardmerge.adapter_file import AdapterFile, open_adapter
from shardmerge.config import AdapterConfig
from shardmerge.errors import FormatError, SourceError
from shardmerge.sources import open_source
from tests.builders import peft_config, peft_tensors, write_json, write_peft, write_pure


def opened(path: Path) -> AdapterFile:
    return open_adapter(open_source(str(path)))


def test_a_folder(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "adapter", config=peft_config(base_model_name_or_path="org/base"))
    adapter = opened(folder)
    assert adapter.file.uri == str(folder / "adapter_model.safetensors")
    assert adapter.config == peft_config(base_model_name_or_path="org/base")
    assert adapter.config_file is not None
    assert adapter.config_file.uri == str(folder / "adapter_config.json")
    assert adapter.tensors.keys() == peft_tensors().keys()
    assert adapter.trained_on == "org/base"
    assert adapter.format() == "peft"
    assert adapter.format("pure-pytorch") == "pure-pytorch"


@pytest.mark.parametrize("value", [None, "", 7, ["x"], ...], ids=str)
def test_trained_on_nothing(tmp_path: Path, value: object) -> None:
    assert opened(write_peft(tmp_path, config=peft_config(base_model_name_or_path=value))).trained_on is None


def test_safetensors_win_over_a_pickle(tmp_path: Path) -> None:
    write_peft(tmp_path, pickled=True)
    write_peft(tmp_path, {"other": torch.ones(1)})
    assert opened(tmp_path).tensors.keys() == {"other"}


def test_a_pickle(tmp_path: Path) -> None:
    adapter = opened(write_peft(tmp_path, pickled=True))
    assert adapter.file.uri == str(tmp_path / "adapter_model.bin")
    assert adapter.tensors.keys() == peft_tensors().keys()
    assert all(ref.uri == adapter.file.uri for ref in adapter.tensors.values())
    assert adapter.config is not None


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_the_usual_file_by_name_brings_its_config(tmp_path: Path, pickled: bool) -> None:
    write_peft(tmp_path, pickled=pickled)
    adapter = opened(tmp_path / ("adapter_model.bin" if pickled else "adapter_model.safetensors"))
    assert adapter.config == peft_config()


def test_another_file_by_name_does_not(tmp_path: Path) -> None:
    """A .pt beside somebody else's adapter_config.json has no config."""
    write_peft(tmp_path)
    adapter = opened(write_pure(tmp_path / "mine.pt"))
    assert (adapter.config, adapter.config_file) == (None, None)
    assert adapter.format() == "pure-pytorch"


@pytest.mark.parametrize("name", ["lora.safetensors", "lora.pt", "lora.pth", "lora.bin"])
def test_sole_candidate_of_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "sub").mkdir()
    write_pure(tmp_path / "sub" / "other.pt")
    if name.endswith(".safetensors"):
        save_file(peft_tensors(), tmp_path / name)
    else:
        write_pure(tmp_path / name)
    assert opened(tmp_path).file.uri == str(tmp_path / name)


def test_trainers_files_are_no_candidates_beside_the_usual_name(tmp_path: Path) -> None:
    write_peft(tmp_path)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (tmp_path / name).write_bytes(b"x")
    assert opened(tmp_path).tensors.keys() == peft_tensors().keys()


@pytest.mark.parametrize(
    ("names", "found"),
    [([], "none of that kind"), (["a.pt", "b.safetensors"], "a.pt, b.safetensors"), (["x.txt"], "none of that kind")],
    ids=["empty folder", "two candidates", "other files"],
)
def test_no_single_candidate(tmp_path: Path, names: list[str], found: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FormatError, match=r"expected adapter_model.safetensors or adapter_model.bin") as raised:
        opened(tmp_path)
    assert str(raised.value).endswith(f"found {found}")


@pytest.mark.parametrize(("text", "part"), [("{", "is not JSON"), ("[]", "no JSON object"), ("\xff", "is not JSON")])
def test_malformed_config(tmp_path: Path, text: str, part: str) -> None:
    write_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=f"adapter_config.json.*{part}"):
        opened(tmp_path)


def test_no_tensors(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"adapter_model.safetensors: holds no tensors"):
        opened(write_peft(tmp_path, {}))


def test_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file or directory"):
        opened(tmp_path / "gone")


@pytest.mark.parametrize(
    "scale", [{"alpha": 8.0}, {"scaling": 1.0}, {"alpha": 0.0}, {"scaling": 0.0}], ids=lambda scale: str(scale)
)
def test_scale_of_an_adapter_that_has_its_own(tmp_path: Path, scale: dict[str, float]) -> None:
    adapter = opened(write_peft(tmp_path))
    claims = adapter.claims(AdapterConfig.model_validate({"path": "x", **scale}))
    assert claims.refused
    (problem,) = claims.problems
    assert "its own adapter_config.json" in problem
    assert "weight" in problem


def test_scale_of_an_adapter_whose_config_is_not_peft(tmp_path: Path) -> None:
    """With format: pure-pytorch the config beside it is not read, so the scale must be given."""
    write_pure(tmp_path / "adapter_model.bin")
    write_json(tmp_path / "adapter_config.json", {"r": 4})
    claims = opened(tmp_path).claims(AdapterConfig(path="x", format="pure-pytorch", alpha=8.0))
    assert claims.problems == []
    assert {update.scaling for update in claims.updates} == {2.0}
