"""What registers itself by name: families of updates, readers of PEFT's methods, formats of adapter files.

A module adds itself when it is imported. `shardmerge.adapters.registry` imports them all, and is what the rest of the
package asks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from shardmerge.adapters.formats.base import AdapterFormat
    from shardmerge.adapters.formats.peft_method import PeftMethod
    from shardmerge.adapters.methods.base import Family

#: What can be done to a weight, by the family's name.
FAMILIES: dict[str, Family] = {}
#: How PEFT's files are read, by ``peft_type``.
METHODS: dict[str, PeftMethod] = {}
#: How adapters are stored, by ``format`` in the config.
FORMATS: dict[str, AdapterFormat] = {}

C = TypeVar("C", bound=type[Any])


def register(made: C) -> C:
    """Class decorator: a class that itself has a ``name`` is a family, one that has a ``peft_type`` a reader."""
    for table, key in ((FAMILIES, "name"), (METHODS, "peft_type")):
        if key in vars(made):
            table[vars(made)[key]] = made()
    return made


def register_format(made: C) -> C:
    """Class decorator: make a format known by its name."""
    FORMATS[made.name] = made()
    return made
