"""The config: sizes, YAML, overrides, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardmerge.config.schema import MergeConfig, parse_size
from tests.support.configs import BOUND, DATA, GOOD, from_text, problems, refusal

# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        ("1", 1),
        ("100B", 100),
        ("256MB", 256_000_000),
        ("256mb", 256_000_000),
        ("256M", 256_000_000),
        ("5GB", 5_000_000_000),
        (" 5 GB ", 5_000_000_000),
        ("1.5GiB", 3 << 29),
        ("1.5 gib", 3 << 29),
        ("2KiB", 2048),
        ("2Ki", 2048),
        ("0.5kB", 500),
        ("3TB", 3_000_000_000_000),
        (4096.0, 4096),
    ],
    ids=repr,
)
def test_size(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        0,
        -1,
        "0",
        "0.0MB",
        "-5GB",
        "",
        "GB",
        "5 XB",
        "5PB",
        "1e9",
        "1,5GB",
        "5GBs",
        "auto",
        None,
        True,
        [],
        float("inf"),
    ],
    ids=repr,
)
def test_no_size(text: object) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_size_beyond_all_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size("9" * 400 + "GB")


# --- what is accepted -------------------------------------------------------------------------------------------------


def test_defaults(tmp_path: Path) -> None:
    config = from_text(tmp_path, GOOD)
    assert config == MergeConfig.from_dict(DATA)
    assert config.model_dump() == {
        "base": "models/tiny",
        "adapters": (
            {
                "path": "sft",
                "weight": 1.0,
                "format": "auto",
                "expert_layout": "auto",
                "prefix": None,
                "ignore_files": (),
                "ignore_keys": (),
                "alpha": None,
                "scaling": None,
            },
        ),
        "tied": "auto",
        "base_rounding": "none",
        "output": {
            "path": "merged",
            "dtype": "same",
            "max_shard_size": "same",
            "format": "safetensors",
            "quantization": "q8_0",
            "rounding": "nearest",
            "quantized": "auto",
            "seed": 0,
            "allow_config_loss": False,
            "sha256": False,
        },
        "compute": {"device": "auto", "dtype": "float32", "max_memory": "auto", "threads": "auto"},
    }


@pytest.mark.parametrize(
    "adapters",
    ["sft", ["sft"], {"path": "sft"}, [{"path": "sft"}]],
    ids=["bare string", "list of strings", "bare mapping", "list of mappings"],
)
def test_short_forms_of_an_adapter(adapters: object) -> None:
    assert MergeConfig.from_dict({**DATA, "adapters": adapters}) == MergeConfig.from_dict(DATA)


def test_adapters_keep_their_order() -> None:
    config = MergeConfig.from_dict({**DATA, "adapters": ["z", {"path": "a", "weight": -0.5}, "m"]})
    assert [(adapter.path, adapter.weight) for adapter in config.adapters] == [("z", 1.0), ("a", -0.5), ("m", 1.0)]


def test_number_that_yaml_takes_for_text(tmp_path: Path) -> None:
    """YAML 1.1 wants a point in 1e-3; whoever leaves it out means the number all the same."""
    text = GOOD.replace("path: sft", "path: sft\n    weight: 1e-3")
    assert from_text(tmp_path, text).adapters[0].weight == 0.001


def test_is_frozen() -> None:
    config = MergeConfig.from_dict(DATA)
    with pytest.raises(ValueError, match="frozen"):
        config.base = "other"


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_devices(device: str) -> None:
    assert MergeConfig.from_dict({**DATA, "compute": {"device": device}}).compute.device == device


# --- what is refused --------------------------------------------------------------------------------------------------


TOP = "base, adapters, output, tied, base_rounding, compute"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"bse": "x"}, ["bse: there is no such key", "did you mean base?", f"valid are {TOP}"]),
        ({"zzzzz": 1}, [f"zzzzz: there is no such key; valid are {TOP}"]),
        (
            {"adapters": [{"path": "a", "wieght": 1}]},
            [
                "adapters.0.wieght",
                "mean weight?",
                "path, weight, format, expert_layout, prefix, ignore_files, ignore_keys, alpha, scaling",
            ],
        ),
        ({"adapters": ["a", {"path": "b", "rank": 1}]}, ["adapters.1.rank: there is no such key; valid are path"]),
        (
            {"output": {"path": "o", "dtpye": "same"}},
            ["output.dtpye", "mean dtype?", "valid are path, dtype, max_shard_size"],
        ),
        (
            {"compute": {"max_mem": 1}},
            ["compute.max_mem", "mean max_memory?", "valid are device, dtype, max_memory, threads"],
        ),
    ],
    ids=["top", "nothing near", "adapter", "second adapter", "output", "compute"],
)
def test_unknown_key_lists_the_valid_ones(change: dict[str, Any], parts: list[str]) -> None:
    told = "\n".join(problems({**DATA, **change}))
    for part in parts:
        assert part in told
    assert ("did you mean" in told) == any("mean" in part for part in parts)


@pytest.mark.parametrize(
    ("change", "start"),
    [
        ({"base": ""}, "base: "),
        ({"base": 7}, "base: "),
        ({"base": None}, "base: "),
        ({"adapters": []}, "adapters: "),
        ({"adapters": None}, "adapters: "),
        ({"adapters": [""]}, "adapters.0.path: "),
        ({"adapters": [7]}, "adapters.0: "),
        ({"adapters": [{"weight": 2}]}, "adapters.0.path: is missing"),
        ({"adapters": [{"path": "a", "weight": "heavy"}]}, "adapters.0.weight: "),
        ({"adapters": [{"path": "a", "weight": float("nan")}]}, "adapters.0.weight: "),
        ({"adapters": [{"path": "a", "weight": float("inf")}]}, "adapters.0.weight: "),
        ({"adapters": [{"path": "a", "weight": True}]}, "adapters.0.weight: "),
        ({"adapters": [{"path": "a", "alpha": float("inf")}]}, "adapters.0.alpha: "),
        ({"adapters": [{"path": "a", "alpha": True}]}, "adapters.0.alpha: "),
        ({"adapters": [{"path": "a", "scaling": float("-inf")}]}, "adapters.0.scaling: "),
        ({"adapters": [{"path": "a", "alpha": 1, "scaling": 2}]}, "adapters.0: give alpha or scaling, not both"),
        ({"adapters": [{"path": "a", "format": "lycoris"}]}, "adapters.0.format: "),
        ({"output": {"path": ""}}, "output.path: "),
        ({"output": {}}, "output.path: is missing"),
        ({"output": "merged"}, "output: "),
        ({"output": None}, "output: "),
        ({"output": {"path": "o", "dtype": "int8"}}, "output.dtype: "),
        ({"output": {"path": "o", "max_shard_size": "big"}}, "output.max_shard_size: 'big' is not a size"),
        ({"output": {"path": "o", "max_shard_size": 0}}, "output.max_shard_size: 0 is not a size"),
        ({"compute": {"device": "tpu"}}, "compute.device: "),
        ({"compute": {"device": "cuda:one"}}, "compute.device: "),
        ({"compute": {"device": "cuda:07"}}, "compute.device: "),
        ({"compute": {"device": "cuda:300"}}, "compute.device: "),
        ({"compute": {"dtype": "float16"}}, "compute.dtype: "),
        ({"compute": {"max_memory": "lots"}}, "compute.max_memory: 'lots' is not a size"),
        *(
            ({"compute": {"threads": threads}}, f"compute.threads: {threads!r} is not a number from 1 to 1024, or auto")
            for threads in (0, -1, 1025, 2.5, True, "many", "2.0")
        ),
        ({"compute": {"max_memory": "9" * 400 + "GB"}}, "compute.max_memory: "),
        ({"compute": []}, "compute: "),
    ],
    ids=lambda value: repr(value)[:48] if isinstance(value, dict) else value[:24],
)
def test_wrong_value_is_the_one_problem(change: dict[str, Any], start: str) -> None:
    (told,) = problems({**DATA, **change})
    assert told.startswith(start)


@pytest.mark.parametrize("key", ["base", "adapters", "output"])
def test_missing_section(key: str) -> None:
    assert problems({name: value for name, value in DATA.items() if name != key}) == [f"{key}: is missing"]


def test_found_value_is_named() -> None:
    assert problems({**DATA, "output": {"path": "o", "dtype": "int8"}})[0].endswith("(found 'int8')")


def test_all_problems_at_once() -> None:
    told = problems(
        {
            "base": 7,
            "adapters": [{"path": "a", "weight": "x"}, {"path": "b", "size": 1}],
            "output": {"path": "o", "dtype": "int8", "max_shard_size": "big"},
            "compute": {"device": "tpu"},
            "extra": 1,
        }
    )
    places = {line.split(":")[0] for line in told}
    assert places == {
        "base",
        "adapters.0.weight",
        "adapters.1.size",
        "output.dtype",
        "output.max_shard_size",
        "compute.device",
        "extra",
    }


# --- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("base=other", {"base": "other"}),
        ("base=a=b", {"base": "a=b"}),
        ("output.path=/mnt/x", {"output": {"path": "/mnt/x"}}),
        ("output.dtype=bfloat16", {"output": {"path": "merged", "dtype": "bfloat16"}}),
        ("compute.max_memory=64MB", {"compute": {"max_memory": 64_000_000}}),
        ("compute.threads=4", {"compute": {"threads": 4}}),
        ("adapters=other", {"adapters": "other"}),
        ("adapters=[a, b]", {"adapters": ["a", "b"]}),
        ("adapters=[{path: a, weight: 2}]", {"adapters": [{"path": "a", "weight": 2}]}),
        ("adapters.0=other", {"adapters": ["other"]}),
        ("adapters.0.weight=0.5", {"adapters": [{"path": "sft", "weight": 0.5}]}),
        ("compute={dtype: float64}", {"compute": {"dtype": "float64"}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "becomes",
)
def test_override(tmp_path: Path, override: str, change: dict[str, Any]) -> None:
    assert from_text(tmp_path, GOOD, [override]) == MergeConfig.from_dict({**DATA, **change})


def test_later_override_wins(tmp_path: Path) -> None:
    assert from_text(tmp_path, GOOD, ["base=x", "base=y"]).base == "y"


@pytest.mark.parametrize(
    "adapters", ["adapters: [other, sft]", "adapters:\n  - other\n  - path: sft"], ids=["strings", "mixed"]
)
def test_override_below_a_bare_string(tmp_path: Path, adapters: str) -> None:
    text = f"base: b\n{adapters}\noutput: {{path: o}}\n"
    config = from_text(tmp_path, text, ["adapters.0.weight=2", "adapters.1.weight=3"])
    assert [(adapter.path, adapter.weight) for adapter in config.adapters] == [("other", 2.0), ("sft", 3.0)]


@pytest.mark.parametrize("adapters", ["sft", "{path: sft}"], ids=["string", "mapping"])
def test_override_below_the_only_adapter(tmp_path: Path, adapters: str) -> None:
    config = from_text(tmp_path, f"base: b\nadapters: {adapters}\noutput: {{path: o}}\n", ["adapters.0.weight=2"])
    assert [(adapter.path, adapter.weight) for adapter in config.adapters] == [("sft", 2.0)]


def test_override_in_an_empty_section(tmp_path: Path) -> None:
    assert from_text(tmp_path, GOOD + "compute:\n", ["compute.device=cpu"]).compute.device == "cpu"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("base", "write it as key.path=value"),
        ("=x", "write it as key.path=value"),
        ("adapters.1.weight=2", "'1' is not a number from 0 to 0"),
        ("adapters.-1=x", "'-1' is not a number"),
        ("adapters.first=x", "'first' is not a number"),
        ("base.path=x", "not a section"),
        ("base.path.x=x", "nothing can be set below 'path'"),
        ("output.pth=x", "output.pth: there is no such key"),
        ("output..path=x", "output.: there is no such key"),
        ("output.path=[", "not valid YAML"),
        ("output.path=!!python/name:os.system", "not valid YAML"),
        ("output={[a]: 1}", "not valid YAML"),
        ("output.path=!!timestamp 2020-13-45", "not valid YAML"),
        ("output.path=!!bool x", "not valid YAML"),
        ("output.path=" + "[" * 1500, "not valid YAML"),
        ("output={path: a, path: b}", "stands twice"),
    ],
    ids=lambda value: value[:40],
)
def test_wrong_override(tmp_path: Path, override: str, part: str) -> None:
    message = refusal(lambda: from_text(tmp_path, GOOD, [override]))
    assert part in message
    assert len(message) < BOUND
