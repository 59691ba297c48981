"""The OpenAPI document, fuzzed: right and wrong data, every route, no server error."""

import re
from pathlib import Path

from tests.clients.install import folder
from tests.clients.test_clients import run, served

CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_schema_conformance",
)  # fmt: skip


def test_schemathesis(model: Path) -> None:
    with served(model, "--max-total-tokens", "64", "--admin-key", "root") as url:
        said = run(
            folder("schemathesis"),
            [
                "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--mode", "all",
                "--phases", "coverage,fuzzing", "--max-examples", "6", "--seed", "1",
                "--header", "Authorization: Bearer root", "--checks", ",".join(CHECKS),
                "--no-color",
            ],
        )  # fmt: skip
    tested = re.search(r"Tested: (\d+)", said)
    assert tested
    assert int(tested[1]) == 25
