"""The models of the zoo, made once a session, and copies to be spoilt."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.models import zoo


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Any]]:
    made: dict[tuple[str, str], tuple[Path, Any]] = {}

    def get(family: str, variant: str) -> tuple[Path, Any]:
        if (family, variant) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{variant}")
            made[family, variant] = folder, zoo.make(folder, family, variant)
        return made[family, variant]

    return get


@pytest.fixture(params=list(zoo.variants()), ids="-".join)
def model(
    request: pytest.FixtureRequest, models: Callable[[str, str], tuple[Path, Any]]
) -> tuple[Path, Any]:
    return models(*request.param)


@pytest.fixture
def mutant(
    models: Callable[[str, str], tuple[Path, Any]], tmp_path: Path
) -> Callable[[str, str], tuple[Path, Any]]:
    def copy(family: str, variant: str) -> tuple[Path, Any]:
        folder, oracle = models(family, variant)
        return Path(shutil.copytree(folder, tmp_path / "mutant")), oracle

    return copy
