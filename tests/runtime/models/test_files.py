"""Files as the hub has them: other names, other tensors beside them, and files that do not fit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma3TextConfig

from kvrun.errors import BadCheckpoint, Unsupported
from kvrun.runtime.attention import AttentionSpec, triton
from kvrun.runtime.cache.states import bytes_per_sequence
from kvrun.runtime.cache.tensors import bytes_per_block
from kvrun.runtime.checkpoint import Checkpoint
from kvrun.runtime.hf_config import HFConfig
from kvrun.runtime.models import build, gemma3_text
from kvrun.runtime.plan import architecture, examine
from tests.runtime.driver import Driver
from tests.runtime.models import zoo
from tests.runtime.models.compare import TOLERANCE, prompt, reference, stepwise, worst

Tensors = dict[str, torch.Tensor]


def renamed(old: str, new: str) -> Any:
    return lambda tensors: {k.replace(old, new, 1): t for k, t in tensors.items()}


@pytest.mark.parametrize(
    ("family", "prefix"),
    [("gpt2", "transformer."), ("bloom", "transformer."), ("opt", "model.")],
)
def test_names_without_the_prefix(tmp_path: Path, family: str, prefix: str) -> None:
    variant = next(iter(zoo.VARIANTS[family]))
    oracle = zoo.make(tmp_path, family, variant)
    zoo.edit_tensors(tmp_path, renamed(prefix, ""))
    assert not any(name.startswith(prefix) for name in load_file(tmp_path / "model.safetensors"))
    assert stepwise(Driver(tmp_path), oracle) <= TOLERANCE


def test_masks_beside_the_weights_are_passed_over(tmp_path: Path) -> None:
    oracle = zoo.make(tmp_path, "gpt2", "plain")

    def add(tensors: Tensors) -> Tensors:
        masks = {f"transformer.h.{n}.attn.bias": torch.ones(1, 1, 8, 8) for n in range(2)}
        return {**tensors, **masks, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}

    zoo.edit_tensors(tmp_path, add)
    assert stepwise(Driver(tmp_path), oracle) <= TOLERANCE


def test_the_first_santacoder(tmp_path: Path) -> None:
    """It says that it is GPT-2, and holds BigCode's matrices the other way round."""
    oracle = zoo.make(tmp_path, "gpt_bigcode", "mqa")

    def change(tensors: Tensors) -> Tensors:
        found = {}
        for name, tensor in tensors.items():
            matrix = any(part in name for part in (".c_attn", ".c_proj", ".c_fc"))
            if ".c_attn" in name:
                q, kv = tensor.split((64, 32))
                parts = {name.replace("c_attn", "q_attn"): q, name.replace("c_attn", "kv_attn"): kv}
            else:
                parts = {name: tensor}
            found |= {n: t.t() if matrix and t.ndim == 2 else t for n, t in parts.items()}
        return found

    zoo.edit_tensors(tmp_path, change)
    zoo.edit_config(tmp_path, model_type="gpt2", attention_head_type="multiquery",
                    activation_function="gelu_pytorch_tanh")  # fmt: skip
    assert stepwise(Driver(tmp_path), oracle) <= TOLERANCE


