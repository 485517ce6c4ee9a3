"""Compare two checkpoints bit for bit, tensor by tensor: ``python -m benchmarks.check EXPECTED FOUND``.

Exit code 0 if they hold the same names, dtypes, shapes and bytes, 1 if not. Tensors with ``--ignore TEXT`` in their
names may have other values; they are counted apart.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor that is not the same. ``in_values`` says that it is there in both, with one dtype and shape."""

    name: str
    problem: str
    in_values: bool


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


def difference(name: str, expected: torch.Tensor, found: torch.Tensor) -> Difference | None:
    """What differs between two tensors; None if nothing does."""
    if (expected.dtype, expected.shape) != (found.dtype, found.shape):
        kinds = [f"{tensor.dtype} {list(tensor.shape)}" for tensor in (expected, found)]
        return Difference(name, f"{kinds[0]} expected, {kinds[1]} found", in_values=False)
    if torch.equal(expected.view(torch.uint8), found.view(torch.uint8)):
        return None
    wrong = int((expected != found).sum())
    most = float((expected.double() - found.double()).abs().max())
    return Difference(name, f"{wrong} of {expected.numel()} values, by at most {most:g}", in_values=True)


def compare(expected: Path, found: Path) -> list[Difference]:
    """Every tensor that differs or is in one of them only."""
    left, right = tensor_files(expected), tensor_files(found)
    differences = [
        Difference(name, f"only in {'the first' if name in left else 'the second'}", in_values=False)
        for name in sorted(left.keys() ^ right.keys())
    ]
    pairs = ((name, load(left[name], name), load(right[name], name)) for name in sorted(left.keys() & right.keys()))
    return differences + [one for pair in pairs if (one := difference(*pair))]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description="Compare two checkpoints.")
    parser.add_argument("expected", type=Path)
    parser.add_argument("found", type=Path)
    parser.add_argument("--ignore", metavar="TEXT", help="values may differ in tensors with this in their names")
    options = parser.parse_args(arguments)
    differences = compare(options.expected, options.found)
    wrong = [one for one in differences if not (options.ignore and one.in_values and options.ignore in one.name)]
    for one in wrong:
        print(f"{one.name}: {one.problem}")
    count = len(tensor_files(options.expected))
    text = f"{len(wrong)} of {count} tensors differ" if wrong else f"all {count} tensors are the same, bit for bit"
    if excused := len(differences) - len(wrong):
        text = f"{len(wrong)} of {count} tensors differ, beside {excused} in which it is expected ({options.ignore})"
    print(text)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
