"""Logs: one line per event, as text or JSON; never a prompt, and never a reason to stop serving."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

LOGGER = logging.getLogger("kvrun.server")
FIELDS = "kvrun_fields"  # of a record: what a line holds beside its message


class Lines(logging.StreamHandler[Any]):
    """Writes to stderr; what cannot be written is counted instead of raised."""

    def __init__(self, as_json: bool) -> None:
        super().__init__(sys.stderr)
        self.errors = 0
        self.setFormatter(Json() if as_json else Text())

    def emit(self, record: logging.LogRecord) -> None:
        if self.stream is None:  # the process was started with stderr closed
            self.errors += 1
            return
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        self.errors += 1


class Json(logging.Formatter):
    """One JSON object a line, ASCII only, so that no text can forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class Text(logging.Formatter):
    """For people; control characters of whatever a client has sent are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        pairs = "".join(f" {k}={v}" for k, v in getattr(record, FIELDS, {}).items())
        line = f"{_time(record)} {record.levelname.lower()} {record.getMessage()}{pairs}"
        safe = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        trace = "\n" + self.formatException(record.exc_info) if record.exc_info else ""
        return safe + trace


def set_up(as_json: bool) -> Lines:
    """Send our lines and uvicorn's warnings to stderr; returns the handler, which counts."""
    handler = Lines(as_json)
    for name, level in (
        ("kvrun.server", logging.INFO),
        ("uvicorn.error", logging.CRITICAL),
        ("opentelemetry", logging.ERROR),
    ):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
    return handler


def event(message: str, /, level: int = logging.INFO, **fields: Any) -> None:
    """Log one line with fields."""
    LOGGER.log(level, message, extra={FIELDS: fields})


def failure(message: str, error: BaseException, /, **fields: Any) -> None:
    """Log an error that nobody expected, with its trace."""
    LOGGER.error(message, exc_info=error, extra={FIELDS: fields})


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
