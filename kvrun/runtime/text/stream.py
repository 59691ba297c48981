"""TextStream: token ids in as they arrive, text out that will not change; stop strings."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no UTF-8, or not yet


class Stop(NamedTuple):
    """An occurrence of a stop string."""

    start: int
    end: int
    text: str


class StopFinder:
    """Lets text through until a stop string is complete; holds back what may become one.

    The occurrence that ends first wins, and of those the longest: the same wherever the text is
    cut into pieces.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self.found: Stop | None = None
        self._stops = tuple(stops)
        self._include = include
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def look(self, text: str) -> Stop | None:
        """The stop that would be found if `text` came next."""
        ahead = self._held + text
        hits = [
            Stop(start, start + len(stop), stop)
            for stop in self._stops
            if (start := ahead.find(stop)) >= 0
        ]
        return min(hits, key=lambda hit: (hit.end, hit.start), default=None)

    def feed(self, text: str) -> str:
        """What of the held text and `text` is certain to be part of the answer."""
        self.found = self.look(text)
        text = self._held + text
        if self.found is not None:
            self._held = ""
            return text[: self.found.end if self._include else self.found.start]
        keep = self._beginning_at_end(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once nothing follows."""
        held, self._held = self._held, ""
        return held

    def _beginning_at_end(self, text: str) -> int:
        for size in range(min(len(text), self._longest - 1), 0, -1):
            tail = text[len(text) - size :]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0


class TextStream:
    """Incremental decoding of one answer.

    The texts of all `push` calls and of `finish` joined are the decoded answer, cut at the first
    stop string. Text is given out once no later token can change it: not while a character still
    lacks bytes, nor inside a run of byte tokens, which a decoder reads as a whole.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skipped_ids: Iterable[int] = (),
        byte_ids: Iterable[int] = (),
    ) -> None:
        """`skipped_ids` give no text; `byte_ids` are the tokens of a byte-fallback decoder."""
        self.tokens_used = 0  # ids pushed, up to the one that completed the stop string
        self._tokenizer = tokenizer
        self._finder = StopFinder(stop, include_stop)
        self._skipped = frozenset(skipped_ids)
        self._bytes = frozenset(byte_ids)
        # A window of ids: those of the last text given out, which tell the decoder that it is not
        # at the beginning, and those whose text has not been given out completely.
        self._ids: list[int] = []
        self._settled = 0  # ids of the window whose text has been given out
        self._shown = 0  # characters of the window's text that have been given out

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met; no text follows it."""
        return self._finder.found is not None

    @property
    def stop_reason(self) -> str | None:
        """The stop string that was met."""
        return None if self._finder.found is None else self._finder.found.text

    @property
    def unsettled(self) -> int:
        """Characters that are whole, but not given out: a later token could change them."""
        return len(self._decode(self._ids)[self._shown :].rstrip(REPLACEMENT))

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids make certain."""
        pieces = []
        for token in ids:
            if self.stopped:
                break
            self.tokens_used += 1
            # Decoders pass over ids without a token: two byte tokens around one are neighbours.
            if token not in self._skipped and self._tokenizer.id_to_token(token) is not None:
                pieces.append(self._take(token))
        return "".join(pieces)

    def finish(self) -> str:
        """The rest of the text, when no id follows."""
        if self.stopped:
            return ""
        rest = self._decode(self._ids)[self._shown :]
        self._ids, self._settled, self._shown = [], 0, 0
        text = self._finder.feed(rest)
        return text if self.stopped else text + self._finder.flush()

    def _take(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode(self._ids)
        pending = text.endswith(REPLACEMENT)
        if token in self._bytes:
            # Only a stop string can make it certain, because then nothing follows.
            fresh = text[self._shown :]
            return "" if pending or self._finder.look(fresh) is None else self._finder.feed(fresh)
        # A character that lacks bytes shows as one replacement character, the last.
        fresh = text[self._shown : len(text) - pending]
        self._shown = max(self._shown, len(text) - pending)
        if not pending:
            self._slide()
        return self._finder.feed(fresh)

    def _slide(self) -> None:
        """Forget all ids but the newest with a text of their own."""
        newest = self._ids[self._settled :]
        alone = self._decode(newest)
        if alone:
            self._ids, self._settled, self._shown = newest, len(newest), len(alone)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)
