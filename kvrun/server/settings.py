"""Settings: everything about the HTTP side that is fixed when a server starts."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvrun.errors import InvalidRequest

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
MEBIBYTE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Names and defaults are Text Generation Inference's where they mean the same.

    Sizes left at None come from the model once it is loaded. Times are in seconds.
    """

    model: str  # the name that was asked for; what /v1/models lists first
    revision: str | None = None
    served_names: tuple[str, ...] = ()
    hostname: str = "127.0.0.1"
    port: int = 3000
    api_keys: tuple[str, ...] = ()
    admin_key: str | None = None  # for what changes the server; it opens everything else too
    insecure_no_auth: bool = False
    adapters: Mapping[str, str] = field(default_factory=dict)  # name -> as it was asked for
    lora_folders: tuple[str, ...] = ()  # below which adapters may be loaded over HTTP
    cors_allow_origin: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_concurrent_requests: int = 1024  # answers that run or wait
    max_best_of: int = 2
    max_n: int = 8
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_client_batch_size: int = 4
    max_input_tokens: int | None = None
    max_total_tokens: int | None = None
    max_batch_size: int | None = None
    waiting_served_ratio: float = 0.3
    max_waiting_tokens: int = 20
    validation_workers: int = 2
    payload_limit: int = 2 * MEBIBYTE
    queue_timeout: float = 60.0
    request_timeout: float = 600.0
    drain_timeout: float = 30.0
    header_timeout: float = 10.0
    body_timeout: float = 10.0
    stall_timeout: float = 60.0  # of a client that does not read what it is sent
    comment_after: float = 15.0  # a stream without events says that it is alive
    json_output: bool = False
    otlp_endpoint: str | None = None  # where spans go; None: nowhere
    otlp_service_name: str = "text-generation-inference.router"

    def __post_init__(self) -> None:
        if not self.local and not self.api_keys and not self.insecure_no_auth:
            raise InvalidRequest(
                f"the server would listen on {self.hostname} without a key.",
                cause="everybody who reaches this address could use the model",
                hint="--api-key KEY, or --hostname 127.0.0.1, or --insecure-no-auth",
            )
        keys = [*self.api_keys] + ([self.admin_key] if self.admin_key is not None else [])
        if any(not key.isascii() or not key.strip() for key in keys):
            raise InvalidRequest("a key must be ASCII and not empty.")
        if self.admin_key in self.api_keys:
            raise InvalidRequest(
                "--admin-key is an --api-key too.",
                cause="every client could change the server",
                hint="take another one",
            )
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "port":
                least = 0 if name in ("drain_timeout", "max_top_n_tokens") else None
                if value < 0 or (value == 0 and least is None):
                    flag = "--" + name.replace("_", "-")
                    raise InvalidRequest(f"{flag} is {value}; it must be above 0.")
        if not 0 <= self.port <= 65535:
            raise InvalidRequest(f"--port is {self.port}; it must be at most 65535.")
        both = self.max_input_tokens and self.max_total_tokens
        if both and self.max_input_tokens >= self.max_total_tokens:  # type: ignore[operator]
            raise InvalidRequest(
                f"--max-input-tokens is {self.max_input_tokens}; it must be below "
                f"--max-total-tokens, which is {self.max_total_tokens}."
            )

    @property
    def local(self) -> bool:
        """Whether only programs on this machine can reach the server."""
        return self.hostname in LOOPBACK or self.hostname.startswith("127.")
