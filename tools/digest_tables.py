"""The bases and adapters of `tools.digests`, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tools.digest_inputs import (
    MakeAdapter,
    MakeBase,
    Tensors,
    by_hand,
    decoder_shapes,
    kohya,
    mlx,
    model,
    net,
    peft,
    pure,
    raw,
)


def _mixed(file: str, tensors: Tensors) -> None:
    """Puts tensors of several dtypes beside each other, some of which are buffers, or empty."""
    for name, tensor in list(tensors.items()):
        dtype = {"q_proj": torch.bfloat16, "down_proj": torch.float16, "lm_head": torch.float64}
        tensors[name] = next((tensor.to(of) for end, of in dtype.items() if end in name), tensor)
    layer = "model.layers.0.self_attn"
    tensors[f"{layer}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    tensors[f"{layer}.positions"] = torch.arange(77, dtype=torch.int64)
    tensors[f"{layer}.counts"] = torch.arange(13, dtype=torch.uint8)
    tensors[f"{layer}.empty"] = torch.zeros(0, 64)
    tensors[f"{layer}.number"] = torch.tensor(3, dtype=torch.int32)


# --- bases ------------------------------------------------------------------------------------------------------------

MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
UNET: dict[str, tuple[int, ...]] = {
    "down_blocks.0.attentions.0.proj_in.weight": (24, 20, 1, 1),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (24, 20),
    "down_blocks.0.resnets.0.conv1.weight": (24, 8, 3, 3),
}
SMALL = decoder_shapes(64, 160, layers=2)
TALL = decoder_shapes(192, 768, layers=2)
LARGE = decoder_shapes(1024, 4096, vocab=12_000)
RAW: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
_SPM: dict[str, Any] = {"tokenizer": True, "vocab_size": 128}
_GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}

BASES: dict[str, MakeBase] = {
    "llama-f32": model("LlamaForCausalLM"),
    "llama-f16": model("LlamaForCausalLM", dtype="float16"),
    "llama-bf16": model("LlamaForCausalLM", dtype="bfloat16"),
    "llama-f64": model("LlamaForCausalLM", dtype="float64"),
    "llama-shards": model("LlamaForCausalLM", dtype="bfloat16", shard=50_000),
    "llama-biased": model("LlamaForCausalLM", attention_bias=True, mlp_bias=True, shard=200_000),
    "llama-tied": model("LlamaForCausalLM", tie_word_embeddings=True),
    "llama-odd": model("LlamaForCausalLM", dtype="bfloat16", head_dim=6, hidden_size=60, intermediate_size=131),
    "qwen2-tied": model("Qwen2ForCausalLM", dtype="bfloat16", tie_word_embeddings=True, shard=100_000),
    "gemma3": model("Gemma3ForCausalLM", "Gemma3TextConfig", dtype="bfloat16", **_GEMMA),
    "phi3": model("Phi3ForCausalLM", dtype="float16"),
    "gpt2": model("GPT2LMHeadModel", "GPT2Config", n_embd=64, n_layer=2, n_head=4, n_inner=160, n_positions=64),
    "bert": model("BertForSequenceClassification", "BertConfig", num_labels=3),
    "t5": model("T5ForConditionalGeneration", "T5Config", d_model=64, d_kv=12, d_ff=160, num_layers=1, num_heads=4),
    "mixtral": model("MixtralForCausalLM", dtype="bfloat16", shard=150_000, **LOCAL),
    "mixtral-fused": model("MixtralForCausalLM", in_memory=True, **LOCAL),
    "qwen3-moe": model("Qwen3MoeForCausalLM", mlp_only_layers=[0], head_dim=16, **MOE),
    "qwen3-moe-fused": model(
        "Qwen3MoeForCausalLM", dtype="bfloat16", in_memory=True, mlp_only_layers=[0], head_dim=16, **MOE
    ),
    "gpt-oss": model("GptOssForCausalLM", dtype="bfloat16", **LOCAL),
    "llama4": model("Llama4ForCausalLM", "Llama4TextConfig", **LOCAL, intermediate_size_mlp=96, moe_layers=[1]),
    "deepseek-v3": model(
        "DeepseekV3ForCausalLM", num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=12, qk_rope_head_dim=8,
        qk_nope_head_dim=6, v_head_dim=10, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
        moe_intermediate_size=48, first_k_dense_replace=1, n_group=2, topk_group=2,
    ),
    "nomic-bert": model("NomicBertModel", "NomicBertConfig", num_key_value_heads=4),
    "net": net(),
    "net-bf16": net("bfloat16"),
    "unet": raw(UNET, torch.float16, _class_name="UNet2DConditionModel"),
    "small": raw(SMALL, shards=2, **RAW),
    "small-bin": raw(SMALL, pickled=True, **RAW),
    "mixed": raw(SMALL, edit=_mixed, **RAW),
    "tall": raw(TALL, torch.bfloat16, shards=3, **RAW),
    "large": raw(LARGE, torch.bfloat16, shards=2, **RAW),
    "llama-spm": model("LlamaForCausalLM", dtype="float16", attention_bias=True, **_SPM),
    "qwen2-spm": model("Qwen2ForCausalLM", dtype="bfloat16", **_SPM),
    "gemma2-spm": model("Gemma2ForCausalLM", dtype="bfloat16", **_GEMMA, **_SPM),
    "gemma3-spm": model("Gemma3ForCausalLM", "Gemma3TextConfig", dtype="bfloat16", **_GEMMA, **_SPM),
    "phi3-spm": model("Phi3ForCausalLM", dtype="bfloat16", original_max_position_embeddings=128, **_SPM),
    "mixtral-spm": model("MixtralForCausalLM", dtype="bfloat16", **LOCAL, **_SPM),
}  # fmt: skip


# --- adapters ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """What makes an adapter, and the base that it is made on."""

    base: str
    make: MakeAdapter


def _lora(*targets: str, **settings: Any) -> MakeAdapter:
    """LoRA scaled by 2.6: a scaling that is not a power of two shows the order of the roundings."""
    return peft("LoraConfig", *targets, **{"r": 5, "lora_alpha": 13, **settings})


ALL = "all-linear"
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
TOKENS = [5, 3, 50]
LINEARS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
PROJECTIONS = {name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in SMALL.items() if "_proj" in name}
TALL_PROJECTIONS = {
    name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in TALL.items() if "_proj" in name
}
LARGE_PROJECTIONS = {
    name.removesuffix(".weight"): (shape[0], shape[1])
    for name, shape in LARGE.items()
    if "up_proj" in name or "down_proj" in name or "lm_head" in name
}

#: The methods of PEFT: name of a case → class, settings. The targets are `LINEARS` unless they are given.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "adalora": ("AdaLoraConfig", {"init_r": 5, "lora_alpha": 13, "total_step": 10}),
    "beft": ("BeftConfig", {"target_modules": ["v_proj", "up_proj"]}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "c3a": ("C3AConfig", {"block_size": 16}),
    "deft": ("DeftConfig", {"r": 4}),
    "delora": ("DeloraConfig", {"r": 4}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 100, "scale": 1.0}),
    "frod": ("FrodConfig", {"sparse_rate": 0.05, "progressbar": False}),
    "glora": ("GloraConfig", {"r": 4}),
    "gralora": ("GraloraConfig", {"r": 4, "gralora_k": 2, "hybrid_r": 3, "alpha": 7}),
    "hira": ("HiraConfig", {"r": 4}),
    "hra": ("HRAConfig", {"r": 4, "apply_GS": True}),
    "ln-tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}),
    "loha": ("LoHaConfig", {"r": 5, "alpha": 13}),
    "lokr": ("LoKrConfig", {"r": 3, "alpha": 7, "decompose_both": True}),
    "miss": ("MissConfig", {"r": 4}),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": 8}),
    "oft-coft": ("OFTConfig", {"r": 0, "oft_block_size": 8, "coft": True, "eps": 0.3}),
    "osf": ("OSFConfig", {"effective_rank": 6, "scale": 0.02}),
    "peanut": ("PeanutConfig", {"r": 4}),
    "psoft": ("PsoftConfig", {"r": 8, "psoft_alpha": 13}),
    "pvera": ("PveraConfig", {"r": 5}),
    "randlora": ("RandLoraConfig", {"r": 4}),
    "road": ("RoadConfig", {"variant": "road_2", "group_size": 8}),
    "shira": ("ShiraConfig", {"r": 4, "random_seed": 4}),
    "supertuning": ("SupertuningConfig", {"sparsity": 0.9, "r": 3, "lora_alpha": 5}),
    "tinylora": ("TinyLoraConfig", {"r": 3, "u": 7}),
    "trainable-tokens": ("TrainableTokensConfig", {"target_modules": ["embed_tokens"], "token_indices": TOKENS}),
    "unilora": ("UniLoraConfig", {"r": 5, "save_indices": True, "scale": 1.0}),
    "vblora": ("VBLoRAConfig", {"r": 4, "num_vectors": 30, "vector_length": 16}),
    "vera": ("VeraConfig", {"r": 6}),
    "waveft": ("WaveFTConfig", {"n_frequency": 100, "scale": 1.0}),
}
#: The bases of methods that are not made on `llama-f32`.
_METHOD_BASES = {"beft": "llama-biased", "glora": "llama-biased", "road": "llama-biased", "boft": "llama-biased"}


def _method(name: str) -> Adapter:
    config, settings = METHODS[name]
    return Adapter(_METHOD_BASES.get(name, "llama-f32"), peft(config, **{"target_modules": [*LINEARS], **settings}))


ADAPTERS: dict[str, Adapter] = {
    **{name: _method(name) for name in METHODS},
    "lora": Adapter("llama-f32", _lora(ALL)),
    "lora-2": Adapter("llama-f32", _lora("q_proj", "up_proj", "down_proj", r=7, dtype="bfloat16", scale=0.2)),
    "lora-bin": Adapter("llama-f32", _lora(ALL, pickled=True, dtype="float16")),
    "lora-odd": Adapter("llama-odd", _lora(ALL, r=3)),
    "rslora": Adapter("llama-f32", _lora(ALL, use_rslora=True)),
    "patterns": Adapter(
        "llama-f32",
        _lora(ALL, rank_pattern={"q_proj": 3, r"layers\.1\.mlp\.down_proj": 7}, alpha_pattern={r".*\.1\..*_proj": 9}),
    ),
    "dora": Adapter("llama-f32", _lora(ALL, use_dora=True)),
    "dora-embedding": Adapter("llama-f32", _lora("embed_tokens", use_dora=True)),
    "lora-bias": Adapter("llama-biased", _lora(ALL, lora_bias=True)),
    "bias-all": Adapter("llama-biased", _lora("q_proj", "down_proj", bias="all")),
    "saved": Adapter("llama-f32", _lora("q_proj", modules_to_save=["lm_head", "input_layernorm"])),
    "embedding": Adapter("llama-f32", _lora("q_proj", "embed_tokens")),
    "tokens": Adapter("llama-f32", _lora("q_proj", trainable_token_indices=TOKENS)),
    "more-tokens": Adapter("llama-f32", _lora("q_proj", modules_to_save=["lm_head", "embed_tokens"], more_tokens=4)),
    "kasa": Adapter("llama-f32", _lora(*LINEARS, kasa_config={})),
    "tied-embedding": Adapter("llama-tied", _lora("q_proj", "embed_tokens")),
    "tied-head": Adapter("llama-tied", _lora("lm_head")),
    "tied-saved": Adapter("llama-tied", _lora("q_proj", modules_to_save=["embed_tokens"])),
    "qwen2-head": Adapter("qwen2-tied", _lora("q_proj", "lm_head")),
    "gemma3": Adapter("gemma3", _lora(ALL)),
    "phi3": Adapter("phi3", _lora(ALL)),
    "phi3-dora": Adapter("phi3", _lora("qkv_proj", "down_proj", use_dora=True)),
    "gpt2": Adapter("gpt2", _lora(ALL)),
    "gpt2-dora": Adapter("gpt2", _lora("c_attn", "c_proj", use_dora=True, fan_in_fan_out=True)),
    "gpt2-hira": Adapter("gpt2", peft("HiraConfig", "c_attn", "c_fc", r=4, fan_in_fan_out=True)),
    "bert": Adapter("bert", _lora("query", "value", task_type="SEQ_CLS")),
    "t5": Adapter("t5", _lora(ALL)),
    "mixtral": Adapter("mixtral", _lora("q_proj", target_parameters=EXPERTS)),
    "mixtral-down": Adapter("mixtral-fused", _lora("q_proj", target_parameters=EXPERTS[1:])),
    "qwen3-moe": Adapter("qwen3-moe", _lora(ALL)),
    "qwen3-moe-experts": Adapter("qwen3-moe", _lora("q_proj", target_parameters=EXPERTS)),
    "qwen3-moe-fused": Adapter("qwen3-moe-fused", _lora("q_proj", target_parameters=EXPERTS)),
    "gpt-oss": Adapter("gpt-oss", _lora("q_proj", target_parameters=EXPERTS)),
    "llama4": Adapter("llama4", _lora("q_proj", target_parameters=EXPERTS)),
    "deepseek-v3": Adapter("deepseek-v3", _lora("q_b_proj", target_parameters=EXPERTS)),
    "nomic-bert": Adapter("nomic-bert", _lora("q_proj", "v_proj", "fc11", use_dora=True)),
    "net": Adapter("net", _lora("embed", "wide", "narrow", "conv1", "conv2")),
    "net-dora": Adapter("net", _lora("wide", "conv1", "conv2", use_dora=True)),
    "net-loha": Adapter("net", peft("LoHaConfig", "wide", "conv1", "conv2", r=4, alpha=5)),
    "net-lokr": Adapter("net", peft("LoKrConfig", "wide", "conv2", r=2, alpha=5)),
    "kohya": Adapter("unet", kohya(UNET)),
    "mlx": Adapter("small", mlx(PROJECTIONS)),
    "mlx-dora": Adapter("small", mlx(PROJECTIONS, dora=True)),
    "pure": Adapter("small", pure(PROJECTIONS)),
    "hand": Adapter("small", by_hand(PROJECTIONS)),
    "tall": Adapter("tall", by_hand(TALL_PROJECTIONS)),
    "large": Adapter("large", by_hand(LARGE_PROJECTIONS, rank=16)),
    "prompt": Adapter("small", by_hand(PROJECTIONS, peft_type="PROMPT_TUNING")),
    **{f"{name}-spm": Adapter(f"{name}-spm", _lora(ALL)) for name in ("llama", "qwen2", "gemma2", "gemma3", "phi3")},
    "mixtral-spm": Adapter("mixtral-spm", _lora("q_proj", target_parameters=EXPERTS)),
}
