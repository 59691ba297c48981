"""Help as plain text with groups: Rich would cost a third of the time `kvrun --help` may take."""

from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

OTHER = "Other"


class Command(TyperCommand):
    """A command whose options are listed by their `rich_help_panel`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section per group, in the order of declaration."""
        _write_groups(ctx, formatter, self.get_params(ctx))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the epilog with its line breaks kept."""
        _write_epilog(formatter, self.epilog)


class Group(TyperGroup):
    """The list of commands, by their `rich_help_panel`, then the options of kvrun itself."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section per group of commands, then the options."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                panel = getattr(command, "rich_help_panel", None)
                label = panel if isinstance(panel, str) else OTHER
                panels.setdefault(label, []).append((name, command.get_short_help_str(100)))
        _write_sections(formatter, panels)
        _write_groups(ctx, formatter, self.get_params(ctx))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the epilog with its paragraphs kept."""
        _write_epilog(formatter, self.epilog)


def paragraphs(title: str, lines: Sequence[str]) -> str:
    """An epilog: a title, and below it lines that stay lines."""
    return "\n".join([title, *(f"  {line}" for line in lines)])


def _write_groups(ctx: Any, formatter: Any, params: Sequence[Any]) -> None:
    panels: dict[str, list[tuple[str, str]]] = {}
    for param in params:
        record = param.get_help_record(ctx)
        if record is not None:
            usual = OTHER
            if param.param_type_name == "argument":
                usual, record = "Arguments", (param.metavar, record[1])
            label = getattr(param, "rich_help_panel", None)
            panels.setdefault(label if isinstance(label, str) else usual, []).append(record)
    # The options every command has come last.
    other = panels.pop(OTHER, None)
    _write_sections(formatter, panels | ({OTHER: other} if other else {}))


def _write_sections(formatter: Any, panels: dict[str, list[tuple[str, str]]]) -> None:
    for title, rows in panels.items():
        with formatter.section(title):
            formatter.write_dl(rows, col_max=28)


def _write_epilog(formatter: Any, epilog: str | None) -> None:
    for paragraph in (epilog or "").split("\n\n"):
        formatter.write_paragraph()
        if paragraph.count("\n"):
            formatter.write(paragraph + "\n")
        else:
            formatter.write_text(paragraph)
