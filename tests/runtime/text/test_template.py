"""Chat templates: the same ids as transformers' apply_chat_template; refusals with a reason."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from kvrun.errors import BadCheckpoint, InvalidRequest
from kvrun.runtime.text import Text

MakeFolder = Callable[..., Path]
Message = dict[str, Any]

HEADERS = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\n\n' }}
    {%- set text = message['content'] | trim %}
    {%- if loop.last and not add_generation_prompt %}{{ text }}{% else %}{{ text + '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n\n' }}{% endif %}
"""  # noqa: E501
BLOCKS = """{% if messages[0].role != 'system' %}
<|system|>
You are a tide.<|end|>
{% endif %}
{% for message in messages %}
    {% if message.role == 'assistant' %}
<|assistant|>
{% generation %}{{ message.content }}<|end|>{% endgeneration %}

    {% else %}
<|{{ message.role }}|>
{{ message.content }}<|end|>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""
INST = """{{ bos_token }}{% set ns = namespace(system='') %}{% for message in messages %}
{% if message['role'] == 'system' %}{% set ns.system = message['content'] + '\n\n' %}{% continue %}{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + ns.system + message['content'] + ' [/INST]' }}{% set ns.system = '' %}
{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}
{% else %}{{ raise_exception('roles must be user and assistant, not ' + message['role']) }}{% endif %}
{% endfor %}"""  # noqa: E501
JSON_TOOLS = """{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}
{%- if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>{% endif %}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call | tojson }}</tool_call>{{ call.arguments | tojson(indent=2) }}{% endfor %}
{%- if tools %}never{% endif %}{{ strftime_now('%Y')[:2] }}{{ pad_token }}{% endfor %}"""  # noqa: E501
TEMPLATES = {"headers": HEADERS, "blocks": BLOCKS, "inst": INST, "json": JSON_TOOLS}

CONVERSATIONS: dict[str, list[Message]] = {
    "one": [{"role": "user", "content": "hello world"}],
    "system": [
        {"role": "system", "content": "Be   brief."},
        {"role": "user", "content": "  why do tides happen?\n"},
    ],
    "turns": [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hello, <b>you</b> & me\n"},
        {"role": "user", "content": "naïve 雪 😀 <x> covid  <table> {{ 7 * 7 }} {% raw %}"},
    ],
    "calls": [
        {"role": "user", "content": "the moon?", "name": None},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "let me <look>",
            "tool_calls": [{"name": "look", "arguments": {"é": [1, 2.5, None, True], "q": "<a>"}}],
        },
        {"role": "tool", "content": '{"ok": true}'},
    ],
}


def oracle(folder: Path, messages: list[Message], **options: Any) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    return list(ids)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_equal_transformers(
    make_folder: MakeFolder, kind: str, template: str, conversation: str
) -> None:
    messages = CONVERSATIONS[conversation]
    if (template, conversation) in {("headers", "calls"), ("blocks", "calls"), ("inst", "calls")}:
        messages = messages[:1]
    folder = make_folder(kind, TEMPLATES[template])
    ids = Text(folder).chat(messages)
    assert ids == oracle(folder, messages, add_generation_prompt=True)
    assert len(ids) > 5


@pytest.mark.parametrize("template", ["headers", "blocks", "inst"])
@pytest.mark.parametrize("ending", ["The tide is", "The tide is ", "\n The tide  "])
def test_continuing_equals_transformers(
    make_folder: MakeFolder, template: str, ending: str
) -> None:
    folder = make_folder("byte_level", TEMPLATES[template])
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": ending},
    ]
    ids = Text(folder).chat(messages, continue_final=True)
    assert ids == oracle(folder, messages, continue_final_message=True)
    assert Text(folder).decode(ids).endswith(ending.strip() if template == "headers" else ending)


def test_keys_that_are_none_are_not_there(make_folder: MakeFolder) -> None:
    template = (
        "{% for m in messages %}{{ m.name is defined }}{{ m.content is defined }}{% endfor %}"
    )
    folder = make_folder("byte_level", template)
    messages = [{"role": "user", "content": None, "name": "x"}, {"role": "user", "name": None}]
    text = Text(folder)
    assert text.decode(text.chat(messages)) == "TrueFalseFalseFalse"
    assert text.chat(messages) == oracle(folder, messages)


def test_parts_of_a_content(make_folder: MakeFolder) -> None:
    template = (
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}|{% endfor %}{% endfor %}"
    )
    folder = make_folder("byte_level", template)
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "moon"}]
    messages = [{"role": "user", "content": parts}]
    text = Text(folder)
    assert text.decode(text.chat(messages)) == "hello|moon|"
    assert text.decode(text.chat(messages, continue_final=True)) == "hello|moon"
    assert parts[1]["text"] == "moon"


@pytest.mark.parametrize(
    ("settings", "jinja", "expected"),
    [
        ({"chat_template": "config"}, None, "config"),
        ({"chat_template": "config"}, "file", "file"),
        ({"chat_template": [{"name": "default", "template": "listed"},
                            {"name": "tool_use", "template": "tools"}]}, None, "listed"),
        ({"chat_template": {"default": "named"}}, None, "named"),
    ],
)  # fmt: skip
def test_where_a_template_comes_from(
    make_folder: MakeFolder, settings: dict[str, Any], jinja: str | None, expected: str
) -> None:
    text = Text(make_folder("byte_level", jinja, tokenizer_config=settings))
    assert text.chat_template_known
    assert text.decode(text.chat([{"role": "user", "content": "x"}])) == expected


@pytest.mark.parametrize("settings", [{}, {"chat_template": [{"name": "rag", "template": "x"}]}])
def test_without_a_template_chat_is_refused(
    make_folder: MakeFolder, settings: dict[str, Any]
) -> None:
    text = Text(make_folder("byte_level", tokenizer_config=settings))
    assert not text.chat_template_known
    with pytest.raises(InvalidRequest, match="no chat template") as refused:
        text.chat([{"role": "user", "content": "x"}])
    assert "raw prompt" in refused.value.hint


def test_a_template_refuses_with_its_own_words(make_folder: MakeFolder) -> None:
    text = Text(make_folder("byte_level", INST))
    with pytest.raises(InvalidRequest) as refused:
        text.chat([{"role": "tool", "content": "x"}])
    assert "roles must be user and assistant, not tool" in refused.value.cause


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0].nope.nope }}", "{{ 1 / 0 }}", "{{ messages.append(1) }}",
     "{{ ''.__class__.__mro__ }}", "{{ namespace.__init__.__globals__ }}",
     "{% set ns = namespace() %}{% set ns.__class__ = dict %}",
     "{{ namespace(__class__=dict) }}", "{% include 'config.json' %}",
     "{{ messages | tojson(indent=messages) }}", "{% for i in range(10**9) %}{% endfor %}"],
)  # fmt: skip
def test_a_template_that_fails_or_reaches_out_is_refused(
    make_folder: MakeFolder, template: str
) -> None:
    with pytest.raises(InvalidRequest, match="chat template refuses"):
        Text(make_folder("byte_level", template)).chat([{"role": "user", "content": "x"}])


def test_a_template_that_is_no_jinja(make_folder: MakeFolder) -> None:
    text = Text(make_folder("byte_level", "one\n{% for %}"))
    with pytest.raises(BadCheckpoint, match="chat template") as refused:
        text.chat([{"role": "user", "content": "x"}])
    assert "line 2" in refused.value.cause


@pytest.mark.parametrize(
    "messages",
    [[], "hello", None, [{"content": "x"}], [{"role": 1, "content": "x"}], ["hello"],
     [{"role": "user", "content": 5}], [{"role": "user", "content": "x", "at": {1}}]],
    ids=str,
)  # fmt: skip
def test_what_is_no_conversation(make_folder: MakeFolder, messages: Any) -> None:
    with pytest.raises(InvalidRequest):
        Text(make_folder("byte_level", HEADERS)).chat(messages)


@pytest.mark.parametrize(
    "last", [{"role": "assistant"}, {"role": "assistant", "content": [{"type": "image"}]}]
)
def test_nothing_to_continue(make_folder: MakeFolder, last: Message) -> None:
    text = Text(make_folder("byte_level", JSON_TOOLS))
    with pytest.raises(InvalidRequest, match="continue"):
        text.chat([{"role": "user", "content": "x"}, last], continue_final=True)


def test_a_template_that_hides_the_message_to_continue(make_folder: MakeFolder) -> None:
    text = Text(make_folder("byte_level", "nothing"))
    with pytest.raises(InvalidRequest, match="does not show"):
        text.chat([{"role": "user", "content": "x"}], continue_final=True)
