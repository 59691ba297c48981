"""Messages of a conversation -> token ids, by the model's own template."""

from collections.abc import Sequence
from typing import Any

from kvrun.errors import InvalidRequest
from kvrun.server.errors import ApiError
from kvrun.server.schemas.openai import Message
from kvrun.server.service import Service


async def encode(service: Service, messages: Sequence[Message]) -> list[int]:
    """Token ids up to where the answer begins. Raises ApiError (template) if that cannot be."""
    if not service.text.chat_template_known:
        raise ApiError("template", "The model has no chat template; use /v1/completions.")
    plain = [_plain(message, number) for number, message in enumerate(messages)]
    size = sum(len(str(value)) for message in plain for value in message.values())
    service.refuse_bulk(size, "messages")
    open_ended = plain[-1]["role"] == "assistant"
    try:
        return await service.in_thread(lambda: service.text.chat(plain, continue_final=open_ended))
    except InvalidRequest as error:
        words = f"{error.what} {error.cause}".strip()
        raise ApiError("template", words[:300], param="messages") from None


def _plain(message: Message, number: int) -> dict[str, Any]:
    """As templates know it: text in one piece, and OpenAI's newer word for system."""
    given = {name: value for name, value in (message.model_extra or {}).items() if value}
    role = "system" if message.role == "developer" else message.role
    return {**given, "role": role, "content": _text(message, number)}


def _text(message: Message, number: int) -> str:
    if not isinstance(message.content, list):
        return message.content or ""
    for part in message.content:
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise ApiError(
                "validation",
                f"Message {number} has a part that is no text; the model reads only text.",
                param="messages",
            )
    return "\n".join(part.text or "" for part in message.content)
