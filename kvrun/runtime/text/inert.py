"""Inert: text of a conversation that looks like a control token is encoded as ordinary text."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from kvrun.errors import InvalidRequest
from kvrun.runtime.text.marks import SECRET, mark

# Added tokens of some models that are only a short way to write HTML.
HTML = re.compile(
    r"</?(?:a|abbr|b|blockquote|body|br|caption|center|code|dd|del|details|div|dl|dt|em|font|"
    r"h[1-6]|head|hr|html|i|img|ins|kbd|li|ol|p|pre|q|s|small|span|strike|strong|sub|summary|sup|"
    r"table|tbody|td|tfoot|th|thead|title|tr|tt|u|ul|var)/?>",
    re.IGNORECASE,
)
NOT_CONTENT = frozenset({"role", "type"})  # keys of a message whose values steer the template


class Names(NamedTuple):
    """What stands for one control token while a conversation is encoded."""

    content: str
    mark: str  # in messages: the text, written by a user
    name: str  # in the tokenizer: the token, written by the template


class Inert:
    """Encodes conversations in which somebody wrote the text of a control token.

    In the messages such text is replaced by marks, so that whatever else the rendered text holds
    was written by the template. Then the template's tokens get secret names, the marks become
    text again, and a copy of the tokenizer that knows the tokens by their secret names only
    encodes the whole. So splitting, merging and spaces are those of the ordinary way.
    """

    def __init__(self, tokenizer: Tokenizer, template_text: str) -> None:
        """`template_text`: every literal of the chat template."""
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        control = [token for token in added if _is_control(token, template_text)]
        self._names = {
            token.content: Names(token.content, mark(f"text {i}"), mark(f"token {i}"))
            for i, token in enumerate(control)
        }
        self._all = _pattern(added)
        self._control = _pattern(control)
        self._special = _pattern([token for token in control if token.special])

    def mark(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
        """The messages with marks for control tokens; None when there is nothing to mark.

        Answers may hold tokens that are not special (a model's tool call comes back as it was
        written); special ones never.
        """
        seen = False

        def replace(match: re.Match[str]) -> str:
            nonlocal seen
            seen = True
            return self._names[match[0]].mark

        def walk(value: Any, pattern: re.Pattern[str]) -> Any:
            nonlocal seen
            if isinstance(value, str):
                seen = seen or self._hidden(value, pattern)
                return pattern.sub(replace, value)
            if isinstance(value, Mapping):
                return {
                    key: item if key in NOT_CONTENT else walk(item, pattern)
                    for key, item in value.items()
                }
            if isinstance(value, list | tuple):
                return [walk(item, pattern) for item in value]
            return value

        marked = []
        for message in messages:
            pattern = self._special if message["role"] == "assistant" else self._control
            marked.append(walk(message, pattern))
        return marked if seen else None

    def encode(self, rendered: str, encode: Callable[[Tokenizer, str], list[int]]) -> list[int]:
        """Ids of a text rendered from marked messages; `encode` runs a tokenizer on a text.

        Raises InvalidRequest when the template has taken a mark apart.
        """
        rest = rendered
        for names in self._names.values():
            rest = rest.replace(names.mark, "")
        if SECRET[:4] in rest or SECRET[-4:] in rest:
            raise InvalidRequest(
                "A message holds the text of a control token where the model's chat template "
                "takes texts apart."
            )
        text = self._all.sub(self._name, rendered)
        for names in self._names.values():
            text = text.replace(names.mark, names.content)
        return [self._ids.get(token, token) for token in encode(self._renamed, text)]

    def _name(self, match: re.Match[str]) -> str:
        names = self._names.get(match[0])
        return match[0] if names is None else names.name

    def _hidden(self, text: str, pattern: re.Pattern[str]) -> bool:
        """Whether the tokenizer's normalizer makes a control token of `text`."""
        normalizer = self._tokenizer.normalizer
        return normalizer is not None and bool(pattern.search(normalizer.normalize_str(text)))

    @cached_property
    def _renamed(self) -> Tokenizer:
        renamed = {names.content: names.name for names in self._names.values()}
        raw = json.loads(self._tokenizer.to_str())
        for token in raw["added_tokens"]:
            token["content"] = renamed.get(token["content"], token["content"])
        raw.update(post_processor=None, truncation=None, padding=None)
        _rename_vocabulary(raw["model"], renamed)
        return Tokenizer.from_str(json.dumps(raw))

    @cached_property
    def _ids(self) -> dict[int, int]:
        pairs = (
            (self._renamed.token_to_id(names.name), self._tokenizer.token_to_id(names.content))
            for names in self._names.values()
        )
        return {new: old for new, old in pairs if new is not None and old is not None}


def _is_control(token: AddedToken, template_text: str) -> bool:
    """Special tokens, those the template writes, and what looks like markup but is not HTML."""
    text = token.content
    if token.special:
        return True
    if text.isspace() or text.isalnum():
        return False
    bracketed = (text[0], text[-1]) in {("<", ">"), ("[", "]")}
    return text in template_text or (bracketed and not HTML.fullmatch(text))


def _pattern(tokens: Any) -> re.Pattern[str]:
    """Matches the tokens as the tokenizer does: leftmost, then longest."""
    longest_first = sorted(tokens, key=lambda token: -len(token.content))
    parts = [
        rf"(?<!\w){re.escape(token.content)}(?!\w)"
        if token.single_word
        else re.escape(token.content)
        for token in longest_first
    ]
    return re.compile("|".join(parts) or r"(?!)")


def _rename_vocabulary(model: dict[str, Any], renamed: Mapping[str, str]) -> None:
    """Take the control tokens out of the model's reach: it could make one of ordinary text."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {renamed.get(text, text): i for text, i in vocabulary.items()}
    else:  # Unigram: [text, score] by id
        model["vocab"] = [[renamed.get(text, text), score] for text, score in vocabulary]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [
            merge
            for merge in model["merges"]
            if not renamed.keys() & {*_pair(merge), "".join(_pair(merge))}
        ]


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge
