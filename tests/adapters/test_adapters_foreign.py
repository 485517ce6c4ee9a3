"""Files of image and video trainers: parts of pipelines, LoKr and LoHa by LyCORIS' names, whole differences.

The oracle is the formula in float64, written with torch's own kron and einsum; every merge is verified, too.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import shardmerge
from shardmerge import PlanError
from shardmerge.adapters.formats.kohya import REFUSED
from shardmerge.adapters.registry import detect_format
from shardmerge.reporting.inspection import inspect_path
from tests.support.builders import random_tensor, refs_of
from tests.support.peft_oracle import make_config, stored

BASE: dict[str, tuple[int, ...]] = {
    "blocks.0.attn.to_q.weight": (24, 20),
    "blocks.0.attn.to_q.bias": (24,),
    "blocks.1.mlp.0.weight": (36, 24),
    "blocks.1.norm.weight": (24,),
    "blocks.1.norm.bias": (24,),
    "blocks.1.modulation": (1, 6, 24),
    "conv1.weight": (18, 12, 3),
    "conv2.weight": (18, 12, 3, 5),
    "point.weight": (18, 12, 1, 1),
    "patch.weight": (16, 12, 2, 3, 3),
    "patch.bias": (16,),
}
Q, MLP = "blocks.0.attn.to_q", "blocks.1.mlp.0"


def rand(*shape: int, seed: int) -> Tensor:
    return random_tensor(shape, seed, std=0.3)


def base_tensors(prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: rand(*shape, seed=n) for n, (name, shape) in enumerate(BASE.items())}


def pair(module: str, name: str, ends: tuple[str, str] = ("lora_A.weight", "lora_B.weight")) -> dict[str, Tensor]:
    rows, *columns = BASE[f"{module}.weight"]
    a, b = rand(4, *columns, seed=len(module)), rand(rows, 4, *(1 for _ in columns[1:]), seed=len(module) + 1)
    return {f"{name}.{ends[0]}": a, f"{name}.{ends[1]}": b}


def changed(factors: Mapping[str, Tensor]) -> Tensor:
    """B A, in float64, of one pair."""
    a, b = list(factors.values())[:2]
    return b.double().flatten(1) @ a.double().flatten(1)


class Place:
    """A base of one file and an adapter of one file."""

    def __init__(self, folder: Path, adapter: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None) -> None:
        self.folder = folder
        self.base = base_tensors() if base is None else dict(base)
        save_file(self.base, folder / "base.safetensors")
        (folder / "lora").mkdir()
        save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, folder / "lora" / "lora.safetensors")

    def config(self, **entry: Any) -> dict[str, Any]:
        path = str(self.folder / "lora" / "lora.safetensors")
        return make_config(self.folder / "out", self.folder / "base.safetensors", [{"path": path, **entry}])

    def refusal(self, **entry: Any) -> str:
        with pytest.raises(PlanError) as caught:
            shardmerge.plan(self.config(**entry))
        return str(caught.value)

    def assert_merged(self, changes: Mapping[str, Tensor], **entry: Any) -> None:
        """The base's tensors with these changes, all others as they were, and a proof by other code."""
        shardmerge.merge(self.config(**entry))
        ours = stored(self.folder / "out")
        assert ours.keys() == self.base.keys()
        for name, tensor in self.base.items():
            if name not in changes:
                assert torch.equal(ours[name], tensor), name
                continue
            change = changes[name].double().reshape(tensor.shape)
            error = (ours[name].double() - tensor.double() - change).norm()
            assert error <= 1e-6 * (change.norm() + tensor.norm()), name
            assert change.norm() > 1e-2 * tensor.norm(), name
        report = shardmerge.verify(self.folder / "out", rows=None).raise_for_status()
        assert report.complete and report.touched == len(changes)


# --- parts of pipelines -----------------------------------------------------------------------------------------------

