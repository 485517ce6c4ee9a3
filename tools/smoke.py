"""Try an installed shardmerge: python -I tools/smoke.py

Makes a base of two layers and an adapter, both with torch alone, and runs the commands of a first merge on them through
the console script that is installed beside the interpreter. The merged weights must be W + (alpha / r)·B·A, computed in
float64, but for the roundings of float32. With ``-I`` the interpreter does not find the checkout, so the installed
package is tried. Exits 1 where something is wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

OUT, IN, RANK, ALPHA = 48, 32, 4, 8.0
MODULES = tuple(f"model.layers.{number}.self_attn.q_proj" for number in range(2))


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A file of float32 tensors, by the format's definition: the header's length, the header, the data."""
    header: dict[str, object] = {}
    data = b""
    for name, tensor in tensors.items():
        raw = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The float32 tensors of a file."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    return {
        name: torch.frombuffer(bytearray(data[slice(*entry["data_offsets"])]), dtype=torch.float32).view(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def write_inputs(folder: Path) -> dict[str, torch.Tensor]:
    """Base and adapter; returns the weights that must come out, in float32."""
    torch.manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    factors: dict[str, torch.Tensor] = {}
    merged: dict[str, torch.Tensor] = {}
    for module in MODULES:
        w, a, b = torch.randn(OUT, IN), torch.randn(RANK, IN), torch.randn(OUT, RANK)
        weights[f"{module}.weight"] = w
        factors[f"base_model.model.{module}.lora_A.weight"] = a
        factors[f"base_model.model.{module}.lora_B.weight"] = b
        merged[f"{module}.weight"] = (w.double() + ALPHA / RANK * (b.double() @ a.double())).float()
    for name, tensors in (("base/model.safetensors", weights), ("adapter/adapter_model.safetensors", factors)):
        (folder / name).parent.mkdir()
        write_safetensors(folder / name, tensors)
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    return merged


def shardmerge(folder: Path, *arguments: str) -> str:
    """The output of a command, which must succeed."""
    script = Path(sysconfig.get_path("scripts")) / "shardmerge"
    done = subprocess.run([script, *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"shardmerge {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wanted = write_inputs(folder)
        print(shardmerge(folder, "--version").strip())
        shardmerge(folder, "init", "adapter", "--base", "base", "--output", "merged")
        for command in (["plan", "config.yaml"], ["run", "config.yaml"], ["verify", "merged"], ["inspect", "merged"]):
            shardmerge(folder, *command)
        found = read_safetensors(folder / "merged" / "model.safetensors")
        if found.keys() != wanted.keys():
            sys.exit(f"the merged model has {sorted(found)}, expected {sorted(wanted)}")
        for name, tensor in wanted.items():
            # Two float32 roundings of sums about 10: of the product, and of the sum with the weight.
            if not torch.allclose(found[name], tensor, rtol=0, atol=4e-6):
                sys.exit(f"{name} is off by {(found[name] - tensor).abs().max()}")
    print("a first merge works")


if __name__ == "__main__":
    main()
