"""What is said of a wrong value: in our words, with what was probably meant; and settings that would do nothing."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from click.testing import CliRunner
from pydantic_core import core_schema
from safetensors import safe_open

import shardmerge
from shardmerge.cli.main import cli
from shardmerge.config.choices import DEVICE, DEVICES, Format, OutputDtype, Quantization
from shardmerge.config.problems import explain
from shardmerge.config.recorded import recorded_config
from shardmerge.config.schema import ExportConfig, MergeConfig
from shardmerge.config.suggestions import hint
from shardmerge.config.yaml_text import MAX_CONFIG_BYTES
from shardmerge.errors import ConfigError
from shardmerge.planning.planner import make_plan
from tests.support.builders import ROOT, contents, make_place, peft_config, random_tensor, write_peft
from tests.support.command_line import invoke
from tests.support.configs import DATA, problems
from tests.support.gguf_zoo import make as make_for_gguf

#: Words of pydantic's, of its messages and its addresses.
RAW = re.compile(r"Input should|valid (string|number|integer|boolean|dictionary|tuple)|pydantic|unable to|instance of")


def changed(place: str, value: object, **more: object) -> dict[str, Any]:
    """The smallest config with one key at another value; ``more`` are keys beside it."""
    section, _, key = place.rpartition(".")
    if section == "adapters.0":
        return {**DATA, "adapters": [{"path": "sft", **more, key: value}]}
    return {**DATA, section: {**DATA.get(section, {}), **more, key: value}} if section else {**DATA, key: value}


# --- what was meant ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "value", "meant"),
    [
        ("output.dtype", "bf16", "bfloat16"),
        ("output.dtype", "BF16", "bfloat16"),
        ("output.dtype", "torch.bfloat16", "bfloat16"),
        ("output.dtype", "fp16", "float16"),
        ("output.dtype", "half", "float16"),
        ("output.dtype", "f32", "float32"),
        ("output.dtype", "FLOAT32", "float32"),
        ("output.dtype", "flaot32", "float32"),
        ("output.dtype", "auto", "same"),
        ("compute.dtype", "bf16", "bfloat16"),
        ("compute.dtype", "double", "float64"),
        ("compute.device", "gpu", "cuda"),
        ("compute.device", "CUDA", "cuda"),
        ("compute.device", "cuda0", "cuda:0"),
        ("compute.device", "GPU:1", "cuda:1"),
        ("compute.device", "cuda:07", "cuda:7"),
        ("compute.max_memory", "Auto", "auto"),
        ("compute.threads", "Auto", "auto"),
        ("output.max_shard_size", "Same", "same"),
        ("output.quantization", "Q8_0", "q8_0"),
        ("output.quantization", "q8", "q8_0"),
        ("output.quantization", "fp16", "f16"),
        ("output.quantization", "bfloat16", "bf16"),
        ("output.format", "GGUF", "gguf"),
        ("output.format", "ollama", "gguf"),
        ("output.format", "hf", "safetensors"),
        ("output.rounding", "Stochastic", "stochastic"),
        ("adapters.0.format", "lora", "peft"),
        ("adapters.0.format", "pure_pytorch", "pure-pytorch"),
        ("adapters.0.format", "mlx-lm", "mlx"),
        ("adapters.0.expert_layout", "Unsloth", "unsloth"),
        ("tied", "untied", "untie"),
    ],
)
def test_what_was_meant(place: str, value: str, meant: str) -> None:
    more = {"format": "gguf"} if place == "output.quantization" else {}
    (told,) = problems(changed(place, value, **more))
    assert f"did you mean {meant}?" in told and told.startswith(f"{place}: ")
    assert MergeConfig.from_dict(changed(place, meant, **more))  # what is proposed is valid


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("compute.dtype", "float16"),  # no misspelt bfloat16
        ("compute.dtype", "half"),
        ("output.dtype", "float64"),
        ("compute.device", "mps"),
        ("compute.device", "tpu"),
        ("tied", "tied"),
        ("tied", True),
        ("output.dtype", 16),
        ("output.dtype", "x" * 5000),
    ],
)
def test_no_guess_where_none_is_safe(place: str, value: object) -> None:
    (told,) = problems(changed(place, value))
    assert "did you mean" not in told and "expected" in told


@pytest.mark.parametrize("value", ["Q4_K_M", "q4_k_s", "Q6_K", "IQ4_XS", "iq2_xxs", "TQ1_0"])
def test_k_quants_are_made_by_llama_cpp(value: str) -> None:
    for place in ("output.quantization", "output.dtype"):
        (told,) = problems(changed(place, value, format="gguf"))
        assert "llama-quantize" in told and "did you mean" not in told


def test_a_format_with_its_type_in_it() -> None:
    (told,) = problems(changed("output.format", "gguf-q8"))
    assert "write format: gguf and quantization: q8_0" in told
    (told,) = problems(changed("output.format", "gguf-Q4_K_M"))
    assert "llama-quantize" in told


@pytest.mark.parametrize("value", ["int8", "8bit", "fp8", "nf4", "gptq", "q4_0"])
def test_few_bits_are_ggufs(value: str) -> None:
    (told,) = problems(changed("output.dtype", value))
    assert "output.format: gguf and output.quantization" in told


@pytest.mark.parametrize("allowed", [get_args(OutputDtype), get_args(Quantization), get_args(Format), DEVICES], ids=str)
def test_every_guess_is_allowed(allowed: tuple[str, ...]) -> None:
    words = ["bf16", "f16", "fp32", "double", "q8", "int4", "gpu", "gpu3", "hf", "ggml", "none", "auto", "x", "", "é"]
    for word in words:
        guess = re.fullmatch(r"did you mean (.*)\?", hint(word, allowed))
        assert guess is None or guess[1] in allowed or (allowed == DEVICES and re.fullmatch(DEVICE, guess[1]))


# --- our words --------------------------------------------------------------------------------------------------------

_WRONG: list[object] = [None, True, 7, -1, 1.5, float("inf"), float("nan"), "", "wrong", b"x", [], [None], {}, {"a": 1}]
_PLACES = [
    *("base", "adapters", "output", "tied", "base_rounding", "compute"),
    *(f"adapters.0.{key}" for key in ("path", "weight", "format", "expert_layout", "prefix", "ignore_files")),
    *(f"adapters.0.{key}" for key in ("ignore_keys", "alpha", "scaling")),
    *(
        f"output.{key}"
        for key in ("path", "dtype", "max_shard_size", "rounding", "seed", "format", "quantization", "quantized")
    ),
    *("output.allow_config_loss", "output.sha256", "compute.device", "compute.dtype", "compute.max_memory"),
    "compute.threads",
]


@pytest.mark.parametrize("place", _PLACES)
def test_no_value_of_any_key_is_answered_in_pydantics_words(place: str) -> None:
    for value in _WRONG:
        try:
            MergeConfig.from_dict(changed(place, value))
        except ConfigError as error:
            assert not RAW.search(str(error)), error
            assert all(problem.startswith(place) for problem in error.problems), error
            if value is None and error.problems[0].startswith(f"{place}:"):
                assert "has no value" in error.problems[0]


def test_places_are_all_keys() -> None:
    told = MergeConfig.from_dict(DATA).model_dump()
    keys = {f"{section}.{key}" for section in ("output", "compute") for key in told[section]}
    assert set(_PLACES) == {*told, *keys, *(f"adapters.0.{key}" for key in told["adapters"][0])}


@pytest.mark.parametrize("kind", get_args(core_schema.ErrorType))
def test_no_type_of_pydantics_errors_is_answered_in_its_words(kind: str) -> None:
    """Every type that this pydantic has, those that a config cannot cause as well, with the text that it has for it."""
    told = explain({"type": kind, "loc": ("output", "dtype"), "msg": "Input should be what pydantic says"}, MergeConfig)
    assert told.startswith("output.dtype: ") and not RAW.search(told) and len(told) > len("output.dtype: ")


def test_text_that_yaml_took_for_a_number() -> None:
    (told,) = problems(changed("output.path", 2024))
    assert told == "output.path: expected text; in quotes it is text: '2024' (found 2024)"


def test_key_that_is_no_word() -> None:
    assert problems({**DATA, 7: 1}) == ["7: a key must be a word"]  # type: ignore[dict-item]


# --- settings without effect ------------------------------------------------------------------------------------------

_GGUF = {"format": "gguf"}


@pytest.mark.parametrize(
    ("key", "value", "beside"),
    [
        ("quantization", "q8_0", {}),
        ("quantization", "f16", {"format": "safetensors"}),
        ("allow_config_loss", True, {}),
        ("max_shard_size", "5GB", _GGUF),
        ("seed", 3, {}),
        ("seed", 3, {"rounding": "nearest"}),
        ("seed", 3, _GGUF),
    ],
)
def test_setting_without_effect(key: str, value: object, beside: dict[str, Any]) -> None:
    (told,) = problems(changed(f"output.{key}", value, **beside))
    assert told.startswith(f"output.{key}: ") and "no effect" in told and "remove it" in told
    # It is told beside what else is wrong.
    assert len(problems({**changed(f"output.{key}", value, **beside), "base": 7})) == 2


@pytest.mark.parametrize(
    ("key", "value", "beside"),
    [
        ("quantization", "q4_0", _GGUF),
        ("allow_config_loss", True, _GGUF),
        ("allow_config_loss", False, {}),
        ("max_shard_size", "same", _GGUF),
        ("max_shard_size", "5GB", {}),
        ("seed", 0, {}),
        ("seed", 3, {"rounding": "stochastic"}),
        ("seed", 3, {"rounding": "stochastic", **_GGUF}),
        ("rounding", "nearest", _GGUF),
        # What merged weights are rounded to before they are quantised: `test_dtype_matters_to_gguf`.
        ("dtype", "float32", _GGUF),
    ],
)
def test_setting_with_effect_or_at_its_default(key: str, value: object, beside: dict[str, Any]) -> None:
    MergeConfig.from_dict(changed(f"output.{key}", value, **beside))


def test_dtype_matters_to_gguf(tmp_path: Path) -> None:
    """Merged weights are rounded to it before they are quantised: what the config says of it is true."""
    base = make_for_gguf("mistral", tmp_path / "base", tmp_path)
    weight = "model.layers.0.self_attn.o_proj.weight"
    with safe_open(base / "model.safetensors", "pt") as file:
        rows, columns = file.get_slice(weight).get_shape()
    module = weight.removesuffix(".weight")
    names = [f"base_model.model.{module}.lora_{role}.weight" for role in "AB"]
    factors = dict(zip(names, (random_tensor((4, columns), 1), random_tensor((rows, 4), 2)), strict=True))
    adapter = write_peft(tmp_path / "adapter", factors, config=peft_config(target_modules=["o_proj"]))
    made = {}
    for dtype in ("same", "bfloat16", "float32"):
        output = {"path": str(tmp_path / dtype / "model"), "format": "gguf", "quantization": "f32", "dtype": dtype}
        shardmerge.merge({"base": str(base), "adapters": [str(adapter)], "output": output})
        made[dtype] = next((tmp_path / dtype / "model").glob("*.gguf")).read_bytes()
    assert made["same"] == made["bfloat16"] != made["float32"]


def test_layout_of_experts_that_are_not_there(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    with pytest.raises(shardmerge.PlanError, match="expert_layout has no effect"):
        shardmerge.plan(place.config(adapters=[{"path": str(place.adapter), "expert_layout": "unsloth"}]))
    shardmerge.plan(place.config(adapters=[{"path": str(place.adapter), "expert_layout": "peft"}]))


# --- a device that is not there ---------------------------------------------------------------------------------------


def test_plan_and_run_refuse_a_device_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = make_place(tmp_path).config_file(compute={"device": "cuda:1"})
    told = {command: invoke(monkeypatch, command, config, code=3).stderr for command in ("plan", "run")}
    assert told["plan"] == told["run"]
    assert "compute.device is cuda:1, but torch" in told["plan"] and "finds 1 CUDA devices here" in told["plan"]
    assert "cuda:0" in told["plan"]
    # To prove what a GPU has made takes none.
    assert make_plan(MergeConfig.from_file(config), check_output=False)


def test_record_has_every_key() -> None:
    """A record's config is the whole config; nobody asked for what it had no use for."""
    whole = MergeConfig.from_dict(DATA).model_dump(mode="json")
    assert whole["output"]["quantization"] == "q8_0"
    assert recorded_config(whole, "record") == MergeConfig.from_dict(DATA)
    export = ExportConfig.from_dict({"base": "b", "output": {"path": "o"}})
    assert recorded_config(export.model_dump(mode="json"), "record") == export


