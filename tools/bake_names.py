"""Bake ``shardmerge/key_mapping/names.json``: what the installed transformers does to names when it loads a checkpoint.

``python -m tools.bake_names`` writes the file, ``--check`` says whether it is out of date. Every model class is built
on the meta device from its default config and asked; nothing is downloaded, and no text of transformers is copied but
the patterns of its conversion rules.

The file's keys:

- ``transformers``: the version that was asked.
- ``rules``: by class or model type, the renamings and conversions of a checkpoint's names, in order; a string stands
  for the rules of that key. A renaming is [from, to] or [from, to, [from, to]], the last pair leading back; others are
  {"from", "to", "ops", "group", "offset", "prefix", "back"}, see ``shardmerge.key_mapping.rules.Rule``.
- ``types``: by model type, ``roles`` (role → class) and ``tie``: the default of tie_word_embeddings, or how it follows
  from the config, see ``key_mapping.table.ties``; ``tasks`` (PEFT's task → class) and ``heads``, the tensors that
  some class of the type has beside its plain model.
- ``architectures``: by class, ``type``, ``prefix`` (base_model_prefix), ``parts`` ([path, class, key of its config]),
  ``conv1d``, ``experts``, ``transposed`` and ``gates``, ``output``, ``tied`` and ``across``, see
  ``shardmerge.key_mapping.table.Architecture``; of a class that has a task, ``head`` (tensor → dimensions: a number,
  "labels", or [key of the config, default, times]) and ``needs``, see ``tools.bake_heads``.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import operator
import re
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
from transformers.initialization import no_init_weights
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tools import bake_heads

TARGET = Path(__file__).resolve().parent.parent / "shardmerge" / "key_mapping" / "names.json"

_RESNET = {"model_type": "resnet", "out_features": ["stage1", "stage2", "stage3", "stage4"]}
_DETR = {"use_timm_backbone": False, "backbone": None, "backbone_config": _RESNET}
_ROPES = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
_SMALL_CONV = [3, 1, 1]
_PPOCR_BLOCK = {
    "reduce_channel": [1, 1, 0],
    "return_channel": [1, 1, 0],
    **{
        f"{kind}_{ratio}": _SMALL_CONV
        for kind in ("vertical_long_to_small_conv", "horizontal_small_to_long_conv", "symmetric_conv_long")
        for ratio in ("longratio", "midratio", "shortratio")
    },
}
#: What the default config of a class lacks to be built, by config class or class: arguments, and attributes that are
#: set afterwards (dotted: those of a part's config).
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "AutoformerConfig": {"prediction_length": 4},
    "AyaVisionConfig": {"vision_config": {"model_type": "siglip_vision_model"}},
    "BeitConfig": {"out_indices": [3, 5, 7, 11]},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 8711}},
    "CohereCompassConfig": {"text_config": {"rope_parameters": _ROPES}},
    "CohereCompassTextConfig": {"rope_parameters": _ROPES},
    "ConditionalDetrConfig": _DETR,
    "ConvNextConfig": {"hidden_sizes": [96, 192, 384, 768]},
    "ConvNextV2Config": {"hidden_sizes": [96, 192, 384, 768]},
    "DabDetrConfig": _DETR,
    "DeformableDetrConfig": _DETR,
    "DetrConfig": _DETR,
    "DiffusionGemmaConfig": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}},
    "DiffusionGemmaTextConfig": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64},
    "Dots1Config": {"n_shared_experts": 2, "n_routed_experts": 8, "num_experts_per_tok": 2},
    "Emu3Config": {"vocabulary_map": {"<image>": 8711}},
    "EsmConfig": {"vocab_size": 33},
    "FocalNetConfig": {"hidden_sizes": [192, 384, 768, 768]},
    "Gemma4AssistantConfig": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
    "Gemma4UnifiedAssistantConfig": {
        "text_config": {"model_type": "gemma4_unified_text", "num_kv_shared_layers": 1},
    },
    "HieraConfig": {"decoder_hidden_size": 512, "decoder_depth": 1, "decoder_num_heads": 8},
    "InformerConfig": {"prediction_length": 4},
    "Lfm2MoeConfig": {"layer_types": ["conv"] * 31 + ["full_attention"]},
    "NemotronConfig": {"num_key_value_heads": 8},
    "OmDetTurboConfig": {**_DETR, "backbone_config": {"model_type": "swin", "out_indices": [1, 2, 3]}},
    "PPOCRV5ServerDetConfig": {"intraclass_block_config": _PPOCR_BLOCK, "kernel_list": [3, 2, 2]},
    "PPOCRV6MediumDetConfig": {"intraclass_block_config": _PPOCR_BLOCK, "kernel_list": [3, 2, 2]},
    "ReformerConfig": {"is_decoder": True},
    "Sapiens2Config": {
        "head_config": {
            "upsample_out_channels": [64, 64],
            "upsample_kernel_sizes": [4, 4],
            "conv_out_channels": [64, 64],
            "conv_kernel_sizes": [1, 1],
            "scale_conv_out_channels": [64, 64],
            "scale_conv_kernel_sizes": [1, 1],
            "scale_final_hidden_sizes": [32, 16],
        }
    },
    "TableTransformerConfig": _DETR,
    "TimeSeriesTransformerConfig": {"prediction_length": 4},
    "ViltConfig": {"num_images": 2},
    "VitMatteConfig": {"fusion_hidden_sizes": [256, 128, 64, 32]},
    "Wav2Vec2BertConfig": {"vocab_size": 32},
    "Wav2Vec2ConformerConfig": {"vocab_size": 32},
}
_ATTRIBUTES: dict[str, dict[str, Any]] = {
    "BridgeTowerConfig": {"contrastive_hidden_size": 512, "logit_scale_init_value": 2.6592},
    "DbrxConfig": {"attn_config.rope_theta": 10000.0},
    "DeepseekOcr2Config": {"text_config.mlp_layer_types": ["dense"] + ["sparse"] * 63},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense"] + ["sparse"] * 63},
    "Gemma4AssistantConfig": {"text_config.num_kv_shared_layers": 1},
    "Granite4VisionConfig": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [0], "downsample_rate": "1/2"},
    "HunYuanDenseV1Config": {"head_dim": 128},
    "HunYuanMoEV1Config": {"head_dim": 128},
    "HunYuanVLConfig": {"text_config.head_dim": 128},
    "HunYuanVLTextConfig": {"head_dim": 128},
    "MinistralConfig": {"head_dim": 128},
    "MoonshineStreamingConfig": {"num_key_value_heads": 8},
    "MoshiConfig": {"audio_vocab_size": 2048},
    "PerceiverConfig": {"num_cross_attention_heads": 1, "num_self_attention_heads": 1},
    "PerceptionLMConfig": {"vision_config.model_args": {"embed_dim": 64}},
    "Qwen3OmniMoeConfig": {
        "talker_config.spatial_merge_size": 2,
        "talker_config.text_config.shared_expert_intermediate_size": 64,
    },
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2, "text_config.shared_expert_intermediate_size": 64},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 64},
    "Qwen4ExpConfig": {f"text_config.indexer_{key}": 8 for key in ("n_heads", "kv_heads", "head_dim")}
    | {"text_config.indexer_budget": 64, "text_config.indexer_compress_ratio": 4},
    "Qwen4ExpTextConfig": {f"indexer_{key}": 8 for key in ("n_heads", "kv_heads", "head_dim")}
    | {"indexer_budget": 64, "indexer_compress_ratio": 4},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
    "T5Gemma2EncoderConfig": {"text_config.dropout_rate": 0.0},
    "T5Gemma2TextConfig": {"dropout_rate": 0.0},
    "T5Gemma2DecoderConfig": {"dropout_rate": 0.0},
}

#: Configs with which some classes have parts that their default lacks, to be asked as well.
_VARIANTS: dict[str, dict[str, Any]] = {
    "DeformableDetrConfig": {"with_box_refine": True, "two_stage": True},
    "GPT2Config": {"add_cross_attention": True},
    "Gemma4TextConfig": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
    },
    "HunYuanMoEV1Config": {"num_experts": 8, "moe_topk": 2},
}


def main() -> int:
    return command(__doc__, TARGET, bake)


def command(doc: str | None, target: Path, bake: Callable[[], tuple[str, dict[str, str]]]) -> int:
    """Bake a file from the command line; with ``--check``, 1 where it is out of date."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file is out of date")
    options = parser.parse_args()
    text, failures = bake()
    for name, reason in sorted(failures.items()):
        print(f"left out: {name}: {reason}", file=sys.stderr)
    if options.check:
        current = target.read_text() if target.exists() else ""
        print("up to date" if current == text else f"{target} is out of date: bake it again, without --check")
        return int(current != text)
    target.write_text(text)
    print(f"{target}: {len(text.encode()):,} bytes")
    return 0


