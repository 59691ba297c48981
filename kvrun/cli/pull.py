"""kvrun pull: fetch a model or an adapter, or complete one that is here."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvrun.cli import _options as options
from kvrun.errors import InvalidRequest, NotFound, Unreachable

if TYPE_CHECKING:
    from kvrun.hub.remote import Offer

PANEL = "Models"
EXAMPLES = (
    "kvrun pull Qwen/Qwen3-0.6B                  into the Hugging Face cache",
    "kvrun pull Qwen/Qwen3-0.6B@main --dry-run   which files, how many bytes",
    "kvrun pull ORG/NAME --exclude '*.md'        less of it",
    "kvrun pull path/to/folder                   make safetensors of .bin files, tokenizer.json",
    "kvrun pull --list                           well-known models, what they need",
)

Name = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="ORG/NAME[@REV] of a model or an adapter on the Hugging Face Hub, or a folder.",
        show_default=False,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only list the files and bytes.", rich_help_panel=PANEL)
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include", metavar="PATTERN", rich_help_panel=PANEL,
        help="Only files like it, instead of what a model needs (repeatable).",
    ),
]  # fmt: skip
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude", metavar="PATTERN", help="No files like it (repeatable).",
        rich_help_panel=PANEL,
    ),
]  # fmt: skip
List = Annotated[
    bool,
    typer.Option(
        "--list", help="Well-known models that kvrun runs, by size.", rich_help_panel=PANEL
    ),
]


def command(
    model: Name = None,
    dry_run: DryRun = False,
    include: Include = None,
    exclude: Exclude = None,
    show_list: List = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    no_progress: options.NoProgress = False,
) -> None:
    """Fetch a model or an adapter from the Hugging Face Hub.

    It goes on where it stopped, and prints the folder to stdout. HF_TOKEN, HF_ENDPOINT,
    HF_HUB_OFFLINE, HF_HOME and HF_HUB_CACHE mean what they mean to Hugging Face's own tools.
    """
    if show_list:
        if model is not None:
            raise InvalidRequest("--list takes no MODEL.", hint=f"kvrun pull {model} --dry-run")
        _list(as_json, quiet)
        return
    if model is None:
        raise InvalidRequest("pull needs the name of a model.", hint="kvrun pull --list")
    if _is_folder(model):
        if include or exclude:
            raise InvalidRequest(
                f"{model[:80]} is a folder: --include and --exclude choose files of the Hub."
            )
        _complete(Path(model).expanduser().absolute(), dry_run, as_json, quiet)
        return
    _pull(model, dry_run, include or [], exclude or [], as_json, quiet, no_progress)


def _is_folder(name: str) -> bool:
    from kvrun.hub.local import builtin_names, is_pullable

    if name in builtin_names() or is_pullable(name):
        return False
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return True
    except (OSError, ValueError, RuntimeError):
        return False
    if name.startswith((".", "/", "~")):
        raise NotFound(f"there is no folder {name[:80]}.", hint="kvrun pull ORG/NAME, or a folder")
    return False


def _pull(
    name: str, dry: bool, include: list[str], exclude: list[str], as_json: bool, quiet: bool,
    plain: bool,
) -> None:  # fmt: skip
    from kvrun.cli._transfer import pull
    from kvrun.folder import load

    _check(name)
    try:
        offer: Offer = load("kvrun.hub", "remote").look(name, include, exclude)
    except Unreachable as error:
        folder = _here(name)
        if folder is None or include or exclude or dry:
            raise
        _serve_from_cache(name, folder, error, as_json, quiet)
        return
    if dry:
        _print_offer(name, offer, as_json, quiet)
        return
    folder = pull(name, offer, quiet=quiet or as_json, plain=plain)
    _say_base(folder, quiet or as_json)
    if as_json:
        print(json.dumps(_record(name, offer) | {"path": str(folder)}))
    else:
        print(folder)


def _check(name: str) -> None:
    """Raise for what cannot be asked of the Hub, with the name that may be meant."""
    from kvrun.hub.known import suggest
    from kvrun.hub.local import builtin_names, is_pullable

    if name in builtin_names():
        raise InvalidRequest(f"'{name}' is part of kvrun.", hint=f"kvrun chat -m {name}")
    if not is_pullable(name):
        alike = suggest(name) if len(name) < 200 else None
        hint = f"did you mean '{alike}'?" if alike else "a name is ORG/NAME or ORG/NAME@REV"
        raise InvalidRequest(f"'{name[:80]}' is no name of a model on the Hub.", hint=hint)


def _here(name: str) -> Path | None:
    from kvrun.hub.cache import entries

    repo, _, revision = name.partition("@")
    for entry in entries():
        wanted = not revision or revision in entry.revisions or entry.commit.startswith(revision)
        if entry.repo == repo and wanted and not entry.lacks:
            return entry.folder
    return None


def _serve_from_cache(
    name: str, folder: Path, why: Unreachable, as_json: bool, quiet: bool
) -> None:
    from kvrun.chat.plain import note

    if not quiet and not as_json:
        note(f"{name} is here and complete; whether there is a newer one is not known: {why.what}")
    print(json.dumps({"model": name, "path": str(folder)}) if as_json else folder)


def _complete(folder: Path, dry: bool, as_json: bool, quiet: bool) -> None:
    from kvrun.chat.plain import note
    from kvrun.folder import load

    room = load("kvrun.hub", "complete")
    if dry:
        lacks = room.lacks(folder)
        if as_json:
            print(json.dumps({"path": str(folder), "lacks": lacks}))
        else:
            print(f"would make {' and '.join(lacks)}" if lacks else "nothing is missing")
        return

    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if not quiet and not as_json:
            note(text)

    made = room.complete(folder, say)
    if as_json:
        print(json.dumps({"path": str(folder), "made": made}))
        return
    if made:
        say(f"made {', '.join(made)}")
    elif not said:
        say("nothing is missing")
    print(folder)


def _record(name: str, offer: "Offer") -> dict[str, object]:
    missing = {file.name for file in offer.missing}
    files = [{"name": f.name, "bytes": f.size, "here": f.name not in missing} for f in offer.files]
    return {
        "model": name,
        "commit": offer.place.commit,
        "files": files,
        "bytes": offer.size,
        "to_fetch": offer.to_fetch,
    }


def _print_offer(name: str, offer: "Offer", as_json: bool, quiet: bool) -> None:
    from kvrun.runtime.plan import size

    if as_json:
        print(json.dumps(_record(name, offer)))
        return
    missing = {file.name for file in offer.missing}
    if quiet:
        print("\n".join(file.name for file in offer.files))
        return
    width = max(len(file.name) for file in offer.files)
    for file in offer.files:
        mark = "" if file.name in missing else "  here"
        print(f"{file.name:<{width}}  {size(file.size):>8}{mark}")
    print(f"\n{len(offer.files)} files, {size(offer.size)}; {size(offer.to_fetch)} to fetch")
    if offer.to_convert:
        print(f"{size(offer.to_convert)} of .bin files will be written again as safetensors")


def _say_base(folder: Path, quiet: bool) -> None:
    """An adapter is nothing without the model it was made for."""
    from kvrun.chat.plain import note
    from kvrun.hub.cache import base_of

    base = base_of(folder)
    if base and not quiet:
        note(f"an adapter for {base}")


def _list(as_json: bool, quiet: bool) -> None:
    from kvrun.cli._machine import device
    from kvrun.cli._table import table
    from kvrun.folder import names
    from kvrun.hub.known import MODELS
    from kvrun.runtime.plan import size

    architectures = names("kvrun.runtime.models")
    known = [model for model in MODELS if model.model_type in architectures]
    if quiet:
        print("\n".join(model.name for model in known))
        return
    here = device()
    rows = [
        {
            "name": model.name, "architecture": model.model_type, "parameters": model.parameters,
            "bytes": model.bytes, "memory": _memory(model.bytes), "context": model.context,
            "gated": model.gated, "fits": _memory(model.bytes) <= here.free,
        }
        for model in known
    ]  # fmt: skip
    if as_json:
        print(json.dumps({"models": rows}))
        return
    cells = [
        (model.name, model.parameters, size(model.bytes), size(_memory(model.bytes)),
         f"{model.context:,}", "yes" if _memory(model.bytes) <= here.free else "no",
         "terms to accept" if model.gated else "")
        for model in known
    ]  # fmt: skip
    heads = ("NAME", "PARAMETERS", "SIZE", "NEEDS", "CONTEXT", "FITS HERE", "")
    print(table(heads, cells))
    print(f"\nNEEDS: memory in 16 bits with a short context; {size(here.free)} are free here "
          f"({here.name}).")  # fmt: skip


def _memory(weights: int) -> int:
    """Bytes for weights in 16 bits, a short context, and what a process takes anyway."""
    return int(weights * 1.1) + (1 << 29)
