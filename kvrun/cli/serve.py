"""kvrun serve: one model over HTTP."""

import os
from typing import Annotated, Any

import typer

from kvrun.cli import _options as options
from kvrun.errors import InvalidRequest, NotFound, Unsupported

PANEL = "Serve"
LIMITS = "Limits"
ACCEPTED = "Accepted without effect, for start scripts written for TGI"
EXAMPLES = (
    "kvrun serve                                  the built-in model on http://127.0.0.1:3000",
    "kvrun serve Qwen/Qwen3-0.6B --port 8080      a model of the Hub, pulled after asking",
    "kvrun serve --hostname 0.0.0.0 --api-key K   for other machines; a key is required",
)


def _flag(*flags: str, help: str, panel: str = PANEL, metavar: str = "N", **more: Any) -> Any:
    """An option that can also be set by environment: KVRUN_NAME, or NAME as TGI reads it."""
    name = flags[0].strip("-").replace("-", "_").upper()
    # Every shell and container sets HOSTNAME, and means something else by it.
    names = [f"KVRUN_{name}"] + ([name] if name != "HOSTNAME" else [])
    if name == "OTLP_ENDPOINT":
        names.append("OTEL_EXPORTER_OTLP_ENDPOINT")  # OpenTelemetry's own
    return typer.Option(
        *flags, help=help, metavar=metavar, envvar=names, show_envvar=True,
        rich_help_panel=panel, **more,
    )  # fmt: skip


def _limit(*flags: str, help: str, **more: Any) -> Any:
    return _flag(*flags, help=help, panel=LIMITS, **more)


def _ignored(*flags: str, **more: Any) -> Any:
    return _flag(*flags, help="No effect.", panel=ACCEPTED, **more)


