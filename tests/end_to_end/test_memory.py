"""The working set is what the plan says, whatever the shape and the rank, and holds under a hard limit.

Bases are sparse files of zeros, so that a gigabyte of them costs no time to make.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shardmerge.planning.tiling import _PANEL_BYTES, _PANEL_COLUMNS, WORKERS
from tests.conftest import ROOT
from tests.support.builders import peft_config, run_cli, slow_but, write_json

MIB = 1 << 20
NORMS = ("input", "post_attention")
#: A weight of the base by name, with its shape, and whether it is a target.
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Model:
    """A Llama of so many layers, of zeros."""

    hidden: int
    inner: int
    layers: int
    rank: int = 16
    dtype: str = "BF16"
    vocabulary: int = 1000
    #: With attention and norms too, as llama.cpp needs a model.
    whole: bool = False
    output: dict[str, Any] = field(default_factory=dict)

    def weights(self) -> Shapes:
        vocabulary = (self.vocabulary, self.hidden)
        shapes: Shapes = {"model.embed_tokens.weight": vocabulary, "model.norm.weight": (self.hidden,)}
        for layer in range(self.layers):
            if self.whole:
                shapes |= {f"model.layers.{layer}.{norm}_layernorm.weight": (self.hidden,) for norm in NORMS}
                square = (self.hidden, self.hidden)
                shapes |= {f"model.layers.{layer}.self_attn.{of}_proj.weight": square for of in "qkvo"}
            mlp = f"model.layers.{layer}.mlp"
            shapes |= {
                f"{mlp}.gate_proj.weight": (self.inner, self.hidden),
                f"{mlp}.up_proj.weight": (self.inner, self.hidden),
                f"{mlp}.down_proj.weight": (self.hidden, self.inner),
            }
        return shapes | {"lm_head.weight": vocabulary}

    def settings(self) -> dict[str, Any]:
        """Its config.json."""
        heads = {"num_attention_heads": self.hidden // 128, "num_key_value_heads": self.hidden // 128}
        sizes = {"hidden_size": self.hidden, "intermediate_size": self.inner, "num_hidden_layers": self.layers}
        rest = {"vocab_size": self.vocabulary, "max_position_embeddings": 256, "rms_norm_eps": 1e-5}
        return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **heads, **sizes, **rest}


MODELS = {
    "small": Model(hidden=512, inner=1024, layers=2),
    "many layers": Model(hidden=1024, inner=4096, layers=12),
    "rank 8": Model(hidden=2048, inner=8192, layers=2, rank=8),
    "rank 256": Model(hidden=2048, inner=8192, layers=2, rank=256),
    "wide": Model(hidden=16384, inner=10000, layers=1, rank=64),
    "float32 output": Model(hidden=2048, inner=8192, layers=2, output={"dtype": "float32"}),
    "float32 base": Model(hidden=2048, inner=4096, layers=2, dtype="F32"),
}


def write_model(folder: Path, model: Model) -> Path:
    """Base, adapter and config.yaml; gives back the config's path."""
    base, adapter = folder / "base", folder / "adapter"
    for path in (base, adapter):
        path.mkdir(parents=True)
    write_json(base / "config.json", model.settings())
    item, offset, header = {"BF16": 2, "F32": 4}[model.dtype], 0, {}
    for name, shape in model.weights().items():
        size = item * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": model.dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with open(base / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    factors = {}
    for name, shape in model.weights().items():
        if "_proj" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{module}.lora_A.weight"] = torch.full((model.rank, shape[1]), 0.01, dtype=torch.bfloat16)
            factors[f"{module}.lora_B.weight"] = torch.full((shape[0], model.rank), 0.01, dtype=torch.bfloat16)
    save_file(factors, adapter / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-2] for name in model.weights() if "_proj" in name})
    write_json(adapter / "adapter_config.json", peft_config(r=model.rank, lora_alpha=32, target_modules=targets))
    output = {"path": str(folder / "merged"), **model.output}
    return write_json(folder / "config.yaml", {"base": str(base), "adapters": [str(adapter)], "output": output})


def merged_memory(folder: Path) -> dict[str, int]:
    record = json.loads((folder / "merged" / "shardmerge.json").read_text())
    memory: dict[str, int] = record["memory"]
    return memory


def run_limited(config: Path, prepare: Callable[[], None]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shardmerge", "run", str(config), "--quiet"]
    return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=prepare)


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is resident")


