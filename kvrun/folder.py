"""A folder of alternatives is its own registry: list its modules, load one by name."""

import difflib
import importlib
import pkgutil
from importlib.util import find_spec
from types import ModuleType

from kvrun.errors import MissingExtra, NotFound


def names(package: str) -> list[str]:
    """The public modules and packages inside `package`, sorted; neither they nor it is imported."""
    spec = find_spec(package)
    paths = spec.submodule_search_locations if spec else None
    if paths is None:
        raise ModuleNotFoundError(f"no package '{package}'", name=package)
    return sorted(m.name for m in pkgutil.iter_modules(paths) if not m.name.startswith("_"))


def load(package: str, name: str) -> ModuleType:
    """Import the alternative `name` of `package`.

    Raises NotFound for a name the folder does not hold, with the names it does hold, and
    MissingExtra when the alternative needs an optional package that is not installed.
    """
    known = names(package)
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        room = package.rsplit(".", 1)[-1]
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
        raise NotFound(f"'{name}' is not in {room}.", hint=hint)
    try:
        return importlib.import_module(f"{package}.{name}")
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in {"", "kvrun"}:
            raise
        raise MissingExtra(f"'{name}' needs the package '{missing}'.", missing) from error
