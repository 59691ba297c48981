"""Any other architecture: what is refused by its configuration, and its weights."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvrun.errors import BadCheckpoint, Unsupported
from kvrun.folder import names
from kvrun.runtime import models
from kvrun.runtime.checkpoint import Checkpoint
from kvrun.runtime.fallback.probe import probed
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.tensorfile import TensorFolder

# Types whose layers are of another kind than attention over all that was seen, by the reason.
_REFUSED = {
    "its layers keep a state, which transformers' code would carry from one sequence to the next": (
        "bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba",
        "kimi_linear", "lfm2", "lfm2_moe", "mamba", "mamba2", "minimax", "nemotron_h",
        "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next",
        "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2",
    ),
    "it reads an encoder's states": (
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "git", "marian", "mbart",
        "mllama", "musicgen", "musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet", "t5",
        "trocr", "whisper",
    ),
    "it is an encoder": (
        "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie",
        "megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer",
        "xlm-roberta", "xlm-roberta-xl", "xmod",
    ),
    "its attention does not go through transformers' interface": (
        "cpmant", "falcon", "gpt_neo", "gpt_neox_japanese", "mpt", "openai-gpt", "reformer",
        "xglm", "xlm", "xlnet",
    ),
    "its attention sees chunks": ("llama4", "llama4_text"),
}  # fmt: skip
# Of a configuration: what makes transformers fetch or run other code than its own, or quantize.
_IGNORED = (
    "auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "fusion_config", "quantization_config",
)  # fmt: skip


def refusal(raw: dict[str, Any]) -> str | None:
    """Why the model of a config.json cannot run by transformers' code, as far as that tells."""
    kind = raw["model_type"]
    if "text_config" in raw:
        return "it has several parts, of which kvrun would have to know the text's"
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"neither kvrun nor transformers {transformers.__version__} knows it"
    for reason, kinds in _REFUSED.items():
        if kind in kinds:
            return reason
    if raw.get("is_encoder_decoder"):
        return "it reads an encoder's states"
    other = {
        part for part in raw.get("layer_types") or () if part not in (
            "full_attention", "sliding_attention", "attention"
        )
    }  # fmt: skip
    if other:
        return f"it has layers of the kind '{min(map(str, other))}'"
    told = ("attention_chunk_size", "attn_temperature_tuning", "index_topk")
    for name in told:
        if raw.get(name):
            return f"its attention has '{name}', which does not reach transformers' interface"
    try:
        cls, _ = _class(raw)
    except BadCheckpoint as error:
        return error.in_one_line
    if not cls._can_set_attn_implementation():
        return "its attention does not go through transformers' interface"
    return None


def build(w: Checkpoint, folder: Path) -> Decoder:
    """The model of `folder` by transformers' code, probed.

    Raises Unsupported for one that would not answer as transformers does, or with options that
    only families of kvrun have, and BadCheckpoint for weights that do not fit. Closes the
    checkpoint.
    """
    kind = w.config.text("model_type")
    raw = json.loads((folder / "config.json").read_bytes())
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return models.build(w)  # which says what is known
    try:
        if (reason := refusal(raw)) is not None:
            raise _refused(kind, reason)
        asked = w.quantize or w.config.quant_method
        if asked:
            raise _refused(kind, f"weights in '{asked}' need a family of kvrun")
        if w.group.size > 1:
            raise _refused(kind, "tensor parallelism needs a family of kvrun")
        limit = _context(w, kind)
        model = _loaded(w, folder, raw)
    finally:
        w.close()
    try:
        return probed(w, model.to(w.device).eval(), limit)
    except Unsupported as error:
        raise _refused(kind, error.what) from error


def _refused(kind: str, reason: str) -> Unsupported:
    return Unsupported(
        f"the architecture '{kind}' is not supported: kvrun has no family for it, and "
        "transformers' own code would not be right here.",
        cause=reason,
        hint=f"use a model of a family of kvrun: {', '.join(names(models.__name__))}",
    )


def _class(raw: dict[str, Any]) -> tuple[Any, Any]:
    """transformers' class of a configuration, and the configuration; never remote code."""
    values = {name: value for name, value in raw.items() if name not in _IGNORED}
    try:
        with _quiet():
            config = CONFIG_MAPPING[raw["model_type"]].from_dict(values)
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config
    except Exception as error:  # whatever a configuration's checks say
        raise BadCheckpoint(
            "transformers does not take this config.json.", cause=_first_line(error)
        ) from error


def _context(w: Checkpoint, kind: str) -> int | None:
    """How far frequencies do not depend on who is in the same step; None: everywhere."""
    found = w.config.get("rope_parameters", w.config.get("rope_scaling", {}))
    parts = [found, *(p for p in found.values() if isinstance(p, dict))] if found else []
    types = {part.get("rope_type", part.get("type")) for part in parts}
    if not types & {"longrope", "su", "dynamic"}:
        return None
    limit: int = w.config.get("max_position_embeddings") or 0
    for part in (*parts, {"original_max_position_embeddings": w.config.get(
        "original_max_position_embeddings"
    )}):  # fmt: skip
        limit = min(limit, part.get("original_max_position_embeddings") or limit)
    if limit < 1 or (w.config.context or 0) > limit:
        raise _refused(kind, f"beyond {limit} tokens its rotation depends on the longest neighbour")
    return limit


def _loaded(w: Checkpoint, folder: Path, raw: dict[str, Any]) -> Any:
    """The model with its weights, on the host."""
    cls, config = _class(raw)
    options: dict[str, Any] = {"dtype": w.dtype, "attn_implementation": "eager"}
    with _quiet():
        if w.dummy:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return cls._from_config(config, **options)
        tensors = _tensors(w, folder)
        try:
            model, found = cls.from_pretrained(
                None, config=config, state_dict=tensors, output_loading_info=True,
                ignore_mismatched_sizes=True, local_files_only=True, **options,
            )  # fmt: skip
        except (RuntimeError, ValueError, KeyError) as error:
            raise BadCheckpoint(
                f"the weights in {folder} do not fit its config.json.", cause=_first_line(error)
            ) from error
    wrong = [
        f"{what}: {', '.join(named[:5])}" + (f" and {len(named) - 5} more" if named[5:] else "")
        for what, key in (
            ("missing", "missing_keys"),
            ("not part of this architecture", "unexpected_keys"),
            ("of another shape", "mismatched_keys"),
        )
        if (named := sorted(k if isinstance(k, str) else k[0] for k in found[key]))
    ]
    if wrong:
        raise BadCheckpoint(
            f"the weights in {folder} do not fit its config.json.",
            cause="; ".join(wrong),
            hint="fetch the model again, or check that config.json belongs to these weights",
        )
    return model


def _tensors(w: Checkpoint, folder: Path) -> dict[str, torch.Tensor]:
    """All of a folder's tensors by name, read as kvrun reads them: nothing stays mapped.

    They are as stored: some classes keep some in fp32, which a smaller dtype would have rounded.
    """
    listed = TensorFolder(folder)
    try:
        found = {name: listed.find(name)[1].shape for name in listed.names}
    finally:
        listed.close()
    tensors = {}
    for name, shape in found.items():
        if not name.endswith("rotary_emb.inv_freq"):  # tables of old files
            dtype = w.find(name, shape, w.dtype)[1]
            tensors[name] = w.read(name, shape, dtype=dtype).cpu()
    return tensors


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' bars and reports are ours to give, as errors."""
    logging: Any = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:200] if said else ''}"
