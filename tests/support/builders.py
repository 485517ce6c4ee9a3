"""Small checkpoints, adapters and configs, made when a test asks for them. No transformers, no fixtures."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import save_file
from torch import Tensor

from shardmerge.adapters.formats.base import AdapterContent
from shardmerge.destinations.shard_writer import ShardWriter
from shardmerge.spec.plans import ShardPlan
from shardmerge.spec.tensors import TensorRef, tensor_nbytes
from shardmerge.spec.updates import Region, Update
from shardmerge.system.directory import Directory

#: A loaded machine is slow, which is no reason to fail a test.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

ROOT = Path(__file__).resolve().parents[2]

HIDDEN = 32
INTERMEDIATE = 48
VOCAB = 64
LAYERS = 2
RANK = 4
ALPHA = 8

Tensors = dict[str, Tensor]

#: What lies beside the weights of a base, by name.
AUX_FILES: Mapping[str, str] = {
    "LICENSE": "Do as you like.\n",
    "README.md": "# tiny\n",
    "chat_template.jinja": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "generation_config.json": '{"eos_token_id": 2}\n',
    "modeling_x.py": "raise RuntimeError('code of a checkpoint must never be imported')\n",
    "special_tokens_map.json": '{"eos_token": "</s>"}',
    "tokenizer.json": '{"model": {"type": "BPE"}}',
    "tokenizer_config.json": '{"model_max_length": 64}',
}


def slow_but(values: Iterable[Any], *quick: Any) -> list[Any]:
    """A test's rows, of which those that are not named as quick are slow."""
    return [pytest.param(value, marks=slow_if(value not in quick)) for value in values]


def slow_if(condition: object) -> tuple[pytest.MarkDecorator, ...]:
    """The marks of a row that is slow on a condition."""
    return (pytest.mark.slow,) if condition else ()


def layer(number: int, module: str) -> str:
    """``layer(0, "self_attn.q_proj")`` → the module's full name."""
    return f"model.layers.{number}.{module}"


Q0, V0, GATE0, DOWN1 = (
    layer(0, "self_attn.q_proj"),
    layer(0, "self_attn.v_proj"),
    layer(0, "mlp.gate_proj"),
    layer(1, "mlp.down_proj"),
)

#: (out, in) of every Linear layer of a decoder layer.
LINEAR_SHAPES: Mapping[str, tuple[int, int]] = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def shape_of(module: str) -> tuple[int, int]:
    """(out, in) of a module of the small Llama, by its full name."""
    return next(shape for name, shape in LINEAR_SHAPES.items() if module.endswith(name))


def random_tensor(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32, std: float = 0.02) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * std).to(dtype)


def llama_tensors(dtype: torch.dtype = torch.float32, *, tied: bool = False, layers: int = LAYERS) -> Tensors:
    """The tensors of a small Llama, in the order in which a model stores them."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for number in range(layers):
        for module, shape in LINEAR_SHAPES.items():
            shapes[layer(number, module) + ".weight"] = shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[layer(number, norm) + ".weight"] = (HIDDEN,)
    shapes["model.norm.weight"] = (HIDDEN,)
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return {name: random_tensor(shape, seed, dtype) for seed, (name, shape) in enumerate(shapes.items())}


def model_config(**changes: Any) -> dict[str, Any]:
    """A config.json; a change to ``...`` leaves the key out."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    return {key: value for key, value in {**config, **changes}.items() if value is not ...}


# --- bases ------------------------------------------------------------------------------------------------------------


def shard_names(count: int, stem: str = "model") -> list[str]:
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def split(tensors: Tensors, count: int) -> list[Tensors]:
    """The tensors in ``count`` runs of about as many each."""
    items = list(tensors.items())
    bounds = [len(items) * number // count for number in range(count + 1)]
    return [dict(items[start:stop]) for start, stop in itertools.pairwise(bounds)]


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value, indent=2) + "\n")
    return path


