"""Reading checkpoints: exact slices, and a clear refusal of every damaged or foreign file."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file

from kvrun.errors import BadCheckpoint, KvrunError, NotFound, Unsupported
from kvrun.runtime.checkpoint import Checkpoint, Shard
from kvrun.runtime.models import build
from kvrun.runtime.parallel import Group

CONFIG = {
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"model.embed_tokens": (24, 8), "lm_head": (24, 8), "model.norm": (8,)}
    for n in range(2):
        p = f"model.layers.{n}"
        shapes |= {
            f"{p}.self_attn.q_proj": (8, 8),
            f"{p}.self_attn.k_proj": (4, 8),
            f"{p}.self_attn.v_proj": (4, 8),
            f"{p}.self_attn.o_proj": (8, 8),
            f"{p}.mlp.gate_proj": (12, 8),
            f"{p}.mlp.up_proj": (12, 8),
            f"{p}.mlp.down_proj": (8, 12),
            f"{p}.input_layernorm": (8,),
            f"{p}.post_attention_layernorm": (8,),
        }
    return {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}


def write(folder: Path, values: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(tensors() if values is None else values, folder / "model.safetensors")
    return folder


def write_shards(folder: Path, count: int = 3) -> Path:
    """The same model in shards with an index."""
    write(folder)
    values = tensors()
    (folder / "model.safetensors").unlink()
    where = {name: f"model-{i % count + 1:05}.safetensors" for i, name in enumerate(values)}
    for file in set(where.values()):
        save_file({n: values[n] for n, f in where.items() if f == file}, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load(folder: Path, **options: Any) -> None:
    build(Checkpoint(folder, **options))


# -- what is read


@pytest.mark.parametrize("writer", [write, write_shards])
def test_tensors_are_read_in_the_dtype_asked_for(
    tmp_path: Path, writer: Callable[[Path], Path]
) -> None:
    w = Checkpoint(writer(tmp_path / "m"), dtype=torch.bfloat16)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(w.read(name, (8, 12)), tensors()[name].bfloat16())
    assert torch.equal(w.read(name, (8, 12), dtype=torch.float32), tensors()[name])
    w.close()


@pytest.mark.parametrize("writer", [write, write_shards])
def test_a_model_is_read_completely(tmp_path: Path, writer: Callable[[Path], Path]) -> None:
    decoder = build(Checkpoint(writer(tmp_path / "m")))
    assert decoder.parameter_bytes == sum(t.nbytes for t in tensors().values())
    assert (decoder.vocab_size, decoder.max_position, len(decoder.specs)) == (24, 64, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_stored_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write(tmp_path / "m", {n: t.to(dtype) for n, t in tensors().items()})
    w = Checkpoint(folder)
    name = "model.norm.weight"
    assert torch.equal(w.read(name, (8,)), tensors()[name].to(dtype).float())
    w.close()
    load(folder)


RANGES = [None, ((0, 6),), ((2, 3), (5, 6)), ((4, 6), (0, 3)), ((3, 3),)]


@pytest.mark.parametrize("rows", RANGES)
@pytest.mark.parametrize("cols", RANGES)
@pytest.mark.parametrize("piece", [1 << 24, 50])
def test_a_shard_is_exactly_its_rows_and_columns(
    tmp_path: Path, rows: Any, cols: Any, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvrun.runtime.source._PIECE", piece)
    values = {"a.weight": torch.randn(6, 6), "a.bias": torch.randn(6)}
    w = Checkpoint(write(tmp_path / "m", values))
    shard = Shard("a", 6, 6, rows, cols)
    wanted, bias = values["a.weight"], values["a.bias"]
    if rows is not None:
        wanted = torch.cat([wanted[a:b] for a, b in rows])
        bias = torch.cat([bias[a:b] for a, b in rows])
    if cols is not None:
        wanted = torch.cat([wanted[:, a:b] for a, b in cols], 1)
    assert shard.shape == tuple(wanted.shape)
    assert torch.equal(w.matrix(shard), wanted)
    assert torch.equal(w.vector(shard), bias)
    w.close()


@pytest.mark.parametrize("rows", RANGES)
@pytest.mark.parametrize("cols", RANGES)
def test_a_transposed_shard_is_the_same_part(tmp_path: Path, rows: Any, cols: Any) -> None:
    matrix = torch.randn(12, 12)
    write(tmp_path, {"a.weight": matrix, "b.weight": matrix.t().contiguous()})
    w = Checkpoint(tmp_path)
    plain = w.matrix(Shard("a", 12, 12, rows, cols))
    turned = w.matrix(Shard("b", 12, 12, rows, cols, transposed=True))
    w.close()
    assert torch.equal(turned, plain)


def test_a_transposed_shard_states_the_stored_shape(tmp_path: Path) -> None:
    write(tmp_path, {"a.weight": torch.randn(4, 6)})
    w = Checkpoint(tmp_path)
    with pytest.raises(BadCheckpoint, match="do not fit") as caught:
        w.matrix(Shard("a", 4, 6, transposed=True))
    assert "a.weight is [4, 6], expected [6, 4]" in str(caught.value.cause)
    w.close()


def test_names_that_are_stored_under_another_prefix(tmp_path: Path) -> None:
    value = torch.randn(3)
    write(tmp_path, {"text.model.a.weight": value, "tower.b": value.clone()})
    w = Checkpoint(tmp_path)
    w.rename("model.", "text.model.")
    assert w.has("model.a.weight", otherwise=False)
    assert torch.equal(w.read("model.a.weight", (3,)), value)
    with pytest.raises(BadCheckpoint, match="do not fit"):
        w.finish()
    w.skip("tower.")
    w.finish()
    w.close()


def test_only_the_kept_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"a.weight": torch.randn(64, 32)}
    w = Checkpoint(write(tmp_path / "m", values))
    seen = []
    read_into = "kvrun.runtime.tensorfile.TensorFile.read_into"
    monkeypatch.setattr(read_into, lambda self, start, buffer: seen.append(len(buffer)))
    w.matrix(Shard("a", 64, 32, rows=((8, 16),)))
    assert seen == [8 * 32 * 4]
    w.close()


def test_nan_is_read_as_it_is(tmp_path: Path) -> None:
    values = tensors()
    values["model.norm.weight"][3] = float("nan")
    load(write(tmp_path / "m", values))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.2.mlp.gate_proj.weight",  # beyond num_hidden_layers
        "transformer.h.0.attn.bias",
        "gpt_neox.layers.0.attention.bias",
        "gpt_neox.layers.0.attention.masked_bias",
    ],
)
def test_what_old_files_carry_is_passed_over(tmp_path: Path, name: str) -> None:
    load(write(tmp_path / "m", {**tensors(), name: torch.zeros(4)}))


def test_a_head_of_its_own_counts_even_if_the_config_says_tied(tmp_path: Path) -> None:
    decoder = build(Checkpoint(write(tmp_path / "m", tie_word_embeddings=True)))
    assert decoder.parameter_bytes == sum(t.nbytes for t in tensors().values())


def test_a_missing_head_means_tied_unless_the_config_denies_it(tmp_path: Path) -> None:
    values = tensors()
    del values["lm_head.weight"]
    load(write(tmp_path / "a", values))
    load(write(tmp_path / "b", values, tie_word_embeddings=True))
    with pytest.raises(BadCheckpoint, match=r"lm_head\.weight"):
        load(write(tmp_path / "c", values, tie_word_embeddings=False))


# -- D6: malformed files


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(
    dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any
) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}


EIGHT = bytes(8)
MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "shorter than a length": b"\x01\x00\x00",
    "header length of zero": raw(b""),
    "header longer than the file": raw(one(), EIGHT, length=5000),
    "header of 2^63 bytes": raw(one(), EIGHT, length=2**63),
    "header of 2^64 - 1 bytes": raw(one(), EIGHT, length=2**64 - 1),
    "header cut short": raw(one(), EIGHT, length=20),
    "header not JSON": raw(b"{nonsense}", EIGHT),
    "header not UTF-8": raw(b'{"\xff\xfe": 1}', EIGHT),
    "header a list": raw([1, 2], EIGHT),
    "header a number": raw(b"12345678", EIGHT),
    "header nested 100,000 deep": raw(b'{"a":' + b"[" * 100_000),
    "header a number of 5,000 digits": raw(b'{"a":' + b"9" * 5000 + b"}"),
    "an HTML page": b"<!DOCTYPE html><html><body>Not found</body></html>",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "the same name twice": raw(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        EIGHT,
    ),
    "the same key twice": raw(
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', EIGHT
    ),
    "a name that is a path": raw({"../../a": one()["a"]}, EIGHT),
    "a name with a control character": raw({"a\u0000b": one()["a"]}, EIGHT),
    "an empty name": raw({"": one()["a"]}, EIGHT),
    "an entry that is a list": raw({"a": [1, 2]}, EIGHT),
    "an entry without dtype": raw({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT),
    "an entry with more than it should": raw(one(extra=1), EIGHT),
    "an unknown dtype": raw(one(dtype="F13"), EIGHT),
    "a dtype that is a list": raw(one(dtype=["F32"]), EIGHT),
    "a negative dimension": raw(one(shape=[-2]), EIGHT),
    "a fractional dimension": raw(one(shape=[2.0]), EIGHT),
    "a boolean dimension": raw(one(shape=[True, 2]), EIGHT),
    "a shape that is a string": raw(one(shape="2"), EIGHT),
    "dimensions whose product overflows": raw(one(shape=[2**62, 2**62]), EIGHT),
    "a shape that needs more bytes": raw(one(shape=[3]), EIGHT),
    "offsets that run backwards": raw(one(offsets=[8, 0]), EIGHT),
    "negative offsets": raw(one(offsets=[-8, 0]), EIGHT),
    "one offset": raw(one(offsets=[0]), EIGHT),
    "offsets beyond the file": raw(one(offsets=[800, 808]), EIGHT),
    "truncated data": raw(one(), bytes(4)),
    "bytes after the last tensor": raw(one(), bytes(12)),
    "a hole between tensors": raw(
        {**one(), "b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}}, bytes(16)
    ),
    "overlapping tensors": raw(
        {**one(), "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)
    ),
    "two tensors in one place": raw({**one(), "b": one()["a"]}, EIGHT),
    "100,001 tensors": raw(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_001)}
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_D6_malformed_file(tmp_path: Path, case: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    path = tmp_path / "model.safetensors"
    path.write_bytes(MALFORMED[case])
    with pytest.raises(BadCheckpoint) as caught:
        load(tmp_path)
    assert str(path) in caught.value.what
    assert caught.value.cause
    assert len(str(caught.value)) < 1000


def test_D6_a_huge_header_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 150_000_000))
    os.truncate(path, 200_000_000)  # a hole: takes no space
    with pytest.raises(BadCheckpoint) as caught:
        load(tmp_path)
    assert "the limit is" in caught.value.cause


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_D6_any_damage_is_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    folder = write(tmp_path / "m")
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        load(folder)
    except KvrunError as error:
        assert error.what  # noqa: PT017 - nothing else may escape


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{", b'{"weight_map": 3}', b'{"weight_map": {}}', b"\xff\xfe\xff",
        b'{"weight_map": {"a": "../../etc/passwd"}}', b'{"weight_map": {"a": "/etc/passwd"}}',
        b'{"weight_map": {"a": ".."}}', b"[" * 100_000,
    ],
)  # fmt: skip
def test_D6_malformed_index(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(BadCheckpoint, match=r"index\.json"):
        load(tmp_path)


def test_D6_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors cannot be read"):
        load(tmp_path)


# -- D7: the wrong tensors


def test_D7_missing_shard(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m")
    (folder / "model-00002.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match="1 of 3 shards") as caught:
        load(folder)
    assert "model-00002.safetensors" in caught.value.cause


def test_D7_tensor_in_the_index_but_in_no_shard(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost.weight"] = "model-00001.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(BadCheckpoint) as caught:
        load(folder)
    assert "model.ghost.weight" in caught.value.cause


def test_D7_missing_tensors_the_first_five_named(tmp_path: Path) -> None:
    values = {n: t for n, t in tensors().items() if "layers.1" not in n}
    with pytest.raises(BadCheckpoint) as caught:
        load(write(tmp_path / "m", values))
    assert caught.value.cause.count("model.layers.1.") == 5
    assert "and 4 more" in caught.value.cause
    assert "missing" in caught.value.cause


def test_D7_extra_tensors_the_first_five_named(tmp_path: Path) -> None:
    extra = {f"model.extra{i}.bias": torch.zeros(2) for i in range(7)}
    with pytest.raises(BadCheckpoint) as caught:
        load(write(tmp_path / "m", {**tensors(), **extra}))
    assert caught.value.cause.count("model.extra") == 5
    assert "and 2 more" in caught.value.cause


@pytest.mark.parametrize("name", ["model.layers.0.c_attn.bias", "model.layers.0.mlp.up_proj.bias"])
def test_D7_a_forgotten_bias_is_an_extra_tensor(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadCheckpoint, match="not part of this architecture"):
        load(write(tmp_path / "m", {**tensors(), name: torch.zeros(2)}))


def test_D7_wrong_shape(tmp_path: Path) -> None:
    values = tensors()
    values["model.layers.0.mlp.up_proj.weight"] = torch.zeros(8, 12)
    with pytest.raises(BadCheckpoint) as caught:
        load(write(tmp_path / "m", values))
    assert "up_proj.weight is [8, 12], expected [12, 8]" in caught.value.cause


def test_D7_wrong_dtype(tmp_path: Path) -> None:
    values = tensors()
    values["lm_head.weight"] = torch.zeros(24, 8, dtype=torch.int32)
    with pytest.raises(BadCheckpoint) as caught:
        load(write(tmp_path / "m", values))
    assert "lm_head.weight is stored as I32" in caught.value.cause


def test_D7_the_config_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint) as caught:
        load(write(tmp_path / "m", hidden_size=16))
    assert "expected [24, 16]" in caught.value.cause


def test_heads_must_be_shared_evenly(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="3 attention heads cannot share 2"):
        load(write(tmp_path / "m", num_attention_heads=3, num_key_value_heads=2, head_dim=4))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 10**12}, {"vocab_size": 10**15}, {"intermediate_size": 10**12},
        {"head_dim": 10**12}, {"num_hidden_layers": 10**9}, {"num_attention_heads": 10**9},
        {"num_key_value_heads": 10**9},
    ],
)  # fmt: skip
def test_D7_absurd_sizes_take_no_memory(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(KvrunError):
        load(write(tmp_path / "m", **change))


# -- D8: a file that changes after it was read


@pytest.mark.parametrize("damage", ["truncate", "overwrite", "unlink"])
def test_D8_the_file_may_change_once_it_is_read(tmp_path: Path, damage: str) -> None:
    folder = write(tmp_path / "m")
    w = Checkpoint(folder)
    held = w.read("lm_head.weight", (24, 8))
    path = folder / "model.safetensors"
    if damage == "truncate":
        os.truncate(path, 0)
    elif damage == "overwrite":
        path.write_bytes(b"\xff" * path.stat().st_size)
    else:
        path.unlink()
    assert torch.equal(held, tensors()["lm_head.weight"])
    w.close()


def test_D8_truncated_while_it_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    w = Checkpoint(folder)
    os.truncate(folder / "model.safetensors", 2000)
    with pytest.raises(BadCheckpoint, match="not a valid safetensors file"):
        build(w)


# -- what kvrun does not read


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(NotFound, match="no weights"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "model.gguf"])
def test_other_formats_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(Unsupported, match=str(tmp_path)):
        load(tmp_path)


def test_unknown_architecture_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(Unsupported) as caught:
        load(write(tmp_path / "m", model_type="made_up"))
    assert "made_up" in caught.value.what
    for family in ("llama", "qwen3", "gemma2"):
        assert family in caught.value.hint


def test_unknown_quantization_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="'quip'"):
        load(write(tmp_path / "m", quantization_config={"quant_method": "quip", "bits": 4}))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "quick_gelu"},
        {"rope_scaling": {"rope_type": "proportional"}},
    ],
)
def test_unknown_options_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(Unsupported):
        load(write(tmp_path / "m", **change))


# -- dummy weights


def dummy(folder: Path, **options: Any) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return Checkpoint(folder, load_format="dummy", **options)


def test_dummy_needs_only_a_config(tmp_path: Path) -> None:
    decoder = build(dummy(tmp_path, dtype=torch.bfloat16))
    matrices = sum(t.numel() for t in tensors().values() if t.ndim == 2)
    norms = sum(t.numel() for t in tensors().values() if t.ndim == 1)
    assert decoder.parameter_bytes == 2 * matrices + 4 * norms


def test_dummy_is_seeded_and_of_sensible_size(tmp_path: Path) -> None:
    first, again = dummy(tmp_path), dummy(tmp_path)
    other = dummy(tmp_path, seed=1)
    name, shape = "model.layers.0.mlp.up_proj.weight", (400, 100)
    a, b, c = (w.read(name, shape) for w in (first, again, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not torch.equal(a, first.read("model.layers.0.mlp.gate_proj.weight", shape))
    assert 0.08 < a.std() < 0.12  # 1 / sqrt(100)
    assert 0.9 < first.read("model.norm.weight", (100,)).mean() < 1.1


def test_dummy_cuts_have_the_shape_of_the_cut(tmp_path: Path) -> None:
    w = dummy(tmp_path, group=Group(1, 2))
    assert w.matrix(Shard("a", 8, 6, rows=((4, 8),), cols=((0, 3),))).shape == (4, 3)


def test_files_are_what_safetensors_reads(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    w = Checkpoint(folder)
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(w.read(name, tuple(tensor.shape)), tensor)
    w.close()
