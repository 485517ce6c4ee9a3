"""Keys of a config.json that do not affect the logits: bookkeeping, training, generation, classification.

The modeling code of the supported classes does not read them when it computes the logits of a language model. Most are
written by a version of transformers' ``PreTrainedConfig``, or by tools that trained or converted the model.
"""

from __future__ import annotations

_BOOKKEEPING = """
    _name_or_path name_or_path _model_name_or_path model_max_length _commit_hash transformers_version auto_map
    tokenizer_class dtype torch_dtype use_bfloat16 torchscript _attn_implementation attn_implementation prefix
    _attn_implementation_autoset _attn_implementation_internal _experts_implementation_internal
    experts_implementation _flash_attn_2_enabled _auto_class return_dict use_return_dict output_attentions
    output_hidden_states tie_last_hidden_states keys_to_ignore_at_inference bos_token_id eos_token_id pad_token_id
    sep_token_id decoder_start_token_id unk_token_id is_encoder_decoder is_decoder add_cross_attention
    cross_attention_hidden_size tie_encoder_decoder chunk_size_feed_forward pruned_heads pretraining_tp
    max_sequence_length tf_legacy_loss unsloth_version unsloth_fixed transformers.js_config base_model_name_or_path
"""
_TRAINING = """
    initializer_range attention_dropout attn_pdrop embd_pdrop resid_pdrop hidden_dropout router_aux_loss_coef
    router_jitter_noise output_router_logits gradient_checkpointing neftune_noise_alpha classifier_dropout
    classifier_dropout_prob use_cache
"""
_CLASSIFICATION = """
    id2label label2id num_labels problem_type finetuning_task task_specific_params
"""
#: Older versions store settings of generation in config.json.
_GENERATION = """
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens cache_implementation
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty
    epsilon_cutoff eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_assistant_tokens
    num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p typical_p
"""
INERT = frozenset((_BOOKKEEPING + _TRAINING + _CLASSIFICATION + _GENERATION).split())

#: Model type → keys of published models that transformers' code does not read.
OF_CLASS = {
    # SmolLM's, written by the tools that made it.
    "llama": frozenset({"is_llama_config", "rope_interleaved"}),
    # Older names of settings.
    "gemma2": frozenset({"hidden_act", "sliding_window_size"}),
    # The code reads only settings derived from these.
    "gemma3_text": frozenset({"hidden_act", "_sliding_window_pattern"}),
    "qwen2": frozenset({"use_mrope"}),
    # Only the code in Phi-4's repo reads them; the published values have no effect.
    "phi3": frozenset({"full_attn_mod", "interpolate_factor", "lm_head_bias"}),
}
#: Keys of a multimodal model that do not concern its text part.
MULTIMODAL = frozenset(
    {"text_config", "vision_config", "mm_tokens_per_image"}
    | {f"{name}_token_{kind}" for name in ("boi", "eoi", "image") for kind in ("index", "id")}
)
