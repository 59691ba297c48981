"""An adapter comes from the Hub while the screen goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Input

from kvrun.errors import NotFound
from kvrun.tui import pulling
from tests.hub import server
from tests.hub.conftest import WEIGHTS
from tests.hub.conftest import cache as cache
from tests.hub.conftest import hub as hub


def offer(hub: server.Hub, model: Path) -> None:
    config = (model / "adapters" / "haiku" / "adapter_config.json").read_bytes()
    hub.add("org/haiku", {"adapter_config.json": config, "adapter_model.safetensors": WEIGHTS})


async def test_an_adapter_is_pulled_and_loaded(
    show: Callable[..., Any], model: Path, hub: server.Hub
) -> None:
    offer(hub, model)
    async with show("sql") as screen:
        await screen.pilot.press("ctrl+l")
        screen.app.screen.query_one(Input).value = "verse=org/haiku"
        await screen.pilot.press("enter")
        await screen.sees("'verse' is loaded in 9 ms")
    assert hub.gets("adapter_config.json")


async def test_what_the_hub_does_not_have_is_said(
    show: Callable[..., Any], hub: server.Hub
) -> None:
    async with show("sql") as screen:
        await screen.pilot.press("ctrl+l")
        screen.app.screen.query_one(Input).value = "org/nothing"
        await screen.pilot.press("enter")
        await screen.sees("org/nothing")
        await screen.sees("there is no")


async def test_a_folder_is_never_asked_of_the_hub(hub: server.Hub) -> None:
    assert not await pulling.pull("./folder", lambda text: None)
    assert not hub.asked


async def test_how_far_it_is_stays_true(hub: server.Hub) -> None:
    said: list[str] = []
    with pytest.raises(NotFound):
        await pulling.pull("org/none", said.append)
    assert said == ["looking for org/none ..."]
    assert await pulling.pull("org/m", said.append)
