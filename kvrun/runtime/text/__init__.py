"""Text: the strings of one model: chat template, encode, incremental decode, stop strings."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer

from kvrun.errors import BadCheckpoint, InvalidRequest, NotFound
from kvrun.runtime.sampling.params import SamplingParams
from kvrun.runtime.text.answer import Answer
from kvrun.runtime.text.images import (
    NO_EYES,
    Images,
    Picture,
    Prompt,
    dialog_of,
    images_of,
    taken_out,
    with_files,
)
from kvrun.runtime.text.inert import Inert
from kvrun.runtime.text.stream import TextStream
from kvrun.runtime.text.template import ChatTemplate, check_messages

__all__ = ["Answer", "Prompt", "Text", "TextStream"]

DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Text:
    """The tokenizer and the chat template of a model folder.

    Read from tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja,
    generation_config.json and config.json; only the first is needed. Safe to use from threads.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises NotFound without a tokenizer.json and BadCheckpoint for files that are damaged."""
        self.folder = Path(folder)
        self._settings = _read_json(self.folder / "tokenizer_config.json")
        self._tokenizer = _read_tokenizer(self.folder / "tokenizer.json")
        self._named = _named_tokens(self.folder, self._settings)
        _add_missing(self._tokenizer, self._settings, self._named)
        self._template_source = _template_source(self.folder, self._settings)
        dialog = None if self._template_source else dialog_of(self.folder, self._tokenizer)
        self._turn_end = None if dialog is None else dialog[1]  # ends an answer too
        if dialog is not None:
            self._template_source = dialog[0]
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._byte_ids = _byte_ids(self._tokenizer)

    @classmethod
    def open(cls, folder: str | Path) -> "Text | None":
        """The Text of a folder, or None when it has no tokenizer.json (prompts must be ids)."""
        return cls(folder) if (Path(folder) / "tokenizer.json").is_file() else None

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a raw prompt, with the special tokens that the tokenizer adds itself.

        Special tokens written in the prompt count as such. Raises InvalidRequest for text that is
        not valid Unicode or that the tokenizer fails on.
        """
        return _encode(self._tokenizer, prompt, add_special_tokens=True)

    def encode_with(self, prompt: str | Sequence[int], pictures: Sequence[Picture]) -> Prompt:
        """A raw prompt in which the model's own word, as <image>, stands for each of these
        pictures; in token ids a token for each feature. Raises as `encode` and `Images.look`."""
        images = self._seeing.look(pictures) if pictures else []
        if not isinstance(prompt, str):
            return Prompt(list(prompt), images)
        text = self._seeing.expand(prompt, images) if pictures else prompt
        return Prompt(self.encode(text), images)

    def spans(self, prompt: str) -> list[tuple[int, int, int]]:
        """Token ids of a raw prompt, each with its place in the prompt's UTF-8: (id, start, end).

        Special tokens that the tokenizer adds have none: 0, 0.
        """
        encoding = _encoding(self._tokenizer, prompt, add_special_tokens=True)
        at = [0, *accumulate(len(char.encode()) for char in prompt)]
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        return [(token, at[start], at[end]) for token, (start, end) in pairs]

    def added(self, prompt: str) -> list[bool]:
        """Of each token id of a raw prompt, whether the tokenizer has added it."""
        encoding = _encoding(self._tokenizer, prompt, add_special_tokens=True)
        return [bool(flag) for flag in encoding.special_tokens_mask]

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, continue_final: bool = False
    ) -> list[int]:
        """Token ids of a conversation, up to where the model's answer begins.

        With `continue_final` the last message is left open for the model to continue. Text in the
        messages that looks like a control token is encoded as ordinary text. Raises InvalidRequest
        when there is no template, or when it refuses the messages.
        """
        found = self.converse(messages, continue_final=continue_final)
        if found.images:
            raise InvalidRequest("images have no place in a conversation of text.")
        return found.ids

    def converse(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        continue_final: bool = False,
        local: bool = False,
    ) -> Prompt:
        """`chat` whose messages may hold parts {"type": "image", "image": a file's bytes}.

        With `local` what shows an image may also be a path on this machine, or as OpenAI has it.
        Raises InvalidRequest for images that the model does not take, too, and NotFound.
        """
        checked = check_messages(messages)
        plain, files = taken_out(with_files(checked) if local else checked, local=local)
        images = self._seeing.look(files) if files else []
        template = self._template
        if self.images is not None and self._wants_parts:
            plain = [_in_parts(message) for message in plain]
        with _tokenizing():
            marked = self._inert.mark(plain)
        rendered = template.render(plain if marked is None else marked, continue_final)
        if self.images is not None:
            # Words in messages that look like an image's have marks, or there are none.
            rendered = self.images.expand(rendered, images)
        if marked is None:
            return Prompt(_encode(self._tokenizer, rendered), images)
        return Prompt(self._inert.encode(rendered, _encode), images)

    @cached_property
    def images(self) -> Images | None:
        """The images of this model's prompts; None where it sees nothing."""
        return images_of(self.folder, self._tokenizer)

    @property
    def _seeing(self) -> Images:
        if self.images is None:
            raise InvalidRequest(NO_EYES)
        return self.images

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template passes over content that is text and no list of parts."""
        probe = {"role": "user", "content": "probe"}
        try:
            return "probe" not in self._template.render([probe], False)
        except InvalidRequest:
            return True

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids; ids outside the vocabulary have none."""
        known = [token for token in ids if token >= 0]
        return str(self._tokenizer.decode(known, skip_special_tokens=skip_special))

    def stream(
        self, stop: Sequence[str] = (), include_stop: bool = False, skip_special: bool = True
    ) -> TextStream:
        """An incremental decoder of one answer that ends at the first of the `stop` strings."""
        return TextStream(
            self._tokenizer,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            include_stop=include_stop,
            skipped_ids=self._special_ids if skip_special else (),
            byte_ids=self._byte_ids,
        )

    def answer(self, stop: Sequence[str] = ()) -> Answer:
        """What keeps the text and the count of one answer; see Answer."""
        return Answer(self.stream(stop=stop))

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of control tokens: they are no part of a text."""
        return self._special_ids

    @property
    def named_tokens(self) -> dict[str, str]:
        """The special tokens by their roles: {"eos_token": "</s>"}."""
        return dict(self._named)

    @property
    def chat_template_known(self) -> bool:
        """Whether the folder has a chat template; `chat` needs one."""
        return self._template_source is not None

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text: of generation_config.json, else config.json; and the
        tokenizer's own."""
        generation = _read_json(self.folder / "generation_config.json")
        config = _read_json(self.folder / "config.json")
        text_config = config.get("text_config")
        inner = text_config.get("eos_token_id") if isinstance(text_config, dict) else None
        given = generation.get("eos_token_id", config.get("eos_token_id", inner))
        ids = given if isinstance(given, list) else [given]
        ids = [token for token in ids if isinstance(token, int) and not isinstance(token, bool)]
        if "eos_token" in self._named:
            ids.append(self._tokenizer.token_to_id(self._named["eos_token"]))
        if self._turn_end:
            ids.append(self._tokenizer.token_to_id(self._turn_end))
        return tuple(dict.fromkeys(token for token in ids if token is not None and token >= 0))

    @cached_property
    def generation_defaults(self) -> dict[str, float | int]:
        """Sampling options of generation_config.json; temperature 0 where it asks for greedy.

        Values that SamplingParams would refuse are left out.
        """
        generation = _read_json(self.folder / "generation_config.json")
        defaults: dict[str, float | int] = {}
        for name in DEFAULTS:
            value = generation.get(name)
            try:
                if value is not None:
                    defaults[name] = getattr(SamplingParams(**{name: value}), name)
            except InvalidRequest:
                continue
        if generation.get("do_sample") is False:
            defaults["temperature"] = 0.0
        return defaults

    @cached_property
    def _template(self) -> ChatTemplate:
        if self._template_source is None:
            raise InvalidRequest(
                "the model has no chat template.",
                cause=f"neither chat_template.jinja nor tokenizer_config.json of {self.folder}",
                hint="give it a raw prompt to continue, or use the chat version of the model",
            )
        return ChatTemplate(self._template_source, self._named)

    @cached_property
    def _inert(self) -> Inert:
        return Inert(self._tokenizer, self._template.literals)


