"""Detect from the base that an adapter names whether it was trained on another model than the base at hand.

A local copy may have any name, and a successful plan has shown that the shapes fit. So only these count: the base's own
name, where it has one (a repo of the Hub, its folder in the Hub's cache, ``_name_or_path`` in its config.json), and the
config.json of the model that the adapter names, where that is a local directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from shardmerge.errors import ShardmergeError
from shardmerge.file_formats.checkpoint import Checkpoint
from shardmerge.file_formats.checkpoint_files import read_json
from shardmerge.file_formats.model_config import setting
from shardmerge.sources.source import open_source

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
#: ``models--org--name`` among a path's folders.
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)(?:/|$)")
#: What copies in another format are called by, at the end of the name: the weights behind are the same.
_COPY = re.compile(
    r"[-_.](unsloth|bnb|[248]bit|int[48]|fp8|fp16|bf16|fp32|awq|gptq|hf|mlx|dynamic|quantized|dequantized|nf4)$"
)
#: Sizes and kinds that two models share if one is a copy of the other.
_COMPARED = (
    *("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size"),
)


def another_than(trained_on: str, checkpoint: Checkpoint) -> str:
    """Why the base is another model than ``trained_on``; empty where nothing indicates that."""
    if os.path.isdir(os.path.expanduser(trained_on)):
        return _difference(trained_on, checkpoint)
    names = list(_names(checkpoint))
    known = {_bare(name) for name in (*names, checkpoint.source.location)}
    if not names or _bare(trained_on) in known or not _REPO.fullmatch(trained_on):
        return ""
    return f"the base is {names[0]}"


def _names(checkpoint: Checkpoint) -> Iterator[str]:
    """Names of the base that are not just what somebody called a directory."""
    source = checkpoint.source
    if source.local_path is None:
        yield source.location
    elif match := _CACHED.search(str(source.directory().location)):
        yield f"{match[1]}/{match[2]}"
    named = checkpoint.config.get("_name_or_path")
    if isinstance(named, str) and _REPO.fullmatch(named):
        yield named


def _bare(name: str) -> str:
    """The last part of a name, without words for how a copy is stored."""
    last = name.rstrip("/").rpartition("/")[2].partition("@")[0].lower()
    while match := _COPY.search(last):
        last = last[: match.start()]
    return last


def _difference(path: str, checkpoint: Checkpoint) -> str:
    """In what the config.json of a directory differs from the base's; empty where it cannot be read."""
    try:
        source = open_source(path)
        theirs = read_json(source, "config.json")
    except ShardmergeError:
        return ""
    ours = checkpoint.config
    wrong = next((key for key in _COMPARED if _differ(setting(ours, key), setting(theirs, key))), None)
    return f"{wrong} is {setting(theirs, wrong)} there, and {setting(ours, wrong)} in the base" if wrong else ""


def _differ(one: Any, other: Any) -> bool:
    return type(one) is type(other) and isinstance(one, (int, str)) and one != other
