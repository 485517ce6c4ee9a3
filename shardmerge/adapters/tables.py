"""The tables that `shardmerge.adapters.registry` fills, for the modules that it imports."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardmerge.adapters.formats.base import AdapterFormat
    from shardmerge.adapters.formats.peft_method import PeftMethod
    from shardmerge.adapters.methods.base import Family

#: What can be done to a weight, by the name of the family.
FAMILIES: dict[str, Family] = {}
#: How PEFT's files are read, by ``peft_type``.
METHODS: dict[str, PeftMethod] = {}
#: How adapters are stored, by ``format`` in the config.
FORMATS: dict[str, AdapterFormat] = {}
