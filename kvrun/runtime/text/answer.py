"""Answer: the token ids of one answer in, its text out; where it ends, and what is counted."""

from kvrun.runtime.text.stream import TextStream


class Answer:
    """One choice of one request, as whoever shows it needs it.

    `finish_reason` is the engine's, or "stop" once a stop string was met: what the engine computed
    beyond it is dropped and not counted. Without a tokenizer (`stream` is None) there is no text.
    """

    def __init__(self, stream: TextStream | None) -> None:
        self._stream = stream
        self.text = ""
        self.tokens = 0
        self.finish_reason: str | None = None

    def take(self, token_ids: list[int], finish_reason: str | None) -> tuple[str, int]:
        """Take in what the engine says next.

        Returns the text that has become final, and how many of `token_ids` belong to the answer.
        A token that ends the answer (end of text, a stop id) is counted and has no text.
        """
        if self.finish_reason:  # a stop string was met; the engine had not heard of it yet
            return "", 0
        stream = self._stream
        counted = len(token_ids)
        piece = ""
        if stream is not None:
            ended = finish_reason == "stop" and token_ids
            piece = stream.push(token_ids[:-1] if ended else token_ids)
            if finish_reason:
                piece += stream.finish()  # what could still have become a stop string
            if stream.stopped:
                counted = stream.tokens_used - self.tokens
                finish_reason = "stop"
        self.text += piece
        self.tokens += counted
        self.finish_reason = finish_reason
        return piece, counted
