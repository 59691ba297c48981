"""What the Hub and the network refuse, said so that a user knows what to do."""

import os
from typing import NamedTuple

from huggingface_hub import errors, get_token

from kvrun.errors import KvrunError, NotFound, Unreachable
from kvrun.hub.known import suggest

# The HTTP library is huggingface_hub's choice, and has changed; its errors are found by it.
TRANSPORT: tuple[type[Exception], ...] = tuple(
    kind for kind in errors.HfHubHTTPError.__bases__ if kind is not OSError
)
# Statuses that go away by themselves: timeouts, too many requests, servers in trouble.
WORTH_WAITING = frozenset({408, 425, 429, 500, 502, 503, 504})


class Asked(NamedTuple):
    """What was asked for, and where."""

    repo: str
    revision: str | None
    endpoint: str


def explain(error: Exception, asked: Asked) -> KvrunError:
    """A huggingface_hub or network error in kvrun's words."""
    repo, revision, endpoint = asked
    token = get_token()
    if isinstance(error, errors.GatedRepoError):
        return _gated(asked, token)
    if isinstance(error, errors.RevisionNotFoundError):
        hint = f"its revisions: {endpoint}/{repo}/tree/main"
        return NotFound(f"'{repo}' has no revision '{revision}'.", hint=hint)
    if isinstance(error, errors.RepositoryNotFoundError):
        alike = suggest(repo)
        hint = f"did you mean '{alike}'? " if alike else ""
        hint += "" if token else "If it is private: hf auth login, or HF_TOKEN=..."
        cause = "there is no such repository, or it is private"
        return NotFound(f"'{repo}' is not on {endpoint}.", cause=cause, hint=hint.strip())
    if isinstance(error, errors.EntryNotFoundError):
        return NotFound(f"a file of '{repo}' is gone.", cause=_first_line(error))
    if isinstance(error, errors.HfHubHTTPError):
        return _status(error, asked, token)
    return Unreachable(
        f"{endpoint} cannot be reached.",
        cause=f"{type(error).__name__}: {_first_line(error)}",
        hint="check the network; HF_ENDPOINT names a mirror; models that are here work without",
    )


def _gated(asked: Asked, token: str | None) -> NotFound:
    page = f"{asked.endpoint}/{asked.repo}"
    if token:
        return NotFound(
            f"'{asked.repo}' is gated, and your token has no access to it.",
            hint=f"accept its terms at {page} with the account of your token, and try again",
        )
    return NotFound(
        f"'{asked.repo}' is gated.",
        hint=f"accept its terms at {page}, then hf auth login or HF_TOKEN=...",
    )


def _status(error: errors.HfHubHTTPError, asked: Asked, token: str | None) -> KvrunError:
    status = error.response.status_code
    where = f"{asked.endpoint} answers {status}"
    if status in (401, 403):
        what = "your token is not accepted" if token else "a token is needed"
        hint = (
            f"a token is made at {asked.endpoint}/settings/tokens: hf auth login, or HF_TOKEN=..."
        )
        return NotFound(f"'{asked.repo}' cannot be read: {what}.", cause=where, hint=hint)
    if status == 429:
        asks = error.response.headers.get("Retry-After")
        cause = f"{where}: too many requests" + (f", wait {asks} s" if asks else "")
        hint = "try again later" + ("" if token else "; with HF_TOKEN=... more is allowed")
        return Unreachable(f"'{asked.repo}' cannot be read now.", cause=cause, hint=hint)
    return Unreachable(
        f"'{asked.repo}' cannot be read.", cause=where,
        hint="kvrun pull again goes on from here" if status >= 500 else "check HF_ENDPOINT",
    )  # fmt: skip


def offline() -> bool:
    """Whether the environment forbids the network, by the names huggingface_hub reads."""
    words = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(word.upper() in {"1", "ON", "YES", "TRUE"} for word in words)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""
