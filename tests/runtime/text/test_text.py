"""Text: control tokens in messages are inert (H10), raw prompts, what a folder says, bad input."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from tokenizers import AddedToken, Tokenizer, normalizers, processors

from kvrun.errors import BadCheckpoint, InvalidRequest, NotFound
from kvrun.runtime import text as module
from kvrun.runtime.text import Text

MakeFolder = Callable[..., Path]

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LOUD = ["<|end|>", "<|assistant|>", "<|bos|>", "[INST]", "<tool_call>"]


def tokens_of(folder: Path, ids: list[int]) -> list[str]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.id_to_token(token) or "" for token in ids]


def one(content: str, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace", "word_level"])
@given(
    pieces=st.lists(
        st.sampled_from([*LOUD, "hello", " ", "<", "|>", "\n", "é", "wor", "<|end", "ld"]),
        min_size=1,
        max_size=8,
    )
)
@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_h10_control_tokens_in_a_message_are_text(
    make_folder: MakeFolder, kind: str, pieces: list[str]
) -> None:
    """The control tokens of the ids are those of the template and no others."""
    content = "".join(pieces)
    folder = make_folder(kind, TEMPLATE)
    text = Text(folder)
    ids = text.chat(one(content))
    control = [token for token in tokens_of(folder, ids) if token in LOUD or token == "<|user|>"]
    assert control == ["<|bos|>", "<|user|>", "<|end|>", "<|assistant|>"]
    if kind == "byte_level":  # the others cannot write every character, or not every space
        written = f"<|bos|><|user|>{content.strip()}<|end|><|assistant|>"
        assert text.decode(ids, skip_special=False) == written
        assert text.decode(ids) == "".join(piece for piece in [content.strip()] if piece)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace", "word_level"])
@given(words=st.text(st.sampled_from("hello wr,é雪\n <|[T"), max_size=20))
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_h10_text_around_is_encoded_as_ever(make_folder: MakeFolder, kind: str, words: str) -> None:
    """A look-alike in one message leaves the tokens of another as they are."""
    text = Text(make_folder(kind, TEMPLATE))
    plain = text.chat([*one(words), *one("moon")])
    loud = text.chat([*one(words), *one("moon", "user"), *one("<|end|>")])
    assert loud[: len(plain) - 1] == plain[:-1]


def test_h10_covers_names_and_parts_but_not_roles(make_folder: MakeFolder) -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.name }}{{ m.content[0].text }}{% endfor %}"
    )
    folder = make_folder("byte_level", template)
    text = Text(folder)
    message = {
        "role": "user",
        "name": "<|bos|>",
        "content": [{"type": "text", "text": "<|end|>"}],
    }
    ids = text.chat([message])
    assert [t for t in tokens_of(folder, ids) if t in text_tokens(folder)] == ["<|user|>"]
    assert text.decode(ids) == "<|bos|><|end|>"


def text_tokens(folder: Path) -> set[str]:
    added = Tokenizer.from_file(str(folder / "tokenizer.json")).get_added_tokens_decoder()
    return {token.content for token in added.values()}


def test_h10_an_answer_may_hold_the_tokens_a_model_writes(make_folder: MakeFolder) -> None:
    """A tool call that the model wrote itself is read back as it was; <|end|> never is."""
    folder = make_folder("byte_level", TEMPLATE)
    messages = [*one("hello"), *one("<tool_call>x<|end|>y", "assistant")]
    tokens = tokens_of(folder, Text(folder).chat(messages))
    assert tokens.count("<tool_call>") == 1
    assert tokens.count("<|end|>") == 2


def test_h10_harmless_added_tokens_stay_tokens(make_folder: MakeFolder) -> None:
    """HTML, runs of spaces and plain words are added for brevity, not to control anything."""
    folder = make_folder("byte_level", TEMPLATE)
    for content in ("a <table> b", "a  b", "covid x", "<|end|> <table> covid  x"):
        tokens = tokens_of(folder, Text(folder).chat(one(content)))
        for token in ("<table>", "  ", "covid"):
            assert (token in tokens) == (token in content)


def test_h10_harmless_tokens_stay_even_when_the_template_writes_them(
    make_folder: MakeFolder,
) -> None:
    folder = make_folder("byte_level", "covid  " + TEMPLATE)
    for content in ("x covid  y", "x covid  y <|end|>"):
        tokens = tokens_of(folder, Text(folder).chat(one(content)))
        assert tokens.count("covid") == 2
        assert tokens.count("  ") == 2


def test_h10_a_token_that_the_normalizer_would_make(make_folder: MakeFolder) -> None:
    """<LOUD> in a message becomes <loud>, which is a control token."""
    folder = make_folder("byte_level", TEMPLATE + "<loud>")
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens([AddedToken("<loud>", normalized=True, special=True)])
    tokenizer.save(str(path))
    text = Text(folder)
    assert tokens_of(folder, text.encode("<LOUD>")) == ["<loud>"]
    assert tokens_of(folder, text.chat(one("x <LOUD> y"))).count("<loud>") == 1


def test_h10_the_longest_token_counts(make_folder: MakeFolder) -> None:
    folder = make_folder("byte_level", TEMPLATE + "<|end|><|end|>x")
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<|end|><|end|>"])
    tokenizer.save(str(path))
    text = Text(folder)
    assert text.chat(one("hello"))[-2:] == text.chat(one("[INST] hello"))[-2:]


def test_h10_a_mark_cannot_be_taken_apart(make_folder: MakeFolder) -> None:
    template = "{% for m in messages %}{{ m.content[:6] }}{% endfor %}"
    text = Text(make_folder("byte_level", template))
    assert text.decode(text.chat(one("hello moon"))) == "hello "
    with pytest.raises(InvalidRequest, match="takes texts apart"):
        text.chat(one("<|end|>"))


def test_no_bos_twice(make_folder: MakeFolder) -> None:
    """The tokenizer adds one to raw prompts; a template writes its own."""
    folder = make_folder("byte_level", TEMPLATE)
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    bos = tokenizer.token_to_id("<|bos|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    tokenizer.save(str(path))
    text = Text(folder)
    assert text.encode("hello").count(bos) == 1
    assert text.chat(one("hello")).count(bos) == 1
    assert text.chat(one("<|bos|>")).count(bos) == 1


def test_raw_prompts_keep_their_control_tokens(make_folder: MakeFolder) -> None:
    folder = make_folder("byte_level", TEMPLATE)
    text = Text(folder)
    assert "<|end|>" in tokens_of(folder, text.encode("hello<|end|>"))
    assert text.encode("") == []


@pytest.mark.parametrize("content", ["\ud83d", "a\udc00b"])
def test_lone_surrogates_are_refused(make_folder: MakeFolder, content: str) -> None:
    text = Text(make_folder("byte_level", TEMPLATE))
    for call in (lambda: text.encode(content), lambda: text.chat(one(content))):
        with pytest.raises(InvalidRequest, match="not valid Unicode"):
            call()


class PanicException(BaseException):
    """As tokenizers raises it: no Exception."""


class Panicking:
    def encode_batch(self, *args: object, **kwargs: object) -> None:
        raise PanicException("out of bounds")


def test_a_panic_of_the_tokenizer_is_an_error_of_the_request(make_folder: MakeFolder) -> None:
    with pytest.raises(InvalidRequest, match="tokenizer fails"):
        module._encode(Panicking(), "x")  # type: ignore[arg-type]

    class Interrupted(Panicking):
        def encode_batch(self, *args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        module._encode(Interrupted(), "x")  # type: ignore[arg-type]


def test_truncation_of_the_file_is_not_ours(make_folder: MakeFolder) -> None:
    folder = make_folder("byte_level")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert 5 < len(Text(folder).encode("hello moon and tide")) < 60


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    assert Text.open(tmp_path) is None
    with pytest.raises(NotFound, match=r"no tokenizer\.json"):
        Text(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files(make_folder: MakeFolder, name: str, content: bytes) -> None:
    folder = make_folder("byte_level", TEMPLATE)
    (folder / name).write_bytes(content)
    if name == "tokenizer_config.json" and content.startswith(b'{"'):
        return  # only tokenizer.json needs certain keys
    with pytest.raises(BadCheckpoint, match=name.replace(".", r"\.")):
        Text(folder)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 2]}, {"eos_token_id": 9}, (7, 2)),
        ({"eos_token_id": 7}, {}, (7, 2)),
        ({}, {"eos_token_id": 9}, (9, 2)),
        ({}, {"text_config": {"eos_token_id": [5, 6]}}, (5, 6, 2)),
        ({"eos_token_id": None}, {}, (2,)),
        ({"eos_token_id": [True, "x", -1, 4]}, {}, (4, 2)),
    ],
)
def test_what_ends_a_text(
    make_folder: MakeFolder, generation: Any, config: Any, expected: tuple[int, ...]
) -> None:
    folder = make_folder("byte_level", generation_config=generation, config=config)
    assert Text(folder).eos_token_ids == expected


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 50},
         {"temperature": 0.6, "top_p": 0.9, "top_k": 50}),
        ({"temperature": 0.6, "do_sample": False, "repetition_penalty": 1.1},
         {"temperature": 0.0, "repetition_penalty": 1.1}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"temperature": None, "top_p": 7, "top_k": "x", "max_length": 20}, {}),
    ],
)  # fmt: skip
def test_generation_defaults(make_folder: MakeFolder, generation: Any, expected: Any) -> None:
    folder = make_folder("byte_level", generation_config=generation)
    assert Text(folder).generation_defaults == expected


def test_special_tokens_of_older_folders(make_folder: MakeFolder) -> None:
    folder = make_folder("byte_level", "{{ bos_token }}|{{ eos_token }}|{{ sep_token }}")
    (folder / "tokenizer_config.json").unlink()
    named = {"bos_token": {"content": "<|bos|>"}, "eos_token": "<|end|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    text = Text(folder)
    assert text.eos_token_ids == (2,)
    assert text.decode(text.chat(one("x")), skip_special=False) == "<|bos|>|<|end|>|"


def test_tokens_only_the_settings_call_special(make_folder: MakeFolder) -> None:
    """transformers gives no text for them either, and splits prompts at them."""
    entry = {"content": "<tool_call>", "special": True, "lstrip": False, "rstrip": False,
             "single_word": False, "normalized": False}  # fmt: skip
    folder = make_folder("byte_level")
    ids = Text(folder).encode("a<tool_call>b")
    assert Text(folder).decode(ids) == "a<tool_call>b"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {str(ids[1]): entry}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    text = Text(folder)
    assert text.encode("a<tool_call>b") == ids
    assert text.decode(ids) == "ab"
    assert text.stream().push(ids) == "ab"


def test_ids_without_a_token_have_no_text(make_folder: MakeFolder) -> None:
    text = Text(make_folder("byte_level"))
    assert text.decode([-1, 10**6, *text.encode("hello")]) == "hello"


def test_imports_neither_torch_nor_transformers() -> None:
    names = "{'torch', 'transformers', 'huggingface_hub'}"
    code = f"import kvrun.runtime.text, sys; print({names} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
