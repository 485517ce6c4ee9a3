"""Tiny Llama checkpoints, adapters on them, and what PEFT makes of the two: the oracle of the engine's tests.

Everything is described by hashable specs, built when it is first asked for and kept until the process ends.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import shardmerge
from shardmerge import MergeReport, PlanError
from shardmerge.planning.tiling import WORKERS

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
#: What the smallest buffers of a plan hold; a tensor above it has several tiles.
SMALLEST_BUFFER = 1 << 16
_KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Base:
    """A Llama model: what its weights are stored as, and how large they are."""

    dtype: str = "float32"
    hidden: int = 40
    intermediate: int = 52
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 10
    vocab: int = 31
    layers: int = 1
    tied: bool = False
    max_shard_size: int = 10**9
    seed: int = 0


@dataclass(frozen=True)
class Lora:
    """An adapter: PEFT's settings, and how its file is written."""

    rank: int = 8
    alpha: float = 13.0
    targets: tuple[str, ...] = (*ATTENTION, *MLP)
    rslora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    dtype: str = "float32"
    pickled: bool = False
    infix: str = ""
    seed: int = 1


@cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="shardmerge-oracle-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def _new_folder(kind: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=_root()))


# --- models, adapters, the oracle -------------------------------------------------------------------------------------


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@cache
def base_folder(base: Base) -> Path:
    """The checkpoint, written by transformers itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=base.vocab,
        hidden_size=base.hidden,
        intermediate_size=base.intermediate,
        num_hidden_layers=base.layers,
        num_attention_heads=base.heads,
        num_key_value_heads=base.kv_heads,
        head_dim=base.head_dim,
        max_position_embeddings=64,
        tie_word_embeddings=base.tied,
        bos_token_id=0,
        eos_token_id=1,
    )
    folder = _new_folder("base")
    with torch.random.fork_rng():
        torch.manual_seed(base.seed)
        model = LlamaForCausalLM(config).to(_KINDS[base.dtype])
    model.save_pretrained(folder, max_shard_size=base.max_shard_size)
    return folder


@cache
def adapter_folder(base: Base, lora: Lora) -> Path:
    """The adapter, written by PEFT; then its tensors as ``lora`` wants them stored."""
    if lora.infix or lora.pickled:
        return _rewritten(base, lora)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        use_rslora=lora.rslora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    folder = _new_folder("adapter")
    with torch.random.fork_rng():
        torch.manual_seed(lora.seed)
        model = get_peft_model(_load(base_folder(base)), config)
        model.save_pretrained(folder, save_embedding_layers=False)
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(_KINDS[lora.dtype]) for name, tensor in load_file(file).items()}, file)
    return folder


def _rewritten(base: Base, lora: Lora) -> Path:
    folder = _new_folder("adapter")
    plain = adapter_folder(base, plainly(lora))
    shutil.copytree(plain, folder, dirs_exist_ok=True)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    if lora.infix:
        tensors = {name.replace(".weight", f".{lora.infix}.weight"): tensor for name, tensor in tensors.items()}
    file.unlink()
    if lora.pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, file)
    return folder


def plainly(lora: Lora) -> Lora:
    """The same adapter as PEFT itself writes it."""
    return dataclasses.replace(lora, infix="", pickled=False)


def merge_with_peft(base: Path, *adapters: Path) -> Any:
    """The model that PEFT's defaults make, adapters added one after the other."""
    from peft import PeftModel

    model = _load(base)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model


@cache
def oracle(base: Base, lora: Lora) -> Mapping[str, Tensor]:
    """What PEFT's default merge stores, by on-disk names."""
    state = merge_with_peft(base_folder(base), adapter_folder(base, plainly(lora))).state_dict()
    names = stored(base_folder(base)).keys()
    return {name: state[name] for name in names}


# --- merging with shardmerge ------------------------------------------------------------------------------------------


