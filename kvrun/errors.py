"""The errors a user sees: what happened, why, what to do, and the exit code that says it.

Exit codes: 0 ok, 1 expected failure, 2 usage, 3 not found, 4 does not fit or is not supported,
5 network or offline, 70 engine dead, 130 interrupted.
"""

EXTRAS = {
    "flashinfer": "cuda",
    "opentelemetry": "otel",
    "PIL": "vision",
}


class KvrunError(Exception):
    """An expected failure: `what` happened, its `cause` and a `hint` with the way out."""

    exit_code = 1

    def __init__(self, what: str, *, cause: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.cause = cause
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.cause:
            lines.append(f"cause: {self.cause}")
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)

    @property
    def in_one_line(self) -> str:
        """What has happened and why, for a field that holds one line."""
        return " ".join(part for part in (self.what, self.cause and f"({self.cause})") if part)


class InvalidRequest(KvrunError):
    """The request itself is wrong: a value out of bounds, a prompt that cannot be served."""

    exit_code = 2


class NotFound(KvrunError):
    """A model, adapter, file or name that does not exist."""

    exit_code = 3


class BadCheckpoint(KvrunError):
    """Weights or a configuration that are damaged, incomplete or contradict each other."""

    exit_code = 1


class Unsupported(KvrunError):
    """A model or option that kvrun cannot serve, or that does not fit on this machine."""

    exit_code = 4


class MissingExtra(Unsupported):
    """An optional package is not installed; the hint names the extra that brings it."""

    def __init__(self, what: str, package: str) -> None:
        extra = EXTRAS.get(package)
        way = f"pip install 'kvrun[{extra}]'" if extra else f"pip install {package}"
        super().__init__(what, hint=way)


class Unreachable(KvrunError):
    """A server that cannot be talked to: the network, its address, or nobody there."""

    exit_code = 5


class EngineDead(KvrunError):
    """The engine process has ended; every waiting request gets this error."""

    exit_code = 70