@pytest.mark.parametrize(("name", "variant"), [("RefinedWebModel", "7b"), ("RefinedWeb", "40b")])
def test_falcons_former_names(tmp_path: Path, name: str, variant: str) -> None:
    oracle = zoo.make(tmp_path, "falcon", variant)
    config: dict[str, Any] = {
        "model_type": name, "vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4,
        "layer_norm_epsilon": 1e-5, "bias": False, "alibi": False, "ffn_hidden_size": None,
    }  # fmt: skip
    config |= {"multi_query": True, "parallel_attn": True} if variant == "7b" else {"n_head_kv": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stepwise(Driver(tmp_path), oracle) <= TOLERANCE


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_model_that_sees_images(tmp_path: Path, prefix: str) -> None:
    oracle = zoo.make(tmp_path, "mistral", "nemo")
    path = tmp_path / "config.json"
    text = json.loads(path.read_text())
    path.write_text(json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": {}}))
    zoo.edit_tensors(tmp_path, renamed("model.", prefix))
    head = "language_model.lm_head" if prefix.startswith("language") else "lm_head"
    zoo.edit_tensors(tmp_path, renamed("lm_head", head))
    towers = {"vision_tower.patch_conv.weight": torch.ones(2, 2)}
    towers |= {"model.multi_modal_projector.norm.weight": torch.ones(2)}
    zoo.edit_tensors(tmp_path, lambda tensors: {**tensors, **towers})
    assert stepwise(Driver(tmp_path), oracle) <= TOLERANCE


def test_a_text_part_that_leaves_out_what_is_usual(tmp_path: Path) -> None:
    """As in gemma-3-4b: what its config.json does not say follows from the family."""
    said = {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }  # fmt: skip
    theirs = Gemma3TextConfig(**said)
    config = HFConfig({"model_type": "gemma3", "text_config": said})
    config.defaults(**gemma3_text._USUAL)
    for name in ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim",
                 "max_position_embeddings"):  # fmt: skip
        assert config.integer(name) == getattr(theirs, name)
    for layer in (0, 5):
        kind = theirs.layer_types[layer]
        window = config.window(layer, every=6)
        assert window == (1024 if kind == "sliding_attention" else None)
    local = config.rope("sliding_attention", theta=1e4, scaled=False)
    whole = config.rope("full_attention", theta=1e6)
    for ours, kind in ((local, "sliding_attention"), (whole, "full_attention")):
        for name, value in theirs.rope_parameters[kind].items():
            assert ours.get(name) == value


def test_an_engine_of_short_contexts_takes_the_short_list_of_longrope(tmp_path: Path) -> None:
    oracle = zoo.make(tmp_path, "phi3", "128k")
    checkpoint = Checkpoint(tmp_path)
    checkpoint.config.context = 8  # as long as it was trained for
    driver = Driver(tmp_path)
    driver.model = build(checkpoint)
    ids = prompt(1, 7)
    assert worst(driver.step([(0, ids)]), reference(oracle, ids)) <= TOLERANCE


def test_dbrx_says_theta_among_the_options_of_attention(tmp_path: Path) -> None:
    oracle = zoo.make(tmp_path, "dbrx", "plain")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["attn_config"]["rope_theta"] == 5e5
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stepwise(Driver(tmp_path), oracle) <= TOLERANCE
    config["attn_config"]["rope_theta"] = 1e4
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stepwise(Driver(tmp_path), oracle) > TOLERANCE


def test_experts_in_another_form_than_the_configuration_says(tmp_path: Path) -> None:
    zoo.make(tmp_path, "gpt_oss", "plain")
    zoo.edit_config(tmp_path, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(BadCheckpoint, match="do not fit its config.json") as caught:
        build(Checkpoint(tmp_path))
    assert "missing: model.layers.0.mlp.experts.gate_up_proj_blocks" in str(caught.value.cause)


def before_five(values: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """A config.json as older versions of transformers wrote it, without what is usual."""
    rope = values.pop("rope_parameters", None) or {}
    sizes = ("hidden_size", "n_layer")  # which nobody leaves out, but Bloom's are tiny by default
    kept = {k: v for k, v in values.items() if k in sizes or k not in usual or usual[k] != v}
    whole = rope.get("full_attention", rope)
    scaling = {k: v for k, v in whole.items() if k not in ("rope_theta", "partial_rotary_factor")}
    kind = scaling.pop("rope_type", "default")
    kept |= {k: whole[k] for k in ("rope_theta", "partial_rotary_factor") if k in whole}
    if "sliding_attention" in rope:
        kept["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    if kind != "default":
        kept["rope_scaling"] = {"type": kind, **scaling}
    if values["model_type"] == "gpt_neox":
        kept["rotary_pct"] = kept.pop("partial_rotary_factor")
        kept["rotary_emb_base"] = kept.pop("rope_theta")
    return {"model_type": values["model_type"], **kept}


def test_configurations_of_older_versions(model: tuple[Path, Any], tmp_path: Path) -> None:
    """Which the hub is full of: rotations said in another way, and the usual left out."""
    folder, oracle = model
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    values = json.loads((copy / "config.json").read_text())
    old = before_five(dict(values), type(oracle.config)().to_dict())
    assert len(old) < len(values)
    (copy / "config.json").write_text(json.dumps(old))
    assert stepwise(Driver(copy), oracle) <= TOLERANCE


def test_an_unknown_architecture_is_told_its_neighbours(tmp_path: Path) -> None:
    zoo.make(tmp_path, "llama", "v2")
    zoo.edit_config(tmp_path, model_type="lama")
    with pytest.raises(Unsupported, match="'lama' is not supported") as caught:
        build(Checkpoint(tmp_path))
    assert "did you mean 'llama'?" in str(caught.value.hint)
    assert "mistral" in str(caught.value.hint)


@pytest.mark.parametrize("variant", [("gpt2", "plain"), ("phi3", "4k"), ("cohere", "plus")])
def test_a_config_that_contradicts_its_tensors(tmp_path: Path, variant: tuple[str, str]) -> None:
    zoo.make(tmp_path, *variant)
    name = "n_embd" if variant[0] == "gpt2" else "hidden_size"
    zoo.edit_config(tmp_path, **{name: 32})
    with pytest.raises(BadCheckpoint, match="do not fit its config.json") as caught:
        build(Checkpoint(tmp_path))
    assert "expected" in str(caught.value.cause)


def test_the_first_five_of_the_missing_and_the_surplus_are_named(tmp_path: Path) -> None:
    zoo.make(tmp_path, "opt", "125m")

    def change(tensors: Tensors) -> Tensors:
        return {k.replace("fc2", "fc3"): t for k, t in tensors.items()}

    zoo.edit_tensors(tmp_path, change)
    with pytest.raises(BadCheckpoint) as caught:
        build(Checkpoint(tmp_path))
    cause = str(caught.value.cause)
    assert "missing: model.decoder.layers.0.fc2.weight" in cause
    assert "not part of this architecture: model.decoder.layers.0.fc3.bias" in cause


@pytest.mark.parametrize(
    "changes", [{"qk_ln": True}, {"alibi": False}, {"attn_type": "multiquery_attention"}]
)
def test_options_of_mpt_that_would_be_answered_wrongly(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    zoo.make(tmp_path, "mpt", "7b")
    zoo.edit_config(tmp_path, attn_config=changes)
    with pytest.raises(Unsupported, match=next(iter(changes))):
        build(Checkpoint(tmp_path))


def test_kernels_say_which_latents_they_do_not_take() -> None:
    cuda = torch.device("cuda")
    spec = AttentionSpec(0, 16, 1, 576, 0.1, latent=512)
    assert triton.Attention.reject(spec, cuda) is None
    for change in ({"head_dim": 1088, "latent": 1024}, {"head_dim": 768}):
        reason = triton.Attention.reject(replace(spec, **change), cuda)
        assert "too wide" in str(reason)
    assert "sees all keys" in str(triton.Attention.reject(replace(spec, window=8), cuda))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("smollm3", {"no_rope_layers": [1]}),
        ("smollm3", {"no_rope_layers": "all"}),
        ("qwen3_moe", {"mlp_only_layers": 1}),
        ("deepseek_v3", {"first_k_dense_replace": "three"}),
        ("deepseek_v3", {"first_k_dense_replace": -1}),
        ("mixtral", {"sliding_window": "wide"}),
        ("olmo", {"clip_qkv": [8]}),
        ("mpt", {"attn_config": "alibi"}),
        ("olmo3", {"layer_types": ["full_attention"]}),
        ("llama4_text", {"moe_layers": 0}),
    ],
)
def test_values_that_are_no_such_thing(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    zoo.make(tmp_path, family, next(iter(zoo.VARIANTS[family])))
    zoo.edit_config(tmp_path, **changes)
    with pytest.raises(BadCheckpoint, match=f"'{next(iter(changes))}' must be"):
        build(Checkpoint(tmp_path))


def test_an_empty_list_of_layers_without_positions_says_nothing(tmp_path: Path) -> None:
    """As in the files of Llama 4."""
    oracle = zoo.make(
        tmp_path, "llama4_text", "scout", no_rope_layers=None, no_rope_layer_interval=2
    )
    zoo.edit_config(tmp_path, no_rope_layers=[], moe_layers=None)
    assert stepwise(Driver(tmp_path), oracle) <= TOLERANCE


def test_an_unknown_activation(tmp_path: Path) -> None:
    zoo.make(tmp_path, "gpt2", "plain")
    zoo.edit_config(tmp_path, activation_function="mish")
    with pytest.raises(Unsupported, match="'mish'"):
        build(Checkpoint(tmp_path))


def test_dummy_weights_of_every_family(model: tuple[Path, Any], tmp_path: Path) -> None:
    """What the configuration says is enough to know every tensor that files would hold."""
    folder, _ = model
    shutil.copy(folder / "config.json", tmp_path)
    dummy = build(Checkpoint(tmp_path, load_format="dummy"))
    stored = load_file(folder / "model.safetensors").values()
    assert dummy.parameter_bytes >= sum(tensor.numel() * 4 for tensor in stored)


AUTHORS = {
    "mamba": {"d_state": 8, "dt_rank": 6},
    "mamba2": {"layer": "Mamba2", "d_state": 16, "headdim": 16, "ngroups": 2},
}


@pytest.mark.parametrize("family", AUTHORS)
def test_mamba_in_the_format_of_its_authors(tmp_path: Path, family: str) -> None:
    oracle = zoo.make(tmp_path, family, "plain", tie_word_embeddings=True, intermediate_size=128)
    config = {
        "d_model": 64, "n_layer": 2, "vocab_size": 123, "pad_vocab_size_multiple": 8,
        "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
        "ssm_cfg": AUTHORS[family],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))

    def as_theirs(tensors: Tensors) -> Tensors:
        tensors = renamed("embeddings", "embedding")(tensors)
        return {**tensors, "lm_head.weight": tensors["backbone.embedding.weight"].clone()}

    zoo.edit_tensors(tmp_path, as_theirs)
    assert architecture(config) == family
    assert stepwise(Driver(tmp_path), oracle) <= TOLERANCE
    for beside in ({"rms_norm": False}, {"attn_layer_idx": [1]}, {"d_intermediate": 96}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **beside}))
        with pytest.raises(Unsupported, match=next(iter(beside))):
            build(Checkpoint(tmp_path))


def test_a_kind_of_layer_that_granite_does_not_have(tmp_path: Path) -> None:
    oracle = zoo.make(tmp_path, "granitemoehybrid", "dense")
    config = json.loads((tmp_path / "config.json").read_text())
    config["layer_types"] = ["mamba", "attention", "mamba"]  # in the words of its first files
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stepwise(Driver(tmp_path), oracle) <= TOLERANCE
    config["layer_types"] = ["mamba", "conv", "mamba"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="a layer of the kind 'conv'"):
        build(Checkpoint(tmp_path))


@pytest.mark.parametrize("family", ["mamba", "mamba2", "granitemoehybrid"])
def test_states_are_counted_from_headers_as_an_engine_keeps_them(
    tmp_path: Path, family: str
) -> None:
    for variant in zoo.VARIANTS[family]:
        folder = tmp_path / variant
        zoo.make(folder, family, variant)
        facts, model = examine(folder), Driver(folder).model
        assert facts.state_bytes(2) == bytes_per_sequence(model.states, torch.bfloat16) > 0
        block = bytes_per_block(model.specs, 16, torch.bfloat16)
        assert (facts.kv_values or 0) * 2 * 16 == block
        tight = 2 * facts.stored_bytes + 2 * facts.state_bytes(4) + 4 * 2 * block
        plan = facts.fit(free_bytes=tight, on_cpu=False, itemsize=4)
        assert plan.state_bytes == facts.state_bytes(4)
        with pytest.raises(Unsupported, match="state of a sequence"):
            facts.fit(free_bytes=facts.stored_bytes + 99, on_cpu=False, itemsize=4)
