"""Write a commented config for an adapter, from the adapter's metadata."""

from __future__ import annotations

import json
import math
from pathlib import Path

import yaml

from shardmerge.errors import FormatError
from shardmerge.reporting.inspection import inspect_path

#: The schema of this version's config, which is installed with the package.
SCHEMA = Path(__file__).resolve().parent.parent / "config" / "config.schema.json"

_STARTER = """\
# yaml-language-server: $schema={schema}
# Merge {what}.
# Look first: shardmerge plan {name}      then: shardmerge run {name}

base: {base}  # {base_comment}

adapters:
  - path: {adapter}
    weight: 1.0            # multiplies the adapter's own scaling{scale}{beside}

output:
  path: {output}
  dtype: same              # same | float32 | bfloat16 | float16
  max_shard_size: same     # same | 5GB

compute:
  device: auto             # auto | cpu | cuda | cuda:1
  dtype: float32           # W + ΔW is computed in this
  max_memory: auto         # working set above the interpreter's own, e.g. 256MB
  threads: auto            # that compute: one a core, or a number
"""


def starter_config(location: str, name: str, base: str | None = None, output: str | None = None) -> str:
    """A commented config for an adapter. ``name`` is the file that it will be written to.

    ``base`` and ``output`` are the places of the base and the merged model, where they are known.
    """
    found = inspect_path(location)
    found = found.get("adapter", found)
    if found["kind"] != "adapter":
        raise FormatError(f"{location}: this is a {found['kind']}, not an adapter; init takes an adapter")
    ranks = ", ".join(map(str, found["ranks"])) or "unknown"
    scalings = ", ".join(f"{value:.6g}" for value in found["scalings"] or [])
    what = f"a {_one_line(str(found['family']))} adapter, rank {ranks}" + (f", scaling {scalings}" if scalings else "")
    scale = (
        "" if scalings else "\n    alpha: 16              # the adapter carries no config: what was alpha in training?"
    )
    trained_on = found["trained_on"]
    last = location.rstrip("/").rpartition("/")[2]
    return _STARTER.format(
        what=what,
        name=_one_line(name),
        schema=SCHEMA.as_uri(),
        base=_quoted(base or ("auto" if trained_on else "path/to/base")),
        base_comment=f"the adapter says it was trained on {json.dumps(trained_on)}{'' if base else '; or give a path'}"
        if trained_on
        else "a directory, a .safetensors file or a Hub id",
        adapter=_quoted(location),
        scale=scale,
        beside="".join(
            f"\n    # {_one_line(text)}: trained with it, and merged too; ignore_files: [its name] leaves it out"
            for text in found["trained beside it"]
        ),
        output=_quoted(output or (last.partition("@")[0] or last).removesuffix(".pt") + "-merged"),
    )


def _one_line(text: str) -> str:
    """Text for a comment, which an adapter's metadata must not end."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _quoted(text: str) -> str:
    """A YAML string, in quotes where YAML would take it for something else (500, true, 2024-01-01)."""
    plain = text and all(character.isalnum() or character in "/._-@" for character in text) and text[0] not in "-@."
    if plain and yaml.safe_load(text) == text:
        return text
    return yaml.safe_dump(text, allow_unicode=True, default_style='"', width=math.inf).strip()