def write_index(folder: Path, weight_map: Mapping[str, str], name: str = "model", **metadata: Any) -> Path:
    index = {"metadata": metadata, "weight_map": dict(weight_map)}
    return write_json(folder / f"{name}.safetensors.index.json", index)


def write_shards(folder: Path, tensors: Tensors, shards: int = 2, *, index: bool = True, stem: str = "model") -> None:
    """Write the weights alone: ``shards`` numbered files and perhaps their index, or one file where it is 1."""
    folder.mkdir(parents=True, exist_ok=True)
    names = shard_names(shards, stem) if shards > 1 else [f"{stem}.safetensors"]
    weight_map: dict[str, str] = {}
    for name, part in zip(names, split(tensors, shards), strict=True):
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    if index and shards > 1:
        write_index(folder, weight_map, stem, total_size=sum(tensor.nbytes for tensor in tensors.values()))


def write_base(
    folder: Path,
    tensors: Tensors | None = None,
    *,
    shards: int = 2,
    index: bool = True,
    config: Mapping[str, Any] | None = None,
    aux: Mapping[str, str] = AUX_FILES,
) -> Path:
    """A whole base: weights, config.json and what lies beside them."""
    write_shards(folder, llama_tensors() if tensors is None else tensors, shards, index=index)
    write_json(folder / "config.json", model_config() if config is None else config)
    for name, text in aux.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def read_tensors(folder: Path) -> Tensors:
    """Every tensor of every safetensors file in a folder, through the safetensors library."""
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


# --- adapters ---------------------------------------------------------------------------------------------------------


def lora_pair(
    module: str, rank: int = RANK, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) for a module of the small Llama."""
    out_features, in_features = shape_of(module)
    a = random_tensor((rank, in_features), 1000 + seed, dtype, 0.3)
    return a, random_tensor((out_features, rank), 2000 + seed, dtype, 0.3)


def peft_tensors(
    modules: Iterable[str] = (Q0, V0, DOWN1), rank: int = RANK, *, infix: str = "", dtype: torch.dtype = torch.float32
) -> Tensors:
    """LoRA factors under PEFT's names; ``infix`` is ``".default"`` where an adapter's name stands in them."""
    tensors: Tensors = {}
    for seed, module in enumerate(modules):
        for role, factor in zip("AB", lora_pair(module, rank, seed, dtype), strict=True):
            tensors[f"base_model.model.{module}.lora_{role}{infix}.weight"] = factor
    return tensors


def peft_config(**changes: Any) -> dict[str, Any]:
    """An adapter_config.json; a change to ``...`` leaves the key out."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
        "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"],
        "inference_mode": True,
    }
    return {key: value for key, value in {**config, **changes}.items() if value is not ...}


