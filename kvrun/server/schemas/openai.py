"""OpenAI's bodies and answers, as far as they are served."""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from kvrun.server.schemas.common import Answer, Body
from kvrun.server.schemas.sampling import Sampling

Role = Literal["system", "developer", "user", "assistant", "tool"]
MAX_MESSAGES = 1024


class StreamOptions(Body):
    include_usage: bool | None = Field(default=None, description="one more chunk, with the usage")
    continuous_usage_stats: bool | None = Field(
        default=None, description="the usage in every chunk"
    )


class Common(Sampling):
    """What completions and chats have in common."""

    model: str | None = Field(default=None, description="the model or an adapter; none: the model")
    adapter_id: str | None = Field(default=None, description="an adapter, TGI's way")
    lora_id: str | None = Field(default=None, description="an adapter, kv.run's way")
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class CompletionBody(Common):
    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="text, token ids, or a list of either"
    )
    max_tokens: int | None = Field(default=None, ge=0, description="most tokens to generate")
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = Field(default=None, description="begin the text with the prompt")
    best_of: int | None = Field(
        default=None, ge=1, description="generate so many, return the n likeliest"
    )
    suffix: str | None = Field(default=None, description="not supported: must be null or empty")


class ImageUrl(Body):
    url: str = Field(description="a data: URL of a PNG or JPEG file in base64; none is fetched")


class Part(Body):
    type: str = Field(description="text or image_url")
    text: str | None = None
    image_url: ImageUrl | str | None = None


class Message(Body):
    role: Role
    content: str | list[Part] | None = None


class ChatBody(Common):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(default=None, ge=1, description="most tokens to generate")
    max_completion_tokens: int | None = Field(
        default=None, ge=1, description="goes before max_tokens"
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)


class ResponsesBody(Common):
    input: str | list[Message]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, description="goes before max_tokens")


class EmbeddingsBody(Body):
    input: str | list[str] | list[int] | list[list[int]] = Field(
        description="text, token ids, or a list of either"
    )
    model: str | None = Field(default=None, description="the model or an adapter; none: the model")
    adapter_id: str | None = Field(default=None, description="an adapter, TGI's way")
    lora_id: str | None = Field(default=None, description="an adapter, kv.run's way")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1, description="keep the first so many values")


class EmbeddingsUsage(Answer):
    prompt_tokens: int
    total_tokens: int


class Embedding(Answer):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(Answer):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


class ResponseObject(Answer):
    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any]


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None


class CompletionLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class TokenLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Answer):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatMessage(Answer):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(Answer):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class Chat(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    permission: list[Any]


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelCard]
