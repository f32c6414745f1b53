"""Stop strings in streamed text: found across chunks, and never shown in part."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches the text of one answer for the first stop string."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = [word for word in words if word]
        self._held = ""

    def push(self, chunk: str, *, counts: bool = True) -> tuple[str, bool]:
        """Add text; returns what may be shown, and whether a stop string was found (it is not shown).

        Args:
            counts: whether the text may end the answer; one that may not is shown at once.
        """
        text = self._held + chunk
        if not counts:
            self._held = ""
            return text, False
        found = [position for word in self._words if (position := text.find(word)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The text that was held back, when the answer ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """The length of the longest end of `text` that a stop string could begin with."""
        longest = 0
        for word in self._words:
            for length in range(min(len(word) - 1, len(text)), longest, -1):
                if text.endswith(word[:length]):
                    longest = length
                    break
        return longest