DENOISERS = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "prior.")
OTHERS = ("text_encoder.", "text_encoder_2.", "text_encoder_3.", "transformer_2.")
ENDS = {
    "lora_A": ("lora_A.weight", "lora_B.weight"),
    "lora_A, named": ("lora_A.default.weight", "lora_B.default.weight"),
    "lora_down": ("lora_down.weight", "lora_up.weight"),
    "lora.down": ("lora.down.weight", "lora.up.weight"),
    "lora_linear_layer": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
}


def some(values: Iterable[Any], *quick: Any) -> list[Any]:
    """The values as parameters, all but some of them slow."""
    return [pytest.param(value, marks=[pytest.mark.slow] * (value not in quick)) for value in values]


@pytest.mark.parametrize("ends", some(ENDS, "lora_A", "lora_down"))
@pytest.mark.parametrize("part", [*DENOISERS, *OTHERS, ""])
def test_a_part_on_its_own_checkpoint(tmp_path: Path, part: str, ends: str) -> None:
    factors = pair(Q, part + Q, ENDS[ends])
    place = Place(tmp_path, factors)
    place.assert_merged({f"{Q}.weight": changed(factors)}, scaling=1)


@pytest.mark.parametrize("ends", some(["lora_A", "lora_down"], "lora_down"))
@pytest.mark.parametrize("stored_as", some(DENOISERS[:4], "model.diffusion_model."))
@pytest.mark.parametrize("part", [*DENOISERS, ""])
def test_a_part_of_a_single_file(tmp_path: Path, part: str, stored_as: str, ends: str) -> None:
    """A file with the denoiser under one name, and the autoencoder, which stays as it is."""
    factors = pair(Q, part + Q, ENDS[ends])
    base = {**base_tensors(stored_as), "first_stage_model.conv.weight": torch.ones(3, 4)}
    Place(tmp_path, factors, base).assert_merged({f"{stored_as}{Q}.weight": changed(factors)}, scaling=1)


def test_a_text_encoder_is_not_looked_for_in_the_denoiser(tmp_path: Path) -> None:
    place = Place(tmp_path, pair(Q, f"text_encoder.{Q}"), base_tensors("model.diffusion_model."))
    assert "which is not in the base" in place.refusal(scaling=1)


SEVERAL = {
    "lora_A": (f"unet.{Q}", f"text_encoder.{Q}", "unet."),
    "lora_down": (f"transformer.{Q}", f"text_encoder_2.{Q}", "transformer."),
    "lora.down": (f"text_encoder.{Q}", f"text_encoder_2.{Q}", "text_encoder."),
}


@pytest.mark.parametrize("ends", SEVERAL)
def test_several_parts_are_chosen_by_prefix(tmp_path: Path, ends: str) -> None:
    ours, theirs, prefix = SEVERAL[ends]
    factors = pair(Q, ours, ENDS[ends])
    place = Place(tmp_path, {**factors, **pair(MLP, theirs, ENDS[ends])})
    assert "holds factors of several models" in place.refusal(scaling=1)
    place.assert_merged({f"{Q}.weight": changed(factors)}, scaling=1, prefix=prefix)


def test_kohya_s_parts_are_chosen_by_prefix(tmp_path: Path) -> None:
    flat = Q.replace(".", "_")
    factors = pair(Q, f"lora_te2_{flat}", ENDS["lora_down"])
    place = Place(tmp_path, {**factors, **pair(Q, f"lora_te1_{flat}", ENDS["lora_down"])})
    assert "several models (lora_te1_, lora_te2_)" in place.refusal()
    place.assert_merged({f"{Q}.weight": changed(factors)}, prefix="lora_te2_")


def test_a_base_that_has_all_the_parts_takes_them_all(tmp_path: Path) -> None:
    first, second = pair(Q, f"transformer.{Q}"), pair(MLP, f"text_encoder.{MLP}")
    base = {**base_tensors("transformer."), **base_tensors("text_encoder.")}
    changes = {f"transformer.{Q}.weight": changed(first), f"text_encoder.{MLP}.weight": changed(second)}
    Place(tmp_path, {**first, **second}, base).assert_merged(changes, scaling=1)


