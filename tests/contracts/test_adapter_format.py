"""What every format of adapters promises (`shardmerge.adapters.formats.base`). A new one is a row in `SAMPLES`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import shardmerge
from shardmerge.adapters.formats.base import AdapterContent, AdapterFormat
from shardmerge.adapters.registry import FAMILIES, FORMATS, detect_format, shows_adapter
from shardmerge.spec.tensors import TensorRef
from tests.support import toy_format
from tests.support.builders import refs_of
from tests.support.peft_oracle import make_config, random, stored, write_base

P = "base_model.model."
MODULE = "model.layers.0.self_attn.q_proj"
OUT, IN, RANK = 48, 32, 4


@dataclass(frozen=True)
class Sample:
    """The tensors of one LoRA pair as a format stores them, and the scale that they have."""

    format: str
    shapes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any] | None = None
    alpha: float | None = None
    scale: float = 2.0
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    #: Keys of no factors.
    others: tuple[str, ...] = ()

    @property
    def tensors(self) -> dict[str, TensorRef]:
        return refs_of(self.shapes)

    @property
    def content(self) -> AdapterContent:
        read = lambda ref: self.numbers[ref.name]  # noqa: E731
        return AdapterContent(self.tensors, self.config, {}, self.alpha, None, None, read)

    @property
    def reader(self) -> AdapterFormat:
        return FORMATS[self.format]


SAMPLES = {
    "peft": Sample(
        "peft",
        {f"{P}{MODULE}.lora_A.weight": (RANK, IN), f"{P}{MODULE}.lora_B.weight": (OUT, RANK)},
        {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj"]},
    ),
    "peft, keys alone": Sample(
        "peft",
        {f"{MODULE}.lora_A.weight": (RANK, IN), f"{MODULE}.lora_B.weight": (OUT, RANK), f"{MODULE}.alpha": ()},
        numbers={f"{MODULE}.alpha": 8.0},
        others=(f"{MODULE}.alpha",),
    ),
    "pure-pytorch": Sample(
        "pure-pytorch",
        {f"{MODULE}.A": (IN, RANK), f"{MODULE}.B": (RANK, OUT), f"{MODULE}.original.weight": (OUT, IN)},
        alpha=8.0,
        others=(f"{MODULE}.original.weight",),
    ),
    "kohya": Sample(
        "kohya",
        {f"{MODULE}.lora_down.weight": (RANK, IN), f"{MODULE}.lora_up.weight": (OUT, RANK), f"{MODULE}.alpha": ()},
        numbers={f"{MODULE}.alpha": 8.0},
        others=(f"{MODULE}.alpha",),
    ),
    "mlx": Sample(
        "mlx",
        {f"{MODULE}.lora_a": (IN, RANK), f"{MODULE}.lora_b": (RANK, OUT)},
        {"fine_tune_type": "lora", "lora_parameters": {"rank": RANK, "scale": 2.0}},
    ),
    "toy": Sample(
        "toy",
        {f"{MODULE}#a": (IN, RANK), f"{MODULE}#b": (RANK, OUT)},
        {"toy_scale": toy_format.SCALE},
        scale=toy_format.SCALE,
    ),
}

#: Names of a model's own weights.
MODEL = ("model.embed_tokens.weight", f"{MODULE}.weight", "model.norm.weight", "lm_head.weight")


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    with toy_format.registered():
        yield


@pytest.fixture(params=SAMPLES)
def sample(request: pytest.FixtureRequest) -> Sample:
    return SAMPLES[request.param]


def test_every_format_has_a_sample() -> None:
    assert {sample.format for sample in SAMPLES.values()} == FORMATS.keys()
    assert all(name == known.name and known.summary for name, known in FORMATS.items())


def test_it_is_detected_and_no_other_is(sample: Sample) -> None:
    assert detect_format(sample.tensors, sample.config).name == sample.format
    claimed = [name for name, known in FORMATS.items() if known.detect(sample.tensors, sample.config)]
    assert claimed in ([sample.format], []), "a format that detects nothing is the one that is left"


def test_a_model_is_no_adapter() -> None:
    assert not shows_adapter(MODEL)


def test_every_tensor_is_accounted_for(sample: Sample) -> None:
    claims = sample.reader.claim(sample.content)
    assert not claims.problems and not claims.refused and not claims.leftovers(sample.tensors)


def test_updates_name_known_families_and_the_module(sample: Sample) -> None:
    (update,) = (of for of in sample.reader.claim(sample.content).updates if FAMILIES[of.family].changes_weight)
    assert (update.module, update.parameter) == (MODULE, "weight")
    assert FAMILIES[update.family].check(update, (OUT, IN)) == []


def test_the_scaling_is_what_the_sample_says(sample: Sample) -> None:
    (update,) = (of for of in sample.reader.claim(sample.content).updates if FAMILIES[of.family].changes_weight)
    assert update.scaling == sample.scale
    stated = sample.reader.stated_scale(sample.config)
    assert stated is None or stated == sample.scale


def test_a_factor_without_its_half_is_named(sample: Sample) -> None:
    factors = [name for name in sample.shapes if name not in sample.others]
    for missing in factors:
        tensors = {name: ref for name, ref in sample.tensors.items() if name != missing}
        claims = sample.reader.claim(dataclasses.replace(sample.content, tensors=tensors))
        (there,) = (name for name in factors if name != missing)
        assert any(there in problem for problem in claims.problems)
        assert not [of for of in claims.updates if FAMILIES[of.family].changes_weight]


def test_a_scale_that_the_config_states_is_not_given_twice(sample: Sample) -> None:
    if sample.reader.config_states_scale and sample.config is not None:
        claims = sample.reader.claim(dataclasses.replace(sample.content, scaling=1.0))
        assert claims.refused and "alpha and scaling must not be given" in claims.problems[0]


def test_ignored_keys_are_heeded_or_refused(sample: Sample) -> None:
    claims = sample.reader.claim(dataclasses.replace(sample.content, ignored=("nothing_of_that_name",)))
    assert claims.refused and "ignore_keys" in claims.problems[0]


def test_how_its_layer_applies_the_factors(sample: Sample) -> None:
    """What attaches an adapter without its config finds both factors, (in, r) and (r, out), and nothing else."""
    pairs = sample.reader.pairs
    if pairs is None:
        return
    found = {}
    for name, shape in sample.shapes.items():
        if match := pairs.keys.fullmatch(name):
            assert match["module"].removeprefix(P) == MODULE
            found[match["role"].lower()] = pairs.orientation.shape(shape)
        else:
            assert name in sample.others and pairs.others.fullmatch(name)
    assert found == {"a": (IN, RANK), "b": (RANK, OUT)}


def test_a_format_is_one_file(tmp_path: Path) -> None:
    """Planned, merged and verified by the name that its files show; its layer's own formula is the oracle."""
    weight, a, b = random(OUT, IN, seed=0), random(IN, RANK, seed=1), random(RANK, OUT, seed=2)
    base = write_base(tmp_path / "base", [{f"{MODULE}.weight": weight}])
    adapter = toy_format.write(tmp_path / "adapter", {MODULE: (a, b)})
    plan = shardmerge.plan(make_config(tmp_path / "out", base, [adapter]))
    assert plan.adapters[0].format == "toy"
    shardmerge.merge(plan)
    exact = weight.double() + toy_format.SCALE * (a.double() @ b.double()).T
    torch.testing.assert_close(stored(tmp_path / "out")[f"{MODULE}.weight"].double(), exact, rtol=3e-7, atol=1e-6)
    assert shardmerge.verify(tmp_path / "out", rows=None).ok
