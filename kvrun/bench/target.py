"""Target: the model that is measured: opened, timed, described."""

import inspect
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

from kvrun import __version__
from kvrun.bench import shapes
from kvrun.bench.hardware import Hardware, here
from kvrun.bench.roofline import Cost
from kvrun.bench.workloads import Prompt
from kvrun.errors import InvalidRequest, KvrunError, Unsupported
from kvrun.hub.local import resolve
from kvrun.llm import LLM, Output
from kvrun.runtime.checkpoint import WIDTHS
from kvrun.runtime.config import QUANTIZE_ALIASES
from kvrun.runtime.engine.start import choose_device, choose_dtype
from kvrun.runtime.hf_config import HFConfig
from kvrun.runtime.plan import size
from kvrun.runtime.sampling.params import SamplingParams

# Arguments of LLM that a benchmark sets itself.
OWN = {"self", "model", "load_format", "adapters"}
DIMENSIONS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
SMI = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


@dataclass
class Model:
    """A folder to be measured, the name people know it by, and where its weights come from."""

    name: str
    folder: Path
    random: bool
    why: str = ""  # weights are random although nobody asked for that
    config: HFConfig = field(init=False)

    def __post_init__(self) -> None:
        self.config = HFConfig.read(self.folder)

    @property
    def vocab_size(self) -> int:
        return self.config.integer("vocab_size")


@contextmanager
def find(name: str | None, shape: str | None, *, random: bool = False) -> Iterator[Model]:
    """The model of a name or of a shape; exactly one of them, or neither for "tiny".

    Weights are random for a shape, when they are asked for, and where there are none.
    """
    if name is not None and shape is not None:
        raise InvalidRequest("there are a MODEL and a --shape.", hint="name one of them")
    if shape is not None:
        with shapes.folder(shape) as folder:
            yield Model(shape, folder, random=True)
        return
    folder = resolve(name or "tiny")
    none = not any(folder.glob("*.safetensors"))
    why = f"{folder} holds no *.safetensors: weights are random" if none and not random else ""
    yield Model(name or "tiny", folder, random=random or none, why=why)


class Target:
    """A model in memory. It answers greedily, does not end at the end of text, and is checked."""

    def __init__(self, model: Model, **options: Any) -> None:
        self.model = model
        if model.random:
            _check_room(model, options.get("device", "auto"), options.get("dtype", "auto"))
        defaults = {name: one.default for name, one in _parameters().items()}
        self.options = {**defaults, **options}
        begun = time.perf_counter()
        load_format = "dummy" if model.random else "auto"
        self.llm = LLM(str(model.folder), load_format=load_format, **options)
        self.start_seconds = time.perf_counter() - begun
        self.ready = self.llm.ready
        fp8 = self.options.get("kv_dtype") == "fp8"
        self.kv_dtype = "float8_e4m3fn" if fp8 else self.ready.dtype
        asked = self.options.get("quantize") or ""
        width = WIDTHS.get(QUANTIZE_ALIASES.get(asked, asked))
        head = WIDTHS["int8"] if width else None
        self.cost = Cost.of(model.config, self.ready.dtype, self.kv_dtype, width, head)
        self.last: list[Output] = []

    def seconds(
        self,
        prompts: Sequence[Prompt],
        new: Sequence[int],
        adapters: Sequence[str | None] | None = None,
    ) -> float:
        """Seconds to answer every prompt with so many tokens; what came is in `last`."""
        params = [
            SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, seed=0)
            for count in new
        ]
        begun = time.perf_counter()
        self.last = self.llm.generate(prompts, params, adapters)
        seconds = time.perf_counter() - begun
        for output, count in zip(self.last, new, strict=True):
            if len(output.token_ids) != count:
                raise KvrunError(
                    f"an answer has {len(output.token_ids)} tokens instead of {count}.",
                    cause=output.error or f"it ended with '{output.finish_reason}'",
                )
        return seconds

    def about(self, hardware: Hardware | None) -> dict[str, Any]:
        """Everything a figure needs beside it to mean something."""
        ready, config = self.ready, self.model.config
        bare = hardware or here(ready.device)
        return {
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "backend": "kvrun",
            "model_id": self.model.name,
            "weights": "random" if self.model.random else "real",
            "model_type": config.model_type,
            "shape": {name: config.get(name) for name in DIMENSIONS},
            "parameters": self.cost.parameters,
            "dtype": ready.dtype,
            "kv_dtype": self.kv_dtype,
            "device": ready.device,
            "device_name": bare.device_name,
            "threads": bare.threads,
            "attention": ready.attention,
            "plan": ready.plan,
            "kv_tokens": ready.kv_tokens,
            "start_seconds": round(self.start_seconds, 3),
            "engine": {
                **self.options,
                "max_model_len": ready.max_model_len,
                "block_size": ready.block_size,
            },
            "sampling": "greedy, end of text ignored",
            "ceilings": hardware.record() if hardware else None,
            "versions": versions(),
            "gpu": gpu_state(ready.device),
        }

    def __enter__(self) -> "Target":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.llm.close()


