"""The OpenAPI document: every route, its bodies, its answers."""

from typing import Any

from tests.server.conftest import Served

ROUTES = {
    "/": {"get", "post"},
    "/generate": {"post"},
    "/generate_stream": {"post"},
    "/invocations": {"post"},
    "/health": {"get"},
    "/healthz": {"get"},
    "/readyz": {"get"},
    "/ping": {"get"},
    "/info": {"get"},
    "/version": {"get"},
    "/metrics": {"get"},
    "/tokenize": {"post"},
    "/chat_tokenize": {"post"},
    "/detokenize": {"post"},
    "/tokenizer_info": {"get"},
    "/v1/models": {"get"},
    "/v1/models/{model}": {"get"},
    "/v1/completions": {"post"},
    "/v1/chat/completions": {"post"},
    "/v1/responses": {"post"},
    "/v1/embeddings": {"post"},
    "/v1/load_lora_adapter": {"post"},
    "/v1/unload_lora_adapter": {"post"},
    "/download_lora_adapter": {"post"},
}


async def document(server: Served) -> Any:
    return (await server.http.get("/openapi.json")).json()


async def test_every_route_and_no_other(server: Served) -> None:
    paths = (await document(server))["paths"]
    assert {path: set(operations) for path, operations in paths.items()} == ROUTES
    assert (await server.http.get("/api-doc/openapi.json")).json()["paths"] == paths
    page = await server.http.get("/docs")
    assert "/openapi.json" in page.text


async def test_keys_and_errors_are_in_it(server: Served) -> None:
    paths = (await document(server))["paths"]
    for path, operations in paths.items():
        for operation in operations.values():
            probe = path in ("/", "/health", "/healthz", "/readyz", "/ping")
            if not (probe and "get" in operations):
                assert operation["security"], path
            for status, answer in operation["responses"].items():
                if status != "200":
                    schema = answer["content"]["application/json"]["schema"]["$ref"]
                    dialect = "OpenAI" if path.startswith("/v1/") else "Native"
                    assert schema.endswith(f"{dialect}Error"), (path, status)


async def test_a_sampling_option_is_described_where_it_is_written(server: Served) -> None:
    schemas = (await document(server))["components"]["schemas"]
    top_p = schemas["ChatBody"]["properties"]["top_p"]
    assert top_p["description"] == "keep the likeliest tokens that hold this mass"
    number = next(kind for kind in top_p["anyOf"] if kind["type"] == "number")
    assert (number["exclusiveMinimum"], number["maximum"]) == (0, 1)
