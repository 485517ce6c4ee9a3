"""Tiny random models of many architectures, adapters on them, and what PEFT makes of the two.

Models are named (`MODELS`), adapters are hashable descriptions (`lora`, `peft`, `by_hand`); both are written by the
real libraries when they are first asked for and kept until the process ends. Sizes are odd and mostly not square, so
that a swapped orientation cannot go unnoticed.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.peft_oracle import _new_folder as new_folder
from tests.support.peft_oracle import stored

F32, BF16, F16, F64 = "float32", "bfloat16", "float16", "float64"
_SEED = 20
VOCAB = 61
_ONE_FILE = "model.safetensors"

# --- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """``kind`` and ``config`` are transformers' classes; ``layout`` says how the tensors are named on disk.

    ``saved``: as transformers 5 saves them, which is as checkpoints of its earlier versions are. ``memory``: as modules
    are called in memory. ``bare``: without the head model's prefix. ``gamma``: BERT's first names of a LayerNorm.
    ``towered``: with the ``vision_model`` within a vision tower that multimodal models of the Hub have.
    ``new_keys`` of config.json are left out: models of the Hub are older than they. ``shard`` is the size of a file.
    ``apart``: the output head is a weight of its own though transformers would tie it, and config.json says so.
    """

    kind: str
    config: str
    settings: Mapping[str, Any]
    inputs: Callable[[], dict[str, Tensor]]
    layout: str = "saved"
    new_keys: tuple[str, ...] = ()
    shard: int = 10**9
    apart: bool = False


def _tokens() -> dict[str, Tensor]:
    """Every token of the vocabulary that is not special to some model."""
    return {"input_ids": torch.arange(3, 57).reshape(2, 27)}


def _sequence_to_sequence() -> dict[str, Tensor]:
    return {**_tokens(), "decoder_input_ids": torch.arange(3, 23).reshape(2, 10)}


def _pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(_SEED))


def _sound() -> dict[str, Tensor]:
    return {"input_features": _pixels(2, 20, 32), "decoder_input_ids": torch.arange(4, 24).reshape(2, 10)}


def _image() -> dict[str, Tensor]:
    return {"pixel_values": _pixels(2, 3, 8, 8)}


def _large_image() -> dict[str, Tensor]:
    return {"pixel_values": _pixels(2, 3, 32, 32)}


def _image_in_text(before: Sequence[int] = (), images: int = 4, after: Sequence[int] = ()) -> dict[str, Tensor]:
    ids = torch.tensor([[*range(3, 20), *before, *[60] * images, *after, *range(20, 40)]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _llava() -> dict[str, Tensor]:
    return {**_image_in_text(), "pixel_values": _pixels(1, 3, 8, 8)}


def _gemma3() -> dict[str, Tensor]:
    text = _image_in_text([58], 4, [59])
    return {**text, "pixel_values": _pixels(1, 3, 8, 8), "token_type_ids": (text["input_ids"] == 60).long()}


def _qwen_vl() -> dict[str, Tensor]:
    text = _image_in_text([58], 4, [57])
    return {
        **text,
        "pixel_values": _pixels(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (text["input_ids"] == 60).long(),
    }


_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
#: A decoder whose attention is 48 wide where the model is 40, and its keys and values 24.
_DECODER = {
    **_SPECIAL,
    "vocab_size": VOCAB,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
#: The same for models that take no size of a head.
_SQUARE = {key: value for key, value in _DECODER.items() if key != "head_dim"}
_ENCODER = {key: value for key, value in _SQUARE.items() if key != "num_key_value_heads"}
_VISION = {
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.2,
}
#: Every expert sees every token: which ones are chosen would hang on the last bit of a router's weight.
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 4}
_GPT2 = {
    **_SPECIAL,
    "vocab_size": VOCAB,
    "n_embd": 40,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 56,
    "n_positions": 64,
    "initializer_range": 0.2,
}
_LLAVA = {
    "text_config": {**_SQUARE, "model_type": "llama"},
    "vision_config": {**_VISION, "model_type": "clip_vision_model"},
    "image_token_index": 60,
    "vision_feature_layer": -1,
}
_QWEN_VL = {
    "text_config": {
        **_SQUARE,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 2, 2]},
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_heads": 2,
        "out_hidden_size": 40,
        "patch_size": 4,
        "fullatt_block_indexes": [0],
        "window_size": 16,
    },
    "image_token_id": 60,
    "video_token_id": 59,
    "vision_start_token_id": 58,
    "vision_end_token_id": 57,
}
_BERT = {**_ENCODER, "num_labels": 3}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 40,
    "d_kv": 12,
    "d_ff": 56,
    "num_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_BART = {
    **_SPECIAL,
    "vocab_size": VOCAB,
    "d_model": 40,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 52,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 3,
    "forced_eos_token_id": None,
    "init_std": 0.2,
}


def _text(kind: str, config: str, **settings: Any) -> Model:
    return Model(kind, config, settings, _tokens)


def _on_disk(model: Model, layout: str) -> Model:
    return dataclasses.replace(model, layout=layout)


MODELS: dict[str, Model] = {
    "llama": _text("LlamaForCausalLM", "LlamaConfig", **_DECODER),
    "llama-tied": _text("LlamaForCausalLM", "LlamaConfig", **_DECODER, tie_word_embeddings=True),
    "llama-biased": _text("LlamaForCausalLM", "LlamaConfig", **_DECODER, attention_bias=True, mlp_bias=True),
    "mistral": _text("MistralForCausalLM", "MistralConfig", **_DECODER),
    "qwen2": _text("Qwen2ForCausalLM", "Qwen2Config", **_SQUARE),
    "qwen3": _text("Qwen3ForCausalLM", "Qwen3Config", **_DECODER),
    "gemma2": _text("Gemma2ForCausalLM", "Gemma2Config", **_DECODER),
    "gemma3": _text("Gemma3ForCausalLM", "Gemma3TextConfig", **_DECODER),
    "phi3": _text("Phi3ForCausalLM", "Phi3Config", **_SQUARE),
    "gpt2": _text("GPT2LMHeadModel", "GPT2Config", **_GPT2),
    "gpt-neox": _text("GPTNeoXForCausalLM", "GPTNeoXConfig", **_ENCODER),
    "opt": _text(
        "OPTForCausalLM",
        "OPTConfig",
        **_SPECIAL,
        vocab_size=VOCAB,
        hidden_size=40,
        ffn_dim=56,
        word_embed_proj_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=0.2,
    ),
    "falcon": _text("FalconForCausalLM", "FalconConfig", **_ENCODER, ffn_hidden_size=52),
    "bert": _text("BertForSequenceClassification", "BertConfig", **_BERT),
    "t5": Model(
        "T5ForConditionalGeneration",
        "T5Config",
        _T5,
        _sequence_to_sequence,
        new_keys=("scale_decoder_outputs",),
    ),
    "t5-1.1": Model(
        "T5ForConditionalGeneration",
        "T5Config",
        _T5,
        _sequence_to_sequence,
        new_keys=("scale_decoder_outputs",),
        apart=True,
    ),
    "mt5": Model("MT5ForConditionalGeneration", "MT5Config", _T5, _sequence_to_sequence, apart=True),
    "bart": Model("BartForConditionalGeneration", "BartConfig", _BART, _sequence_to_sequence),
    "gptj": _text("GPTJForCausalLM", "GPTJConfig", **_GPT2, rotary_dim=4),
    "openai-gpt": _text(
        "OpenAIGPTLMHeadModel", "OpenAIGPTConfig", **{key: value for key, value in _GPT2.items() if key != "n_inner"}
    ),
    "xlnet": _text(
        "XLNetLMHeadModel",
        "XLNetConfig",
        vocab_size=VOCAB,
        d_model=40,
        n_layer=1,
        n_head=4,
        d_inner=56,
        initializer_range=0.2,
    ),
    "modernbert": _text("ModernBertForMaskedLM", "ModernBertConfig", **_ENCODER, cls_token_id=3, sep_token_id=4),
    "roberta": _text("RobertaForMaskedLM", "RobertaConfig", **_ENCODER, tie_word_embeddings=False),
    "electra": _text("ElectraForMaskedLM", "ElectraConfig", **_ENCODER, embedding_size=40),
    "distilbert": _text(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        **_SPECIAL,
        vocab_size=VOCAB,
        dim=40,
        n_layers=1,
        n_heads=4,
        hidden_dim=56,
        max_position_embeddings=64,
        initializer_range=0.2,
    ),
    "biogpt": _text("BioGptForCausalLM", "BioGptConfig", **_ENCODER),
    "whisper": Model(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {"vocab_size": VOCAB, "d_model": 40, "encoder_ffn_dim": 56, "decoder_ffn_dim": 52, "encoder_layers": 1}
        | {"decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 20}
        | {"max_source_positions": 16, "max_target_positions": 32, "decoder_start_token_id": 3, "init_std": 0.2}
        | {**_SPECIAL, "suppress_tokens": None, "begin_suppress_tokens": None},
        _sound,
    ),
    "vit": Model(
        "ViTForImageClassification",
        "ViTConfig",
        {**_VISION, "hidden_size": 40, "num_attention_heads": 4, "num_labels": 3},
        _image,
    ),
    "clip": Model(
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**_ENCODER, "num_hidden_layers": 1}, "vision_config": _VISION, "projection_dim": 20},
        lambda: {**_tokens(), **_image()},
    ),
    "resnet": Model(
        "ResNetForImageClassification",
        "ResNetConfig",
        # Bottlenecks are a quarter as wide; convolutions of fewer than 16 channels take kernels of their own.
        {"embedding_size": 16, "hidden_sizes": [72, 80], "depths": [1, 1], "layer_type": "bottleneck", "num_labels": 3},
        _large_image,
    ),
    "mixtral": dataclasses.replace(
        _text("MixtralForCausalLM", "MixtralConfig", **_DECODER, **_EXPERTS),
        shard=50_000,  # several files, between the experts of a layer too
    ),
    "qwen2-moe": _text(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        **_SQUARE,
        num_experts=4,
        num_experts_per_tok=4,
        moe_intermediate_size=28,
        shared_expert_intermediate_size=36,
        mlp_only_layers=[0],
    ),
    "qwen3-moe": _text(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        **_DECODER,
        num_experts=4,
        num_experts_per_tok=4,
        moe_intermediate_size=28,
        mlp_only_layers=[0],
    ),
    "deepseek-v3": _text(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        **{**_SQUARE, "num_key_value_heads": 4},
        q_lora_rank=16,
        kv_lora_rank=12,
        qk_rope_head_dim=8,
        qk_nope_head_dim=6,
        v_head_dim=10,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=4,
        moe_intermediate_size=28,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=2,
    ),
    "gpt-oss": _text("GptOssForCausalLM", "GptOssConfig", **_DECODER, **_EXPERTS),
    "llama4": _text(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        **_DECODER,
        **_EXPERTS,
        intermediate_size_mlp=44,
        moe_layers=[1],
    ),
    "qwen2.5-vl": Model("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", _QWEN_VL, _qwen_vl),
    "llava": Model("LlavaForConditionalGeneration", "LlavaConfig", _LLAVA, _llava, layout="towered"),
    "gemma3-mm": Model(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": _DECODER, "vision_config": _VISION, "mm_tokens_per_image": 4, "image_token_index": 60}
        | {"boi_token_index": 58, "eoi_token_index": 59},
        _gemma3,
    ),
    "nomic-bert": _text("NomicBertModel", "NomicBertConfig", **_ENCODER),
}
MODELS |= {
    "gpt2-bare": _on_disk(MODELS["gpt2"], "bare"),
    "bert-gamma": _on_disk(MODELS["bert"], "gamma"),
    "mixtral-v5": _on_disk(MODELS["mixtral"], "memory"),
    "qwen2.5-vl-v5": _on_disk(MODELS["qwen2.5-vl"], "memory"),
    "llava-v5": _on_disk(MODELS["llava"], "memory"),
    "nomic-bert-v5": _on_disk(MODELS["nomic-bert"], "memory"),
}


@cache
def transformers() -> Any:
    """The library, quiet."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@cache