def parse_engine(assignments: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE of any argument of LLM -> keyword arguments, their types checked."""
    known, values = _parameters(), {}
    for text in assignments:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in known:
            what = f"'{name}' is no option of the engine" if equals else f"'{text}' has no ="
            raise InvalidRequest(f"-e: {what}.", hint=f"known: {', '.join(known)}")
        values[name] = _typed(name, value.strip(), known[name].default)
    return values


def versions() -> dict[str, str]:
    """Of kvrun and what it stands on."""
    found = {
        "kvrun": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
    }
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def gpu_state(device: str) -> dict[str, str] | None:
    """Clocks, power and temperature of a GPU as nvidia-smi tells them; None elsewhere."""
    smi = shutil.which("nvidia-smi")
    if not device.startswith("cuda") or smi is None:
        return None
    number = device.partition(":")[2] or "0"
    try:
        done = subprocess.run(
            [smi, f"--id={number}", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(SMI, (part.strip() for part in done.stdout.split(",")), strict=False))


def _check_room(model: Model, device: str, dtype: str) -> None:
    """Raise Unsupported when random weights would not fit: no file says how large they are."""
    where = choose_device(device)
    chosen = choose_dtype(dtype, model.config.dtype, where)
    cost = Cost.of(model.config, str(chosen).removeprefix("torch."))
    needed = int(cost.weight_bytes + cost.embedding * cost.width)
    free = psutil.virtual_memory().available
    if where.type == "cuda":
        free = torch.cuda.mem_get_info(where)[0]
    if needed > free:
        raise Unsupported(
            f"the weights of {model.name} need {size(needed)}, {size(free)} are free.",
            cause=f"{cost.parameters:,} parameters, "
            f"{size(int(cost.kv_bytes_per_token))} more for each token of context",
            hint="choose a smaller shape or --dtype bfloat16, or close other programs",
        )


def _parameters() -> dict[str, inspect.Parameter]:
    found = inspect.signature(LLM.__init__).parameters
    return {name: one for name, one in found.items() if name not in OWN}


def _typed(name: str, text: str, default: Any) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if isinstance(value, dict | list):
        raise InvalidRequest(f"-e {name} is '{text}'; it takes one value.")
    if name == "quantize" and isinstance(value, str):
        return value
    if default is None and value is not None:
        share = name.endswith("_memory")  # bytes, or a part of what is free
        if type(value) not in ((int, float) if share else (int,)):
            kind = "a number" if share else "a whole number"
            raise InvalidRequest(f"-e {name} is '{text}'; it must be {kind}, or null.")
    if default is not None and type(value) is not type(default):
        kind = {bool: "true or false", int: "a whole number", str: "a name"}[type(default)]
        raise InvalidRequest(f"-e {name} is '{text}'; it must be {kind}.")
    return value
