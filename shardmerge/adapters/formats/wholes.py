"""Tensors that were trained and saved whole, and rows of embeddings: they replace the base's.

Among PEFT's factors these are ``modules_to_save``, trained biases, embeddings whose vocabulary was resized, and the own
weights of layers that it has wrapped. Trainers also write them into files of their own beside the adapter. Rows are
those of ``trainable_token_indices``, and of PEFT's method of that name (peft/tuners/trainable_tokens/layer.py, 0.21).
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Any

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.checks import MISSING, Config
from shardmerge.adapters.methods.whole import Replacement, TokenRows, TokenSettings, WholeSettings
from shardmerge.key_mapping.naming import module_name, unwrapped
from shardmerge.spec.tensors import TensorRef

_WHOLE = re.compile(r"(?P<module>.+)\.(?P<parameter>[A-Za-z_]\w*)")
_SAVED = re.compile(r"\.modules_to_save(\.(?!weight$|bias$)[^.]+)?(?=\.)")
_WRAPPED = re.compile(r"(\.token_adapter)?\.base_layer(?=\.)")
_TOKENS = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta(\.[^.]+)?")
#: Modules that PEFT saves whole by itself when the vocabulary was resized or they were targeted.
_EMBEDDINGS = frozenset(
    {
        *("embed_in", "embed_tokens", "shared", "tok_embeddings", "tokens_embed", "word_embedding", "word_embeddings"),
        *("wte", "decoder", "embed_out", "generator_lm_head", "lm_head", "lm_loss", "output", "output_layer"),
        *("output_projection", "proj_out", "vocab_projector"),
    }
)


def claim_wholes(claims: Claims, tensors: Mapping[str, TensorRef], config: Config) -> None:
    """Claim ``modules_to_save``, trained biases, embeddings and wrapped base layers, which replace the base's tensors.

    Where the vocabulary was resized, PEFT writes the copy under ``modules_to_save`` and the untrained original of a
    trained embedding beside the tensor itself. Neither is read, by PEFT or here.
    """
    leftovers = claims.leftovers(tensors)
    known = {unwrapped(name) for name in tensors} if leftovers else set()
    for written in leftovers:
        name = unwrapped(written)
        if ".original_module." in name and _SAVED.sub("", name.replace(".original_module.", ".")) in known:
            claims.accounted.add(written)
            continue
        plain = _SAVED.sub("", name)
        if plain != name and plain in known:
            claims.accounted.add(written)
            continue
        match = _WHOLE.fullmatch(_WRAPPED.sub("", plain))
        if match is None:
            continue
        module, parameter = module_name(match["module"]), match["parameter"]
        saved = plain != name or _is_saved(module, config)
        bias = parameter == "bias" and config.get("bias") not in (None, "none")
        embedding = parameter in ("weight", "bias") and is_embedding(module)
        wrapped = _WRAPPED.search(plain) is not None
        if saved or bias or embedding or wrapped:
            settings = WholeSettings(saved=saved, copy=wrapped and not (saved or bias), as_in_memory=True)
            claims.updates.append(whole_update(module, parameter, tensors[written], settings))


def claim_beside(claims: Claims, file: str, tensors: Mapping[str, TensorRef]) -> None:
    """Claim the tensors of a file beside the adapter: weights that were trained in full, within the model.

    So a tied weight was trained for both sides, except in PEFT's copy of a module, which is separate. LoRA adds to the
    weight within a layer that PEFT has wrapped; see `claim_wholes`.
    """
    for name, ref in tensors.items():
        whole = unwrapped(name)
        plain = _SAVED.sub("", whole)
        module, _, parameter = module_name(_WRAPPED.sub("", plain)).rpartition(".")
        copy = _WRAPPED.search(whole) is not None
        settings = WholeSettings(saved=plain != whole, copy=copy, as_in_memory=True, beside=file)
        claims.updates.append(whole_update(module, parameter, ref, settings))


def whole_update(
    module: str, parameter: str, ref: TensorRef, settings: WholeSettings | None = None, **changes: Any
) -> ModuleUpdate:
    """The update that replaces a module's parameter."""
    factors = (("whole", ref),)
    return ModuleUpdate(module, parameter, Replacement.name, factors, settings=settings or WholeSettings(), **changes)


def is_embedding(module: str) -> bool:
    """Whether a module has the name of an input embedding or an output head."""
    return module.rpartition(".")[2] in _EMBEDDINGS


def _is_saved(module: str, config: Config) -> bool:
    """Whether a module or one around it is in ``modules_to_save``, compared by ends of names as in PEFT."""
    saved = config.get("modules_to_save") or ()
    segments = module.split(".")
    paths = [".".join(segments[: count + 1]) for count in range(len(segments))]
    return any(path.endswith(tuple(saved)) for path in paths)


def claim_tokens(
    claims: Claims, tensors: Mapping[str, TensorRef], indices: Any, *, for_both_sides: bool = False
) -> None:
    """Claim rows of trained tokens. ``indices``: a list for the input embedding, or a list for each module by name.

    ``for_both_sides``: whether a head that is tied to the embedding has the same rows.
    """
    for name, ref in tensors.items():
        if "trainable_tokens_delta" not in name:  # few do, and the pattern takes 5 % of a plan of 45,000 targets
            continue
        match = _TOKENS.fullmatch(unwrapped(name))
        if match is None:
            continue
        module = module_name(match["module"])
        of_module = indices
        if isinstance(indices, dict):
            found = [value for key, value in indices.items() if module == key or module.endswith(f".{key}")]
            of_module = found[0] if len(found) == 1 else None
        if not of_module:
            claims.reject([ref], f"{name}: the config does not say which tokens of {module} these are")
        else:
            settings = TokenSettings(tuple(of_module), for_both_sides)
            claims.updates.append(ModuleUpdate(module, "weight", TokenRows.name, (("rows", ref),), settings=settings))


def _indices_problem(where: str, value: Any) -> list[str]:
    valid = isinstance(value, (list, tuple)) and all(type(index) is int and 0 <= index < 1 << 31 for index in value)
    if not valid:
        return [f"{where} must be a list of token numbers, found {reprlib.repr(value)}"]
    if len(set(value)) < len(value):
        return [f"{where} names a token twice"]
    return []


def token_problems(key: str, value: Any) -> list[str]:
    """A check of the setting: a list of token numbers, or a list for each module."""
    if value is MISSING or value is None:
        return []
    if isinstance(value, dict):
        return [problem for name, item in value.items() for problem in _indices_problem(f"{key}[{name!r}]", item)]
    return _indices_problem(key, value)
