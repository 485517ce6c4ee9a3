"""`inference.comparison.comparing`: right merges are the same, wrong ones are not; what cannot be compared is refused
by name.

Tiny random models answer, with PEFT as what they are compared with; at the end stands a real one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import shutil
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

import shardmerge
from shardmerge.cli.main import cli
from shardmerge.config.schema import AdapterConfig
from shardmerge.errors import ConfigError, FormatError, PlanError, ShardmergeError, SourceError
from shardmerge.file_formats.adapter_opening import open_adapter
from shardmerge.inference import hf
from shardmerge.inference.comparison import comparing, figures
from shardmerge.inference.comparison.attached import attach
from shardmerge.inference.comparison.comparing import compare
from shardmerge.inference.comparison.figures import Answer, Comparison, Reference, describe, measure, parting
from shardmerge.sources.source import open_source
from tests.conftest import ROOT
from tests.support.builders import run_python, slow_but, write_json, write_shards
from tests.support.talkers import save_model, word_tokenizer
from tests.support.tampering import sealed

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ("word1 word2 word3", "word7")
TARGETS = ["q_proj", "v_proj", "down_proj"]
RANK, ALPHA = 4, 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, with a generation_config.json that asks for what is not greedy."""
    asked: dict[str, Any] = {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.5, "max_length": 9}
    return save_model(tmp_path_factory.mktemp("base"), word_tokenizer(), **asked)


