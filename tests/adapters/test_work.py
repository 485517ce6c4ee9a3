"""What only copies is not computed, whatever the compute dtype is; and what the plan lists is done, or nothing is.

Most plans here are made by hand: a tensor of the base gets updates of any place, with tensors of the base as factors.
So every geometry can be had, and the expected numbers are formulas.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmerge
from shardmerge import FormatError, NonFiniteError, PlanError, ShardmergeError, VerifyError
from shardmerge.adapters.methods.base import Family
from shardmerge.adapters.methods.whole import TokenSettings
from shardmerge.adapters.registry import FAMILIES
from shardmerge.adapters.work import elements_for, is_computed_everywhere, narrow_dtype, needs_work, tile_dtype
from shardmerge.execution import jobs
from shardmerge.planning import layout, tiling
from shardmerge.planning.tiling import tile_all
from shardmerge.spec.plans import MergePlan, TensorPlan
from shardmerge.spec.tensors import Orientation, RowRange, TensorRef, dtype_code
from shardmerge.spec.updates import Region, Update
from shardmerge.spec.windows import Position, locate
from tests.support.builders import update_of
from tests.support.gguf_zoo import make as make_for_gguf
from tests.support.peft_oracle import (
    bits,
    make_config,
    merge_to,
    nearest_even,
    random,
    stored,
    write_adapter,
    write_base,
)
from tests.support.zoo import adapter_folder, base_folder, lora

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
KINDS = {"float32": F32, "float64": F64, "bfloat16": BF16, "float16": F16}
OUTPUTS = ("float32", "float16", "bfloat16")
INFINITY, NAN = math.inf, math.nan


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """One rounding, by an oracle of its own for 16 bits."""
    if value.dtype == dtype:
        return value
    return value.to(F32) if dtype == F32 else nearest_even(value.double(), dtype)


# --- plans by hand ----------------------------------------------------------------------------------------------------


def planned(
    folder: Path,
    tensors: Mapping[str, Tensor],
    updates: Callable[[Mapping[str, TensorRef]], Sequence[Update]],
    **options: Any,
) -> MergePlan:
    """A plan in which the tensor ``w`` of the base has ``updates``, whose factors are other tensors of the base."""
    base = write_base(folder / "base", [{"x.weight": torch.ones(2, 2), **tensors}])
    ones = write_adapter(folder / "adapter", {"x": (torch.ones(1, 2), torch.ones(2, 1))})
    config = make_config(folder / "out", base, [ones], **options)
    config["output"] |= {key: options[key] for key in ("rounding",) if key in options}
    plan = shardmerge.plan(config)
    refs = {tensor.source.name: tensor.source for shard in plan.shards for tensor in shard.tensors}

    def changed(tensor: TensorPlan) -> TensorPlan:
        return dataclasses.replace(tensor, updates=tuple(updates(refs))) if tensor.source.name == "w" else tensor

    shards = [dataclasses.replace(shard, tensors=tuple(map(changed, shard.tensors))) for shard in plan.shards]
    tiled, memory = tile_all(shards, dtype_code(plan.compute_dtype), options.get("memory"))
    return dataclasses.replace(plan, shards=tiled, memory=memory)


def merged(plan: MergePlan) -> Tensor:
    shardmerge.merge(plan)
    return stored(Path(plan.output))["w"]


@dataclass(frozen=True)
class Scene:
    """A tensor and what is done to it: ``copied`` says which elements are only copied, and what they are."""

    shape: tuple[int, ...]
    factors: Mapping[str, Tensor]
    updates: Callable[[Mapping[str, TensorRef]], Sequence[Update]]
    copied: Callable[[Tensor, Mapping[str, Tensor]], tuple[Tensor, Tensor]]
    wide: torch.dtype = F32


RANK = 3
A, B = random(RANK, 48, seed=1), random(64, RANK, seed=2)


def _lora(refs: Mapping[str, TensorRef], shape: tuple[int, ...], **changes: Any) -> Update:
    return update_of("w", shape, (("A", refs["a"]), ("B", refs["b"])), rank=RANK, **changes)


def _outside(where: tuple[slice, ...]) -> Callable[[Tensor, Mapping[str, Tensor]], tuple[Tensor, Tensor]]:
    """All of W but a part."""

    def copied(w: Tensor, factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        mask = torch.ones(w.shape, dtype=torch.bool)
        mask[where] = False
        return mask, w

    return copied


def _of_rows(name: str, rows: slice | list[int]) -> Callable[[Tensor, Mapping[str, Tensor]], tuple[Tensor, Tensor]]:
    """Rows that are a factor's."""

    def copied(w: Tensor, factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        mask = torch.zeros(w.shape, dtype=torch.bool)
        mask[rows] = True
        values = w.double().clone()
        values[rows] = factors[name].double()
        return mask, values

    return copied


def _everything_of(name: str, rows: slice) -> Callable[[Tensor, Mapping[str, Tensor]], tuple[Tensor, Tensor]]:
    def copied(w: Tensor, factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        _, values = _of_rows(name, rows)(w, factors)
        return torch.ones(w.shape, dtype=torch.bool), values

    return copied


TOKENS = [3, 17, 40]
_TOKENS_AFTER = TokenSettings(tuple(TOKENS), for_both_sides=False)
SCENES: Mapping[str, Scene] = {
    "rows-of-a-larger-tensor": Scene(
        (64, 48),
        {"a": A, "b": random(20, RANK, seed=3)},
        lambda refs: [_lora(refs, (20, 48), region=Region("w", 20, stored_start=21))],
        _outside((slice(21, 41),)),
    ),
    "columns-of-a-transposed-tensor": Scene(
        (64, 48),
        {"a": random(RANK, 64, seed=4), "b": random(16, RANK, seed=5)},
        lambda refs: [
            _lora(refs, (16, 64), region=Region("w", 16, stored_start=9, orientation=Orientation.TRANSPOSED))
        ],
        _outside((slice(None), slice(9, 25))),
    ),
    "one-expert-of-a-stack": Scene(
        (4, 24, 48),
        {"a": A, "b": random(24, RANK, seed=6)},
        lambda refs: [_lora(refs, (24, 48), region=Region("w", 24, expert=2))],
        _outside((slice(2, 3),)),
    ),
    "a-part-overwritten": Scene(
        (64, 48),
        {"whole": random(20, 48, seed=7)},
        lambda refs: [
            update_of(
                "w", (20, 48), (("whole", refs["whole"]),), family="overwrite", region=Region("w", 20, stored_start=21)
            )
        ],
        _everything_of("whole", slice(21, 41)),
    ),
    "a-part-overwritten-and-another-computed": Scene(
        (64, 48),
        {"whole": random(20, 48, seed=7), "a": A, "b": random(20, RANK, seed=3)},
        lambda refs: [
            _lora(refs, (20, 48), region=Region("w", 20, stored_start=41)),
            update_of(
                "w", (20, 48), (("whole", refs["whole"]),), family="overwrite", region=Region("w", 20, stored_start=21)
            ),
        ],
        lambda w, factors: (
            _outside((slice(41, 61),))(w, factors)[0],
            _of_rows("whole", slice(21, 41))(w, factors)[1],
        ),
    ),
    "tokens": Scene(
        (64, 48),
        {"rows": random(3, 48, seed=8)},
        lambda refs: [update_of("w", (64, 48), (("rows", refs["rows"]),), family="token-rows", settings=_TOKENS_AFTER)],
        lambda w, factors: (torch.ones(w.shape, dtype=torch.bool), _of_rows("rows", TOKENS)(w, factors)[1]),
    ),
    "tokens-after-lora-of-another-adapter": Scene(
        (64, 48),
        {"a": A, "b": B, "rows": random(3, 48, seed=8)},
        lambda refs: [
            _lora(refs, (64, 48)),
            update_of("w", (64, 48), (("rows", refs["rows"]),), family="token-rows", adapter=0, settings=_TOKENS_AFTER),
        ],
        _of_rows("rows", TOKENS),
    ),
}


def _combinations() -> list[Any]:
    """Every scene in bfloat16 to float32, and float64 to 16 bits by way of float32, quickly; the rest slowly."""
    every = itertools.product(SCENES, [(F32, F32), (F16, F64), (F32, F64)], ("bfloat16", "float32", "float64"), OUTPUTS)
    quick = {(F32, "bfloat16", "float32"), (F64, "float32", "bfloat16")}
    return [
        pytest.param(*one, marks=[] if (one[1][1], *one[2:]) in quick else [pytest.mark.slow], id=str(one))
        for one in every
    ]


@pytest.mark.parametrize(("scene", "dtypes", "compute", "out"), _combinations())
def test_what_is_copied_is_rounded_once(
    scene: str, dtypes: tuple[torch.dtype, torch.dtype], compute: str, out: str, tmp_path: Path
) -> None:
    """From the dtype in which it is stored to the output's, also beside what is computed in fewer bits."""
    what = SCENES[scene]
    w = random(*what.shape, seed=9, dtype=dtypes[0])
    factors = {name: of.to(dtypes[1]) if dtypes[1] != F64 else _in_float64(of) for name, of in what.factors.items()}
    plan = planned(tmp_path, {"w": w, **factors}, what.updates, dtype=out, compute=compute)
    found = merged(plan)
    mask, values = what.copied(w, factors)
    # Neither oracle goes by way of another dtype: the numbers are float64 with as many bits as they had.
    assert bits(found[mask]) == bits(rounded(values, KINDS[out])[mask])
    if not mask.all():
        assert not torch.equal(found[~mask].double(), w[~mask].double())


def _in_float64(value: Tensor) -> Tensor:
    """Numbers that two roundings, by way of float32, round elsewhere than one: just above a tie of 16 bits."""
    tie = value.to(BF16).double() * (1 + 2.0**-8)
    return tie * (1 + 2.0**-40)


@pytest.mark.parametrize("scene", ["rows-of-a-larger-tensor", "one-expert-of-a-stack"])
def test_what_is_computed_beside_it_has_the_bits_of_the_compute_dtype(scene: str, tmp_path: Path) -> None:
    """W and the factors in bfloat16, their product rounded to bfloat16, and the sum."""
    what = SCENES[scene]
    w = random(*what.shape, seed=9)
    found = merged(planned(tmp_path, {"w": w, **what.factors}, what.updates, compute="bfloat16"))
    mask, _ = what.copied(w, what.factors)
    narrow = {name: factor.to(BF16) for name, factor in what.factors.items()}
    expected = w[~mask].to(BF16) + (narrow["b"] @ narrow["a"]).flatten()
    assert torch.equal(found[~mask], expected.to(F32))


@pytest.mark.parametrize("memory", [None, 1])
@pytest.mark.parametrize("scene", SCENES)
def test_tiles_do_not_show(scene: str, memory: int | None, tmp_path: Path) -> None:
    what = SCENES[scene]
    w = random(*what.shape, seed=9).repeat(*(40 if at == len(what.shape) - 2 else 1 for at in range(len(what.shape))))
    if scene.startswith(("columns", "one-expert", "tokens-after")):
        w = random(*what.shape, seed=9)  # whose factors have as many rows
    plan = planned(
        tmp_path, {"w": w, **what.factors}, _in_place(what, w), compute="bfloat16", memory=memory, dtype="float32"
    )
    found = merged(plan)
    mask, values = what.copied(w, what.factors)
    assert torch.equal(found[mask], values.to(F32)[mask])


def _in_place(what: Scene, w: Tensor) -> Callable[[Mapping[str, TensorRef]], Sequence[Update]]:
    """The scene's updates, of a tensor that may have more rows."""

    def updates(refs: Mapping[str, TensorRef]) -> Sequence[Update]:
        made = what.updates(refs)
        if w.shape == what.shape:
            return made
        return [
            dataclasses.replace(update, shape=tuple(w.shape), region=Region("w", w.shape[0]))
            if update.shape == what.shape
            else update
            for update in made
        ]

    return updates


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
def test_a_frozen_copy_is_compared_as_it_is_stored(compute: str, tmp_path: Path) -> None:
    """Also beside LoRA in bfloat16, in which the difference would not show."""
    w = random(64, 48, seed=9)

    def updates(refs: Mapping[str, TensorRef]) -> list[Update]:
        return [update_of("w", (64, 48), (("copy", refs["copy"]),), family="frozen-copy"), _lora(refs, (64, 48))]

    same = planned(tmp_path / "same", {"w": w, "copy": w, "a": A, "b": B}, updates, compute=compute)
    assert not torch.equal(merged(same), w)
    other = planned(tmp_path / "other", {"w": w, "copy": w * (1 + 1e-5), "a": A, "b": B}, updates, compute=compute)
    with pytest.raises(FormatError, match="trained on another base"):
        shardmerge.merge(other)


def test_what_is_all_computed_needs_no_wider_tile() -> None:
    """So that the ordinary case takes no more memory than it did."""
    refs = {name: TensorRef(name, "/f", "F32", shape, 0, 4) for name, shape in (("w", (64, 48)), ("a", (3, 48)))}
    refs["b"] = TensorRef("b", "/f", "F32", (64, 3), 0, 4)
    from shardmerge.spec.tensors import TensorInfo

    tensor = TensorPlan(refs["w"], TensorInfo("F32", (64, 48), (0, 64 * 48 * 4)), (_lora(refs, (64, 48)),))
    assert is_computed_everywhere(tensor)
    assert (tile_dtype(tensor, "BF16"), narrow_dtype(tensor, "BF16")) == ("BF16", None)
    halves = tuple(_lora(refs, (32, 48), region=Region("w", 32, stored_start=start)) for start in (0, 32))
    assert is_computed_everywhere(dataclasses.replace(tensor, updates=halves))
    part = dataclasses.replace(tensor, updates=halves[:1])
    assert (tile_dtype(part, "BF16"), narrow_dtype(part, "BF16")) == ("F32", "BF16")
    assert (tile_dtype(part, "F32"), narrow_dtype(part, "F32")) == ("F32", None)


def test_every_family_says_whether_it_computes() -> None:
    """All but those that put stored numbers in place of others, or compare them."""
    copying = {name for name, family in FAMILIES.items() if not family.computes}
    assert copying == {"replacement", "overwrite", "token-rows", "frozen-copy"}
    assert {name for name, family in FAMILIES.items() if family.is_source} == {"replacement"}


# --- real adapters, and `verify` --------------------------------------------------------------------------------------


def _verified(output: Path) -> None:
    shardmerge.verify(str(output), rows=None).raise_for_status()


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("stored_as", [F64, F32, F16, BF16], ids=str)
@pytest.mark.parametrize(
    "compute", ["bfloat16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("float32", "float64"))]
)
def test_a_saved_head_is_the_adapters(compute: str, stored_as: torch.dtype, out: str, tmp_path: Path) -> None:
    head = _in_float64(random(30, 24, seed=1)) if stored_as == F64 else random(30, 24, seed=1, dtype=stored_as)
    tensors = {"lm_head.weight": random(30, 24, seed=2), "q.weight": random(24, 24, seed=3)}
    base = write_base(tmp_path / "base", [tensors])
    adapter = write_adapter(tmp_path / "adapter", {"q": (random(2, 24, seed=4), random(24, 2, seed=5))})
    _add(adapter, {"base_model.model.lm_head.weight": head}, modules_to_save=["lm_head"])
    merge_to(tmp_path / "out", base, adapter, dtype=out, compute=compute)
    assert bits(stored(tmp_path / "out")["lm_head.weight"]) == bits(rounded(head, KINDS[out]))
    _verified(tmp_path / "out")


def _add(adapter: Path, tensors: Mapping[str, Tensor], **settings: Any) -> None:
    import json

    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    save_file({**load_file(file), **tensors}, file)
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))


@pytest.mark.parametrize("compute", ["bfloat16", "float32", "float64"])
def test_rows_that_no_module_of_the_adapter_has_stay(compute: str, tmp_path: Path) -> None:
    """nomic-bert stores q, k and v as one tensor; here LoRA is on q, and k is saved whole."""
    base = base_folder("nomic-bert")
    adapter = adapter_folder("nomic-bert", lora("q_proj", modules_to_save=["k_proj"]))
    merge_to(tmp_path / "out", base, adapter, compute=compute)
    before, after, of = stored(base), stored(tmp_path / "out"), stored(adapter)
    names = [name for name in before if "Wqkv" in name and name.endswith("weight")]
    for name in names:
        size = len(before[name]) // 3
        assert torch.equal(after[name][2 * size :], before[name][2 * size :])
        assert not torch.equal(after[name][:size], before[name][:size])
        layer = name.split(".")[2]
        (key,) = (key for key in of if "k_proj" in key and f".{layer}." in key and key.endswith("weight"))
        assert torch.equal(after[name][size : 2 * size], of[key])
    assert names
    _verified(tmp_path / "out")


def test_rounding_by_chance_from_float64_to_float32(tmp_path: Path) -> None:
    """To either neighbour of the exact sum, both of which occur; the same again with the same seed; and `verify`."""
    w, a, b = random(64, 48, seed=1), random(2, 48, seed=2), random(64, 2, seed=3)
    base = write_base(tmp_path / "base", [{"w.weight": w}])
    adapter = write_adapter(tmp_path / "adapter", {"w": (a, b)}, alpha=2)
    for name in ("one", "two"):
        config = make_config(tmp_path / name, base, [adapter], compute="float64")
        config["output"] |= {"rounding": "stochastic", "seed": 5}
        shardmerge.merge(config)
    found = stored(tmp_path / "one")["w.weight"]
    exact = w.double() + b.double() @ a.double()
    near = exact.to(F32)
    other = torch.nextafter(near, torch.where(exact > near.double(), INFINITY, -INFINITY).to(F32))
    assert bool(((found == near) | (found == other)).all())
    assert bool((found == near).any()) and bool((found == other).any())
    assert torch.equal(found, stored(tmp_path / "two")["w.weight"])
    _verified(tmp_path / "one")


# --- what the plan lists is done --------------------------------------------------------------------------------------


def _is_not_there(output: Path) -> bool:
    return not list(output.glob("*.safetensors")) and not list(output.glob("*.gguf"))


def _stops(plan: MergePlan | dict[str, Any]) -> str:
    with pytest.raises(ShardmergeError) as caught:
        shardmerge.merge(plan)
    assert caught.value.exit_code == 1, caught.value
    assert _is_not_there(Path(plan.output if isinstance(plan, MergePlan) else plan["output"]["path"]))
    return str(caught.value)


def _ordinary(folder: Path, **tensors: Tensor) -> dict[str, Any]:
    """A config: LoRA on a weight, and a bias that is saved whole."""
    base = write_base(folder / "base", [{"w.weight": random(40, 24, seed=1), "n.bias": random(24, seed=2), **tensors}])
    adapter = write_adapter(folder / "adapter", {"w": (random(2, 24, seed=3), random(40, 2, seed=4))})
    _add(adapter, {"base_model.model.n.bias": random(24, seed=5)}, modules_to_save=["n"])
    return make_config(folder / "out", base, [adapter])


def test_without_a_broken_guard_it_is_merged(tmp_path: Path) -> None:
    shardmerge.merge(_ordinary(tmp_path))


def test_a_tensor_that_the_tiling_forgets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It would travel as bytes, with an update in the record."""
    monkeypatch.setattr(tiling, "needs_work", lambda tensor: False)
    said = _stops(_ordinary(tmp_path))
    assert "w.weight: the plan has lora of w for 960 of its 960 elements, and 0 were given to it" in said


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.int32], ids=str)
def test_a_dtype_that_the_matching_lets_through(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weight = torch.ones(40, 24).to(dtype)
    with pytest.raises(PlanError, match=r"w\.weight.* is stored as"):
        shardmerge.plan(_ordinary(tmp_path / "refused", **{"w.weight": weight}))
    everything = frozenset({"F8_E4M3", "U8", "I32", "F32"})
    monkeypatch.setattr(Family, "weights", everything)
    assert "which cannot be worked on" in _stops(_ordinary(tmp_path / "stopped", **{"w.weight": weight}))


def test_a_replacement_that_is_not_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(layout, "_replaced", lambda updates: {})
    assert "n.bias: the plan has replacement of n" in _stops(_ordinary(tmp_path))


def test_a_tile_that_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = itertools.count()

    def elsewhere(tensor: TensorPlan, update: Update, rows: RowRange) -> Position | None:
        passed_over = update.family == "lora" and next(seen) == 0
        return None if passed_over else locate(tensor, update, rows)

    monkeypatch.setattr(jobs, "locate", elsewhere)
    assert "0 were given to it" in _stops(_ordinary(tmp_path))


@pytest.mark.parametrize("scene", [name for name in SCENES if "tokens" not in name and "another" not in name])
def test_a_window_that_never_meets_a_tile(scene: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where tiles do not end where an update's place begins, or its expert is passed over."""
    what = SCENES[scene]
    tensors = {"w": random(*what.shape, seed=9), **what.factors}
    merged(planned(tmp_path / "right", tensors, what.updates))
    plan = planned(tmp_path / "wrong", tensors, what.updates)

    if scene.startswith(("columns", "one-expert")):
        monkeypatch.setattr(jobs, "reaching", lambda tensor: lambda rows: ())

    def all_in_one(tensor: TensorPlan) -> TensorPlan:
        return dataclasses.replace(tensor, segments=(), tiles=1) if tensor.source.name == "w" else tensor

    wrong = [dataclasses.replace(shard, tensors=tuple(map(all_in_one, shard.tensors))) for shard in plan.shards]
    memory = dataclasses.replace(plan.memory, workspace_bytes=1 << 20)  # tiles are larger now
    assert "were given to it" in _stops(dataclasses.replace(plan, shards=tuple(wrong), memory=memory))


@pytest.mark.parametrize("guard", ["needs_work", "locate"])
@pytest.mark.parametrize("kind", ["llama3-rope", "mixtral", "gemma2"])
def test_a_gguf_file_in_which_an_update_is_lost(
    kind: str, guard: str, smollm2: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Heads that are turned, experts that are stacked, and norms that 1 is added to."""
    base = make_for_gguf(kind, tmp_path / "base", smollm2)
    weights = {name: weight for name, weight in stored(base).items() if name.endswith(("q_proj.weight", ".w1.weight"))}
    factors = {
        name.removesuffix(".weight"): (random(2, weight.shape[1], seed=1), random(weight.shape[0], 2, seed=2))
        for name, weight in weights.items()
    }
    config = make_config(tmp_path / "out", base, [write_adapter(tmp_path / "adapter", factors)])
    config["output"] |= {"format": "gguf", "quantization": "f32"}
    plan = shardmerge.plan(config)
    lost = next(update for _, update in plan.updates())

    def passed_over(tensor: TensorPlan, update: Update, rows: RowRange) -> Position | None:
        return None if update == lost else locate(tensor, update, rows)

    if guard == "locate":
        monkeypatch.setattr(jobs, "locate", passed_over)
    else:
        shards = [
            dataclasses.replace(
                shard,
                tensors=tuple(
                    dataclasses.replace(of, tiles=0, segments=()) if lost in of.updates else of for of in shard.tensors
                ),
            )
            for shard in plan.shards
        ]
        plan = dataclasses.replace(plan, shards=tuple(shards))
    with pytest.raises((ShardmergeError, AssertionError)) as caught:  # the writer counts bytes, too
        shardmerge.merge(plan)
    assert _is_not_there(tmp_path / "out")
    assert guard != "locate" or f"the plan has lora of {lost.module}" in str(caught.value)


def test_what_is_expected_is_what_tiles_give() -> None:
    """The plan's own count against the parts of all tiles, for every scene and for parts of its rows."""
    from shardmerge.planning.tiling import tile_counts
    from shardmerge.spec.tensors import TensorInfo

    for name, what in SCENES.items():
        refs = {key: TensorRef(key, "/f", "F32", tuple(of.shape), 0, of.nbytes) for key, of in what.factors.items()}
        w = TensorRef("w", "/f", "F32", what.shape, 1 << 20, math.prod(what.shape) * 4)
        rows = math.prod(what.shape[:-1])
        for part in (None, RowRange(0, rows // 2), RowRange(rows // 2, rows)):
            tensor = TensorPlan(w, TensorInfo("F32", what.shape, (0, w.nbytes)), tuple(what.updates(refs)), part=part)
            tensor = dataclasses.replace(tensor, segments=tile_counts(tensor, 1 << 12))
            assert needs_work(tensor)
            for update in tensor.updates:
                parts = [(len(tile), locate(tensor, update, tile)) for tile in tensor.ranges()]
                given = sum(count * len(found.columns) for count, found in parts if found is not None)
                assert given == elements_for(tensor, update), name


# --- infinities -------------------------------------------------------------------------------------------------------


def _with_head(folder: Path, base_head: Tensor, saved: Tensor, **options: Any) -> Tensor:
    """``head.bias``, or whatever shape it has, merged from an adapter that saved it whole; verified."""
    base = write_base(folder / "base", [{"head.bias": base_head, "q.weight": random(24, 24, seed=3)}])
    adapter = write_adapter(folder / "adapter", {"q": (random(2, 24, seed=4), random(24, 2, seed=5))})
    _add(adapter, {"base_model.model.head.bias": saved}, modules_to_save=["head"])
    merge_to(folder / "out", base, adapter, **options)
    _verified(folder / "out")
    return stored(folder / "out")["head.bias"]


def _put(tensor: Tensor, at: tuple[int, ...], value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(40,), (40, 24)], ids=str)
def test_an_infinity_that_the_base_holds_there_stays(
    shape: tuple[int, ...], compute: str, out: str, tmp_path: Path
) -> None:
    regions: list[tuple[tuple[int, ...], float]] = [((3, *shape[1:2]), -INFINITY), ((39, *shape[1:2]), INFINITY)]
    at = [tuple(min(index, size - 1) for index, size in zip(region, shape, strict=True)) for region, _ in regions]
    base, saved = random(*shape, seed=1, dtype=BF16), random(*shape, seed=2)
    for where, (_, value) in zip(at, regions, strict=True):
        base, saved = _put(base, where, value), _put(saved, where, value)
    found = _with_head(tmp_path, base, saved, dtype=out, compute=compute)
    assert torch.equal(found, saved.to(KINDS[out]))


@pytest.mark.parametrize(
    ("in_base", "saved"),
    [(1.0, INFINITY), (-INFINITY, INFINITY), (NAN, INFINITY), (NAN, NAN), (INFINITY, NAN), (1.0, NAN)],
    ids=str,
)
def test_an_infinity_that_is_new_and_what_is_no_number_are_refused(
    in_base: float, saved: float, tmp_path: Path
) -> None:
    base, whole = _put(random(40, seed=1), (7,), in_base), _put(random(40, seed=2), (7,), saved)
    with pytest.raises(NonFiniteError, match=rf"head\.bias, row 7, column 0: the adapter's own tensor holds {saved}"):
        _with_head(tmp_path, base, whole)
    assert _is_not_there(tmp_path / "out")


def test_an_infinity_in_a_row_beyond_the_bases_is_new(tmp_path: Path) -> None:
    """A resized vocabulary has rows that the base has not."""
    tensors = {"model.embed_tokens.weight": random(20, 8, seed=1), "lm_head.weight": random(20, 8, seed=2)}
    base = write_base(tmp_path / "base", [{**tensors, "q.weight": random(8, 8, seed=3)}], vocab_size=20)
    adapter = write_adapter(tmp_path / "adapter", {"q": (random(2, 8, seed=4), random(8, 2, seed=5))})
    grown = {f"base_model.model.{name}": random(24, 8, seed=6) for name in tensors}
    grown["base_model.model.lm_head.weight"] = _put(grown["base_model.model.lm_head.weight"], (22, 1), -INFINITY)
    _add(adapter, grown, modules_to_save=["embed_tokens", "lm_head"])
    with pytest.raises(NonFiniteError, match=r"lm_head\.weight, row 22, column 1: the adapter's own tensor holds -inf"):
        merge_to(tmp_path / "out", base, adapter)


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
@pytest.mark.parametrize("scene", SCENES)
def test_an_infinity_that_no_update_works_out_stays(scene: str, compute: str, tmp_path: Path) -> None:
    """One where nothing is done, or the same one is put; where something is computed of it, it stops the merge."""
    what = SCENES[scene]
    w = random(*what.shape, seed=9)
    mask, values = what.copied(w, what.factors)
    free = [tuple(at) for at in (mask & (values == w)).nonzero().tolist()]
    if free:
        masked = _put(w, free[len(free) // 2], -INFINITY)
        found = merged(planned(tmp_path / "free", {"w": masked, **what.factors}, what.updates, compute=compute))
        assert torch.equal(torch.isinf(found), torch.isinf(masked))
    if not mask.all():
        worked = _put(w, tuple((~mask).nonzero().tolist()[5]), INFINITY)
        plan = planned(tmp_path / "worked", {"w": worked, **what.factors}, what.updates, compute=compute)
        with pytest.raises(NonFiniteError, match="the base itself holds inf there"):
            shardmerge.merge(plan)
    wrong = _put(w, free[0], NAN) if free else w
    if free:
        with pytest.raises(NonFiniteError, match="the base itself holds nan there"):
            shardmerge.merge(planned(tmp_path / "nan", {"w": wrong, **what.factors}, what.updates, compute=compute))


@pytest.mark.parametrize("name", ["a-part-overwritten", "tokens"])
def test_an_infinity_that_is_put_where_the_base_has_it(name: str, tmp_path: Path) -> None:
    what = SCENES[name]
    (key,) = what.factors
    row = 21 if name == "a-part-overwritten" else TOKENS[0]
    factor = _put(what.factors[key], (0, 4), -INFINITY)
    w = random(*what.shape, seed=9)
    found = merged(planned(tmp_path / "same", {"w": _put(w, (row, 4), -INFINITY), key: factor}, what.updates))
    assert torch.equal(found[row], factor[0])
    with pytest.raises(NonFiniteError, match=rf"w, row {row}, column 4: the merged value is -inf"):
        shardmerge.merge(planned(tmp_path / "new", {"w": w, key: factor}, what.updates))
    with pytest.raises(NonFiniteError, match="holds nan"):
        nan = _put(what.factors[key], (0, 4), NAN)
        shardmerge.merge(planned(tmp_path / "nan", {"w": w, key: nan}, what.updates))


def test_verify_finds_an_infinity_that_neither_has(tmp_path: Path) -> None:
    """In a row of a touched tensor that no module of the adapter has, and that is not among the sampled ones."""
    from safetensors.torch import load_file, save_file

    base = base_folder("nomic-bert")
    merge_to(tmp_path / "out", base, adapter_folder("nomic-bert", lora("q_proj")))
    (file,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if "Wqkv" in name and name.endswith("weight"))
    tensors[name][-2, 1] = INFINITY
    save_file(tensors, file)
    with pytest.raises(VerifyError, match="row 118, column 1: holds inf"):
        shardmerge.verify(str(tmp_path / "out")).raise_for_status()


def test_what_a_gguf_file_cannot_hold_is_told(smollm2: Path, tmp_path: Path) -> None:
    """A scale of Q8_0 is a float16."""
    base = make_for_gguf("llama3-rope", tmp_path / "base", smollm2)
    huge = torch.full((1, 64), 1e6), torch.full((80, 1), 1e6)
    adapter = write_adapter(tmp_path / "adapter", {"model.layers.0.mlp.up_proj": huge})
    config = make_config(tmp_path / "out", base, [adapter])
    config["output"] |= {"format": "gguf", "quantization": "q8_0"}
    with pytest.raises(NonFiniteError, match=r"more than float32 in Q8_0 can hold.*output\.quantization may hold it"):
        shardmerge.merge(config)
    assert _is_not_there(tmp_path / "out")