def _in_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


@contextmanager
def _tokenizing() -> Iterator[None]:
    """Turn whatever a tokenizer dies of into InvalidRequest.

    Its panics are BaseExceptions, and would end a thread that only guards against Exception.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InvalidRequest("the tokenizer fails on this text.", cause=str(error)) from error


def _encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool = False) -> list[int]:
    return list(_encoding(tokenizer, text, add_special_tokens).ids)


def _encoding(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> Encoding:
    if not isinstance(text, str):
        raise InvalidRequest(f"the prompt is a {type(text).__name__}; it must be text.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            "the text is not valid Unicode.",
            cause=f"a lone surrogate at character {error.start + 1}",
        ) from error
    with _tokenizing():
        # Unlike encode, encode_batch lets other threads run meanwhile.
        batch = tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
    return batch[0]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise BadCheckpoint(f"{path} cannot be read.", cause=str(error)) from error
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path} cannot be read.", cause="it is no JSON object")
    return value


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise NotFound(
            f"{path.parent} has no tokenizer.json.",
            hint="kvrun reads no other tokenizer format; prompts of token ids work without one",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BadCheckpoint(f"{path} cannot be read.", cause=str(error)) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _named_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as a chat template sees them."""
    sources: list[Mapping[str, Any]] = [settings]
    if "added_tokens_decoder" not in settings:  # older folders name the tokens in a file apart
        sources.append(_read_json(folder / "special_tokens_map.json"))
    entries: dict[str, Any] = {}
    for source in sources:
        extra = source.get("extra_special_tokens")
        entries |= {**source, **(extra if isinstance(extra, dict) else {})}
    texts = {
        name: token.get("content") if isinstance(token, dict) else token
        for name, token in entries.items()
        if name.endswith("_token")
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _add_missing(
    tokenizer: Tokenizer, settings: Mapping[str, Any], named: Mapping[str, str]
) -> None:
    """Make tokens special that only tokenizer_config.json calls so."""
    added = {t.content: t for t in tokenizer.get_added_tokens_decoder().values()}
    listed = settings.get("added_tokens_decoder")
    for entry in listed.values() if isinstance(listed, dict) else ():
        text = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(text, str) or tokenizer.token_to_id(text) is None:
            continue
        token = AddedToken(text, **{flag: bool(entry.get(flag)) for flag in TOKEN_FLAGS})
        old = added.get(text)
        if old is None or any(getattr(old, f) != getattr(token, f) for f in TOKEN_FLAGS):
            tokenizer.add_tokens([token])
            added[text] = token
    for text in dict.fromkeys(named.values()):
        known = text in added and added[text].special
        if not known and tokenizer.token_to_id(text) is not None:
            tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def _template_source(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadCheckpoint(f"{path} cannot be read.", cause=str(error)) from error
    # Of models that see, the template of the whole goes before that of its tokenizer.
    given = _read_json(folder / "chat_template.json").get("chat_template")
    given = given or settings.get("chat_template")
    if isinstance(given, list):
        named = [entry for entry in given if isinstance(entry, dict)]
        given = {entry.get("name"): entry.get("template") for entry in named}
    if isinstance(given, dict):
        given = given.get("default")
    return given if isinstance(given, str) else None


def _byte_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens <0x00> to <0xFF> of a decoder that joins them to characters."""
    if tokenizer.decoder is None or tokenizer.decoder.decode(["<0x41>"]) != "A":
        return frozenset()
    ids = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token for token in ids if token is not None)
