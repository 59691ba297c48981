"""Models that see, made once a session."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.vision import eyes

Made = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    done: dict[str, tuple[Path, Any]] = {}

    def get(family: str) -> tuple[Path, Any]:
        if family not in done:
            folder = tmp_path_factory.mktemp(family)
            done[family] = folder, eyes.make(folder, family)
        return done[family]

    return get
