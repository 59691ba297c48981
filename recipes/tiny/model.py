"""The network as it is trained: a plain Llama whose parameter names are the checkpoint's."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention


@dataclass(frozen=True)
class Shape:
    """The numbers of config.json."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 9
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 768
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    def config(self) -> dict[str, object]:
        """The config.json of this shape."""
        numbers = asdict(self)
        theta = numbers.pop("rope_theta")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **numbers,
            "rope_theta": theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "initializer_range": 0.02,
            "pretraining_tp": 1,
            "tie_word_embeddings": True,
            "use_cache": True,
            "dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 7,
            "pad_token_id": 0,
        }


class Norm(nn.Module):
    """RMS norm in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        full = x.float()
        full = full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + self.eps)
        return (full * self.weight).to(x.dtype)


class Adapted(nn.Module):
    """A frozen Linear with a LoRA pair beside it; scale is fixed by rank and alpha."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding over halves; x [batch, heads, tokens, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention under a mask that keeps documents apart."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        q, kv = s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim
        self.q_proj = nn.Linear(s.hidden_size, q, bias=False)
        self.k_proj = nn.Linear(s.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(s.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(q, s.hidden_size, bias=False)

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values; [batch, heads, tokens, head_dim] each."""

        def split(y: Tensor) -> Tensor:
            return y.view(*x.shape[:2], -1, self.s.head_dim).transpose(1, 2)

        v = split(self.v_proj(x))
        q = rotate(split(self.q_proj(x)), cos, sin).to(v.dtype)
        k = rotate(split(self.k_proj(x)), cos, sin).to(v.dtype)
        return q, k, v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: object) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.heads(x, cos, sin)
        if isinstance(mask, Tensor):
            repeat = self.s.num_attention_heads // self.s.num_key_value_heads
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)  # type: ignore[arg-type]
        return self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))


class Feed(nn.Module):
    """Gated feed-forward network."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.up_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.down_proj = nn.Linear(s.intermediate_size, s.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention, then the feed-forward network, each behind a norm."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(s), Feed(s)
        self.input_layernorm = Norm(s.hidden_size, s.rms_norm_eps)
        self.post_attention_layernorm = Norm(s.hidden_size, s.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: object) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, layers and last norm under the checkpoint's prefix `model.`."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(s.vocab_size, s.hidden_size)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.num_hidden_layers))
        self.norm = Norm(s.hidden_size, s.rms_norm_eps)


class Tiny(nn.Module):
    """ids [batch, tokens], positions [batch, tokens] -> logits [batch, tokens, vocab]."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.model = Trunk(s)
        depth = math.sqrt(2 * s.num_hidden_layers)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                out = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / depth if out else 0.02)

    def start(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embedded tokens, and the cosines and sines of their positions."""
        half = self.s.head_dim // 2
        steps = torch.arange(half, device=ids.device, dtype=torch.float32) / half
        angles = positions[:, None, :, None].float() * self.s.rope_theta**-steps
        x = self.model.embed_tokens(ids)
        if torch.is_autocast_enabled(ids.device.type):
            x = x.to(torch.get_autocast_dtype(ids.device.type))
        both = torch.cat((angles, angles), -1)
        return x, both.cos(), both.sin()

    def forward(self, ids: Tensor, positions: Tensor, mask: object) -> Tensor:
        x, cos, sin = self.start(ids, positions)
        for layer in self.model.layers:
            x = layer(x, cos, sin, mask)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)
