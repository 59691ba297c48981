"""Toy tokenizers of the two great kinds, and model folders around them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "[INST]"]
CORPUS = [
    "hello world, how are you today? the tide is caused by the moon.",
    "system user assistant end bos pad tool call think table 0123456789",
    "naïve café é — “quoted” text",
] * 3


def byte_level() -> Tokenizer:
    """Like GPT-2 and Llama 3: characters beyond ASCII lie in several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=340,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    for text in ("<tool_call>", "<table>", "  ", "covid"):
        tokenizer.add_tokens([AddedToken(text, special=False, normalized=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Like Llama 2: a word begins with ▁, unknown characters are tokens <0xXX>."""
    pieces = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz<>|[]/_INST,.:"]
    merges = [
        ("▁", "h"),
        ("h", "e"),
        ("l", "l"),
        ("ll", "o"),
        ("he", "llo"),
        ("▁", "w"),
        ("o", "r"),
    ]
    pieces += ["".join(pair) for pair in merges]
    pieces.append("")  # decodes to nothing, yet keeps the next word from being the first
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(
        vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in [*SPECIAL, "<unk>"]])
    return tokenizer


def metaspace() -> Tokenizer:
    """A Unigram model with Metaspace; its control tokens are pieces of the vocabulary."""
    pieces = [(token, 0.0) for token in [*SPECIAL, "<unk>"]]
    pieces += [("▁", -2.0), *((char, -3.0) for char in "abcdefghijklmnopqrstuvwxyz<>|[]/_INST,.:é")]
    pieces += [("▁hello", -4.0), ("▁wor", -4.0), ("ld", -4.0), ("▁the", -4.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=len(SPECIAL)))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    return tokenizer


def word_level() -> Tokenizer:
    """Whole words, its control tokens words like others; knows no decoder."""
    words = [*SPECIAL, "<unk>", "hello", "world", "!"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    return tokenizer


TOYS = {f.__name__: f for f in (byte_level, byte_fallback, metaspace, word_level)}
MakeFolder = Callable[..., Path]


@pytest.fixture(scope="session")
def toys() -> dict[str, Tokenizer]:
    return {name: make() for name, make in TOYS.items()}


@pytest.fixture
def make_folder(toys: dict[str, Tokenizer], tmp_path: Path) -> MakeFolder:
    """make_folder(kind, template, **files): a model folder; a file is a value for JSON."""

    def make(kind: str = "byte_level", template: str | None = None, **files: Any) -> Path:
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        toys[kind].save(str(folder / "tokenizer.json"))
        named = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
        settings = {**named, "tokenizer_class": "PreTrainedTokenizerFast"}
        settings |= files.pop("tokenizer_config", {})
        for name, value in {"tokenizer_config": settings, **files}.items():
            (folder / f"{name}.json").write_text(json.dumps(value))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return make
