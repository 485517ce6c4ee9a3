"""What a name becomes is looked up once for a template; it must be what the rules make of the name itself."""

from __future__ import annotations

from itertools import product

import pytest

from shardmerge.key_mapping import table as tables
from shardmerge.key_mapping.index import Images, number_in
from shardmerge.key_mapping.names import Names
from shardmerge.key_mapping.rules import Rules

_OWNERS = (
    *("model.layers.{0}", "model.language_model.layers.{0}", "language_model.model.layers.{0}", "transformer.h.{0}"),
    *("model.visual.blocks.{0}", "vision_model.encoder.layers.{0}", "bert.encoder.layer.{0}", "layers.{0}"),
)
_MODULES = (
    *("self_attn.q_proj", "attn.qkv", "attention.query", "mlp.gate.wg", "mlp.experts.{1}.gate_proj", "mlp.down_proj"),
    *("mlp.experts.{1}.w1", "block_sparse_moe.experts.{1}.w3", "mlp.shared_experts.w2", "mlp.experts.gate_up_proj"),
    *("mlp.fc{1}", "mlp.{1}", "LayerNorm", "adapters.{1}.{0}.lora", "mlp.experts_{1}.up_proj", "mixer.in_proj"),
)
_ENDS = (".weight", ".bias", ".gamma", "", ".weight_scale_inv")
#: Of a layer and of an expert; numbers with a zero before them, and such as the stand-ins have, are names, too.
_NUMBERS = (("0", "0"), ("1", "2"), ("3", "007"), ("900000001", "900000000"))


def rule_sets() -> list[Rules]:
    """The rules of every architecture, those that are alike once, the most first."""
    of = [Names({"architectures": [name]}, {})._rules for name in tables.table().architectures]
    distinct = {tuple(rules.rules): rules for rules in of}
    return sorted(distinct.values(), key=lambda rules: -len(rules.rules))


@pytest.mark.parametrize("step", [40, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_template_is_as_good_as_the_name(step: int) -> None:
    names = [
        f"{owner}.{module}{end}".format(*numbers)
        for owner, module, end, numbers in product(_OWNERS, _MODULES, _ENDS, _NUMBERS)
    ]
    for rules in rule_sets()[::step]:
        images = Images(rules)
        for name in names:
            found, expected = images.of(name), rules.forward(name)
            assert found == expected
            assert number_in(found) == number_in(expected)
