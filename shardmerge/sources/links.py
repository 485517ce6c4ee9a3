"""Where a name of a directory leads: links in an untrusted directory must not make us read or copy what is outside.

A link is followed where it ends inside the directory; where the directory is a snapshot in the Hub's cache, also in the
``blobs`` of the same entry (``models--org--name/snapshots/<commit>`` has links to ``models--org--name/blobs``), and in
the store of blobs that all entries of a cache share (``<cache>/blobs/<2 hex digits>/<64 hex digits>``, huggingface_hub
2.0 and later, ``utils/_shared_blobs.py``). What counts is the real path at the end, whatever the links lead through on
their way. Weights may be links to anywhere: large files are commonly stored elsewhere, and what is read as weights is
checked to be weights. Hard links cannot be recognised: such a file is as much inside as it is elsewhere.
"""

from __future__ import annotations

import errno
import os
import re

from shardmerge.errors import SourceError

#: Endings of files that are read as weights, and so may be links to anywhere.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
#: A directory that is called so stands where a file is looked for by its name.
FILES = (".json", ".safetensors", ".jinja", ".model", ".txt")
#: The folder of an entry of the cache, by its name, or by a commit where it was copied under another.
_ENTRY = re.compile(
    r"(?P<cache>.*)/((models|datasets|spaces)--[^/]+(?=/snapshots/[^/]+(/|$))|[^/]+(?=/snapshots/[0-9a-f]{40}(/|$)))",
    re.DOTALL,
)
#: The way out is safe to follow: a file is only taken along where a person has said that it belongs there.
_WAY_OUT = "If what it leads to belongs here, put a copy of it in the link's place; if not, remove the link"
_RULE = (
    "Links are followed to files inside the directory or in the blobs of the same entry of the Hub's cache, and those "
    f"of weights to anywhere. {_WAY_OUT}"
)
_SHARED = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")


def real_path(root: str, name: str) -> str:
    """The path without links of what ``name`` in the directory ``root`` is, or leads to.

    Raises `SourceError` where a link leads nowhere, in a circle or to a folder, and where anything but weights leads
    outside.
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
    """Whether a name leads out of its directory; `SourceError` where it leads nowhere."""
    return not is_inside(root, _resolved(os.path.join(root, name)))


def is_inside(root: str, real: str) -> bool:
    """Whether a path without links is where links of the directory ``root`` may lead."""
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
        raise SourceError(f"{path}: {_why_not(path, error)}") from None


def _why_not(path: str, error: OSError) -> str:
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
