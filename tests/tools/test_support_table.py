"""The tables of docs/ list what the registries have."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from shardmerge.adapters.formats.peft import REFUSED_TYPES
from shardmerge.adapters.registry import FAMILIES, FORMATS, METHODS
from shardmerge.codecs.codec import Codec
from shardmerge.codecs.registry import CODECS
from shardmerge.config.schema import AdapterConfig
from tools.support_table import TABLES, quantised_table_text, table_text, updated


@pytest.mark.parametrize("page", TABLES, ids=lambda page: page.name)
def test_the_page_is_in_step(page: Path) -> None:
    text, table = page.read_text(encoding="utf-8"), TABLES[page]()
    assert table in text, "run: python -m tools.support_table"
    assert updated(text, table) == text


def test_every_codec_that_claims_weights_of_a_base_is_in_the_table() -> None:
    claiming = [codec for codec in CODECS.values() if type(codec).claims is not Codec.claims]
    assert claiming and all(codec.title and codec.title in quantised_table_text() for codec in claiming)


def test_table_has_every_method() -> None:
    text = table_text()
    for name in (*METHODS, *REFUSED_TYPES):
        assert f"`{name}`" in text
    assert not METHODS.keys() & REFUSED_TYPES.keys()


def test_every_method_of_peft_is_merged_or_refused_by_name() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    assert {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} <= METHODS.keys() | REFUSED_TYPES.keys()


def test_formats_are_those_of_the_config() -> None:
    assert {"auto", *FORMATS} == set(get_args(AdapterConfig.model_fields["format"].annotation))


def test_names_are_their_own() -> None:
    assert all(name == family.name for name, family in FAMILIES.items())
    assert all(name == method.peft_type and method.title for name, method in METHODS.items())
