"""The examples in configs/ are valid, and the schema beside them is the code's."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from shardmerge.config.schema import AdapterConfig, ComputeConfig, MergeConfig, OutputConfig
from shardmerge.reporting.starter import SCHEMA
from tests.conftest import ROOT
from tools.schema import schema_text

EXAMPLES = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid(path: Path) -> None:
    MergeConfig.from_file(path)


def test_the_full_example_names_every_key() -> None:
    text = (ROOT / "configs" / "tinyllama.yaml").read_text()
    for section in (MergeConfig, AdapterConfig, OutputConfig, ComputeConfig):
        for key in section.model_fields:
            assert f"{key}:" in text, key


def test_the_full_example_shows_the_defaults() -> None:
    shown = yaml.safe_load((ROOT / "configs" / "tinyllama.yaml").read_text())
    smallest = {"base": shown["base"], "adapters": [shown["adapters"][0]["path"]], "output": {"path": "x"}}
    shown["output"]["path"] = "x"
    assert MergeConfig.from_dict(shown) == MergeConfig.from_dict(smallest)


def test_schema_is_in_step() -> None:
    assert SCHEMA.read_text() == schema_text(), "run: python tools/schema.py"
