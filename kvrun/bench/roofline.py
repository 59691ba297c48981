"""The roofline: what the weights and the context of a model cost, and the time they must take.

The sum of parts is the bound of an engine that runs one kernel after another.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from kvrun.errors import Unsupported
from kvrun.runtime.hf_config import HFConfig

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a value; all others have one


@dataclass(frozen=True)
class Ceilings:
    """What a machine does at best: bytes/s from memory, and FLOP/s of a matrix product."""

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Work:
    """Bytes moved and floating-point operations done, by matrix products and by attention."""

    weight_bytes: float
    kv_bytes: float
    product_flops: float
    attention_flops: float

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes

    @property
    def flops(self) -> float:
        return self.product_flops + self.attention_flops

    def seconds(self, at: Ceilings) -> float:
        """The least time: each part is as long as the slower of its memory and its arithmetic."""
        products = max(self.weight_bytes / at.bandwidth, self.product_flops / at.flops)
        return products + max(self.kv_bytes / at.bandwidth, self.attention_flops / at.flops)


# What a configuration says of models that are not counted here.
_UNCOUNTED = {
    "kv_lora_rank": "latent attention", "attention_chunk_size": "chunks of attention",
    "state_size": "recurrent layers", "mamba_d_state": "recurrent layers",
    "ssm_cfg": "recurrent layers",
}  # fmt: skip
# Families whose MLP has two matrices and no gate, and where they say its width if it is not four
# times theirs.
_UNGATED = {
    "arcee": "intermediate_size", "bloom": "", "falcon": "ffn_hidden_size", "gpt2": "n_inner",
    "gpt_bigcode": "n_inner",
    "gpt_neox": "intermediate_size", "gptj": "n_inner", "mpt": "", "nemotron": "intermediate_size",
    "opt": "ffn_dim", "phi": "intermediate_size", "starcoder2": "intermediate_size",
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """A decoder by its parameters.

    `linear` and `head` count the parameters of the layers' matrices and of the output, `experts`
    those of experts, of which a token goes through `share`, `embedding` those of an embedding that
    is not the output too: a step reads next to nothing of it. `windows` has for each layer the most
    tokens it attends to, 0 for all. Widths are bytes of a value.
    """

    linear: int
    head: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int, ...]
    experts: int = 0
    share: float = 1.0
    width: float = 2
    kv_width: float = 2
    linear_width: float | None = None  # of the layers' matrices, where it is another
    head_width: float | None = None  # of the output's
    embedding: int = 0

    @classmethod
    def of(
        cls,
        config: HFConfig,
        dtype: str = "bfloat16",
        kv_dtype: str | None = None,
        linear_width: float | None = None,
        head_width: float | None = None,
    ) -> "Cost":
        """From a config.json, with weights in `dtype`, keys and values in `kv_dtype` or the same.

        `linear_width`, `head_width`: bytes of a value of the layers' matrices and of the output's
        where they are quantized.

        Raises BadCheckpoint when the configuration does not say what is needed, and Unsupported
        for what is not counted here.
        """
        for name, what in _UNCOUNTED.items():
            if config.get(name) is not None:
                raise Unsupported(f"kvrun bench does not know the limit of a model with {what}.")
        hidden = config.integer("hidden_size")
        layers, heads = config.integer("num_hidden_layers"), config.integer("num_attention_heads")
        kv_heads = _kv_heads(config, heads)
        head_dim = config.integer("head_dim", hidden // heads)
        attention = hidden * (heads + 2 * kv_heads) * head_dim + heads * head_dim * hidden
        dense, experts, share = _mlps(config, hidden, layers)
        head = config.integer("vocab_size") * hidden
        return cls(
            linear=layers * attention + dense,
            head=head,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            windows=_windows(config, layers),
            experts=experts,
            share=share,
            width=WIDTHS.get(dtype, 1),
            kv_width=WIDTHS.get(kv_dtype or dtype, 1),
            linear_width=linear_width,
            head_width=head_width,
            embedding=0 if config.flag("tie_word_embeddings", True) else head,
        )

    @property
    def parameters(self) -> int:
        """Of all matrices that are counted, which is all but norms, biases and positions."""
        return self.linear + self.head + self.experts + self.embedding

    @property
    def weight_bytes(self) -> float:
        """What the weights take, without such an embedding."""
        return self._fixed_bytes + self.experts * self.width

    def weights_read(self, tokens: float) -> float:
        """Bytes of weights that a step of so many tokens reads, with choices of experts that are
        evenly spread."""
        chosen = 1 - (1 - self.share) ** max(tokens, 1) if self.share < 1 else 1.0
        return self._fixed_bytes + self.experts * chosen * self.width

    @property
    def _active(self) -> float:
        """Parameters of the layers that a token is multiplied with."""
        return self.linear + self.experts * self.share

    @property
    def _fixed_bytes(self) -> float:
        """Of what every token is multiplied with."""
        linear = self.width if self.linear_width is None else self.linear_width
        head = self.width if self.head_width is None else self.head_width
        return self.linear * linear + self.head * head

    @property
    def kv_bytes_per_token(self) -> float:
        """What a token of context holds in all layers."""
        return 2 * len(self.windows) * self.kv_heads * self.head_dim * self.kv_width

    def step(self, batch: float, context: float) -> Work:
        """One decode step of `batch` sequences with `context` tokens each, the mean of them."""
        attended = batch * sum(min(context, window or context) for window in self.windows)
        return Work(
            weight_bytes=self.weights_read(batch),
            kv_bytes=attended * 2 * self.kv_heads * self.head_dim * self.kv_width,
            product_flops=2 * (self._active + self.head) * batch,
            attention_flops=4 * attended * self.heads * self.head_dim,
        )

    def prefill(self, batch: int, tokens: int, depth: int = 0) -> Work:
        """`batch` prompts of `tokens` after `depth` that are there; the head for the last only."""
        reach = depth + tokens / 2  # keys that a token sees, on average
        attended = batch * tokens * sum(min(reach, window or reach) for window in self.windows)
        return Work(
            weight_bytes=self.weights_read(batch * tokens),
            kv_bytes=0.0,  # a tile of queries shares what it reads
            product_flops=2 * batch * (self._active * tokens + self.head),
            attention_flops=4 * attended * self.heads * self.head_dim,
        )

    def offline(
        self,
        lengths: Sequence[tuple[int, int]],
        at: Ceilings,
        *,
        slots: int,
        kv_tokens: int | None = None,
    ) -> float:
        """Seconds for requests of (prompt, answer) lengths that are all there at once.

        They start in order while one of `slots` and room for `kv_tokens` is free. A prompt costs
        its arithmetic, the first ones together at least one reading of the weights; what it brings
        is the first token of its answer.
        """
        waiting = deque(lengths)
        ends: list[tuple[int, int]] = []  # (step after which it ends, tokens it then holds)
        now, context, seconds = 0, 0, 0.0
        while waiting or ends:
            while waiting and len(ends) < slots:
                prompt, answer = waiting[0]
                if ends and kv_tokens is not None and context + prompt >= kv_tokens:
                    break
                waiting.popleft()
                seconds += self.prefill(1, prompt).flops / at.flops
                if answer > 1:
                    context += prompt
                    heappush(ends, (now + answer - 1, prompt + answer - 1))
            if not now:
                seconds = max(seconds, self.weights_read(lengths[0][0]) / at.bandwidth)
            if not ends:
                continue
            now += 1
            context += len(ends)
            seconds += self.step(len(ends), context / len(ends)).seconds(at)
            while ends and ends[0][0] == now:
                context -= heappop(ends)[1]
        return seconds


def _kv_heads(config: HFConfig, heads: int) -> int:
    if config.model_type in ("falcon", "gpt_bigcode") and not config.flag(
        "new_decoder_architecture", False
    ):
        return 1 if config.flag("multi_query", True) else heads
    said = config.get("num_key_value_heads") or config.get("num_kv_heads")
    said = said or config.part("attn_config").get("kv_n_heads")
    usual = config.model_type not in ("bloom", "gpt2", "gpt_neox", "gptj", "mpt", "opt")
    return int(said) if said and usual else heads


def _mlps(config: HFConfig, hidden: int, layers: int) -> tuple[int, int, float]:
    """Parameters of all dense MLPs and routers, of all experts, and a token's share of these."""
    if config.model_type in _UNGATED:
        inner = config.get(_UNGATED[config.model_type]) or 4 * hidden
        return layers * 2 * hidden * int(inner), 0, 1.0
    ffn = config.part("ffn_config")
    count = config.get("n_routed_experts") or ffn.get("moe_num_experts")
    if count is None:
        return layers * 3 * hidden * config.integer("intermediate_size"), 0, 1.0
    every, dense = config.integer("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    first = config.get("first_k_dense_replace") or 0
    sparse = sum((n + 1) % every == 0 and n not in dense and n >= first for n in range(layers))
    inner = config.get("moe_intermediate_size") or ffn.get("ffn_hidden_size")
    inner = inner or config.integer("intermediate_size")
    shared = (config.get("n_shared_experts") or 0) * inner
    shared += config.get("shared_expert_intermediate_size") or 0
    shared += config.get("shared_intermediate_size") or 0
    plain = 0 if sparse == layers else 3 * hidden * config.integer("intermediate_size")
    each = 3 * hidden * shared + hidden * count
    chosen = config.get("num_experts_per_tok") or ffn.get("moe_top_k", 1)
    return (
        (layers - sparse) * plain + sparse * each,
        sparse * count * 3 * hidden * inner,
        chosen / count,
    )


def _windows(config: HFConfig, layers: int) -> tuple[int, ...]:
    window = config.get("sliding_window")
    # Qwen's configurations name a window that counts only where they say so.
    default = not str(config.model_type).startswith("qwen")
    if not window or not config.flag("use_sliding_window", default):
        return (0,) * layers
    usual = ["sliding_attention"] * layers
    if config.model_type == "gemma2":
        usual = ["sliding_attention", "full_attention"] * layers
    kinds = config.layer_types(usual)[:layers]
    return tuple(int(window) if kind == "sliding_attention" else 0 for kind in kinds)
