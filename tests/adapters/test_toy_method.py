"""A method is one file: registered, it is planned, merged, recorded and verified like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import shardmerge
from shardmerge.errors import PlanError
from tests.support import toy_method
from tests.support.peft_oracle import least_memory, make_config, stored


def test_it_is_merged_and_verified(tmp_path: Path) -> None:
    base, adapter = toy_method.write(tmp_path)
    config = make_config(tmp_path / "out", base, [{"path": str(adapter), "weight": 0.5}])
    with toy_method.registered():
        config["compute"]["max_memory"] = least_memory(config)
        shardmerge.merge(config)
        assert shardmerge.verify(tmp_path / "out", rows=None).ok
    exact = toy_method.exact(stored(base), load_file(adapter / "adapter_model.safetensors"), weight=0.5)
    for name, tensor in stored(tmp_path / "out").items():
        torch.testing.assert_close(tensor.double(), exact[name], rtol=3e-7, atol=1e-6)
    record = json.loads((tmp_path / "out" / "shardmerge.json").read_text())
    assert toy_method.Toy.name in json.dumps(record)


def test_a_wrong_number_is_found(tmp_path: Path) -> None:
    base, adapter = toy_method.write(tmp_path)
    with toy_method.registered():
        shardmerge.merge(make_config(tmp_path / "out", base, [adapter]))
        file = tmp_path / "out" / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 0x40
        file.write_bytes(bytes(data))
        assert not shardmerge.verify(tmp_path / "out", rows=None).ok


def test_without_it_the_adapter_is_refused(tmp_path: Path) -> None:
    base, adapter = toy_method.write(tmp_path)
    with pytest.raises(PlanError, match="TOY"):
        shardmerge.plan(make_config(tmp_path / "out", base, [adapter]))


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    base, adapter = toy_method.write(tmp_path)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "gain": "much", "loudness": 11}))
    with toy_method.registered(), pytest.raises(PlanError) as caught:
        shardmerge.plan(make_config(tmp_path / "out", base, [adapter]))
    assert "gain must be a finite number" in str(caught.value) and "loudness" in str(caught.value)