def bake() -> tuple[str, dict[str, str]]:
    """The file's text, and the classes that could not be built with the reasons."""
    quiet()
    found = classes()
    architectures: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for name, cls in sorted(found.items()):
        if name.endswith("PreTrainedModel"):
            continue
        try:
            model = build(cls)
        except BuildError as error:
            failures[name] = str(error)
            architectures.setdefault(name, {"type": _config_class(cls).model_type, "prefix": cls.base_model_prefix})
            continue
        _describe(model, architectures)
        if variant := _VARIANTS.get(_config_class(cls).__name__):
            _describe(build(cls, **variant), architectures)
    types = model_types(found, architectures)
    roles = {model_type: entry.get("roles", {}) for model_type, entry in types.items()}
    for entries, of_heads in zip((types, architectures), bake_heads.bake(found, build, roles), strict=True):
        for name, entry in of_heads.items():
            entries[name] |= entry
    data = {
        "transformers": transformers.__version__,
        "rules": rules(),
        "types": types,
        "architectures": {name: _without_empty(entry) for name, entry in architectures.items()},
    }
    return _pretty(data), failures


def _pretty(data: dict[str, Any]) -> str:
    """JSON with a line per entry: to be read and compared by people."""
    sections = []
    for key, value in data.items():
        if isinstance(value, dict):
            lines = [f"  {json.dumps(name)}: {json.dumps(value[name])}" for name in sorted(value)]
            sections.append(f"{json.dumps(key)}: {{\n" + ",\n".join(lines) + "\n }")
        else:
            sections.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n " + ",\n ".join(sections) + "\n}\n"


