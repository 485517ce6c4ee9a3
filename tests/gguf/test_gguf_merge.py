"""A merge straight into a GGUF file: byte for byte what converting the merged checkpoint gives, in the same memory.

That the merged checkpoint is PEFT's is shown elsewhere, for every architecture; here it is made by us.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import shardmerge
from shardmerge.config.recorded import recorded_config
from shardmerge.config.schema import ExportConfig
from shardmerge.errors import PlanError
from tests.support.builders import read_tensors, run_cli, write_json
from tests.support.gguf_merges import GgufModels, as_gguf, config
from tests.support.gguf_oracle import Converter, differences, shared_converter, write
from tests.support.gguf_zoo import KINDS, conversions
from tests.support.peft_oracle import least_memory

#: Models whose tokenizers are made here.
QUICK = [name for name, kind in KINDS.items() if kind.tokenizer == "spm"]


@pytest.fixture(scope="session")
def converter() -> Converter:
    return shared_converter()


@pytest.mark.parametrize(("kind", "quantization"), conversions(QUICK))
def test_the_file_is_that_of_the_converter(
    kind: str, quantization: str, gguf_models: GgufModels, converter: Converter, tmp_path: Path
) -> None:
    base, adapter = gguf_models(kind)
    ours = as_gguf(base, adapter, tmp_path / "Model", quantization)
    # The converter calls the model by its folder.
    shardmerge.merge(config(base, adapter, tmp_path / "model"))
    problem = converter.convert(tmp_path / "model", quantization, tmp_path / "theirs.gguf")
    assert problem is None, problem
    assert differences(ours, tmp_path / "theirs.gguf") == []


def test_a_base_that_is_rounded_first(gguf_models: GgufModels, tmp_path: Path) -> None:
    base, adapter = gguf_models("llama-spm")
    rounded = {"base_rounding": "nf4"}
    shardmerge.merge({**config(base, adapter, tmp_path / "Model", format="gguf", quantization="q8_0"), **rounded})
    shardmerge.merge({**config(base, adapter, tmp_path / "model"), **rounded})
    write(tmp_path / "model", "Q8_0", tmp_path / "whole.gguf", "Model")
    assert differences(tmp_path / "Model" / "Model-q8_0.gguf", tmp_path / "whole.gguf") == []
    assert differences(as_gguf(base, adapter, tmp_path / "plain" / "Model", "q8_0"), tmp_path / "whole.gguf") != []
    assert shardmerge.verify(tmp_path / "Model", rows=None).ok


@pytest.mark.parametrize("quantization", ["q4_0", "q5_1"])
@pytest.mark.parametrize("kind", ["llama-spm", "mixtral", "phi3"])
def test_tiles_do_not_show(kind: str, quantization: str, gguf_models: GgufModels, tmp_path: Path) -> None:
    """Nor does it matter that no whole tensor was ever in memory: the oracle quantises whole tensors."""
    base, adapter = gguf_models(kind)
    least = least_memory(config(base, adapter, tmp_path / "Model", format="gguf", quantization=quantization))
    ours = as_gguf(base, adapter, tmp_path / "Model", quantization, max_memory=least)
    shardmerge.merge(config(base, adapter, tmp_path / "model"))
    write(tmp_path / "model", quantization.upper(), tmp_path / "whole.gguf", "Model")
    assert differences(ours, tmp_path / "whole.gguf") == []


@pytest.mark.parametrize(
    ("kind", "dtype", "quantization"),
    [("llama3-rope", "float16", "f32"), ("llama-spm", "bfloat16", "f16"), ("gemma2", "float16", "q8_0")],
)
def test_the_dtype_in_between_shows(
    kind: str, dtype: str, quantization: str, gguf_models: GgufModels, tmp_path: Path
) -> None:
    """Also in what is stored as the file has it, and would not have to be rounded on the way."""
    base, adapter = gguf_models(kind)
    ours = as_gguf(base, adapter, tmp_path / "Model", quantization, dtype=dtype)
    shardmerge.merge(config(base, adapter, tmp_path / "model", dtype=dtype))
    write(tmp_path / "model", quantization.upper(), tmp_path / "whole.gguf", "Model")
    assert differences(ours, tmp_path / "whole.gguf") == []


@pytest.mark.parametrize(
    ("kind", "dtype", "quantization"),
    [("llama3-rope", "bfloat16", "q8_0"), ("mistral", "bfloat16", "q4_0"), ("llama-spm", "float64", "q5_1")],
)
def test_the_dtype_of_the_work_may_be_narrower_or_wider(
    kind: str, dtype: str, quantization: str, gguf_models: GgufModels, tmp_path: Path
) -> None:
    """What blocks are made of, float32, has its room all the same."""
    base, adapter = gguf_models(kind)
    for output in ("Model", "model"):
        options = {"format": "gguf", "quantization": quantization} if output == "Model" else {}
        settings = config(base, adapter, tmp_path / output, **options)
        settings["compute"] |= {"dtype": dtype}
        shardmerge.merge(settings)
    write(tmp_path / "model", quantization.upper(), tmp_path / "whole.gguf", "Model")
    assert differences(tmp_path / "Model" / f"Model-{quantization}.gguf", tmp_path / "whole.gguf") == []


def test_a_length_that_rows_beyond_the_file_count_in(gguf_models: GgufModels, tmp_path: Path) -> None:
    """DoRA's lengths of an embedding go down its rows, also those that no token means and that the file leaves out."""
    import peft
    import transformers

    source, _ = gguf_models("gemma3")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    settings = peft.LoraConfig(r=4, use_dora=True, target_modules=["embed_tokens"], init_lora_weights=False)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    base = shutil.copytree(source, tmp_path / "base")
    write_json(base / "config.json", {**json.loads((base / "config.json").read_text()), "vocab_size": 383})
    ours = as_gguf(base, tmp_path / "adapter", tmp_path / "Model", "f16", tied="peft")
    shardmerge.merge(config(base, tmp_path / "adapter", tmp_path / "model", tied="peft"))
    write(tmp_path / "model", "F16", tmp_path / "whole.gguf", "Model")
    assert differences(ours, tmp_path / "whole.gguf") == []


