"""No damaged adapter is merged: what is dropped, added, renamed or reshaped at random is refused while planning.

Every specimen is an adapter of the zoo that is accepted as it is. Every way to damage it makes one that cannot be
right: that a whole update is left out would be no damage, so it is not among them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import shardmerge
from shardmerge import FormatError, PlanError
from tests.support import zoo
from tests.support.builders import Tensors, slow_but, untimed
from tests.support.peft_oracle import _new_folder as new_folder
from tests.support.peft_oracle import make_config
from tests.support.zoo import Adapter, lora, peft

SPECIMENS: dict[str, tuple[str, Adapter]] = {
    "LoRA": ("llama", lora("all-linear")),
    "rank patterns": ("llama", lora("q_proj", "o_proj", rank_pattern={r"layers\.0\.self_attn\.q_proj": 7})),
    "Conv1D": ("gpt2", lora("c_attn", "c_fc", "c_proj")),
    "DoRA": ("llama", lora("q_proj", "k_proj", "down_proj", use_dora=True)),
    "lora_bias": ("llama-biased", lora("q_proj", "k_proj", "down_proj", lora_bias=True)),
    "bias": ("llama-biased", lora("q_proj", "down_proj", bias="lora_only")),
    "embedding": ("gpt2", lora("c_attn", "wpe")),
    "modules_to_save": ("bert", lora("query", "intermediate.dense", task_type="SEQ_CLS")),
    "tokens": ("llama", lora("q_proj", trainable_token_indices=[5, 3, 50])),
    "convolutions": ("resnet", lora("convolution", use_dora=True)),
    "experts": ("mixtral", lora("q_proj", target_parameters=["experts.gate_up_proj", "experts.down_proj"])),
    "transposed experts": ("gpt-oss", lora("q_proj", target_parameters=["experts.down_proj", "router.weight"])),
    "split in memory": ("nomic-bert", lora("all-linear")),
    "IA3": ("llama", peft("IA3Config", "k_proj", "down_proj", feedforward_modules=["down_proj"])),
    "LoHa": ("llama", peft("LoHaConfig", "q_proj", "o_proj", r=5, alpha=13)),
    "LoKr": ("llama", peft("LoKrConfig", "q_proj", "o_proj", r=5, alpha=13, decompose_both=True)),
    "VeRA": ("llama", peft("VeraConfig", "q_proj", "o_proj", r=6)),
    "OFT": ("llama", peft("OFTConfig", "q_proj", "o_proj", r=0, oft_block_size=4)),
}

_PREFIX = "base_model.model."
#: What stands behind a module's name, of a factor that is nothing without the others of its module.
_FACTOR = re.compile(
    r"(?P<module>.*)\.(lora_(A|B)\.(weight|bias)|lora_embedding_(A|B)|lora_magnitude_vector"
    r"|token_adapter\.trainable_tokens_delta|hada_w[12]_[ab]|lokr_w[12](_[ab])?|vera_lambda_[bd])"
)


@cache
def specimen_tensors(name: str) -> Tensors:
    return load_file(zoo.adapter_folder(*SPECIMENS[name]) / "adapter_model.safetensors")


def plan(name: str, tensors: Mapping[str, Tensor]) -> shardmerge.MergePlan:
    """The plan of a specimen with other tensors."""
    model, adapter = SPECIMENS[name]
    folder = new_folder("fuzzed")
    copy = folder / "adapter"
    try:
        copy.mkdir()
        shutil.copy(zoo.adapter_folder(model, adapter) / "adapter_config.json", copy)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, copy / "adapter_model.safetensors")
        return shardmerge.plan(make_config(folder / "merged", zoo.base_folder(model), [copy]))
    finally:
        shutil.rmtree(folder)


def factors(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module → what stands behind its name → factor."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if found := _FACTOR.fullmatch(name):
            module = found["module"]
            modules.setdefault(module, {})[name.removeprefix(module)] = tensor
    return modules


# --- ways to damage an adapter; None where there is nothing to damage in that way -------------------------------------


def drop_a_half(tensors: Tensors, random: Random) -> Tensors | None:
    halves = [module + end for module, parts in factors(tensors).items() for end in parts if len(parts) > 1]
    return _without(tensors, random.choice(halves)) if halves else None


def add_a_stranger(tensors: Tensors, random: Random) -> Tensors | None:
    name = random.choice(sorted(tensors))
    ends = ("lora_C.weight", "lora_A.bias", "lora_embedding_A.weight", "hada_w3_a", "scale", "lora_A.weight.absmax")
    module = name.rpartition(".lora_")[0] or name.rpartition(".")[0]
    return {**tensors, f"{module}.{random.choice(ends)}": tensors[name].clone()}


def rename_to_nothing(tensors: Tensors, random: Random) -> Tensors | None:
    old, new = random.choice([(".0.", ".9."), ("proj", "project"), ("model.", "mode1."), ("c_attn", "c_attention")])
    starts = {name: _PREFIX if name.startswith(_PREFIX) else "" for name in tensors}  # twice the prefix is no damage
    renamed = {name: start + name.removeprefix(start).replace(old, new) for name, start in starts.items()}
    return None if list(renamed) == list(renamed.values()) else {renamed[name]: tensors[name] for name in tensors}


def swap_modules(tensors: Tensors, random: Random) -> Tensors | None:
    modules = factors(tensors)
    pairs = [
        (one, other)
        for one in modules
        for other in modules
        if modules[one].keys() == modules[other].keys()
        and any(modules[one][end].shape != modules[other][end].shape for end in modules[one])
    ]
    if not pairs:
        return None
    one, other = random.choice(pairs)
    swapped = {one + end: tensor for end, tensor in modules[other].items()}
    return {**tensors, **swapped, **{other + end: tensor for end, tensor in modules[one].items()}}


def transpose(tensors: Tensors, random: Random) -> Tensors | None:
    oblong = [name for name, tensor in tensors.items() if tensor.ndim == 2 and tensor.shape[0] != tensor.shape[1]]
    return _changed(tensors, oblong, random, lambda tensor: tensor.T)


def flatten(tensors: Tensors, random: Random) -> Tensors | None:
    many = [name for name, tensor in tensors.items() if tensor.ndim > 1 and not _is_magnitude(name)]
    return _changed(tensors, many, random, lambda tensor: tensor.flatten())


def add_a_dimension(tensors: Tensors, random: Random) -> Tensors | None:
    names = [name for name in sorted(tensors) if not _is_magnitude(name)]
    return _changed(tensors, names, random, lambda tensor: tensor[None])


def _is_magnitude(name: str) -> bool:
    """DoRA's magnitudes are one a row, whether they lie in (out,) or (1, out, 1, 1)."""
    return name.endswith(".lora_magnitude_vector")