def _without_empty(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if value not in ("", [], {}, False)}


# --- building ---------------------------------------------------------------------------------------------------------


class BuildError(Exception):
    """A class could not be built from its default config."""


def quiet() -> None:
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")


def classes() -> dict[str, type[PreTrainedModel]]:
    """Every model class of the installed transformers, by name."""
    found: dict[str, type[PreTrainedModel]] = {}
    root = Path(transformers.__file__).parent / "models"
    for path in sorted(root.glob("*/modeling_*.py")):
        with suppress(ImportError):
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            for name, cls in vars(module).items():
                if inspect.isclass(cls) and issubclass(cls, PreTrainedModel) and cls.__module__ == module.__name__:
                    config = _config_class(cls)
                    if config is not None and getattr(config, "model_type", None) is not None:
                        found[name] = cls
    return found


def _config_class(cls: type[PreTrainedModel]) -> Any:
    """The config class; of several the first."""
    config = cls.config_class
    return typing.get_args(config)[0] if isinstance(config, types.UnionType) else config


def build(cls: type[PreTrainedModel], **changes: Any) -> PreTrainedModel:
    """A model of the class on the meta device, of its default config with the given changes."""
    config_class = _config_class(cls)
    error: Exception | None = None
    # What is given here counts even if a library would make the default buildable: the table is the same everywhere.
    given = config_class.__name__ in _ARGUMENTS
    for completed in (True,) if given else (False, True):
        try:
            arguments = _ARGUMENTS.get(config_class.__name__, {}) if completed else {}
            with _without_libraries() if completed else nullcontext(), torch.device("meta"), no_init_weights():
                config = config_class(**{**arguments, **changes})
                if completed:
                    _complete(config, _ATTRIBUTES.get(config_class.__name__, {}))
                    _complete(config, _ATTRIBUTES.get(cls.__name__, {}))
                return cls(config)
        except Exception as failure:  # whatever a modeling file raises
            error = failure
    raise BuildError(" ".join(str(error).split())[:160] or type(error).__name__)