ModelName = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a built-in model or ORG/NAME[@REV]. Default: $MODEL_ID, $KVRUN_MODEL, "
        "else tiny.",
        autocompletion=options.complete_model,
    ),
]
ModelId = Annotated[str | None, _flag("--model-id", metavar="NAME", help="The same as MODEL.")]
Revision = Annotated[
    str | None, _flag("--revision", metavar="REV", help="A branch, tag or commit of the model.")
]
ServedNames = Annotated[
    list[str] | None,
    _flag("--served-model-name", metavar="NAME", help="What clients call it (repeatable)."),
]
Hostname = Annotated[
    str, _flag("--hostname", "--host", metavar="NAME", help="The address to listen on.")
]
Port = Annotated[int, _flag("--port", "-p", help="0 takes any that is free.")]
ApiKeys = Annotated[
    list[str] | None,
    _flag("--api-key", metavar="KEY", help="Clients must send one of them (repeatable)."),
]
AdminKey = Annotated[
    str | None,
    _flag("--admin-key", metavar="KEY", help="Opens the routes that load and unload adapters."),
]
LoraAdapters = Annotated[
    list[str] | None,
    _flag(
        "--lora-adapters",
        metavar="LIST",
        help="NAME=PATH,... or ORG/NAME[@REV],... (repeatable). tiny's own are always there.",
    ),
]
LoraFolders = Annotated[
    list[str] | None,
    _flag(
        "--lora-folder",
        metavar="PATH",
        help="Where adapters loaded over HTTP may lie (repeatable).",
    ),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure-no-auth",
        help="Listen for other machines without a key.",
        rich_help_panel=PANEL,
    ),
]
Cors = Annotated[
    list[str] | None,
    _flag(
        "--cors-allow-origin",
        metavar="ORIGIN",
        help="Web pages that may use the server (repeatable); * for all.",
    ),
]
AllowedHosts = Annotated[
    list[str] | None,
    _flag(
        "--allowed-host",
        metavar="NAME",
        help="A further name of this server in Host headers (repeatable).",
    ),
]
DrainTimeout = Annotated[
    float,
    _flag(
        "--drain-timeout",
        "--graceful-termination-timeout",
        metavar="SECONDS",
        help="How long answers may go on after SIGTERM.",
    ),
]
JsonOutput = Annotated[
    bool,
    typer.Option("--json-output", help="Logs as JSON lines.", rich_help_panel=PANEL,
                 envvar=["KVRUN_JSON_OUTPUT", "JSON_OUTPUT"], show_envvar=True),
]  # fmt: skip
OtlpEndpoint = Annotated[
    str | None,
    _flag(
        "--otlp-endpoint",
        metavar="URL",
        help="Send spans there, by OTLP over HTTP (needs kvrun[otel]).",
    ),
]
OtlpService = Annotated[
    str, _flag("--otlp-service-name", metavar="NAME", help="Whose spans they are.")
]
Concurrent = Annotated[
    int, _limit("--max-concurrent-requests", help="Answers that run or wait; more get 429.")
]
BestOf = Annotated[int, _limit("--max-best-of", help="Of the native best_of.")]
Stops = Annotated[int, _limit("--max-stop-sequences", help="Stop texts of one request.")]
TopN = Annotated[int, _limit("--max-top-n-tokens", help="Of the native top_n_tokens.")]
ClientBatch = Annotated[int, _limit("--max-client-batch-size", help="Prompts of one request.")]
MaxInput = Annotated[
    int | None,
    _limit("--max-input-tokens", "--max-input-length", help="Prompt tokens; default: what fits."),
]
MaxTotal = Annotated[
    int | None,
    _limit(
        "--max-total-tokens",
        "--max-model-len",
        help="Tokens of a prompt with its answer; default: what fits.",
    ),
]
Prefill = Annotated[
    int | None, _limit("--max-batch-prefill-tokens", help="Tokens computed in one step.")
]
BatchTotal = Annotated[
    int | None,
    _limit(
        "--max-batch-total-tokens",
        help="Tokens of the KV cache, prompts and answers of all that run; default: what fits.",
    ),
]
BatchSize = Annotated[int | None, _limit("--max-batch-size", help="Answers computed at once.")]
Payload = Annotated[int, _limit("--payload-limit", metavar="BYTES", help="Of one body.")]
QueueTimeout = Annotated[
    float, _limit("--queue-timeout", metavar="SECONDS", help="Until the first token, else 503.")
]
RequestTimeout = Annotated[
    float, _limit("--request-timeout", metavar="SECONDS", help="From the first token to the last.")
]
Restarts = Annotated[
    int,
    _limit(
        "--restart-engine",
        help="How often in a row an engine that dies is started again; its answers go on.",
    ),
]
Workers = Annotated[int, _limit("--validation-workers", help="Threads that tokenize.")]
ServedRatio = Annotated[float, _ignored("--waiting-served-ratio", metavar="X")]
WaitingTokens = Annotated[int, _ignored("--max-waiting-tokens")]
PrometheusPort = Annotated[int | None, _ignored("--prometheus-port")]
ShardPath = Annotated[str | None, _ignored("--shard-uds-path", metavar="PATH")]
MasterAddress = Annotated[str | None, _ignored("--master-addr", metavar="NAME")]
MasterPort = Annotated[int | None, _ignored("--master-port")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", hidden=True)]


def command(
    model: ModelName = None,
    model_id: ModelId = None,
    revision: Revision = None,
    served_model_name: ServedNames = None,
    hostname: Hostname = "127.0.0.1",
    port: Port = 3000,
    api_key: ApiKeys = None,
    admin_key: AdminKey = None,
    insecure_no_auth: Insecure = False,
    lora_adapters: LoraAdapters = None,
    lora_folder: LoraFolders = None,
    cors_allow_origin: Cors = None,
    allowed_host: AllowedHosts = None,
    drain_timeout: DrainTimeout = 30.0,
    json_output: JsonOutput = False,
    otlp_endpoint: OtlpEndpoint = None,
    otlp_service_name: OtlpService = "text-generation-inference.router",
    max_concurrent_requests: Concurrent = 1024,
    max_best_of: BestOf = 2,
    max_stop_sequences: Stops = 4,
    max_top_n_tokens: TopN = 5,
    max_client_batch_size: ClientBatch = 4,
    max_input_tokens: MaxInput = None,
    max_total_tokens: MaxTotal = None,
    max_batch_prefill_tokens: Prefill = None,
    max_batch_total_tokens: BatchTotal = None,
    max_batch_size: BatchSize = None,
    payload_limit: Payload = 2 << 20,
    queue_timeout: QueueTimeout = 60.0,
    request_timeout: RequestTimeout = 600.0,
    restart_engine: Restarts = 3,
    validation_workers: Workers = 2,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    kv_memory: options.KvMemory = None,
    threads: options.Threads = None,
    no_fallback: options.NoFallback = False,
    yes: options.Yes = False,
    waiting_served_ratio: ServedRatio = 0.3,
    max_waiting_tokens: WaitingTokens = 20,
    prometheus_port: PrometheusPort = None,
    shard_uds_path: ShardPath = None,
    master_addr: MasterAddress = None,
    master_port: MasterPort = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Serve one model over HTTP: Text Generation Inference's API and OpenAI's."""
    if trust_remote_code:
        raise Unsupported("code that comes with a model is never run.")
    given = dict(locals())
    _serve(_name(model, model_id, revision), given)


def _name(model: str | None, model_id: str | None, revision: str | None) -> str:
    # What is typed goes before what the environment says.
    told = os.environ.get("KVRUN_MODEL_ID") or os.environ.get("MODEL_ID")
    if model and model_id not in (None, model, told):
        raise InvalidRequest(f"there are two models: {model} and --model-id {model_id}.")
    name = model or model_id or os.environ.get("KVRUN_MODEL") or "tiny"
    if not revision:
        return name
    if "@" in name:
        raise InvalidRequest(f"'{name}' names a revision already.", hint="leave --revision out")
    return f"{name}@{revision}"


def _serve(model: str, given: dict[str, Any]) -> None:
    """Check everything that can be checked, bind, and only then start to load."""
    from dataclasses import fields

    from kvrun.cli._ask import find_model
    from kvrun.hub.local import adapters_of, resolve_adapter
    from kvrun.runtime.config import EngineConfig
    from kvrun.server.settings import Settings

    lists = {
        "served_names": given["served_model_name"],
        "api_keys": given["api_key"],
        "cors_allow_origin": given["cors_allow_origin"],
        "allowed_hosts": given["allowed_host"],
        "lora_folders": _folders(given["lora_folder"] or []),
    }
    names = [field.name for field in fields(Settings)]
    same = {name: given[name] for name in names if name in given}
    adapters = {name: name for name in adapters_of(model)} | _adapters(given["lora_adapters"] or [])
    settings = Settings(
        **{
            **same,
            **{field: tuple(values or ()) for field, values in lists.items()},
            "model": model,
            "adapters": adapters,
        }
    )
    sizes = {
        "max_num_batched_tokens": given["max_batch_prefill_tokens"],
        "max_num_seqs": given["max_batch_size"],
        "kv_tokens": given["max_batch_total_tokens"],
        "restarts": given["restart_engine"],
    }
    config = EngineConfig(
        model=str(find_model(model, yes=given["yes"])),
        device=given["device"],
        dtype=given["dtype"],
        quantize=given["quantize"],
        kv_memory=options.memory(given["kv_memory"]),
        threads=given["threads"],
        fallback=not given["no_fallback"],
        adapters={name: str(resolve_adapter(model, source)) for name, source in adapters.items()},
        max_model_len=given["max_total_tokens"],
        **{field: value for field, value in sizes.items() if value is not None},
    )
    _run(settings, config)


def _adapters(lists: list[str]) -> dict[str, str]:
    """Name -> where it is, as TGI writes it: ID, ID@REV, NAME=PATH, NAME=ID@REV, with commas."""
    found: dict[str, str] = {}
    for entry in (entry.strip() for text in lists for entry in text.split(",")):
        if not entry:
            continue
        name, given, source = entry.partition("=")
        name, source = (name, source) if given else (entry.partition("@")[0], entry)
        if not name or not source:
            raise InvalidRequest(f"--lora-adapters: '{entry}' is no NAME=PATH.")
        if name in found:
            raise InvalidRequest(f"--lora-adapters: '{name}' is given twice.")
        found[name] = source
    return found


def _folders(paths: list[str]) -> list[str]:
    for path in paths:
        if not os.path.isdir(path):
            raise NotFound(f"--lora-folder: there is no folder {path}.")
    return [os.path.abspath(path) for path in paths]


def _run(settings: Any, config: Any) -> None:
    import kvrun.runtime.engine.client as engine
    from kvrun.server.run import bind, run

    if not settings.local and not settings.api_keys:
        typer.echo(f"warning: {settings.hostname} is served without a key", err=True)
    _fill_standard_streams()
    sock = bind(settings.hostname, settings.port)
    code = run(settings, config, sock, open_text=_open_text, connect=engine.EngineClient)
    if code:
        raise typer.Exit(code)


def _fill_standard_streams() -> None:
    """With stderr closed, a connection would get its number, and its client all that is printed."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


def _open_text(folder: str) -> Any:
    from kvrun.runtime.text import Text

    return Text.open(folder)
