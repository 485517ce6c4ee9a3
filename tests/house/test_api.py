"""The library as its users meet it: `plan`, `merge`, progress, the report and the record."""

from __future__ import annotations

import importlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_128_hexdigest

import shardmerge
from shardmerge import ConfigError, MergeConfig, MergePlan, MergeReport, PlanError, Progress
from shardmerge.spec.plans import jsonable
from tests.support.peft_oracle import (
    assert_same_bits,
    make_config,
    random,
    stored,
    weight_bytes,
    write_adapter,
    write_base,
)

TARGETS = [f"model.layers.{number}.mlp.down_proj" for number in range(3)]
A, B = random(2, 12, seed=8), random(20, 2, seed=9)


class StopError(Exception):
    pass


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    shards = [
        {f"{target}.weight": random(20, 12, seed=number), f"norm.{number}": random(7, seed=number)}
        for number, target in enumerate(TARGETS)
    ]
    base = write_base(tmp_path / "base", shards)
    (base / "tokenizer.json").write_text("{}")
    adapter = write_adapter(tmp_path / "adapter", dict.fromkeys(TARGETS, (A, B)))
    return make_config(tmp_path / "out", base, [adapter])


@pytest.fixture
def output(config: dict[str, Any]) -> Path:
    return Path(config["output"]["path"])


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shardmerge.__all__)
def test_what_is_announced_is_there(name: str) -> None:
    assert getattr(shardmerge, name) is not None


def test_all_is_sorted_and_star_imports_work() -> None:
    assert list(shardmerge.__all__) == sorted(shardmerge.__all__)
    names: dict[str, Any] = {}
    exec("from shardmerge import *", names)
    assert set(shardmerge.__all__) <= names.keys()


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"shardmerge.*no attribute 'unmerge'"):
        getattr(shardmerge, "unmerge")  # noqa: B009


def test_a_later_name_is_the_same_object_as_at_its_home() -> None:
    homes = {"merge": "api.library", "plan": "api.library", "MergePlan": "spec.plans"}
    for name, home in {**homes, "MergeReport": "reporting.merge_report"}.items():
        assert getattr(shardmerge, name) is getattr(importlib.import_module(f"shardmerge.{home}"), name)


def test_dir_shows_what_there_is_and_nothing_else() -> None:
    assert dir(shardmerge) == list(shardmerge.__all__)


# --- without a config -------------------------------------------------------------------------------------------------


def test_the_parts_of_a_merge_are_a_config(config: dict[str, Any], tmp_path: Path) -> None:
    place = {"path": tmp_path / "parts"}
    report = shardmerge.merge(base=tmp_path / "base", adapter=tmp_path / "adapter", output=place)
    assert report.targets == shardmerge.merge(config).targets == 3
    for shard in (tmp_path / "out").glob("*.safetensors"):
        assert (tmp_path / "parts" / shard.name).read_bytes() == shard.read_bytes()
    shardmerge.verify(report.output).raise_for_status()


def test_several_adapters_in_their_order(config: dict[str, Any], tmp_path: Path) -> None:
    entries: list[Any] = [{"path": str(tmp_path / "adapter"), "weight": 0.5}, tmp_path / "adapter"]
    plan = shardmerge.plan(base=tmp_path / "base", adapter=entries, output=tmp_path / "parts")
    assert [info.weight for info in plan.adapters] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "base"),
        ({"base": "b", "adapter": "a"}, "output"),
        ({"base": "b", "output": "o"}, "adapters"),
        ({"base": "b", "adapter": [], "output": "o"}, "adapters"),
    ],
)
def test_parts_that_are_missing_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        shardmerge.merge(**given)


def test_a_config_or_its_parts_and_not_both(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="but not both"):
        shardmerge.plan(config, base="b")
    with pytest.raises(ConfigError, match="a plan says already"):
        shardmerge.merge(shardmerge.plan(config), adapter=["a"])


def test_overwrite_is_obeyed_whatever_the_plan_was_made_with(config: dict[str, Any], output: Path) -> None:
    first, second = shardmerge.plan(config), shardmerge.plan({**config, "tied": "untie"})
    shardmerge.merge(first)
    with pytest.raises(shardmerge.ResumeError):
        shardmerge.merge(second)
    assert not shardmerge.merge(second, overwrite=True).shards_reused
    assert json.loads((output / "shardmerge.json").read_text())["config"]["tied"] == "untie"
    with pytest.raises(shardmerge.ResumeError):
        shardmerge.merge(shardmerge.plan(config, overwrite=True), overwrite=False)