# --- problems as a list -----------------------------------------------------------------------------------------------


def test_problems_of_a_config_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_place(tmp_path).config_file(base=7, output={"dtype": "bf16"}, tied="x")
    told = json.loads(invoke(monkeypatch, "plan", config, "--json", code=2).stdout)
    assert told["error"] == "ConfigError" and [text.split(":")[0] for text in told["problems"]] == [
        "base",
        "output.dtype",
        "tied",
    ]


def test_every_error_has_a_list_of_problems() -> None:
    for kind in (shardmerge.FormatError, shardmerge.SourceError, shardmerge.OutputError, ConfigError):
        assert kind("x").problems == ("x",)
    error = ConfigError("two", ["a", "b"])
    assert error.problems == ("a", "b") == pickle.loads(pickle.dumps(error)).problems
    assert shardmerge.PlanError(["a", "b"]).problems == ("a", "b")


def test_many_problems_are_bounded() -> None:
    with pytest.raises(ConfigError) as raised:
        MergeConfig.from_dict({**DATA, **{f"k{number}": 1 for number in range(500)}})
    assert len(raised.value.problems) == 31 and raised.value.problems[-1] == "… and 470 more"


# --- a config on stdin ------------------------------------------------------------------------------------------------


def test_config_on_stdin(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    text = place.config_file().read_text()
    for command in ("plan", "run"):
        done = CliRunner().invoke(cli, [command, "-", "-s", "adapters.0.weight=2"], input=text)
        assert done.exit_code == 0, done.output
    record = json.loads((place.output / "shardmerge.json").read_text())
    assert record["config"]["adapters"][0]["weight"] == 2
    twice = [{"path": str(place.adapter), "weight": 2}]
    shardmerge.merge(place.config(adapters=twice, output={"path": str(tmp_path / "b")}))
    assert contents(place.output) == contents(tmp_path / "b")


def test_wrong_config_on_stdin() -> None:
    too_long = "#" * (MAX_CONFIG_BYTES + 1)
    for text, part in (
        ("base: 7", "base: expected text"),
        ("a: [", "not valid YAML"),
        (too_long, "this is not a config"),
    ):
        done = CliRunner().invoke(cli, ["plan", "-"], input=text)
        assert done.exit_code == 2 and part in done.stderr and "stdin" in done.stderr


def test_endless_stdin_is_not_read_to_its_end() -> None:
    with open("/dev/zero", "rb") as zero:
        command = [sys.executable, "-m", "shardmerge", "plan", "-"]
        done = subprocess.run(command, stdin=zero, capture_output=True, timeout=60, cwd=ROOT)
    assert done.returncode == 2 and b"this is not a config" in done.stderr
