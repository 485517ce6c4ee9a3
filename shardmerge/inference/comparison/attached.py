"""Attach adapters to a base without merging, for comparison with a merged model.

PEFT loads its own adapters; of a pickle it takes only tensors, after `file_formats.torch_pickle` has checked it.
Adapters without a config for PEFT are rebuilt from the formula of the layer that trained them, on the module's output:
y = base(x) + x A B · scale, with A (in, r) and B (r, out). Formats and methods describe as data how their factors are
named and what PEFT supports. No code that reads adapters for a merge is called, and none of the engine, so a mistake
there cannot repeat itself here.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardmerge.adapters.registry import FORMATS, METHODS
from shardmerge.config.schema import AdapterConfig
from shardmerge.errors import ConfigError
from shardmerge.file_formats.adapter_file import CONFIG_NAME, AdapterFile, Beside
from shardmerge.inference.hf import library, quiet, reason
from shardmerge.key_mapping.naming import module_name, nearest
from shardmerge.system import json_text
from shardmerge.system.regular_files import read_small
from shardmerge.verification.reading import Factor, Files
from shardmerge.verification.scaling import alpha_said

_VERIFY = "`shardmerge verify` checks such a merge without loading the model"


@dataclass
class Whole:
    """A weight that was trained in full, and the base's own values."""

    parameter: nn.Parameter
    trained: Tensor
    before: Tensor

    def put(self, *, trained: bool) -> None:
        self.parameter.data.copy_(self.trained if trained else self.before)


@dataclass
class Attached:
    """A base with adapters, which can be switched off."""

    #: Answers as base + adapters do.
    model: Any
    _peft: Any = None
    _formulas: list[Formula] = field(default_factory=list)
    #: Weights that were trained in full.
    _wholes: list[Whole] = field(default_factory=list)

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        for formula in self._formulas:  # no parts of the model
            formula.a, formula.b = formula.a.to(device), formula.b.to(device)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Switch the adapters off in the block."""
        with self._peft.disable_adapter() if self._peft is not None else contextlib.nullcontext():
            self._switch(on=False)
            try:
                yield
            finally:
                self._switch(on=True)

    def _switch(self, *, on: bool) -> None:
        for formula in self._formulas:
            formula.on = on
        for whole in self._wholes:
            whole.put(trained=on)


@dataclass
class Formula:
    """A forward hook that adds a pair of factors to a module's output."""

    a: Tensor
    b: Tensor
    scale: float
    on: bool = True

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + inputs[0] @ self.a @ self.b * self.scale if self.on else output


def attach(model: Any, adapters: Sequence[tuple[AdapterFile, AdapterConfig]], vocabulary: int) -> Attached:
    """Attach the adapters to a base, in place. ``vocabulary`` is the merged model's number of tokens.

    `ConfigError` for adapters that neither PEFT nor the formula can load or compose.
    """
    if model.get_input_embeddings().weight.shape[0] < vocabulary:
        # The adapter has its own rows; PEFT only needs a tensor of that size.
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    wholes = [whole for of in adapters for whole in put_wholes(model, *of)]
    by_peft = [of for of in adapters if _is_pefts(*of)]
    _check_composition(by_peft, len(adapters))
    formulas = [formula for of in adapters if not _is_pefts(*of) for formula in _formulas(model, *of)]
    return Attached(model, _with_peft(model, by_peft) if by_peft else None, formulas, wholes)


def _is_pefts(adapter: AdapterFile, entry: AdapterConfig) -> bool:
    return FORMATS[adapter.format(entry.format)].is_loaded_by_peft(adapter.config)


@contextlib.contextmanager
def folder_for_peft(adapter: AdapterFile) -> Iterator[str]:
    """A folder from which PEFT can load the adapter: its own, or for a sharded one a copy in one file."""
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


def put_wholes(model: Any, adapter: AdapterFile, entry: AdapterConfig) -> list[Whole]:
    """Put the weights of the files beside an adapter into a base. `ConfigError` where one is missing or tied there."""
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


def _check_composition(adapters: Sequence[tuple[AdapterFile, AdapterConfig]], count: int) -> None:
    """Refuse adapters that PEFT applies differently from a merge: several must each add to the base's own weight."""
    for adapter, entry in adapters:
        config, where = adapter.config or {}, adapter.source.location
        if config.get("megatron_config"):
            # The name is untrusted, and may match a file in the working directory.
            module = f"{config.get('megatron_core')!r:.80}"
            raise ConfigError(
                f"{where}: PEFT would import the module that its megatron_core names, {module}; {_VERIFY}"
            )
        if entry.prefix:
            raise ConfigError(f"{where}: PEFT cannot load a part of an adapter (prefix {entry.prefix!r}); {_VERIFY}")
        method = METHODS.get(adapter.family)
        if entry.weight != 1 and not (method and method.weighs(config)):
            raise ConfigError(f"{where}: PEFT has no weight for {_method(adapter)}, found {entry.weight:g}; {_VERIFY}")
        if count > 1 and not (method and method.composes(config)):
            raise ConfigError(
                f"{where}: {_method(adapter)} does more than add to the base, and PEFT applies several adapters "
                f"otherwise than one after the other; {_VERIFY}"
            )


