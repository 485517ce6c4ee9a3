"""The scale of an adapter that has no adapter_config.json: s = α / r, with α from the first source that states it.

1. our config: ``scaling`` is s itself, ``alpha`` is α;
2. a tensor ``….alpha`` beside the module's factors;
3. the metadata of the file's header: ``lora_adapter_metadata``, which is PEFT's config as JSON (diffusers), or a number
   as ``ss_network_alpha`` (kohya's scripts), ``alpha``, ``lora_alpha`` or ``network_alpha``;
4. the default of the programs that load such files, with a warning; where these differ, the adapter is refused.

Metadata that contradicts itself or the ranks in the file is refused. So is α = 0: kohya's and LyCORIS' modules take it
for "not given", so that s is 1, while kohya's merge, ComfyUI and diffusers take it for 0.
Source: diffusers, loaders/lora_base.py and utils/peft_utils.py; kohya-ss/sd-scripts, networks/lora.py and
networks/merge_lora.py; ComfyUI, comfy/weight_adapter/lora.py.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shardmerge.adapters.claims import Claims
from shardmerge.adapters.formats.parts import part_of
from shardmerge.spec.notices import Warned
from shardmerge.spec.tensors import TensorRef

#: Reads a tensor of one number.
ReadNumber = Callable[[TensorRef], float]

#: Where diffusers keeps PEFT's config.
CONFIG_KEY = "lora_adapter_metadata"
ALPHAS = ("ss_network_alpha", "network_alpha", "lora_alpha", "alpha")
RANKS = ("ss_network_dim", "network_dim", "lora_rank", "rank", "dim", "r")
#: Numbers whose effect on an update is not documented.
_UNCLEAR = ("scale", "scaling", "lora_scale", "lora_scaling", "multiplier", "network_multiplier")
#: Words that say that α / r is not the scale, or not for all modules.
_ALSO = ("use_rslora", "rslora", "rs_lora", "use_dora", "dora_wd", "conv_alpha", "block_alphas", "conv_block_alphas")
#: Arguments of kohya's networks, as JSON.
_ARGUMENTS = "ss_network_args"
_MAX_JSON = 1 << 22
#: Characters of a number.
_MAX_NUMBER = 64
_ASK = "give alpha (or scaling)"


@dataclass(slots=True)
class Scales:
    """Finds the scale of each pair of factors, and collects the messages about all of them."""

    alpha: float | None
    scaling: float | None
    metadata: Mapping[str, str]
    read: ReadNumber
    _assumed: int = 0
    _unknown: bool = False
    _numbers: tuple[float | None, float | None] | str = ""
    _said: dict[str, None] = field(default_factory=dict)

    @property
    def given(self) -> bool:
        """Whether our config states it."""
        return self.alpha is not None or self.scaling is not None

    def unread(self) -> str:
        """The problem of PEFT's config in the header of a file without PEFT's keys."""
        if self.given or self.metadata.get(CONFIG_KEY, "{}") == "{}":
            return ""
        return f"the {CONFIG_KEY} in its header is read beside PEFT's keys alone, lora_A and lora_B: {_ASK}"

    def of(self, claims: Claims, rank: int, number: TensorRef | None, *, one_if_unsaid: bool) -> float:
        """s of a module of rank r, ``number`` being its own α; 1 where it is unknown, which `finish` reports.

        ``one_if_unsaid``: whether all programs that load such a file take 1 where nothing states the scale.
        """
        if number is not None:
            claims.account_for([number])
        if self.scaling is not None:
            return self.scaling
        alpha = self.alpha
        if alpha is None and number is not None:
            alpha = self._own(claims, number)
        elif alpha is None:
            alpha = self._of_metadata(rank)
        if alpha is not None:
            return alpha / max(rank, 1)
        if one_if_unsaid:
            self._assumed += number is None
        else:
            self._unknown = True
        return 1.0

    def _own(self, claims: Claims, number: TensorRef) -> float | None:
        if number.shape not in ((), (1,)):
            claims.misfit(f"{number.name} is {list(number.shape)}; expected one number")
            return 1.0
        alpha = self.read(number)
        if not alpha:
            self._said[
                f"{number.name} holds 0, which some take for a scale of 0 and others for a scale of 1: {_ASK}"
            ] = None
        return alpha or 1.0

    def _of_metadata(self, rank: int) -> float | None:
        said = self._numbers = self._numbers or stated_numbers(self.metadata)
        if isinstance(said, str):
            self._said[said] = None
            return 1.0
        alpha, of_rank = said
        if alpha is not None and of_rank not in (None, rank):
            self._said[
                f"its metadata says alpha {alpha:g} of rank {of_rank:g}, but it has factors of rank {rank}: {_ASK}"
            ] = None
        return alpha

    def finish(self, claims: Claims, unknown: str, takers: str) -> None:
        """Report problems. ``unknown``: the message about an unknown scale; ``takers``: programs that take 1 for it."""
        claims.problems += self._said
        if self._unknown:
            claims.problems.append(unknown)
            claims.unscaled = True
        elif self._assumed:
            claims.warnings.append(
                Warned(
                    f"neither the file nor its metadata says the alpha of {self._assumed} of its modules, so their "
                    f"scale is 1, as {takers} take it; alpha or scaling in the config says otherwise"
                )
            )


def stated_numbers(metadata: Mapping[str, str]) -> tuple[float | None, float | None] | str:
    """α and r in the metadata, or None; a string is a problem."""
    said = {key: metadata[key] for key in (*ALPHAS, *RANKS) if key in metadata}
    numbers = {key: _number(text) for key, text in said.items()}
    alphas = {key: numbers[key] for key in ALPHAS if key in numbers}
    if not alphas:
        unclear = [key for key in _UNCLEAR if key in metadata]
        return f"{_quoted(metadata, unclear)}, and not what that scales: {_ASK}" if unclear else (None, None)
    if wrong := [key for key, number in numbers.items() if number is None or not number]:
        return f"{_quoted(metadata, wrong)}; expected a number other than 0: {_ASK}"
    if also := _also(metadata):
        return f"its metadata says {', '.join(also)}, so that alpha / rank is not the scale of all its modules: {_ASK}"
    ranks = {key: numbers[key] for key in RANKS if key in numbers}
    for of in (alphas, ranks):
        if len(set(of.values())) > 1:
            return f"{_quoted(metadata, list(of))}, which contradict each other: {_ASK}"
    return next(iter(alphas.values())), next(iter(ranks.values()), None)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if len(text) <= _MAX_NUMBER and math.isfinite(number) else None


def _quoted(metadata: Mapping[str, str], keys: list[str]) -> str:
    return "its metadata says " + " and ".join(f"{key} {reprlib.repr(metadata[key])}" for key in keys)


def _also(metadata: Mapping[str, str]) -> list[str]:
    """Other settings of the scale, in the metadata itself or in the arguments of the network."""
    arguments = _parsed(metadata.get(_ARGUMENTS, "{}")) or {}
    found = {**{key: metadata[key] for key in _ALSO if key in metadata}, **arguments}
    off = (None, False, "", "none", "false", "0")
    return [key for key in _ALSO if key in found and not _is_off(found[key], off)]


def _is_off(value: object, off: tuple[object, ...]) -> bool:
    return (value.lower() if isinstance(value, str) else value) in off


def stated_config(metadata: Mapping[str, str], modules: list[str]) -> dict[str, Any] | str | None:
    """PEFT's config of the part that has all ``modules``; None where there is none, a string is a problem.

    diffusers writes ``transformer.r`` for a pipeline's part, ``r`` for a model.
    """
    if CONFIG_KEY not in metadata:
        return None
    whole = _parsed(metadata[CONFIG_KEY])
    if whole is None:
        return f"the {CONFIG_KEY} in its header is not an object in JSON of at most {_MAX_JSON:,} characters: {_ASK}"
    parts = {part_of(module) for module in modules}
    part = parts.pop() if len(parts) == 1 else ""
    ours = {key.removeprefix(part): value for key, value in whole.items() if part and key.startswith(part)}
    bare = {key: value for key, value in whole.items() if not part_of(key)}
    if ours and bare:
        return f"the {CONFIG_KEY} in its header speaks of {part} and of a model without a name: {_ASK}"
    if whole and not (ours or bare):
        return f"the {CONFIG_KEY} in its header does not speak of {part or 'a model without a name'}: {_ASK}"
    return ours or bare or None


def _parsed(text: str) -> dict[str, Any] | None:
    """A JSON object without duplicate keys; None where the text is something else."""
    if len(text) > _MAX_JSON:
        return None
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)
