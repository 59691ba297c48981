"""Clients of the field, each in a folder of its own: what they need of each other excludes itself.

Run as a program it installs all of them, which CI does while it checks other things.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2] / ".clients"
HUB_0 = (
    "huggingface_hub==0.36.2", "requests==2.34.2", "urllib3==2.8.0", "certifi==2026.10.19.post1",
    "charset_normalizer==3.5.3",
)  # fmt: skip
# Exact versions, without what the environment of the tests has itself.
PINS: dict[str, tuple[str, ...]] = {
    "openai-2": (
        "openai==2.54.0", "jiter==0.19.0", "distro==1.9.0", "sniffio==1.3.1", "httpx==0.28.1",
        "httpcore==1.0.9", "certifi==2026.10.19.post1",
    ),
    "openai-3": ("openai==3.57.0", "jiter==0.19.0", "sniffio==1.3.1"),
    "hub-0": HUB_0,
    "text-generation": (
        "text-generation==0.7.0", "aiohttp==3.14.5", "aiohappyeyeballs==2.7.1",
        "aiosignal==1.4.0", "attrs==26.1.0", "frozenlist==1.8.0", "multidict==7.2.1",
        "propcache==0.5.4", "yarl==1.25.1", *HUB_0,
    ),
    "schemathesis": (
        "schemathesis==4.32.5", "graphql_core==3.3.2", "harfile==0.6.0",
        "hypothesis_graphql==0.13.5", "jsonschema_rs==0.60.3", "pyrate_limiter==4.5.1",
        "werkzeug==3.1.9", "requests==2.34.2", "urllib3==2.8.0", "certifi==2026.10.19.post1",
        "charset_normalizer==3.5.3",
    ),
}  # fmt: skip


def folder(name: str) -> Path:
    """Where a client lies; installed first unless just these versions are there."""
    target, pins = ROOT / name, "\n".join(PINS[name])
    stamp = target / "pins.txt"
    if not stamp.is_file() or stamp.read_text() != pins:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        subprocess.run([*command, "--target", str(target), *PINS[name]], check=True)
        stamp.write_text(pins)
    return target


if __name__ == "__main__":
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(folder, PINS))
