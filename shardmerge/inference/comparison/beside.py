"""What PEFT does not load by itself: the shards of an adapter, and whole weights in files beside it.

Shards are put into one file, as PEFT wants them. Whole weights are put into the base before PEFT wraps it. No code of
`shardmerge.adapters.registry` or `shardmerge.planning.planner` is called.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shardmerge.config.schema import AdapterConfig
from shardmerge.errors import ConfigError
from shardmerge.file_formats.adapter_file import CONFIG_NAME, AdapterFile, Beside
from shardmerge.inference.hf import library
from shardmerge.key_mapping.naming import module_name
from shardmerge.system import json_text
from shardmerge.system.regular_files import read_small
from shardmerge.verification.reading import Factor, Files

_VERIFY = "`shardmerge verify` checks such a merge without loading the model"


@contextlib.contextmanager
def folder_for_peft(adapter: AdapterFile) -> Iterator[str]:
    """A folder from which PEFT loads the adapter: its own, or of one in shards a copy in one file."""
    config = adapter.source.fetch(CONFIG_NAME)
    paths = [adapter.source.fetch(file.uri.rpartition("/")[2]) for file in adapter.files]
    if len(paths) == 1:
        yield str(paths[0].parent)
        return
    safetensors = library("safetensors.torch")
    with tempfile.TemporaryDirectory(prefix="shardmerge-") as folder:
        tensors = {name: tensor for path in paths for name, tensor in safetensors.load_file(path).items()}
        safetensors.save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
        (Path(folder) / CONFIG_NAME).write_bytes(read_small(config, json_text.MAX_BYTES))
        yield folder


@dataclass
class Whole:
    """A weight of the base that was trained in full, and what it was before."""

    parameter: nn.Parameter
    trained: Tensor
    before: Tensor

    def put(self, *, trained: bool) -> None:
        self.parameter.data.copy_(self.trained if trained else self.before)


def put_wholes(model: Any, adapter: AdapterFile, entry: AdapterConfig) -> list[Whole]:
    """Put the weights of the files beside an adapter into a base. `ConfigError` where one has no place of its own."""
    wholes = [whole for beside in adapter.beside for whole in _of_file(model, adapter, beside, entry.prefix or "")]
    for whole in wholes:
        whole.put(trained=True)
    return wholes


def _of_file(model: Any, adapter: AdapterFile, beside: Beside, prefix: str) -> Iterator[Whole]:
    where = f"{adapter.source.location}: {beside.name}"
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with Files([beside.file]) as files:
        for name, ref in beside.tensors.items():
            if not name.startswith(prefix):
                continue
            parameter = parameters.get(module_name(name).replace(".base_layer.", "."))
            if parameter is None or tuple(parameter.shape) != ref.shape:
                raise ConfigError(f"{where}: transformers' model has no weight {name} of {list(ref.shape)}. {_VERIFY}")
            if sum(other is parameter for other in parameters.values()) > 1:
                raise ConfigError(
                    f"{where}: {name} is tied to another weight, which cannot be compared here. {_VERIFY}"
                )
            trained = Factor(files, ref).whole().to(parameter.dtype)
            yield Whole(parameter, trained, parameter.detach().clone())
