"""Adapters: which LoRA adapters are served by name, and where new ones may come from."""

import asyncio
import os
import re
from collections.abc import Callable, Coroutine, Iterable, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvrun.errors import BadCheckpoint, InvalidRequest, KvrunError, NotFound, Unsupported
from kvrun.hub.local import adapters_of, cached_adapter
from kvrun.server import log
from kvrun.server.errors import ApiError
from kvrun.server.settings import Settings

if TYPE_CHECKING:
    from kvrun.runtime.engine.client import EngineClient

PART = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
NAME = re.compile(rf"{PART}(?:/{PART})?")
FILES = ("adapter_config.json", "adapter_model.safetensors")  # what the engine reads of a folder


class Adapters:
    """The adapters that a request may name. The engine has them; this is what clients know.

    Every change of a name is finished even if the client who asked for it has left, so that the
    server and the engine never know different adapters.
    """

    def __init__(self, settings: Settings, client: "EngineClient", taken: Set[str]) -> None:
        self._sources = dict(settings.adapters)
        self._settings = settings
        self._client = client
        self._taken = taken  # what the model itself is called
        self._changing: set[str] = set()

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    @property
    def names(self) -> list[str]:
        return list(self._sources)

    def root(self, name: str) -> str:
        """What the adapter was loaded from, in words that say nothing about this machine."""
        source = self._sources[name]
        return source if is_name(source.partition("@")[0]) else Path(source).name

    async def load(self, name: str, source: str, *, replace: bool = False) -> None:
        """Serve the adapter in `source` as `name`. Raises ApiError, and then nothing changes."""
        if not is_name(name) or name in self._taken:
            words = f"'{name[:96]}' cannot be the name of an adapter."
            raise ApiError("validation", words, param="lora_name")
        if name in self and not replace:
            words = f"The adapter '{name}' is loaded already; load_inplace replaces it."
            raise ApiError("validation", words, param="lora_name")
        folder = await asyncio.to_thread(self._locate, source)

        async def load() -> None:
            try:
                info = await self._client.load_adapter(name, str(folder))
            except KvrunError as error:
                raise _told(error) from error
            self._sources[name] = source
            seconds = round(info.load_seconds or 0.0, 3)
            log.event("adapter loaded", name=name, ranks=info.ranks, seconds=seconds)

        await self._change(name, load)

    async def unload(self, name: str) -> None:
        """Serve it no more. Raises ApiError: not_found, or conflict while requests use it."""
        if name not in self:
            words = f"There is no adapter '{name[:96]}' here."
            raise ApiError("not_found", words, param="lora_name")

        async def unload() -> None:
            try:
                await self._client.unload_adapter(name)
            except InvalidRequest as error:  # it is known, so it is in use
                words = f"{error.what} {error.hint}".strip()
                raise ApiError("conflict", words, param="lora_name") from error
            except KvrunError as error:
                raise _told(error) from error
            del self._sources[name]
            log.event("adapter unloaded", name=name)

        await self._change(name, unload)

    async def _change(self, name: str, change: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if name in self._changing:
            raise ApiError("conflict", f"The adapter '{name}' is being changed by somebody else.")
        self._changing.add(name)
        task = asyncio.ensure_future(change())

        def ended(task: "asyncio.Future[None]") -> None:
            self._changing.discard(name)
            if not task.cancelled():
                task.exception()  # its client may have left, and then nobody else looks

        task.add_done_callback(ended)
        await asyncio.shield(task)

    def _locate(self, source: str) -> Path:
        """The folder meant, one that clients may name. Raises ApiError for every other.

        Nothing about the rest of the disk can be learnt from the answers.
        """
        if "\0" in source or ".." in re.split(r"[/\\]", source):
            raise ApiError("forbidden", "An adapter's path has no '..' in it.", param="lora_path")
        known = adapters_of(self._settings.model)
        if source in known:
            return Path(known[source])
        inside, leads_out = False, Path(source).is_absolute()
        for root in (Path(folder).resolve() for folder in self._settings.lora_folders):
            folder = _resolved(root / source)
            if folder is None or folder == root:
                continue
            if not folder.is_relative_to(root):
                leads_out = True  # absolute, or a link
                continue
            inside = True
            files = [_resolved(folder / file) for file in FILES]
            if not all(file and file.is_relative_to(root) for file in files):
                leads_out, inside = True, False
            elif os.path.isdir(folder):  # which says no to names that are too long
                return folder
        if not Path(source).is_absolute() and (cached := cached_adapter(source)):
            return cached
        if leads_out and not inside:
            words = "The path leads out of the folders for adapters; see --lora-folder."
            raise ApiError("forbidden", words, param="lora_path")
        words = f"There is no adapter '{source[:96]}' in the folders for adapters or in the cache."
        raise ApiError("not_found", words, param="lora_path")


def check_names(names: Iterable[str], taken: Set[str]) -> None:
    """Raises InvalidRequest for a name that no adapter can have; `taken` are the model's own."""
    for name in names:
        if not is_name(name) or name in taken:
            raise InvalidRequest(
                f"'{name[:96]}' cannot be the name of an adapter.",
                cause="it is the model's own" if name in taken else "",
                hint="--lora-adapters NAME=PATH, with letters, digits and _ . - in NAME",
            )


def is_name(name: str) -> bool:
    """Whether `name` can be an adapter's: NAME or ORG/NAME."""
    return NAME.fullmatch(name) is not None and ".." not in name


def _resolved(path: Path) -> Path | None:
    """Where a path leads to, through all links."""
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):  # too long, or links in a circle
        return None


def _told(error: KvrunError) -> ApiError:
    """What came of loading, for somebody with the admin key: all of it."""
    if isinstance(error, InvalidRequest | BadCheckpoint | Unsupported | NotFound):
        words = " ".join(part for part in (error.what, error.cause, error.hint) if part)
        kind = "not_found" if isinstance(error, NotFound) else "validation"
        return ApiError(kind, words, param="lora_path")
    return ApiError("unavailable", "The engine has ended.")
