"""A short list of models people ask for; whether kvrun runs one is asked when it is shown."""

import difflib
from typing import NamedTuple

from kvrun.hub.local import NEAR, near


class Known(NamedTuple):
    """A repository: its architecture, parameters, bytes of its weights, and who may fetch it."""

    name: str
    model_type: str
    parameters: str
    bytes: int
    context: int
    gated: bool = False


MODELS = (
    Known("HuggingFaceTB/SmolLM2-135M-Instruct", "llama", "135M", 269_000_000, 8192),
    Known("HuggingFaceTB/SmolLM2-360M-Instruct", "llama", "362M", 724_000_000, 8192),
    Known("Qwen/Qwen2.5-0.5B-Instruct", "qwen2", "494M", 988_000_000, 32768),
    Known("Qwen/Qwen3-0.6B", "qwen3", "0.6B", 1_500_000_000, 40960),
    Known("google/gemma-3-1b-it", "gemma3_text", "1.0B", 2_000_000_000, 32768, True),
    Known("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "llama", "1.1B", 2_200_000_000, 2048),
    Known("meta-llama/Llama-3.2-1B-Instruct", "llama", "1.2B", 2_470_000_000, 131072, True),
    Known("allenai/OLMo-2-0425-1B-Instruct", "olmo2", "1.5B", 2_970_000_000, 4096),
    Known("HuggingFaceTB/SmolLM2-1.7B-Instruct", "llama", "1.7B", 3_420_000_000, 8192),
    Known("Qwen/Qwen3-1.7B", "qwen3", "1.7B", 4_060_000_000, 40960),
    Known("google/gemma-2-2b-it", "gemma2", "2.6B", 5_230_000_000, 8192, True),
    Known("HuggingFaceTB/SmolLM3-3B", "smollm3", "3.1B", 6_150_000_000, 65536),
    Known("meta-llama/Llama-3.2-3B-Instruct", "llama", "3.2B", 6_430_000_000, 131072, True),
    Known("microsoft/Phi-3.5-mini-instruct", "phi3", "3.8B", 7_640_000_000, 131072),
    Known("Qwen/Qwen3-4B", "qwen3", "4.0B", 8_040_000_000, 40960),
    Known("Qwen/Qwen2.5-7B-Instruct", "qwen2", "7.6B", 15_200_000_000, 32768),
    Known("meta-llama/Llama-3.1-8B-Instruct", "llama", "8.0B", 16_100_000_000, 131072, True),
    Known("Qwen/Qwen3-8B", "qwen3", "8.2B", 16_400_000_000, 40960),
    Known("google/gemma-2-9b-it", "gemma2", "9.2B", 18_500_000_000, 8192, True),
    Known("microsoft/phi-4", "phi3", "14.7B", 29_300_000_000, 16384),
    Known("Qwen/Qwen3-14B", "qwen3", "14.8B", 29_500_000_000, 40960),
    Known("google/gemma-2-27b-it", "gemma2", "27.2B", 54_500_000_000, 8192, True),
    Known("Qwen/Qwen3-30B-A3B", "qwen3_moe", "30.5B", 61_100_000_000, 40960),
    Known("Qwen/Qwen3-32B", "qwen3", "32.8B", 65_500_000_000, 40960),
    Known("meta-llama/Llama-3.3-70B-Instruct", "llama", "70.6B", 141_100_000_000, 131072, True),
)


def suggest(name: str) -> str | None:
    """A name that is much like `name`: of a model that is here, else of the list."""
    wanted = name.partition("@")[0]
    here = [one for one in near(wanted) if one != wanted]
    if here:
        return here[0]
    by_spelling = {known.name.casefold(): known.name for known in MODELS}
    by_spelling |= {known.name.casefold().rpartition("/")[2]: known.name for known in MODELS}
    for spelling in (wanted.casefold(), wanted.casefold().rpartition("/")[2]):
        for found in difflib.get_close_matches(spelling, by_spelling, 1, NEAR):
            if by_spelling[found] != wanted:
                return by_spelling[found]
    return None
