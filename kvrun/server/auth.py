"""Keys: who may use the routes that are not probes."""

import hashlib
import hmac
from typing import Annotated

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from kvrun.server.errors import ApiError
from kvrun.server.service import Service

_BEARER = HTTPBearer(auto_error=False, description="One of the server's API keys.")


async def authorized(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)],
) -> None:
    """Raises ApiError (unauthorized) unless the request brings a key, where keys are set."""
    service: Service = request.app.state.service
    keys = service.settings.api_keys
    if not keys:
        return
    given = _digest(credentials.credentials if credentials else "")
    # Every key is compared, in constant time: how long it takes says nothing.
    matches = [hmac.compare_digest(given, _digest(key)) for key in keys]
    if not any(matches):
        raise ApiError("unauthorized", "The API key is missing or wrong.")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
