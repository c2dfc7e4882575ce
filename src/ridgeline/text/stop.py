"""Stop strings: how much of a growing text may be shown, and where the text ends.

Knows text and, through `TextStream`, which output token completed it. Must not know requests or the
engine: whoever owns the request reads `stopped_at` and tells the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ridgeline.core.errors import InvalidArgument
from ridgeline.text.detokenizer import StreamDetokenizer
from ridgeline.text.tokenizer import Tokenizer


class StopStrings:
    """Finds the first stop string in a text that arrives in pieces.

    The first is the one that is completed first (its last character comes first); of several that
    end with the same character, the longest. So the answer depends on the text alone, never on how
    it was cut into pieces, and no match waits for text that may not come. Text that may be the
    beginning of a stop string is held back.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        """`include_stop` shows the stop string as the end of the text.

        Raises InvalidArgument("stop") for an empty stop string.
        """
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise InvalidArgument("stop", "expected a list of strings of at least one character")
        self._stops = tuple(dict.fromkeys(stops))
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str, may_stop: bool = True) -> tuple[str, str | None]:
        """The text that may be shown now, and the stop string if one is completed by `text`.

        With `may_stop` false, stop strings that `text` completes are ordinary text; one that it
        only begins can still be completed later. After a match, what stands behind it is dropped;
        the next push begins a new text.
        """
        # A match cannot begin before what is held: all that was shown could not begin one.
        held = len(self._held)
        text = self._held + text
        if may_stop:
            # Only what reaches beyond the held text is completed now: held text may contain a stop
            # string that a push with may_stop false has let pass.
            found = [
                (at + len(stop), at, stop)
                for stop in self._stops
                if (at := text.find(stop, max(0, held - len(stop) + 1))) >= 0
            ]
            if found:
                self._held = ""
                end, start, stop = min(found)
                return text[: end if self._include_stop else start], stop
        shown = len(text) - self._undecided(text)
        self._held = text[shown:]
        return text[:shown], None

    def flush(self) -> str:
        """The text held back; to be called when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with, short of all of it."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest


@dataclass(frozen=True)
class TextDelta:
    """What one push added: text to show, and once it is known, where and by what it was stopped.

    `stopped_at` counts output tokens up to and including the one that completed `stop`.
    """

    text: str
    stopped_at: int | None = None
    stop: str | None = None


class TextStream:
    """The text of one output as a reader may see it: whole characters, cut at the stop string.

    Tokens are taken one at a time, so that `stopped_at` is exact however many come in a push.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        """Stop strings that the first `min_tokens` output tokens complete do not stop.

        Raises InvalidArgument("stop") for an empty stop string.
        """
        self._detokenizer = StreamDetokenizer(tokenizer, prompt_ids, skip_special_tokens)
        self._stops = StopStrings(stop, include_stop) if stop else None
        self._min_tokens = min_tokens
        self._tokens = 0
        self._stopped_at: int | None = None
        self._stop: str | None = None
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All text shown so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def push(self, ids: Sequence[int]) -> TextDelta:
        """Takes the next output ids. Those behind the stop are dropped, in this push and later ones."""
        if self._stopped_at is not None:
            return TextDelta("", self._stopped_at, self._stop)
        if self._stops is None:
            self._tokens += len(ids)
            return self._show([self._detokenizer.push(ids)])
        shown = []
        for token_id in ids:
            self._tokens += 1
            shown.append(self._until_stop(self._stops, self._detokenizer.push((token_id,))))
            if self._stopped_at is not None:
                break
        return self._show(shown)

    def finish(self) -> TextDelta:
        """The output has ended without a stop string: gives out whatever was held back."""
        if self._stopped_at is not None:
            return TextDelta("", self._stopped_at, self._stop)
        shown = [self._detokenizer.finish()]
        if self._stops is not None:
            shown = [self._until_stop(self._stops, shown[0]), self._stops.flush()]
        return self._show(shown)

    def _until_stop(self, stops: StopStrings, text: str) -> str:
        if not text:
            return ""
        shown, self._stop = stops.push(text, may_stop=self._tokens > self._min_tokens)
        if self._stop is not None:
            self._stopped_at = self._tokens
        return shown

    def _show(self, parts: list[str]) -> TextDelta:
        text = "".join(parts)
        if text:
            self._parts.append(text)
        return TextDelta(text, self._stopped_at, self._stop)
