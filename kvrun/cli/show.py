"""kvrun show: what a model is, and whether this machine can run it."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kvrun.cli import _options as options
from kvrun.errors import BadCheckpoint, KvrunError

PANEL = "Models"
EXAMPLES = (
    "kvrun show                       the built-in model",
    "kvrun show Qwen/Qwen3-0.6B       a model of the Hugging Face cache",
    "kvrun show path/to/folder --json",
)

Name = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a built-in model or ORG/NAME[@REV].",
        autocompletion=options.complete_model,
    ),
]


def command(model: Name = "tiny", as_json: options.AsJson = False) -> None:
    """Show what a model or adapter is, and whether it fits on this machine."""
    from kvrun.hub.local import resolve

    if adapter := _adapter(model):
        facts = _adapter_facts(model, adapter)
        rows = [(name.replace("_", " "), str(value)) for name, value in facts.items()]
    else:
        facts = _facts(model, resolve(model))
        rows = _rows(facts)
    if as_json:
        print(json.dumps(facts))
        return
    width = max(len(title) for title, _ in rows)
    print("\n".join(f"{title:<{width}}  {text}" for title, text in rows))


def _adapter(name: str) -> Path | None:
    """The folder of an adapter; None for what may be a model."""
    from kvrun.hub.cache import entries

    for entry in entries():
        if entry.kind == "adapter" and name in (entry.name, entry.repo):
            return entry.folder
    try:
        folder = Path(name).expanduser()
        alone = (folder / "adapter_config.json").is_file()
        return folder if alone and not (folder / "config.json").is_file() else None
    except (OSError, ValueError, RuntimeError):
        return None


def _adapter_facts(name: str, folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{folder / 'adapter_config.json'} cannot be read.",
                            cause=str(error)) from error  # fmt: skip
    weights = folder / "adapter_model.safetensors"
    targets = config.get("target_modules")
    return {
        "adapter": name,
        "folder": str(folder),
        "method": config.get("peft_type"),
        "model": config.get("base_model_name_or_path"),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "modules": ", ".join(sorted(targets)) if isinstance(targets, list) else targets,
        "bytes": weights.stat().st_size if weights.is_file() else None,
    }


def _facts(model: str, folder: Path) -> dict[str, Any]:
    from kvrun.runtime.plan import examine

    facts = examine(folder)
    runs_by, refused = _path(facts.model_type, folder)
    return {
        "model": model,
        "folder": str(folder),
        "architecture": facts.model_type,
        "supported": refused is None,
        "runs_by": runs_by,
        "refused": refused,
        "parameters": facts.parameters,
        "layers": facts.layers,
        "context": facts.context,
        "bytes": facts.stored_bytes,
        "dtypes": list(facts.stored),
        "quant_method": facts.quant_method,
        "tokenizer": (folder / "tokenizer.json").is_file(),
        "chat_template": _has_template(folder),
        "images": _images(folder),
        "adapters": _adapters(model, folder),
        **_fit(facts),
    }


def _path(kind: str, folder: Path) -> tuple[str | None, str | None]:
    """Whose code runs a model, a family's or transformers'; and why nobody's does."""
    from kvrun.folder import load, names

    if kind in names("kvrun.runtime.models"):
        return "kvrun", None
    raw = json.loads((folder / "config.json").read_bytes())
    reason = load("kvrun.runtime.fallback", "load").refusal(raw)
    return (None, reason) if reason else ("transformers", None)


def _images(folder: Path) -> dict[str, Any] | None:
    """What looks at images, and what stands for one in a prompt; None where nothing does.

    A model with a tower that kvrun does not use has the name of that alone.
    """
    raw = json.loads((folder / "config.json").read_bytes())
    vision = raw.get("vision_config")
    if not isinstance(vision, dict):
        return None
    from kvrun.runtime.text import Text
    from kvrun.runtime.text.images import places_in

    where = places_in(folder)
    if where is None:
        return {"taken": False, "tower": vision.get("model_type")}
    try:
        text = Text.open(folder)
        word = text.decode([where.token], skip_special=False) if text else None
    except KvrunError:
        word = None
    return {
        "taken": True,
        "model": raw.get("model_type"),
        "tower": where.tower,
        "pixels": where.pixels,
        "token": word,
        "token_id": where.token,
    }


def _fit(facts: Any) -> dict[str, Any]:
    from kvrun.cli._machine import device, itemsize
    from kvrun.runtime.plan import size

    here = device()
    each = itemsize(facts.dtype, here.on_cpu)
    try:
        plan = facts.fit(free_bytes=here.free, on_cpu=here.on_cpu, itemsize=each)
    except KvrunError as error:
        return {"device": here.name, "free": here.free, "fits": False, "why": error.what}
    free = f"{size(here.free)} free ({here.name})"
    why = f"{plan.line()}; {free}"
    full = facts.context is None or plan.max_model_len >= facts.context
    if not full:
        why += f"; not its whole context of {facts.context:,}"
    return {"device": here.name, "free": here.free, "fits": True, "why": why}


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def _adapters(model: str, folder: Path) -> list[str]:
    """Those that come with a model, and those of the cache that were made for it."""
    from kvrun.hub.cache import base_of, entries

    inside = sorted(
        path.parent.name for path in (folder / "adapters").glob("*/adapter_config.json")
    )
    repo = model.partition("@")[0]
    cached = [e.name for e in entries() if e.kind == "adapter" and base_of(e.folder) == repo]
    return inside + cached


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    from kvrun.runtime.plan import size

    support = {
        "kvrun": "",
        "transformers": " (by transformers' own code, checked when it is loaded)",
        None: f" (kvrun does not know it): {facts['refused']}",
    }[facts["runs_by"]]
    count = facts["parameters"]
    weights = f"{size(facts['bytes'])}, {', '.join(facts['dtypes'])}"
    if facts["quant_method"]:
        weights += f", quantized: {facts['quant_method']}"
    fits = facts["fits"] and facts["supported"]
    seen = [("images", _seen(facts["images"]))] if facts["images"] else []
    return [
        ("model", facts["model"]),
        ("folder", facts["folder"]),
        ("architecture", facts["architecture"] + support),
        ("parameters", f"{count:,}" if count is not None else "not counted: quantized"),
        ("layers", str(facts["layers"] or "not said")),
        ("context", f"{facts['context']:,}" if facts["context"] else "not said"),
        ("weights", weights),
        ("tokenizer", "yes" if facts["tokenizer"] else "no: prompts must be token ids"),
        ("chat template", "yes" if facts["chat_template"] else "no"),
        *seen,
        ("adapters", ", ".join(facts["adapters"]) or "none"),
        ("runs here", f"{'yes' if fits else 'no'}: {facts['why']}"),
    ]


def _seen(images: dict[str, Any]) -> str:
    if not images["taken"]:
        return "not taken: only its text part runs here"
    word = f"{images['token']} (token {images['token_id']})" if images["token"] else ""
    word = word or f"token {images['token_id']}"
    return f"yes ({images['model']}): {images['tower']}, {images['pixels']}; {word} stands for one"
