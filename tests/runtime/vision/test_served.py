"""Images from the outside: LLM's chats, HTTP, and the command line, as transformers answers."""

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio
import torch

from kvrun import LLM, SamplingParams
from kvrun.chat.commands import Chat
from kvrun.chat.conversation import Conversation
from kvrun.chat.pictures import named
from kvrun.chat.repl import converse
from kvrun.chat.session import Session
from kvrun.chat.settings import Settings as ChatSettings
from kvrun.chat.shown import with_images
from kvrun.chat.store import Store
from kvrun.cli import main
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine.client import EngineClient
from kvrun.runtime.text import Text
from kvrun.server.app import create_app
from kvrun.server.service import Service
from kvrun.server.settings import Settings
from tests.chat.scripted import ScriptedEngine
from tests.chat.test_repl import Reader, Screen
from tests.runtime.vision import readers
from tests.runtime.vision.readers import picture, png

ROOT = Path(__file__).parents[3]
COUNT = 8
WORDS = "What is this?"


Folder = tuple[Path, list[str]]


def seeing(made: Path, family: str) -> Folder:
    """A model with all it needs, and what it says of three pictures."""
    processor, model = readers.make(made, family, weights=True)
    text, answers = Text(made), []
    for seed in range(3):
        words, shown = f"{WORDS}\nassistant:", picture(seed)
        if family == "idefics":
            given = processor(text=["user:", shown, words], return_tensors="pt")
        else:
            given = processor(text=[f"user: <image>{words}"], images=[shown], return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**given, max_new_tokens=COUNT, do_sample=False, eos_token_id=None)
        ids = out[0, given["input_ids"].shape[1] :].tolist()
        answers.append(text.decode(ids))
    assert len(set(answers)) == 3
    return made, answers


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Features stand in the prompt."""
    return seeing(tmp_path_factory.mktemp("placed"), "llava_next")


@pytest.fixture(scope="module")
def attended(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Features are attended to."""
    return seeing(tmp_path_factory.mktemp("attended"), "idefics")


@pytest.fixture(scope="module", params=["placed", "attended"])
def folder(request: pytest.FixtureRequest) -> Folder:
    found: Folder = request.getfixturevalue(request.param)
    return found


def test_chats_and_prompts_of_the_library(folder: Folder, tmp_path: Path) -> None:
    path = tmp_path / "1.png"
    path.write_bytes(png(1))
    greedy = SamplingParams(max_tokens=COUNT, temperature=0, ignore_eos=True)
    raw = f"user: <image>{WORDS}\nassistant:"
    with LLM(str(folder[0])) as llm:
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": shown},
                                          {"type": "text", "text": WORDS}]}]
            for shown in (png(0), str(path), picture(2))
        ]  # fmt: skip
        assert [out.text for out in llm.chat(chats, greedy)] == folder[1]
        found = llm.generate([raw, raw], greedy, images=[path, [picture(2)]])
        assert [out.text for out in found] == folder[1][1:]
        assert llm.generate(raw, greedy, images=png(0))[0].text == folder[1][0]
        streamed = "".join(d.text for d in llm.stream(raw, greedy, images=[png(0)]))
        assert streamed == folder[1][0]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def http(folder: Folder) -> AsyncIterator[httpx2.AsyncClient]:
    settings = Settings(model=str(folder[0]))
    config = EngineConfig(model=str(folder[0]), threads=1)
    service = Service(settings, config, open_text=Text.open, connect=EngineClient)
    await service.start()
    transport = httpx2.ASGITransport(app=create_app(service))
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield client
    await service.close()


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def body(shown: Any, **more: Any) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": shown}, {"type": "text", "text": WORDS}]
    return {
        "messages": [{"role": "user", "content": content}], "max_tokens": COUNT, "temperature": 0,
        "ignore_eos": True, **more,
    }  # fmt: skip


@pytest.mark.asyncio(loop_scope="module")
async def test_image_parts_over_http(http: httpx2.AsyncClient, folder: Folder) -> None:
    for seed, shown in enumerate(({"url": url(png(0)), "detail": "auto"}, url(png(1)))):
        answer = await http.post("/v1/chat/completions", json=body(shown))
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found["choices"][0]["message"]["content"] == folder[1][seed]
        few = found["usage"]["prompt_tokens"] < 70  # without those of the image
        assert few == folder[0].name.startswith("attended")
    streamed = await http.post("/v1/chat/completions", json=body({"url": url(png(2))}, stream=True))
    lines = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: {")]
    deltas = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines]
    assert "".join(deltas) == folder[1][2]
    content = [{"type": "input_image", "image_url": url(png(1))},
               {"type": "input_text", "text": WORDS}]  # fmt: skip
    asked = {"input": [{"role": "user", "content": content}], "temperature": 0,
             "max_output_tokens": COUNT, "ignore_eos": True}  # fmt: skip
    answer = await http.post("/v1/responses", json=asked)
    assert answer.json()["output"][0]["content"][0]["text"] == folder[1][1]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("shown", "why"),
    [
        ({"url": "http://127.0.0.1/a.png"}, "no URL is ever fetched"),
        ({"url": "https://example.com/a.png"}, "no URL is ever fetched"),
        ({"url": "file:///etc/hostname"}, "no URL is ever fetched"),
        ({"url": "/etc/hostname"}, "no URL is ever fetched"),
        (
            {"url": "data:image/png;base64,%%%"},
            "Message 0, part 0: an image's data: URL is not in base64",
        ),
        ({"url": url(b"no image")}, "image 1 of the request is no PNG or JPEG"),
        (None, "neither text nor an image"),
    ],
)
async def test_images_that_are_refused_over_http(
    http: httpx2.AsyncClient, shown: Any, why: str
) -> None:
    answer = await http.post("/v1/chat/completions", json=body(shown))
    assert answer.status_code == 400
    assert why in answer.json()["error"]["message"]


