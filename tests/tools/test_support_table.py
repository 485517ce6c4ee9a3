"""docs/formats.md lists the adapters that the registry has."""

from __future__ import annotations

from typing import get_args

from shardmerge.adapters.formats.peft import REFUSED_TYPES
from shardmerge.adapters.registry import FAMILIES, FORMATS, METHODS
from shardmerge.config.schema import AdapterConfig
from tools.support_table import PAGE, table_text, updated


def test_the_page_is_in_step() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert table_text() in text, "run: python -m tools.support_table"
    assert updated(text) == text


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
