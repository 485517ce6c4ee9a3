"""A second opinion on a shard's header: the format's own library opens the shard too.

The library maps the file, and touches the pages of the header only. Its versions before 0.7 take a time that grows with
the square of the number of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardmerge.spec.notices import Warned
from shardmerge.spec.tensors import TensorInfo
from shardmerge.verification.findings import STRUCTURE, Findings


def ask_library(path: Path, name: str, tensors: Mapping[str, TensorInfo], findings: Findings) -> None:
    """Report to ``findings`` where the safetensors library reads other tensors than ``tensors`` from a shard."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            difference = _difference(file, tensors)
    except safetensors.SafetensorError as error:
        if "unknown variant" in str(error):  # a dtype of a later version of the format
            text = f"{name}: safetensors {safetensors.__version__} cannot give a second opinion on it: {error!s:.200}"
            findings.notes.append(Warned(text))
            return
        difference = f"refuses it: {error!s:.200}"
    except (OSError, MemoryError) as error:  # a limit of the address space, for example
        findings.notes.append(Warned(f"{name}: the safetensors library cannot open it: {error!s:.200}"))
        return
    if difference:
        findings.problem(STRUCTURE, f"{name}: the safetensors library {difference}", file=name)


def _difference(file: Any, tensors: Mapping[str, TensorInfo]) -> str:
    """What the library reads otherwise; empty where it agrees."""
    if odd := set(file.keys()) ^ tensors.keys():
        one = min(odd)
        return f"{'does not find' if one in tensors else 'finds'} the tensor {one}"
    for name, info in tensors.items():
        part = file.get_slice(name)
        dtype, shape = part.get_dtype(), tuple(part.get_shape())
        if (dtype, shape) != (info.dtype, info.shape):
            return f"reads {name} as {dtype} {list(shape)}, expected {info.dtype} {list(info.shape)}"
    return ""
