"""Lists of modules in a configuration: which names they mean."""

import re


def listed(name: str, modules: object) -> bool:
    """Whether one of `modules` means the matrix `name`: it, its last part, what lies around it,
    or `re:` and a pattern."""
    return any(
        re.match(entry[3:], name) is not None
        if entry.startswith("re:")
        else f".{entry}." in f".{name}."
        for entry in (modules if isinstance(modules, list) else [])
        if isinstance(entry, str) and entry
    )