def make_config(output: Path, base: Path, adapters: Sequence[Any], **options: Any) -> dict[str, Any]:
    """A config. Options: dtype, max_shard_size (of the output), compute, max_memory."""
    entries = [str(entry) if isinstance(entry, Path) else entry for entry in adapters]
    out = {key: options[key] for key in ("dtype", "max_shard_size") if key in options}
    compute = {"dtype": options.get("compute", "float32"), "max_memory": options.get("max_memory", "auto")}
    return {"base": str(base), "adapters": entries, "output": {"path": str(output), **out}, "compute": compute}


def merge_to(output: Path, base: Path, *adapters: Any, **options: Any) -> MergeReport:
    return shardmerge.merge(make_config(output, base, adapters, **options))


def least_memory(config: Mapping[str, Any]) -> int:
    """The smallest ``max_memory`` with which two threads compute, as the plan's refusal of one byte says it."""
    starved = {**config, "compute": {"threads": WORKERS, **config["compute"], "max_memory": 1}}
    try:
        shardmerge.plan(starved)
    except PlanError as error:
        found = re.search(r"needs ([\d,]+) to work", str(error))
        assert found, str(error)
        return int(found[1].replace(",", ""))
    raise AssertionError("a plan of one byte was accepted")


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every shard in a folder, read by the safetensors library."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def weight_bytes(folder: Path) -> dict[str, bytes]:
    """The weight files and the index, byte for byte."""
    names = [name for pattern in ("*.safetensors", "*.index.json") for name in folder.glob(pattern)]
    return {name.name: name.read_bytes() for name in sorted(names)}


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, dtypes, shapes and bits; the message counts what differs."""
    assert sorted(actual) == sorted(expected)
    for name, wanted in expected.items():
        found = actual[name]
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
        if bits(found) != bits(wanted):
            differing = int((found.double() != wanted.double()).sum())
            raise AssertionError(f"{name}: {differing} of {wanted.numel()} elements differ")


# --- models of a few tensors, without transformers --------------------------------------------------------------------


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # The safetensors library refuses tensors that share memory.
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def write_base(folder: Path, shards: Sequence[Mapping[str, Tensor]], *, index: bool = True, **config: Any) -> Path:
    """A checkpoint of these tensors, a file a mapping; ``config`` goes into config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    count = len(shards)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    for name, tensors in zip(names, shards, strict=True):
        save_file(_apart(tensors), folder / name, metadata={"format": "pt"})
    if count > 1 and index:
        weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
        total = sum(tensor.nbytes for tensors in shards for tensor in tensors.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False, **config}))
    return folder


def write_adapter(folder: Path, modules: Mapping[str, tuple[Tensor, Tensor]], alpha: float = 3.0) -> Path:
    """A PEFT adapter: module → (A, B). The rank is that of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (a, b) in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    save_file(_apart(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    rank = next(iter(modules.values()))[0].shape[0]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": sorted(modules), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@cache
def _sixteen_bits(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every finite number of a 16-bit dtype from the least to the largest, as float64, and the midpoints between."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = torch.tensor(sorted(set(patterns[torch.isfinite(patterns)].tolist())), dtype=torch.float64)
    return numbers, (numbers[:-1] + numbers[1:]) / 2


def nearest_even(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 → a 16-bit dtype, by looking up the two numbers around each value: to nearest, ties to even.

    Midpoints of 16-bit numbers are exact in float64, so no rounding of ours is in the way.
    """
    numbers, middles = _sixteen_bits(dtype)
    above = torch.searchsorted(middles, value, right=True)
    below = torch.searchsorted(middles, value, right=False)  # differs from above at a tie alone
    high, low = numbers[above].to(dtype), numbers[below].to(dtype)
    even = (low.view(torch.int16) & 1) == 0
    result = torch.where(even, low, high)
    step = numbers[-1] - numbers[-2]
    infinite = torch.full_like(result, float("inf"))
    result = torch.where(value.abs() >= numbers[-1] + step / 2, infinite, result)
    result = torch.where(torch.isnan(value), torch.full_like(result, float("nan")), result)
    return torch.copysign(result, value.to(torch.float32).to(dtype))


def random(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
