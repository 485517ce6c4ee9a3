"""The engine against PEFT: what `shardmerge.merge` stores is what PEFT's default merge stores, bit for bit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shardmerge
from shardmerge.spec.tensors import LIBRARY_BYTES
from tests.support.builders import slow_but
from tests.support.peft_oracle import (
    ATTENTION,
    MLP,
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
    stored,
    weight_bytes,
)

ALL = (*ATTENTION, *MLP, "lm_head")
DTYPES = ("float32", "bfloat16", "float16")
#: Shapes of which none is a multiple of 16: 186 x 84, 14 x 186, 333 x 186, 186 x 333, 29 x 186.
ODD: dict[str, Any] = {"hidden": 186, "intermediate": 333, "heads": 6, "head_dim": 14, "vocab": 29}


@pytest.fixture(autouse=True, scope="module")
def _one_thread_and_no_fsync() -> Iterator[None]:
    """Threads change the bits of small odd products, PEFT's too; durability takes half of the time here.

    How much threads may change is `test_engine_threads`; durability is `test_sinks` and `test_durable`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
    torch.set_num_threads(threads)


def check(folder: Path, base: Base, lora: Lora) -> None:
    """Merge with the least memory, with some more and with the default: each time PEFT's bits, and the same files."""
    model, adapter, expected = base_folder(base), adapter_folder(base, lora), oracle(base, lora)
    least = least_memory(make_config(folder / "none", model, [adapter]))
    files = []
    for memory in (least, 2 * least + 1, "auto"):
        output = folder / f"memory-{memory}"
        merge_to(output, model, adapter, max_memory=memory)
        assert_same_bits(stored(output), expected)
        files.append(weight_bytes(output))
    assert files[0] == files[1] == files[2]


# --- ranks and dtypes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", slow_but([1, 2, 3, 8, 16, 33, 64], 1, 8, 33), ids="rank-{}".format)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rank_and_dtype_gives_the_bits_of_peft(dtype: str, rank: int, tmp_path: Path) -> None:
    # The base is sharded where its dtype is not the adapter's, so that both occur with every rank.
    adapter_dtype = DTYPES[rank % 3]
    limit = 10**9 if dtype == adapter_dtype else 120_000
    base = Base(dtype, max_shard_size=limit, **ODD)
    check(tmp_path, base, Lora(rank, alpha=7.3, targets=ALL, dtype=adapter_dtype))


