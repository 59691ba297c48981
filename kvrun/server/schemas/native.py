"""Text Generation Inference's bodies and answers, and those of the routes beside them."""

from typing import Any

from pydantic import ConfigDict, Field

from kvrun.server.schemas.common import Answer, Body


class Parameters(Body):
    """Ranges are checked later, so that they are told in the words clients know."""

    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool | None = None
    max_new_tokens: int | None = None
    return_full_text: bool | None = None
    stop: list[str] | None = None
    truncate: int | None = None
    watermark: bool | None = Field(default=None, description="not supported: must not be true")
    details: bool | None = None
    decoder_input_details: bool | None = None
    seed: int | None = None
    top_n_tokens: int | None = None
    grammar: dict[str, Any] | None = Field(default=None, description="not supported: must be null")
    adapter_id: str | None = None
    lora_id: str | None = None


class GenerateBody(Body):
    inputs: str
    parameters: Parameters | None = None


class CompatBody(GenerateBody):
    stream: bool | None = None


class PrefillToken(Answer):
    id: int
    text: str
    logprob: float | None


class Token(Answer):
    id: int
    text: str
    logprob: float
    special: bool


class Sequence(Answer):
    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | None = None


class Details(Answer):
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | None = None
    best_of_sequences: list[Sequence] | None = None


class GenerateResponse(Answer):
    generated_text: str
    details: Details | None = None


class SimpleToken(Answer):
    id: int
    text: str
    start: int
    stop: int


class Tokens(Answer):
    tokens: list[int]
    count: int
    max_model_len: int


class TokenizeBody(Body):
    """TGI's body has `inputs`, vLLM's has `prompt`."""

    inputs: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None


class ChatTokenized(Answer):
    tokenize_response: list[SimpleToken]
    templated_text: str


class DetokenizeBody(Body):
    tokens: list[int]


class Detokenized(Answer):
    prompt: str


class TokenizerInfo(Answer):
    model_config = ConfigDict(extra="allow")

    eos_token: str | None = None


class Version(Answer):
    version: str


class Info(Answer):
    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    model_dtype: str
    model_device_type: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_input_length: int
    max_total_tokens: int
    max_batch_total_tokens: int
    max_batch_size: int
    max_client_batch_size: int
    max_waiting_tokens: int
    waiting_served_ratio: float
    validation_workers: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None
