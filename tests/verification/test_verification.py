"""`shardmerge verify`: it passes what a merge wrote, and finds every way in which an output is something else."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from xxhash import xxh3_128_hexdigest

import shardmerge
from shardmerge import ConfigError, Progress, SourceError, VerifyError, VerifyReport
from shardmerge.adapters.formats import lora_forms
from shardmerge.adapters.methods import lora
from shardmerge.verification.findings import describe
from tests.support.builders import (
    DOWN1,
    Q0,
    V0,
    VOCAB,
    Place,
    growth_of_verify,
    llama_tensors,
    lora_pair,
    make_place,
    model_config,
    peft_config,
    peft_tensors,
    shard_names,
    slow_but,
    snapshot,
    write_base,
    write_json,
    write_peft,
)
from tests.support.tampering import change_record, forge_checksums, record_of, wrong

SHARDS = shard_names(2)
BF16 = torch.bfloat16


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A finished merge, in bf16 as most are."""
    config = model_config(torch_dtype="bfloat16", vocab_size=VOCAB)
    place = make_place(tmp_path, tensors=llama_tensors(BF16), config=config)
    shardmerge.merge(place.config())
    return place


def kinds(report: VerifyReport) -> set[str]:
    return set(report.counts)


def make_old(record: dict[str, Any]) -> None:
    """Versions before there were checksums of other files and of the record."""
    del record["other_files"], record["record_checksum"]


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def place_of(shard: Path, tensor: str) -> tuple[int, int]:
    """(first byte, last byte + 1) of a tensor's data in a file."""
    head = shard.read_bytes()
    length = int.from_bytes(head[:8], "little")
    start, stop = json.loads(head[8 : 8 + length])[tensor]["data_offsets"]
    return 8 + length + start, 8 + length + stop


def shard_of(output: Path, tensor: str) -> Path:
    return next(path for path in sorted(output.glob("*.safetensors")) if tensor in load_file(path))


# --- what is right ----------------------------------------------------------------------------------------------------


def test_a_finished_merge_is_verified_and_not_touched(place: Place) -> None:
    before = snapshot(place.folder)
    report = shardmerge.verify(place.output).raise_for_status()
    assert report.ok and report.complete and not report.notes
    assert snapshot(place.folder) == before
    tensors = len(llama_tensors())
    assert (report.tensors, report.untouched, report.touched) == (tensors, tensors - 3, 3)
    assert report.files == len(record_of(place.output)["files"])
    sizes = [(place.output / name).stat().st_size for name in SHARDS]
    assert (report.checksums, report.checksum_bytes) == (2, sum(sizes))
    assert report.rows < report.all_rows == 32 + 16 + 32
    assert 0.5 < report.worst <= 1 and report.worst_tensor in {f"{name}.weight" for name in (Q0, V0, DOWN1)}


def test_all_rows(place: Place) -> None:
    report = shardmerge.verify(place.output, rows=None).raise_for_status()
    assert report.ok and report.rows == report.all_rows == 32 + 16 + 32


