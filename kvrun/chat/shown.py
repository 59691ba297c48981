"""What is asked and shown in one question of the command line."""

from typing import Any

from kvrun.chat.pictures import content, named
from kvrun.chat.plain import note
from kvrun.errors import InvalidRequest
from kvrun.runtime.text.images import NO_EYES, SEEING, file_at, sees


def with_images(
    question: str | None, typed: str | None, images: list[str], folder: str
) -> str | list[dict[str, Any]]:
    """What the message of a question holds: beside `images` those that are named in what of it was
    `typed`, which a line on stderr says; each is looked for before anything is started.

    Raises InvalidRequest or NotFound for images that cannot be shown.
    """
    if question is None:
        if images:
            raise InvalidRequest(
                "--image needs a prompt.", hint="in a conversation, write its path in a question"
            )
        return ""
    found: list[str] = []
    if sees(folder):
        rest, found = named(typed or "")  # what is piped in names no files
        if typed and found:
            question = question.removesuffix(typed) + rest
    elif images:
        raise InvalidRequest(NO_EYES, hint=f"models that see: {', '.join(SEEING)}")
    for path in images + found:
        file_at(path)
    for path in found:
        note(f"with the image {path}")
    return content(question, images + found)