def cut_the_end(tensors: Tensors, random: Random) -> Tensors | None:
    return _changed(tensors, sorted(tensors), random, lambda tensor: tensor[..., :-1])


def lengthen(tensors: Tensors, random: Random) -> Tensors | None:
    return _changed(tensors, sorted(tensors), random, lambda tensor: torch.cat([tensor, tensor[..., -1:]], dim=-1))


def empty(tensors: Tensors, random: Random) -> Tensors | None:
    return _changed(tensors, sorted(tensors), random, lambda tensor: tensor[:0])


def repeat_under_another_name(tensors: Tensors, random: Random) -> Tensors | None:
    module = random.choice(sorted(factors(tensors)) or [""])
    again = {
        name.replace(_PREFIX, random.choice(["", _PREFIX + "_orig_mod."])): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(module) and name.startswith(_PREFIX)
    }
    return {**tensors, **again}


def _without(tensors: Tensors, name: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key != name}


def _changed(tensors: Tensors, names: list[str], random: Random, change: Callable[[Tensor], Tensor]) -> Tensors | None:
    if not names:
        return None
    name = random.choice(names)
    return {**tensors, name: change(tensors[name]).clone()}


DAMAGES = (
    drop_a_half,
    add_a_stranger,
    rename_to_nothing,
    swap_modules,
    transpose,
    flatten,
    add_a_dimension,
    cut_the_end,
    lengthen,
    empty,
    repeat_under_another_name,
)


@pytest.mark.parametrize("name", SPECIMENS)
def test_specimen_is_accepted(name: str) -> None:
    assert plan(name, specimen_tensors(name)).updates()


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: str(damage.__name__))
@pytest.mark.parametrize("name", slow_but(SPECIMENS, *list(SPECIMENS)[::3]))
@settings(untimed, max_examples=6)
@given(random=st.randoms(use_true_random=False))
def test_damage_is_refused(name: str, damage: Callable[[Tensors, Random], Tensors | None], random: Random) -> None:
    tensors = damage(specimen_tensors(name), random)
    if tensors is None:
        return
    with pytest.raises((PlanError, FormatError)):
        plan(name, tensors)