def test_a_prefix_that_chooses_a_layer_keeps_its_name(tmp_path: Path) -> None:
    factors = pair(Q, Q)
    place = Place(tmp_path, {**factors, **pair(MLP, MLP)})
    place.assert_merged({f"{Q}.weight": changed(factors)}, scaling=1, prefix="blocks.0.")


def test_any_prefix_is_stripped_where_the_base_has_no_such_name(tmp_path: Path) -> None:
    factors = pair(Q, f"my.own.{Q}")
    place = Place(tmp_path, {**factors, **pair(MLP, f"another.{MLP}")})
    assert "which is not in the base" in place.refusal(scaling=1)
    place.assert_merged({f"{Q}.weight": changed(factors)}, scaling=1, prefix="my.own.")


@pytest.mark.parametrize(
    "name", ["lora_unet_blocks_0.attn.to_q", "lora_unet_blocks_0_attn.to_q", "lycoris_blocks_0_attn_to_q"]
)
def test_dots_behind_the_block(tmp_path: Path, name: str) -> None:
    factors = pair(Q, name, ENDS["lora_down"])
    Place(tmp_path, factors).assert_merged({f"{Q}.weight": changed(factors)})


def test_dots_are_dots(tmp_path: Path) -> None:
    base = {"a.b_c.weight": torch.ones(24, 20), "a.b.c.weight": torch.ones(24, 20)}
    factors = pair(Q, "lora_unet_a_b_c", ENDS["lora_down"])
    assert "a_b_c may be any of a.b" in Place(tmp_path, factors, base).refusal()
    (tmp_path / "more").mkdir()
    factors = pair(Q, "lora_unet_a_b.c", ENDS["lora_down"])
    Place(tmp_path / "more", factors, base).assert_merged({"a.b.c.weight": changed(factors)})


def test_peft_s_config_beside_a_part(tmp_path: Path) -> None:
    """diffusion-pipe writes PEFT's config beside ComfyUI's keys."""
    factors = pair(Q, f"diffusion_model.{Q}")
    place = Place(tmp_path, factors, base_tensors("model.diffusion_model."))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["to_q"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "lora" / "lora.safetensors").rename(tmp_path / "lora" / "adapter_model.safetensors")
    config = place.config()
    config["adapters"] = [str(tmp_path / "lora")]
    shardmerge.merge(config)
    name = f"model.diffusion_model.{Q}.weight"
    assert torch.allclose(stored(tmp_path / "out")[name].double() - place.base[name], 2 * changed(factors), atol=1e-5)


def test_gpt2_s_own_name_stays(tmp_path: Path) -> None:
    """`transformer.h.0` is GPT-2's, whose file on the Hub has `h.0`."""
    base = {"h.0.attn.c_attn.weight": torch.ones(20, 60), "wte.weight": torch.ones(9, 20)}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    a, b = rand(4, 20, seed=1), rand(60, 4, seed=2)
    key = "transformer.h.0.attn.c_attn.lora_{}.weight"
    place = Place(tmp_path, {key.format("A"): a, key.format("B"): b}, base)
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(base, folder / "model.safetensors")
    merge = {**place.config(), "base": str(folder)}
    with pytest.raises(PlanError, match="its scale is unknown"):
        shardmerge.plan(merge)
    merge["adapters"][0]["scaling"] = 1
    shardmerge.merge(merge)
    assert torch.allclose(stored(tmp_path / "out")["h.0.attn.c_attn.weight"], 1 + (b @ a).T, atol=1e-5)


# --- whole differences ------------------------------------------------------------------------------------------------

