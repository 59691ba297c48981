"""What the small checkpoints of each family say differently: family -> variant -> config."""

from typing import Any

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_WINDOWED = {"layer_types": ["sliding_attention", "full_attention"]}
_MLA = {
    "num_key_value_heads": 4,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "kv_lora_rank": 32,
}
_CHUNKS = {"chunk_size": 8}  # what transformers computes at once
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_hidden_layers": 3, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16,
    "mamba_chunk_size": 8, "shared_intermediate_size": 48, "embedding_multiplier": 3.0,
    "logits_scaling": 0.8, "residual_multiplier": 0.7, "attention_multiplier": 0.4,
}  # fmt: skip
# family -> variant -> what its config says differently
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "v2": {"num_key_value_heads": 4},
        "v3": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        "v3.1": {
            "head_dim": 32,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_theta": 500000.0, **_LLAMA3},
        },
        "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
        "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        "yarn": {"rope_parameters": {"rope_theta": 1e4, **_YARN}},
    },
    "qwen3": {
        "plain": {"head_dim": 32},
        "tied": {"head_dim": 16, "tie_word_embeddings": True, "num_key_value_heads": 1},
        "window": {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            **_WINDOWED,
        },
    },
    "gemma2": {
        # Low caps, so that they bend the small scores and logits of so small a model.
        "plain": {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 6,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
        "uncapped": {
            "head_dim": 32,
            "num_key_value_heads": 1,
            "sliding_window": 7,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    },
    "mistral": {
        "v0.1": {"sliding_window": 6},
        "nemo": {"sliding_window": None, "head_dim": 32, "rope_parameters": {"rope_theta": 1e6}},
    },
    "ministral": {"plain": {"sliding_window": 6, "head_dim": 32, **_WINDOWED}},
    "ministral3": {
        "yarn": {
            "head_dim": 32,
            "rope_parameters": {
                "rope_theta": 1e4,
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 8,
                "max_position_embeddings": 64,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.3,
            },
        },
    },
    "qwen2": {
        "plain": {"num_key_value_heads": 1},
        "tied": {"tie_word_embeddings": True},
        "window": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    },
    "gemma": {
        "2b": {"head_dim": 32, "num_key_value_heads": 1},
        "gelu": {"head_dim": 16, "hidden_act": "gelu"},
    },
    "gemma3_text": {
        "plain": {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 6,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
            **_WINDOWED,
        },
    },
    "phi3": {
        "4k": {"sliding_window": 7},
        "mini": {
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.75},
        },
        "128k": {
            "original_max_position_embeddings": 8,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
                "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0],
            },
        },
        "128k-short": {
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
                "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0],
            },
        },
    },
    "granite": {
        "plain": {
            "embedding_multiplier": 6.0,
            "logits_scaling": 0.5,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.2,
            "tie_word_embeddings": True,
        },
        "biases": {"attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.3},
    },
    "olmo": {"plain": {}, "clip": {"clip_qkv": 0.9}},
    "olmo2": {"plain": {}, "multihead": {"num_key_value_heads": 4}},
    "olmo3": {
        "plain": {
            "sliding_window": 6,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_theta": 1e4, **_YARN},
            },
            **_WINDOWED,
        },
    },
    "smollm3": {
        "plain": {"no_rope_layers": [1, 0], "tie_word_embeddings": True},
        "window": {
            "no_rope_layers": [1, 0],
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    },
    "glm": {"plain": {"head_dim": 16}},
    "glm4": {"plain": {"head_dim": 32, "num_key_value_heads": 1}},
    "cohere": {
        "plain": {"logit_scale": 0.8, "tie_word_embeddings": True},
        "plus": {"logit_scale": 0.8, "use_qk_norm": True},
    },
    "cohere2": {
        "plain": {"logit_scale": 1.5, "sliding_window": 6, **_WINDOWED},
    },
    "stablelm": {
        "3b": {"num_key_value_heads": 4},
        "biases": {"use_qkv_bias": True, "num_key_value_heads": 2},
        "12b": {"qk_layernorm": True, "use_parallel_residual": True},
    },
    "nemotron": {"plain": {"head_dim": 16}, "biases": {"mlp_bias": True, "attention_bias": True}},
    "starcoder2": {
        "plain": {"sliding_window": 6},
        "no biases": {"use_bias": False, "tie_word_embeddings": False},
    },
    "phi": {
        "2": {"num_key_value_heads": 4},
        "qk norm": {"qk_layernorm": True, "rope_parameters": {"partial_rotary_factor": 0.25}},
    },
    "gpt2": {"plain": {}, "inverse": {"scale_attn_by_inverse_layer_idx": True, "n_inner": 80}},
    "gpt_bigcode": {"mqa": {}, "mha": {"multi_query": False}},
    "gptj": {"plain": {"rotary_dim": 8}},
    "gpt_neox": {
        "pythia": {"hidden_act": "gelu"},
        "one by one": {"use_parallel_residual": False, "hidden_act": "gelu_fast"},
    },
    "bloom": {
        "plain": {},
        "6 heads": {"num_attention_heads": 6, "hidden_size": 96},
        "normed": {"apply_residual_connection_post_layernorm": True},
    },
    "falcon": {
        "7b": {"num_kv_heads": 1, "new_decoder_architecture": False},
        "40b": {"num_kv_heads": 2, "new_decoder_architecture": True},
        "11b": {
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
        },
        "rw": {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True},
    },
    "mpt": {
        "7b": {"num_attention_heads": 4},
        "clip": {
            "num_attention_heads": 6,
            "hidden_size": 96,
            "attn_config": {"clip_qkv": 0.9, "softmax_scale": 0.3},
        },
    },
    "opt": {
        "125m": {"ffn_dim": 96},
        "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32, "ffn_dim": 96},
        "galactica": {
            "ffn_dim": 96,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
        },
    },
    "mixtral": {
        "plain": {"num_local_experts": 5, "num_experts_per_tok": 2},
        "window": {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 6},
    },
    "qwen2_moe": {
        "plain": {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 80,
        },
        "every other": {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 32,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
        },
    },
    "qwen3_moe": {
        "plain": {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
            "head_dim": 32,
        },
        "dense first": {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "mlp_only_layers": [0],
        },
    },
    "olmoe": {"plain": {"num_experts": 6, "num_experts_per_tok": 3, "num_key_value_heads": 4}},
    "granitemoe": {
        "plain": {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "embedding_multiplier": 6.0,
            "logits_scaling": 0.5,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.2,
        },
    },
    "granitemoeshared": {
        "plain": {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 48,
            "residual_multiplier": 0.8,
            "attention_multiplier": 0.3,
        },
    },
    "phimoe": {
        "plain": {
            "num_local_experts": 4,
            "attention_bias": True,
            "lm_head_bias": True,
            "router_jitter_noise": 0.3,
        },
    },
    "dbrx": {
        "plain": {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            "attn_config": {"clip_qkv": 0.9, "kv_n_heads": 2, "rope_theta": 5e5},
            "ffn_config": {
                "hidden_size": 64,
                "ffn_hidden_size": 48,
                "moe_num_experts": 5,
                "moe_top_k": 3,
                "moe_normalize_expert_weights": 2.0,
            },
            # Which transformers reads instead of the place where DBRX's own files say it.
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
    },
    "gpt_oss": {
        "plain": {
            "head_dim": 16,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "swiglu_limit": 1.0,
            "rope_parameters": {"rope_theta": 1e4, "truncate": False, **_YARN},
        },
    },
    "deepseek_v2": {
        "lite": {"topk_method": "greedy", "q_lora_rank": None, **_MLA},
        "grouped": {
            "topk_method": "group_limited_greedy",
            "n_group": 3,
            "topk_group": 1,
            "q_lora_rank": 24,
            "routed_scaling_factor": 2.0,
            **_MLA,
        },
    },
    "deepseek_v3": {
        "plain": {
            "n_group": 3,
            "topk_group": 2,
            "q_lora_rank": 24,
            "routed_scaling_factor": 2.5,
            "rope_parameters": {
                "rope_theta": 1e4,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                **_YARN,
            },
            **_MLA,
        },
        "halves": {
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": None,
            "rope_interleave": False,
            "norm_topk_prob": False,
            **_MLA,
        },
    },
    "glm4_moe": {
        "plain": {
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "head_dim": 32,
            "use_qk_norm": True,
            "attention_bias": True,
            "routed_scaling_factor": 1.5,
        },
    },
    "exaone4": {
        "32b": {"sliding_window": 6, "head_dim": 32, **_WINDOWED},
        "1.2b": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    },
    "arcee": {"plain": {}, "biases": {"mlp_bias": True, "attention_bias": True, "head_dim": 32}},
    "seed_oss": {"plain": {"head_dim": 32}},
    "ernie4_5": {"plain": {"head_dim": 32}, "biases": {"use_bias": True, "head_dim": 16}},
    "helium": {"plain": {"head_dim": 16}},
    "dots1": {
        "plain": {
            "n_routed_experts": 6,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "sliding_window": 6,
            "max_window_layers": 1,
        },
    },
    "minimax_m2": {
        "plain": {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "head_dim": 32,
            "rotary_dim": 16,
        },
    },
    "mamba": {
        "plain": {"state_size": 8, "time_step_rank": 6},
        "biases": {
            "state_size": 4,
            "conv_kernel": 3,
            "use_bias": True,
            "residual_in_fp32": False,
            "tie_word_embeddings": False,
        },
        "no conv bias": {"state_size": 4, "use_conv_bias": False, "expand": 3},
    },
    "mamba2": {
        "plain": {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 2, **_CHUNKS},
        "biases": {
            "state_size": 8,
            "num_heads": 4,
            "head_dim": 32,
            "n_groups": 1,
            "conv_kernel": 3,
            "use_bias": True,
            "residual_in_fp32": False,
            "tie_word_embeddings": True,
            **_CHUNKS,
        },
    },
    "granitemoehybrid": {
        "experts": {
            **_HYBRID,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "mamba_n_groups": 2,
        },
        "dense": {
            **_HYBRID,
            "num_local_experts": 0,
            "position_embedding_type": "rope",
            "mamba_proj_bias": True,
        },
    },
    "llama4_text": {
        "scout": {
            "head_dim": 16,
            "num_local_experts": 4,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 8,
            "floor_scale": 4,
            "attn_scale": 0.5,
        },
        "maverick": {
            "head_dim": 32,
            "num_local_experts": 4,
            "no_rope_layers": [1, 1],
            "attention_chunk_size": 6,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 80,
            "use_qk_norm": False,
        },
    },
}
