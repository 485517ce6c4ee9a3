"""Bases of bitsandbytes: merged into in their own format and into 16 bits, and verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import shardmerge
from shardmerge import FormatError, NonFiniteError
from tests.support import quantised_bnb
from tests.support.builders import slow_but
from tests.support.peft_oracle import (
    bits,
    least_memory,
    make_config,
    random,
    stored,
    write_adapter,
    write_base,
)

Q, DOWN, NORM = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.norm.weight"
EMBED = "model.embed_tokens.weight"
RANK, ALPHA = 4, 8.0
KINDS = ("nf4", "nf4-single", "fp4", "int8")
each = pytest.mark.parametrize("kind", slow_but(KINDS, "nf4", "int8"))


class Scene:
    """Two quantised modules, of which an adapter updates one, with its absmax in another shard than its codes."""

    def __init__(self, folder: Path, kind: str, shape: tuple[int, int] = (96, 80), scale: float = 0.05) -> None:
        self.folder, self.kind = folder, kind
        self.parts, self.other = (
            self._parts(random(*size, seed=seed, scale=0.02)) for size, seed in ((shape, 1), ((40, 192), 2))
        )
        self.named = self._named(Q, self.parts)
        names = list(self.named)
        self.plain = {NORM: torch.ones(80, dtype=torch.bfloat16), EMBED: random(32, 80, seed=3, dtype=torch.bfloat16)}
        first = {name: self.named[name] for name in names[:1]}
        second = {name: self.named[name] for name in names[1:]}
        self.base = write_base(
            folder / "base",
            [first, {**second, **self._named(DOWN, self.other), **self.plain}],
            quantization_config={"quant_method": "bitsandbytes", f"load_in_{8 if kind == 'int8' else 4}bit": True},
            torch_dtype="bfloat16",
        )
        self.a, self.b = random(RANK, shape[1], seed=5), random(shape[0], RANK, seed=6, scale=scale)
        self.adapter = write_adapter(folder / "adapter", {Q: (self.a, self.b)}, ALPHA)

    def _parts(self, values: Tensor) -> dict[str, Tensor]:
        if self.kind == "int8":
            return quantised_bnb.eight_bits(values)
        kind, _, single = self.kind.partition("-")
        return quantised_bnb.four_bits(values, kind, nested=not single)

    def _named(self, module: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.kind == "int8":
            return {f"{module}.{name}": part for name, part in parts.items()}
        return quantised_bnb.as_weight(f"{module}.weight", parts)

    def values(self, parts: dict[str, Tensor]) -> Tensor:
        return quantised_bnb.values_of_eight(parts) if self.kind == "int8" else quantised_bnb.values_of(parts)

    @property
    def merged(self) -> Tensor:
        """W + s · B A in float64."""
        return self.values(self.parts).double() + (self.b.double() @ self.a.double()) * (ALPHA / RANK)

    def nearest(self) -> Tensor:
        """The codes of that on the base's own grid, in float64."""
        merged = self.merged.numpy()
        if self.kind == "int8":
            scaled = torch.from_numpy(merged) / self.parts["SCB"].double()[:, None] * 127
            return scaled.round().clamp(-128, 127).to(torch.int8)
        table = self.parts["quant_map"].double().numpy()
        absmax = quantised_bnb.absmax_of(self.parts).astype(np.float64).repeat(64)[: merged.size]
        codes = quantised_bnb.nearest(merged.reshape(-1) / absmax, table).astype(np.uint8)
        return torch.from_numpy(codes[::2] << 4 | codes[1::2]).view(-1, 1)

    def config(self, output: str, quantized: str = "same", **options: Any) -> dict[str, Any]:
        config = make_config(self.folder / output, self.base, [self.adapter], **options)
        config["output"]["quantized"] = quantized
        return config


