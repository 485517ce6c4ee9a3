"""`inspect` of what a merge has made and of GGUF files of anybody's; `init` with places; `schema`."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import shardmerge
from shardmerge.config.schema import MergeConfig
from shardmerge.errors import FormatError
from shardmerge.gguf.formats import TYPES
from shardmerge.gguf.glance import glance
from shardmerge.reporting import verified
from shardmerge.reporting.inspection import inspect_path
from shardmerge.reporting.starter import SCHEMA
from tests.support.builders import (
    llama_tensors,
    make_place,
    peft_config,
    random_tensor,
    run_cli,
    snapshot,
    write_json,
    write_peft,
)
from tests.support.command_line import invoke, invoke_json
from tests.support.gguf_zoo import SPM_VOCAB, write_spm_tokenizer
from tools.schema import schema_text

# --- GGUF -------------------------------------------------------------------------------------------------------------


def of_gguf_library(path: Path) -> dict[str, Any]:
    """The same facts, as the format's own library reads them."""
    reader = gguf.GGUFReader(path)
    kinds = [tensor.tensor_type.name for tensor in reader.tensors]
    return {kind: kinds.count(kind) for kind in set(kinds)}


def write_gguf(path: Path, **texts: str) -> Path:
    """A file by the format's own writer: K-quants, long arrays and all."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_block_count(3)
    writer.add_context_length(2048)
    writer.add_embedding_length(256)
    for key, text in texts.items():
        writer.add_string(key, text)
    writer.add_array("tokenizer.ggml.tokens", [f"token {number}" for number in range(5000)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * 5000)
    writer.add_tensor("a", np.ones((4, 256), dtype=np.float32))
    for name, kind in (("b", gguf.GGMLQuantizationType.Q4_K), ("c", gguf.GGMLQuantizationType.IQ4_XS)):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor(name, np.zeros((64, 256 // block * size), dtype=np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("as_folder", [False, True])
def test_anybodys_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_folder: bool) -> None:
    path = write_gguf(tmp_path / "x.gguf")
    told = invoke_json(monkeypatch, "inspect", tmp_path if as_folder else path)
    assert (told["kind"], told["location"], told["name"]) == ("GGUF file", str(path), "Tiny")
    assert (told["architecture"], told["layers"], told["context"], told["hidden_size"]) == ("llama", 3, 2048, 256)
    assert {kind: of["tensors"] for kind, of in told["dtypes"].items()} == of_gguf_library(path)
    assert told["dtypes"]["Q4_K"]["bytes"] == 64 * 144 and told["quantization"] == "Q4_K"
    assert told["bytes"] == path.stat().st_size and told["tensors"] == 3
    assert "merged_by" not in told
    text = invoke(monkeypatch, "inspect", path).stdout
    assert "llama" in text and "Q4_K" in text and "IQ4_XS" in text


def test_types_are_those_of_the_format() -> None:
    theirs = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    assert all(theirs.get(number, name) == name for number, name in TYPES.items())


def damaged(path: Path) -> dict[str, bytes]:
    whole = path.read_bytes()
    return {
        "cut": whole[:300],
        "empty": b"",
        "another magic": b"GGUX" + whole[4:],
        "version 1": whole[:4] + struct.pack("<I", 1) + whole[8:],
        "a billion tensors": whole[:8] + struct.pack("<Q", 10**9) + whole[16:],
        "a billion keys": whole[:16] + struct.pack("<Q", 10**9) + whole[24:],
        "a name of a terabyte": whole[:24] + struct.pack("<Q", 10**12) + whole[32:],
        "an array without end": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 8, 10**15),
        "numbers without end": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 0, 10**15),
        "empty strings without end": b"GGUF"
        + struct.pack("<IQQQ", 3, 0, 1, 1)
        + b"a"
        # as many as are asked for, and the file is long enough for them
        + struct.pack("<IIQ", 9, 8, 10**7)
        + bytes(64 << 20),
        "an unknown type": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", 77) + bytes(64),
    }


def test_damaged_gguf(tmp_path: Path) -> None:
    for name, content in damaged(write_gguf(tmp_path / "x.gguf")).items():
        reads: list[int] = []

        def read(offset: int, size: int, content: bytes = content, reads: list[int] = reads) -> bytes:
            reads.append(size)
            return content[offset : offset + size]

        with pytest.raises(FormatError, match=r"^x: "):
            glance(read, len(content), "x")
        assert max(reads, default=0) <= 1 << 20, name


def test_what_a_gguf_file_says_is_shown_and_not_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "x.gguf", **{"general.type": "model\x1b[2J\nproblem: none"})
    text = invoke(monkeypatch, "inspect", path).stdout
    assert "\x1b" not in text and "\nproblem" not in text


def test_several_gguf_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name)
    assert "several GGUF files, give one: a.gguf, b.gguf" in invoke(monkeypatch, "inspect", tmp_path, code=4).stderr


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_a_merged_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    shardmerge.merge(place.config(adapters=[str(place.adapter), {"path": str(place.adapter), "weight": 0.5}]))
    before = snapshot(tmp_path)
    told = invoke_json(monkeypatch, "inspect", place.output)
    assert (told["kind"], told["model_type"]) == ("checkpoint", "llama")
    assert told["merged_by"] == f"shardmerge {shardmerge.__version__}"
    assert told["base"] == str(place.base)
    assert told["adapters"] == [str(place.adapter), f"{place.adapter} (weight 0.5)"]
    assert told["updated_weights"] == 3 and told["verified"].startswith("not by this user")
    text = invoke(monkeypatch, "inspect", place.output).stdout
    assert str(place.base) in text and "shardmerge verify" in text
    shardmerge.verify(place.output).raise_for_status()
    assert snapshot(tmp_path) == before
    assert "merged_by" not in invoke_json(monkeypatch, "inspect", place.base)


def test_when_it_was_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remembered with the user's state and not in the output; of that very merge in that very place."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    place = make_place(tmp_path / "place")
    shardmerge.merge(place.config())
    before = snapshot(place.output)
    invoke(monkeypatch, "verify", place.output)
    assert snapshot(place.output) == before
    at = datetime.fromisoformat(invoke_json(monkeypatch, "inspect", place.output)["verified"])
    assert at.utcoffset() == timedelta(0)
    shutil.copytree(place.output, tmp_path / "copy")
    assert invoke_json(monkeypatch, "inspect", tmp_path / "copy")["verified"].startswith("not by this user")
    shutil.rmtree(place.base)
    shutil.rmtree(tmp_path / "state")
    invoke(monkeypatch, "verify", place.output, "--partial")  # which is not all of it
    assert invoke_json(monkeypatch, "inspect", place.output)["verified"].startswith("not by this user")


def test_what_was_verified_is_remembered_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    place = make_place(tmp_path / "place")
    shardmerge.merge(place.config())
    (tmp_path / "state" / "shardmerge").mkdir(parents=True)
    file = tmp_path / "state" / "shardmerge" / "verified"
    file.write_text("[]\nno JSON\n" + '{"record": "x", "output": "y", "at": "z"}\n' * 20_000)
    seal = json.loads((place.output / "shardmerge.json").read_text())["record_checksum"]
    assert shardmerge.verify(place.output).record_checksum == seal
    verified.remember(place.output, seal)
    verified.remember(place.output, None)
    assert file.stat().st_size < 500_000
    assert verified.last_time(place.output, seal)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    verified.remember(place.output, seal)
    assert verified.last_time(place.output, seal) is None


def test_a_record_that_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    shardmerge.merge(place.config())
    record = json.loads((place.output / "shardmerge.json").read_text())
    write_json(place.output / "shardmerge.json", {**record, "base": {"location": "org/evil"}})
    assert "was changed after the merge" in invoke(monkeypatch, "inspect", place.output).stdout
    others: list[Any] = [[], {}, {"base": 7, "adapters": {"a": 1}, "targets": 1}, {"adapters": [None, 7]}]
    for value in others:
        write_json(place.output / "shardmerge.json", value)
        invoke(monkeypatch, "inspect", place.output)


def test_our_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "vocab_size": SPM_VOCAB}
    sizes = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    tensors = llama_tensors()
    for number, name in enumerate(("model.embed_tokens.weight", "lm_head.weight")):
        tensors[name] = random_tensor((SPM_VOCAB, 32), number)
    whole = {**config, **sizes, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    place = make_place(tmp_path, tensors=tensors, config=whole, aux={})
    write_spm_tokenizer(place.base)
    shardmerge.merge(place.config(output={"format": "gguf", "quantization": "q8_0"}))
    (path,) = place.output.glob("*.gguf")
    for given in (place.output, path):
        told = invoke_json(monkeypatch, "inspect", given)
        assert (told["kind"], told["architecture"], told["quantization"]) == ("GGUF file", "llama", "Q8_0")
        assert told["base"] == str(place.base) and told["adapters"] == [str(place.adapter)]
        assert {kind: of["tensors"] for kind, of in told["dtypes"].items()} == of_gguf_library(path)


def test_an_unfinished_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out" / ".shardmerge").mkdir(parents=True)
    write_json(tmp_path / "out" / ".shardmerge" / "journal.json", {})
    assert "merge that was not finished" in invoke(monkeypatch, "inspect", tmp_path / "out", code=4).stderr


def test_an_adapter_in_the_directory_of_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    write_peft(place.base)
    told = invoke_json(monkeypatch, "inspect", place.base)
    assert (told["kind"], told["shards"]) == ("checkpoint", 2)
    assert (told["adapter"]["kind"], told["adapter"]["ranks"]) == ("adapter", [4])
    assert told["adapter"]["trained beside it"] == []
    text = invoke(monkeypatch, "inspect", place.base).stdout
    assert text.index("LlamaForCausalLM") < text.index("an adapter is beside it") < text.index("q_proj ×1")
    # A head beside an adapter is not a model.
    save_file({"v_head.weight": torch.ones(1, 32)}, place.adapter / "value_head.safetensors")
    assert inspect_path(str(place.adapter))["kind"] == "adapter"


# --- init -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("says", [None, "org/base"])
def test_init_with_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str | None) -> None:
    place = make_place(tmp_path)
    write_peft(place.adapter, config=peft_config(base_model_name_or_path=says))
    monkeypatch.chdir(tmp_path)
    invoke(monkeypatch, "init", "adapter", "--base", "base", "--output", "a place: #1")
    config = MergeConfig.from_file("config.yaml")
    assert (config.base, config.output.path) == ("base", "a place: #1")
    assert len(list(shardmerge.plan(config).updates())) == 3


def test_init_names_a_schema_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    monkeypatch.chdir(tmp_path)
    invoke(monkeypatch, "init", place.adapter)
    match = re.match(r"# yaml-language-server: \$schema=(file://\S+)\n", Path("config.yaml").read_text())
    assert match is not None
    assert json.loads(Path(url2pathname(urlparse(match[1]).path)).read_text()) == json.loads(schema_text())


def test_init_in_the_directory_of_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    write_peft(place.base)
    monkeypatch.chdir(tmp_path)
    invoke(monkeypatch, "init", "base", "--base", "base", "--output", "out")
    assert len(list(shardmerge.plan("config.yaml").updates())) == 3


# --- schema -----------------------------------------------------------------------------------------------------------


def test_schema_is_the_code_s(monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke(monkeypatch, "schema").stdout == schema_text() == SCHEMA.read_text()


def test_schema_is_in_the_package() -> None:
    """In a folder that pyproject.toml lists as the package's data; and no second copy is beside the examples."""
    root = Path(shardmerge.__file__).parent
    assert SCHEMA.relative_to(root) == Path("config/config.schema.json")
    pyproject = (root.parent / "pyproject.toml").read_text()
    assert '"*/*.json"' in pyproject
    assert list((root.parent / "configs").glob("*.json")) == []


def test_examples_name_it() -> None:
    for path in (SCHEMA.parents[2] / "configs").glob("*.yaml"):
        match = re.match(r"# yaml-language-server: \$schema=(\S+)\n", path.read_text())
        assert match is not None and (path.parent / match[1]).resolve() == SCHEMA


def test_schema_needs_nothing_heavy(tmp_path: Path) -> None:
    done = run_cli("schema", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["title"] == "MergeConfig"
    assert os.listdir(tmp_path) == []