DIFFERENCES: Mapping[str, tuple[str, str]] = {
    # Key → the base's tensor; the first by any name, the second for names without dots.
    "norm.diff": ("blocks.1.norm.weight", "blocks_1_norm.diff"),
    "norm.diff_b": ("blocks.1.norm.bias", "blocks_1_norm.diff_b"),
    "norm.w_norm": ("blocks.1.norm.weight", "blocks_1_norm.w_norm"),
    "norm.b_norm": ("blocks.1.norm.bias", "blocks_1_norm.b_norm"),
    "patch.diff": ("patch.weight", "patch.diff"),
    "patch.diff_b": ("patch.bias", "patch.diff_b"),
    "linear.diff": (f"{MLP}.weight", "blocks_1_mlp_0.diff"),
    "modulation.diff": ("blocks.1.modulation", ""),
    "modulation.diff_m": ("blocks.1.modulation", ""),
}


def key_of(case: str, style: str) -> str:
    target, flat = DIFFERENCES[case]
    end = case.rpartition(".")[2]
    if style == "lora_unet_":
        return style + flat
    if end == "diff_m":
        return f"{style}{target.removesuffix('.modulation')}.{end}"
    return f"{style}{target.removesuffix('.weight').removesuffix('.bias')}.{end}"


@pytest.mark.parametrize(
    ("case", "style"),
    [
        (case, style)
        for case, (_, flat) in DIFFERENCES.items()
        for style in ("lora_unet_", "diffusion_model.", "")
        if flat or style != "lora_unet_"  # parameters that are no weight have no names without dots
    ],
)
def test_a_difference_is_added(tmp_path: Path, case: str, style: str) -> None:
    target, _ = DIFFERENCES[case]
    tensor = rand(*BASE[target], seed=99)
    place = Place(tmp_path, {key_of(case, style): tensor})
    place.assert_merged({target: tensor})
    assert inspect_path(str(tmp_path / "lora" / "lora.safetensors"))["updates"] == {"difference": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_differences_beside_factors_are_not_scaled_by_alpha(tmp_path: Path, dtype: torch.dtype) -> None:
    factors = pair(Q, f"lora_unet_{Q.replace('.', '_')}", ENDS["lora_down"])
    bias, norm = rand(24, seed=7).to(dtype), rand(24, seed=8).to(dtype)
    more = {
        f"lora_unet_{Q.replace('.', '_')}.alpha": torch.tensor(8.0),
        f"lora_unet_{Q.replace('.', '_')}.diff_b": bias,
        "lora_unet_blocks_1_norm.diff": norm,
    }
    changes = {f"{Q}.weight": 2 * changed(factors), f"{Q}.bias": bias, "blocks.1.norm.weight": norm}
    place = Place(tmp_path, {**factors, **more})
    place.assert_merged({name: 0.5 * change for name, change in changes.items()}, weight=0.5)


def test_differences_beside_lora_a(tmp_path: Path) -> None:
    factors = pair(Q, f"diffusion_model.{Q}", ENDS["lora_A, named"])
    norm = rand(24, seed=8)
    place = Place(tmp_path, {**factors, "diffusion_model.blocks.1.norm.diff": norm})
    place.assert_merged({f"{Q}.weight": changed(factors), "blocks.1.norm.weight": norm})


@pytest.mark.parametrize("last", ["head", "head.head", "proj_out", "output"])
def test_the_last_layer_of_an_image_model_is_no_output_head(tmp_path: Path, last: str) -> None:
    """No vocabulary is spoken of, so there is no embedding that it could be tied to."""
    factors, bias = pair(MLP, f"diffusion_model.{last}", ENDS["lora_down"]), rand(36, seed=4)
    base = {
        f"{last}.weight": rand(36, 24, seed=1),
        f"{last}.bias": rand(36, seed=2),
        "patch.weight": rand(16, 3, 2, 2, seed=3),
    }
    place = Place(tmp_path, {**factors, f"diffusion_model.{last}.diff_b": bias}, base)
    place.assert_merged({f"{last}.weight": changed(factors), f"{last}.bias": bias})


def test_a_tensor_that_is_set(tmp_path: Path) -> None:
    tensor = rand(36, 24, seed=9)
    place = Place(tmp_path, {f"diffusion_model.{MLP}.set_weight": tensor})
    shardmerge.merge(place.config())
    assert torch.equal(stored(tmp_path / "out")[f"{MLP}.weight"], tensor)
    assert shardmerge.verify(tmp_path / "out", rows=None).raise_for_status().complete
    assert "weight 0.5 has no meaning" in place.refusal(weight=0.5)


@pytest.mark.parametrize(
    ("adapter", "part"),
    [
        ({"blocks.1.norm.diff": torch.ones(23)}, "blocks.1.norm.diff is [23], but blocks.1.norm's weight is [24]"),
        ({"blocks.7.norm.diff": torch.ones(24)}, "which is not in the base"),
        ({"point.diff_b": torch.ones(18)}, "updates point.bias, which is not in the base"),
        ({"blocks.1.norm.diff": torch.ones(24), "blocks.1.norm.w_norm": torch.ones(24)}, "both update"),
        ({**pair(Q, Q, ENDS["lora_down"]), f"{Q}.diff": torch.ones(24, 20)}, "both update"),
        ({"blocks.1.norm.diff": torch.ones(24, dtype=torch.int64)}, "is stored as I64"),
    ],
    ids=["shape", "nowhere", "no bias", "twice", "beside factors of the weight", "whole numbers"],
)
def test_what_is_no_difference(tmp_path: Path, adapter: dict[str, Tensor], part: str) -> None:
    assert part in Place(tmp_path, adapter).refusal()


# --- LoKr and LoHa ----------------------------------------------------------------------------------------------------


def lokr(module: str, *, one: bool, two: str) -> tuple[dict[str, Tensor], Tensor, int]:
    """Factors, w1 ⊗ w2 in float64, and the rank. ``one``: w1 is a product; ``two``: what w2 is."""
    rows, columns, *kernel = BASE[f"{module}.weight"]
    a, c, rank = 2, 4, 3
    b, d = rows // a, columns // c
    factors: dict[str, Tensor] = {}
    if one:
        factors |= {"lokr_w1_a": rand(a, rank, seed=1), "lokr_w1_b": rand(rank, c, seed=2)}
        w1 = factors["lokr_w1_a"].double() @ factors["lokr_w1_b"].double()
    else:
        factors["lokr_w1"] = rand(a, c, seed=1)
        w1 = factors["lokr_w1"].double()
    if two == "whole":
        factors["lokr_w2"] = rand(b, d, *kernel, seed=3)
        w2 = factors["lokr_w2"].double()
    elif two == "product":
        size = d * torch.Size(kernel).numel()
        factors |= {"lokr_w2_a": rand(b, rank, seed=3), "lokr_w2_b": rand(rank, size, seed=4)}
        w2 = (factors["lokr_w2_a"].double() @ factors["lokr_w2_b"].double()).view(b, d, *kernel)
    else:
        factors |= {"lokr_w2_a": rand(rank, b, seed=3), "lokr_w2_b": rand(rank, d, seed=4)}
        factors["lokr_t2"] = rand(rank, rank, *kernel, seed=5)
        core, outputs, inputs = (factors[f"lokr_{role}"].double() for role in ("t2", "w2_a", "w2_b"))
        w2 = torch.einsum("ij...,ip,jr->pr...", core, outputs, inputs)
    whole = torch.kron(w1.view(a, c, *(1 for _ in kernel)), w2.contiguous())
    return factors, whole, rank


MODULES = [(Q, "whole"), (Q, "product"), ("conv1", "whole"), ("conv1", "product"), ("conv2", "whole")]
MODULES += [("conv2", "product"), ("conv2", "tucker"), ("point", "whole"), ("patch", "whole"), ("patch", "product")]


@pytest.mark.parametrize("one", [False, True], ids=["w1 whole", "w1 a product"])
@pytest.mark.parametrize(("module", "two"), MODULES, ids=" ".join)
@pytest.mark.parametrize("style", some(["diffusion_model.", "lora_unet_"], "lora_unet_"))
def test_lokr(tmp_path: Path, module: str, two: str, one: bool, style: str) -> None:
    factors, change, rank = lokr(module, one=one, two=two)
    key = style + (module.replace(".", "_") if style == "lora_unet_" else module)
    alpha = 1e10 if two == "whole" and not one else 6.0  # LyCORIS wrote anything where it is not asked for
    place = Place(tmp_path, {**named(key, factors), f"{key}.alpha": torch.tensor(alpha)})
    scaling = 1.0 if alpha > 6 else alpha / rank
    place.assert_merged({f"{module}.weight": scaling * change})


def named(key: str, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{key}.{role}": tensor for role, tensor in factors.items()}


def loha(module: str, *, tucker: bool) -> tuple[dict[str, Tensor], Tensor, int]:
    rows, columns, *kernel = BASE[f"{module}.weight"]
    rank, size = 3, torch.Size(kernel).numel()
    factors: dict[str, Tensor] = {}
    products = []
    for n in (1, 2):
        if tucker:
            a, b, t = rand(rank, rows, seed=n), rand(rank, columns, seed=n + 2), rand(rank, rank, *kernel, seed=n + 4)
            factors |= {f"hada_w{n}_a": a, f"hada_w{n}_b": b, f"hada_t{n}": t}
            products.append(torch.einsum("ij...,jr,ip->pr...", t.double(), b.double(), a.double()))
        else:
            a, b = rand(rows, rank, seed=n), rand(rank, columns * size, seed=n + 2)
            factors |= {f"hada_w{n}_a": a, f"hada_w{n}_b": b}
            products.append((a.double() @ b.double()).view(rows, columns, *kernel))
    return factors, products[0] * products[1], rank


@pytest.mark.parametrize(
    ("module", "tucker"), [(Q, False), ("conv1", False), ("conv2", False), ("conv2", True), ("patch", False)], ids=str
)
@pytest.mark.parametrize("alpha", [6.0, None])
def test_loha(tmp_path: Path, module: str, tucker: bool, alpha: float | None) -> None:
    factors, change, rank = loha(module, tucker=tucker)
    key = f"lora_unet_{module.replace('.', '_')}"
    more = {} if alpha is None else {f"{key}.alpha": torch.tensor(alpha)}
    place = Place(tmp_path, {**named(key, factors), **more})
    place.assert_merged({f"{module}.weight": (1.0 if alpha is None else alpha / rank) * change})
    found = inspect_path(str(tmp_path / "lora" / "lora.safetensors"))
    assert (found["family"], found["ranks"], found["problems"]) == ("LOHA", [rank], [])


def test_several_methods_in_one_file(tmp_path: Path) -> None:
    """LyCORIS has a method by layer, as its preset says."""
    first, second = lokr(Q, one=False, two="product"), loha("conv2", tucker=False)
    third, norm = pair(MLP, f"diffusion_model.{MLP}", ENDS["lora_down"]), rand(24, seed=3)
    adapter = {
        **named(f"diffusion_model.{Q}", first[0]),
        **named("diffusion_model.conv2", second[0]),
        **third,
        "diffusion_model.blocks.1.norm.w_norm": norm,
    }
    changes = {f"{Q}.weight": first[1], "conv2.weight": second[1]}
    changes |= {f"{MLP}.weight": changed(third), "blocks.1.norm.weight": norm}
    Place(tmp_path, adapter).assert_merged({name: 2 * change for name, change in changes.items()}, weight=2)
    assert inspect_path(str(tmp_path / "lora" / "lora.safetensors"))["family"] == "LOHA and LOKR"


def without(*roles: str) -> Callable[[dict[str, Tensor]], None]:
    def remove(tensors: dict[str, Tensor]) -> None:
        for role in roles:
            del tensors[f"{Q}.{role}"]

    return remove


def put(role: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({f"{Q}.{role}": torch.ones(shape)})


@pytest.mark.parametrize(
    ("made", "change", "parts"),
    [
        (lokr(Q, one=True, two="product"), without("lokr_w2_b"), [f"is there without {Q}.lokr_w2_b"]),
        (lokr(Q, one=True, two="product"), without("lokr_w1_a", "lokr_w1_b"), [f"is there without {Q}.lokr_w1"]),
        (lokr(Q, one=True, two="product"), put("lokr_w1", 2, 4), ["is there beside"]),
        (lokr(Q, one=True, two="product"), put("lokr_w2_b", 5, 5), ["has rank 5, but another factor says 3"]),
        (lokr(Q, one=False, two="whole"), put("lokr_w2", 12, 6), ["make an update of [24, 24]"]),
        (lokr(Q, one=False, two="whole"), put("lokr_w2"), ["expected 2 dimensions"]),
        (loha(Q, tucker=False), without("hada_w2_a"), [f"is there without {Q}.hada_w2_a"]),
        (loha(Q, tucker=False), put("hada_t1", 3, 3, 1, 1), ["is there without", "hada_t2"]),
        (loha(Q, tucker=False), put("hada_w2_b", 4, 20), ["is [4, 20]; expected [3, 20]"]),
        (loha(Q, tucker=False), put("alpha", 2), ["expected one number"]),
    ],
    ids=[
        *("w2_b is missing", "w1 is missing", "w1 twice", "another rank", "too large", "no matrix"),
        *("hada_w2_a is missing", "half a core", "another width", "two alphas"),
    ],
)
def test_factors_that_do_not_fit(
    tmp_path: Path,
    made: tuple[dict[str, Tensor], Tensor, int],
    change: Callable[[dict[str, Tensor]], None],
    parts: list[str],
) -> None:
    tensors = copy.deepcopy(named(Q, made[0]))
    change(tensors)
    refusal = Place(tmp_path, tensors).refusal()
    assert all(part in refusal for part in parts) and "adapter_config.json" not in refusal, refusal


def test_peft_s_lokr_without_its_config_is_asked_about(tmp_path: Path) -> None:
    """Its whole factors are scaled by alpha / r, too, and only the config has r."""
    factors, change, rank = lokr(Q, one=False, two="whole")
    place = Place(tmp_path, named(f"base_model.model.{Q}", factors))
    assert "give scaling" in place.refusal() and "give scaling" in place.refusal(alpha=8)
    place.assert_merged({f"{Q}.weight": 0.5 * change}, scaling=0.5)
    (tmp_path / "other").mkdir()
    factors, change, rank = lokr(Q, one=True, two="product")
    place = Place(tmp_path / "other", named(f"base_model.model.{Q}", factors))
    assert "give alpha (or scaling)" in place.refusal()
    place.assert_merged({f"{Q}.weight": 6 / rank * change}, alpha=6)


# --- what is refused by name ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [True, False], ids=["beside factors", "alone"])
@pytest.mark.parametrize("end", REFUSED)
def test_what_is_not_merged_is_named(tmp_path: Path, end: str, beside: bool) -> None:
    key = f"lora_unet_{Q.replace('.', '_')}"
    factors = pair(Q, key, ENDS["lora_down"]) if beside else {}
    place = Place(tmp_path, {**factors, f"{key}.{end}": torch.ones(4, 4), f"{key}.alpha": torch.tensor(4.0)})
    refusal = place.refusal()
    assert f"nothing of it is: {end} ({REFUSED[end]}; {key}.{end})" in refusal and refusal.count("\n") == 1, refusal
    assert not beside or REFUSED[end] in inspect_path(str(tmp_path / "lora"))["problems"][0]


def test_formats() -> None:
    for end in ("lora_down.weight", "lokr_w1", "hada_w1_a", "diff", "diff_b", "w_norm", "dora_scale", "oft_blocks"):
        assert detect_format(refs_of({f"x.{end}": (1,)}), None).name == "kohya", end
        assert detect_format(refs_of({f"x.{end}": (1,)}), {"peft_type": "LORA"}).name == "peft"
    assert detect_format(refs_of({"x.lora_A.weight": (1,), "x.alpha": ()}), None).name == "peft"
    assert detect_format(refs_of({"x.lora_A.weight": (1,), "y.diff": (1,)}), None).name == "kohya"
