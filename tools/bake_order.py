"""Bake ``shardmerge/key_mapping/order.json``: in which order transformers' model classes register their Linear layers.

``python -m tools.bake_order`` writes the file, ``--check`` says whether it is out of date. PEFT goes through a model's
modules in this order where a method deals out numbers that all of them share. As `tools.bake_names` does, it builds
every model class on the meta device from its default config.

The file has a tree for every class, as text: ``name`` is a Linear layer or a Conv1D, ``name@`` a part that is a model
class itself, ``name(…,…)`` a module with such below it, children in the order of their registration. ``#`` stands for
all numbers. Where modules of one path differ in what they have, by layer or by config, there are several sequences of
children with ``|`` between them; what is below a child stands where it is first. A class whose tree does not lead back
to the order of its modules is left out, as is one that has no Linear layer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shardmerge.key_mapping.order import arranged, child_of, parse
from tools.bake_names import BuildError, build, classes, command, quiet

#: Configs with which some classes have layers that their default lacks.
_VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "DeepseekV2Config": ({"q_lora_rank": None},),
    "DeepseekV3Config": ({"q_lora_rank": None},),
    "OPTConfig": ({"word_embed_proj_dim": 512},),
    "Qwen2MoeConfig": ({"mlp_only_layers": [0]},),
    "Qwen3MoeConfig": ({"mlp_only_layers": [0]},),
    "T5Config": ({"feed_forward_proj": "gated-gelu"},),
}

TARGET = Path(__file__).resolve().parent.parent / "shardmerge" / "key_mapping" / "order.json"


def main() -> int:
    return command(__doc__, TARGET, bake)


def bake() -> tuple[str, dict[str, str]]:
    """The file's text, and the classes that are not in it with the reasons."""
    quiet()
    found: dict[str, list[list[str]]] = {}
    failures: dict[str, str] = {}
    for name, cls in sorted(classes().items()):
        if name.endswith("PreTrainedModel"):
            continue
        for changes in ({}, *_VARIANTS.get(cls.config_class.__name__, ())):
            try:
                _describe(build(cls, **changes), found)
            except BuildError as error:
                failures[name] = str(error)
    trees: dict[str, str] = {}
    for name, instances in sorted(found.items()):
        text = _text(instances)
        if not all(_leads_back(text, layers) for layers in instances):
            failures[name] = "its modules are in no order that a tree of their names has"
        elif text:
            trees[name] = text
    lines = [f"  {json.dumps(name)}: {json.dumps(tree)}" for name, tree in trees.items()]
    version = json.dumps(transformers.__version__)
    return f'{{\n "transformers": {version},\n "order": {{\n' + ",\n".join(lines) + "\n }\n}\n", failures


def _describe(model: PreTrainedModel, found: dict[str, list[list[str]]]) -> None:
    """Add the layers of a model, and of its parts. A class may be a part twice, and have other layers then."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            layers = ordered(module)
            instances = found.setdefault(type(module).__name__, [])
            if layers not in instances:
                instances.append(layers)


def ordered(model: nn.Module) -> list[str]:
    """Linear layers by name, in order; a part that is a model itself as its name with ``@``."""
    found: list[str] = []

    def walk(module: nn.Module, path: str, seen: set[int]) -> None:
        for name, child in module.named_children():
            below = f"{path}.{name}" if path else name
            if id(child) in seen:
                continue
            seen.add(id(child))
            if isinstance(child, PreTrainedModel):
                found.append(f"{below}@")
                seen |= {id(inner) for inner in child.modules()}
            elif isinstance(child, (nn.Linear, Conv1D)):
                found.append(below)
            else:
                walk(child, below, seen)

    walk(model, "", set())
    return found


def _text(instances: list[list[str]], path: str = "") -> str:
    """What is below a module, of whose path numbers are #: sequences of children, each described where it is first."""
    described: set[str] = set()

    def child(name: str) -> str:
        inner = f"{path}.{name}" if path else name
        if name in described or name.endswith("@"):
            return name
        described.add(name)
        below = _text(instances, inner)
        return f"{name}({below})" if below else name

    return "|".join(",".join(map(child, sequence)) for sequence in _sequences(instances, path))


def _sequences(instances: list[list[str]], path: str) -> list[tuple[str, ...]]:
    """What children a module has, in order; of modules of one path that differ, each that no other has all of."""
    found: dict[tuple[str, ...], None] = {}
    depth = path.count(".") + 1 if path else 0
    for layers in instances:
        of_module: dict[str, dict[str, None]] = {}
        for name in layers:
            segments = name.split(".")
            if len(segments) > depth and ".".join(map(child_of, segments[:depth])) == path:
                of_module.setdefault(".".join(segments[:depth]), {})[child_of(segments[depth])] = None
        found |= {tuple(children): None for children in of_module.values()}
    longest = sorted(found, key=len, reverse=True)
    return [one for at, one in enumerate(longest) if not any(_is_within(one, other) for other in longest[:at])]


def _is_within(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether one is another without some of its members."""
    rest = iter(other)
    return all(name in rest for name in one)


def _leads_back(text: str, layers: list[str]) -> bool:
    """Parts are looked at by themselves, as a Linear layer each."""
    names = [name.removesuffix("@") for name in layers]
    return arranged(parse(text.replace("@", "")), names, lambda path: None) == names


if __name__ == "__main__":
    sys.exit(main())
