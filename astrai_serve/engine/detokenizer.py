"""From tokens to text that may be shown, one token at a time.

A token may be part of a character, and text may become part of a stop string: both are held back
just as long as they could. So what was streamed is exactly the text of the whole answer.
"""

import codecs
from collections.abc import Callable, Sequence


class StopMatcher:
    """Finds the first stop string to be completed; of several that end together, the longest.

    That depends on the characters alone, and not on how they arrived.
    """

    def __init__(self, stop: Sequence[str]):
        self.stop = tuple(stop)
        self.matched: str | None = None
        self._held = ""

    def feed(self, text: str, may_stop: bool = True) -> str:
        """Add text and return what can no longer be part of a stop string.

        Args:
            text: what follows.
            may_stop: whether a stop string that ends in this text counts.
        """
        if not self.stop or not text:
            return text
        num_old = len(self._held)
        text, self._held = self._held + text, ""
        ends = [
            (start + len(stop), start, stop)
            for stop in self.stop
            # one that ended in older text did not count
            if may_stop and (start := text.find(stop, max(0, num_old + 1 - len(stop)))) >= 0
        ]
        if ends:
            _, start, self.matched = min(ends)
            return text[:start]
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def release(self) -> str:
        """Return what was held back, for nothing follows."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that is a proper beginning of a stop string."""
        longest = min(len(text), max(len(stop) for stop in self.stop) - 1)
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self.stop):
                return length
        return 0


class Detokenizer:
    """Text of one task.

    Args:
        token_bytes: the bytes of a token; none for a control token.
        stop: strings that end the text and are not part of it.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stop: Sequence[str] = ()):
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._matcher = StopMatcher(stop)

    @property
    def stop(self) -> str | None:
        """The stop string that was met."""
        return self._matcher.matched

    def feed(self, token_id: int, may_stop: bool = True) -> str:
        """Add a token and return the text that has become certain.

        Args:
            token_id: the token.
            may_stop: whether a stop string that ends in this token counts.
        """
        text = self._decoder.decode(self._token_bytes(token_id))
        return self._matcher.feed(text, may_stop)

    def finish(self, cut_off: bool = False) -> str:
        """Return what was held back.

        Args:
            cut_off: the text could have gone on, so that half a character at its end is no error
                of the model, and is left out.
        """
        if self.stop is not None:
            return ""
        text = "" if cut_off else self._matcher.feed(self._decoder.decode(b"", final=True))
        return text if self.stop is not None else text + self._matcher.release()