def _complete(config: Any, attributes: dict[str, Any]) -> None:
    for path, value in attributes.items():
        owner, _, attribute = path.rpartition(".")
        setattr(operator.attrgetter(owner)(config) if owner else config, attribute, value)


class _Timm(nn.Module):
    """Stands for any model of timm, of which we need to know nothing but that it is there."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.num_features = self.head_hidden_size = 4


@contextmanager
def _without_libraries() -> Iterator[None]:
    """Classes can be built though a library is missing that they need to compute (timm, scipy, PIL, natten)."""
    modules: list[Any] = [module for name, module in sys.modules.items() if name.startswith("transformers.")]
    asked = [(module, module.requires_backends) for module in modules if "requires_backends" in vars(module)]
    wrapper: Any = importlib.import_module("transformers.models.timm_wrapper.modeling_timm_wrapper")
    before = vars(wrapper).get("timm")
    try:
        for module, _ in asked:
            module.requires_backends = lambda *_: None
        wrapper.timm = types.SimpleNamespace(create_model=_Timm)
        yield
    finally:
        for module, check in asked:
            module.requires_backends = check
        if before is None:
            del wrapper.timm
        else:
            wrapper.timm = before


# --- architectures ----------------------------------------------------------------------------------------------------


def _describe(model: PreTrainedModel, architectures: dict[str, Any]) -> None:
    """Add what is to be known of a model's class and of its parts' classes."""
    cls = type(model)
    entry = architectures.setdefault(cls.__name__, {"type": model.config.model_type, "prefix": cls.base_model_prefix})
    children = list(_children(model))
    if "parts" not in entry:
        entry["parts"] = [
            [path, type(part).__name__, _config_key(model.config, part.config)] for path, part in children
        ]
    conv1d: set[str] = set(entry.get("conv1d", ()))
    experts: dict[str, list[str]] = entry.setdefault("experts", {})
    for path, module in _own_modules(model, {path for path, _ in children}):
        if isinstance(module, Conv1D):
            conv1d.add(path.rpartition(".")[2])
        elif _has_experts(module):
            params = module.named_parameters(recurse=False)
            experts[_template(path)] = [name for name, param in params if param.ndim > 1]
            entry["transposed"] = entry.get("transposed", False) or bool(getattr(module, "is_transposed", False))
            entry["gates"] = entry.get("gates") or _gates(module)
    entry["conv1d"] = sorted(conv1d)
    entry["experts"] = dict(sorted(experts.items()))
    entry["output"] = _output(model)
    tied, across = _ties(model)
    entry["tied"] = {**entry.get("tied", {}), **tied}
    entry["across"] = sorted({*entry.get("across", ()), *across})
    for _, part in children:
        _describe(part, architectures)


def _children(model: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    """The nearest models below, in order of registration."""
    paths: list[str] = []
    for path, module in model.named_modules():
        if path and isinstance(module, PreTrainedModel) and not any(path.startswith(f"{above}.") for above in paths):
            paths.append(path)
            yield path, module


def _own_modules(model: PreTrainedModel, children: set[str]) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        # What weight norm makes of a convolution's weight are vectors of three dimensions, not experts.
        if "parametrizations" in path:
            continue
        if path not in children and not any(path.startswith(f"{child}.") for child in children):
            yield path, module


def _config_key(config: Any, part: Any) -> str | None:
    """Where in a model's config its part's config lies: "" the same one, None unknown."""
    if part is config or type(part) is type(config):
        return ""  # or a copy, with changes that are not part of the file
    own: list[tuple[str, Any]] = [
        (key, value) for key, value in vars(config).items() if isinstance(value, transformers.PretrainedConfig)
    ]
    for key, value in own:
        if value is part:
            return key
    for key, value in own:
        if below := _config_key(value, part):
            return f"{key}.{below}"
    same_type = [key for key, value in own if type(value) is type(part)]
    return same_type[0] if len(same_type) == 1 else None


def _has_experts(module: nn.Module) -> bool:
    """Whether it has parameters (E, out, in) of its own."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return False
    return any(param.ndim == 3 and param.shape[0] > 1 for param in module.parameters(recurse=False))


