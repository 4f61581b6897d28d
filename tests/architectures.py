"""Tiny random models of the architectures that transformers has a causal head for.

Every model fits the character tokenizer of worlds.py. Windows, chunks and indexes are shorter than the sequences of
the tests, so that their masks matter.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
import worlds
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NUM_TOKENS = len(worlds.TOKENS)
PAD_ID, END_ID = worlds.TOKENS.index(worlds.PAD), worlds.TOKENS.index(worlds.END)
MAX_PARAMETERS = 1_000_000
BASE: dict[str, Any] = {
    "vocab_size": NUM_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "eos_token_id": END_ID,
    "pad_token_id": PAD_ID,
    "bos_token_id": None,
    "is_decoder": True,
    "add_cross_attention": False,
    # Encoder-decoders of the first years.
    "d_model": 32,
    "decoder_layers": 2,
    "encoder_layers": 1,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "encoder_ffn_dim": 64,
}
SLIDING = ["sliding_attention", "full_attention"] * 2
LINEAR = ["linear_attention", "full_attention"] * 2
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_local_experts": 4}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": LINEAR,
}
PER_LAYER = {"vocab_size_per_layer_input": NUM_TOKENS, "hidden_size_per_layer_input": 8}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 4}
INDEX = {"index_n_heads": 16, "index_head_dim": 16, "index_topk": 8}  # fewer heads often give ties
# For families without options of their own in CONFIGS, whose defaults are large. Unknown options are ignored.
SMALL: dict[str, Any] = {
    **MOE,
    **MLA,
    "num_key_value_heads": 2,
    "shared_expert_intermediate_size": 16,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_topk": 2,
    "expert_ffn_hidden_size": 16,
    "num_dense_layers": 1,
    "sliding_window": 8,
    "dense_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 16,
    "num_shared_experts": 1,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 8,
}
DROP = object()  # an option of BASE that a config does not take
# model type, or model type and variant -> options besides BASE
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "bailing_hybrid": {**MLA, "num_experts": 4, "layer_group_size": 2},
    "bamba": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "attn_layer_indices": [1, 3],
        "mamba_chunk_size": 16,
    },
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": GPT2,
    "cohere2": {"sliding_window": 8, "layer_types": SLIDING},
    "ctrl": {"dff": 64, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 256},
    "cwm": {"bos_token_id": 0, "sliding_window": 8, "layer_types": SLIDING},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v2": {**MLA, "topk_method": "greedy"},
    "deepseek_v3": MLA,
    "deepseek_v32": {**MLA, **INDEX},
    "ernie4_5_moe": {**MOE, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "exaone4": {"sliding_window": 8, "layer_types": SLIDING},
    "falcon": {"head_dim": DROP},
    "falcon:alibi": {"head_dim": DROP, "alibi": True, "new_decoder_architecture": False},
    "falcon_h1": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_d_ssm": 64,
        "mamba_chunk_size": 16,
        "num_hidden_layers": 2,
    },
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": SLIDING},
    "gemma3n_text": {
        "sliding_window": 8,
        "layer_types": SLIDING,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
        **PER_LAYER,
    },
    "gemma4_text": {
        "sliding_window": 8,
        "layer_types": SLIDING,
        "num_kv_shared_layers": 2,
        "global_head_dim": 8,
        **PER_LAYER,
    },
    "glm4_moe": {**MLA, **MOE, "num_key_value_heads": 2},
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": {**MLA, **INDEX},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neo": {
        "num_hidden_layers": DROP,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "num_attention_heads": DROP,
        "window_size": 8,
    },
    "gptj": GPT2,
    "gpt_oss": {**MOE, "sliding_window": 8, "layer_types": SLIDING, "rope_parameters": ROPE},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "granitemoe": MOE,
    "granitemoehybrid": {
        **MOE,
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_expand": 2,
        "shared_intermediate_size": 32,
        "position_embedding_type": "rope",
    },
    "jamba": {**MOE, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "kimi_linear": {
        **MLA,
        "num_experts": 4,
        "head_dim": 8,
        "linear_attn_config": {
            "head_dim": 8,
            "num_heads": 4,
            "short_conv_kernel_size": 4,
            "kda_layers": [1, 3],
            "full_attn_layers": [2, 4],
        },
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {**MOE, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "llama4_text": {
        **MOE,
        "attention_chunk_size": 8,
        "no_rope_layers": [1, 1, 1, 0],
        "intermediate_size_mlp": 64,
        "moe_layers": [],
        "interleave_moe_layer_step": 2,
    },
    "longcat_flash": {
        **MLA,
        "num_layers": 2,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 16,
        "moe_topk": 2,
        "zero_expert_num": 1,
    },
    "mamba": {"state_size": 8, "num_hidden_layers": 2},
    "mamba2": {
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 8,
        "n_groups": 1,
        "expand": 2,
        "chunk_size": 16,
        "layer_norm_epsilon": 1e-5,
        "num_hidden_layers": 2,
    },
    "minicpm3": MLA,
    "minimax_m2": MOE,
    "ministral": {"sliding_window": 8, "layer_types": SLIDING},
    "mistral": {"sliding_window": None},
    "mistral:window": {"sliding_window": 8},
    "mixtral": {**MOE, "sliding_window": None},
    "mpt": {"n_heads": 4, "n_layers": 2, "max_seq_len": 256, "expansion_ratio": 2},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 16,
        "expand": 2,
    },
    "olmo3": {"sliding_window": 8, "layer_types": SLIDING},
    "olmo_hybrid": DELTA,
    "olmoe": MOE,
    "openai-gpt": GPT2,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi3": {"sliding_window": 8},
    "phimoe": {**MOE, "sliding_window": None},
    "qwen2:window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {**MOE, **DELTA, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**MOE, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen3_next": {
        **MOE,
        **DELTA,
        "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "num_hidden_layers": 3},
    "starcoder2": {"sliding_window": 8},
    "youtu": MLA,
    "axk1": MLA,
    "zamba": {"mamba_d_state": 8, "mamba_dt_rank": 4, "n_mamba_heads": 2},
    "zamba2": {"mamba_d_state": 8, "mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1},
}


def list_architectures() -> list[str]:
    """Return all model types with a causal head, and variants of some."""
    variants = [name for name in CONFIGS if ":" in name]
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *variants})


def build_model(name: str, *, kind: str = "causal", seed: int = 0) -> PreTrainedModel:
    """Return a random model in float32 and eval mode, whose weights are wide enough for outputs to differ visibly.

    Args:
        kind: "causal" or "score" (a sequence classifier with one label).

    Raises:
        Exception: of any kind, where transformers has no such model or cannot build it this small.
    """
    model_type = name.partition(":")[0]
    options = {**BASE, **CONFIGS.get(name, SMALL), **({"num_labels": 1} if kind == "score" else {})}
    options = {key: value for key, value in options.items() if value is not DROP}
    config = AutoConfig.for_model(model_type, **options)
    auto_class = AutoModelForCausalLM if kind == "causal" else AutoModelForSequenceClassification
    with suppress(TypeError), torch.device("meta"):  # some models compute with values as they are built
        num_parameters = auto_class.from_config(config).num_parameters()
        if num_parameters > MAX_PARAMETERS:
            raise ValueError(f"the tiny {name} has {num_parameters:,} parameters: shrink it in CONFIGS")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = auto_class.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5)
            elif not parameter.isfinite().all():
                parameter.zero_()
    return model.eval()
