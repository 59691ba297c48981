"""kvrun env: what kvrun finds on this machine, and modules compiled for it."""

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from kvrun import __version__
from kvrun.cli import _options as options
from kvrun.errors import EXTRAS, InvalidRequest
from kvrun.folder import load

PANEL = "Tools"
EXAMPLES = (
    "kvrun env", "kvrun env --json",
    "kvrun env --compile                     FlashInfer's prefill for this GPU; once, for minutes",
    "kvrun env --compile --only bf16-128     what most models need",
)  # fmt: skip
PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "triton", "numpy",
    "fastapi", "uvicorn",
)  # fmt: skip
FOR_EXTRAS = {
    "flashinfer": "flashinfer-python",
    "opentelemetry": "opentelemetry-sdk",
    "PIL": "pillow",
}  # by the names of their imports
# What they are for, and how they are installed.
FOR_TOKENIZERS = ("sentencepiece", "tiktoken", "protobuf")
VARIABLES = (
    "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE",
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS",
)  # fmt: skip
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "KVRUN_API_KEY")


Compile = Annotated[
    bool,
    typer.Option(
        "--compile", help="Compile FlashInfer's modules for this GPU, where they are missing."
    ),
]
Only = Annotated[
    str | None,
    typer.Option(
        "--only", metavar="LIST", help="With --compile: these, as bf16-128,bf16-256-window."
    ),
]


def command(
    as_json: options.AsJson = False, compile_modules: Compile = False, only: Only = None
) -> None:
    """Show versions, devices, the cache, settings, missing packages; or compile for this GPU."""
    if compile_modules:
        names = [name.strip() for name in (only or "").split(",") if name.strip()]
        # By its name, because only what opens it needs the package.
        backend = load("kvrun.runtime.attention", "flashinfer")
        backend.compile_modules(names, lambda line: print(line, flush=True))
        return
    if only is not None:
        raise InvalidRequest("--only goes with --compile.")
    found = _found()
    if as_json:
        print(json.dumps(found))
        return
    for title, values in found.items():
        print(title if values else f"{title}: nothing is set")
        width = max((len(name) for name in values), default=0)
        for name, value in values.items():
            print(f"  {name:<{width}}  {value}")


def _found() -> dict[str, dict[str, Any]]:
    versions = {name: _version(name) or "missing" for name in PACKAGES}
    optional = {}
    for name, distribution in FOR_EXTRAS.items():
        missing = f"missing: pip install 'kvrun[{EXTRAS[name]}]'"
        optional[name] = _version(distribution) or missing
    for name in FOR_TOKENIZERS:
        optional[name] = _version(name) or f"missing: pip install {name} (some tokenizers)"
    return {
        "versions": {"kvrun": __version__, "python": platform.python_version(), **versions},
        "machine": _machine(),
        "cache": _cache(),
        "environment": _environment(os.environ),
        "optional": optional,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, str]:
    import psutil

    from kvrun.cli._machine import gpus, itemsize
    from kvrun.runtime.plan import size

    memory = psutil.virtual_memory()
    bfloat16 = "native" if itemsize("bfloat16", True) == 2 else "no"
    rows = {
        "system": platform.platform(),
        "cpu": f"{psutil.cpu_count(logical=False) or '?'} cores, "
        f"{psutil.cpu_count()} threads, {platform.machine()}, bfloat16: {bfloat16}",
        "memory": f"{size(memory.available)} free of {size(memory.total)}",
    }
    for number, gpu in enumerate(gpus()):
        rows[f"gpu {number}"] = f"{gpu.name}, {size(gpu.free)} free of {size(gpu.total)}"
    rows["torch device"] = _torch_device()
    return rows


def _torch_device() -> str:
    """What torch makes of the devices; a broken installation is what people run this for."""
    try:
        import torch
    except Exception as error:
        return f"torch cannot be imported: {error}"
    if not torch.cuda.is_available():
        return f"cpu (torch {torch.__version__} sees no CUDA device)"
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    return f"cuda {torch.version.cuda}: {name}, compute capability {major}.{minor}"


def _cache() -> dict[str, str]:
    from kvrun.hub.cache import entries
    from kvrun.hub.local import builtin_names, cache_root
    from kvrun.runtime.plan import size

    folder = root = cache_root().expanduser().absolute()
    while not folder.is_dir():
        folder = folder.parent
    cached = [entry for entry in entries() if entry.name not in builtin_names()]
    return {
        "folder": str(root),
        "holds": f"{len(cached)} models and adapters, {size(sum(e.bytes for e in cached))}",
        "disk": f"{size(shutil.disk_usage(folder).free)} free",
    }


def _environment(values: Mapping[str, str]) -> dict[str, str]:
    """What is set; of secrets only that they are."""
    found = {name: values[name] for name in VARIABLES if values.get(name)}
    kvrun = {k: v for k, v in values.items() if k.startswith("KVRUN_") and k not in SECRETS}
    return found | kvrun | {name: "set" for name in SECRETS if values.get(name)}