def test_a_small_max_shard_size_gives_several_shards() -> None:
    folder = base_folder(Base("bfloat16", max_shard_size=120_000, **ODD))
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert (folder / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize("adapter_dtype", DTYPES, ids="adapter-{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids="base-{}".format)
def test_every_pair_of_dtypes_gives_the_bits_of_peft(dtype: str, adapter_dtype: str, tmp_path: Path) -> None:
    check(tmp_path, Base(dtype, layers=2, max_shard_size=20_000), Lora(5, alpha=11.0, dtype=adapter_dtype))


# --- what an adapter's config says ------------------------------------------------------------------------------------

_PATTERNS = {
    "rslora": Lora(8, 13.0, rslora=True),
    "rank_pattern": Lora(8, 13.0, rank_pattern=(("q_proj", 3), ("layers.1.mlp.*", 5), ("mlp.up_proj", 2))),
    "alpha_pattern": Lora(8, 13.0, alpha_pattern=(("layers.0.self_attn.v_proj", 0.7), ("v_proj", 29.0))),
    "both-patterns": Lora(6, 13.0, rank_pattern=(("up_proj", 3),), alpha_pattern=((".*_proj", 5.5), ("up_proj", 1.0))),
    "both-and-rslora": Lora(6, 3.3, rslora=True, rank_pattern=(("o_proj", 7),), alpha_pattern=(("k_proj", 1.7),)),
    "one-kind-of-target": Lora(4, 9.0, targets=("v_proj",)),
    "full-module-name": Lora(4, 9.0, targets=("model.layers.1.mlp.down_proj",)),
    "infix": Lora(8, 13.0, infix="default"),
    "other-infix": Lora(8, 13.0, infix="my_adapter", dtype="bfloat16"),
    "pickled": Lora(8, 13.0, pickled=True, dtype="float16"),
}


@pytest.mark.parametrize("lora", _PATTERNS.values(), ids=_PATTERNS)
def test_the_adapters_settings_are_read_as_peft_reads_them(lora: Lora, tmp_path: Path) -> None:
    check(tmp_path, Base("bfloat16", layers=2), lora)


def test_patterns_make_a_difference() -> None:
    # Were the patterns of no effect on the oracle, the test above could not fail.
    base = Base("bfloat16", layers=2)
    names = oracle(base, _PATTERNS["rslora"])
    plain = oracle(base, Lora(8, 13.0))
    assert any(not torch.equal(names[name], plain[name]) for name in names)
    scaled = oracle(base, _PATTERNS["alpha_pattern"])
    changed = {name for name in names if not torch.equal(scaled[name], plain[name])}
    assert changed == {f"model.layers.{layer}.self_attn.v_proj.weight" for layer in (0, 1)}


# --- shapes -----------------------------------------------------------------------------------------------------------

_SHAPES = {
    "head-of-17-rows": Base(vocab=17),
    "head-of-18-rows": Base("bfloat16", vocab=18, hidden=46),
    "head-of-31-rows": Base("float16", vocab=31, hidden=250),
    "two-rows": Base(heads=2, kv_heads=1, head_dim=2),
    "ten-rows": Base("bfloat16", heads=1, kv_heads=1, head_dim=10, hidden=700),
    "one-row-and-one-column": Base(intermediate=1, hidden=42, heads=3, kv_heads=3, head_dim=8),
    "two-rows-and-two-columns": Base(intermediate=2, hidden=69, heads=3, kv_heads=1, head_dim=2),
    "five-columns": Base(intermediate=5, hidden=1001, heads=1, kv_heads=1),
    "seven-columns": Base(intermediate=7, hidden=333, heads=3, kv_heads=3),
    "fifteen-rows": Base(intermediate=15, hidden=1030),
    "sixteen-rows": Base(intermediate=16, hidden=1030),
    "rows-one-short-of-two-tiles": Base(intermediate=31, hidden=1030),
    "one-hidden-unit": Base(hidden=1, heads=1, kv_heads=1, intermediate=40),
    "tall": Base("float16", hidden=6, intermediate=6000),
    "rows-wider-than-a-buffer-holds-sixteen-of": Base(hidden=4098, intermediate=50),
    "wide": Base("bfloat16", hidden=6, intermediate=6000, heads=1, kv_heads=1),
}


@pytest.mark.parametrize("base", _SHAPES.values(), ids=_SHAPES)
def test_odd_shapes_give_the_bits_of_peft(base: Base, tmp_path: Path) -> None:
    # Rank 16 of random factors: sums long enough for another order of adding them to show.
    check(tmp_path, base, Lora(16, alpha=13.0, targets=ALL, dtype="float16"))


@st.composite
def _cases(draw: st.DrawFn) -> tuple[Base, Lora]:
    heads = draw(st.integers(1, 4))
    base = Base(
        dtype=draw(st.sampled_from(DTYPES)),
        hidden=heads * draw(st.integers(1, 300 // heads)),
        intermediate=draw(st.integers(1, 300)),
        heads=heads,
        kv_heads=draw(st.sampled_from([n for n in range(1, 5) if heads % n == 0])),
        head_dim=2 * draw(st.integers(1, 40)),
        vocab=draw(st.integers(17, 31)),
        max_shard_size=draw(st.sampled_from([10**9, 40_000])),
        seed=draw(st.integers(0, 99)),
    )
    lora = Lora(
        rank=draw(st.integers(1, 64)),
        alpha=draw(st.floats(0.1, 40).map(lambda alpha: round(alpha, 2))),
        targets=ALL,
        rslora=draw(st.booleans()),
        rank_pattern=draw(st.sampled_from([(), (("k_proj", 3),), (("mlp.*", 20), ("up_proj", 4))])),
        alpha_pattern=draw(st.sampled_from([(), (("self_attn.*", 1.3),)])),
        dtype=draw(st.sampled_from(DTYPES)),
        pickled=draw(st.booleans()),
        infix=draw(st.sampled_from(["", "default"])),
    )
    return base, lora


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(_cases())
def test_random_models_and_adapters_give_the_bits_of_peft(case: tuple[Base, Lora]) -> None:
    with TemporaryDirectory() as folder:
        check(Path(folder), *case)


# --- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["float32", "float64", "bfloat16"], ids="compute-{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids="base-{}".format)
def test_tiles_do_not_show(dtype: str, compute: str, tmp_path: Path) -> None:
    base = Base(dtype, hidden=231, intermediate=389, heads=3, kv_heads=3, head_dim=62, vocab=29)
    lora = Lora(17, alpha=7.3, targets=ALL)
    model, adapter = base_folder(base), adapter_folder(base, lora)
    least = least_memory(make_config(tmp_path / "none", model, [adapter], compute=compute))
    tiles, files = [], []
    code = shardmerge.plan(make_config(tmp_path / "none", model, [adapter], compute=compute)).memory.code_bytes
    work = least - LIBRARY_BYTES - code
    for memory in (least, least + work // 2, least + work, "auto"):
        config = make_config(tmp_path / str(memory), model, [adapter], compute=compute, max_memory=memory)
        plan = shardmerge.plan(config)
        tiles.append(sum(tensor.tiles for shard in plan.shards for tensor in shard.tensors))
        shardmerge.merge(plan)
        files.append(weight_bytes(tmp_path / str(memory)))
    assert tiles[0] > tiles[-1] and len(set(tiles)) > 2, tiles
    assert all(found == files[0] for found in files)


# --- the model that comes out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [10**9, 15_000], ids=["one-file", "sharded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_transformers_loads_the_output_and_computes_what_pefts_model_computes(
    dtype: str, limit: int, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    base = Base(dtype, layers=2, max_shard_size=limit)
    lora = Lora(8, alpha=7.3)
    model, adapter = base_folder(base), adapter_folder(base, lora)
    merge_to(tmp_path / "out", model, adapter)
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        logits = merged(tokens).logits
        expected = merge_with_peft(model, adapter)(tokens).logits
        unmerged = AutoModelForCausalLM.from_pretrained(model, dtype="auto")(tokens).logits
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, unmerged)


def test_a_tied_model_keeps_its_tie(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = Base("bfloat16", tied=True)
    lora = Lora(8, alpha=7.3)
    check(tmp_path, base, lora)
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "memory-auto", dtype="auto", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_the_base_and_the_adapter_stay_as_they_were(tmp_path: Path) -> None:
    base = Base("float16", max_shard_size=15_000)
    model, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(base_folder(base), model)
    shutil.copytree(adapter_folder(base, Lora()), adapter)
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.rglob("*") if file.is_file()}
    for folder in (model, adapter):
        folder.chmod(0o555)
    merge_to(tmp_path / "out", model, adapter)
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in before} == before
    assert sorted(file for file in before) == sorted(
        file for folder in (model, adapter) for file in folder.rglob("*") if file.is_file()
    )
