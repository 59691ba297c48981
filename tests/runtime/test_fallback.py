"""Architectures without a family here, by transformers' own code on the paged attention."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.apertus import modeling_apertus

from kvrun import LLM, SamplingParams
from kvrun.errors import BadCheckpoint, Unsupported
from kvrun.runtime.cache.tensors import bytes_per_block
from kvrun.runtime.checkpoint import Checkpoint
from kvrun.runtime.fallback.load import build, refusal
from kvrun.runtime.layers.decoder import Decoder
from tests.runtime.driver import Driver
from tests.runtime.models import zoo
from tests.runtime.models.compare import TOLERANCE, prompt, reference, stepwise, worst

_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
_IDS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
_MOE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 0}
# What no family here has: an activation, norms of queries and keys, experts, windows by mask.
KINDS: dict[str, dict[str, Any]] = {
    "apertus": {"head_dim": 16, "tie_word_embeddings": True, **_ROPE},
    "hunyuan_v1_dense": {"head_dim": 32},
    "ernie4_5_moe": {"head_dim": 16, **_MOE},
    "vaultgemma": {
        "head_dim": 16, "sliding_window": 6, "attn_logit_softcapping": 2.0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "persimmon": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
}  # fmt: skip
Made = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    known: dict[str, tuple[Path, Any]] = {}

    def get(kind: str) -> tuple[Path, Any]:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            zoo.VARIANTS[kind] = {"plain": {**_IDS, **KINDS[kind]}}
            try:
                known[kind] = folder, zoo.make(folder, kind, "plain")
            finally:
                del zoo.VARIANTS[kind]  # families of kvrun are listed there
        return known[kind]

    return get


class Foreign(Driver):
    """The driver of native families, with a model of transformers."""

    def built(self) -> Decoder:
        return build(Checkpoint(self.folder, dtype=self.dtype), self.folder)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_packed_in_chunks_and_behind_a_shared_prefix(made: Made, kind: str) -> None:
    folder, oracle = made(kind)
    driver = Foreign(folder)
    assert stepwise(driver, oracle) <= TOLERANCE
    a, b = prompt(3, 21), prompt(4, 16)
    c = a[:8] + prompt(5, 9)
    driver.step([(2, a[:3])])
    rows = driver.step([(3, b[:6]), (2, a[3:11])])
    driver.share(2, 4, 8)
    rows += driver.step([(4, c[8:]), (2, a[11:]), (3, b[6:])])
    assert worst([rows[0], rows[4]], reference(oracle, b)) <= TOLERANCE
    assert worst([rows[1], rows[3]], reference(oracle, a)[3:]) <= TOLERANCE
    assert worst([rows[2]], reference(oracle, c)[8:]) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_of_the_engine_are_those_of_transformers(
    made: Made, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, oracle = made(kind)
    first = prompt(1, 12)
    prompts = [first, first[:8] + prompt(2, 9), prompt(3, 5), prompt(4, 20)]
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    # Nineteen blocks beside the padding: the four do not fit at once.
    memory = 20 * bytes_per_block(Foreign(folder).model.specs, 4, torch.float32)
    sizes: Any = {"block_size": 4, "max_num_batched_tokens": 8, "max_model_len": 48}
    capsys.readouterr()  # what making it may have said
    with LLM(str(folder), kv_memory=memory, max_num_seqs=4, **sizes) as llm:
        found = [list(out.token_ids) for out in llm.generate(prompts, params)]
        llm.generate(prompts[:1], params)
        again = [list(out.token_ids) for out in llm.generate(prompts[:1], params)]
        assert llm.stats().prefix_hit_tokens > 0
    said = f"{kind}: no family of kvrun; transformers' own code on kvrun's paged attention\n"
    assert capsys.readouterr().err == said
    for ids, answer in zip(prompts, found, strict=True):
        with torch.inference_mode():
            wanted = oracle.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                max_new_tokens=16, do_sample=False, eos_token_id=None,
            )[0, len(ids) :].tolist()  # fmt: skip
        assert answer == wanted
    assert again == found[:1]


def test_states_are_those_of_the_last_norm(made: Made) -> None:
    folder, oracle = made("apertus")
    driver, ids = Foreign(folder), prompt(1, 9)
    batch = driver.batch([(0, ids)])
    batch.state_rows, batch.last_rows = torch.tensor([8]), torch.tensor([], dtype=torch.int64)
    with torch.inference_mode():
        assert driver.model(batch).shape == (0, 128)
        wanted = oracle.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1:]
    assert batch.states is not None
    torch.testing.assert_close(batch.states, wanted, rtol=1e-4, atol=1e-4)


def test_bfloat16_and_random_weights(made: Made) -> None:
    folder, _ = made("vaultgemma")
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    for more in ({"dtype": "bfloat16"}, {"load_format": "dummy"}):
        options: Any = {"max_model_len": 32, "kv_memory": 1 << 20, "block_size": 4, **more}
        with LLM(str(folder), **options) as llm:
            assert len(llm.generate(prompt(1, 9), params)[0].token_ids) == 4


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"fallback": False}, "leave out --no-fallback"),
        ({"quantize": "int8"}, "weights in 'int8' need a family"),
        ({"adapters": {"a": "."}}, "adapters need a family"),
    ],
)
def test_what_needs_a_family_is_refused(
    made: Made, options: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Unsupported) as caught:
        LLM(str(made("apertus")[0]), **options)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "jamba"}, "keep a state"),
        ({"model_type": "bart"}, "reads an encoder's states"),
        ({"model_type": "gpt_neo"}, "does not go through transformers' interface"),
        ({"model_type": "llama4_text"}, "chunks"),
        ({"model_type": "unheard_of"}, "neither kvrun nor transformers"),
        ({"model_type": "apertus", "text_config": {}}, "several parts"),
        ({"model_type": "apertus", "layer_types": ["conv"]}, "layers of the kind 'conv'"),
        ({"model_type": "apertus", "attention_chunk_size": 8}, "'attention_chunk_size'"),
        ({"model_type": "apertus", "vocab_size": "many"}, "does not take this config.json"),
        ({"model_type": "apertus", "auto_map": {"AutoModel": "evil.Model"}}, None),
    ],
)
def test_what_a_configuration_tells(config: dict[str, Any], reason: str | None) -> None:
    found = refusal(config)
    assert found is None if reason is None else reason in (found or "")


def _alone(module: Any, query: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
    return query.transpose(1, 2), None


def _neighbours(forward: Any) -> Any:
    """A layer that adds the row before to each row, as a convolution would."""
    return lambda self, x, *args, **kwargs: forward(self, x + x.roll(1, 1), *args, **kwargs)


def test_a_class_that_mixes_packed_rows_is_refused(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = modeling_apertus.ApertusMLP
    monkeypatch.setattr(layer, "forward", _neighbours(layer.forward))
    with pytest.raises(Unsupported) as caught:
        Foreign(made("apertus")[0])
    assert "differ from each alone" in caught.value.cause


def test_a_class_whose_layers_do_not_call_the_function_is_refused(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    interface = modeling_apertus.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setattr(interface, "get_interface", lambda *_: _alone)
    with pytest.raises(Unsupported) as caught:
        Foreign(made("apertus")[0])
    assert "0 of 2 layers call the attention function" in caught.value.cause


def test_a_mask_of_chunks_is_refused_although_the_probe_is_shorter(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = modeling_apertus.create_causal_mask

    def chunked(*args: Any, **kwargs: Any) -> Any:
        def same(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return query // 100 == key // 100

        return real(*args, **kwargs, and_mask_function=same)

    monkeypatch.setattr(modeling_apertus, "create_causal_mask", chunked)
    with pytest.raises(Unsupported) as caught:
        Foreign(made("apertus")[0])
    assert "a mask hides other keys" in caught.value.cause


def test_a_window_that_only_the_mask_knows_is_kept(made: Made) -> None:
    windows = [spec.window for spec in Foreign(made("vaultgemma")[0]).model.specs]
    assert windows == [6, None]


def test_frequencies_that_depend_on_neighbours_bound_the_context(
    made: Made, tmp_path: Path
) -> None:
    folder, _ = made("apertus")
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8, "original_max_position_embeddings": 32, "factor": 8.0,
    }  # fmt: skip
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Foreign(tmp_path).model.max_position == 32
    w = Checkpoint(tmp_path)
    w.config.context = 64
    with pytest.raises(Unsupported) as caught:
        build(w, tmp_path)
    assert "beyond 32 tokens" in caught.value.cause


def test_weights_that_do_not_fit_are_named(made: Made, tmp_path: Path) -> None:
    folder, _ = made("hunyuan_v1_dense")
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del tensors["model.layers.0.mlp.up_proj.weight"]
        wrong = {"model.norm.weight": torch.ones(3), "odd": torch.ones(1)}
        return tensors | wrong

    zoo.edit_tensors(tmp_path, change)
    with pytest.raises(BadCheckpoint) as caught:
        Foreign(tmp_path)
    assert caught.value.cause == (
        "missing: model.layers.0.mlp.up_proj.weight; not part of this architecture: odd; "
        "of another shape: model.norm.weight"
    )
