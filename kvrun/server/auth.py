"""Keys: who may use the routes that are not probes."""

import hashlib
import hmac
from typing import Annotated

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from kvrun.server.errors import ApiError
from kvrun.server.service import Service

_BEARER = HTTPBearer(auto_error=False, description="One of the server's API keys.")
_ADMIN = HTTPBearer(auto_error=False, scheme_name="AdminKey", description="The key of --admin-key.")


async def authorized(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)],
) -> None:
    """Raises ApiError (unauthorized) unless the request brings a key, where keys are set."""
    service: Service = request.app.state.service
    settings = service.settings
    if settings.api_keys:
        admin = [settings.admin_key] if settings.admin_key else []
        _require(credentials, [*settings.api_keys, *admin])


async def administrator(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_ADMIN)],
) -> None:
    """Raises ApiError (forbidden, unauthorized) unless the request brings the admin key."""
    service: Service = request.app.state.service
    key = service.settings.admin_key
    if key is None:
        words = "This route changes the server; it is open only when --admin-key is set."
        raise ApiError("forbidden", words)
    _require(credentials, [key])


def _require(credentials: HTTPAuthorizationCredentials | None, keys: list[str]) -> None:
    given = _digest(credentials.credentials if credentials else "")
    # Every key is compared, in constant time: how long it takes says nothing.
    matches = [hmac.compare_digest(given, _digest(key)) for key in keys]
    if not any(matches):
        raise ApiError("unauthorized", "The key is missing or wrong.")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
