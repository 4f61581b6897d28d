"""Which architectures run: a tiny random model of each one that transformers has a causal head for is tried.

    python recipes/research/architectures.py                # writes the table into docs/models.md
    python recipes/research/architectures.py mamba2 llama   # prints the rows of these

Windows, chunks and indexes are shorter than the sequences of the tests, so that their masks matter.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nabla_trl.cli.parsing import quiet_libraries
from nabla_trl.models.heads import OutputHead
from nabla_trl.states.attention import AttentionLayer, IndexedLayer
from nabla_trl.states.layout import StateLayout
from nabla_trl.states.probe import get_layout
from nabla_trl.states.recurrent import HybridLayer, RecurrentLayer
from nabla_trl.states.releases import DummyLayer
from nabla_trl.utils.formatting import format_error

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TABLE_HEAD = "| model type | layers | |\n| --- | --- | --- |\n"
TABLE_END = "<!-- end of the table -->"
VOCAB_SIZE, END_ID, PAD_ID = 27, 25, 22  # those of the character tokenizer of the tests
MAX_PARAMETERS = 5_000_000
BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
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
PER_LAYER = {"vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 8}
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
    "dense_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 16,
    "num_shared_experts": 1,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 8,
}
DROP = object()  # an option of BASE that a config does not take
ATTENTION_FREE = dict.fromkeys(
    ("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "intermediate_size"), DROP
)
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
    "bloom": {"n_layer": 2, "n_head": 4, "max_position_embeddings": DROP},
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
        "embedding_multiplier": 3.0,
        "lm_head_multiplier": 0.5,
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
    "mamba": {**ATTENTION_FREE, "state_size": 8, "num_hidden_layers": 2},
    "mamba2": {
        **ATTENTION_FREE,
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
    "mpt": {"max_position_embeddings": DROP, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "expansion_ratio": 2},
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
    "afmoe": {**SMALL, "sliding_window": 8},
    "exaone_moe": {**SMALL, "sliding_window": 8},
    "flint": {**SMALL, "sliding_window": 8},
    "kolibri1": {**SMALL, "sliding_window": 8},
    "mimo_v2_flash": {**SMALL, "sliding_window": 8},
    "laguna": {**SMALL, "sliding_window": 8},
    "mellum": {**SMALL, "sliding_window": 8},
    "modernbert-decoder": {"local_attention": 8},
    "smollm3": {"use_sliding_window": False},
    "vaultgemma": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "granite_swa": {**SMALL, "sliding_window": 8},
    "cohere2_moe": {**SMALL, "sliding_window": 8},
    "dots1": {**SMALL, "num_key_value_heads": 4},
    "dots3_note_text": {**SMALL, "num_key_value_heads": 4},
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
        name: model type, or model type and variant ("falcon:alibi").
        kind: "causal" or "score" (a sequence classifier with one label).

    Raises:
        Exception: of any kind, where transformers has no such model or cannot build it this small.
    """
    options = {**BASE, **CONFIGS.get(name, SMALL), **({"num_labels": 1} if kind == "score" else {})}
    options = {key: value for key, value in options.items() if value is not DROP}
    config = AutoConfig.for_model(name.partition(":")[0], **options)
    auto_class = AutoModelForCausalLM if kind == "causal" else AutoModelForSequenceClassification
    with suppress(TypeError), torch.device("meta"):  # some models compute with values as they are built
        num_parameters = auto_class.from_config(config).num_parameters()
        if num_parameters > MAX_PARAMETERS:
            raise ValueError(f"its smallest configuration here has {num_parameters:,} parameters")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = auto_class.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5)
            elif not parameter.isfinite().all():
                parameter.zero_()
    return model.eval()


def describe_architecture(name: str) -> tuple[str, str]:
    """Return the kinds of layers of an architecture, and "runs" or the reason why it does not."""
    try:
        model = build_model(name)
    except Exception as error:  # of any kind, from the code of any model
        return "", f"not tried: {_shorten(error)}"
    try:
        layout = get_layout(model)
        OutputHead(model)
    except ValueError as error:
        return "", f"refused: {_shorten(error)}"
    return describe_layers(layout), "runs"


def describe_layers(layout: StateLayout) -> str:
    """Return what kinds of layers a model has, as their states tell."""
    types = {layer_type for layer_type, _ in layout.layer_types}
    kinds = {
        "attention": AttentionLayer in types,
        "indexed attention": IndexedLayer in types,
        "recurrent": RecurrentLayer in types,
        "attention and recurrent in one": HybridLayer in types,
        "windows": layout.window is not None,
        "chunks": layout.chunk is not None,
        "keys and values of different widths": len({group.shape for group in layout.token_groups}) > 1,
        "layers that keep nothing": any(issubclass(layer_type, DummyLayer) for layer_type in types),
    }
    return ", ".join(kind for kind, present in kinds.items() if present)


def _shorten(error: Exception) -> str:
    return format_error(error).replace("|", "/").replace("\n", " ")[:140]


def format_row(name: str) -> str:
    """Return the line of an architecture in the table of docs/models.md."""
    layers, result = describe_architecture(name)
    return f"| {name} | {layers} | {result} |"


def read_table() -> list[str]:
    """Return the lines of the table in docs/models.md."""
    return PAGE.read_text(encoding="utf-8").partition(TABLE_HEAD)[2].partition(TABLE_END)[0].splitlines()


def main(argv: Sequence[str]) -> None:
    quiet_libraries()
    torch.set_num_threads(1)
    rows = []
    for name in argv or list_architectures():
        rows.append(format_row(name))
        print(rows[-1], flush=True)
    if not argv:
        before, head, rest = PAGE.read_text(encoding="utf-8").partition(TABLE_HEAD)
        after = rest.partition(TABLE_END)[2]
        PAGE.write_text(before + head + "\n".join(rows) + "\n" + TABLE_END + after, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
