"""Sampling options as fields of a body, made from the one place where they are written down."""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, create_model

from kvrun.runtime.sampling.params import Option, SamplingParams
from kvrun.server.schemas.common import Body

TYPES: dict[str, Any] = {
    "int": int,
    "float": float,
    "bool": bool,
    "texts": str | list[str],
    "ids": list[int],
    "biases": dict[str, float],
}
# OpenAI's way to ask for these is `echo` with `logprobs`, TGI's is decoder_input_details.
ASKED_OTHERWISE = {"prompt_logprobs"}


def _field(option: Option) -> tuple[Any, Any]:
    kind: Any = TYPES[option.type]
    limits: dict[str, Any] = {}
    if option.bounds:
        low = "gt" if option.bounds.above else "ge"
        limits = {low: option.bounds.low, "le": option.bounds.high}
    limited = Annotated[kind, Field(**limits)] if limits else kind
    return limited | None, Field(default=None, description=option.help)


if TYPE_CHECKING:
    Sampling = Body
else:
    Sampling = create_model(
        "Sampling",
        __base__=Body,
        **{o.name: _field(o) for o in SamplingParams.options() if o.name not in ASKED_OTHERWISE},
    )