def peft_library() -> Any:
    import peft

    return peft


def load(folder: Path, dtype: str = "auto") -> Any:
    """A model in evaluation mode. `AssertionError` where the files and the architecture do not fit completely."""
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers(), kind).from_pretrained(
        folder, dtype=getattr(torch, dtype, "auto"), output_loading_info=True
    )
    assert not any(info.values()), {key: value for key, value in info.items() if value}
    return model


def write(model: Any, folder: Path, layout: str, shard: int = 10**9) -> Path:
    """Store a model with the names of a layout."""
    model.save_pretrained(folder, save_original_format=layout != "memory", max_shard_size=shard)
    if layout in ("bare", "gamma", "towered"):
        file = folder / _ONE_FILE
        save_file({_on_disk_name(name, layout): tensor for name, tensor in load_file(file).items()}, file)
    return folder


def _on_disk_name(name: str, layout: str) -> str:
    if layout == "bare":
        return name.removeprefix("transformer.")
    if layout == "towered":
        return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


@cache
def base_folder(name: str, dtype: str = F32) -> Path:
    """A model's checkpoint."""
    of = MODELS[name]
    library = transformers()
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        model = getattr(library, of.kind)(getattr(library, of.config)(**of.settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms of ones and biases of zeros would hide mistakes
                    parameter += 0.1 * torch.randn_like(parameter)
            if of.apart:
                head = model.get_output_embeddings()
                head.weight = torch.nn.Parameter(0.2 * torch.randn_like(head.weight))
    folder = write(model.to(getattr(torch, dtype)), new_folder(f"base-{name}-{dtype}"), of.layout, of.shard)
    untied = {"tie_word_embeddings": False} if of.apart else {}
    _edit_json(folder / "config.json", {**dict.fromkeys(of.new_keys, ...), **untied})
    return folder


def _edit_json(file: Path, changes: Mapping[str, Any]) -> None:
    """Change keys of a JSON object; a change to ``...`` leaves the key out."""
    value = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))