def test_a_vocabulary_of_the_adapter_that_gguf_cannot_hold(gguf_models: GgufModels, tmp_path: Path) -> None:
    """The base's tokenizer.model is not the adapter's, so it is left out, and the message says so."""
    base, adapter = gguf_models("gemma3")
    own = shutil.copytree(adapter, tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        write_json(own / name, {})
    with pytest.raises(shardmerge.PlanError) as raised:
        shardmerge.plan(config(base, own, tmp_path / "Model", format="gguf"))
    assert any("tokenizer.model is missing" in problem for problem in raised.value.problems)
    assert any(f"the tokenizer is the one of adapter {own}" in problem for problem in raised.value.problems)


def test_an_export_of_the_merge_is_the_merge(gguf_models: GgufModels, tmp_path: Path) -> None:
    base, adapter = gguf_models("llama-spm")
    ours = as_gguf(base, adapter, tmp_path / "one" / "Model", "q8_0")
    shardmerge.merge(config(base, adapter, tmp_path / "merged"))
    done = run_cli("export", tmp_path / "merged", "--format", "gguf", "-o", tmp_path / "two" / "Model")
    assert done.returncode == 0, done.stderr
    assert "ollama create model -f Modelfile" in done.stdout
    assert (tmp_path / "two" / "Model" / ours.name).read_bytes() == ours.read_bytes()


def test_an_export_retypes_and_reshards(gguf_models: GgufModels, tmp_path: Path) -> None:
    base, _ = gguf_models("llama-spm")
    done = run_cli("export", base, "--dtype", "bfloat16", "--max-shard-size", "100kB", "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["targets"] == 0
    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name].to(torch.bfloat16)) for name in before)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert run_cli("verify", tmp_path / "out").returncode == 0


def test_an_export_may_not_overwrite_its_model(gguf_models: GgufModels) -> None:
    base, _ = gguf_models("llama-spm")
    before = sorted(path.name for path in base.iterdir())
    done = run_cli("export", base, "--dtype", "bfloat16", "-o", base)
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert sorted(path.name for path in base.iterdir()) == before


def test_quantization_is_for_gguf_alone(gguf_models: GgufModels, tmp_path: Path) -> None:
    base, _ = gguf_models("llama-spm")
    done = run_cli("export", base, "--quantization", "q8_0", "-o", tmp_path / "out")
    assert done.returncode == 2 and "--format gguf" in done.stderr


def test_other_architectures_are_refused_by_name(tmp_path: Path, gguf_models: GgufModels) -> None:
    base, adapter = gguf_models("llama-spm")
    other = tmp_path / "base"
    other.mkdir()
    for path in base.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    settings = json.loads((base / "config.json").read_text())
    write_json(other / "config.json", {**settings, "model_type": "olmo", "architectures": ["OlmoForCausalLM"]})
    with pytest.raises(PlanError, match="OlmoForCausalLM"):
        shardmerge.plan(config(other, adapter, tmp_path / "out", format="gguf"))
    assert not (tmp_path / "out").exists()


def test_a_killed_merge_is_taken_up(gguf_models: GgufModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardmerge.destinations.local.directory import Commit

    base, adapter = gguf_models("llama-spm")
    whole = as_gguf(base, adapter, tmp_path / "whole" / "Model", "q8_0")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Commit, "run", stop)
        as_gguf(base, adapter, tmp_path / "Model", "q8_0")
    assert not list((tmp_path / "Model").glob("*.gguf"))
    report = shardmerge.merge(config(base, adapter, tmp_path / "Model", format="gguf"))
    assert report.shards_reused == 1
    assert (tmp_path / "Model" / whole.name).read_bytes() == whole.read_bytes()


def test_a_record_of_an_export_is_a_config_again(gguf_models: GgufModels, tmp_path: Path) -> None:
    base, _ = gguf_models("llama-spm")
    shardmerge.merge(ExportConfig.from_dict({"base": str(base), "output": {"path": str(tmp_path / "out")}}))
    record = json.loads((tmp_path / "out" / "shardmerge.json").read_text())
    assert record["config"]["adapters"] == []
    assert recorded_config(record["config"], "the record").output.path == str(tmp_path / "out")


def test_verify_knows_the_files_beside_it(gguf_models: GgufModels, tmp_path: Path) -> None:
    base, adapter = gguf_models("llama-spm")
    folder = as_gguf(base, adapter, tmp_path / "Model", "q8_0").parent
    with open(folder / "Modelfile", "a") as file:
        file.write("PARAMETER temperature 2\n")
    done = run_cli("verify", folder)
    assert done.returncode == 6 and "Modelfile was changed after the merge" in done.stderr, done.stderr
