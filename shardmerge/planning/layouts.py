"""The layouts of an output, by ``output.format``: its files and their contents."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shardmerge.config.schema import OutputConfig
from shardmerge.planning.aux_files import AuxFiles
from shardmerge.planning.layout import Layout, Updates
from shardmerge.spec.plans import AuxFile, MergePlan


@dataclass(frozen=True, slots=True)
class LaidOut:
    """The files of an output, or why there can be none."""

    layout: Layout
    aux: tuple[AuxFile, ...] = ()
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    #: The files whose contents went into the layout's headers, and a checksum of each.
    made_of: Mapping[str, str] = field(default_factory=dict)


class OutputLayout(ABC):
    """One layout. It is asked for while planning, so it reads no weights and imports no torch."""

    #: Whether weights beside the model's own are copied to the output.
    copies_weights = True

    @abstractmethod
    def lay_out(self, checkpoint: Layout, updates: Updates, aux: AuxFiles, name: str, config: OutputConfig) -> LaidOut:
        """Lay out what the merged ``checkpoint`` would be, with ``aux`` beside it, for an output called ``name``."""

    def path(self, folder: Path, shards: Sequence[str], config: OutputConfig) -> Path:
        """The ``output.path`` by which shards get these names, wherever the finished ``folder`` is now."""
        return folder

    def next_steps(self, plan: MergePlan) -> str:
        """Commands to run next, if the output needs any before it can be loaded."""
        return ""


class CheckpointLayout(OutputLayout):
    """safetensors shards, with an index where there are several."""

    def lay_out(self, checkpoint: Layout, updates: Updates, aux: AuxFiles, name: str, config: OutputConfig) -> LaidOut:
        return LaidOut(checkpoint, tuple(aux.files))


class GgufLayout(OutputLayout):
    """One GGUF file, with a Modelfile beside it."""

    copies_weights = False

    def lay_out(self, checkpoint: Layout, updates: Updates, aux: AuxFiles, name: str, config: OutputConfig) -> LaidOut:
        from shardmerge.planning import gguf_file

        return gguf_file.lay_out(checkpoint, updates, aux, name, config)

    def path(self, folder: Path, shards: Sequence[str], config: OutputConfig) -> Path:
        return folder / shards[0].removesuffix(f"-{config.quantization}.gguf")

    def next_steps(self, plan: MergePlan) -> str:
        name, folder = shlex.quote(Path(plan.output).name.lower()), shlex.quote(plan.output)
        return f"\n\nwith Ollama:\n  cd {folder} && ollama create {name} -f Modelfile\n  ollama run {name}"


LAYOUTS: Mapping[str, OutputLayout] = {"safetensors": CheckpointLayout(), "gguf": GgufLayout()}
