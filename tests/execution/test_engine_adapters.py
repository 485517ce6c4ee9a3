"""Every form of an adapter gives the same bytes; several adapters are rounded once; frozen copies are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import shardmerge
from shardmerge import FormatError
from tests.support.peft_oracle import (
    Base,
    Lora,
    adapter_folder,
    assert_same_bits,
    base_folder,
    least_memory,
    make_config,
    merge_to,
    merge_with_peft,
    oracle,
    random,
    stored,
    weight_bytes,
    write_adapter,
    write_base,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODEL = Base("bfloat16", hidden=186, intermediate=333, heads=3, kv_heads=3, max_shard_size=200_000)
LORA = Lora(6, alpha=7.3)
Factors = dict[str, tuple[Tensor, Tensor]]

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def factors(folder: Path) -> Factors:
    """Module → (A, B), from a file that PEFT wrote."""
    tensors = load_file(folder / "adapter_model.safetensors")
    suffix = ".lora_A.weight"
    names = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    return {
        name.removeprefix("base_model.model."): (tensors[name + suffix], tensors[name + ".lora_B.weight"])
        for name in names
    }


# --- forms ------------------------------------------------------------------------------------------------------------


def _strided(tensor: Tensor) -> Tensor:
    """The same values, as a view into a storage that is transposed and has more in it."""
    wide = torch.zeros(tensor.shape[1] + 3, tensor.shape[0] + 2, dtype=tensor.dtype)
    wide[2:-1, 1:-1] = tensor.T
    return wide[2:-1, 1:-1].T


@pytest.mark.parametrize("memory", ["least", "auto"])
@pytest.mark.parametrize("layout", ["dense", "strided", "one-storage"])
def test_a_pickled_adapter_gives_the_same_bytes(layout: str, memory: str, tmp_path: Path) -> None:
    base, plain = base_folder(MODEL), adapter_folder(MODEL, LORA)
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((plain / "adapter_config.json").read_bytes())
    tensors = load_file(plain / "adapter_model.safetensors")
    if layout == "strided":
        tensors = {name: _strided(tensor) for name, tensor in tensors.items()}
    if layout == "one-storage":
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
        pieces = torch.split(flat, [tensor.numel() for tensor in tensors.values()])
        tensors = {name: piece.view(tensors[name].shape) for name, piece in zip(tensors, pieces, strict=True)}
    torch.save(tensors, folder / "adapter_model.bin")
    config = make_config(tmp_path / "none", base, [folder])
    merge_to(tmp_path / "pickle", base, folder, max_memory=least_memory(config) if memory == "least" else "auto")
    assert_same_bits(stored(tmp_path / "pickle"), oracle(MODEL, LORA))
    merge_to(tmp_path / "safetensors", base, plain)
    assert weight_bytes(tmp_path / "pickle") == weight_bytes(tmp_path / "safetensors")


@pytest.mark.parametrize("memory", ["least", "auto"])
@pytest.mark.parametrize("rank", [1, 6])
@each_dtype
def test_a_pure_pytorch_adapter_gives_the_same_bytes(dtype: str, rank: int, memory: str, tmp_path: Path) -> None:
    lora = Lora(rank, alpha=7.3, dtype=dtype)
    base, plain = base_folder(MODEL), adapter_folder(MODEL, lora)
    flat: dict[str, Tensor] = {}
    for module, (a, b) in factors(plain).items():
        flat |= {f"{module}.A": a.T.contiguous(), f"{module}.B": b.T.contiguous()}
    torch.save(flat, tmp_path / "lora.pt")
    entry = {"path": str(tmp_path / "lora.pt"), "alpha": 7.3}
    config = make_config(tmp_path / "none", base, [entry])
    merge_to(tmp_path / "out", base, entry, max_memory=least_memory(config) if memory == "least" else "auto")
    assert_same_bits(stored(tmp_path / "out"), oracle(MODEL, lora))


# --- several adapters -------------------------------------------------------------------------------------------------


def _summed(base: Mapping[str, Tensor], adapters: Sequence[Factors], scales: Sequence[float], wide: torch.dtype) -> Any:
    """W + s₁ B₁A₁ + s₂ B₂A₂ + …, in ``wide`` and in this order."""
    result = {name: tensor.to(wide) for name, tensor in base.items()}
    for modules, scale in zip(adapters, scales, strict=True):
        for module, (a, b) in modules.items():
            name = f"{module}.weight"
            result[name] = result[name] + (b.to(wide) @ a.to(wide)) * scale
    return result


LORAS = (
    Lora(6, alpha=7.3, seed=1),
    Lora(17, alpha=11.0, rslora=True, dtype="bfloat16", seed=2),
    Lora(3, alpha=2.9, targets=("q_proj", "down_proj"), dtype="float16", seed=3),
)
WEIGHTS = (0.7, -0.3, 1.1)
SCALES = (7.3 / 6 * 0.7, 11.0 / 17**0.5 * -0.3, 2.9 / 3 * 1.1)


@pytest.mark.parametrize("memory", ["least", "auto"])
@each_dtype
def test_several_adapters_are_added_in_order_and_rounded_once(dtype: str, memory: str, tmp_path: Path) -> None:
    model = Base(dtype, hidden=186, intermediate=333, heads=3, kv_heads=3)
    base = base_folder(model)
    entries = [
        {"path": str(adapter_folder(model, lora)), "weight": weight}
        for lora, weight in zip(LORAS, WEIGHTS, strict=True)
    ]
    config = make_config(tmp_path / "none", base, entries)
    merge_to(tmp_path / "out", base, *entries, max_memory=least_memory(config) if memory == "least" else "auto")
    modules = [factors(adapter_folder(model, lora)) for lora in LORAS]
    summed = _summed(stored(base), modules, SCALES, torch.float32)
    assert_same_bits(
        stored(tmp_path / "out"), {name: tensor.to(stored(base)[name].dtype) for name, tensor in summed.items()}
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_several_adapters_are_closer_to_the_exact_sum_than_peft(dtype: str, tmp_path: Path) -> None:
    model = Base(dtype, layers=2)
    base = base_folder(model)
    folders = [adapter_folder(model, lora) for lora in LORAS]
    merge_to(tmp_path / "out", base, *folders)
    state = merge_with_peft(base, *folders).state_dict()
    ours, before = stored(tmp_path / "out"), stored(base)
    scales = (7.3 / 6, 11.0 / 17**0.5, 2.9 / 3)
    exact = _summed(before, [factors(folder) for folder in folders], scales, torch.float64)
    errors: dict[str, list[float]] = {"ours": [], "peft": []}
    for name, wanted in exact.items():
        delta = (wanted - before[name].double()).norm()
        if float(delta) == 0:
            continue
        for whose, found in (("ours", ours), ("peft", state)):
            errors[whose].append(float((found[name].double() - wanted).norm() / delta))
    assert len(errors["ours"]) == 14
    assert all(mine <= theirs for mine, theirs in zip(errors["ours"], errors["peft"], strict=True))
    assert sum(errors["ours"]) < sum(errors["peft"])


def test_one_adapter_twice_with_opposite_weights_gives_back_the_base(tmp_path: Path) -> None:
    # In float32 a sum and its undoing can differ in the last bit; stored as bfloat16 nothing of that is left.
    base, adapter = base_folder(MODEL), str(adapter_folder(MODEL, LORA))
    merge_to(tmp_path / "out", base, {"path": adapter, "weight": 0.5}, {"path": adapter, "weight": -0.5})
    assert_same_bits(stored(tmp_path / "out"), stored(base))


# --- adapters that change nothing -------------------------------------------------------------------------------------

TARGET = "model.layers.0.mlp.down_proj"
W = random(40, 24, seed=1)
A = random(3, 24, seed=2)


def test_an_adapter_whose_b_is_zero_is_a_warning(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{f"{TARGET}.weight": W}])
    adapter = write_adapter(tmp_path / "adapter", {TARGET: (A, torch.zeros(40, 3))})
    plan = shardmerge.plan(make_config(tmp_path / "out", base, [adapter]))
    report = shardmerge.merge(plan)
    new = report.warnings[len(plan.warnings) :]
    assert len(new) == 1 and str(adapter) in new[0] and "changes nothing" in new[0]
    assert torch.equal(stored(tmp_path / "out")[f"{TARGET}.weight"], W)


def test_one_row_of_b_in_the_last_shard_is_enough_to_be_no_warning(tmp_path: Path) -> None:
    names = [f"model.layers.{n}.mlp.down_proj" for n in range(3)]
    base = write_base(tmp_path / "base", [{f"{name}.weight": W} for name in names])
    last = torch.zeros(40, 3)
    last[39, 2] = 1e-3
    modules = {name: (A, torch.zeros(40, 3)) for name in names[:2]} | {names[2]: (A, last)}
    adapter = write_adapter(tmp_path / "adapter", modules)
    plan = shardmerge.plan(make_config(tmp_path / "out", base, [adapter]))
    assert shardmerge.merge(plan).warnings == plan.warnings


def test_of_two_adapters_the_idle_one_is_named(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{f"{TARGET}.weight": W}])
    busy = write_adapter(tmp_path / "busy", {TARGET: (A, random(40, 3, seed=3))})
    idle = write_adapter(tmp_path / "idle", {TARGET: (A, torch.zeros(40, 3))})
    warnings = [text for text in merge_to(tmp_path / "out", base, busy, idle).warnings if "changes nothing" in text]
    assert len(warnings) == 1 and str(idle) in warnings[0]


# --- frozen copies ----------------------------------------------------------------------------------------------------


def _pure(folder: Path, copies: Mapping[str, Tensor]) -> dict[str, Any]:
    tensors = {f"{TARGET}.A": A.T.contiguous(), f"{TARGET}.B": random(3, 40, seed=4)}
    torch.save({**tensors, **{f"{TARGET}.original.{name}": copy for name, copy in copies.items()}}, folder / "a.pt")
    return {"path": str(folder / "a.pt"), "alpha": 3.0}


@pytest.mark.parametrize("copied", DTYPES, ids="copy-{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids="base-{}".format)
def test_an_equal_copy_of_the_weight_changes_nothing(dtype: str, copied: str, tmp_path: Path) -> None:
    # A copy in a narrower dtype than the base's agrees if it is the base, rounded.
    weight, bias = W.to(DTYPES[dtype]), random(40, seed=5, dtype=DTYPES[dtype])
    base = write_base(tmp_path / "base", [{f"{TARGET}.weight": weight, f"{TARGET}.bias": bias}])
    entry = _pure(tmp_path, {"weight": weight.to(DTYPES[copied]), "bias": bias.to(DTYPES[copied])})
    merge_to(tmp_path / "with", base, entry)
    merge_to(tmp_path / "without", base, _pure(tmp_path, {}))
    assert weight_bytes(tmp_path / "with") == weight_bytes(tmp_path / "without")


def test_copies_of_several_adapters_are_compared_with_the_base_and_not_with_a_sum(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{f"{TARGET}.weight": W}])
    entries = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        entries.append(_pure(tmp_path / name, {"weight": W}))
    merge_to(tmp_path / "out", base, *entries)
    delta = random(3, 40, seed=4).T.contiguous() @ A
    assert_same_bits(stored(tmp_path / "out"), {f"{TARGET}.weight": W + delta + delta})


@pytest.mark.parametrize("compute", ["float64", "bfloat16"])
@each_dtype
def test_a_tensor_that_is_only_compared_stays_the_same_bytes(dtype: str, compute: str, tmp_path: Path) -> None:
    bias = random(40, seed=5, dtype=DTYPES[dtype])
    base = write_base(tmp_path / "base", [{f"{TARGET}.weight": W, f"{TARGET}.bias": bias}])
    merge_to(tmp_path / "out", base, _pure(tmp_path, {"bias": bias}), compute=compute)
    assert_same_bits({"bias": stored(tmp_path / "out")[f"{TARGET}.bias"]}, {"bias": bias})


@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_a_copy_that_differs_stops_the_merge(parameter: str, compute: str, tmp_path: Path) -> None:
    bias = random(40, seed=5)
    base = write_base(tmp_path / "base", [{f"{TARGET}.weight": W, f"{TARGET}.bias": bias}])
    copies = {"weight": W.clone(), "bias": bias.clone()}
    last = copies[parameter].view(-1)[-1:]
    last.copy_(torch.nextafter(last, last + 1))  # the least difference there is, in the last element
    with pytest.raises(FormatError, match=rf"{TARGET}\.original\.{parameter}.*differs") as caught:
        merge_to(tmp_path / "out", base, _pure(tmp_path, copies), compute=compute)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()
