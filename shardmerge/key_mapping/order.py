"""The order in which transformers' classes register their Linear layers, as ``shardmerge/key_mapping/order.json`` has
it.

The file is baked by ``tools/bake_order.py``, which says what its trees mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

from shardmerge.spec.updates import ModuleOrder, Parameter

_TOKEN = re.compile(r"[^(),|]+|[(),|]")


@dataclass(slots=True)
class Node:
    """A module; without children it is a Linear layer, or a part that is a model itself."""

    children: dict[str, Node] = field(default_factory=dict)
    #: Names of children in order; a sequence for each set of children that such a module can have.
    sequences: list[list[str]] = field(default_factory=lambda: [[]])
    is_part: bool = False


Part = Callable[[str], "Node | None"]


def parse(text: str) -> Node:
    """Parse the text of a tree."""
    root = Node()
    open_nodes, last = [root], root
    for token in _TOKEN.findall(text):
        here = open_nodes[-1]
        if token == "(":
            open_nodes.append(last)
        elif token == ")":
            open_nodes.pop()
        elif token == "|":
            here.sequences.append([])
        elif token != ",":
            name = token.removesuffix("@")
            here.sequences[-1].append(name)
            last = here.children.setdefault(name, Node(is_part=token.endswith("@")))
    return root


@cache
def _trees() -> dict[str, str]:
    text = resources.files("shardmerge.key_mapping").joinpath("order.json").read_text(encoding="utf-8")
    trees: dict[str, str] = json.loads(text)["order"]
    return trees


@cache
def tree_of(architecture: str) -> Node | None:
    """The tree of a class; None where it is not known."""
    text = _trees().get(architecture)
    return None if text is None else parse(text)


def child_of(segment: str) -> str:
    """The child that a segment of a name is in a tree."""
    return "#" if segment.isdecimal() else segment


def has(tree: Node, name: str, part: Part) -> bool:
    """Whether a model has a Linear layer of that name. ``part`` gives the tree of a part by its path."""
    segments = name.split(".")
    for index, segment in enumerate(segments):
        inner = part(".".join(segments[:index])) if tree.is_part else tree
        if inner is None or child_of(segment) not in inner.children:
            return False
        tree = inner.children[child_of(segment)]
    return not tree.children and not tree.is_part


def arranged(tree: Node, names: Sequence[str], part: Part, path: str = "") -> list[str] | None:
    """Sort layers that a model `has` below ``path`` into its order; None where that is not known.

    It is not known where no class has a module with all the children that one of these modules has.
    """
    if tree.is_part:
        tree = part(path) or tree
    below: dict[str, list[str]] = {}
    start = len(path) + 1 if path else 0
    for name in names:
        below.setdefault(name[start:].partition(".")[0], []).append(name)
    there = {child_of(segment) for segment in below}
    sequence = next((of for of in tree.sequences if there <= set(of)), None)
    if sequence is None:
        return None
    found: list[str] = []
    for segment in sorted(below, key=lambda of: (sequence.index(child_of(of)), int(of) if of.isdecimal() else 0)):
        child, inner = tree.children[child_of(segment)], f"{path}.{segment}" if path else segment
        ordered = [inner] if below[segment] == [inner] else arranged(child, below[segment], part, inner)
        if ordered is None:
            return None
        found += ordered
    return found


def single(tree: Node, part: Part, path: str = "") -> Iterator[str]:
    """The Linear layers of a model that are not numbered."""
    if tree.is_part and (inner := part(path)) is not None:
        tree = inner
    elif not tree.children:
        yield path
    for name, child in tree.children.items():
        if name != "#":
            yield from single(child, part, f"{path}.{name}" if path else name)


def module_order(
    classes: Mapping[str, str],
    in_memory: Sequence[str],
    resolve: Callable[[str, str], Parameter | str],
    other_names: Callable[[str], Iterable[str]],
) -> ModuleOrder | str:
    """The Linear layers of a model in the order of registration; a string says why that is not known.

    ``classes`` are those of the model and its parts, by path. ``in_memory`` are the names of its parameters, which
    ``resolve`` finds by module and parameter. ``other_names`` gives further names of a module in the model.
    """
    part: Part = {path: tree_of(name) for path, name in classes.items() if path}.get
    tree = tree_of(classes.get("", ""))
    if tree is None:
        return "the order of the modules is not known of the base's architecture"

    def layer(module: str) -> str | None:
        return next((name for name in (module, *other_names(module)) if has(tree, name, part)), None)

    layers: dict[str, None] = {}
    others: list[str] = []
    for module in _with_matrices(in_memory, resolve):
        name = layer(module)
        if name is None or name in layers:
            others.append(module)
        else:
            layers[name] = None
    # These include layers whose weight is packed, or made of two others.
    others += [found for module in _ancestors(in_memory) if (found := layer(module)) and found not in layers]
    modules = arranged(tree, list(layers), part)
    if modules is None:
        return "it has layers together whose order is not known"
    absent = [name for name in single(tree, part) if name not in layers]
    return ModuleOrder(classes[""], tuple(modules), tuple(others), tuple(absent))


def _with_matrices(in_memory: Sequence[str], resolve: Callable[[str, str], Parameter | str]) -> Iterator[str]:
    """The modules whose weight has two dimensions."""
    for name in in_memory:
        module, _, parameter = name.rpartition(".")
        found = resolve(module, parameter) if parameter == "weight" else ""
        if isinstance(found, Parameter) and len(found.shape) == 2:
            yield module


def _ancestors(in_memory: Sequence[str]) -> Iterator[str]:
    """The modules that have a parameter, and the modules around them."""
    seen: set[str] = set()
    for name in in_memory:
        while (name := name.rpartition(".")[0]) and name not in seen:
            seen.add(name)
            yield name
