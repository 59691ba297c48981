"""kvrun ls: the models and adapters on this machine."""

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

from kvrun.cli import _options as options

if TYPE_CHECKING:
    from kvrun.hub.cache import Entry

PANEL = "Models"
EXAMPLES = (
    "kvrun ls            what is here, by name",
    "kvrun ls -q         names only",
    "kvrun ls --json     with folders, commits and bytes",
)


def command(as_json: options.AsJson = False, quiet: options.Quiet = False) -> None:
    """List the models on this machine."""
    from kvrun.cli._table import table
    from kvrun.hub.cache import entries
    from kvrun.runtime.plan import size

    found = entries()
    if quiet:
        print("\n".join(entry.name for entry in found))
        return
    rows = [_row(entry) for entry in found]
    if as_json:
        print(json.dumps({"models": rows}))
        return
    cells = [
        (
            row["name"], size(row["bytes"]), _day(entry.modified), row["architecture"] or "",
            f"{row['context']:,}" if row["context"] else "",
            f"not complete: lacks {entry.lacks}" if entry.lacks else row["kind_of"],
        )
        for row, entry in zip(rows, found, strict=True)
    ]  # fmt: skip
    print(table(("NAME", "SIZE", "MODIFIED", "ARCHITECTURE", "CONTEXT", ""), cells))


def _row(entry: "Entry") -> dict[str, Any]:
    from kvrun.hub.cache import base_of
    from kvrun.hub.local import builtin_names

    config = _config(entry)
    base = base_of(entry.folder) if entry.kind == "adapter" else None
    kind_of = "built in" if entry.name in builtin_names() else ""
    if base:
        kind_of = f"adapter for {base}"
    method = config.get("quantization_config")
    return {
        "name": entry.name,
        "kind": entry.kind,
        "bytes": entry.bytes,
        "modified": datetime.fromtimestamp(entry.modified).astimezone().isoformat("T", "seconds"),
        "architecture": config.get("model_type"),
        "context": config.get("max_position_embeddings"),
        "quant_method": method.get("quant_method") if isinstance(method, dict) else None,
        "base": base,
        "kind_of": kind_of,
        "commit": entry.commit or None,
        "revisions": list(entry.revisions),
        "folder": str(entry.folder),
        "complete": not entry.lacks,
        "lacks": entry.lacks or None,
    }


def _config(entry: "Entry") -> dict[str, Any]:
    """The values of config.json that are of the kind they should be; a damaged file has none."""
    try:
        values = json.loads((entry.folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(values, dict):
        return {}
    text = values.get("text_config")
    values = {**values, **text} if isinstance(text, dict) else values
    kinds = {"model_type": str, "max_position_embeddings": int, "quantization_config": dict}
    return {k: values[k] for k, kind in kinds.items() if isinstance(values.get(k), kind)}


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d")
