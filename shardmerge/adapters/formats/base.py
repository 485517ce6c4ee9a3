"""The seam of an adapter format: how adapters are stored in files.

A format detects its files, reads their tensors into updates with their scaling, and describes the layer that trained
them, so that `compare` can attach the adapter unmerged. `shardmerge.adapters.registry` registers it by its name, which
only its own module compares.
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
    """The content of an adapter's files, and the settings of the adapter in our config."""

    tensors: Tensors
    #: ``adapter_config.json``; None where there is none.
    config: Config | None
    #: The metadata of the file's header, where it has one.
    metadata: Mapping[str, str]
    alpha: float | None
    scaling: float | None
    #: The layout of B of fused experts, ``peft`` or ``unsloth``, if our config says it.
    expert_layout: str | None
    #: Reads a tensor of one number.
    read_number: ReadNumber
    #: Keys of adapter_config.json that our config ignores.
    ignored: tuple[str, ...] = ()

    @property
    def scales(self) -> Scales:
        """Finds the scale of modules whose format has no config."""
        return Scales(self.alpha, self.scaling, self.metadata, self.read_number)


@dataclass(frozen=True, slots=True)
class Pairs:
    """The factors of the layer that trained an adapter: y = base(x) + s · x A B, with A (in, r) and B (r, out)."""

    #: Matches a factor's key; its groups are ``module`` and ``role``, which is a or b in either case.
    keys: re.Pattern[str]
    #: Of A and B against the file's tensors.
    orientation: Orientation
    #: Matches keys of tensors that are not factors.
    others: re.Pattern[str] = re.compile(r".*\.alpha")


class AdapterFormat(ABC):
    """One way to store adapters. Instances have no state."""

    name: ClassVar[str]
    #: For the table in docs/formats.md.
    summary: ClassVar[str]
    #: Whether its adapter_config.json states the scale, so that our config's alpha and scaling must not.
    config_states_scale: ClassVar[bool] = False
    #: Whether our ``ignore_keys`` apply to its adapter_config.json.
    heeds_ignored_keys: ClassVar[bool] = False
    #: The factors of its layers, to attach an adapter without PEFT; None where that is not possible.
    pairs: ClassVar[Pairs | None] = None

    @abstractmethod
    def detect(self, tensors: Tensors, config: Config | None) -> bool:
        """Whether an adapter is stored in this format, by its config and the names of its tensors."""

    @abstractmethod
    def read(self, content: AdapterContent, base: BaseView) -> Claims:
        """The adapter's updates with their scaling, and its problems."""

    def method(self, tensors: Collection[str], config: Config | None) -> str:
        """The method that made an adapter, by PEFT's name where it has one."""
        return "LORA"

    def shows_adapter(self, names: Collection[str]) -> bool:
        """Whether names show that a file is an adapter of this format, and not a model's checkpoint."""
        return False

    def stated_scale(self, config: Config | None) -> float | None:
        """The one scale of all modules, if the config states it."""
        return None

    def is_loaded_by_peft(self, config: Config | None) -> bool:
        """Whether PEFT itself can attach the adapter to its base."""
        return False

    def claim(self, content: AdapterContent, base: BaseView = NO_BASE) -> Claims:
        """Check the adapter's settings in our config, and read it."""
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