@torch.inference_mode()
def answer(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a model computes: its logits, or what it has in their place."""
    result = model.eval()(**inputs)
    for key in ("logits", "logits_per_image", "last_hidden_state"):
        if key in result:
            return torch.as_tensor(result[key])
    raise AssertionError(f"no answer among {list(result)}")


@cache
def base_answer(name: str, dtype: str = F32) -> Tensor:
    return answer(load(base_folder(name, dtype), F32), MODELS[name].inputs())


# --- adapters ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """``config`` is PEFT's class and ``settings`` go to it; `Frozen` stands for a list or dict there.

    ``more_tokens`` are added to the vocabulary before training; ``on_disk`` is put into adapter_config.json after
    saving. Without a ``config`` the adapter is written by hand: see `by_hand`.
    """

    config: str
    settings: tuple[tuple[str, Any], ...]
    more_tokens: int = 0
    on_disk: tuple[tuple[str, Any], ...] = ()
    stored: str = ""


@dataclass(frozen=True)
class Frozen:
    """A list or a dict as a part of something hashable."""

    text: str

    def thaw(self) -> Any:
        return json.loads(self.text)


def _freeze(value: Any) -> Any:
    return Frozen(json.dumps(value)) if isinstance(value, (list, dict)) else value


def peft(config: str, *targets: str, **settings: Any) -> Adapter:
    """An adapter of any family of PEFT's, by the name of its config's class."""
    more_tokens = settings.pop("more_tokens", 0)
    on_disk = tuple(settings.pop("on_disk", {}).items())
    if targets:
        settings["target_modules"] = targets[0] if targets == ("all-linear",) else list(targets)
    return Adapter(config, tuple((key, _freeze(value)) for key, value in settings.items()), more_tokens, on_disk)


def lora(*targets: str, **settings: Any) -> Adapter:
    """LoRA of rank 5, scaled by 2.6: a scaling that is not a power of two shows the order of the roundings."""
    return peft("LoraConfig", *targets, **{"r": 5, "lora_alpha": 13, **settings})


def by_hand(pattern: str, strip: str = "", of: str = "") -> Adapter:
    """LoRA on every stored matrix whose name matches: what a transformers whose modules were called as the tensors on
    disk are would have trained. ``strip`` is left out of the front of names; ``of`` names another model whose names
    are taken."""
    return Adapter("", (("strip", strip), ("of", of)), stored=pattern)


@cache
def adapter_folder(model: str, adapter: Adapter, dtype: str = F32) -> Path:
    """An adapter of random numbers, trained on a base of this dtype; saved by PEFT, or in its format."""
    folder = new_folder(f"adapter-{model}")
    if not adapter.config:
        return _write_by_hand(folder, model, adapter)
    settings = {key: value.thaw() if isinstance(value, Frozen) else value for key, value in adapter.settings}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT tells what it does about embeddings and tied weights
        torch.manual_seed(_SEED + 1)
        config = getattr(peft_library(), adapter.config)(**settings)
        model_to_train = peft_library().get_peft_model(_loaded(model, adapter, dtype), config)
        with torch.no_grad():
            for parameter in model_to_train.parameters():
                if parameter.requires_grad:  # many are zero or one to begin with
                    parameter *= 1 + 0.1 * torch.randn_like(parameter)
                    parameter += 0.1 * torch.randn_like(parameter)
        model_to_train.save_pretrained(folder)
    _edit_json(folder / "adapter_config.json", dict(adapter.on_disk))
    return folder


def _write_by_hand(folder: Path, model: str, adapter: Adapter) -> Path:
    strip, of = (dict(adapter.settings)[key] for key in ("strip", "of"))
    generator = torch.Generator().manual_seed(_SEED + 2)
    tensors: dict[str, Tensor] = {}
    for name, weight in stored(base_folder(of or model)).items():
        if re.search(adapter.stored, name) and name.endswith(".weight") and weight.ndim == 2:
            prefix = "base_model.model." + name.removesuffix(".weight").removeprefix(strip)
            out_features, in_features = weight.shape
            tensors[f"{prefix}.lora_A.weight"] = 0.2 * torch.randn(5, in_features, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = 0.2 * torch.randn(out_features, 5, generator=generator)
    leaves = sorted({name.split(".")[-3] for name in tensors})
    config = {"peft_type": "LORA", "r": 5, "lora_alpha": 13, "target_modules": leaves, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


# --- the oracle -------------------------------------------------------------------------------------------------------


def _loaded(model: str, adapter: Adapter, dtype: str, load_as: str = "auto", *, untied: bool = False) -> Any:
    """The base as an adapter finds it; ``untied``, its output head is a weight of its own."""
    base = load(base_folder(model, dtype), load_as)
    if untied:
        head = base.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False
    if adapter.more_tokens:
        base.resize_token_embeddings(VOCAB + adapter.more_tokens, mean_resizing=False)
    return base


def _wrapped(model: str, adapter: Adapter, dtype: str, load_as: str, *, untied: bool = False) -> Any:
    """Base and adapter as PEFT loads them."""
    folder = adapter_folder(model, adapter, dtype)
    config = peft_library().PeftConfig.from_pretrained(folder)
    if untied and getattr(config, "ensure_weight_tying", False):
        # The file has an update of both sides, but only of a tied model does PEFT load both.
        config.ensure_weight_tying = False
        config.target_modules |= {"embed_tokens", "lm_head"}
    base = _loaded(model, adapter, dtype, load_as, untied=untied)
    wrapped = peft_library().PeftModel.from_pretrained(base, folder, config=config)
    for module in wrapped.modules():
        if isinstance(getattr(module, "base_layer", None), torch.nn.Conv1d):
            module.stride = module.base_layer.stride  # Whisper asks for it, and PEFT's wrapper has none
    return wrapped


def _c3a_in_float64() -> AbstractContextManager[Any]:
    """PEFT makes C3A's circulant blocks in float32 even of a float64 base."""
    from peft.tuners.c3a import layer

    of = layer.get_circulant_fast
    return mock.patch.object(layer, "get_circulant_fast", lambda kernel: of(kernel.double()))


@cache
def merged_by_peft(
    model: str, adapter: Adapter, dtype: str = F32, load_as: str = "auto", *, untied: bool = False
) -> Path:
    """What PEFT's default merge stores. With a base loaded as float64 it is exact."""
    with warnings.catch_warnings(), _c3a_in_float64() if load_as == F64 else nullcontext():
        warnings.simplefilter("ignore")
        merged = _wrapped(model, adapter, dtype, load_as, untied=untied).merge_and_unload()
        return write(merged, new_folder(f"peft-{model}"), MODELS[model].layout)


@cache
def adapter_answer(model: str, adapter: Adapter, dtype: str = F32) -> Tensor:
    """What base + adapter compute, not merged, in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return answer(_wrapped(model, adapter, dtype, F32), MODELS[model].inputs())


def exact_sum(model: str, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """W + s·B·A in float64 on stored names, without PEFT; and |W| + |s|·|B|·|A|, to which roundings are relative.

    For adapters written by hand, each of whose modules is a stored matrix.
    """
    folder = adapter_folder(model, adapter)
    settings = json.loads((folder / "adapter_config.json").read_text())
    scaling = settings["lora_alpha"] / settings["r"]
    factors = {name: factor.double() for name, factor in load_file(folder / "adapter_model.safetensors").items()}
    exact = {name: weight.double() for name, weight in stored(base_folder(model)).items()}
    size = {name: weight.abs() for name, weight in exact.items()}
    for name in [name for name in factors if name.endswith(".lora_A.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        target = f"{dict(adapter.settings)['strip']}{module}.weight"
        a, b = factors.pop(name), factors.pop(name.replace("lora_A", "lora_B"))
        exact[target] = exact[target] + scaling * (b @ a)
        size[target] = size[target] + scaling * (b.abs() @ a.abs())
    assert not factors
    return exact, size


@cache
def exact_answer(model: str, adapter: Adapter) -> Tensor:
    """What a model of the weights of `exact_sum` computes."""
    folder = new_folder(f"exact-{model}")
    shutil.copy(base_folder(model) / "config.json", folder)
    save_file({name: weight.float() for name, weight in exact_sum(model, adapter)[0].items()}, folder / _ONE_FILE)
    return answer(load(folder), MODELS[model].inputs())
