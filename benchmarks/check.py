"""Compare two checkpoints bit for bit, tensor by tensor: ``python -m benchmarks.check EXPECTED FOUND``.

Exit code 0 if they hold the same names, dtypes, shapes and bytes, 1 if not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors import safe_open


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def load(path: Path, name: str) -> torch.Tensor:
    with safe_open(str(path), framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def difference(expected: torch.Tensor, found: torch.Tensor) -> str | None:
    """What differs between two tensors; None if nothing does."""
    if (expected.dtype, expected.shape) != (found.dtype, found.shape):
        return f"{expected.dtype} {list(expected.shape)} expected, {found.dtype} {list(found.shape)} found"
    if torch.equal(expected.view(torch.uint8), found.view(torch.uint8)):
        return None
    wrong = int((expected != found).sum())
    return f"{wrong} of {expected.numel()} values, by at most {float((expected - found).abs().max()):g}"


def compare(expected: Path, found: Path) -> list[str]:
    """A line for every tensor that differs or is in one of them only."""
    left, right = tensor_files(expected), tensor_files(found)
    lines = [
        f"{name}: only in {'the first' if name in left else 'the second'}"
        for name in sorted(left.keys() ^ right.keys())
    ]
    shared = sorted(left.keys() & right.keys())
    for name in shared:
        if problem := difference(load(left[name], name), load(right[name], name)):
            lines.append(f"{name}: {problem}")
    return lines


def main() -> None:
    expected, found = map(Path, sys.argv[1:])
    lines = compare(expected, found)
    count = len(tensor_files(expected))
    for line in lines:
        print(line)
    print(f"{len(lines)} of {count} tensors differ" if lines else f"all {count} tensors are the same, bit for bit")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
