"""Messages of a conversation -> token ids, by the model's own template."""

from collections.abc import Sequence
from typing import Any

from kvrun.errors import InvalidRequest, KvrunError
from kvrun.runtime.text import Prompt
from kvrun.runtime.text.images import NO_EYES, file_of, taken_out
from kvrun.server.errors import ApiError
from kvrun.server.schemas.openai import Message, Part
from kvrun.server.service import Service

IMAGES = ("image_url", "input_image")  # parts of chats, and of responses


async def encode(service: Service, messages: Sequence[Message]) -> Prompt:
    """Token ids up to where the answer begins, and the images they have places for.

    Raises ApiError (template) if that cannot be, (validation) for images that are not taken.
    """
    if not service.text.chat_template_known:
        raise ApiError("template", "The model has no chat template; use /v1/completions.")
    service.refuse_bulk(sum(_size(message) for message in messages), "messages")
    if service.text.images is None and any(_shows(message) for message in messages):
        raise ApiError("validation", NO_EYES[0].upper() + NO_EYES[1:], param="messages")
    plain = [_plain(message, number) for number, message in enumerate(messages)]
    await _look(service, taken_out(plain)[1])
    open_ended = plain[-1]["role"] == "assistant"
    try:
        return await service.in_thread(
            lambda: service.text.converse(plain, continue_final=open_ended)
        )
    except InvalidRequest as error:
        words = f"{error.what} {error.cause}".strip()
        raise ApiError("template", words[:300], param="messages") from None


async def _look(service: Service, files: list[bytes]) -> None:
    """Refuse images that are not taken before anything else is said of the messages."""
    images = service.text.images
    if not files or images is None:
        return
    try:
        await service.in_thread(images.look, files)
    except KvrunError as error:
        raise ApiError("validation", error.in_one_line[:300], param="messages") from None


def _shows(message: Message) -> bool:
    content = message.content
    return isinstance(content, list) and any(part.type in IMAGES for part in content)


def _size(message: Message) -> int:
    """Characters of a message, without its images."""
    content = message.content
    texts = [part.text or "" for part in content] if isinstance(content, list) else [content or ""]
    return sum(map(len, texts)) + len(str(message.model_extra or ""))


def _plain(message: Message, number: int) -> dict[str, Any]:
    """As templates know it: text in one piece, and OpenAI's newer word for system."""
    given = {name: value for name, value in (message.model_extra or {}).items() if value}
    role = "system" if message.role == "developer" else message.role
    return {**given, "role": role, "content": _content(message, number)}


def _content(message: Message, number: int) -> str | list[dict[str, Any]]:
    """Its text in one piece, or the parts of a message that shows images."""
    if not isinstance(message.content, list):
        return message.content or ""
    parts = [_part(part, f"{number}, part {n}") for n, part in enumerate(message.content)]
    if any(part["type"] == "image" for part in parts):
        return parts
    return "\n".join(part["text"] for part in parts)


def _part(part: Part, where: str) -> dict[str, Any]:
    if part.type in ("text", "input_text", "output_text") and part.text is not None:
        return {"type": "text", "text": part.text}
    if part.type in IMAGES and part.image_url is not None:
        given = part.image_url
        try:
            return {
                "type": "image",
                "image": file_of(given if isinstance(given, str) else given.url),
            }
        except InvalidRequest as error:
            raise ApiError(
                "validation", f"Message {where}: {error.in_one_line}", param="messages"
            ) from None
    raise ApiError(
        "validation",
        f"Message {where}, is neither text nor an image.",
        param="messages",
    )