def test_export_inspect_and_init(config: dict[str, Any], output: Path, tmp_path: Path) -> None:
    shardmerge.merge(config)
    report = shardmerge.export(output, {"path": tmp_path / "half", "dtype": "float16"})
    assert report.kind == "export" and report.merged_dtype == "float16"
    assert shardmerge.inspect(output)["updated_weights"] == 3
    text = shardmerge.init(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "other")
    path = tmp_path / "init.yaml"
    path.write_text(text)
    assert shardmerge.plan(path).base.location == str(tmp_path / "base")


def test_a_report_raises_when_it_is_asked_to(config: dict[str, Any], output: Path, tmp_path: Path) -> None:
    shardmerge.merge(config)
    report = shardmerge.verify(output, rows=4)
    assert report.raise_for_status() is report
    (tmp_path / "base").rename(tmp_path / "gone")
    report = shardmerge.verify(output, rows=4)
    assert report.ok and not report.complete and report.raise_for_status(partial=True) is report
    with pytest.raises(shardmerge.VerifyError, match="partial=True") as caught:
        report.raise_for_status()
    assert caught.value.report is report


# --- three lines ------------------------------------------------------------------------------------------------------


def test_three_lines(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(json.dumps(config))

    plan = shardmerge.plan("config.yaml")
    report = shardmerge.merge(plan)

    assert isinstance(plan, MergePlan) and isinstance(report, MergeReport)
    after, before = stored(Path(report.output)), stored(tmp_path / "base")
    expected = {name: tensor + (B @ A) * 1.5 if "mlp" in name else tensor for name, tensor in before.items()}
    assert_same_bits(after, expected)


@pytest.mark.parametrize("form", ["dict", "string", "path", "config", "plan"])
def test_a_merge_takes_every_form_of_a_config(form: str, config: dict[str, Any], output: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    forms: dict[str, Any] = {
        "dict": config,
        "string": str(path),
        "path": path,
        "config": MergeConfig.from_dict(config),
        "plan": shardmerge.plan(config),
    }
    report = shardmerge.merge(forms[form])
    assert report.output == str(output)
    assert len(weight_bytes(output)) == 4


def test_planning_writes_nothing(config: dict[str, Any], tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    shardmerge.plan(config)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_plan_that_was_sent_elsewhere_gives_the_same_bytes(config: dict[str, Any], output: Path) -> None:
    plan = shardmerge.plan(config)
    copy = pickle.loads(pickle.dumps(plan))
    assert copy == plan
    json.dumps(jsonable(plan))
    shardmerge.merge(copy)
    sent = weight_bytes(output)
    shardmerge.merge(config, overwrite=True)
    assert weight_bytes(output) == sent


def test_a_finished_output_is_refused_and_overwrite_replaces_it(config: dict[str, Any], output: Path) -> None:
    shardmerge.merge(config)
    before = weight_bytes(output)
    for call in (shardmerge.plan, shardmerge.merge):
        with pytest.raises(PlanError, match="already holds a finished merge"):
            call(config)
    doubled = {**config, "adapters": [{"path": config["adapters"][0], "weight": 2.0}]}
    shardmerge.merge(doubled, overwrite=True)
    assert weight_bytes(output) != before
    shardmerge.merge(shardmerge.plan(config, overwrite=True))
    assert weight_bytes(output) == before


def test_a_wrong_config_is_a_config_error(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adaptors"):
        shardmerge.merge({**config, "adaptors": []})
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        shardmerge.plan(tmp_path / "nowhere.yaml")


# --- progress ---------------------------------------------------------------------------------------------------------


def data_bytes(output: Path) -> int:
    return sum(tensor.nbytes for tensor in stored(output).values())


def test_progress_rises_from_nothing_to_the_total(config: dict[str, Any], output: Path) -> None:
    seen: list[Progress] = []
    shardmerge.merge(config, progress=seen.append)
    done = [progress.done for progress in seen]
    assert done == sorted(done)
    assert done[0] == 0
    assert {progress.total for progress in seen} == {data_bytes(output)} == {done[-1]}
    numbers = [progress.shard_number for progress in seen]
    assert numbers == sorted(numbers) and set(numbers) == {1, 2, 3}
    assert {progress.shards for progress in seen} == {3}
    for progress in seen:
        assert progress.shard == f"model-{progress.shard_number:05d}-of-00003.safetensors"


@pytest.mark.parametrize("kind", [StopError, KeyboardInterrupt], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("at", [0, 1, 4, -1], ids="call-{}".format)
def test_what_progress_raises_stops_the_merge_and_leaves_it_resumable(
    at: int, kind: type[BaseException], config: dict[str, Any], output: Path
) -> None:
    calls: list[Progress] = []
    shardmerge.merge({**config, "output": {"path": str(output) + "-whole"}}, progress=calls.append)
    error = kind("enough")
    last = range(len(calls))[at]
    count = 0

    def stop(progress: Progress) -> None:
        nonlocal count
        if count == last:
            raise error
        count += 1

    with pytest.raises(kind) as caught:
        shardmerge.merge(config, progress=stop)
    assert caught.value is error
    assert weight_bytes(output) == {}
    seen: list[Progress] = []
    report = shardmerge.merge(config, progress=seen.append)
    assert report.shards_reused == calls[last].shard_number - 1
    assert weight_bytes(output) == weight_bytes(Path(str(output) + "-whole"))
    # What an earlier run did is read, and then counted as done from the start.
    checked = [progress for progress in seen if progress.doing == "checking"]
    assert seen[: len(checked)] == checked and len({progress.shard for progress in checked}) == report.shards_reused
    assert not checked or checked[-1].done == checked[-1].total
    seen = seen[len(checked) :]
    finished = sum(tensor.nbytes for tensor in list(stored(output).values())) * report.shards_reused // 3
    assert (seen[0].done, seen[-1].done, seen[-1].total) == (finished, data_bytes(output), data_bytes(output))


# --- the report and the record ----------------------------------------------------------------------------------------


def sizes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", ["same", "bfloat16"])
def test_the_report_is_true(dtype: str, config: dict[str, Any], output: Path, tmp_path: Path) -> None:
    config["output"]["dtype"] = dtype
    plan = shardmerge.plan(config)
    report = shardmerge.merge(plan)
    assert report.output == str(output)
    assert sorted(report.files) == sorted(os.listdir(output))
    assert report.files[-1] == "model.safetensors.index.json"
    assert report.targets == 3
    assert report.adapter_bytes == sizes(tmp_path / "adapter")
    assert report.base_bytes == sizes(tmp_path / "base")
    assert report.merged_bytes == sizes(output)
    assert report.merged_dtype == ("float32" if dtype == "same" else dtype)
    assert report.shards_reused == 0
    assert report.bytes_read == data_bytes(tmp_path / "base") + 3 * (A.nbytes + B.nbytes)
    aux = sum((output / name).stat().st_size for name in ("config.json", "tokenizer.json"))
    assert report.bytes_written == plan.bytes_written == sizes(output) + aux
    assert 0 < report.seconds < 3600
    assert report.peak_memory_bytes > 10**7
    assert report.warnings == plan.warnings
    expected = json.loads(json.dumps(jsonable(report)))
    older = {"peak_memory": report.peak_memory_bytes, "sizes": dict(report.sizes_bytes)}
    expected |= {**older, "working_set": report.working_set_bytes}
    assert {**report.to_json(), "fidelity": None} == {**expected, "fidelity": None, "notices": []}


def test_the_record_says_what_was_merged(config: dict[str, Any], output: Path, tmp_path: Path) -> None:
    plan = shardmerge.plan(config)
    report = shardmerge.merge(plan)
    record = json.loads((output / "shardmerge.json").read_text())
    assert record["shardmerge"] == shardmerge.__version__
    assert len(record["digest"]) == 64
    assert record["files"] == list(report.files)
    assert record["config"]["base"] == str(tmp_path / "base")
    assert record["shards"] == {
        path.name: {"bytes": path.stat().st_size, "xxh3_128": xxh3_128_hexdigest(path.read_bytes())}
        for path in output.glob("*.safetensors")
    }
    update = {"adapter": 0, "family": "lora", "rank": 2, "scaling": 1.5}
    assert record["targets"] == {f"{name}.weight": [{**update, "module": f"{name}.weight"}] for name in TARGETS}
    assert [info["location"] for info in record["adapters"]] == config["adapters"]
    fingerprints = {file["uri"]: file["size"] for file in record["base"]["files"]}
    assert fingerprints == {str(path): path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors")}


def test_the_working_set_is_what_was_asked_for(config: dict[str, Any]) -> None:
    config["compute"]["max_memory"] = "11MB"
    assert shardmerge.plan(config).memory.total <= 11 * 10**6
    config["compute"]["max_memory"] = 1000
    with pytest.raises(PlanError, match=r"max_memory is 1,000 bytes.*needs [\d,]+"):
        shardmerge.plan(config)