@each
def test_in_its_own_format_only_codes_change(tmp_path: Path, kind: str) -> None:
    scene = Scene(tmp_path, kind)
    shardmerge.merge(scene.config("out"))
    before, after = stored(scene.base), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if bits(before[name]) != bits(after[name])}
    assert changed == {f"{Q}.weight"}
    # Where float32 and float64 fall on either side of a tie, the codes are neighbours.
    assert float((after[f"{Q}.weight"] != scene.nearest()).double().mean()) < 1e-3
    report = shardmerge.verify(tmp_path / "out", rows=None)
    assert report.ok and report.touched == 1 and 0.5 < report.worst <= 1, report.problems


@each
def test_an_update_of_zero_changes_no_code(tmp_path: Path, kind: str) -> None:
    scene = Scene(tmp_path, kind, scale=0.0)
    shardmerge.merge(scene.config("out"))
    before, after = stored(scene.base), stored(tmp_path / "out")
    assert all(bits(before[name]) == bits(after[name]) for name in before)


@each
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_in_floats_it_is_decoded_added_to_and_rounded_once(tmp_path: Path, kind: str, dtype: str) -> None:
    scene, to = Scene(tmp_path, kind), getattr(torch, dtype)
    shardmerge.merge(scene.config("out", "dense", dtype=dtype))
    found = stored(tmp_path / "out")
    assert found.keys() == {f"{Q}.weight", f"{DOWN}.weight", NORM, EMBED}
    assert bits(found[f"{DOWN}.weight"]) == bits(scene.values(scene.other).to(to))
    update = (scene.b @ scene.a) * (ALPHA / RANK)  # float32: what PEFT computes
    assert bits(found[f"{Q}.weight"]) == bits((scene.values(scene.parts) + update).to(to))
    report = shardmerge.verify(tmp_path / "out", rows=None)
    assert report.ok and report.worst <= 1, report.problems


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("mode", ["same", "dense"])
def test_the_same_bytes_in_little_memory(tmp_path: Path, kind: str, mode: str) -> None:
    """Rows of 80 begin within blocks of 64, of which many then reach from one tile into the next."""
    scene = Scene(tmp_path, kind, (5000, 80))
    shardmerge.merge(scene.config("out", mode))
    little = scene.config("little", mode, max_memory=least_memory(scene.config("x", mode)))
    (tensor,) = (tensor for tensor, _ in shardmerge.plan(little).updates())
    assert tensor.tiles > 2
    shardmerge.merge(little)
    one, other = stored(tmp_path / "out"), stored(tmp_path / "little")
    assert all(bits(one[name]) == bits(other[name]) for name in one)


def poisoned(scene: Scene, name: str, change: Callable[[Tensor], object]) -> None:
    part = scene.named[name]
    change(part)
    first, *rest = scene.named
    shards = [{first: scene.named[first]}, {name: scene.named[name] for name in rest}]
    write_base(scene.base, shards, quantization_config={"quant_method": "bitsandbytes"})


@pytest.mark.parametrize(
    ("kind", "part", "error", "text"),
    [
        ("nf4-single", "weight.absmax", NonFiniteError, "weight.absmax holds nan at [7]"),
        ("nf4", "weight.nested_absmax", NonFiniteError, "weight.nested_absmax holds nan at [0]"),
        ("nf4", "weight.quant_map", NonFiniteError, "weight.quant_map holds nan at [7]"),
        ("int8", "SCB", NonFiniteError, "SCB holds nan at [7]"),
    ],
)
def test_what_is_no_number_stops_the_merge(
    tmp_path: Path, kind: str, part: str, error: type[Exception], text: str
) -> None:
    scene = Scene(tmp_path, kind)
    poisoned(scene, f"{Q}.{part}", lambda of: of[min(7, len(of) - 1)].fill_(float("nan")))
    with pytest.raises(error) as raised:
        shardmerge.merge(scene.config("out"))
    assert text in str(raised.value)


def test_another_table_stops_the_merge(tmp_path: Path) -> None:
    """bitsandbytes' kernels do not look at it, so weights would be others than they compute with."""
    scene = Scene(tmp_path, "nf4")
    poisoned(scene, f"{Q}.weight.quant_map", lambda of: of[2].mul_(1.01))
    with pytest.raises(FormatError, match=r"quant_map holds .* which is not nf4's table"):
        shardmerge.merge(scene.config("out"))


