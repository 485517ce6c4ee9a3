"""Small models of every class of transformers that ties weights, adapters on what is tied, and what PEFT makes of them.

Sizes are taken from the class's default config and made smaller by rules: a factor for what looks like a width, two of
what looks like layers. The first factor that gives a model is taken. Whatever the rules do not understand stays as it
is, so that a class may remain too large, or not be built at all; the test that uses this says which ones.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from tools import bake_names

VOCAB = 64
_FACTORS = (32, 16, 8, 4, 64, 2)
_DEPTHS = (2, 100)
#: What to try first, to save time.
_FIRST = {"NeoMMEForMaskedLM": [(100, 64)]}
_MOST_PARAMETERS = 30_000_000
_LAYERS = re.compile(
    r"(^|_)(num_hidden_layers|num_layers|layers|n_layer|n_layers|num_blocks|depth|layer_num)$|_layers$"
)
_WIDTH = re.compile(
    r"hidden|d_model|n_embd|dim|inter|ffn|inner|channels|width|embed|d_ff|d_kv|rank|units|size|proj|head"
)
_NO_WIDTH = re.compile(
    r"image_size|patch|kernel|stride|num_|window|groups|n_head|heads|sample|position|max_|frames|temporal|spatial|seq"
    r"|length|top_k|chunk|pool|expand|factor|ratio|size_per|downsample|block|mels|bins|codebook_size|context|^n_(?!embd)"
)
_TOKEN = re.compile(r"token_(id|index)$|_id$|_idx$|index$")
_POSITIONS = re.compile(r"max_position|n_positions|max_.*positions|seq_len|max_.*length")


# --- configs ----------------------------------------------------------------------------------------------------------


def _parts(config: Any) -> Iterator[Any]:
    from transformers import PretrainedConfig

    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


def _default(cls: Any) -> Any:
    """The class's config as the table's maker completes it."""
    config_class = bake_names._config_class(cls)
    arguments = bake_names._ARGUMENTS.get(config_class.__name__, {})
    with bake_names._without_libraries():
        config = config_class(**copy.deepcopy(arguments))
    for name in (config_class.__name__, cls.__name__):
        bake_names._complete(config, bake_names._ATTRIBUTES.get(name, {}))
    return config


def _shrink(config: Any, factor: int, depth: int) -> Any:
    layers: dict[int, int] = {}
    for part in _parts(config):
        for key, value in list(vars(part).items()):
            if type(value) is int and not key.startswith("_"):
                setattr(part, key, _small(key, value, factor, depth, layers))
        for key, value in list(vars(part).items()):
            if isinstance(value, list) and len(value) > depth and len(value) in layers and not key.startswith("_"):
                setattr(part, key, value[:depth])
            if isinstance(value, dict) and value and all(isinstance(index, int) for index in value) and layers:
                setattr(part, key, {index: of for index, of in value.items() if index < depth})
    return config


def _small(key: str, value: int, factor: int, depth: int, layers: dict[int, int]) -> int:
    if _LAYERS.search(key):
        layers[value] = min(value, depth)
        return layers[value]
    if "vocab_size" in key or key in ("n_words",):
        return min(value, VOCAB)
    if _TOKEN.search(key):
        return min(value, VOCAB - 4)
    if key.endswith("experts"):
        return min(value, 4)
    if re.search("experts_per_tok|top_k|topk|moe_k$", key):
        return min(value, 2)
    if _POSITIONS.search(key):
        return min(value, 512)
    if _WIDTH.search(key) and not _NO_WIDTH.search(key) and value >= 2 * factor and value % factor == 0:
        return value // factor
    return value


def _tie(config: Any) -> Any:
    for part in _parts(config):
        if hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = True
    config.tie_word_embeddings = True
    return config


# --- models -----------------------------------------------------------------------------------------------------------


class CannotBuildError(Exception):
    """No factor gives a model of the class."""


def build(cls: Any, folder: Path) -> None:
    """Save a model of the class with tied weights, of random numbers, that can be asked if any can.

    Raises `CannotBuildError`.
    """
    reasons, mute = [], None
    for depth, factor in (*_FIRST.get(cls.__name__, ()), *itertools.product(_DEPTHS, _FACTORS)):
        try:
            _save(cls, folder, factor, depth)
            model = load(cls, folder)
        except Exception as error:  # whatever a modeling file raises
            reasons.append(" ".join(str(error).split())[:100])
            continue
        if asked(model) is not None:
            return
        mute = mute or (factor, depth)
    if mute is None:
        raise CannotBuildError(reasons[0])
    _save(cls, folder, *mute)


def _save(cls: Any, folder: Path, factor: int, depth: int) -> None:
    model = _build(cls, factor, depth)
    if not model.all_tied_weights_keys:
        raise CannotBuildError("it ties nothing")
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)


def _build(cls: Any, factor: int, depth: int) -> Any:
    config = _tie(_shrink(_default(cls), factor, depth))
    with torch.device("meta"), no_init_weights():
        size = sum(param.numel() for param in cls(copy.deepcopy(config)).parameters())
    if size > _MOST_PARAMETERS:
        raise CannotBuildError(f"{size // 1_000_000}M parameters")
    with torch.random.fork_rng(), bake_names._without_libraries():
        torch.manual_seed(20)
        model = cls(config).eval()
        with torch.no_grad():
            for param in model.parameters():
                if param.is_floating_point():
                    param.copy_(torch.randn(param.shape) * 0.1)
    return model


def load(cls: Any, folder: Path) -> Any:
    """The model from its files; everything that it needs must be in them."""
    with bake_names._without_libraries():
        model, told = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"], f"missing: {sorted(told['missing_keys'])[:3]}"
    return model.eval()


def inputs(model: Any) -> list[dict[str, Any]]:
    """What the model might take, the richest first."""
    takes = inspect.signature(model.forward).parameters
    ids = torch.tensor([[5, 9, 17, 33, 41, 7]])
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    random = torch.Generator().manual_seed(1)
    sections = [part for part in _parts(model.config) if type(getattr(part, "image_size", None)) is int]
    side = sections[0].image_size if sections else 32
    more: dict[str, Any] = {
        "decoder_input_ids": ids[:, :4],
        "pixel_values": torch.randn(1, 3, side, side, generator=random),
        "bbox": torch.zeros(1, 6, 4, dtype=torch.long),
        "codebook_idx": 1,
        "use_cache": False,
    }
    base = {key: value for key, value in given.items() if key in takes}
    without_pixels = {key: value for key, value in more.items() if key in takes and key != "pixel_values"}
    every = {key: value for key, value in more.items() if key in takes}
    found = [{**base, **without_pixels}, {**base, **every}, base, every]
    if "input_features" in takes:
        keys = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
        sizes = {getattr(part, key, None) for part in _parts(model.config) for key in keys}
        for mels in (int(size) for size in sizes if size is not None):
            frames = 2 * getattr(model.config, "max_source_positions", 40)
            features = torch.randn(1, mels, frames, generator=random)
            found += [{**without_pixels, "input_features": features}]
            found += [{**without_pixels, "input_features": features.transpose(1, 2)}]
    return found


def answer(model: Any, given: dict[str, Any]) -> list[Tensor]:
    """All tensors of floats that the model answers with."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(3)
        found = model(**given)
    values = found.values() if hasattr(found, "values") else [found]
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def asked(model: Any) -> tuple[dict[str, Any], list[Tensor]] | None:
    """The first inputs that a model takes, and its answer; of base and adapter if it is both."""
    for given in inputs(model.get_base_model() if hasattr(model, "get_base_model") else model):
        try:
            return given, answer(model, given)
        except Exception:  # whatever a modeling file raises
            continue
    return None


