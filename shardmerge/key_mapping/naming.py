"""Names of modules in an adapter's keys, without PEFT's prefix and the segments that wrappers leave in them.

Torch and training frameworks wrap a model and insert segments into its names that no checkpoint has. Which readings of
a name are possible is decided here; which of them is a module, only the base can say (`shardmerge.planning.modules`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator

#: PEFT's prefix of the name of a module of the base.
PEFT_PREFIX = "base_model.model."
#: Segments that torch.compile, FSDP and activation checkpointing leave in names.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
#: The most characters of a tensor's name. Some work on names takes a time that grows with the square of their length.
MAX_NAME = 1_000
_SUGGESTIONS = 3
_CANDIDATES = 2_000


#: A wrapper's segment, as a pattern. DistributedDataParallel and DeepSpeed's engine leave ``module``, but models have
#: modules of that name, too: it is a wrapper's where it can be nothing else, and elsewhere where the base has no such
#: name.
WRAPPER = rf"(?:module|{'|'.join(sorted(_WRAPPERS))})"
#: What may stand before PEFT's prefix, and between two of them.
_LEADING = re.compile(rf"(?:(?:module|model)\.)*{re.escape(PEFT_PREFIX)}|module\.")


#: A segment of a name that is a number.
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def numberless(name: str) -> str:
    """A name with # for its numbers."""
    return NUMBER.sub("#", name)


def unwrapped(name: str) -> str:
    """A name without the segments that only wrappers leave."""
    # All of them have one of these in them, and few names do: this is asked for every name, several times.
    if "_orig_mod" in name or "_wrapped_module" in name:
        return ".".join(segment for segment in name.split(".") if segment not in _WRAPPERS)
    return name


def module_name(name: str) -> str:
    """The name of the module in the base, without PEFT's prefix and the wrappers' segments."""
    return unwrapped(name).removeprefix(PEFT_PREFIX)


def peeled(name: str) -> Iterator[str]:
    """A module's name, and what is left of it as more of the wrappers and prefixes before it are taken off.

    ``module.base_model.model.h.0`` is then ``h.0``. Which of them is the module's name, only the base can say.
    """
    yield name
    while match := _LEADING.match(name):
        name = name[match.end() :]
        yield name


def fault(name: str) -> str:
    """Why a tensor's name is refused; empty where nothing is wrong with it."""
    if len(name) <= MAX_NAME and name.isprintable():
        return ""
    if len(name) > MAX_NAME:
        return f"a tensor's name has {len(name):,} characters; expected {MAX_NAME:,} at most"
    # A message would repeat it, where it could pass for a line of ours or for a command to the terminal.
    return f"the name {name!r} has characters that cannot be shown"


def nearest(name: str, known: Collection[str]) -> list[str]:
    """Up to three known names that resemble ``name``, the likeliest first.

    Names with the same last segments come before all others, since a wrong prefix is the usual mistake; the rest is a
    spelling comparison, which is slow and therefore bounded.
    """
    segments = name.split(".")
    for count in range(min(len(segments), 6), 1, -1):
        suffix = ".".join(segments[-count:])
        same_end = [candidate for candidate in known if candidate.endswith("." + suffix) or candidate == suffix]
        if same_end:
            return sorted(same_end, key=lambda candidate: (abs(len(candidate) - len(name)), candidate))[:_SUGGESTIONS]
    candidates = [candidate for candidate in known if candidate.rpartition(".")[2] == segments[-1]] or list(known)
    return difflib.get_close_matches(name, candidates[:_CANDIDATES], _SUGGESTIONS, cutoff=0.5)
