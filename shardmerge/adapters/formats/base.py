"""The seam of an adapter format: how adapters are stored in files.

A format detects its files, reads their tensors into updates with their scaling, and describes how the layer that
trained them applies its factors, so that `compare` can attach the adapter unmerged. `shardmerge.adapters.registry`
registers it by its name; nothing outside its module compares that.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from shardmerge.adapters.claims import NO_BASE, BaseView, Claims
from shardmerge.adapters.formats.scales import ReadNumber, Scales
from shardmerge.adapters.methods.base import FAMILIES
from shardmerge.spec.tensors import Orientation, TensorRef

Tensors = Mapping[str, TensorRef]
Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AdapterContent:
    """What an adapter's files hold, and what our config says of the adapter."""

    tensors: Tensors
    #: ``adapter_config.json``; None where there is none.
    config: Config | None
    #: The metadata of the file's header, where it has one.
    metadata: Mapping[str, str]
    alpha: float | None
    scaling: float | None
    #: How B of fused experts is laid out, ``peft`` or ``unsloth``; None where our config does not say.
    expert_layout: str | None
    #: Reads a tensor of one number.
    read_number: ReadNumber
    #: Keys of the config that our config says to leave out.
    ignored: tuple[str, ...] = ()

    @property
    def scales(self) -> Scales:
        """What finds the scale of modules whose format has no config."""
        return Scales(self.alpha, self.scaling, self.metadata, self.read_number)


@dataclass(frozen=True, slots=True)
class Pairs:
    """The factors of the layer that trained an adapter: y = base(x) + s · x A B, with A (in, r) and B (r, out)."""

    #: Matches a factor's key; its groups are ``module`` and ``role``, which is a or b in either case.
    keys: re.Pattern[str]
    #: Of these against the file's tensors, which are (r, in) and (out, r) if it is transposed.
    orientation: Orientation
    #: Matches keys of tensors that are not factors.
    others: re.Pattern[str] = re.compile(r".*\.alpha")


class AdapterFormat(ABC):
    """One way to store adapters. Instances carry no state."""

    name: ClassVar[str]
    #: What it is, for the table of what is supported.
    summary: ClassVar[str]
    #: Whether its adapter_config.json states the scale, so that our config's alpha and scaling must not.
    config_states_scale: ClassVar[bool] = False
    #: Whether ``ignore_keys`` can leave out keys of its adapter_config.json.
    heeds_ignored_keys: ClassVar[bool] = False
    #: The factors of its layers, for what attaches an adapter without PEFT; None where that is not known.
    pairs: ClassVar[Pairs | None] = None

    @abstractmethod
    def detect(self, tensors: Tensors, config: Config | None) -> bool:
        """Whether an adapter is stored in this format, by its config and the names of its tensors."""

    @abstractmethod
    def read(self, content: AdapterContent, base: BaseView) -> Claims:
        """The adapter's updates with their scaling, and everything that is wrong with it."""

    def method(self, tensors: Collection[str], config: Config | None) -> str:
        """The method that made an adapter, by PEFT's name where it has one."""
        return "LORA"

    def is_telling(self, names: Collection[str]) -> bool:
        """Whether names show that a file is an adapter of this format, where it could also be a model's checkpoint."""
        return False

    def stated_scale(self, config: Config | None) -> float | None:
        """The one scale of all modules, if the config states it."""
        return None

    def is_loaded_by_peft(self, config: Config | None) -> bool:
        """Whether PEFT itself can attach the adapter to its base."""
        return False

    def claim(self, content: AdapterContent, base: BaseView = NO_BASE) -> Claims:
        """Check what our config says of the adapter, and read it."""
        if self.config_states_scale and content.config is not None and (content.alpha, content.scaling) != (None, None):
            return Claims.refusal(
                "it has its own adapter_config.json, so alpha and scaling must not be given; weight scales it"
            )
        if content.ignored and not (self.heeds_ignored_keys and content.config is not None):
            return Claims.refusal("ignore_keys are of PEFT's adapter_config.json; this adapter has none")
        claims = self.read(content, base)
        is_idle = not any(FAMILIES[update.family].has_expert_layout for update in claims.updates)
        if content.expert_layout == "unsloth" and is_idle and not claims.problems:  # peft is what is done anyway
            claims.problems.append(
                "expert_layout has no effect: it has no LoRA of fused experts in PEFT's keys; remove it"
            )
        return claims


#: By name, as ``format`` in the config; `shardmerge.adapters.registry` fills this.
FORMATS: dict[str, AdapterFormat] = {}
