"""Every key, by where it works; the footer, the help and the palette are made from these."""

from textual.binding import Binding


def _key(
    keys: str, action: str, what: str, id: str, *, show: bool = False, name: str = ""
) -> Binding:
    # With priority, because the prompt would take most of the function keys for itself.
    everywhere = id.startswith("app.")
    return Binding(
        keys, action, what, id=id, show=show, key_display=name or None, priority=everywhere
    )


APP = [
    _key("f1", "help", "Help", "app.help", show=True),
    _key("f2", "engine", "Engine", "app.engine", show=True),
    _key("f3", "compare", "Compare", "app.compare", show=True),
    _key("f4", "sampling", "Sampling", "app.sampling", show=True),
    _key("f5", "conversations", "Conversations", "app.conversations", show=True),
    _key("f6", "aim", "Prompt to one or all", "app.aim"),
    _key("f7", "solo", "Solo or batched", "app.solo"),
    _key("f8", "model", "Model", "app.model"),
    _key("f9", "restart", "Restart the engine", "app.restart"),
    _key("ctrl+l", "adapters", "Adapters", "app.adapters", show=True),
    _key("ctrl+n", "renew", "New conversations", "app.renew"),
    _key("ctrl+r", "again", "Answer again", "app.again"),
    _key("ctrl+s", "export", "Export", "app.export"),
    _key("ctrl+t", "change_theme", "Theme", "app.theme"),
    _key("escape", "stop", "Stop", "app.stop", show=True),
    _key("ctrl+q", "leave", "Quit", "app.quit", show=True),
]
COLUMNS = [
    _key("left_square_bracket", "step(-1)", "Column before", "column.before", name="["),
    _key("right_square_bracket", "step(1)", "Next column", "column.next", name="]"),
    *(
        _key(str(n), f"jump({n})", f"Column {n}", f"column.jump{n}", name=str(n))
        for n in range(1, 10)
    ),
    _key("z", "zoom", "Zoom", "column.zoom", show=True),
    _key("plus,equals_sign", "add", "Add column", "column.add", show=True, name="+"),
    _key("minus", "remove", "Remove column", "column.remove", show=True, name="-"),
    _key("space", "link", "Link", "column.link", show=True, name="space"),
    _key("m", "speaker", "Who answers", "column.speaker", show=True),
    _key("s", "app.sampling", "Sampling", "column.sampling"),
    _key("enter", "app.focus_prompt", "To the prompt", "column.prompt"),
]
COLUMN = [
    _key("j,down", "select(1)", "Message below", "message.below", name="j"),
    _key("k,up", "select(-1)", "Message above", "message.above", name="k"),
    _key("g,home", "first", "First message", "message.first", name="g"),
    _key("G,end", "last", "Last message", "message.last", name="G"),
    _key("e", "edit", "Edit and ask again", "message.edit", show=True),
    _key("r", "again", "Answer again", "message.again", show=True),
    _key("R", "app.again", "Answer again in all columns", "message.again_all", name="R"),
    _key("less_than_sign,comma", "branch(-1)", "Version before", "message.before", name="<"),
    _key("greater_than_sign,full_stop", "branch(1)", "Next version", "message.next", name=">"),
    _key("y", "copy", "Copy", "message.copy", show=True),
    _key("c", "copy_code", "Copy next code block", "message.code"),
    _key("i", "facts", "Facts", "message.facts"),
    _key("x", "stop", "Stop this column", "message.stop"),
]
PROMPT = [
    _key("enter", "send", "Send", "prompt.send", show=True),
    _key("ctrl+j,shift+enter,alt+enter", "newline", "New line", "prompt.newline", name="^j"),
    _key("up", "earlier", "Earlier question", "prompt.earlier"),
    _key("down", "later", "Later question", "prompt.later"),
    _key("ctrl+g", "editor", "Open $EDITOR", "prompt.editor"),
]
GROUPS = (
    ("Everywhere", APP),
    ("In the prompt", PROMPT),
    ("On columns", COLUMNS),
    ("On messages", COLUMN),
)