@pytest.mark.asyncio(loop_scope="module")
async def test_no_part_names_a_file_of_the_server(http: httpx2.AsyncClient, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(0))
    content = [{"type": "image", "image": str(path)}, {"type": "text", "text": WORDS}]
    asked = {"messages": [{"role": "user", "content": content}]}
    answer = await http.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 400
    assert "neither text nor an image" in answer.json()["error"]["message"]


def kvrun(*words: str, stdin: str = "") -> tuple[int, str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "kvrun", "chat", *words],
        env=os.environ | {"PYTHONPATH": path, "KVRUN_THREADS": "1"},
        input=stdin,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def test_kvrun_chat_shows_images(
    attended: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = attended
    path = tmp_path / "an image.png"
    path.write_bytes(png(1))
    words = ("-m", str(folder[0]), "-t", "0", "--max-tokens", str(COUNT), "-o", "ignore_eos=true",
             "--json")  # fmt: skip
    code, out, err = kvrun(*words, "--image", str(path), WORDS)
    assert code == 0, err
    assert json.loads(out)["text"] == folder[1][1]
    shown = [{"type": "image", "image": str(path)}, {"type": "text", "text": WORDS}]
    assert with_images(WORDS, WORDS, [str(path)], str(folder[0])) == shown
    typed = f"'{path}' {WORDS}"
    assert capsys.readouterr().err == ""  # what was asked for needs no word
    assert with_images(typed, typed, [], str(folder[0])) == shown
    assert capsys.readouterr().err == f"with the image {path}\n"
    # What is piped in names no files.
    assert with_images(typed, None, [], str(folder[0])) == typed
    assert with_images(typed, typed, [], "/no/model") == typed


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (("--image", "/no/such.png", "?"), 3, "no image /no/such.png"),
        (("--image", "https://x/a.png", "?"), 2, "no URL is ever fetched"),
        (("--tui", "--image", "a.png"), 2, "no image"),
        (("-m", "tiny", "--image", __file__, "?"), 2, "reads only text"),
    ],
)
def test_images_that_the_command_line_refuses(
    placed: Folder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    code: int,
    why: str,
) -> None:
    """Before any engine is started."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    monkeypatch.setattr(EngineClient, "__init__", None)
    with pytest.raises(SystemExit) as left:
        main(["chat", *(words if "-m" in words else ("-m", str(placed[0]), *words))])
    assert left.value.code == code
    assert why in capsys.readouterr().err


@pytest.mark.asyncio
async def test_questions_of_a_conversation_show_the_images_they_name(
    placed: Folder, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(1))
    screen = Screen()
    config = EngineConfig(model=str(placed[0]))
    made = Session("x", config, open_text=Text.open, connect=ScriptedEngine)  # type: ignore
    async with made as session:
        await session.ready()
        store = Store(tmp_path / "store")
        chat = Chat(session, ChatSettings({"max_tokens": 2}), store, Conversation())
        lines = (f"{path} What?", "And now?", f"/system see {path}")
        await converse(chat, Reader(*lines), screen)
        engine: Any = session.client
    assert f"with the image {path}" in screen.notes
    assert chat.conversation.system == f"see {path}"
    assert [len(request.images) for request in engine.requests] == [1, 1]  # shown again
    assert engine.requests[0].prompt_ids.count(readers.WORD) > 16


def test_a_conversation_keeps_the_images_of_its_questions() -> None:
    said = Conversation()
    said.add("user", "What is this?", images=["/a.png"])
    said.add("assistant", "A cat.")
    said.add("user", "And its colour?")
    restored = Conversation.from_dict(json.loads(json.dumps(said.to_dict())))
    assert restored.prompt() == [
        {"role": "user", "content": [{"type": "image", "image": "/a.png"},
                                     {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "And its colour?"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "text", "found"),
    [
        ("what is {0}/a.png ?", "what is ?", ["a.png"]),
        ("{0}/a.png {0}/b.JPG compare", "compare", ["a.png", "b.JPG"]),
        ("'{0}/a b.png' here", "here", ["a b.png"]),
        (r"{0}/a\ b.png, here", ", here", ["a b.png"]),
        ("no {0}/missing.png", "no {0}/missing.png", []),
        ("read {0}/notes.txt", "read {0}/notes.txt", []),
        ("a.png alone is a word", "a.png alone is a word", []),
        ("http://x{0}/a.png", "http://x{0}/a.png", []),
    ],
)
def test_paths_in_what_is_typed(tmp_path: Path, words: str, text: str, found: list[str]) -> None:
    for name in ("a.png", "b.JPG", "a b.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    expected = text.format(tmp_path), [str(tmp_path / name) for name in found]
    assert named(words.format(tmp_path)) == expected
