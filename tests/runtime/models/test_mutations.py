"""Mistakes that must show: each changes what kvrun reads, or replaces a part of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvrun.runtime.cache.states import StateCache
from kvrun.runtime.layers import mamba as mamba_layers
from kvrun.runtime.layers import named, shared_moe
from kvrun.runtime.layers.moe import MoE
from kvrun.runtime.models import (
    bloom,
    cohere,
    deepseek_v3,
    ernie4_5,
    falcon,
    glm,
    gpt_bigcode,
    gpt_neox,
    gpt_oss,
    granitemoe,
    helium,
    llama4_text,
    mpt,
    opt,
    qwen3_moe,
)
from tests.runtime.driver import Driver
from tests.runtime.models import zoo
from tests.runtime.models.compare import TOLERANCE, stepwise
from tests.runtime.models.spoil import (
    as_packed,
    by_softmax_top,
    by_top_softmax,
    corrected_weights,
    dropped,
    eight,
    halved,
    halves,
    headless,
    in_one_group,
    minus_one,
    no_biases,
    no_head_norm,
    no_offset,
    one_weight,
    replaced,
    scale_one,
    sixteenfold,
    swap_after,
    swap_kv_heads,
    swap_names,
    swap_rows,
    unshared,
    without,
    zeroed,
)

BIGGER = {"rope_type": "default", "rope_theta": 10100.0}
FULL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
CONFIG_MUTATIONS = {
    "rope theta +1 %": ("llama", "v2", {"rope_parameters": BIGGER}),
    "eps × 10": ("llama", "v2", {"rms_norm_eps": 1e-4}),
    "llama3 scaling off": ("llama", "v3.1", {"rope_parameters": {"rope_theta": 500000.0}}),
    "linear scaling off": ("llama", "linear", {"rope_parameters": {"rope_theta": 10000.0}}),
    "yarn off": ("llama", "yarn", {"rope_parameters": {"rope_theta": 10000.0}}),
    "window off, qwen3": ("qwen3", "window", {"use_sliding_window": False}),
    "window off, qwen2": ("qwen2", "window", {"use_sliding_window": False}),
    "windows begin a layer early": ("qwen2", "window", {"layer_types": ["sliding_attention"] * 2}),
    "window off": ("gemma2", "plain", {"sliding_window": 4096}),
    "window on all layers": ("gemma2", "plain", {"layer_types": ["sliding_attention"] * 2}),
    "window one too wide": ("gemma2", "plain", {"sliding_window": 7}),
    "softcap off": ("gemma2", "plain", {"attn_logit_softcapping": None}),
    "final softcap off": ("gemma2", "plain", {"final_logit_softcapping": None}),
    "attention scale": ("gemma2", "plain", {"query_pre_attn_scalar": 16}),
    "exact gelu": ("gemma2", "plain", {"hidden_activation": "gelu"}),
    "silu for gelu": ("gemma", "2b", {"hidden_act": "silu"}),
    "window off, mistral": ("mistral", "v0.1", {"sliding_window": None}),
    "window one too narrow": ("mistral", "v0.1", {"sliding_window": 5}),
    "window on all layers, ministral": (
        "ministral", "plain", {"layer_types": ["sliding_attention"] * 2}
    ),
    "queries do not grow": (
        "ministral3",
        "yarn",
        {
            "rope_parameters": {
                "rope_theta": 1e4, "rope_type": "yarn", "factor": 8.0,
                "original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 1.0,
            }
        },
    ),
    "local rotations everywhere": (
        "gemma3_text",
        "plain",
        {"rope_parameters": {"sliding_attention": LOCAL, "full_attention": LOCAL}},
    ),
    "window off, gemma3": ("gemma3_text", "plain", {"sliding_window": 4096}),
    "window off, phi3": ("phi3", "4k", {"sliding_window": None}),
    "rotation of whole heads, phi3": ("phi3", "mini", {"rope_parameters": FULL}),
    "the short list of longrope": ("phi3", "128k", {"max_position_embeddings": 8}),
    "the long list of longrope": ("phi3", "128k-short", {"original_max_position_embeddings": 255}),
    "embedding × 1": ("granite", "plain", {"embedding_multiplier": 1.0}),
    "logits ÷ 1": ("granite", "plain", {"logits_scaling": 1.0}),
    "residual × 1": ("granite", "plain", {"residual_multiplier": 1.0}),
    "scores × 1": ("granite", "plain", {"attention_multiplier": 1.0}),
    "clip off, olmo": ("olmo", "clip", {"clip_qkv": None}),
    "window off, olmo3": ("olmo3", "plain", {"sliding_window": 4096}),
    "yarn on no layer": (
        "olmo3",
        "plain",
        {"rope_parameters": {"sliding_attention": LOCAL, "full_attention": LOCAL}},
    ),
    "rope on the rope-less layer": ("smollm3", "plain", {"no_rope_layers": [1, 1]}),
    "no_rope_layers turned round": ("smollm3", "plain", {"no_rope_layers": [0, 1]}),
    "window off, smollm3": ("smollm3", "window", {"use_sliding_window": False}),
    "rotation of whole heads, glm": ("glm", "plain", {"rope_parameters": FULL}),
    "rotation of whole heads, glm4": ("glm4", "plain", {"rope_parameters": FULL}),
    "logits × 1": ("cohere", "plain", {"logit_scale": 1.0}),
    "logits × 1, cohere2": ("cohere2", "plain", {"logit_scale": 1.0}),
    "rope on the layer without": (
        "cohere2", "plain", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 99}
    ),
    "rotation of whole heads, stablelm": ("stablelm", "3b", {"rope_parameters": FULL}),
    "rotation of whole heads, nemotron": ("nemotron", "plain", {"rope_parameters": FULL}),
    "relu for its square": ("nemotron", "plain", {"hidden_act": "relu"}),
    "window off, starcoder2": ("starcoder2", "plain", {"sliding_window": None}),
    "rotation of whole heads, phi": ("phi", "2", {"rope_parameters": FULL}),
    "exact gelu, phi": ("phi", "2", {"hidden_act": "gelu"}),
    "not scaled by the layer": ("gpt2", "inverse", {"scale_attn_by_inverse_layer_idx": False}),
    "gelu for its tanh form, gpt2": ("gpt2", "plain", {"activation_function": "gelu"}),
    "a quarter too little rotated": ("gptj", "plain", {"rotary_dim": 6}),
    "rotation of whole heads, neox": ("gpt_neox", "pythia", {"rope_parameters": FULL}),
    "one after the other": ("gpt_neox", "pythia", {"use_parallel_residual": False}),
    "side by side": ("gpt_neox", "one by one", {"use_parallel_residual": True}),
    "residual from the sum": (
        "bloom", "normed", {"apply_residual_connection_post_layernorm": False}
    ),
    "clip off, mpt": ("mpt", "clip", {"attn_config": {"softmax_scale": 0.3}}),
    "scale off, mpt": ("mpt", "clip", {"attn_config": {"clip_qkv": 0.9}}),
    "norm before, 350m": ("opt", "350m", {"_remove_final_layer_norm": True,
                                          "do_layer_norm_before": True}),
    "relu for gelu": ("opt", "galactica", {"activation_function": "relu"}),
    "chunks off": ("llama4_text", "scout", {"attention_chunk_size": None}),
    "chunks one too long": ("llama4_text", "maverick", {"attention_chunk_size": 7}),
    "queries do not grow, llama4": ("llama4_text", "scout", {"attn_temperature_tuning": False}),
    "head norms off, llama4": ("llama4_text", "scout", {"use_qk_norm": False}),
    "rotation on the other layer": ("llama4_text", "scout", {"no_rope_layers": [0, 1]}),
    "window off, exaone": ("exaone4", "32b", {"sliding_window": 4096}),
    "rope on the layer without, exaone": (
        "exaone4", "32b", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 99}
    ),
    "relu for its square, arcee": ("arcee", "plain", {"hidden_act": "relu"}),
    "window off, dots": ("dots1", "plain", {"sliding_window": 4096}),
    "weights not normalised, dots": ("dots1", "plain", {"norm_topk_prob": False}),
    "rotation of whole heads, minimax": (
        "minimax_m2", "plain", {"rope_parameters": FULL, "rotary_dim": 32}
    ),
    "weights not normalised": ("qwen3_moe", "plain", {"norm_topk_prob": False}),
    "weights normalised": ("qwen2_moe", "plain", {"norm_topk_prob": True}),
    "one expert less": ("mixtral", "plain", {"num_experts_per_tok": 1}),
    "window off, mixtral": ("mixtral", "window", {"sliding_window": None}),
    "windows on the other layers": (
        "qwen2_moe", "every other", {"layer_types": ["full_attention", "sliding_attention"]}
    ),
    "residual × 1, granitemoe": ("granitemoe", "plain", {"residual_multiplier": 1.0}),
    "scores × 1, shared": ("granitemoeshared", "plain", {"attention_multiplier": 1.0}),
    "every expert is near": ("phimoe", "plain", {"router_jitter_noise": 9.0}),
    "gate not clamped": ("gpt_oss", "plain", {"swiglu_limit": 99.0}),
    "window off, gpt-oss": ("gpt_oss", "plain", {"sliding_window": 4096}),
    "norm of weights, dbrx": (
        "dbrx",
        "plain",
        {
            "ffn_config": {
                "ffn_hidden_size": 48, "moe_num_experts": 5, "moe_top_k": 3,
                "moe_normalize_expert_weights": 1.0,
            }
        },
    ),
    "clip off, dbrx": ("dbrx", "plain", {"attn_config": {"kv_n_heads": 2}}),
    "no groups": ("deepseek_v3", "plain", {"n_group": 1, "topk_group": 1}),
    "no groups, v2": ("deepseek_v2", "grouped", {"topk_method": "greedy"}),
    "factor of experts": ("deepseek_v2", "grouped", {"routed_scaling_factor": 1.0}),
    "halves for pairs, v3": ("deepseek_v3", "plain", {"rope_interleave": False}),
    "pairs for halves, v3": ("deepseek_v3", "halves", {"rope_interleave": True}),
    "rotation of whole heads, glm 4.5": ("glm4_moe", "plain", {"rope_parameters": FULL}),
    "gelu for silu behind the filter": ("mamba", "plain", {"hidden_act": "gelu"}),
    "eps × 10, mamba": ("mamba", "plain", {"layer_norm_epsilon": 1e-3}),
    "bounded time steps": ("mamba2", "plain", {"time_step_limit": [0.0, 0.5]}),
    "residual × 1, hybrid": ("granitemoehybrid", "experts", {"residual_multiplier": 1.0}),
    "rope on the layer without, hybrid": (
        "granitemoehybrid", "experts", {"position_embedding_type": "rope"}
    ),
    "no rope, hybrid": ("granitemoehybrid", "dense", {"position_embedding_type": "nope"}),
    "one expert less, hybrid": ("granitemoehybrid", "experts", {"num_experts_per_tok": 1}),
    "factor of experts, glm 4.5": ("glm4_moe", "plain", {"routed_scaling_factor": 1.0}),
}  # fmt: skip
TENSOR_MUTATIONS = {
    "swapped heads": ("llama", "v2", swap_rows("q_proj", 16)),
    "gate and up swapped": ("llama", "v2", swap_names("gate_proj", "up_proj")),
    "gate and up swapped, phi3": ("phi3", "4k", swap_rows("gate_up_proj", 96)),
    "wrong KV group": ("llama", "v3", swap_kv_heads(16)),
    "biases lost": ("llama", "biases", no_biases),
    "biases lost, qwen2": ("qwen2", "plain", no_biases),
    "biases lost, gpt2": ("gpt2", "plain", no_biases),
    "biases lost, opt": ("opt", "125m", no_biases),
    "biases lost, falcon": ("falcon", "rw", no_biases),
    "norms swapped": ("llama", "v2", swap_names("input_layernorm", "post_attention_layernorm")),
    "q and k norms swapped": ("qwen3", "plain", swap_names("q_norm", "k_norm")),
    "norms of attention and MLP swapped": ("falcon", "40b", swap_names("ln_attn", "ln_mlp")),
    "norms of all heads swapped": ("olmo2", "multihead", swap_names("q_norm", "k_norm")),
    "norm offset 0": ("gemma2", "plain", minus_one),
    "norm offset 0, gemma": ("gemma", "2b", minus_one),
    "norm offset 0, gemma3": ("gemma3_text", "plain", minus_one),
    "norm offset 0, nemotron": ("nemotron", "plain", minus_one),
    "gate and up swapped, mixtral": ("mixtral", "plain", swap_names(".w1.", ".w3.")),
    "gate and up swapped, dbrx": ("dbrx", "plain", swap_names("mlp.w1", "mlp.v1")),
    "experts in another order": ("qwen3_moe", "plain", swap_names("experts.0.", "experts.1.")),
    "biases lost, seed": ("seed_oss", "plain", no_biases),
    "biases lost, ernie": ("ernie4_5", "biases", no_biases),
    "gate and up swapped, minimax": ("minimax_m2", "plain", swap_names("w1.weight", "w3.weight")),
    "biases lost, gpt-oss": ("gpt_oss", "plain", no_biases),
    "norms of all heads swapped, olmoe": ("olmoe", "plain", swap_names("q_norm", "k_norm")),
    "norms of latents": ("deepseek_v3", "plain", minus_one),
    "input and gate swapped": ("mamba", "plain", swap_rows("in_proj", 96)),
    "input and gate swapped, mamba2": ("mamba2", "plain", swap_rows("in_proj", 128)),
    "groups swapped": ("mamba2", "plain", swap_after("in_proj", 256, 16)),
    "biases lost, mamba": ("mamba", "biases", no_biases),
    "biases lost, hybrid": ("granitemoehybrid", "dense", no_biases),
    "decays all one": ("mamba", "plain", zeroed("A_log")),
    "decays all one, mamba2": ("mamba2", "plain", zeroed("A_log")),
    "no way past the state": ("mamba", "plain", zeroed(".D")),
    "no way past the state, mamba2": ("mamba2", "plain", zeroed(".D")),
    "q and k swapped": ("phi3", "mini", swap_rows("qkv_proj", 64)),
}
CODE_MUTATIONS = {
    "qk-norm off": ("qwen3", "plain", no_head_norm),
    "embedding scale 1": ("gemma2", "plain", scale_one),
    "halves for pairs, cohere": ("cohere", "plain", replaced(cohere, "Rope", halves)),
    "halves for pairs, glm": ("glm", "plain", replaced(glm, "Rope", halves)),
    "what comes out is scaled": (
        "llama4_text",
        "scout",
        replaced(llama4_text, "InputScaled", lambda _: MoE),
    ),
    "halves for pairs, ernie": ("ernie4_5", "plain", replaced(ernie4_5, "Rope", halves)),
    "halves for pairs, helium": ("helium", "plain", replaced(helium, "Rope", halves)),
    "one weight for all heads": ("cohere", "plus", replaced(cohere, "HeadLayerNorm", one_weight)),
    "head norms off, phi": ("phi", "qk norm", replaced(named, "Attention", without("head_norm"))),
    "norms off, olmo2": ("olmo2", "plain", replaced(named, "Attention", without("head_norm"))),
    "head bias dropped": ("phi", "2", replaced(named, "Head", headless)),
    "grouped read as packed": ("gpt_neox", "pythia", replaced(gpt_neox, "grouped", as_packed)),
    "grouped read as packed, bloom": ("bloom", "plain", replaced(bloom, "grouped", as_packed)),
    "grouped read as packed, falcon": ("falcon", "40b", replaced(falcon, "grouped", as_packed)),
    "grouped read as packed, mha": (
        "gpt_bigcode",
        "mha",
        replaced(gpt_bigcode, "grouped", as_packed),
    ),
    "no slopes": ("bloom", "plain", replaced(bloom, "Attention", without("alibi"))),
    "slopes of a power of two": ("bloom", "6 heads", replaced(bloom, "alibi_slopes", eight)),
    "slopes unscaled": ("falcon", "rw", replaced(falcon, "alibi_slopes", sixteenfold)),
    "slopes of a power of two, mpt": ("mpt", "clip", replaced(mpt, "alibi_slopes", eight)),
    "softmax behind the choice": (
        "qwen2_moe",
        "plain",
        replaced(qwen3_moe, "softmax_top", by_top_softmax),
    ),
    "softmax before the choice": (
        "granitemoe",
        "plain",
        replaced(granitemoe, "top_softmax", by_softmax_top),
    ),
    "softmax before the choice, gpt-oss": (
        "gpt_oss",
        "plain",
        replaced(gpt_oss, "top_softmax", by_softmax_top),
    ),
    "sinks off": ("gpt_oss", "plain", replaced(named, "Attention", without("sinks"))),
    "gates and ups do not alternate": ("gpt_oss", "plain", replaced(gpt_oss, "stacked", halved)),
    "correction in the weights": (
        "deepseek_v3",
        "plain",
        replaced(deepseek_v3, "sigmoid_groups", corrected_weights),
    ),
    "no shared expert": ("deepseek_v3", "plain", replaced(shared_moe, "MoE", unshared)),
    "no shared expert, qwen2": ("qwen2_moe", "plain", replaced(qwen3_moe, "MoE", unshared)),
    "window not carried over a border": (
        "mamba",
        "plain",
        replaced(StateCache, "keep_window", dropped),
    ),
    "state not carried over a border": (
        "mamba2",
        "plain",
        replaced(StateCache, "keep_state", dropped),
    ),
    "state not carried over a border, hybrid": (
        "granitemoehybrid",
        "dense",
        replaced(StateCache, "keep_state", dropped),
    ),
    "norm over all groups": (
        "mamba2",
        "plain",
        replaced(mamba_layers, "GatedNorm", in_one_group),
    ),
    "no shared expert, hybrid": (
        "granitemoehybrid",
        "experts",
        replaced(granitemoe, "MoE", unshared),
    ),
    "no growth under yarn": (
        "deepseek_v3",
        "plain",
        replaced(deepseek_v3, "yarn_growth", lambda _: lambda rope: 1.0),
    ),
    "positions from row 0 on": ("opt", "125m", replaced(opt, "LearnedPositions", no_offset)),
}


@pytest.mark.parametrize("name", CONFIG_MUTATIONS)
def test_config_mutation_shows(name: str, mutant: Callable[..., tuple[Path, Any]]) -> None:
    family, variant, changes = CONFIG_MUTATIONS[name]
    folder, oracle = mutant(family, variant)
    zoo.edit_config(folder, **changes)
    assert stepwise(Driver(folder), oracle) > TOLERANCE


@pytest.mark.parametrize("name", TENSOR_MUTATIONS)
def test_tensor_mutation_shows(name: str, mutant: Callable[..., tuple[Path, Any]]) -> None:
    family, variant, change = TENSOR_MUTATIONS[name]
    folder, oracle = mutant(family, variant)
    zoo.edit_tensors(folder, change)
    assert stepwise(Driver(folder), oracle) > TOLERANCE


@pytest.mark.parametrize("name", CODE_MUTATIONS)
def test_code_mutation_shows(
    name: str, mutant: Callable[..., tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, variant, replace = CODE_MUTATIONS[name]
    folder, oracle = mutant(family, variant)
    replace(monkeypatch)
    assert stepwise(Driver(folder), oracle) > TOLERANCE