def write_peft(
    folder: Path,
    tensors: Tensors | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    pickled: bool = False,
    aux: Mapping[str, str] | None = None,
) -> Path:
    """A PEFT adapter's folder, with ``adapter_model.safetensors`` or, pickled, ``adapter_model.bin``."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = peft_tensors() if tensors is None else tensors
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", peft_config() if config is None else config)
    for name, text in (aux or {}).items():
        (folder / name).write_text(text)
    return folder


def refs_of(shapes: Mapping[str, Sequence[int]], dtype: str = "F32") -> dict[str, TensorRef]:
    """Tensors as headers tell of them, of a file that is nowhere."""
    refs: dict[str, TensorRef] = {}
    offset = 0
    for name, shape in shapes.items():
        nbytes = tensor_nbytes(dtype, tuple(shape))
        refs[name] = TensorRef(name, "/nowhere.safetensors", dtype, tuple(shape), offset, nbytes)
        offset += nbytes
    return refs


def update_of(
    target: str, shape: tuple[int, ...], factors: tuple[tuple[str, TensorRef], ...], **changes: Any
) -> Update:
    """A LoRA update of a whole stored tensor; any field may be changed."""
    fields = {"adapter": 0, "family": "lora", "module": target.rpartition(".")[0], "scaling": 1.0, "rank": RANK}
    region = Region(target, shape[0])
    return Update(**{**fields, "target": target, "factors": factors, "shape": shape, "region": region, **changes})


def content(
    tensors: Mapping[str, TensorRef],
    config: Mapping[str, Any] | None = None,
    alpha: float | None = None,
    scaling: float | None = None,
    numbers: Mapping[str, float] | None = None,
) -> AdapterContent:
    """An adapter as its readers see it; ``numbers`` are the values of tensors of one number, by name."""
    return AdapterContent(tensors, config, {}, alpha, scaling, "peft", lambda ref: (numbers or {})[ref.name])


def pure_tensors(modules: Iterable[str] = (Q0, V0, DOWN1), rank: int = RANK) -> Tensors:
    """Factors of a training script without PEFT: A (in, r), B (r, out)."""
    tensors: Tensors = {}
    for seed, module in enumerate(modules):
        a, b = lora_pair(module, rank, seed)
        tensors |= {f"{module}.A": a.T.contiguous(), f"{module}.B": b.T.contiguous()}
    return tensors


def write_pure(path: Path, tensors: Mapping[str, Any] | None = None) -> Path:
    """A pure-PyTorch ``.pt`` adapter."""
    torch.save(pure_tensors() if tensors is None else dict(tensors), path)
    return path


# --- a merge in a folder ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A folder with a base, an adapter and room for an output."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def output(self) -> Path:
        return self.folder / "merged"

    def config(self, **changes: Any) -> dict[str, Any]:
        """A merge's config; ``output`` and ``compute`` are merged key by key."""
        output = {"path": str(self.output), **changes.pop("output", {})}
        return {"base": str(self.base), "adapters": [str(self.adapter)], "output": output, **changes}

    def config_file(self, **changes: Any) -> Path:
        """The same as a file. JSON is YAML."""
        return write_json(self.folder / "config.yaml", self.config(**changes))


def make_place(folder: Path, **base: Any) -> Place:
    """A base (see `write_base`) and a PEFT adapter that fits it."""
    place = Place(folder)
    write_base(place.base, **base)
    write_peft(place.adapter)
    return place


@contextmanager
def shard_writer(path: Path, shard: ShardPlan) -> Iterator[ShardWriter]:
    """The writer of one file, in the directory that holds it."""
    with Directory(path.parent) as directory, ShardWriter(directory / path.name, shard) as writer:
        yield writer


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below a folder, with its kind, mode and a hash of its content (of a link, its target)."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link {os.readlink(path)}"
        elif path.is_dir():
            found[name] = f"folder {path.stat().st_mode:o}"
        elif not path.is_file():
            found[name] = f"other {path.stat().st_mode:o}"
        else:
            found[name] = f"file {path.stat().st_mode:o} {hashlib.sha256(path.read_bytes()).hexdigest()}"
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by name, byte for byte; the merge's record, which holds times, left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "shardmerge.json"
    }


def run_cli(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``python -m shardmerge …`` in a process of its own, offline."""
    return run_python("-m", "shardmerge", *arguments, cwd=cwd)


def run_python(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The interpreter of the tests in a process of its own, with the package importable."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


_GROWTH = """
import sys
from pathlib import Path
from shardmerge.system.memory_use import peak_memory
from shardmerge.verification.verifier import verify_output
small, large = map(Path, sys.argv[1:3])
assert verify_output(small).complete
before = peak_memory()
assert verify_output(large, rows=None).complete
print(peak_memory() - before, sum(path.stat().st_size for path in large.glob(sys.argv[3])))
"""


def growth_of_verify(small: Path, large: Path, weights: str) -> tuple[int, int]:
    """Bytes that verifying all of an output takes beyond what a small one takes; and of its files named ``weights``."""
    done = run_python("-c", _GROWTH, small, large, weights)
    assert done.returncode == 0, done.stderr
    grown, size = map(int, done.stdout.split())
    return grown, size
