"""The parts of `shardmerge verify`: rounding and error bounds, the rows of a sample, scalings, and the command line."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import shardmerge
from shardmerge.adapters.methods.road import RoadSettings
from shardmerge.cli.main import cli
from shardmerge.codecs.rounding import half_unit
from shardmerge.config.schema import AdapterConfig
from shardmerge.file_formats.adapter_opening import open_adapter
from shardmerge.sources.source import open_source
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import RowRange, TensorInfo, TensorRef
from shardmerge.spec.updates import Region, Update
from shardmerge.verification.findings import Findings
from shardmerge.verification.formulas import FORMULAS, PlainFactors
from shardmerge.verification.reading import Factor, Files
from shardmerge.verification.rows import all_rows, sampled
from shardmerge.verification.scaling import ScaledBy
from shardmerge.verification.structure import ask_library
from tests.support.builders import (
    DOWN1,
    GATE0,
    Q0,
    V0,
    lora_pair,
    make_place,
    peft_config,
    peft_tensors,
    pure_tensors,
    refs_of,
    run_cli,
    untimed,
    update_of,
    write_base,
    write_json,
    write_peft,
    write_pure,
)

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# --- one rounding -----------------------------------------------------------------------------------------------------


@untimed
@given(value=st.floats(-1e4, 1e4), exponent=st.integers(-40, 0), dtype=st.sampled_from(sorted(DTYPES)))
def test_half_a_unit_is_what_rounding_may_change(value: float, exponent: int, dtype: str) -> None:
    exact = torch.tensor([value * 2.0**exponent], dtype=torch.float64)
    rounded = exact.float().to(DTYPES[dtype]) if dtype == "F32" else exact.to(DTYPES[dtype])
    half = half_unit(exact.abs(), dtype)
    twice_rounded = exact.abs() * 2.0**-24  # torch goes through float32
    assert bool((rounded.double() - exact).abs() <= half + twice_rounded)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("value", [1.0, 1.5, 3.0, 1023.0, 2.0**-10, -7.0, 0.0])
def test_half_a_unit_is_half_the_way_to_the_next_number(value: float, dtype: str) -> None:
    narrow = torch.tensor([value], dtype=DTYPES[dtype])
    step = torch.int32 if dtype == "F32" else torch.int16
    away = (narrow.view(step) + 1).view(DTYPES[dtype])
    gap = float((away.double() - narrow.double()).abs())
    assert float(half_unit(narrow.double().abs(), dtype)) == gap / 2


# --- which rows -------------------------------------------------------------------------------------------------------


def plan_of(shape: tuple[int, ...], *updates: Update, dtype: str = "F32") -> TensorPlan:
    ref = refs_of({"w": shape}, dtype)["w"]
    return TensorPlan(ref, TensorInfo(dtype, shape, (0, ref.nbytes)), updates)


def part(start: int, rows: int, columns: int, **changes: Any) -> Update:
    factors = tuple(refs_of({"A": (2, columns), "B": (rows, 2)}).items())
    return update_of("w", (rows, columns), factors, region=Region("w", rows, 0, start), **changes)


def covered(windows: list[RowRange]) -> list[int]:
    return [row for window in windows for row in range(window.start, window.stop)]


@untimed
@given(
    rows=st.integers(1, 400),
    columns=st.sampled_from([2, 64, 1 << 16]),
    count=st.integers(1, 50),
    seed=st.integers(0, 5),
)
def test_a_sample_has_the_first_and_last_row(rows: int, columns: int, count: int, seed: int) -> None:
    tensor = plan_of((rows, columns), part(0, rows, columns))
    chosen = covered(sampled(tensor, count, seed))
    assert chosen == sorted(set(chosen)) and {0, rows - 1} <= set(chosen) <= set(range(rows))
    assert min(rows, count) <= len(chosen) <= max(count, 3)
    assert chosen == covered(sampled(tensor, count, seed))
    assert covered(all_rows(tensor)) == list(range(rows))


def test_another_seed_and_another_tensor_have_other_rows() -> None:
    tensor = plan_of((1000, 4), part(0, 1000, 4))
    assert len({tuple(covered(sampled(tensor, 16, seed))) for seed in range(5)}) == 5


def test_every_module_in_one_tensor_has_a_row() -> None:
    parts = [part(start, 10, 4) for start in range(0, 500, 10)]
    tensor = plan_of((500, 4), *parts)
    assert {row // 10 for row in covered(sampled(tensor, 1, 0))} == set(range(50))
    assert covered(all_rows(tensor)) == list(range(500))


def test_every_expert_has_a_row() -> None:
    factors = tuple(refs_of({"A": (2 * 6, 4), "B": (10, 2 * 6)}).items())
    update = update_of("w", (6, 10, 4), factors, family="lora-experts", experts=6, rank=2, region=Region("w", 10))
    tensor = plan_of((6, 10, 4), update)
    assert {row // 10 for row in covered(sampled(tensor, 1, 0))} == set(range(6))


def test_groups_of_rows_stay_together() -> None:
    update = part(0, 40, 4, family="road", settings=RoadSettings("road_1", 8))
    tensor = plan_of((40, 4), update)
    for windows in (sampled(tensor, 3, 0), all_rows(tensor)):
        assert all(window.start % 8 == 0 and len(window) % 8 == 0 for window in windows)


def test_vectors_are_taken_whole() -> None:
    assert covered(sampled(plan_of((70,), part(0, 70, 1, family="lora-bias")), 2, 0)) == list(range(70))


# --- factors ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Files, dict[str, TensorRef], dict[str, Tensor]]:
    tensors = {
        "small": torch.randn(6, 8),
        "large": torch.randn(300, 4000).to(torch.bfloat16),
        "numbers": torch.arange(12, dtype=torch.int32).view(3, 4),
    }
    tensors["double"] = torch.randn(1000, 700, dtype=torch.float64)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    adapter = open_adapter(open_source(str(tmp_path / "adapter_model.safetensors")))
    return Files([adapter.file]), dict(adapter.tensors), tensors


@pytest.mark.parametrize("name", ["small", "large", "double"])
@pytest.mark.parametrize("transposed", [False, True])
def test_parts_of_factors(
    stored: tuple[Files, dict[str, TensorRef], dict[str, Tensor]], name: str, transposed: bool
) -> None:
    files, refs, tensors = stored
    ref, wanted = refs[name], tensors[name].double()
    if transposed:
        ref, wanted = ref.transposed(), wanted.T
    rows, columns = RowRange(1, 5), RowRange(2, 6)
    assert torch.equal(Factor(files, ref).rows(rows), wanted[1:5])
    assert torch.equal(Factor(files, ref).columns(columns), wanted[:, 2:6])
    factor = Factor(files, ref)
    assert torch.equal(factor.whole(), wanted)
    assert torch.equal(factor.rows(rows), wanted[1:5]) and torch.equal(factor.columns(columns), wanted[:, 2:6])
    files.close()


def test_whole_numbers_stay_whole(stored: tuple[Files, dict[str, TensorRef], dict[str, Tensor]]) -> None:
    files, refs, tensors = stored
    whole = Factor(files, refs["numbers"]).whole()
    assert whole.dtype == torch.int64 and torch.equal(whole, tensors["numbers"].long())


@pytest.mark.parametrize("shuffle", [(2, 3, 5), (1, 2, 15), (5, 3, 2)])
def test_shuffled_rows(shuffle: tuple[int, int, int]) -> None:
    """``matrix_rows = stored_rows.view(g, a, b, …).transpose(1, 2).reshape(rows, …)``."""
    groups, outer, inner = shuffle
    update = update_of("w", (40, 4), (), region=Region("w", 30, start=7, shuffle=shuffle))
    order = PlainFactors(Files([]), update).matrix_rows(RowRange(7, 37))
    matrix = torch.arange(7, 37)
    stored_rows = matrix.view(groups, inner, outer).transpose(1, 2).reshape(-1)
    assert torch.equal(stored_rows.view(groups, outer, inner).transpose(1, 2).reshape(-1), matrix)
    assert torch.equal(order, stored_rows)
    assert torch.equal(PlainFactors(Files([]), update).matrix_rows(RowRange(10, 20)), stored_rows[3:13])


# --- scalings ---------------------------------------------------------------------------------------------------------

PATTERNS = {
    "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 7},
    "alpha_pattern": {r".*\.1\..*_proj": 9, "_proj": 1, "q_proj": 5, "v_proj": 6},
}


def scalings(entry: dict[str, Any], tmp_path: Path) -> dict[str, float]:
    """By module, as verifying works them out; they must be those of the plan."""
    write_base(tmp_path / "base")
    output = {"path": str(tmp_path / "merged")}
    plan = shardmerge.plan({"base": str(tmp_path / "base"), "adapters": [entry], "output": output})
    scaled = ScaledBy.of(AdapterConfig.model_validate(entry))
    found = {update.module: scaled.scaling(update) for _, update in plan.updates() if update.family in FORMULAS}
    planned = {update.module: update.scaling for _, update in plan.updates() if update.family in FORMULAS}
    assert found == pytest.approx(planned, rel=1e-15) and found
    return found


@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_scalings_of_peft(tmp_path: Path, weight: float) -> None:
    write_peft(tmp_path / "adapter")
    entry = {"path": str(tmp_path / "adapter"), "weight": weight}
    assert scalings(entry, tmp_path) == dict.fromkeys((Q0, V0, DOWN1), 2.0 * weight)
    write_peft(tmp_path / "adapter", config=peft_config(use_rslora=True))
    assert scalings(entry, tmp_path) == dict.fromkeys((Q0, V0, DOWN1), 4.0 * weight)


@pytest.mark.parametrize("infix", ["", ".default"])
def test_scalings_of_patterns(tmp_path: Path, infix: str) -> None:
    ranks = {Q0: 3, V0: 4, GATE0: 4, DOWN1: 7}
    tensors = {
        name: of for module, rank in ranks.items() for name, of in peft_tensors([module], rank, infix=infix).items()
    }
    write_peft(tmp_path / "adapter", tensors, config=peft_config(**PATTERNS))
    found = scalings({"path": str(tmp_path / "adapter")}, tmp_path)
    assert found == {Q0: 5 / 3, V0: 6 / 4, GATE0: 8 / 4, DOWN1: 9 / 7}
    write_peft(tmp_path / "adapter", tensors, config=peft_config(**PATTERNS, use_rslora=True))
    assert scalings({"path": str(tmp_path / "adapter")}, tmp_path)[DOWN1] == 9 / math.sqrt(7)


@pytest.mark.parametrize(("scale", "scaling"), [({"alpha": 6}, 1.5), ({"scaling": 0.7}, 0.7)], ids=["alpha", "scaling"])
def test_scalings_without_a_config(tmp_path: Path, scale: dict[str, float], scaling: float) -> None:
    write_pure(tmp_path / "adapter.pt", pure_tensors((Q0, DOWN1)))
    assert set(scalings({"path": str(tmp_path / "adapter.pt"), **scale}, tmp_path).values()) == {scaling}
    save_file(peft_tensors(), tmp_path / "keys.safetensors")
    assert set(scalings({"path": str(tmp_path / "keys.safetensors"), **scale}, tmp_path).values()) == {scaling}


@pytest.mark.parametrize(
    ("stored_alpha", "given", "scaling"),
    [(6.0, {}, 1.5), (None, {}, 1.0), (6.0, {"alpha": 2}, 0.5), (6.0, {"scaling": 3.0}, 3.0)],
)
@pytest.mark.parametrize("style", ["lora_down.weight", "lora.down.weight"])
def test_scalings_of_kohya(
    tmp_path: Path, stored_alpha: float | None, given: dict[str, float], scaling: float, style: str
) -> None:
    a, b = lora_pair(Q0)
    tensors = {f"{Q0}.{style}": a, f"{Q0}.{style.replace('down', 'up')}": b}
    if stored_alpha is not None:
        tensors[f"{Q0}.alpha"] = torch.tensor(stored_alpha, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "kohya.safetensors")
    assert scalings({"path": str(tmp_path / "kohya.safetensors"), **given}, tmp_path) == {Q0: scaling}


def test_scalings_of_mlx(tmp_path: Path) -> None:
    a, b = lora_pair(Q0)
    (tmp_path / "adapter").mkdir()
    tensors = {f"{Q0}.lora_a": a.T.contiguous(), f"{Q0}.lora_b": b.T.contiguous()}
    save_file(tensors, tmp_path / "adapter" / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "lora_parameters": {"scale": 20.0, "rank": 4}}
    write_json(tmp_path / "adapter" / "adapter_config.json", config)
    assert scalings({"path": str(tmp_path / "adapter")}, tmp_path) == {Q0: 20.0}


# --- the command line -------------------------------------------------------------------------------------------------


def invoke(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, ["verify", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def test_the_verdict(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    shardmerge.merge(place.config())
    result = invoke(place.output)
    words = [line.split()[:2] for line in result.stdout.splitlines()[:4]]
    assert words == [["structure", "ok"], ["checksums", "ok"], ["untouched", "ok"], ["touched", "ok"]]
    assert re.search(
        r"3 tensors, \d+ of 80 rows \(seed 0\) computed again in float64, all within the rounding", result.stdout
    )
    assert f"{place.output}: verified in" in result.stdout
    assert result.stderr.startswith("verifying:   0%, 0 B of ")
    assert "all rows computed again" in invoke(place.output, "--all").stdout
    assert "(seed 5)" in invoke(place.output, "--seed", "5", "--rows", "3").stdout
    quiet = invoke(place.output, "--quiet")
    assert quiet.stdout == quiet.stderr == ""


def test_the_verdict_as_json(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    shardmerge.merge(place.config())
    found = json.loads(invoke(place.output, "--json").stdout)
    assert (found["ok"], found["complete"], found["problems"], found["touched"]) == (True, True, [], 3)
    assert found["output"] == str(place.output)


def test_what_is_wrong_is_told_with_code_6(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    shardmerge.merge(place.config())
    write_peft(place.adapter, {name: 2 * tensor for name, tensor in peft_tensors().items()})
    result = invoke(place.output, code=6)
    assert "touched    WRONG" in result.stdout and "NOT what base and adapter make of it" in result.stdout
    assert "self_attn.q_proj.weight, row 0, column 0: holds" in result.stdout
    assert result.stderr.splitlines()[-4].startswith(f"shardmerge: {place.output}: 3 problems:")
    found = json.loads(invoke(place.output, "--json", code=6).stdout)
    problem = found["problems"][0]
    assert not found["ok"] and found["counts"] == {"touched": 3}
    assert problem["error"] > problem["allowed"] > 0 and problem["found"] != problem["expected"]
    assert {"kind", "tensor", "row", "column", "file", "text"} <= problem.keys()


def test_places_are_options(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    shardmerge.merge(place.config())
    for name in ("base", "adapter"):
        (tmp_path / name).rename(tmp_path / f"{name} 2")
    partly = invoke(place.output, code=6)
    assert "not verified: the base is not there" in partly.stdout and "--partial" in partly.stderr
    assert "--base says" in partly.stdout and "--adapter says" in partly.stdout
    assert "not verified: the base is not there" in invoke(place.output, "--partial").stdout
    found = json.loads(invoke(place.output, "--json", code=6).stdout)
    assert found["ok"] and not found["complete"] and len(found["unverified"]) == 4
    options: list[str | Path] = ["--base", tmp_path / "base 2", "--adapter", tmp_path / "adapter 2"]
    assert "verified in" in invoke(place.output, *options).stdout
    assert "2 adapters are given" in invoke(place.output, *options, *options[2:], code=2).stderr


def test_nothing_to_verify(tmp_path: Path) -> None:
    assert "no such directory" in invoke(tmp_path / "nowhere", code=5).stderr
    result = invoke(tmp_path, "--json", code=6)
    assert json.loads(result.stdout)["exit_code"] == 6 and "no shardmerge.json" in result.stderr


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Relative paths of the config are found from elsewhere, too."""
    place = make_place(tmp_path)
    config = write_json(tmp_path / "c.yaml", {"base": "base", "adapters": ["adapter"], "output": {"path": "merged"}})
    assert run_cli("run", config, cwd=tmp_path).returncode == 0
    done = run_cli("verify", "../merged", cwd=place.base)
    assert done.returncode == 0 and "touched    ok" in done.stdout, done.stderr
    shutil.rmtree(place.adapter)
    write_peft(place.adapter, {name: 2 * tensor for name, tensor in peft_tensors().items()})
    done = run_cli("verify", place.output)
    assert done.returncode == 6 and "Traceback" not in done.stderr


