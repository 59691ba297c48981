"""ChatTemplate: messages -> the text a model was trained on, by its folder's Jinja template."""

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from kvrun.errors import BadCheckpoint, InvalidRequest
from kvrun.runtime.text.marks import mark

REASONING = ("reasoning_content", "thinking", "reasoning")
CONTINUE = mark("continue")


class Generation(Extension):
    """{% generation %} marks what an assistant wrote, for training; here it only passes through."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class PublicNamespace(Namespace):
    """A template's namespace(), which may not pose as another class by its attributes."""

    def __init__(self, /, *args: Any, **attributes: Any) -> None:
        for name in dict(*args, **attributes):
            _refuse_private(name)
        super().__init__(*args, **attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


class ChatTemplate:
    """A compiled template. Its output equals that of transformers' apply_chat_template.

    Templates come with the model and are not trusted: sandboxed, no imports, no attributes that
    begin with an underscore. `variables` are the special tokens by name ("bos_token": "<s>").
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        """Raises BadCheckpoint for a template that is not valid Jinja."""
        self._source = source
        self._variables = dict(variables)
        self._environment = _environment()
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateError as error:
            line = getattr(error, "lineno", None)
            where = f" (line {line})" if line else ""
            raise BadCheckpoint(
                "the model's chat template cannot be read.", cause=f"{error}{where}"
            ) from error

    @cached_property
    def literals(self) -> str:
        """Every text that the template itself writes or compares, separated by NUL."""
        tree = self._environment.parse(self._source)
        texts = [node.data for node in tree.find_all(nodes.TemplateData)]
        constants = [node.value for node in tree.find_all(nodes.Const)]
        return "\0".join(texts + [text for text in constants if isinstance(text, str)])

    def render(self, messages: Sequence[Mapping[str, Any]], continue_final: bool) -> str:
        """The conversation as text, open at its end for the model to go on.

        With `continue_final` the last message stays open, else the header of an answer follows.
        Raises InvalidRequest when the template refuses the messages.
        """
        plain = [_plain_message(message) for message in messages]
        if continue_final:
            _append(plain[-1], CONTINUE + " ")
        try:
            text = self._template.render(
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=not continue_final,
                **self._variables,
            )
        except Exception as error:
            raise InvalidRequest(
                "the model's chat template refuses this conversation.", cause=str(error)
            ) from error
        return _cut(text) if continue_final else text


def check_messages(messages: object) -> list[Mapping[str, Any]]:
    """`messages` if they are what a template takes. Raises InvalidRequest."""
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidRequest("A chat needs a list of at least one message.")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequest(
                f"message {number} is no message.",
                hint='a message is {"role": "user", "content": "..."}',
            )
        if not isinstance(message.get("content"), str | list | tuple | None):
            raise InvalidRequest(f"the content of message {number} is neither text nor a list.")
    return list(messages)


def _refuse_private(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold '{name}'")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = PublicNamespace
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of plain types without None, its reasoning under every name that templates use."""
    plain = {key: _plain(value) for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in REASONING if plain.get(key) is not None), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _plain(value: Any) -> Any:
    """Plain JSON types only: methods of other objects would be open to the template."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise InvalidRequest(f"A message holds a {type(value).__name__}; it must be plain JSON.")


def _append(message: dict[str, Any], text: str) -> None:
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + text
        return
    for part in reversed(content or []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            part["text"] += text
            return
    raise InvalidRequest("the last message has no text that the model could continue.")


def _cut(text: str) -> str:
    at = text.rfind(CONTINUE)
    if at < 0:
        raise InvalidRequest("the model's chat template does not show the message to continue.")
    # A template that trims its messages has taken the space behind the mark, and would have taken
    # the spaces in front of it.
    trimmed = not text.startswith(" ", at + len(CONTINUE))
    return text[:at].rstrip() if trimmed else text[:at]