@pytest.mark.parametrize(
    ("output", "compute"),
    [
        ({"dtype": "float32"}, {}),
        ({"dtype": "float16"}, {}),
        ({"dtype": "bfloat16"}, {"dtype": "float64"}),
        ({"dtype": "float32"}, {"dtype": "float64"}),
        ({}, {"dtype": "bfloat16"}),
        ({"max_shard_size": "20KB"}, {}),
        ({"max_shard_size": "1MB"}, {"max_memory": "16MB"}),
        ({"sha256": True}, {}),
        ({"dtype": "bfloat16", "rounding": "stochastic", "seed": 3}, {}),
        ({"dtype": "float16", "rounding": "stochastic"}, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
def test_every_kind_of_output(
    tmp_path: Path, dtype: torch.dtype, output: dict[str, Any], compute: dict[str, Any]
) -> None:
    config = model_config(torch_dtype=str(dtype).removeprefix("torch."))
    place = make_place(tmp_path, tensors=llama_tensors(dtype), config=config)
    write_peft(place.adapter, peft_tensors(dtype=torch.float64))
    shardmerge.merge(place.config(output=output, compute=compute))
    report = shardmerge.verify(place.output, rows=None).raise_for_status()
    assert report.complete and not report.notes and report.worst <= 1


def test_several_adapters_and_weights(tmp_path: Path) -> None:
    place = make_place(tmp_path, shards=1)
    other = write_peft(tmp_path / "other", peft_tensors((Q0, DOWN1), rank=3), config=peft_config(r=3, use_rslora=True))
    adapters = [{"path": str(place.adapter), "weight": -0.3}, str(other)]
    shardmerge.merge(place.config(adapters=adapters, base=str(place.base)))
    assert shardmerge.verify(place.output, rows=None).raise_for_status().complete


def test_moved_base_and_adapter(place: Place) -> None:
    base, adapter = place.folder / "elsewhere", place.folder / "new adapter"
    place.base.rename(base)
    place.adapter.rename(adapter)
    report = shardmerge.verify(place.output).raise_for_status(partial=True)
    assert report.ok and not report.complete
    assert "base= says" in report.unverified[0] and "adapters= says" in report.unverified[1]
    report = shardmerge.verify(place.output, base=str(base), adapters=[str(adapter)]).raise_for_status()
    assert report.complete and report.untouched and report.touched
    assert [note.partition(" ")[0] for note in report.notes] == ["the", "adapter"]
    with pytest.raises(ConfigError, match="2 adapters are given, but 1 were merged"):
        shardmerge.verify(place.output, base=str(base), adapters=[str(adapter)] * 2).raise_for_status()


def test_the_output_may_move(place: Place) -> None:
    moved = place.output.rename(place.folder / "moved")
    assert shardmerge.verify(moved).raise_for_status().complete


def test_an_adapter_that_is_gone(place: Place) -> None:
    """The base still tells what is untouched."""
    shutil.rmtree(place.adapter)
    report = shardmerge.verify(place.output).raise_for_status(partial=True)
    assert report.ok and not report.complete
    assert report.untouched == len(llama_tensors()) - 3 and report.touched == 0 and report.checksums == 2
    assert any("touched tensors" in text for text in report.unverified)
    start, _ = place_of(place.output / SHARDS[0], "model.embed_tokens.weight")
    flip(place.output / SHARDS[0], 8 * start)
    assert kinds(wrong(place.output)) == {"checksums", "untouched"}


def test_a_base_that_is_gone(place: Place) -> None:
    shutil.rmtree(place.base)
    report = shardmerge.verify(place.output).raise_for_status(partial=True)
    assert report.ok and not report.complete and report.checksums == 2 and report.untouched == report.touched == 0
    assert "not all of it could be verified" in describe(report)
    flip(place.output / SHARDS[0], 8 * (place.output / SHARDS[0]).stat().st_size - 5)
    assert kinds(wrong(place.output)) == {"checksums"}


def test_a_base_of_which_a_file_is_gone(place: Place) -> None:
    (place.base / SHARDS[1]).unlink()
    report = shardmerge.verify(place.output).raise_for_status(partial=True)
    assert report.ok and not report.complete and any(SHARDS[1] in text for text in report.unverified)


# --- one flipped bit --------------------------------------------------------------------------------------------------

#: Flips that are tried in a file; one is enough to be sure of the checksum, many of the rest.
FLIPS = 25


FLIPPED = [*SHARDS, "model.safetensors.index.json", "config.json", "tokenizer.json"]


@pytest.mark.parametrize("name", slow_but(FLIPPED, SHARDS[0], "config.json"))
def test_a_flipped_bit_is_found_anywhere(place: Place, name: str) -> None:
    path = place.output / name
    content, chance = path.read_bytes(), random.Random(name)
    for _ in range(FLIPS):
        bit = chance.randrange(8 * len(content))
        flip(path, bit)
        report = wrong(place.output)
        assert report.problems, bit
        if name in SHARDS:
            assert "checksums" in kinds(report), bit
        path.write_bytes(content)
    assert shardmerge.verify(place.output).raise_for_status().ok


def test_a_flipped_bit_is_named_by_tensor_and_row(place: Place) -> None:
    """Of the checksum's word alone nobody learns where it is: all rows are computed then."""
    for tensor, kind in ((f"{V0}.weight", "touched"), ("model.norm.weight", "untouched")):
        path = shard_of(place.output, tensor)
        start, stop = place_of(path, tensor)
        columns = (stop - start) // 2 // (16 if kind == "touched" else 32)
        element = 7 * columns + (3 if columns > 3 else 0)
        flip(path, 8 * (start + 2 * element) + 13)
        problem = next(of for of in wrong(place.output, rows=2).problems if of.kind == kind)
        assert (problem.tensor, problem.row, problem.column) == (tensor, 7, 3 if columns > 3 else 0)
        assert problem.file == path.name and problem.found != problem.expected
        flip(path, 8 * (start + 2 * element) + 13)
    assert shardmerge.verify(place.output).raise_for_status().ok


def test_an_untouched_bit_is_found_without_checksums(place: Place) -> None:
    chance = random.Random(1)
    untouched = [name for name in llama_tensors() if name.rpartition(".")[0] not in (Q0, V0, DOWN1)]
    for tensor in chance.sample(untouched, 8):
        path = shard_of(place.output, tensor)
        start, stop = place_of(path, tensor)
        bit = chance.randrange(8 * start, 8 * stop)
        flip(path, bit)
        forge_checksums(place.output)
        report = wrong(place.output)
        assert kinds(report) == {"untouched"} and report.problems[0].tensor == tensor, bit
        flip(path, bit)


def test_the_lowest_bit_of_a_touched_bf16_weight_is_found_without_checksums(place: Place) -> None:
    """It is a whole unit of the last place, of which half is allowed."""
    chance = random.Random(2)
    for tensor in (f"{Q0}.weight", f"{V0}.weight", f"{DOWN1}.weight"):
        path = shard_of(place.output, tensor)
        start, stop = place_of(path, tensor)
        for _ in range(8):
            bit = 8 * (start + 2 * chance.randrange((stop - start) // 2))
            flip(path, bit)
            forge_checksums(place.output)
            report = wrong(place.output, rows=None)
            assert kinds(report) == {"touched"} and report.problems[0].tensor == tensor, bit
            flip(path, bit)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_in_a_row_that_is_not_sampled(place: Place, value: float) -> None:
    path = shard_of(place.output, f"{Q0}.weight")
    tensors = load_file(path)
    tensors[f"{Q0}.weight"][9, 4] = value
    data = bytearray(path.read_bytes())
    start, stop = place_of(path, f"{Q0}.weight")
    data[start:stop] = tensors[f"{Q0}.weight"].view(torch.uint8).numpy().tobytes()
    path.write_bytes(data)
    forge_checksums(place.output)
    seed = next(seed for seed in range(99) if not _samples(place, seed, 9))
    problem = wrong(place.output, rows=2, seed=seed).problems[0]
    assert (problem.kind, problem.tensor, problem.row, problem.column) == ("touched", f"{Q0}.weight", 9, 4)


def _samples(place: Place, seed: int, row: int) -> bool:
    from shardmerge.verification.rows import sampled

    plan = shardmerge.plan(place.config(output={"path": str(place.folder / "other")}))
    tensor = next(of for of, _ in plan.updates() if of.source.name == f"{Q0}.weight")
    return any(row in range(of.start, of.stop) for of in sampled(tensor, 2, seed))


# --- another merge ----------------------------------------------------------------------------------------------------


def test_swapped_shards(place: Place) -> None:
    first, second = (place.output / name for name in SHARDS)
    spare = place.output / "spare"
    for source, target in ((first, spare), (second, first), (spare, second)):
        os.replace(source, target)
    report = wrong(place.output)
    assert kinds(report) == {"structure", "checksums"}
    forge_checksums(place.output)
    texts = [problem.text for problem in wrong(place.output).problems]
    assert any("puts model.embed_tokens.weight into" in text for text in texts)


def test_a_shard_of_another_merge(place: Place) -> None:
    """Of other weights, but the same form."""
    other = make_place(place.folder / "other", tensors={k: v + 1 for k, v in llama_tensors(BF16).items()})
    shardmerge.merge(other.config())
    shutil.copy(other.output / SHARDS[1], place.output / SHARDS[1])
    assert kinds(wrong(place.output)) == {"checksums", "untouched", "touched"}


@pytest.mark.parametrize("weight", [1.01, 0.99, -1.0, 0.0])
def test_a_wrong_scaling(place: Place, weight: float) -> None:
    """The output of another scaling, in a record that says the right one and has right checksums."""
    other = place.folder / "other"
    adapters = [{"path": str(place.adapter), "weight": weight}]
    shardmerge.merge(place.config(adapters=adapters, output={"path": str(other)}))
    for name in SHARDS:
        shutil.copy(other / name, place.output / name)
    forge_checksums(place.output)
    report = wrong(place.output)
    assert kinds(report) == {"touched"}
    assert {problem.tensor for problem in report.problems} == {f"{name}.weight" for name in (Q0, V0, DOWN1)}


def test_a_wrong_scaling_of_the_program_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning again makes the same mistake, and the record has it, too; verifying does not."""
    for module in (lora, lora_forms):
        monkeypatch.setattr(module, "scaling_of", lambda alpha, rank, rslora: 1.01 * alpha / rank)
    place = make_place(tmp_path, tensors=llama_tensors(BF16))
    shardmerge.merge(place.config())
    assert kinds(wrong(place.output)) == {"touched"}


def test_a_wrong_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that leaves out the last row of every tile."""
    apply = lora.Lora.apply
    monkeypatch.setattr(lora.Lora, "apply", lambda self, tile, *rest: apply(self, tile[:-1], *_less(*rest)))
    place = make_place(tmp_path, tensors=llama_tensors(BF16))
    shardmerge.merge(place.config())
    assert kinds(wrong(place.output)) == {"touched"}


def _less(factors: Any, update: Any, window: Any, scratch: Any) -> tuple[Any, ...]:
    import dataclasses

    rows = dataclasses.replace(window.rows, stop=window.rows.stop - 1)
    return factors, update, dataclasses.replace(window, rows=rows), scratch[:-1]


def test_an_adapter_of_another_run(place: Place) -> None:
    """Of the same form, with other numbers."""
    tensors = peft_tensors()
    write_peft(place.adapter, {name: tensor * 1.02 for name, tensor in tensors.items()})
    report = wrong(place.output)
    assert kinds(report) == {"touched"} and any("was written again" in note for note in report.notes)


def test_an_adapter_of_another_run_with_the_same_time(place: Place) -> None:
    path = place.adapter / "adapter_model.safetensors"
    status = path.stat()
    tensors = peft_tensors()
    tensors[f"base_model.model.{Q0}.lora_B.weight"][3, 2] += 1e-6  # nothing of it is left in bf16
    write_peft(place.adapter, tensors)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.utime(
        place.adapter / "adapter_config.json",
        ns=(0, json_time(record_of(place.output), "adapter_config.json")),
    )
    report = shardmerge.verify(place.output, rows=None).raise_for_status()
    assert report.ok and any("digest is another" in note for note in report.notes)


def json_time(record: dict[str, Any], name: str) -> int:
    files = record["adapters"][0]["files"]
    return int(next(file["mtime_ns"] for file in files if file["uri"].endswith(name)))


def test_an_adapter_of_other_targets_ranks_or_scaling(place: Place) -> None:
    write_peft(place.adapter, peft_tensors((Q0, DOWN1)))
    assert "was updated by the merge, but would not be now" in wrong(place.output).problems[0].text
    write_peft(place.adapter, peft_tensors(rank=2), config=peft_config(r=2))
    assert "rank was 4, is 2" in wrong(place.output).problems[0].text
    write_peft(place.adapter, config=peft_config(lora_alpha=9))
    assert "scaling was 2.0, is 2.25" in wrong(place.output).problems[0].text


def test_an_adapter_that_no_longer_fits(place: Place) -> None:
    a, b = lora_pair(Q0)
    prefix = f"base_model.model.{Q0}"
    write_peft(place.adapter, {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b[:-1].contiguous()})
    assert "make no such merge" in wrong(place.output).problems[0].text


def test_a_base_of_other_numbers(place: Place) -> None:
    write_base(place.base, {name: tensor + 0.5 for name, tensor in llama_tensors(BF16).items()})
    report = wrong(place.output)
    assert {"untouched", "touched"} <= kinds(report)


# --- the rest of a checkpoint -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": VOCAB + 1},
        {"tie_word_embeddings": True},
        {"torch_dtype": "float32"},
        {"hidden_size": 31},
        {"rope_theta": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_old", [False, True], ids=["", "old record"])
def test_an_edited_config(place: Place, change: dict[str, Any], is_old: bool) -> None:
    if is_old:
        change_record(place.output, make_old)
    path = place.output / "config.json"
    write_json(path, {**json.loads(path.read_text()), **change})
    report = wrong(place.output)
    key, value = next(iter(change.items()))
    (told,) = (of for of in report.problems if f"{key} is {json.dumps(value)}, expected" in of.text)
    assert told.kind == ("structure" if is_old else "checksums") and told.file == "config.json"


@pytest.mark.parametrize("change", [{"vocab_size": VOCAB + 1}, {"vocab_size": VOCAB - 1}], ids=str)
def test_an_edited_config_where_the_base_is_gone(place: Place, change: dict[str, Any]) -> None:
    path = place.output / "config.json"
    write_json(path, {**json.loads(path.read_text()), **change})
    shutil.rmtree(place.base)
    assert f"config.json says vocab_size {change['vocab_size']}" in wrong(place.output).problems[-1].text


@pytest.mark.parametrize("is_there", [True, False], ids=["base", "no base"])
def test_an_edited_file_beside_the_weights(place: Place, is_there: bool) -> None:
    """Also one of the same length, and where nothing but the record tells."""
    if not is_there:
        shutil.rmtree(place.base)
    beside = {name for name in record_of(place.output)["files"] if not name.endswith(".safetensors")}
    beside.remove("shardmerge.json")
    acted_on = {name for name in beside if name not in ("README.md", "LICENSE")}
    assert {"config.json", "tokenizer.json", "modeling_x.py", "model.safetensors.index.json"} <= acted_on
    for name in acted_on:
        path = place.output / name
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 2]))
        problems = wrong(place.output).problems
        assert any(of.kind == "checksums" and of.text.startswith(f"{name} was changed after") for of in problems), name
        path.write_bytes(before)
    report = shardmerge.verify(place.output).raise_for_status(partial=True)
    assert report.other_files == len(beside) and report.complete == is_there


def test_sha256_of_files_beside_the_weights(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    shardmerge.merge(place.config(output={"path": str(place.output), "sha256": True}))
    content = (place.output / "config.json").read_bytes()
    entry = record_of(place.output)["other_files"]["config.json"]
    assert entry["sha256"] == hashlib.sha256(content).hexdigest() and entry["bytes"] == len(content)
    assert shardmerge.verify(place.output).raise_for_status().complete
    change_record(place.output, lambda record: record["other_files"]["config.json"].update(sha256="0" * 64))
    assert "config.json was changed" in wrong(place.output).problems[0].text


def test_a_head_that_config_says_is_there(tmp_path: Path) -> None:
    config = model_config(tie_word_embeddings=True, vocab_size=VOCAB)
    place = make_place(tmp_path, tensors=llama_tensors(tied=True), config=config)
    shardmerge.merge(place.config())
    assert shardmerge.verify(place.output).raise_for_status().complete
    write_json(place.output / "config.json", {**config, "tie_word_embeddings": False})
    shutil.rmtree(place.base)
    assert "lm_head.weight is not tied to" in wrong(place.output).problems[-1].text


def test_what_the_base_says_wrong_itself_is_a_note(tmp_path: Path) -> None:
    place = make_place(tmp_path, tensors=llama_tensors(BF16), config=model_config(torch_dtype="float32"))
    shardmerge.merge(place.config())
    report = shardmerge.verify(place.output).raise_for_status()
    assert report.ok and report.notes == (
        "config.json says float32, but most of the weights are bfloat16; so it is in the base",
    )


def test_a_config_that_is_no_json(place: Place) -> None:
    (place.output / "config.json").write_text("[]")
    assert any("config.json is not a JSON object" in problem.text for problem in wrong(place.output).problems)


def test_a_readme_may_be_written(place: Place) -> None:
    (place.output / "README.md").write_text("# ours\n")
    report = shardmerge.verify(place.output).raise_for_status()
    assert report.ok and "README.md was changed" in report.notes[0]
    shutil.rmtree(place.base)
    report = shardmerge.verify(place.output).raise_for_status(partial=True)
    assert report.ok and "README.md was changed" in report.notes[0]


@pytest.mark.parametrize("name", ["tokenizer.json", "modeling_x.py", SHARDS[0], "model.safetensors.index.json"])
def test_a_missing_file(place: Place, name: str) -> None:
    (place.output / name).unlink()
    report = wrong(place.output)
    assert "structure" in kinds(report) and any(name in of.text and "missing" in of.text for of in report.problems)


def test_a_file_that_would_be_loaded_instead(place: Place) -> None:
    save_file(llama_tensors(), place.output / "model.safetensors")
    assert "model.safetensors is not a file of this merge" in wrong(place.output).problems[0].text


def test_a_cut_shard(place: Place) -> None:
    path = place.output / SHARDS[1]
    path.write_bytes(path.read_bytes()[:-2])
    report = wrong(place.output)
    assert {"structure", "checksums"} <= kinds(report)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda index: index["weight_map"].pop("model.norm.weight"), "puts model.norm.weight into None"),
        (lambda index: index["weight_map"].update(new=SHARDS[0]), "puts new into"),
        (lambda index: index["weight_map"].update({"model.norm.weight": SHARDS[0]}), "puts model.norm.weight into"),
        (lambda index: index["metadata"].update(total_size=7), "says total_size 7"),
        (lambda index: index.pop("weight_map"), "is not an index"),
        (lambda index: index.update(weight_map=[1]), "is not an index"),
    ],
)
def test_a_wrong_index(place: Place, change: Callable[[dict[str, Any]], None], text: str) -> None:
    path = place.output / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    write_json(path, index)
    report = wrong(place.output)
    assert kinds(report) == {"structure", "checksums"} and any(text in of.text for of in report.problems)


def test_a_tensor_that_is_stored_twice_missing_or_of_another_dtype(place: Place) -> None:
    path = place.output / SHARDS[1]
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    tensors["model.embed_tokens.weight"] = llama_tensors(BF16)["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float()
    save_file(tensors, path, metadata={"format": "pt"})
    texts = [problem.text for problem in wrong(place.output).problems]
    assert any("model.embed_tokens.weight is stored twice" in text for text in texts)
    assert any("puts model.norm.weight into" in text for text in texts)
    assert any(f"{SHARDS[1]}: lm_head.weight is F32" in text for text in texts)


def test_a_header_that_says_something_else_of_the_same_length(place: Place) -> None:
    path = place.output / SHARDS[0]
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"tf"', 1))
    forge_checksums(place.output)
    assert "its metadata is" in wrong(place.output).problems[0].text


# --- the record -------------------------------------------------------------------------------------------------------


def test_no_record(place: Place, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such directory"):
        shardmerge.verify(tmp_path / "nowhere").raise_for_status()
    with pytest.raises(VerifyError, match=r"there is no shardmerge\.json") as caught:
        shardmerge.verify(place.base).raise_for_status()
    assert caught.value.report is None
    (place.output / ".shardmerge").mkdir()
    (place.output / ".shardmerge" / "journal.json").write_text("{}")
    with pytest.raises(VerifyError, match="was not finished"):
        shardmerge.verify(place.output).raise_for_status()


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('"seconds": ', '"seconds": 1'),
        lambda text: text.replace(SHARDS[0], "model.safetensors"),
        lambda text: text.replace('"dtype": "same"', '"dtype": "float32"'),
        lambda text: text.replace('"record_checksum": "', '"record_checksum": "0'),
        lambda text: text.replace('"record_checksum": "', '"record_checksum": 1, "other": "'),
        lambda text: text.replace("{", '{"a": "\\ud800",', 1),
    ],
    ids=["digit", "shard", "config", "checksum", "no checksum", "half a character"],
)
def test_an_edited_record_is_not_believed(place: Place, edit: Callable[[str], str]) -> None:
    path = place.output / "shardmerge.json"
    before = path.read_text()
    path.write_text(edit(before))
    assert path.read_text() != before
    with pytest.raises(VerifyError, match=r"shardmerge\.json was changed or damaged after the merge") as caught:
        shardmerge.verify(place.output).raise_for_status()
    assert caught.value.report is None and str(place.output) in str(caught.value)
    # Spaces and the order of keys mean nothing.
    path.write_text(json.dumps(json.loads(before), sort_keys=True))
    assert shardmerge.verify(place.output).raise_for_status().complete


def test_the_checksum_of_a_record_is_of_its_canonical_json(place: Place) -> None:
    """As the README says, so that others can compute it."""
    record = record_of(place.output)
    assert list(record)[-1] == "record_checksum"
    rest = {key: value for key, value in record.items() if key != "record_checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    assert record["record_checksum"] == xxh3_128_hexdigest(text.encode("ascii"))


def test_an_old_record(place: Place) -> None:
    """It is verified as far as it goes, and what it lacks is said."""
    change_record(place.output, make_old)
    report = shardmerge.verify(place.output).raise_for_status()
    assert report.complete and report.other_files == 0
    assert "no record_checksum" in report.notes[0] and "warning: shardmerge.json has no" in describe(report)
    (place.output / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is not what the merge writes" in wrong(place.output).problems[0].text
    shutil.rmtree(place.base)
    report = shardmerge.verify(place.output).raise_for_status(partial=True)
    assert report.ok and any("files beside the weights" in text for text in report.unverified)


@pytest.mark.parametrize("key", ["shards", "files", "targets"])
def test_a_damaged_record(place: Place, key: str) -> None:
    change_record(place.output, lambda record: record.pop(key))
    with pytest.raises(VerifyError, match="is damaged"):
        shardmerge.verify(place.output).raise_for_status()


@pytest.mark.parametrize("name", ["../base/model.safetensors", "/etc/passwd", 7, ""])
def test_a_record_that_leads_elsewhere(place: Place, name: Any) -> None:
    change_record(place.output, lambda record: record["files"].append(name))
    with pytest.raises(VerifyError, match="not a file of this directory"):
        shardmerge.verify(place.output).raise_for_status()


def test_a_record_whose_config_is_damaged(place: Place) -> None:
    change_record(place.output, lambda record: record["config"].update(tied="perhaps"))
    assert "config in shardmerge.json is damaged" in wrong(place.output).problems[0].text


def test_a_record_without_checksums(place: Place) -> None:
    """Versions before there were checksums wrote the bytes alone."""

    def change(record: dict[str, Any]) -> None:
        record["shards"] = {name: entry["bytes"] for name, entry in record["shards"].items()}

    change_record(place.output, change)
    report = shardmerge.verify(place.output).raise_for_status(partial=True)
    assert report.ok and not report.complete and report.checksums == 0 and report.touched == 3


def test_recorded_targets_and_shards_are_compared(place: Place) -> None:
    change_record(place.output, lambda record: record["targets"][f"{Q0}.weight"][0].update(scaling=3.0))
    assert "scaling was 3.0, is 2.0" in wrong(place.output).problems[0].text
    change_record(place.output, lambda record: record["targets"].update(gone=[]))
    assert {"touched", "structure"} == kinds(wrong(place.output))


# --- progress and memory ----------------------------------------------------------------------------------------------


def test_progress(place: Place) -> None:
    seen: list[Progress] = []
    shardmerge.verify(place.output, progress=seen.append).raise_for_status()
    assert seen[0].done == 0 and seen[-1].done == seen[-1].total and {of.doing for of in seen} == {"verifying"}
    assert [of.done for of in seen] == sorted(of.done for of in seen)
    assert {(of.shard, of.shard_number, of.shards) for of in seen} == {(SHARDS[0], 1, 2), (SHARDS[1], 2, 2)}


def test_what_progress_raises_stops_it(place: Place) -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shardmerge.verify(place.output, progress=stop).raise_for_status()


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    small = make_place(tmp_path / "small")
    shardmerge.merge(small.config())
    tensors = llama_tensors() | {f"other.{number}": torch.randn(1 << 22) for number in range(3)}
    tensors[f"{Q0}.weight"] = torch.randn(1 << 17, 96)
    large = make_place(tmp_path / "large", tensors=tensors, shards=1)
    a, b = 0.1 * torch.randn(4, 96), 0.1 * torch.randn(1 << 17, 4)
    prefix = f"base_model.model.{Q0}"
    write_peft(large.adapter, {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b})
    shardmerge.merge(large.config())
    grown, size = growth_of_verify(small.output, large.output, "*.safetensors")
    assert size > 90 << 20 and grown < 40 << 20
