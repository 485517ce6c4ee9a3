"""One merge for every family of updates, on tall weights that take several tiles: for the CPU and a device alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.support import zoo
from tests.support.builders import write_pure
from tests.support.family_oracle import Swapped, Tall, write_case
from tests.support.peft_oracle import _new_folder as new_folder
from tests.support.peft_oracle import least_memory, make_config, random, write_base

TALL, SWAPPED = ("tall", "wide"), ("wide", "narrow")


class Blocks(nn.Module):
    """BD-LoRA goes by names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 96)
        self.up = nn.Linear(96, 768)
        self.down = nn.Linear(768, 96)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.as_tensor(self.down(torch.tanh(self.up(self.embed(tokens)))))


def _block_lora() -> Any:
    from peft.tuners.lora.config import BdLoraConfig

    blocks = BdLoraConfig(target_modules_bd_a=["down"], target_modules_bd_b=["up"], nblocks=4, match_strict=False)
    return peft.LoraConfig(r=8, target_modules=["up", "down"], use_bdlora=blocks)


def _of(method: str, *targets: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(peft, f"{method}Config")(target_modules=list(targets), **settings)


#: Adapters of every family; of those that a stored transpose matters to, also on one.
ADAPTERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "LoRA": (Tall, _of("Lora", *TALL, "embed", "conv", r=5)),
    "LoRA, bias": (Tall, _of("Lora", *TALL, r=5, lora_bias=True)),
    "LoRA, saved": (Tall, _of("Lora", "tall", r=5, bias="all", modules_to_save=["wide"])),
    "LoRA, tokens": (Tall, _of("Lora", "tall", r=5, trainable_token_indices={"embed": [5, 3, 20]})),
    "LoRA, transposed": (Swapped, _of("Lora", *SWAPPED, r=5, fan_in_fan_out=True)),
    "LoRA, blocks": (Blocks, _block_lora),
    "DoRA": (Tall, _of("Lora", *TALL, "conv", r=5, use_dora=True)),
    "DoRA, transposed": (Swapped, _of("Lora", *SWAPPED, r=5, use_dora=True, fan_in_fan_out=True)),
    "IA3": (Tall, _of("IA3", *TALL, feedforward_modules=["wide"])),
    "LoHa": (Tall, _of("LoHa", *TALL, "conv", r=4)),
    "LoHa, Tucker": (Tall, _of("LoHa", "conv", r=4, use_effective_conv2d=True)),
    "LoKr": (Tall, _of("LoKr", *TALL, "conv", r=2, decompose_both=True, use_effective_conv2d=True)),
    "LoKr, large": (Tall, _of("LoKr", *TALL, r=4, decompose_factor=1)),
    "AdaLoRA": (Tall, _of("AdaLora", *TALL, init_r=5, total_step=10)),
    "VeRA": (Tall, _of("Vera", *TALL, r=6)),
    "VeRA, seeded": (Tall, _of("Vera", *TALL, r=6, save_projection=False)),
    "RandLoRA": (Tall, _of("RandLora", *TALL, r=8)),
    "RandLoRA, seeded": (Tall, _of("RandLora", *TALL, r=8, save_projection=False)),
    "RandLoRA, sparse": (Tall, _of("RandLora", *TALL, r=8, save_projection=False, sparse=True)),
    "VB-LoRA": (Tall, _of("VBLoRA", *TALL, r=4, num_vectors=8, vector_length=8)),
    "VB-LoRA, topk": (Tall, _of("VBLoRA", *TALL, r=4, num_vectors=8, vector_length=8, save_only_topk_weights=True)),
    "VB-LoRA, top": (
        Tall,
        _of("VBLoRA", *TALL, r=4, num_vectors=8, vector_length=8, topk=1, save_only_topk_weights=True),
    ),
    "MiSS": (Tall, _of("Miss", *TALL, r=4)),
    "MiSS, bat": (Tall, _of("Miss", *TALL, r=4, init_weights="bat")),
    "MiSS, mini": (Tall, _of("Miss", *TALL, r=4, mini_r=8, init_weights="mini")),
    "SHiRA": (Tall, _of("Shira", *TALL, r=4)),
    "DeLoRA": (Tall, _of("Delora", *TALL, r=4)),
    "KaSA": (Tall, _of("Lora", *TALL, r=5, kasa_config={"beta": 1e-4, "gamma": 1e-3})),
    "HiRA": (Tall, _of("Hira", *TALL, "conv", r=5)),
    "HRA": (Tall, _of("HRA", *TALL, r=5)),
    "HRA, orthogonal": (Tall, _of("HRA", *TALL, r=3, apply_GS=True)),
    "OFT": (Tall, _of("OFT", *TALL, "embed", r=0, oft_block_size=32)),
    "OFT, constrained": (Tall, _of("OFT", *TALL, r=0, oft_block_size=8, coft=True, eps=0.3, block_share=True)),
    "OFT, solved": (Tall, _of("OFT", *TALL, r=0, oft_block_size=8, use_cayley_neumann=False)),
    "BOFT": (Tall, _of("BOFT", *TALL, boft_block_size=12)),
    "RoAd": (Tall, _of("Road", *TALL, variant="road_4", group_size=32)),
    "RoAd, 1": (Tall, _of("Road", *TALL, variant="road_1", group_size=32)),
    "C3A": (Tall, _of("C3A", *TALL, block_size=24)),
    "GraLoRA": (Tall, _of("Gralora", *TALL, r=6, gralora_k=3, hybrid_r=2)),
    "GLoRA": (Tall, _of("Glora", *TALL, r=4)),
    "BEFT": (Tall, _of("Beft", *TALL)),
    "FourierFT": (Tall, _of("FourierFT", *TALL, n_frequency=99)),
    "WaveFT": (Tall, _of("WaveFT", *TALL, n_frequency=99, wavelet_family="sym2")),
    "WaveFT, no wavelet": (Tall, _of("WaveFT", *TALL, n_frequency=99, use_idwt=False)),
    "PVeRA": (Tall, _of("Pvera", *TALL, r=5)),
    "UniLoRA": (Tall, _of("UniLora", *TALL, r=5, save_indices=True)),
    "TinyLoRA": (Tall, _of("TinyLora", *TALL, r=3, u=7, weight_tying=0.5)),
    "Super-Tuning": (Tall, _of("Supertuning", *TALL, sparsity=0.9, r=3)),
    "DEFT": (Tall, _of("Deft", *TALL, r=4)),
    "DEFT, orthogonal": (Tall, _of("Deft", *TALL, r=4, decomposition_method="qr")),
    "DEFT, transposed": (Swapped, _of("Deft", *SWAPPED, r=4, fan_in_fan_out=True)),
    "PEANuT": (Tall, _of("Peanut", *TALL, r=4, depth=1)),
    "OSF": (Tall, _of("OSF", *TALL, effective_rank=60)),
    "PSOFT": (Tall, _of("Psoft", *TALL, r=8, use_cayley_neumann=True, cayley_neumann_eps=0.3)),
    "PSOFT, low rank": (Tall, _of("Psoft", *TALL, r=8, psoft_svd="lowrank", ab_svd_init="pissa_init")),
    "FRoD": (Tall, _of("Frod", "tall", progressbar=False)),
}