# --- adapters ---------------------------------------------------------------------------------------------------------


def pair(model: Any) -> list[str]:
    """Modules that share a weight that LoRA can be put on: the tied one and its source. Else one with a tied bias."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for target, source in model.all_tied_weights_keys.items():
        names = [name.rpartition(".")[0] for name in (target, source)]
        if target.endswith(".weight") and all(
            isinstance(modules.get(name), (nn.Linear, nn.Embedding)) for name in names
        ):
            return names
    return heads(model)[:1]


def heads(model: Any) -> list[str]:
    """Linear layers whose bias is tied to another parameter."""
    modules = dict(model.named_modules(remove_duplicate=False))
    biases = [name for pair in model.all_tied_weights_keys.items() for name in pair if name.endswith(".bias")]
    names = dict.fromkeys(name.rpartition(".")[0] for name in biases)
    return [name for name in names if type(modules.get(name)) is nn.Linear]


def train(model: Any, modules: Sequence[str], folder: Path, **settings: Any) -> None:
    """LoRA on these modules, and what else ``settings`` have PEFT train, with random numbers; written by PEFT."""
    import peft

    targets = {"target_modules": "|".join(map(re.escape, modules))} if modules else {}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=6, **targets, **settings))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(7)
        for param in wrapped.parameters():
            if param.requires_grad:
                param.add_(torch.randn(param.shape) * 0.3)
    wrapped.save_pretrained(folder)


def attach(model: Any, folder: Path) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(model, folder).eval()


def found_back(wrapped: Any, folder: Path) -> bool:
    """Whether PEFT has loaded what it saved: it renames keys as transformers renames those of checkpoints."""
    import peft

    state = peft.get_peft_model_state_dict(wrapped)
    return all(
        torch.equal(state[name], value) for name, value in load_file(folder / "adapter_model.safetensors").items()
    )


def effective(wrapped: Any) -> dict[str, Tensor]:
    """By name in memory, what every parameter of base + adapter amounts to."""
    model, found = wrapped.base_model.model, {}
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    for name, param in model.named_parameters(remove_duplicate=False):
        if "lora_" in name or ".original_module." in name:
            continue
        module, _, parameter = name.replace(".modules_to_save.default", "").rpartition(".")
        plain = module.removesuffix(".base_layer")
        value = param.detach()
        if plain in layers and parameter == "weight":
            value = value + layers[plain].get_delta_weight("default").detach()
        if plain in layers and parameter == "bias" and layers[plain].lora_bias["default"]:
            value = value + layers[plain].scaling["default"] * layers[plain].lora_B["default"].bias.detach()
        found[f"{plain}.{parameter}" if plain else parameter] = value
    return found


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