def _gates(module: nn.Module) -> str:
    """How gate_up_proj joins gate and up: ``concatenated``, ``interleaved``, ``none``; "" if the class says nothing."""
    joined = getattr(module, "is_concatenated", None)
    if joined is None:
        return ""
    if not getattr(module, "has_gate", False) or not hasattr(module, "gate_up_proj"):
        return "none"
    return "concatenated" if joined else "interleaved"


def _output(model: PreTrainedModel) -> str:
    """The module that is the output head; "" where there is none."""
    try:
        head = model.get_output_embeddings()
    except Exception:  # classes without one say so in many ways
        return ""
    return next((name for name, module in model.named_modules() if module is head), "") if head is not None else ""


def _template(path: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", path)


def _ties(model: PreTrainedModel) -> tuple[dict[str, str], set[str]]:
    """The class's own ties, whatever they are of: tied weight → the one that it is; and weights tied across numbers.

    In both # stands for numbers where the class declares patterns or whole modules. Where a number of the one is that
    of the other, a checkpoint that has the one tells of the other. Across numbers (``class_embed.3`` is
    ``class_embed.0``) the model's config alone says how many there are, which the table does not know.
    """
    declared = getattr(model, "_tied_weights_keys", None)
    if not declared:
        return {}, set()
    before = getattr(model.config, "tie_word_embeddings", None)
    try:
        model.config.tie_word_embeddings = True
        pairs = model.get_expanded_tied_weights_keys(all_submodels=False)
    except Exception:  # patterns that do not fit the default config
        return {}, set()
    finally:
        if before is not None:
            model.config.tie_word_embeddings = before
    there = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    pairs = {target: source for target, source in sorted(pairs.items()) if {target, source} <= there}
    if pairs == {target: declared.get(target) for target in pairs}:
        return pairs, set()
    alike = {target for target, source in pairs.items() if _numbers(target) == _numbers(source)}
    across = {_template(name) for target in pairs.keys() - alike for name in (target, pairs[target])}
    return {_template(target): _template(pairs[target]) for target in sorted(alike)}, across


def _numbers(name: str) -> list[str]:
    return [segment for segment in name.split(".") if segment.isdecimal()]


# --- model types ------------------------------------------------------------------------------------------------------

#: Role → the mappings of transformers' auto classes, the first that has the type wins.
_ROLES: dict[str, tuple[str, ...]] = {
    "model": ("MODEL_MAPPING_NAMES",),
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    "backbone": ("MODEL_FOR_BACKBONE_MAPPING_NAMES",),
    "head": (
        "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
        "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_MAPPING_NAMES",
    ),
}


def model_types(found: dict[str, type[PreTrainedModel]], architectures: dict[str, Any]) -> dict[str, Any]:
    """What is known of every model type."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    entries: dict[str, Any] = {}
    for role, mappings in _ROLES.items():
        for mapping in mappings:
            for model_type, name in getattr(auto, mapping).items():
                name = name if isinstance(name, str) else name[0]
                if name in architectures:
                    entries.setdefault(model_type, {}).setdefault("roles", {}).setdefault(role, name)
    configs = {_config_class(cls).model_type: _config_class(cls) for cls in found.values()}
    for name, cls in found.items():
        if architectures.get(name, {}).get("tied") or architectures.get(name, {}).get("across"):
            config = _config_class(cls)
            configs[config.model_type] = config
    for model_type, config in sorted(configs.items()):
        tie = _tie(config)
        if tie:
            entries.setdefault(model_type, {})["tie"] = tie
    return entries


def _tie(config_class: Any) -> Any:
    """The default of tie_word_embeddings; "always"; or {"with": key of a part, "type", "cases"}."""

    def value(data: dict[str, Any]) -> bool:
        for needed in ({}, _ARGUMENTS.get(config_class.__name__, {})):
            with suppress(Exception):
                config = config_class.from_dict(json.loads(json.dumps({**needed, **data})))
                return bool(getattr(config, "tie_word_embeddings", False))
        return False

    tops: tuple[dict[str, Any], ...] = ({}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False})
    for key, part in sorted((getattr(config_class, "sub_configs", None) or {}).items()):
        cases = [value({**top, key: {"tie_word_embeddings": tie}}) for top in tops for tie in (True, False)]
        if cases[::2] != cases[1::2]:
            default = getattr(_default(config_class), key, None)
            model_type = getattr(default, "model_type", None) or getattr(part, "model_type", "")
            return {"with": key, "type": model_type, "cases": "".join("FT"[case] for case in cases)}
    absent, true, false = map(value, tops)
    return "always" if (absent, true, false) == (True, True, True) else absent


def _default(config_class: Any) -> Any:
    with suppress(Exception):
        return config_class()
    return None


# --- rules ------------------------------------------------------------------------------------------------------------

#: Split cuts by the sizes of the targets, which a config gives: by targets, the config's keys in proportion.
_SPLITS = {
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): (
        "num_attention_heads",
        "num_key_value_heads",
        "num_key_value_heads",
    )
}


def rules() -> dict[str, Any]:
    """transformers' rules by class or model type, equal ones once."""
    baked: dict[str, Any] = {}
    keys: dict[str, str] = {}
    for key, transforms in sorted(_build_checkpoint_conversion_mapping().items()):
        entries = [_rule(transform) for transform in transforms]
        text = json.dumps(entries)
        baked[key] = keys.setdefault(text, key) if text in keys else entries
        keys.setdefault(text, key)
    return baked


def _rule(transform: Any) -> Any:
    kind = type(transform).__name__
    entry: dict[str, Any] = {"from": _short(transform.source_patterns), "to": _short(transform.target_patterns)}
    for target in transform.target_patterns:
        assert kind == "GroupWeightRename" or not re.search(r"\\[2-9]", target), target
    if kind == "WeightConverter":
        return {**entry, "ops": [_operation(operation, transform) for operation in transform.operations]}
    back = transform.reverse_transform()
    entry["back"] = [_short(back.source_patterns), _short(back.target_patterns)]
    if kind == "GroupWeightRename":
        return {**entry, "group": True}
    if kind == "PrefixChange":
        return {**entry, "prefix": True}
    if kind.endswith("IndexOffsetWeightRename"):
        return {**entry, "offset": transform.offset}
    assert kind == "WeightRenaming", kind
    plain = [entry["from"], entry["to"]]
    return plain if entry["back"] == plain[::-1] else [*plain, entry["back"]]


def _short(patterns: list[str]) -> str | list[str]:
    return patterns[0] if len(patterns) == 1 else list(patterns)


def _operation(operation: Any, transform: Any) -> list[Any]:
    kind = type(operation).__name__
    if kind == "MergeModulelist" and operation.dim == 0:
        return ["merge"]
    if kind in ("Concatenate", "Chunk"):
        return [{"Concatenate": "concat", "Chunk": "chunk"}[kind], operation.dim]
    if kind == "Split":
        return ["split", operation.dim, *_SPLITS[tuple(transform.target_patterns)]]
    if kind == "Interleave":
        return ["interleave", operation.dim, operation.inverse]
    if kind == "Transpose":
        return ["transpose", operation.dim0, operation.dim1, _hidden_axis(transform) if operation.check_dims else None]
    if kind == "PermuteForRope" and not operation.inverse:
        names = operation.permute_layer_names
        chosen = names and [any(name in target for name in names) for target in transform.target_patterns]
        return ["rope", operation.subconfig_key, chosen]
    if kind == "ErnieFuseAndSplitTextVisionExperts" and (operation.stack_dim, operation.concat_dim) == (0, 1):
        return ["ernie"]
    raise NotImplementedError(f"{kind}: teach shardmerge.key_mapping.conversions what it does")


def _hidden_axis(transform: Any) -> int:
    """Which dimension of the parameter in memory, (E, out, in), is of hidden_size."""
    return 1 if transform.target_patterns[0].endswith("down_proj") else 2


if __name__ == "__main__":
    sys.exit(main())