#: And of models whose modules are parts of stored tensors.
PARTS = {
    "experts": ("mixtral", zoo.lora("q_proj", target_parameters=["experts.gate_up_proj", "experts.down_proj"])),
    "a part saved": ("nomic-bert", zoo.lora("o_proj", modules_to_save=["q_proj"])),
    "UniLoRA, seeded": ("llama", zoo.peft("UniLoraConfig", "all-linear", r=3, theta_d_length=40)),
}

NAMES = (*ADAPTERS, *PARTS, "frozen copies", "differences", "gate and up in turn")


@cache
def files(name: str, dtype: str = "float32") -> tuple[Path, Path]:
    """Base and adapter."""
    if name in PARTS:
        return zoo.base_folder(PARTS[name][0]), zoo.adapter_folder(*PARTS[name])
    folder = new_folder("device")
    if name == "frozen copies":
        w, b, a = random(768, 96, seed=0), random(4, 768, seed=1), random(96, 4, seed=2)
        base = write_base(folder / "base", [{"m.weight": w, "n.weight": w + 1}])
        return base, write_pure(folder / "a.pt", {"m.A": a, "m.B": b, "n.original.weight": w + 1})
    if name == "differences":
        base = write_base(folder / "base", [{"m.weight": random(768, 96, seed=0)}])
        save_file({"m.diff": random(768, 96, seed=1)}, folder / "lora.safetensors")
        return base, folder / "lora.safetensors"
    if name == "gate and up in turn":
        return _interleaved(folder)
    make, config = ADAPTERS[name]
    case = write_case(folder, config(), make=make, dtype=dtype, scale=0.05)
    return case.base, case.adapter


def _interleaved(folder: Path) -> tuple[Path, Path]:
    """gpt-oss's experts, which are stored as (E, in, out), and Tinker's factors of gate and up."""
    at = "model.layers.0.mlp.experts"
    weight = random(3, 96, 512, seed=0)
    base = write_base(folder / "base", [{f"{at}.gate_up_proj": weight}], architectures=["GptOssForCausalLM"])
    tensors = {
        f"base_model.model.{at}.{part}.lora_{role}.weight": random(*shape, seed=seed)
        for part in ("w1", "w3")
        for seed, (role, shape) in enumerate({"A": (1, 4, 96), "B": (3, 256, 4)}.items(), 2 * int(part[1]))
    }
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


def config_of(name: str, output: Path, base_dtype: str = "float32", **options: Any) -> dict[str, Any]:
    """In as little memory as the plan takes."""
    base, adapter = files(name, base_dtype)
    entry = {"path": str(adapter), "alpha": 8} if name == "frozen copies" else adapter
    config = make_config(output, base, [entry], **options)
    config["compute"]["max_memory"] = least_memory(config)
    return config
