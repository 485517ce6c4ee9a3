"""Recognises other kinds of files by their first bytes, and of directories by their names, for better messages.

For example, a header that cannot be read may be a Git LFS pointer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

#: Bytes that are enough to recognise a file.
HEAD_BYTES = 512
#: The longest Git LFS pointer (its specification, "The Pointer").
POINTER_BYTES = 1024
#: First bytes of a pointer of Git LFS, of Git LFS before its release, and of Xet.
_POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/", b"# xet version ")
_FETCH = "fetch the file itself with `git lfs pull` in the clone, or with `hf download`"
_AGAIN = "download the file again"
_HTML = re.compile(rb"<(!doctype html|html|head|body)[\s>]", re.IGNORECASE)
_ANSWERS = (
    b"entry not found",
    b"invalid username or password",
    b"access to model",
    b"repository not found",
    b"not found",
    b'{"error"',
)
#: First bytes of other formats.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", "it is a GGUF file, llama.cpp's format; give the safetensors files that it was made from"),
    (b"\x89HDF\r\n\x1a\n", "it is an HDF5 file, as Keras writes them; give the model as safetensors"),
    (b"PK\x03\x04", "it is a zip archive; if torch.save wrote it, give it the ending .pt or .bin"),
    (b"\x1f\x8b", "it is compressed by gzip; decompress it first"),
    (b"\x28\xb5\x2f\xfd", "it is compressed by zstd; decompress it first"),
    (b"\x93NUMPY", "it is an array of NumPy; save it as safetensors"),
    (b"\x80\x02", "it is a pickle from before PyTorch 1.6; load it where it came from, and save it as safetensors"),
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
#: Parts of a pipeline that adapters are trained on, the likeliest first.
_LIKELY = {name: place for place, name in enumerate(("transformer", "unet", "transformer_2", "prior", "text_encoder"))}


def is_pointer(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a pointer of Git LFS or of Xet."""
    return head.startswith(_POINTERS)


def what_is(head: bytes) -> str | None:
    """``it is …; what to do``, for a file with these first `HEAD_BYTES`; None if it is not recognised."""
    if is_pointer(head):
        return f"it is a Git LFS pointer, a few lines of text instead of the file; {_FETCH}"
    if len(head) == HEAD_BYTES and not head.strip(b"\0"):
        return f"it begins with zeros: its download is incomplete; {_AGAIN}"
    for magic, meaning in _MAGIC:
        if head.startswith(magic):
            return meaning
    return _what_text_is(head)


def _what_text_is(head: bytes) -> str | None:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if _HTML.match(text):
        return f"it is an HTML page, a website's answer instead of the file; {_AGAIN}, logged in if need be"
    if text.startswith((b"<?xml", b"<Error>")):
        return f"it is XML, a server's answer instead of the file; {_AGAIN}"
    if text.lower().startswith(_ANSWERS):
        line = text.splitlines()[0][:60].decode(errors="replace")
        return f"it is a server's answer, {line!r}, instead of the file; {_AGAIN}, logged in if need be"
    return None


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins with ``head`` has the header of a safetensors file: its length, then JSON."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000


# --- directories ------------------------------------------------------------------------------------------------------


def parts_with_weights(names: Iterable[str]) -> list[str]:
    """Folders with weights below a directory, the likeliest model first; if any has safetensors, only those."""
    below = [name for name in names if "/" in name]
    folders = {name.rpartition("/")[0] for name in below if name.endswith(".safetensors")}
    folders = folders or {name.rpartition("/")[0] for name in below if name.endswith(_WEIGHTS)}
    return sorted(folders, key=lambda folder: (folder.count("/"), _LIKELY.get(folder, len(_LIKELY)), folder))


def what_directory_is(names: Sequence[str]) -> str:
    """``it is …; what to give instead``, for a directory without the safetensors of a model."""
    top = {name for name in names if "/" not in name}
    parts = parts_with_weights(names)
    if not names:
        return _EMPTY
    if parts and "model_index.json" in top:
        return f"it is a diffusers pipeline, with models in folders; give that of the model: {listed(parts)}"
    if parts and "modules.json" in top:
        return f"it is a sentence-transformers model, in folders; give that of the transformer: {listed(parts)}"
    if "adapter_config.json" in top:
        return IS_ADAPTER
    if parts:
        return f"its weights are in folders; give one: {listed(parts)}"
    others = sorted(name for name in top if name.endswith(_WEIGHTS))
    if others and all(name.endswith(".gguf") for name in others):
        return f"it is GGUF, llama.cpp's format; give the safetensors model that it was made from ({listed(others)})"
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in others):
        return f"it has pickled weights; convert them to safetensors first ({listed(others)})"
    if others:
        return f"it has weights of another format; give the model as safetensors ({listed(others)})"
    return f"it has no file of weights, so there is nothing to merge into ({listed(sorted(top) or names)})"


#: Messages for a base and for an adapter.
IS_ADAPTER = "it is an adapter, not a model; give the model that it was trained on"
IS_MODEL = "it is a model, not an adapter; give the directory that training wrote, with adapter_config.json in it"
_EMPTY = "it is empty (hidden files are not looked at)"
_RECORD = "shardmerge.json"


def other_than_adapter(names: Sequence[str]) -> str:
    """``it is …; what to give instead``, for a directory without an adapter; empty if it is not recognised."""
    top = {name for name in names if "/" not in name}
    nested = sorted({name.rpartition("/")[0] for name in names if name.rpartition("/")[2] == "adapter_config.json"})
    weights = [name for name in top if name.endswith(_WEIGHTS)]
    if not names:
        return _EMPTY
    if nested and "" not in nested:
        return f"the adapter is in a folder of it; give that: {listed(nested)}"
    if "model_index.json" in top:
        return "it is a diffusers pipeline, not an adapter"
    if _RECORD in top and weights:
        return "it is a finished merge of shardmerge, not an adapter: its adapters are already merged"
    if weights and all(name.endswith(".gguf") for name in weights):
        return f"it is GGUF, llama.cpp's format; give the adapter as safetensors ({listed(sorted(weights))})"
    if weights and ("config.json" in top or any(".index." in name for name in top)):
        return IS_MODEL
    return "" if weights else f"it has no file of weights ({listed(sorted(top) or names)})"


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names. Names without an ending are shown as folders."""
    shown = [name if "." in name else f"{name}/" for name in names[:most]]
    return ", ".join(shown) + (" …" if len(names) > most else "")