def _method(adapter: AdapterFile) -> str:
    return "DoRA" if (adapter.config or {}).get("use_dora") else adapter.family


def _with_peft(model: Any, adapters: Sequence[tuple[AdapterFile, AdapterConfig]]) -> Any:
    peft = library("peft")
    wrapped: Any = None
    names = [f"compared{number}" for number in range(len(adapters))]
    for name, (adapter, entry) in zip(names, adapters, strict=True):
        where = adapter.source.location
        try:
            with quiet(), folder_for_peft(adapter) as folder:
                if wrapped is None:
                    wrapped = peft.PeftModel.from_pretrained(model, folder, adapter_name=name)
                # The first is loaded a second time: only this call reports what was loaded.
                found = wrapped.load_adapter(folder, name, torch_device="cpu")
        except Exception as error:  # PEFT has no error class of its own
            raise ConfigError(f"{where}: PEFT cannot load this adapter: {reason(error)}. {_VERIFY}") from error
        kept = METHODS[adapter.family].kept_once if adapter.family in METHODS else ()
        missing = (key for key in found.missing_keys if not any(part in key for part in kept))
        if lost := sorted({*found.unexpected_keys, *missing}):
            raise ConfigError(
                f"{where}: PEFT does not load this adapter whole, so there is nothing to compare with: "
                f"{len(lost)} of its tensors have no place, such as {lost[0]}. {_VERIFY}"
            )
        if entry.weight != 1:
            _weigh(wrapped, name, entry.weight)
    try:
        wrapped.base_model.set_adapter(names if len(names) > 1 else names[0])
    except Exception as error:
        raise ConfigError(f"PEFT cannot apply these adapters together: {reason(error)}. {_VERIFY}") from error
    return wrapped.eval()


def _weigh(model: nn.Module, name: str, weight: float) -> None:
    for module in model.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and name in scaling:
            scaling[name] *= weight


def _formulas(model: Any, adapter: AdapterFile, entry: AdapterConfig) -> list[Formula]:
    kind, where = FORMATS[adapter.format(entry.format)], adapter.source.location
    if kind.pairs is None or "lora_adapter_metadata" in adapter.metadata:
        of = f"of the format {kind.name}" if kind.pairs is None else "with lora_adapter_metadata in their header"
        raise ConfigError(f"{where}: adapters {of} cannot be loaded beside their base here; {_VERIFY}")
    tensors = {name: tensor for name, tensor in _read(adapter).items() if name.startswith(entry.prefix or "")}
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := kind.pairs.keys.fullmatch(name):
            is_a = match["role"].lower() == "a"
            factor = kind.pairs.orientation.view(tensor)
            pairs.setdefault(match["module"], {})["a" if is_a else "b"] = factor
        elif not kind.pairs.others.fullmatch(name):
            raise ConfigError(
                f"{where}: {name} is not a factor of LoRA, which is all that can be rebuilt here; {_VERIFY}"
            )
    if halves := [name for name, pair in pairs.items() if len(pair) < 2]:
        raise ConfigError(f"{where}: {halves[0]} has one factor, expected two")
    formulas = []
    for name, pair in pairs.items():
        stated = kind.stated_scale(adapter.config)
        scale = _scale(adapter, entry, name, pair["a"].shape[1]) if stated is None else stated
        formulas.append(_attach_pair(model, where, name, pair, scale * entry.weight))
    return formulas


def _scale(adapter: AdapterFile, entry: AdapterConfig, module: str, rank: int) -> float:
    """The scale of a module by our config or the file; 1 without either, as in the merge."""
    if entry.scaling is not None:
        return entry.scaling
    alpha = entry.alpha if entry.alpha is not None else alpha_said(adapter, f"{module}.alpha")
    return 1.0 if alpha is None else alpha / rank


def _attach_pair(model: Any, where: str, name: str, pair: Mapping[str, Tensor], scale: float) -> Formula:
    module = _find(model, where, module_name(name))
    a, b = pair["a"], pair["b"]
    inner = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    weight = inner.weight
    shape = tuple(weight.shape if type(inner).__name__ == "Conv1D" else weight.shape[::-1])
    if isinstance(inner, nn.Embedding) or shape != (a.shape[0], b.shape[1]):
        raise ConfigError(
            f"{where}: {name} is of a {type(inner).__name__} of (in, out) {list(shape)}, with A {list(a.shape)} and B "
            f"{list(b.shape)}; expected a linear layer with A (in, r) and B (r, out)"
        )
    formula = Formula(a.to(weight.dtype), b.to(weight.dtype), scale)
    module.register_forward_hook(formula)
    return formula


def _find(model: Any, where: str, name: str) -> Any:
    modules = dict(model.named_modules())
    if name in modules:
        return modules[name]
    same_end = [known for known in modules if known.endswith(f".{name}") or name.endswith(f".{known}")]
    if len(same_end) == 1:
        return modules[same_end[0]]
    near = ", ".join(nearest(name, list(modules)))
    raise ConfigError(f"{where}: transformers' model has no module {name}; it has {near or 'none that resembles it'}")


def _read(adapter: AdapterFile) -> Mapping[str, Tensor]:
    with Files(adapter.files) as files:
        return {name: Factor(files, ref).whole() for name, ref in adapter.tensors.items()}
