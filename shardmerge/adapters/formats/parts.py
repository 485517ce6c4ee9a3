"""Names of the parts of a pipeline, which trainers of image and video models put before the names of modules.

A pipeline has a denoiser and text encoders, each a checkpoint of its own or a part of a single file. diffusers writes
``unet.``, ``transformer.`` or ``text_encoder.`` before a module's name, ComfyUI ``diffusion_model.``; kohya's scripts
write ``lora_unet_`` or ``lora_te1_``, and underscores for the dots behind it. Single files store the denoiser as
``model.diffusion_model.``. Only the base shows whether a name begins with a part: GPT-2 calls itself ``transformer``.
Source: diffusers, loaders/lora_pipeline.py; ComfyUI, comfy/lora.py; kohya-ss/sd-scripts, networks/lora.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator

from shardmerge.spec.tensors import Orientation
from shardmerge.spec.updates import Parameter

#: Finds a module's weight in the base; None where there is none.
Weight = Callable[[str], Parameter | None]
#: Names of the denoiser, which are interchangeable. Of two that fit, the longer comes first.
DENOISERS = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "prior.")
#: The other parts.
_OTHERS = ("transformer_2.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
_PARTS = (*DENOISERS, *_OTHERS)
_FLAT = re.compile(r"(?:lora_(?:unet|te\d*|transformer|prior_unet|prior_te)|lycoris)_")


def part_of(module: str) -> str:
    """The part that a dotted name begins with, including its dot; empty where there is none."""
    if not module.startswith(_PARTS):
        return ""
    return next(part for part in _PARTS if module.startswith(part))


def flat_part_of(module: str) -> str:
    """The part before a name with underscores for dots, as kohya's scripts write it; empty where there is none."""
    match = _FLAT.match(module)
    return match[0] if match else ""


def other_names(module: str, of_base: Collection[str]) -> Iterator[str]:
    """Other names of a module in a base that calls the denoiser by ``of_base``, or by nothing."""
    part = part_of(module)
    inner = module.removeprefix(part)
    if part:
        yield inner
    if not part or part in DENOISERS:
        yield from (other + inner for other in of_base)


def is_own(module: str, weight: Weight) -> bool:
    """Whether the base itself has a module of that name, so that the name does not begin with a part."""
    parameter = weight(module)
    if parameter is None:
        return False
    # Where the architecture is not known, a name may have been found without its beginning.
    return parameter.in_memory is not Orientation.UNKNOWN or parameter.regions[0].tensor.startswith(part_of(module))


def mixed_modules_problem(modules: Iterable[str], weight: Weight) -> str:
    """The problem of an adapter of several parts, unless the base itself has their modules."""
    parts = {flat_part_of(module) or part_of(module): module for module in modules}
    parts.pop("", None)
    if all(is_own(module, weight) for module in parts.values()):
        return ""
    return several_parts_problem(parts)


def several_parts_problem(parts: Collection[str]) -> str:
    """The message about an adapter of these parts, if there are several."""
    if len(parts) < 2:
        return ""
    return (
        f"it holds factors of several models ({', '.join(sorted(parts))}); merge them one at a time: give the model's "
        "own directory as base, and prefix for the adapter"
    )
