"""config.json: both forms of everything, and a clear refusal of what is damaged."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvrun.errors import BadCheckpoint, NotFound, Unsupported
from kvrun.runtime.hf_config import HFConfig


def config(**values: Any) -> HFConfig:
    return HFConfig({"model_type": "llama", "num_hidden_layers": 2, **values})


def test_no_folder_and_no_file(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(NotFound, match=r"no config\.json"):
            HFConfig.read(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"llama"', b"\xff\xfe\x00", b"[" * 100_000, b"{}",
     b'{"model_type": 3}', b'{"model_type": null}'],
)  # fmt: skip
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BadCheckpoint, match=r"config\.json"):
        HFConfig.read(tmp_path)


def test_values_of_text_config_come_first(tmp_path: Path) -> None:
    values = {"model_type": "outer", "x": 1, "y": 2, "text_config": {"model_type": "in", "x": 3}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    c = HFConfig.read(tmp_path)
    assert (c.model_type, c.x, c.y) == ("in", 3, 2)


def test_a_missing_value_is_named() -> None:
    with pytest.raises(BadCheckpoint, match="'hidden_size'"):
        _ = config().hidden_size
    assert not hasattr(config(), "_private")


def test_null_counts_as_absent() -> None:
    c = config(head_dim=None)
    assert c.integer("head_dim", 7) == 7
    with pytest.raises(BadCheckpoint, match="'head_dim'"):
        c.integer("head_dim")


@pytest.mark.parametrize(
    ("getter", "value"),
    [("integer", 0), ("integer", -3), ("integer", 2.5), ("integer", "8"), ("integer", True),
     ("number", "1e-5"), ("number", True), ("number", [1]), ("number", 1e400), ("flag", 1),
     ("flag", "true"), ("text", 3)],
)  # fmt: skip
def test_getters_check(getter: str, value: Any) -> None:
    with pytest.raises(BadCheckpoint, match="'x'") as caught:
        getattr(config(x=value), getter)("x")
    assert caught.value.cause


def test_optional_tells_null_from_absent() -> None:
    assert config(cap=None).optional("cap", 30.0) is None
    assert config().optional("cap", 30.0) == 30.0
    assert config(cap=5).optional("cap", 30.0) == 5.0


def test_refuse() -> None:
    config(x=False).refuse("x", True)
    with pytest.raises(Unsupported, match="'x'"):
        config(x=True).refuse("x", True)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [({"dtype": "bfloat16"}, "bfloat16"), ({"torch_dtype": "float16"}, "float16"),
     ({"torch_dtype": "torch.float32"}, "float32"), ({}, None)],
)  # fmt: skip
def test_dtype_under_both_names(values: dict[str, Any], dtype: str | None) -> None:
    assert config(**values).dtype == dtype


def test_quant_method() -> None:
    assert config().quant_method is None
    assert config(quantization_config={"quant_method": "awq"}).quant_method == "awq"
    for damaged in ({}, "awq", {"quant_method": 4}):
        with pytest.raises(BadCheckpoint, match="quantization_config"):
            _ = config(quantization_config=damaged).quant_method


def test_layer_types() -> None:
    assert config().layer_types(["a", "b"]) == ["a", "b"]
    assert config(layer_types=["c", "d"]).layer_types(["a", "b"]) == ["c", "d"]
    for damaged in (["c"], "cd", [1, 2]):
        with pytest.raises(BadCheckpoint, match="layer_types"):
            config(layer_types=damaged).layer_types(["a", "b"])


SCALED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OLD = {"rope_theta": 5e5, "max_position_embeddings": 64, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    "values",
    [
        {**OLD, "rope_scaling": {"type": "llama3", **SCALED}},
        {**OLD, "rope_scaling": {"rope_type": "llama3", **SCALED}},
        {**OLD, "rope_parameters": {"rope_type": "llama3", **SCALED}},
        {
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 5e5, "partial_rotary_factor": 0.5, **SCALED,
            },
        },
    ],
)  # fmt: skip
def test_rope_in_every_form(values: dict[str, Any]) -> None:
    rope = config(**values).rope()
    assert rope.text("rope_type") == "llama3"
    assert rope.number("rope_theta") == 5e5
    assert rope.number("factor") == 8.0
    assert rope.number("partial_rotary_factor") == 0.5
    assert rope.integer("original_max_position_embeddings") == 64


def test_rope_defaults() -> None:
    for values in ({}, {"rope_scaling": None}, {"rope_parameters": None}):
        rope = config(**values).rope()
        assert (rope.text("rope_type"), rope.number("rope_theta")) == ("default", 10000.0)


def test_rope_nested_by_layer_type() -> None:
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    c = config(rope_parameters=nested)
    assert c.rope("full_attention").number("rope_theta") == 1e6
    assert c.rope("sliding_attention").text("rope_type") == "default"


def test_rope_must_be_an_object() -> None:
    with pytest.raises(BadCheckpoint, match="rope_parameters"):
        config(rope_scaling="linear").rope()
    with pytest.raises(BadCheckpoint, match="'factor'"):
        config(rope_scaling={"rope_type": "linear"}).rope().number("factor")


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("n_embd", "hidden_size"), ("d_model", "hidden_size"), ("n_layer", "num_hidden_layers"),
        ("n_heads", "num_attention_heads"), ("n_positions", "max_position_embeddings"),
        ("num_local_experts", "num_experts"), ("n_head_kv", "num_kv_heads"),
    ],
)  # fmt: skip
def test_other_names_of_the_same(said: str, name: str) -> None:
    for values, found in (({}, 6), ({name: 7}, 7), ({name: None}, 6)):
        assert HFConfig({"model_type": "x", said: 6, **values}).integer(name) == found


def test_what_is_usual_counts_where_nothing_is_said() -> None:
    found = config(a=1, b=None, window=None, n_embd=8)
    found.defaults(a=2, b=3, c=4, hidden_size=16)
    assert [found.get(name) for name in ("a", "b", "c", "hidden_size")] == [1, 3, 4, 8]
    assert found.optional("window", 5) is None  # a null that was not spoken of stays one


def test_windows_of_layers() -> None:
    every = config(num_hidden_layers=4, sliding_window=9)
    assert [every.window(n, every=2) for n in range(4)] == [9, None, 9, None]
    assert [every.window(n) for n in range(4)] == [9] * 4
    named = config(
        num_hidden_layers=2, sliding_window=9, layer_types=["full_attention", "sliding_attention"]
    )
    assert [named.window(n, every=2) for n in range(2)] == [None, 9]
    assert config(num_hidden_layers=1).window(0, size=7) == 7
    assert config(num_hidden_layers=1, sliding_window=None).window(0) is None


def test_parts_and_lists() -> None:
    found = config(part={"a": 2}, few=[1, 0], wrong=[1, "x"], zero=0)
    assert found.part("part").integer("a") == 2
    assert found.part("none").get("a") is None
    assert found.indices("few", [], 2) == [1, 0]
    assert found.indices("none", [3]) == [3]
    for name, least in (("few", 3), ("wrong", 0), ("zero", 0)):
        with pytest.raises(BadCheckpoint, match=f"'{name}' must be a list"):
            found.indices(name, [], least)
    with pytest.raises(BadCheckpoint, match="'few' must be an object"):
        found.part("few")
    assert found.count("zero") == 0
    assert found.integer_or_none("none") is None
    with pytest.raises(BadCheckpoint, match="'zero' must be a whole number of at least 1"):
        found.integer_or_none("zero")


def test_rotations_of_layers_without_scaling_of_their_own() -> None:
    old = config(rope_theta=1e6, rope_scaling={"rope_type": "linear", "factor": 8.0})
    local = old.rope("sliding_attention", theta=1e4, scaled=False)
    assert (local.text("rope_type"), local.number("rope_theta")) == ("default", 1e4)
    whole = old.rope("full_attention", theta=5.0)
    assert (whole.text("rope_type"), whole.number("rope_theta")) == ("linear", 1e6)
    nested = config(rope_parameters={"sliding_attention": {"rope_theta": 7.0}})
    assert nested.rope("sliding_attention", theta=1e4, scaled=False).number("rope_theta") == 7.0
    assert config().rope(theta=9.0, partial=0.5).number("partial_rotary_factor") == 0.5
