"""Resolves links in an untrusted directory, which must not lead to files outside of it.

A link may point into the directory. In a snapshot of the Hub's cache it may also point into the ``blobs`` of the same
entry (``models--org--name/snapshots/<commit>`` links to ``models--org--name/blobs``) and into the blobs that all
entries share (``<cache>/blobs/<2 hex digits>/<64 hex digits>``, huggingface_hub 2.0, ``utils/_shared_blobs.py``). Only
the final real path counts. Weights may be links to anywhere: large files are commonly stored elsewhere, and a file that
is read as weights must be valid weights. Hard links cannot be recognised.
"""

from __future__ import annotations

import errno
import os
import re

from shardmerge.errors import SourceError

#: Endings of weights, which may be links to anywhere.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
#: A directory with such an ending is in the place of a file.
FILES = (".json", ".safetensors", ".jinja", ".model", ".txt")
#: An entry of the cache, recognised by its name or, if it was renamed, by a snapshot of a commit.
_ENTRY = re.compile(
    r"(?P<cache>.*)/((models|datasets|spaces)--[^/]+(?=/snapshots/[^/]+(/|$))|[^/]+(?=/snapshots/[0-9a-f]{40}(/|$)))",
    re.DOTALL,
)
_WAY_OUT = "If its target belongs here, replace the link by a copy of it; if not, remove the link"
_RULE = (
    "A link may point to a file in the directory or in the blobs of the same entry of the Hub's cache; a link to "
    f"weights may point anywhere. {_WAY_OUT}"
)
_SHARED = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")


def real_path(root: str, name: str) -> str:
    """The path without links of the file ``name`` in the directory ``root``.

    Raises `SourceError` if a link leads nowhere, in a circle or to a folder, or leads outside and is not to weights.
    """
    path = os.path.join(root, name)
    if os.path.isabs(name) or ".." in name.split("/"):
        raise SourceError(f"{path}: {name!r:.200} is not the name of a file in this directory")
    real = _resolved(path)
    if not name.endswith(WEIGHTS) and not is_inside(root, real):
        raise SourceError(f"{path}: is a link that leads out of its directory, to {real}. {_RULE}")
    if name.endswith("/"):
        raise SourceError(f"{path}: is a link to a folder, which is not followed. {_WAY_OUT}")
    return real


def leads_out(root: str, name: str) -> bool:
    """Whether a name is a link out of its directory. `SourceError` if it leads nowhere."""
    return not is_inside(root, _resolved(os.path.join(root, name)))


def is_inside(root: str, real: str) -> bool:
    """Whether links of the directory ``root`` may lead to ``real``, a path without links."""
    folder = os.path.realpath(root)
    if real == folder or _is_below(folder, real):
        return True
    entry = _ENTRY.match(folder)
    if entry is None:
        return False
    shared = os.path.join(entry["cache"], "blobs")
    return _is_below(os.path.join(entry[0], "blobs"), real) or (
        _is_below(shared, real) and _SHARED.fullmatch(os.path.relpath(real, shared)) is not None
    )


def _is_below(folder: str, path: str) -> bool:
    return path.startswith(os.path.join(folder, ""))


def _resolved(path: str) -> str:
    try:
        return os.path.realpath(path, strict=True)
    except OSError as error:
        raise SourceError(f"{path}: {_problem(path, error)}") from None


def _problem(path: str, error: OSError) -> str:
    reason = error.strerror or str(error)
    try:
        target = os.readlink(path)
    except OSError:  # it is not a link itself
        return f"cannot be read: {reason}"
    if error.errno == errno.ELOOP:
        return "is a link that leads back to itself; expected a file"
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
        return f"cannot be read: is a link to {target}: {reason}"
    return f"is a link that leads nowhere, to {target}; the download is incomplete, or that file was moved or removed"
