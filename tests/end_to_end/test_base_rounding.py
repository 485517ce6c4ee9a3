"""base_rounding: merged as QLoRA had computed in training, verified, and refused where that is not known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmerge
from shardmerge import ConfigError, PlanError
from shardmerge.inference.comparison.comparing import compare
from tests.support import quantised_bnb
from tests.support.base_roundings import rounded
from tests.support.builders import LAYERS, llama_tensors, model_config
from tests.support.peft_oracle import bits, least_memory, make_config, random, stored, write_adapter, write_base
from tests.support.tampering import forge_checksums, wrong

Q, DOWN = "model.layers.0.self_attn.q_proj", f"model.layers.{LAYERS - 1}.mlp.down_proj"
RANK, ALPHA = 4, 8.0
kinds = pytest.mark.parametrize("kind", ["nf4", "nf4-single"])


class Scene:
    """A Llama, and an adapter of some of its modules."""

    def __init__(
        self, folder: Path, *modules: str, dtype: torch.dtype = torch.bfloat16, tied: bool = False, **config: Any
    ) -> None:
        self.folder = folder
        self.tensors = dict(llama_tensors(dtype, tied=tied))
        settings = {**model_config(tie_word_embeddings=tied), **config}
        self.base = write_base(folder / "base", [self.tensors], **settings)
        shapes = {module: self.tensors[f"{module}.weight"].shape for module in modules or (Q, DOWN)}
        self.factors = {
            module: (random(RANK, shape[1], seed=5), random(shape[0], RANK, seed=6, scale=1e-3))
            for module, shape in shapes.items()
        }
        self.adapter = write_adapter(folder / "adapter", self.factors, ALPHA)

    def config(self, kind: str = "nf4", output: str = "out", **options: Any) -> dict[str, Any]:
        return {**make_config(self.folder / output, self.base, [self.adapter], **options), "base_rounding": kind}

    def merged(self, module: str, weight: Tensor) -> Tensor:
        """float32(W) + s · B A in float32, rounded once."""
        a, b = self.factors[module]
        return (weight.float() + (b @ a) * (ALPHA / RANK)).to(weight.dtype)


def problems_of(config: Mapping[str, Any]) -> str:
    with pytest.raises(PlanError) as raised:
        shardmerge.plan(config)
    return "\n".join(raised.value.problems)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_updated_linear_weights_are_rounded_first(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    scene = Scene(tmp_path, dtype=dtype)
    report = shardmerge.merge(scene.config(kind))
    found = stored(tmp_path / "out")
    for name, weight in scene.tensors.items():
        module = name.removesuffix(".weight")
        wanted = scene.merged(module, rounded(weight, kind)) if module in scene.factors else weight
        assert bits(found[name]) == bits(wanted), name
        if module in scene.factors:
            assert not torch.equal(found[name], scene.merged(module, weight))
    assert report.targets == 2
    assert any("rounds 2 weights through NF4" in warning for warning in report.warnings)
    verified = shardmerge.verify(tmp_path / "out", rows=None)
    assert verified.ok and verified.touched == 2 and 0 < verified.worst <= 1, verified.problems


def test_what_is_kept_of_the_update_is_not_mixed_up_with_the_rounding(tmp_path: Path) -> None:
    scene = Scene(tmp_path, Q)
    (seen,) = shardmerge.merge(scene.config()).fidelity.values()
    a, b = scene.factors[Q]
    exact = float(((b.double() @ a.double()) * (ALPHA / RANK)).square().sum())
    assert seen.update == pytest.approx(exact, rel=1e-3)


def test_verify_finds_a_weight_that_was_not_rounded(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    shardmerge.merge(scene.config())
    shardmerge.merge({**scene.config(output="plain"), "base_rounding": "none"})
    rounded_file, plain = (tmp_path / name / "model.safetensors" for name in ("out", "plain"))
    rounded_file.write_bytes(plain.read_bytes())
    forge_checksums(tmp_path / "out")
    problems = wrong(tmp_path / "out", rows=None).problems
    assert {problem.kind for problem in problems} == {"touched"} and len(problems) == 2


@kinds
def test_the_same_bytes_in_little_memory(tmp_path: Path, kind: str) -> None:
    """Rows of 80 end within blocks, of which four rows make five; absmax of all rows is seen before the first."""
    weight = random(4000, 80, seed=1, scale=0.02, dtype=torch.bfloat16)
    name = "model.layers.0.mlp.up_proj"
    base = write_base(tmp_path / "base", [{f"{name}.weight": weight}], architectures=["LlamaForCausalLM"])
    a, b = random(RANK, 80, seed=5), random(4000, RANK, seed=6, scale=1e-3)
    adapter = write_adapter(tmp_path / "adapter", {name: (a, b)}, ALPHA)
    config = {**make_config(tmp_path / "out", base, [adapter]), "base_rounding": kind}
    shardmerge.merge(config)
    little = {**make_config(tmp_path / "little", base, [adapter]), "base_rounding": kind}
    little["compute"] = {**little.get("compute", {}), "max_memory": least_memory(config)}
    (tensor,) = {id(tensor): tensor for tensor, _ in shardmerge.plan(little).updates()}.values()
    assert tensor.tiles > 4 and all(part.start % 4 == 0 for part in tensor.ranges())
    shardmerge.merge(little)
    wanted = (rounded(weight, kind).float() + (b @ a) * (ALPHA / RANK)).bfloat16()
    for output in ("out", "little"):
        assert bits(stored(tmp_path / output)[f"{name}.weight"]) == bits(wanted)
    assert shardmerge.verify(tmp_path / "little", rows=None).ok


def test_the_head_stays_as_it_is(tmp_path: Path) -> None:
    scene = Scene(tmp_path, Q, "lm_head")
    report = shardmerge.merge(scene.config())
    found = stored(tmp_path / "out")
    assert bits(found["lm_head.weight"]) == bits(scene.merged("lm_head", scene.tensors["lm_head.weight"]))
    assert bits(found[f"{Q}.weight"]) == bits(scene.merged(Q, rounded(scene.tensors[f"{Q}.weight"], "nf4")))
    assert any("1 updated tensors stay as they are" in text and "lm_head" in text for text in report.warnings)
    assert shardmerge.verify(tmp_path / "out", rows=None).ok


def test_two_adapters_are_added_to_what_was_rounded_once(tmp_path: Path) -> None:
    scene = Scene(tmp_path, Q)
    other = write_adapter(tmp_path / "other", {Q: (random(2, 32, seed=8), random(32, 2, seed=9, scale=1e-3))}, 2.0)
    config = scene.config()
    config["adapters"] = [*config["adapters"], str(other)]
    shardmerge.merge(config)
    families = [update.family for tensor, update in shardmerge.plan({**config, "output": {"path": "x"}}).updates()]
    assert families == ["nf4-rounding", "lora", "lora"]
    assert shardmerge.verify(tmp_path / "out", rows=None).ok


def test_the_plan_counts_the_adapters_targets(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    plan = shardmerge.plan(scene.config())
    assert {kind.family for kind in plan.totals.targets} == {"lora"}
    assert (plan.totals.updated, plan.totals.changed) == (2, 2)
    plain = shardmerge.plan({**scene.config(), "base_rounding": "none"})
    assert plan.digest != plain.digest


def test_experts_that_were_modules_in_training_are_rounded(tmp_path: Path) -> None:
    """An adapter that names them one by one was trained where each was a Linear layer."""
    experts = [f"model.layers.0.mlp.experts.{number}.down_proj" for number in range(2)]
    base = write_base(
        tmp_path / "base",
        [{f"{module}.weight": random(32, 64, seed=1, dtype=torch.bfloat16) for module in experts}],
        architectures=["Qwen3MoeForCausalLM"],
        model_type="qwen3_moe",
        num_experts=2,
    )
    factors = {module: (random(2, 64, seed=3), random(32, 2, seed=4)) for module in experts}
    adapter = write_adapter(tmp_path / "adapter", factors)
    plan = shardmerge.plan({**make_config(tmp_path / "out", base, [adapter]), "base_rounding": "nf4"})
    assert [update.family for _, update in plan.updates()] == ["nf4-rounding", "lora"] * 2


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    parts = quantised_bnb.four_bits(random(64, 64, seed=1))
    config = model_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    base = write_base(tmp_path / "base", [quantised_bnb.as_weight(f"{Q}.weight", parts)], **config)
    adapter = write_adapter(tmp_path / "adapter", {Q: (random(2, 64, seed=1), random(64, 2, seed=2))})
    found = problems_of({**make_config(tmp_path / "out", base, [adapter]), "base_rounding": "nf4"})
    assert f"{Q}.weight is stored as bnb-4bit" in found and "already what training computed with" in found


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    scene = Scene(tmp_path, architectures=["MyModel"], model_type="my-model")
    assert "names no architecture that is known here" in problems_of(scene.config())


@pytest.mark.parametrize("module", ["lm_head"])
def test_that_nothing_would_be_rounded_is_refused(tmp_path: Path, module: str) -> None:
    scene = Scene(tmp_path, module)
    assert f"has no effect: no update is of a weight that QLoRA quantises: {module}.weight" in problems_of(
        scene.config()
    )


def test_a_transposed_weight_is_refused(tmp_path: Path) -> None:
    module = "transformer.h.0.attn.c_attn"
    base = write_base(
        tmp_path / "base",
        [{f"{module}.weight": random(64, 192, seed=1)}],
        architectures=["GPT2LMHeadModel"],
        model_type="gpt2",
    )
    adapter = write_adapter(tmp_path / "adapter", {module: (random(2, 64, seed=1), random(192, 2, seed=2))})
    found = problems_of({**make_config(tmp_path / "out", base, [adapter]), "base_rounding": "nf4"})
    assert f"{module}.weight is not stored as the matrix that training had quantised" in found


def test_bfloat16_is_refused(tmp_path: Path) -> None:
    found = problems_of({**Scene(tmp_path).config(), "compute": {"dtype": "bfloat16"}})
    assert "is computed in float32; compute.dtype bfloat16 cannot be used with it" in found


def test_another_word_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="base_rounding: expected none, nf4 or nf4-single"):
        shardmerge.plan(Scene(tmp_path).config("fp4"))


def test_compare_says_that_it_cannot(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    shardmerge.merge(scene.config())
    with pytest.raises(ConfigError, match=r"the merge rounded its base first \(base_rounding: nf4\)"):
        compare(tmp_path / "out")