@each
def test_rounded_stochastically_an_update_is_kept_on_average(tmp_path: Path, kind: str) -> None:
    """One so small that rounding to nearest drops nearly all of it."""
    scene = Scene(tmp_path, kind, (256, 256), scale=2e-5)
    exact, before = scene.merged, scene.values(scene.parts).double()
    update = exact - before
    kept = {}
    for rounding in ("nearest", "stochastic"):
        config = scene.config(rounding)
        config["output"] |= {"rounding": rounding, **({"seed": 5} if rounding == "stochastic" else {})}
        report = shardmerge.merge(config)
        found = stored(tmp_path / rounding)
        parts = {**scene.parts, "weight" if kind == "int8" else "": found[f"{Q}.weight"]}
        after = scene.values(parts).double()
        kept[rounding] = float(((after - before) * update).sum() / update.square().sum())
        assert shardmerge.verify(tmp_path / rounding, rows=None).ok
        (seen,) = report.fidelity.values()
        assert seen.kept / seen.update == pytest.approx(kept[rounding], abs=0.6)
    assert kept["nearest"] < 0.3
    assert kept["stochastic"] == pytest.approx(1.0, abs=0.3)


@each
def test_an_update_of_zero_changes_no_code_stochastically(tmp_path: Path, kind: str) -> None:
    scene = Scene(tmp_path, kind, scale=0.0)
    config = scene.config("out")
    config["output"] |= {"rounding": "stochastic", "seed": 3}
    shardmerge.merge(config)
    before, after = stored(scene.base), stored(tmp_path / "out")
    assert all(bits(before[name]) == bits(after[name]) for name in before)


# --- mixed ------------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("listed", [None, ["lm_head", "vision"]])
def test_mixed_lists_what_is_not_quantised(tmp_path: Path, kind: str, listed: list[str] | None) -> None:
    """Without a list transformers leaves out the head by itself; with one it does not."""
    scene = Scene(tmp_path, kind)
    config = json.loads((scene.base / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = listed
    (scene.base / "config.json").write_text(json.dumps(config))
    shardmerge.merge(scene.config("out", "mixed"))
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["llm_int8_skip_modules"] == [*(listed or ["lm_head", "model.embed_tokens"]), Q]
    before, after = stored(scene.base), stored(tmp_path / "out")
    assert {name for name in after if name.startswith(Q)} == {f"{Q}.weight"}
    assert after[f"{Q}.weight"].dtype == torch.bfloat16
    assert all(bits(after[name]) == bits(before[name]) for name in after if not name.startswith(Q))
    assert shardmerge.verify(tmp_path / "out", rows=None).ok


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_is_merged(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    of_four = {"load_in_4bit": True, "bnb_4bit_quant_type": kind[:3], "bnb_4bit_use_double_quant": kind == "nf4"}
    settings = BitsAndBytesConfig(**({"load_in_8bit": True} if kind == "int8" else of_four))
    AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
    ).save_pretrained(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", {Q: (random(4, 64, seed=5), random(64, 4, seed=6))}, ALPHA)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map="cpu").dequantize().state_dict()
    for mode in ("dense", "mixed", "same"):
        given = make_config(tmp_path / mode, tmp_path / "base", [adapter])
        given["output"]["quantized"] = mode
        shardmerge.merge(given)
        model, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / mode, device_map="cpu", output_loading_info=True, dtype=torch.bfloat16
        )
        assert not any(info.values()), info
        found = (model if mode == "dense" else model.dequantize()).state_dict()
        assert found.keys() == dense.keys()
        differing = {name for name in dense if not torch.equal(found[name], dense[name].to(found[name].dtype))}
        assert differing == {f"{Q}.weight"}, mode
        if mode != "same":
            assert bits(found[f"{Q}.weight"]) == bits(stored(tmp_path / mode)[f"{Q}.weight"])
