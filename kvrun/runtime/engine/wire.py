"""The pipe between EngineClient and its worker: length-prefixed msgpack, both ways."""

import struct
from collections.abc import Iterator, Mapping
from typing import IO

import msgspec

from kvrun import errors
from kvrun.runtime.engine.request import AdapterInfo, Delta, Pages, Ready, Request, Stats

_LENGTH = struct.Struct("<I")


# MissingExtra makes its hint itself; the hint is here already, so its parent will do.
_KINDS: Mapping[str, type[errors.KvrunError]] = {
    kind.__name__: kind
    for kind in (
        errors.InvalidRequest,
        errors.NotFound,
        errors.BadCheckpoint,
        errors.Unsupported,
        errors.EngineDead,
    )
} | {"MissingExtra": errors.Unsupported}


class Fault(msgspec.Struct, frozen=True):
    """A KvrunError on its way through the pipe."""

    kind: str
    what: str
    cause: str = ""
    hint: str = ""

    @classmethod
    def of(cls, error: errors.KvrunError) -> "Fault":
        return cls(type(error).__name__, error.what, error.cause, error.hint)

    def error(self) -> errors.KvrunError:
        """The error again. A kind that cannot be rebuilt arrives as a plain KvrunError."""
        kind = _KINDS.get(self.kind, errors.KvrunError)
        return kind(self.what, cause=self.cause, hint=self.hint)


class Submit(msgspec.Struct, tag=True):
    """`known`, by choice: tokens that another engine made of the request before it died. Choices
    that are not in it have ended. None: nothing is known of a new request."""

    request: Request
    known: dict[int, list[int]] | None = None


class Abort(msgspec.Struct, tag=True):
    request_id: str
    index: int | None = None


class AskStats(msgspec.Struct, tag=True):
    pass


class AskPages(msgspec.Struct, tag=True):
    pass


class LoadAdapter(msgspec.Struct, tag=True):
    number: int
    name: str
    path: str
    lazy: bool = False  # it is known from its headers, and read when it is wanted


class UnloadAdapter(msgspec.Struct, tag=True):
    number: int
    name: str


class AskAdapters(msgspec.Struct, tag=True):
    number: int


class Started(msgspec.Struct, tag=True):
    ready: Ready


class Deltas(msgspec.Struct, tag=True):
    deltas: list[Delta]


class Rejected(msgspec.Struct, tag=True):
    request_id: str
    fault: Fault


class Statistics(msgspec.Struct, tag=True):
    stats: Stats


class PageMap(msgspec.Struct, tag=True):
    pages: Pages


class Adapters(msgspec.Struct, tag=True):
    """What came of a LoadAdapter, UnloadAdapter or AskAdapters."""

    number: int
    adapters: list[AdapterInfo]


class Refused(msgspec.Struct, tag=True):
    """Why nothing came of it."""

    number: int
    fault: Fault


class Died(msgspec.Struct, tag=True):
    """The last message of a worker that cannot go on (or never could start)."""

    fault: Fault


ToEngine = Submit | Abort | AskStats | AskPages | LoadAdapter | UnloadAdapter | AskAdapters
FromEngine = Started | Deltas | Rejected | Statistics | PageMap | Adapters | Refused | Died

_encoder = msgspec.msgpack.Encoder()
to_engine = msgspec.msgpack.Decoder(ToEngine)
from_engine = msgspec.msgpack.Decoder(FromEngine)


encode = _encoder.encode


def send(pipe: IO[bytes], message: object) -> None:
    """Write one message as one frame."""
    write(pipe, encode(message))


def write(pipe: IO[bytes], body: bytes) -> None:
    """Write one encoded message as one frame."""
    pipe.write(_LENGTH.pack(len(body)) + body)
    pipe.flush()


def frames(pipe: IO[bytes]) -> Iterator[bytes]:
    """The bodies of the frames that arrive, until the other side has gone."""
    while True:
        head = pipe.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            return
        (length,) = _LENGTH.unpack(head)
        body = pipe.read(length)
        if len(body) < length:
            return
        yield body
