"""Other trainers' layouts of LoRA on experts and projections, each against W + s · B A in float64.

Which rows of a fused matrix are gate's and which up's is asked of transformers: of the function that a class of experts
puts the product through. Where the matrices are on disk is what transformers itself stores of the changed model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import shardmerge
from shardmerge import PlanError
from shardmerge.key_mapping import table as tables
from tests.support import names_zoo, text_zoo
from tests.support.names_zoo import State
from tests.support.peft_oracle import bits, make_config, merge_to, stored
from tests.support.text_zoo import write
from tools import bake_names

pytestmark = pytest.mark.usefixtures("one_thread")

RANK, ALPHA = 3, 5
SCALE = ALPHA / RANK
QUICK = (
    "GptOssForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3_5MoeForCausalLM",
)


def _has_gates(name: str) -> bool:
    parts = tables.parts(tables.table().architectures[name], {})
    return any(part.architecture.gates in ("concatenated", "interleaved") for part in parts)


#: Not made small: what they are made of follows from another model.
APART = {"Gemma4AssistantForCausalLM"}
#: On disk the rows of gate and up are in turn, in memory they are not: w1 and w3 are refused.
TURNED_ON_DISK = {"Inkling2ForCausalLM"}
KNOWN = sorted(tables.table().architectures.keys() - APART)
MIXTURES = [name for name in KNOWN if name.endswith("ForCausalLM") and _has_gates(name)]
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MIXTURES]


def random(*shape: int, seed: int, std: float = 0.3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


@cache
def model_of(name: str) -> Any:
    bake_names.quiet()
    cls = getattr(transformers, name)
    variant = bake_names._VARIANTS.get(bake_names._config_class(cls).__name__, {})
    default = bake_names.build(cls, **variant).config
    return text_zoo.small_of(cls, default)


def experts_of(model: Any) -> dict[str, Any]:
    """The modules of experts that have a gate, by path."""
    found = {path: module for path, module in model.named_modules() if getattr(module, "has_gate", False)}
    return {path: module for path, module in found.items() if hasattr(module, "gate_up_proj")}


def rows_of(module: Any) -> tuple[Tensor, Tensor]:
    """Rows of gate_up_proj that are gate's, and that are up's, both in the order of what they are multiplied to.

    Nothing is left of an output whose gate is far below zero, and much where that is up.
    """
    width = module.down_proj.shape[1 if module.is_transposed else 2]
    gate, up = torch.zeros(width, dtype=torch.long), torch.zeros(width, dtype=torch.long)
    before = module._apply_gate(torch.full((1, 2 * width), 3.0))[0]
    for row in range(2 * width):
        values = torch.full((1, 2 * width), 3.0)
        values[0, row] = -30.0
        after = module._apply_gate(values)[0]
        changed = int((after != before).nonzero().item())
        (gate if abs(float(after[changed])) < 0.01 else up)[changed] = row
    return gate, up


def on_experts(weight: Tensor, module: Any, rows: Tensor | None, deltas: Tensor) -> None:
    """Add (E, out, in) to rows of a parameter of experts, however its class keeps it."""
    matrix = weight.transpose(1, 2) if module.is_transposed else weight
    matrix[:, slice(None) if rows is None else rows] += deltas


class Experts:
    """A checkpoint of a mixture, and what comes of updates of gate, up and down of every expert of every layer."""

    def __init__(self, folder: Path, name: str) -> None:
        self.model = model_of(name)
        self.state = {key: of.clone() for key, of in text_zoo.weights_of(self.model).items()}
        self.base = write(folder / "base", self.on_disk(self.state), names_zoo.config_of(self.model))
        self.exact = {key: of.double() for key, of in self.state.items()}
        self.of = experts_of(self.model)
        self.rows = {path: rows_of(module) for path, module in self.of.items()}
        assert self.of

    def on_disk(self, state: State) -> State:
        return {key: of.contiguous() for key, of in names_zoo.on_disk(self.model, dict(state)).items()}

    def sizes(self, path: str) -> tuple[int, int, int]:
        """E, the hidden size, and the experts' own width."""
        down = self.of[path].down_proj
        width, hidden = down.shape[1:] if self.of[path].is_transposed else down.shape[1:][::-1]
        return down.shape[0], hidden, width

    def add(self, path: str, part: str, deltas: Tensor) -> None:
        gate, up = self.rows[path]
        rows = {"gate": gate, "up": up, "down": None}[part]
        name = "down_proj" if part == "down" else "gate_up_proj"
        on_experts(self.exact[f"{path}.{name}"], self.of[path], rows, deltas)

    def check(self, folder: Path) -> None:
        """All that was changed is within float32's rounding, all else the same bits; verify agrees."""
        expected, found = self.on_disk(self.exact), stored(folder)
        assert sorted(found) == sorted(self.base)
        for key, tensor in found.items():
            if torch.equal(expected[key], self.base[key].double()):
                assert bits(tensor) == bits(self.base[key]), key
                continue
            change = (expected[key] - self.base[key].double()).norm()
            assert (tensor.double() - expected[key]).norm() < 1e-6 * change, key
        shardmerge.verify(folder, rows=None).raise_for_status()


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], **settings: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(
        {f"base_model.model.{key}": of.contiguous() for key, of in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def product(b: Tensor, a: Tensor) -> Tensor:
    return SCALE * (b.double() @ a.double())


# --- w1, w2, w3 -------------------------------------------------------------------------------------------------------


def shared_outer(of: Experts, *, shared: bool = True, parts: str = "132") -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for seed, path in enumerate(of.of):
        experts, hidden, width = of.sizes(path)
        outer = 1 if shared else experts
        for part in parts:
            a_shape = (experts, RANK, width) if part == "2" else (outer, RANK, hidden)
            b_shape = (outer, hidden, RANK) if part == "2" else (experts, width, RANK)
            a, b = random(*a_shape, seed=10 * seed + int(part)), random(*b_shape, seed=10 * seed + 5 + int(part))
            tensors[f"{path}.w{part}.lora_A.weight"], tensors[f"{path}.w{part}.lora_B.weight"] = a, b
            of.add(path, {"1": "gate", "3": "up", "2": "down"}[part], product(b, a))
    return tensors


@pytest.mark.parametrize("name", EVERY)
def test_shared_outer_experts(tmp_path: Path, name: str) -> None:
    of = Experts(tmp_path, name)
    write_adapter(tmp_path / "adapter", shared_outer(of))
    if name in TURNED_ON_DISK:
        assert "its rows are interleaved with those of another parameter" in refused(tmp_path)
        return
    merge_to(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")
    of.check(tmp_path / "out")


@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "GptOssForCausalLM"])
@pytest.mark.parametrize("parts", ["1", "3", "2", "31"])
def test_some_of_them_and_every_expert_by_itself(tmp_path: Path, name: str, parts: str) -> None:
    of = Experts(tmp_path, name)
    write_adapter(tmp_path / "adapter", shared_outer(of, shared=False, parts=parts), target_modules=["experts"])
    merge_to(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")
    of.check(tmp_path / "out")


def refused(folder: Path) -> str:
    with pytest.raises(PlanError) as raised:
        shardmerge.plan(make_config(folder / "out", folder / "base", [folder / "adapter"]))
    assert not (folder / "out").exists()
    return str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, w: t | {f"{w}.lora_B.weight": t[f"{w}.lora_B.weight"][:3]}, "are of 3 experts, but"),
        (lambda t, w: t | {f"{w}.lora_A.weight": t[f"{w}.lora_A.weight"].repeat(3, 1, 1)}, "of one number of experts"),
        (lambda t, w: t | {f"{w}.lora_A.weight": t[f"{w}.lora_A.weight"][:, :2]}, "not grouped factors of experts"),
        (lambda t, w: {key: of for key, of in t.items() if key != f"{w}.lora_A.weight"}, "is there without"),
        (lambda t, w: t | {f"{w}.lora_A.weight": t[f"{w}.lora_A.weight"][:, :, :7]}, "but the weight"),
        (lambda t, w: t | {f"{w}.lora_magnitude_vector": torch.ones(4)}, "neither DoRA nor biases"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    of = Experts(tmp_path, "Qwen3MoeForCausalLM")
    tensors = shared_outer(of)
    write_adapter(tmp_path / "adapter", change(tensors, f"{next(iter(of.of))}.w1"))
    assert message in refused(tmp_path)


def test_gate_and_up_of_another_scale_are_not_one_update(tmp_path: Path) -> None:
    of = Experts(tmp_path, "GptOssForCausalLM")
    write_adapter(tmp_path / "adapter", shared_outer(of), alpha_pattern={"experts.w3": 9})
    assert "a weight is updated once by an adapter" in refused(tmp_path)


def test_experts_without_a_config_take_their_rank_from_the_factors(tmp_path: Path) -> None:
    of = Experts(tmp_path, "Qwen3MoeForCausalLM")
    folder = write_adapter(tmp_path / "adapter", shared_outer(of))
    (folder / "adapter_config.json").unlink()
    merge_to(tmp_path / "out", tmp_path / "base", {"path": str(folder), "alpha": ALPHA})
    of.check(tmp_path / "out")


# --- grouped, multiplied from the right -------------------------------------------------------------------------------


def from_the_right(of: Experts) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for seed, path in enumerate(of.of):
        experts, hidden, width = of.sizes(path)
        a, b = random(experts, hidden, RANK, seed=seed), random(experts, RANK, 2 * width, seed=seed + 50)
        tensors |= {f"{path}.lora_gate_and_up_A": a, f"{path}.lora_gate_and_up_B": b}
        both = product(a, b).transpose(1, 2)
        if of.of[path].is_concatenated:
            of.add(path, "gate", both[:, :width])
            of.add(path, "up", both[:, width:])
        else:  # the trainer keeps the model's own order
            of.add(path, "gate", both[:, ::2])
            of.add(path, "up", both[:, 1::2])
        a, b = random(experts, width, RANK, seed=seed + 100), random(experts, RANK, hidden, seed=seed + 150)
        tensors |= {f"{path}.lora_down_A": a, f"{path}.lora_down_B": b}
        of.add(path, "down", product(a, b).transpose(1, 2))
    return tensors


@pytest.mark.parametrize("name", EVERY)
def test_grouped_experts_multiplied_from_the_right(tmp_path: Path, name: str) -> None:
    of = Experts(tmp_path, name)
    write_adapter(tmp_path / "adapter", from_the_right(of), target_modules=["experts"])
    merge_to(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")
    of.check(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, at: {key: of for key, of in t.items() if key != f"{at}.lora_down_B"}, "is there without"),
        (lambda t, at: t | {f"{at}.lora_down_B": t[f"{at}.lora_down_B"][:2]}, "as NeMo AutoModel groups them"),
        (lambda t, at: {key: of[:2] for key, of in t.items()}, "are of 2 experts, but"),
    ],
)
def test_what_is_not_whole_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    of = Experts(tmp_path, "Qwen3MoeForCausalLM")
    write_adapter(tmp_path / "adapter", change(from_the_right(of), next(iter(of.of))))
    assert message in refused(tmp_path)


# --- a Linear per expert ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GptOssForCausalLM", "Qwen3MoeForCausalLM"])
def test_a_linear_per_expert(tmp_path: Path, name: str) -> None:
    of = Experts(tmp_path, name)
    tensors: dict[str, Tensor] = {}
    for seed, path in enumerate(of.of):
        experts, hidden, width = of.sizes(path)
        for part, (rows, columns) in (("gate_up_proj", (2 * width, hidden)), ("down_proj", (hidden, width))):
            for e in range(experts):
                a, b = random(RANK, columns, seed=100 * seed + e), random(rows, RANK, seed=100 * seed + 50 + e)
                tensors |= {f"{path}.{part}s.{e}.lora_A.weight": a, f"{path}.{part}s.{e}.lora_B.weight": b}
                weight = of.exact[f"{path}.{part}"][e]
                (weight.T if of.of[path].is_transposed else weight).add_(product(b, a))
    names = [f"{part}s.{e}" for part in ("gate_up_proj", "down_proj") for e in range(8)]
    write_adapter(tmp_path / "adapter", tensors, target_modules=names)
    merge_to(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")
    of.check(tmp_path / "out")


@pytest.mark.parametrize("name", ["GptOssForCausalLM", "Qwen3MoeForCausalLM"])
def test_dora_of_a_linear_per_expert(tmp_path: Path, name: str) -> None:
    """A stack that is stored transposed is seen once for the lengths of each expert: only that expert's matrix."""
    of = Experts(tmp_path, name)
    tensors: dict[str, Tensor] = {}
    for seed, path in enumerate(of.of):
        experts, hidden, width = of.sizes(path)
        for e in range(experts):
            a, b = random(RANK, width, seed=100 * seed + e), random(hidden, RANK, seed=100 * seed + 50 + e)
            magnitude = random(hidden, seed=100 * seed + 75 + e).abs() + 0.5
            key = f"{path}.down_projs.{e}.lora_"
            tensors |= {f"{key}A.weight": a, f"{key}B.weight": b, f"{key}magnitude_vector": magnitude}
            weight = of.exact[f"{path}.down_proj"][e]
            weight = weight.T if of.of[path].is_transposed else weight
            weight.add_(product(b, a))
            weight.mul_((magnitude.double() / weight.norm(dim=1)).unsqueeze(1))
    write_adapter(tmp_path / "adapter", tensors, target_modules=[f"down_projs.{e}" for e in range(8)], use_dora=True)
    merge_to(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")
    of.check(tmp_path / "out")


def test_fused_experts_among_target_modules(tmp_path: Path) -> None:
    """The experts' own parameters, as PEFT nests them, though the config names the module and no parameters."""
    of = Experts(tmp_path, "Qwen3_5MoeForCausalLM")
    tensors: dict[str, Tensor] = {}
    for seed, path in enumerate(of.of):
        experts, hidden, width = of.sizes(path)
        for part, inner, rows, columns in (("both", "base_layer.", 2 * width, hidden), ("down", "", hidden, width)):
            a, b = random(RANK * experts, columns, seed=seed), random(rows, RANK * experts, seed=seed + 9)
            tensors |= {f"{path}.{inner}lora_A.weight": a, f"{path}.{inner}lora_B.weight": b}
            apart = torch.stack([product(b[:, e::experts], a[e * RANK : (e + 1) * RANK]) for e in range(experts)])
            of.exact[f"{path}.{'down_proj' if part == 'down' else 'gate_up_proj'}"] += apart
    write_adapter(tmp_path / "adapter", tensors, target_modules=["experts"], peft_version="0.21.2")
    merge_to(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")
    of.check(tmp_path / "out")


# --- projections of a gated delta net ---------------------------------------------------------------------------------


def projections(name: str, layer: Any, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What Δ of q, k, v, z, b and a makes of the stored matrices, by transformers' own reading of the products.

    Each output of the module's projections is followed: a matrix that numbers its rows is read as the layer reads it.
    """
    if name == "Qwen3_5ForCausalLM":
        return {
            "in_proj_qkv": torch.cat([deltas[part] for part in "qkv"]),
            **{f"in_proj_{x}": deltas[x] for x in "zba"},
        }
    found = {}
    for kept, parts in (("in_proj_qkvz", "qkvz"), ("in_proj_ba", "ba")):
        rows = getattr(layer, kept).weight.shape[0]
        other = layer.in_proj_ba.weight.shape[0] if kept == "in_proj_qkvz" else layer.in_proj_qkvz.weight.shape[0]
        numbers, unused = torch.arange(rows).view(1, 1, rows), torch.zeros(1, 1, other, dtype=torch.long)
        given = (numbers, unused) if kept == "in_proj_qkvz" else (unused, numbers)
        read = dict(zip("qkvzba", layer.fix_query_key_value_ordering(*given), strict=True))
        made = torch.zeros(rows, deltas["q"].shape[1], dtype=torch.float64)
        for part in parts:
            made[read[part].flatten()] = deltas[part]
        found[kept] = made
    return found


@pytest.mark.parametrize("name", ["Qwen3NextForCausalLM", "Qwen3_5ForCausalLM"])
def test_projections_by_themselves(tmp_path: Path, name: str) -> None:
    if name == "Qwen3_5ForCausalLM":
        model = text_zoo.small(text_zoo.pair("Qwen3_5ForConditionalGeneration"))
    else:
        model = model_of(name)
    config, state = model.config, text_zoo.weights_of(model)
    base = write(tmp_path / "base", names_zoo.on_disk(model, dict(state)), names_zoo.config_of(model))
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    assert values == 2 * keys  # or an order by heads could pass for another
    wide = {"q": keys * config.linear_key_head_dim, "v": values * config.linear_value_head_dim, "b": values}
    wide |= {"k": wide["q"], "z": wide["v"], "a": values}
    path, layer = next((path, of) for path, of in model.named_modules() if hasattr(of, "dt_bias"))
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for seed, (part, rows) in enumerate(wide.items()):
        a, b = random(RANK, config.hidden_size, seed=seed), random(rows, RANK, seed=seed + 20)
        tensors |= {f"{path}.in_proj_{part}.lora_A.weight": a, f"{path}.in_proj_{part}.lora_B.weight": b}
        deltas[part] = product(b, a)
    write_adapter(tmp_path / "adapter", tensors)
    merge_to(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")
    found = stored(tmp_path / "out")
    expected = {f"{path}.{key}.weight": delta for key, delta in projections(name, layer, deltas).items()}
    assert expected.keys() <= base.keys()
    for key, tensor in base.items():
        delta = expected.get(key)
        if delta is None:
            assert bits(found[key]) == bits(tensor)
        else:
            assert (found[key].double() - tensor.double() - delta).norm() < 1e-6 * delta.norm()
    shardmerge.verify(tmp_path / "out", rows=None).raise_for_status()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear_num_key_heads": ...}, "config.json does not say linear_num_key_heads"),
        ({"linear_num_key_heads": "2"}, "config.json does not say linear_num_key_heads"),
        ({"linear_num_key_heads": 3}, "not a multiple of 3"),
        ({"linear_key_head_dim": 16}, "cannot be cut into its parts"),
    ],
)
def test_projections_of_unknown_sizes_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    model = text_zoo.small(text_zoo.pair("Qwen3_5ForConditionalGeneration"))
    config = {key: value for key, value in {**names_zoo.config_of(model), **change}.items() if value is not ...}
    write(tmp_path / "base", text_zoo.weights_of(model), config)
    a, b = random(RANK, 32, seed=0), random(16, RANK, seed=1)
    at = "model.layers.0.linear_attn.in_proj_q"
    write_adapter(tmp_path / "adapter", {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b})
    assert message in refused(tmp_path)


# --- the output head --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Gemma3ForConditionalGeneration", "Qwen3_5ForConditionalGeneration"])
def test_unembed_tokens_is_the_output_head(tmp_path: Path, name: str) -> None:
    of = text_zoo.pair(name)
    base = text_zoo.write_around(tmp_path / "base", of, text_zoo.small(of), "disk")
    (head,) = [key for key in base if key.endswith("lm_head.weight")]
    a, b = random(RANK, 32, seed=0), random(base[head].shape[0], RANK, seed=1)
    at = "model.unembed_tokens"
    write_adapter(tmp_path / "adapter", {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b})
    merge_to(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")
    found = stored(tmp_path / "out")
    assert all(bits(found[key]) == bits(tensor) for key, tensor in base.items() if key != head)
    delta = product(b, a)
    assert math.isclose(
        float((found[head].double() - base[head].double() - delta).norm() / delta.norm()), 0, abs_tol=1e-6
    )


def test_all_of_it_by_the_names_of_a_text_model_in_a_multimodal_checkpoint(tmp_path: Path) -> None:
    """An adapter of Tinker's: names of the text model alone, grouped experts, split projections, the output head."""
    of = text_zoo.pair("Qwen3_5MoeForConditionalGeneration")
    text = text_zoo.small(of)
    base = text_zoo.write_around(tmp_path / "base", of, text, "disk")
    experts = "model.layers.0.mlp.experts"
    count, width = text.get_submodule(experts).down_proj.shape[0], text.get_submodule(experts).down_proj.shape[2]
    a1, b1 = random(1, RANK, 32, seed=1), random(count, width, RANK, seed=2)
    a2, b2 = random(count, RANK, width, seed=3), random(1, 32, RANK, seed=4)
    av, bv = random(RANK, 32, seed=5), random(text.config.linear_num_value_heads * 8, RANK, seed=6)
    ah, bh = random(RANK, 32, seed=7), random(61, RANK, seed=8)
    pairs = {
        f"{experts}.w1": (a1, b1),
        f"{experts}.w2": (a2, b2),
        "model.layers.0.linear_attn.in_proj_v": (av, bv),
        "model.unembed_tokens": (ah, bh),
    }
    tensors = {
        f"{key}.lora_{role}.weight": of for key, pair in pairs.items() for role, of in zip("AB", pair, strict=True)
    }
    write_adapter(tmp_path / "adapter", tensors)
    inside = "model.language_model.layers.0"
    expected = {key: tensor.double() for key, tensor in base.items()}
    for e in range(count):
        expected[f"{inside}.mlp.experts.{e}.gate_proj.weight"] += product(b1[e], a1[0])
        expected[f"{inside}.mlp.experts.{e}.down_proj.weight"] += product(b2[0], a2[e])
    expected[f"{inside}.linear_attn.in_proj_qkv.weight"][-len(bv) :] += product(bv, av)
    expected["lm_head.weight"] += product(bh, ah)
    merge_to(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")
    for key, tensor in stored(tmp_path / "out").items():
        assert torch.allclose(tensor.double(), expected[key], rtol=0, atol=1e-6), key
        unchanged = torch.equal(expected[key], base[key].double())
        assert not unchanged or bits(tensor) == bits(base[key]), key