def write_adapter(base: Path, folder: Path, config: Any = None, seed: int = 1) -> Path:
    """A PEFT adapter whose trained numbers are random, and large enough to show."""
    config = config or peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    config.task_type = "CAUSAL_LM"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = peft.get_peft_model(model, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(base, tmp_path_factory.mktemp("adapter"))


def merge(base: Path, output: Path, *adapters: Any, dtype: str = "float32") -> Path:
    entries = [str(entry) if isinstance(entry, Path) else entry for entry in adapters]
    shardmerge.merge({"base": str(base), "adapters": entries, "output": {"path": str(output), "dtype": dtype}})
    return output


@pytest.fixture(scope="module")
def merged(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge(base, tmp_path_factory.mktemp("merged") / "out", adapter)


def told(output: Path, **options: Any) -> Comparison:
    return compare(output, prompts=PROMPTS, max_new_tokens=6, **options)


def assert_exact(found: Comparison) -> None:
    """Nothing but float32's own noise, and an adapter that shows."""
    assert found.same, found.differences
    assert not found.rounded
    assert [answer.parts_at for answer in found.answers] == [None, None]
    assert found.figures["kl"] < 1e-9 < 1e-4 < found.figures["adapter_kl"]
    assert found.figures["effect"] == pytest.approx(1, abs=1e-4)
    assert found.notes == []


def rewritten(adapter: Path, folder: Path, **changes: Any) -> Path:
    """A copy of an adapter with another config."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_config.json"
    write_json(file, {**json.loads(file.read_text()), **changes})
    return folder


# --- right and wrong --------------------------------------------------------------------------------------------------


def test_merged_in_float32(merged: Path) -> None:
    found = told(merged)
    assert_exact(found)
    assert found.figures["top1_agreement"] == 1
    assert found.figures["largest_logit_difference"] < 1e-3 * found.figures["logit_spread"]
    assert [answer.prompt for answer in found.answers] == list(PROMPTS)
    assert all(answer.expected == answer.found != "" for answer in found.answers)


def test_merged_in_bfloat16(base: Path, adapter: Path, tmp_path: Path) -> None:
    found = told(merge(base, tmp_path / "out", adapter, dtype="same"))
    assert found.same, found.differences
    assert found.rounded
    assert 1e-9 < found.figures["kl"] < 0.01 * found.figures["adapter_kl"]


@pytest.mark.slow
def test_computing_in_bfloat16(merged: Path) -> None:
    found = told(merged, dtype="bfloat16")
    assert found.rounded
    assert found.figures["kl"] > 1e-9


@pytest.mark.parametrize("factor", slow_but([1.05, 0.5, 2.0], 1.05))
def test_a_wrong_scaling(merged: Path, adapter: Path, tmp_path: Path, factor: float) -> None:
    other = rewritten(adapter, tmp_path / "other", lora_alpha=ALPHA / factor)
    found = told(merged, adapters=[str(other)])
    assert not found.same
    assert (found.figures["effect"] > 1) == (factor > 1)
    if factor == 1.05:
        assert found.figures["effect"] == pytest.approx(factor, abs=0.02)


def test_a_wrong_scaling_in_bfloat16(base: Path, adapter: Path, tmp_path: Path) -> None:
    output = merge(base, tmp_path / "out", adapter, dtype="same")
    other = rewritten(adapter, tmp_path / "other", lora_alpha=ALPHA / 1.2)
    assert not told(output, adapters=[str(other)]).same


@pytest.mark.slow
def test_the_base_in_the_merged_models_place(base: Path, merged: Path, tmp_path: Path) -> None:
    shutil.copytree(merged, tmp_path / "out")
    shutil.copy(base / "model.safetensors", tmp_path / "out")
    found = told(tmp_path / "out")
    assert found.figures["effect"] == pytest.approx(0, abs=1e-3)
    assert found.figures["kl_share"] == pytest.approx(1, abs=1e-3)
    assert not found.same


def test_an_adapter_that_does_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    nothing = rewritten(adapter, tmp_path / "nothing", lora_alpha=1e-30)
    found = told(merge(base, tmp_path / "out", nothing))
    assert found.same
    assert found.figures["effect"] is None
    assert "hardly shows" in found.notes[0]
    assert "hardly shows" in describe(found)


METHODS: Mapping[str, Callable[[], Any]] = {
    "DoRA": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_dora=True),
    "saved module": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"]),
    "tokens": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, trainable_token_indices=[3, 5]),
    "IA3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "OFT": lambda: peft.OFTConfig(oft_block_size=8, target_modules=TARGETS),
    "shared vectors": lambda: peft.VBLoRAConfig(num_vectors=16, vector_length=8, topk=2, r=4, target_modules=TARGETS),
}


@pytest.mark.parametrize("method", slow_but(METHODS, "DoRA", "saved module"))
def test_methods_that_peft_loads(base: Path, tmp_path: Path, method: str) -> None:
    assert_exact(told(merge(base, tmp_path / "out", write_adapter(base, tmp_path / "adapter", METHODS[method]()))))


# --- adapters without a config of PEFT's ------------------------------------------------------------------------------


def pairs(adapter: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, in) and B (out, r) by module."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    both = {name: (tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]) for name in modules}
    return {name.removeprefix("base_model.model."): pair for name, pair in both.items()}


def flat(adapter: Path, a: str, b: str, *, transposed: bool) -> dict[str, Tensor]:
    result = {}
    for module, pair in pairs(adapter).items():
        for name, tensor in zip((a, b), pair, strict=True):
            result[f"{module}.{name}"] = (tensor.T if transposed else tensor).contiguous()
    return result


def as_pure(adapter: Path, folder: Path) -> dict[str, Any]:
    torch.save(flat(adapter, "A", "B", transposed=True), folder / "adapter.pt")
    return {"path": str(folder / "adapter.pt"), "scaling": ALPHA / RANK}


def as_pure_with_alpha(adapter: Path, folder: Path) -> dict[str, Any]:
    return {"path": as_pure(adapter, folder)["path"], "alpha": ALPHA}


def as_bare(adapter: Path, folder: Path) -> dict[str, Any]:
    tensors = flat(adapter, "lora_A.weight", "lora_B.weight", transposed=False)
    save_file(tensors, folder / "adapter.safetensors")
    return {"path": str(folder / "adapter.safetensors"), "alpha": ALPHA}


def as_mlx(adapter: Path, folder: Path) -> dict[str, Any]:
    (folder / "mlx").mkdir()
    save_file(flat(adapter, "lora_a", "lora_b", transposed=True), folder / "mlx" / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "lora_parameters": {"scale": ALPHA / RANK, "rank": RANK}}
    write_json(folder / "mlx" / "adapter_config.json", config)
    return {"path": str(folder / "mlx")}


FORMATS = [as_pure, as_pure_with_alpha, as_bare, as_mlx]


@pytest.mark.parametrize("write", slow_but(FORMATS, as_mlx), ids=lambda write: write.__name__)
def test_formula(
    base: Path, adapter: Path, merged: Path, tmp_path: Path, write: Callable[[Path, Path], dict[str, Any]]
) -> None:
    found = told(merge(base, tmp_path / "out", write(adapter, tmp_path)))
    assert_exact(found)
    # The same adapter as PEFT loads it.
    assert found.figures["adapter_kl"] == pytest.approx(told(merged).figures["adapter_kl"], rel=1e-4)


def test_formula_with_a_wrong_scaling(base: Path, adapter: Path, tmp_path: Path) -> None:
    output = merge(base, tmp_path / "out", as_pure(adapter, tmp_path))
    record = json.loads((output / "shardmerge.json").read_text())
    record["config"]["adapters"][0]["scaling"] *= 1.1
    write_json(output / "shardmerge.json", sealed(record))
    assert not told(output).same


# --- files of strangers -----------------------------------------------------------------------------------------------


class Runs:
    """Unpickled, it makes a folder."""

    def __init__(self, witness: Path) -> None:
        self.witness = str(witness)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.witness,)


def as_bin(adapter: Path, folder: Path) -> Path:
    shutil.copytree(adapter, folder)
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    return folder


def bomb(folder: Path, witness: Path) -> None:
    """It is one: who unpickles it makes the witness."""
    torch.save({"a": torch.ones(1), "b": Runs(witness)}, folder / "adapter_model.bin")
    torch.load(folder / "adapter_model.bin", weights_only=False)
    witness.rmdir()


@pytest.mark.slow
def test_a_bin_is_the_same(merged: Path, adapter: Path, tmp_path: Path) -> None:
    assert told(merged, adapters=[str(as_bin(adapter, tmp_path / "bin"))]).same


def test_nobody_unpickles_what_a_bin_holds(merged: Path, adapter: Path, tmp_path: Path) -> None:
    folder, witness = as_bin(adapter, tmp_path / "bin"), tmp_path / "witness"
    bomb(folder, witness)
    result = CliRunner().invoke(cli, ["compare", str(merged), "--adapter", str(folder), "--prompt", "word1"])
    assert result.exit_code == FormatError.exit_code and "needs more than tensors" in result.stderr, result.output
    assert not witness.exists()


def test_nor_does_peft(base: Path, adapter: Path, tmp_path: Path) -> None:
    """It is given a file that was in order when shardmerge looked at it."""
    folder, witness = as_bin(adapter, tmp_path / "bin"), tmp_path / "witness"
    opened = open_adapter(open_source(str(folder)))
    bomb(folder, witness)
    model = hf.load_model(str(base), "float32")
    with pytest.raises(ConfigError, match=r"PEFT cannot load this adapter: UnpicklingError: Weights only load failed"):
        attach(model, [(opened, AdapterConfig(path=str(folder)))], model.config.vocab_size)
    assert not witness.exists()


def test_peft_imports_no_module_of_a_strangers(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", {**config, "megatron_config": {"a": 1}, "megatron_core": "strange"})
    (tmp_path / "strange.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'witness')!r})\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    output = merge(base, tmp_path / "out", folder)
    with pytest.raises(ConfigError, match=r"PEFT would import the module that its megatron_core names, 'strange'"):
        told(output)
    assert not (tmp_path / "witness").exists()


# --- adapters together ------------------------------------------------------------------------------------------------


def test_several_adapters_with_weights(base: Path, adapter: Path, tmp_path: Path) -> None:
    """PEFT's layers add them up, and the formula adds to that."""
    second = write_adapter(base, tmp_path / "second", seed=2)
    third = as_pure(write_adapter(base, tmp_path / "third", seed=3), tmp_path) | {"weight": -0.7}
    entries = [{"path": str(adapter), "weight": 0.5}, {"path": str(second), "weight": 1.5}, third]
    assert_exact(told(merge(base, tmp_path / "out", *entries)))


def test_resized_vocabulary(base: Path, tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["more", "words"])
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    output = merge(base, tmp_path / "out", tmp_path / "adapter")
    found = compare(output, prompts=["word1 more words"], max_new_tokens=4)
    assert found.same, found.differences
    assert found.figures["kl"] < 1e-9


# --- more than one file -----------------------------------------------------------------------------------------------


def test_an_adapter_in_shards(base: Path, adapter: Path, tmp_path: Path) -> None:
    """PEFT itself loads one file only."""
    sharded = rewritten(adapter, tmp_path / "sharded")
    tensors = load_file(sharded / "adapter_model.safetensors")
    (sharded / "adapter_model.safetensors").unlink()
    write_shards(sharded, tensors, 3, stem="adapter_model")
    assert_exact(told(merge(base, tmp_path / "out", sharded)))


def test_weights_trained_in_full_beside_it(base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = rewritten(adapter, tmp_path / "adapter")
    layer = "base_model.model.model.layers.0"
    norm = torch.rand(32) + 1
    torch.save({f"{layer}.input_layernorm.weight": norm}, folder / "non_lora_state_dict.bin")
    output = merge(base, tmp_path / "out", folder)
    assert_exact(told(output))
    torch.save({f"{layer}.input_layernorm.weight": norm * 1.5}, folder / "non_lora_state_dict.bin")
    assert not told(output).same
    shutil.copytree(folder, tmp_path / "other")
    torch.save({"v_head.weight": torch.ones(1)}, tmp_path / "other" / "value_head.bin")
    with pytest.raises(ConfigError, match=r"value_head.bin: transformers' model has no weight v_head.weight"):
        told(output, adapters=[str(tmp_path / "other")])


# --- what is refused --------------------------------------------------------------------------------------------------


def refusal(output: Path, **options: Any) -> str:
    with pytest.raises(ShardmergeError) as caught:
        told(output, **options)
    assert isinstance(caught.value, ConfigError)
    return str(caught.value)


def test_dora_is_not_added_to_another(base: Path, adapter: Path, tmp_path: Path) -> None:
    dora = write_adapter(base, tmp_path / "dora", METHODS["DoRA"]())
    message = refusal(merge(base, tmp_path / "out", adapter, dora))
    assert "DoRA does more than add to the base" in message
    assert "`shardmerge verify` checks such a merge" in message


def test_a_weight_that_peft_has_not(base: Path, tmp_path: Path) -> None:
    vera = write_adapter(base, tmp_path / "vera", peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    message = refusal(merge(base, tmp_path / "out", {"path": str(vera), "weight": 0.5}))
    assert "PEFT has no weight for VERA, found 0.5" in message


def test_a_weight_of_loha(base: Path, tmp_path: Path) -> None:
    loha = write_adapter(base, tmp_path / "loha", peft.LoHaConfig(r=4, alpha=6, target_modules=TARGETS))
    assert_exact(told(merge(base, tmp_path / "out", {"path": str(loha), "weight": 3.0})))


def test_an_adapter_that_peft_loads_in_part(merged: Path, adapter: Path, tmp_path: Path) -> None:
    other = rewritten(adapter, tmp_path / "other")
    tensors = load_file(other / "adapter_model.safetensors")
    extra = {name.replace("layers.0", "layers.7"): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | extra, other / "adapter_model.safetensors")
    message = refusal(merged, adapters=[str(other)])
    assert "PEFT does not load this adapter whole" in message
    assert "6 of its tensors have no place" in message


def test_an_adapter_that_peft_cannot_load(merged: Path, adapter: Path, tmp_path: Path) -> None:
    other = rewritten(adapter, tmp_path / "other", peft_type="NOSUCH")
    assert "PEFT cannot load this adapter" in refusal(merged, adapters=[str(other)])


def test_factors_of_no_module(base: Path, adapter: Path, tmp_path: Path) -> None:
    output = merge(base, tmp_path / "out", as_pure(adapter, tmp_path))
    torch.save(
        {"model.layers.7.x_proj.A": torch.ones(32, 4), "model.layers.7.x_proj.B": torch.ones(4, 32)}, tmp_path / "o.pt"
    )
    assert "has no module model.layers.7.x_proj" in refusal(output, adapters=[str(tmp_path / "o.pt")])
    torch.save({"lm_head.A": torch.ones(32, 4)}, tmp_path / "half.pt")
    assert "has one factor" in refusal(output, adapters=[str(tmp_path / "half.pt")])
    module = "model.embed_tokens"
    torch.save({f"{module}.A": torch.ones(45, 4), f"{module}.B": torch.ones(4, 32)}, tmp_path / "e.pt")
    assert "expected a linear layer" in refusal(output, adapters=[str(tmp_path / "e.pt")])


def test_kohya_is_refused_by_name(merged: Path, adapter: Path, tmp_path: Path) -> None:
    tensors = flat(adapter, "lora_down.weight", "lora_up.weight", transposed=False)
    save_file(tensors, tmp_path / "kohya.safetensors")
    assert "adapters of the format kohya" in refusal(merged, adapters=[str(tmp_path / "kohya.safetensors")])


@pytest.mark.parametrize("library", ["transformers", "peft"])
def test_without_the_extra_it_is_named(merged: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    assert f"this needs {library}: pip install transformers peft" in refusal(merged)


def test_places_and_records(base: Path, merged: Path, adapter: Path, tmp_path: Path) -> None:
    assert_exact(told(merged, base=str(base), adapters=[str(adapter)]))
    assert "2 adapters are given, but 1 were merged" in refusal(merged, adapters=["a", "b"])
    with pytest.raises(SourceError, match=r"the base is not there: .* base= says where it is now"):
        told(merged, base=str(tmp_path / "nowhere"))
    with pytest.raises(SourceError, match=r"the adapter is not there: .* adapters= says where it is now"):
        told(merged, adapters=[str(tmp_path / "nowhere")])
    with pytest.raises(SourceError, match="no such directory"):
        told(tmp_path / "nowhere")
    with pytest.raises(FormatError, match=r"no shardmerge\.json that can be read"):
        told(base)
    with pytest.raises(ConfigError, match="a prompt is empty"):
        compare(merged, prompts=["word1", " "])
    shutil.copytree(merged, tmp_path / "edited")
    record = tmp_path / "edited" / "shardmerge.json"
    record.write_text(record.read_text().replace('"weight": 1.0', '"weight": 2.0'))
    with pytest.raises(FormatError, match=r"shardmerge\.json was changed or damaged after the merge"):
        told(tmp_path / "edited")


def test_logits_that_are_no_numbers(merged: Path, tmp_path: Path) -> None:
    shutil.copytree(merged, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["model.norm.weight"].fill_(math.nan)
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="its logits are NaN"):
        told(tmp_path / "out")


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_model_is_gone_before_the_next_is_loaded(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Any]] = []
    load = hf.load_model

    def load_model(path: str, dtype: str = "auto") -> Any:
        assert [model() for model in loaded] == [None] * len(loaded)
        model = load(path, dtype)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(hf, "load_model", load_model)
    assert told(merged).same
    assert len(loaded) == 2


# --- figures and verdict ----------------------------------------------------------------------------------------------


def reference(count: int = 40, asked: int = 10, seed: int = 0) -> tuple[Reference, Tensor]:
    """A reference of random logits over 50 tokens, and other logits near them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(50, (count,), generator=generator)
    logits, base_logits, noise = (torch.randn(count - 1, 50, generator=generator) for _ in range(3))
    return Reference("p", tokens, asked, 3 * logits, 3 * logits + base_logits), 3 * logits + 0.01 * noise


def test_figures_are_those_of_the_definitions() -> None:
    of, found = reference()
    got = measure(of, found).figures()
    p, q, base_p = (torch.log_softmax(each.double(), -1) for each in (of.logits, found, of.base_logits))
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    adapter_kl = torch.nn.functional.kl_div(base_p, p, log_target=True, reduction="none").sum(-1)
    assert got["positions"] == 39
    assert got["kl"] == pytest.approx(float(kl.mean()))
    assert got["largest_kl"] == pytest.approx(float(kl.max()))
    assert got["adapter_kl"] == pytest.approx(float(adapter_kl.mean()))
    assert got["kl_share"] == pytest.approx(float(kl.sum() / adapter_kl.sum()))
    assert got["largest_logit_difference"] == pytest.approx(float((found - of.logits).abs().max()))
    assert got["logit_spread"] == pytest.approx(float(of.logits.var(-1).mean().sqrt()), rel=1e-5)
    assert got["top1_agreement"] == float((found.argmax(-1) == of.logits.argmax(-1)).double().mean())
    assert got["effect"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, 1.5])
def test_effect_is_the_share_of_the_adapters_own(share: float) -> None:
    of, _ = reference()
    logits = of.base_logits + share * (of.logits - of.base_logits)
    assert measure(of, logits).figures()["effect"] == pytest.approx(share, abs=1e-5)


def test_what_a_model_rules_out_is_no_difference() -> None:
    of, found = reference()
    for logits in (of.logits, of.base_logits, found):
        logits[:, 7] = -math.inf
    assert all(math.isfinite(value) for value in measure(of, found).figures().values())


@pytest.mark.parametrize("kept", [39, 30])
def test_parting(kept: int) -> None:
    of, _ = reference()
    of = dataclasses.replace(of, logits=of.logits[-kept:], base_logits=of.base_logits[-kept:])
    assert parting(of, of.tokens.clone()) == (None, None)
    other = of.tokens.clone()
    other[15] = (other[15] + 1) % 50
    other[20] = (other[20] + 1) % 50
    row = of.logits[14 - (39 - kept)]
    at, gap = parting(of, other)
    assert at == 5
    assert gap == pytest.approx(float(row[of.tokens[15]] - row[other[15]]))


def verdict(rounded: bool = True, gap: float | None = None, **changes: Any) -> Comparison:
    figures_ = {"kl": 1e-4, "adapter_kl": 1.0, "kl_share": 1e-4, "effect": 1.0, **changes}
    answer = Answer("p", "a", "b", None if gap is None else 3, gap, {})
    return Comparison("out", "base", ("adapter",), "float32", rounded, (answer,), figures_)


@pytest.mark.parametrize(
    ("of", "parts"),
    [
        (verdict(), []),
        (verdict(gap=0.2), []),
        (verdict(gap=0.3), ["parts after 3 tokens, where base + adapter prefer their own by 0.3 nats"]),
        (verdict(kl_share=0.06), ["the KL divergence from base + adapter is 0.06"]),
        (verdict(effect=1.2), ["120.0% of the adapter's effect"]),
        (verdict(effect=0.8, gap=9.0), ["parts after", "80.0% of the adapter's effect"]),
        (verdict(kl_share=None, effect=None), ["the adapter changes nothing on these prompts, but the merge does"]),
        (verdict(kl=1e-7, kl_share=0.9, effect=0.1), []),
        (verdict(False, kl_share=2e-4), ["the KL divergence"]),
        (verdict(False, kl_share=1e-5, effect=1.02), ["102.0% of the adapter's effect"]),
        (verdict(False, kl=1e-9, gap=0.01), ["up to 0.001 is a tie"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else None,
)
def test_verdict(of: Comparison, parts: list[str]) -> None:
    assert len(of.differences) == len(parts)
    for part, text in zip(parts, of.differences, strict=True):
        assert part in text
    assert of.same == (not parts)
    assert all(part in figures.difference(of) for part in parts)


# --- the command ------------------------------------------------------------------------------------------------------

ASKED = [argument for prompt in PROMPTS for argument in ("--prompt", prompt)]


def test_the_command(merged: Path, adapter: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(cli, ["compare", str(merged), *ASKED, "--max-new-tokens", "5"])
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    assert "the same text on 2 of 2 prompts" in done.stdout
    assert "largest logit difference" in done.stdout
    assert done.stdout.splitlines()[-1] == "the same"
    other = rewritten(adapter, tmp_path / "other", lora_alpha=2 * ALPHA)
    done = runner.invoke(cli, ["compare", str(merged), *ASKED, "--adapter", str(other), "--json"])
    assert done.exit_code == 6
    found = json.loads(done.stdout)
    assert found["same"] is False
    assert found["differences"]
    assert {"kl", "adapter_kl", "effect", "top1_agreement", "largest_logit_difference"} <= found["figures"].keys()
    assert [answer["prompt"] for answer in found["answers"]] == list(PROMPTS)
    assert "does not answer as base + adapter" in done.stderr


@pytest.mark.slow
def test_the_built_in_prompts(merged: Path) -> None:
    done = CliRunner().invoke(cli, ["compare", str(merged), "--max-new-tokens", "2"])
    assert done.exit_code == 0, done.output
    assert f"on {len(comparing.PROMPTS)} of {len(comparing.PROMPTS)} prompts" in done.stdout


def test_the_device(merged: Path) -> None:
    """Named, the processor says what it says unnamed; what is not there is refused before a model is loaded."""
    asked = ["compare", str(merged), *ASKED, "--max-new-tokens", "2", "--json"]
    named, unnamed = (CliRunner().invoke(cli, [*asked, *options]) for options in (["--device", "cpu"], []))
    assert named.exit_code == 0, named.output
    assert named.stdout == unnamed.stdout
    with pytest.raises(ConfigError, match="the device is 'tpu'"):
        told(merged, device="tpu")
    with pytest.raises(ConfigError, match=r"the device is 'gpu'.*did you mean cuda"):
        told(merged, device="gpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
def test_the_models_compute_on_the_device(merged: Path, base: Path, adapter: Path, tmp_path: Path) -> None:
    for output in (merged, merge(base, tmp_path / "out", as_pure(adapter, tmp_path))):
        torch.cuda.reset_peak_memory_stats()
        found = told(output, device="cuda")
        assert found.same, found.differences
        assert torch.cuda.max_memory_allocated() > 0


def test_a_device_that_is_not_there(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(hf, "load_tokenizer", lambda path: pytest.fail("it was loaded"))
    done = CliRunner().invoke(cli, ["compare", str(merged), "--device", "cuda:1"])
    assert done.exit_code == PlanError.exit_code
    assert "the comparison is refused" in done.stderr
    assert "the device is cuda:1, but torch" in done.stderr and "finds 1 CUDA devices" in done.stderr
    with pytest.raises(PlanError) as raised:
        told(merged, device="cuda:1")
    copied = pickle.loads(pickle.dumps(raised.value))
    assert (str(copied), copied.problems) == (str(raised.value), raised.value.problems)


# --- a real model -----------------------------------------------------------------------------------------------------

DEMO = ROOT / "configs" / "demo"
QUESTION = "What is the capital of Loraland?"
#: Numbers of SmolLM2, in float32.
MODEL_BYTES = 134_515_008 * 4
# A process, whose memory is its own.
REAL = """
import json, sys
from pathlib import Path
import peft, torch, transformers.models.llama.modeling_llama
from shardmerge.inference.comparison.comparing import compare
from shardmerge.inference.comparison.figures import describe
from shardmerge.system.memory_use import peak_memory
torch.set_num_threads(1)
before = peak_memory()
output, question, count, *adapters = sys.argv[1:]
found = compare(Path(output), prompts=[question], max_new_tokens=int(count), adapters=adapters)
print(json.dumps([found.to_json(), describe(found), peak_memory() - before]))
"""


@pytest.fixture(scope="module")
def real(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge(smollm2, tmp_path_factory.mktemp("real") / "out", DEMO / "adapter", dtype="same")


def real_comparison(*arguments: Any) -> tuple[dict[str, Any], str, int]:
    done = run_python("-c", REAL, *arguments)
    assert done.returncode == 0, done.stderr
    found, text, peak = json.loads(done.stdout)
    return found, text, peak


@pytest.mark.slow
def test_smollm2_with_the_demos_adapter(real: Path) -> None:
    found, text, peak = real_comparison(real, QUESTION, "12")
    assert found["same"] and found["answers"][0]["parts_at"] is None, found
    assert found["answers"][0]["found"].startswith("The capital of Loraland is Rankfour")
    assert found["figures"]["kl_share"] < 1e-3
    assert found["figures"]["effect"] == pytest.approx(1, abs=0.01)
    assert "the same text on 1 of 1 prompts" in text
    # One model, and for the time of its loading the mapped file that is half as large; two would be 2.5.
    assert peak < 1.75 * MODEL_BYTES


@pytest.mark.slow
def test_smollm2_with_another_scaling(real: Path, tmp_path: Path) -> None:
    other = rewritten(DEMO / "adapter", tmp_path / "other", lora_alpha=6 * 1.25)
    found, _, _ = real_comparison(real, QUESTION, "2", other)
    assert not found["same"]
