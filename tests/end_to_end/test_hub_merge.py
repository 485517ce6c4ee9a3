"""A merge whose base and adapter are names of the Hub: the real command and client against a stub, then offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardmerge.file_formats.safetensors_header import FIRST_READ
from tests.conftest import ROOT
from tests.support.builders import Place, contents, llama_tensors, make_place, peft_config, random_tensor, write_json
from tests.support.hub_stub import HubStub, running_hub

BASE, ADAPTER = "org/base", "org/adapter"


@pytest.fixture
def hub() -> Iterator[HubStub]:
    with running_hub() as stub:
        yield stub


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A local base and adapter; the base is too large to come whole with its header, and holds what no merge needs."""
    tensors = {**llama_tensors(), "model.other.weight": random_tensor((700, 700), seed=1)}
    place = make_place(tmp_path / "local", tensors=tensors, shards=1)
    (place.base / "pytorch_model.bin").write_bytes(b"never asked for")
    write_json(place.adapter / "adapter_config.json", peft_config(base_model_name_or_path=BASE))
    return place


def shardmerge(hub: HubStub, home: Path, *arguments: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    settings = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "HOME": str(home),
        "HF_HOME": str(home),
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1" if offline else "0",
    }
    command = [sys.executable, "-m", "shardmerge", *arguments]
    return subprocess.run(command, env=settings, cwd=home, capture_output=True, text=True, timeout=120)


def test_merge_by_name(hub: HubStub, place: Place, tmp_path: Path) -> None:
    base_commit, adapter_commit = hub.commit(BASE, place.base), hub.commit(ADAPTER, place.adapter)
    home = tmp_path / "home"
    home.mkdir()
    config = {"base": "auto", "adapters": f"{ADAPTER}@main", "output": {"path": "merged"}}
    write_json(home / "config.yaml", config)

    planned = shardmerge(hub, home, "plan", "config.yaml", "--json")
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert (plan["base"]["location"], plan["base"]["revision"]) == (BASE, base_commit)
    assert plan["adapters"][0]["revision"] == adapter_commit
    assert 0 < hub.sent("model.safetensors") <= FIRST_READ  # the header; the data only when it is merged

    merged = shardmerge(hub, home, "run", "config.yaml")
    assert merged.returncode == 0, merged.stderr
    record = json.loads((home / "merged" / "shardmerge.json").read_text())
    assert (record["base"]["revision"], record["adapters"][0]["revision"]) == (base_commit, adapter_commit)
    assert hub.sent("pytorch_model.bin") == 0

    local = place.config_file()
    assert shardmerge(hub, home, "run", str(local)).returncode == 0
    assert contents(home / "merged") == contents(place.output)

    hub.server.shutdown()
    again = shardmerge(hub, home, "run", "config.yaml", "-s", "output.path=offline", "--json", offline=True)
    assert again.returncode == 0, again.stderr
    assert contents(home / "offline") == contents(home / "merged")
    assert any("the cache is used" in warning for warning in json.loads(again.stdout)["warnings"])


def test_another_base_than_the_adapters_is_said(hub: HubStub, place: Place, tmp_path: Path) -> None:
    hub.commit(ADAPTER, place.adapter)
    config = place.config_file(base=str(place.base), adapters=ADAPTER)
    home = tmp_path / "home"
    home.mkdir()
    done = shardmerge(hub, home, "plan", str(config))
    assert done.returncode == 0 and "says it was trained on" not in done.stdout
    # A local copy may be called anything; a repo of the Hub is what it is called.
    hub.commit("org/other", place.base)
    place.base.rename(place.base.with_name("copy"))
    config = place.config_file(base=str(place.base.with_name("copy")), adapters=ADAPTER)
    assert "says it was trained on" not in shardmerge(hub, home, "plan", str(config)).stdout
    config = place.config_file(base="org/other", adapters=ADAPTER)
    done = shardmerge(hub, home, "plan", str(config))
    assert f"says it was trained on {BASE}, not on org/other: the base is org/other" in done.stdout
