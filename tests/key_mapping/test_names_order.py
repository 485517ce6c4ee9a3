"""The order in which models register their Linear layers: as the models have it, and as far as it is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from shardmerge.key_mapping.names import Names
from shardmerge.key_mapping.order import arranged, has, parse, single, tree_of
from shardmerge.spec.updates import ModuleOrder
from tests.support import zoo
from tests.support.peft_oracle import stored


def names_of(folder: Path, **changes: Any) -> Names:
    config = json.loads((folder / "config.json").read_text())
    shapes = {name: tuple(tensor.shape) for name, tensor in stored(folder).items()}
    return Names({**config, **changes}, shapes)


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


def matrices(model: nn.Module) -> set[str]:
    """All modules whose weight is a matrix."""
    return {
        name.rpartition(".")[0] for name, of in model.named_parameters() if of.dim() == 2 and name.endswith(".weight")
    }


@pytest.mark.parametrize("model", zoo.MODELS)
def test_the_order_is_the_models(model: str) -> None:
    folder = zoo.base_folder(model)
    loaded, order = zoo.load(folder), names_of(folder).module_order()
    assert isinstance(order, ModuleOrder), order
    assert order.architecture == type(loaded).__name__
    wanted = linears(loaded)
    known = [name for name in wanted if name in order.modules]
    assert list(order.modules) == known
    # What is not in the order is said not to be: of the others none is forgotten.
    assert set(wanted) - set(known) <= {*order.others, *order.absent}
    assert matrices(loaded) <= {*order.modules, *order.others, *order.absent} | {
        name for name, of in loaded.named_modules() if isinstance(of, nn.Embedding)
    }
    assert known or model in ("resnet",)


TREE = "embed,layers(#(attn(q,k),mlp(up,down),gate|mixer(a,b),mlp)),tower@,head"


def test_layers_of_different_kinds_and_parts() -> None:
    tree, part = parse(TREE), {"tower": parse("proj,blocks(#(fc))")}.get
    names = ["embed", "layers.0.attn.q", "layers.0.attn.k", "layers.0.mlp.down", "layers.0.gate", "layers.2.mixer.a"]
    names += ["layers.2.mlp.up", "layers.10.mlp.up", "tower.proj", "tower.blocks.9.fc", "tower.blocks.11.fc", "head"]
    assert all(has(tree, name, part) for name in names)
    assert arranged(tree, sorted(names), part) == arranged(tree, names[::-1], part) == names
    for unknown in ("layers.0.attn.v", "layers.x.attn.q", "layers.0.attn", "tower", "tower.other", "heads", ""):
        assert not has(tree, unknown, part)
    assert not has(tree, "tower.proj", lambda path: None), "the part's class is not known"
    assert list(single(tree, part)) == ["embed", "tower.proj", "head"]


def test_layers_that_were_never_seen_together() -> None:
    """What stands first of a gate and a mixer, nobody knows: no layer that was baked has both."""
    tree = parse(TREE)
    assert arranged(tree, ["layers.0.gate", "layers.1.mixer.a"], lambda path: None)
    assert arranged(tree, ["layers.0.gate", "layers.0.mixer.a"], lambda path: None) is None


def test_an_architecture_that_is_not_known() -> None:
    folder = zoo.base_folder("llama")
    order = names_of(folder, architectures=["Unheard"], model_type="unheard").module_order()
    assert isinstance(order, str) and "not known" in order
    assert tree_of("Unheard") is None


def test_a_layer_without_a_plain_weight_is_not_forgotten() -> None:
    """Packed, or made of two others, it takes its place among the modules all the same."""
    folder = zoo.base_folder("llama")
    config = json.loads((folder / "config.json").read_text())
    for parts in (["qweight", "scales"], ["parametrizations.weight.original0", "parametrizations.weight.original1"]):
        shapes = {name: tuple(tensor.shape) for name, tensor in stored(folder).items()}
        shape = shapes.pop("model.layers.1.mlp.up_proj.weight")
        shapes |= {f"model.layers.1.mlp.up_proj.{part}": shape for part in parts}
        order = Names(config, shapes).module_order()
        assert isinstance(order, ModuleOrder)
        assert "model.layers.1.mlp.up_proj" not in order.modules and "model.layers.1.mlp.up_proj" in order.others


def test_a_part_of_another_class() -> None:
    """A vision tower whose config says a type that is not in the table: its layers have no place, the others do."""
    folder = zoo.base_folder("llava")
    config = json.loads((folder / "config.json").read_text())
    order = names_of(folder, vision_config={**config["vision_config"], "model_type": "unheard"}).module_order()
    assert isinstance(order, ModuleOrder)
    assert not any("vision" in name for name in order.modules) and any("vision" in name for name in order.others)
    assert any("language_model" in name for name in order.modules)


@pytest.mark.slow
def test_the_file_is_of_the_installed_transformers() -> None:
    from tools.bake_order import TARGET, bake

    torch.manual_seed(0)
    assert TARGET.read_text() == bake()[0], "run: python -m tools.bake_order"
