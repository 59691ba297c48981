"""The panels: what each shows, what its keys do, what it says of bad input."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Input

from kvrun.chat.export import from_jsonl
from kvrun.chat.store import Store
from kvrun.runtime.sampling.params import SamplingParams
from kvrun.tui.keys import GROUPS

Show = Callable[..., Any]


async def test_the_help_holds_every_key_and_command(show: Show) -> None:
    async with show(size=(120, 100)) as screen:
        await screen.pilot.press("f1")
        await screen.sees("help", "Everywhere", "In the prompt", "On columns", "On messages")
        shown = screen.text()
        for _, bindings in GROUPS:
            for binding in bindings:
                if "jump" not in binding.id:
                    assert binding.description in shown
        assert "/set [NAME [VALUE]]" in shown
        await screen.pilot.press("escape")
        assert len(screen.app.screen_stack) == 1


def test_every_key_has_a_name_of_its_own_and_words() -> None:
    bindings = [binding for _, group in GROUPS for binding in group]
    assert all(binding.id and binding.description for binding in bindings)
    assert len({binding.id for binding in bindings}) == len(bindings)
    for _, group in GROUPS:  # no key means two things in one place
        keys = [key for binding in group for key in binding.key.split(",")]
        assert len(keys) == len(set(keys))


async def test_every_action_is_in_the_palette(show: Show) -> None:
    async with show() as screen:
        titles = {c.title for c in screen.app.get_system_commands(screen.app.screen)}
        assert {"Adapters", "Solo or batched", "Zoom", "Add column", "Theme", "Export"} <= titles
        await screen.pilot.press("ctrl+p")
        await screen.pilot.press(*"zoom", "enter")
        await screen.until(lambda: screen.app.columns.zoomed)


async def test_the_engine_shows_speed_batch_pages_and_adapters(show: Show) -> None:
    async with show("sql", size=(150, 35)) as screen:
        await screen.sees("engine (F2)", "throughput", "adapters resident")
        await screen.ask("hold")
        await screen.sees("batch ██░░░░░░ 2", "2 columns in one batch", "KV pages 3/64")
        # The page that both share, then one of each, whichever came first.
        await screen.until(lambda: "s12·" in screen.text() or "s21·" in screen.text())
        await screen.sees("s shared 1", "○ cached 1", "prefix hits 25%", "sql r8 1.4 MB 9 ms")
        await screen.pilot.press("f2")
        assert "throughput" not in screen.text()


async def test_the_engine_lies_over_the_columns_where_there_is_little_room(show: Show) -> None:
    async with show(size=(100, 30)) as screen:
        assert "throughput" not in screen.text()
        width = screen.column(1).size.width
        await screen.pilot.press("f2")
        await screen.sees("throughput")
        assert screen.column(1).size.width == width


async def test_sampling_has_a_field_for_each_option(show: Show) -> None:
    async with show("sql") as screen:
        await screen.pilot.press("f4")
        await screen.sees("sampling → column 1 (base)")
        fields = {i.id.removeprefix("option-") for i in screen.app.screen.query(Input)}
        assert fields == {o.name for o in SamplingParams.options()} - {"n", "logprobs"}
        screen.app.screen.query_one("#option-temperature", Input).value = "0.25"
        screen.app.screen.query_one("#option-stop", Input).value = '["END", "\\n\\n"]'
        await screen.pilot.press("enter")
        await screen.until(lambda: len(screen.app.screen_stack) == 1)
        first, second = (talk.chat.settings.params() for talk in screen.board.talks)
        assert (first.temperature, first.stop) == (0.25, ("END", "\n\n"))
        assert (second.temperature, second.stop) == (0.7, ())
        await screen.pilot.press("f4")  # what was set is read back as it stands
        await screen.sees("from: you")
        await screen.pilot.press("enter")
        assert screen.board.talks[0].chat.settings.params() == first


async def test_sampling_of_all_columns_and_a_value_out_of_bounds(show: Show) -> None:
    async with show("sql") as screen:
        await screen.pilot.press("f4")
        field = screen.app.screen.query_one("#option-top_p", Input)
        field.value = "1.5"
        await screen.pilot.press("enter")
        await screen.sees("top_p is 1.5; it must be a number, above 0, at most 1")
        await screen.pilot.press("f6")
        await screen.sees("sampling → all columns")
        field.value = "0.5"
        await screen.pilot.press("enter")
        await screen.until(lambda: len(screen.app.screen_stack) == 1)
        assert [t.chat.settings.params().top_p for t in screen.board.talks] == [0.5, 0.5]


async def test_compare_marks_the_words_that_differ(show: Show) -> None:
    async with show("sql") as screen:
        await screen.ask("@1 say the red fox runs")
        await screen.ask("@2 say the fox runs home")
        await screen.answered()
        await screen.pilot.press("f3")
        await screen.sees("compare: [-1 base-] {+2 sql+}", "the [-red-] fox runs {+home+}")
        await screen.sees("75% of the words agree")
        await screen.pilot.press("escape")
        assert len(screen.app.screen_stack) == 1


async def test_adapters_are_loaded_unloaded_and_scaled_while_others_stream(
    show: Show, model: Path
) -> None:
    async with show("sql") as screen:
        await screen.ask("@base hold")
        await screen.until(lambda: "half" in screen.says(1))
        await screen.pilot.press("ctrl+l")
        await screen.sees("sql  r8 · 1.4 MB · loaded in 9 ms")
        screen.app.screen.query_one(Input).value = str(model / "adapters" / "haiku")
        await screen.pilot.press("enter")
        await screen.sees("'haiku' is loaded in 9 ms")
        await screen.pilot.press("down", *"0.5", "enter")
        await screen.sees("×0.5 in 0 columns")
        await screen.pilot.press("up", *"0.5", "enter")
        await screen.sees("×0.5 in 1 columns", "column 2 ×0.5")
        await screen.pilot.press("down", "ctrl+d")
        await screen.sees("'haiku' is no longer resident")
        await screen.pilot.press("escape")
        await screen.ask("@sql who?")
        await screen.until(lambda: "I am [('sql', 0.5)]" in screen.says(2))
        screen.engine.go.set()
        await screen.answered()
        assert "half whole" in screen.says(1)


async def test_a_folder_that_is_no_adapter_and_one_that_is_in_use(
    show: Show, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    async with show("sql") as screen:
        await screen.ask("@sql hold")
        await screen.until(lambda: "half" in screen.says(2))
        await screen.pilot.press("ctrl+l")
        await screen.sees("sql  r8")
        await screen.pilot.press("ctrl+d")
        await screen.sees("a column still answers with 'sql'")
        screen.app.screen.query_one(Input).value = str(tmp_path)
        await screen.pilot.press("enter")
        await screen.sees("holds no LoRA adapter")
        screen.app.screen.query_one(Input).value = "no/such"
        await screen.pilot.press("enter")
        await screen.sees("'no/such' cannot be pulled: the network is forbidden")
        assert list(screen.engine.loaded) == ["sql"]
        screen.engine.go.set()
        await screen.pilot.press("escape")
        await screen.answered()


async def test_solo_or_batched_shows_the_ratio(show: Show) -> None:
    async with show("sql", size=(150, 40)) as screen:
        await screen.pilot.press("f7")
        await screen.until(lambda: "two columns or more" in screen.notices())
        await screen.ask("say one two three")
        await screen.answered()
        asked = len(screen.engine.requests)
        await screen.pilot.press("f7")
        await screen.sees("solo or batched: 2 questions", "in one batch", "one by one", "× as fast")
        assert len(screen.engine.requests) == asked + 6  # to warm up, together, alone
        assert {r.adapter for r in screen.engine.requests[asked:]} == {None, "sql"}
        assert len(screen.board.talks[0].conversation) == 2  # the columns stay as they were


async def test_conversations_are_saved_found_and_resumed(show: Show, store: Store) -> None:
    async with show("sql") as screen:
        await screen.ask("say tides and moons")
        await screen.answered()
        await screen.until(lambda: len(store.saved()) == 2)
        await screen.pilot.press("ctrl+n")
        await screen.until(lambda: len(screen.board.talks[0].conversation) == 0)
        await screen.ask("say something else")
        await screen.answered()
        await screen.until(lambda: len(store.saved()) == 4)
        await screen.pilot.press("f5")
        await screen.sees("say tides and moons", "say something else", "base, sql")
        await screen.pilot.press(*"moons")
        await screen.until(lambda: "something else" not in screen.text().split("conversations")[1])
        await screen.pilot.press("enter")
        await screen.until(lambda: "tides and moons" in screen.says(1))
        assert [t.label for t in screen.board.talks] == ["base", "sql"]
        await screen.ask("say more")
        await screen.answered()
        await screen.until(lambda: [s.messages for s in store.saved()][:2] == [4, 4])
        assert len(store.saved()) == 4  # it goes on in its own place


async def test_forgetting_a_conversation(show: Show, store: Store) -> None:
    async with show() as screen:
        await screen.ask("say secret")
        await screen.answered()
        await screen.until(lambda: store.saved())
        await screen.pilot.press("f5")
        await screen.sees("say secret")
        await screen.pilot.press("ctrl+d")
        await screen.sees("nothing is saved yet")
        assert store.saved() == []


async def test_export_writes_both_forms_and_never_over_a_file(show: Show, tmp_path: Path) -> None:
    async with show("sql") as screen:
        await screen.ask("say hello")
        await screen.answered()
        for suffix, place in ((".md", 0), (".jsonl", 1)):
            await screen.pilot.press("ctrl+s")
            await screen.sees("all columns as Markdown")
            screen.app.screen.query_one(Input).value = str(tmp_path / "talk")
            await screen.pilot.press(*["down"] * place, "enter")
            await screen.until(lambda suffix=suffix: (tmp_path / f"talk{suffix}").exists())
        written = (tmp_path / "talk.md").read_text()
        assert "# toy · sql" in written
        assert "**You:**\n\nsay hello\n\n**sql:**\n\nhello" in written
        back = from_jsonl((tmp_path / "talk.jsonl").read_text())
        assert [one.adapter for one in back] == ["", "sql"]
        kept = screen.board.talks[1].conversation.to_dict()
        assert back[1].conversation.to_dict() == kept
        await screen.pilot.press("ctrl+s")
        screen.app.screen.query_one(Input).value = str(tmp_path / "talk")
        await screen.pilot.press("enter")
        await screen.until(lambda: "is there already" in screen.notices())


async def test_another_model_and_one_that_is_not_there(show: Show) -> None:
    async with show("sql") as screen:
        await screen.ask("say before")
        await screen.answered()
        await screen.pilot.press("f8")
        await screen.sees("model", "tiny  built in")
        await screen.pilot.press(*"nowhere", "enter")
        await screen.until(lambda: "there is no model 'nowhere'" in screen.notices())
        assert len(screen.engines) == 1
        await screen.pilot.press("f8")
        await screen.sees("tiny  built in")
        await screen.pilot.press(*"tiny", "enter")
        await screen.until(lambda: "tiny answers from here on" in screen.says(1))
        assert screen.engines[0].closed
        await screen.ask("say after")
        await screen.answered()
        assert len(screen.engines[1].requests) == 2
        assert "before" in screen.says(1)


async def test_who_answers_in_a_column(show: Show) -> None:
    async with show("sql") as screen:
        screen.column(1).focus()
        await screen.pilot.press("m")
        await screen.sees("who answers here?")
        await screen.pilot.press("down", "enter")
        await screen.sees("1 sql", "2 sql")
        await screen.ask("@1 who?")
        await screen.until(lambda: "I am sql" in screen.says(1))


async def test_themes_are_kept(show: Show, tmp_path: Path) -> None:
    themes = tmp_path / "tui.json"
    async with show(themes=themes) as screen:
        assert screen.app.theme == "textual-dark"
        screen.app.theme = "high-contrast"
        await screen.until(themes.exists)
    async with show(themes=themes) as screen:
        assert screen.app.theme == "high-contrast"