# --- a second opinion on headers --------------------------------------------------------------------------------------


def _asked(path: Path, tensors: dict[str, TensorInfo]) -> Findings:
    findings = Findings(str(path.parent), 0)
    ask_library(path, path.name, tensors, findings)
    return findings


def test_the_library_agrees_with_our_header_and_contradicts_a_wrong_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, path)
    right = {"a": TensorInfo("F32", (2, 3), (0, 24)), "b": TensorInfo("BF16", (4,), (24, 32))}
    assert not _asked(path, right).counts
    for wrong, text in (
        ({**right, "a": TensorInfo("F32", (3, 2), (0, 24))}, "reads a as F32 [2, 3], expected F32 [3, 2]"),
        ({**right, "b": TensorInfo("F16", (4,), (24, 32))}, "reads b as BF16 [4], expected F16 [4]"),
        ({"a": right["a"]}, "finds the tensor b"),
        ({**right, "c": right["b"]}, "does not find the tensor c"),
    ):
        assert [problem.text for problem in _asked(path, wrong).problems] == [
            f"model.safetensors: the safetensors library {text}"
        ]


def test_what_the_library_cannot_open(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x02" + bytes(7) + b"{]")
    assert "the safetensors library refuses it" in _asked(path, {}).problems[0].text
    text = b'{"a":{"dtype":"F99","shape":[0],"data_offsets":[0,0]}}  '
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    findings = _asked(path, {})
    assert not findings.counts and "cannot give a second opinion" in findings.notes[0]
    path.unlink()
    findings = _asked(path, {})
    assert not findings.counts and "cannot open it" in findings.notes[0]