@pytest.mark.parametrize(
    "names",
    [("small", "many layers"), pytest.param(tuple(MODELS), marks=pytest.mark.slow)],
    ids=["few", "all"],
)
def test_predicted_memory(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Within 10% of what is measured but for what MKL copies; and peaks are much the same whatever the model."""
    peaks = {}
    for name in names:
        model = MODELS[name]
        done = run_cli("run", write_model(tmp_path / name, model), "--quiet")
        assert done.returncode == 0, done.stderr
        memory = merged_memory(tmp_path / name)
        # A tenth of a full working set is 4 MiB; what torch's code takes, which differs by processor, is no less sure.
        predicted = memory["predicted_working_set"]
        assert memory["working_set"] <= predicted + max(0.1 * predicted, 4 * MIB), name
        # What MKL copies of a factor of high rank differs by processor, too: the plan has room for the most of it.
        copied = min(_PANEL_BYTES, _PANEL_COLUMNS * model.rank * 4) * WORKERS
        assert memory["working_set"] >= predicted - copied - max(0.1 * predicted, 4 * MIB), name
        peaks[name] = memory["peak"]
        shutil.rmtree(tmp_path / name)
    del peaks["small"]  # it does not fill the buffers
    assert max(peaks.values()) - min(peaks.values()) < 16 * MIB, peaks


@pytest.mark.parametrize("max_memory", slow_but(["15MB", "20MB", "30MB"], "15MB"))
def test_max_memory_bounds_the_working_set(tmp_path: Path, max_memory: str) -> None:
    config = write_model(tmp_path, MODELS["rank 8"])
    done = run_cli("run", config, "--quiet", "-s", f"compute.max_memory={max_memory}")
    assert done.returncode == 0, done.stderr
    assert merged_memory(tmp_path)["working_set"] <= int(max_memory[:-2]) * 1000**2


@pytest.fixture(scope="module")
def with_vocabulary(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Callable[[str], tuple[Path, int]]:
    """Of a model by name, with SmolLM2's vocabulary: its config, and the peak of its merge into a checkpoint."""
    made: dict[str, tuple[Path, int]] = {}

    def get(name: str) -> tuple[Path, int]:
        if name not in made:
            folder = tmp_path_factory.mktemp("vocabulary")
            if name == "SmolLM2":
                merge = {"base": str(smollm2), "adapters": [str(ROOT / "configs" / "demo" / "adapter")]}
                config = write_json(folder / "config.yaml", {**merge, "output": {"path": str(folder / "merged")}})
            else:
                config = write_model(folder, Model(hidden=4096, inner=4096, layers=2, vocabulary=49152, whole=True))
                for file in ("tokenizer.json", "tokenizer_config.json"):
                    shutil.copy(smollm2 / file, folder / "base")
            made[name] = (config, merged_peak(config))
        return made[name]

    return get


def merged_peak(config: Path, *options: str) -> int:
    """The most memory that the process of a merge has had resident, in bytes. Its output is taken away."""
    done = run_cli("run", config, "--quiet", *options)
    assert done.returncode == 0, done.stderr
    peak = merged_memory(config.parent)["peak"]
    shutil.rmtree(config.parent / "merged")
    return peak


@pytest.mark.parametrize(
    ("model", "quantization"),
    [
        pytest.param("SmolLM2", "q8_0", marks=pytest.mark.slow),
        pytest.param("SmolLM2", "f16", marks=pytest.mark.slow),
        pytest.param("over a gigabyte", "q8_0", marks=pytest.mark.slow),
        pytest.param("over a gigabyte", "f16", marks=pytest.mark.slow),
    ],
)
def test_a_gguf_file_takes_no_more_than_a_checkpoint(
    with_vocabulary: Callable[[str], tuple[Path, int]], model: str, quantization: str
) -> None:
    """But for the vocabulary and a slab to quantise; of either model one copy would be more."""
    config, peak = with_vocabulary(model)
    found = merged_peak(config, "-s", "output.format=gguf", "-s", f"output.quantization={quantization}")
    assert abs(found - peak) < 64 * MIB


#: Of 720 MB, which do not fit where 512 MiB are allowed.
LARGE = Model(hidden=4096, inner=14336, layers=2)


def test_data_limit(tmp_path: Path) -> None:
    """With setrlimit: 512 MiB of memory of its own, threads' stacks included."""
    config = write_model(tmp_path, LARGE)
    limit = 512 * MIB
    done = run_limited(config, lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)))
    assert done.returncode == 0, done.stderr
    assert merged_memory(tmp_path)["peak"] < limit


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A memory cgroup of 512 MiB, version 2 or 1, if this process may make one."""
    root = Path("/sys/fs/cgroup")
    second = "memory" in (root / "cgroup.controllers").read_text() if (root / "cgroup.controllers").exists() else False
    parent = root if second else root / "memory"
    folder = parent / f"shardmerge-test-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
        (folder / ("memory.max" if second else "memory.limit_in_bytes")).write_text(str(512 * MIB))
    except OSError as error:
        if folder.exists():
            folder.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield folder
    folder.rmdir()


def test_cgroup_of_512_mib(tmp_path: Path, cgroup: Path) -> None:
    """All that the kernel counts for the process, page cache included, which a base larger than it must not fill."""
    config = write_model(tmp_path, LARGE)
    procs = str(cgroup / "cgroup.procs")

    def join() -> None:
        with open(procs, "w") as file:
            file.write(str(os.getpid()))

    done = run_limited(config, join)
    assert done.returncode == 0, done.stderr
