"""One answer taken apart: thoughts first, then text and calls."""

import sys

from astrai_core.tokenizer.message_parsing.markup import OPENERS, SPACE, Markup, ToolStyle, Where
from astrai_core.tokenizer.message_parsing.reader import EndOfTextError, Reading
from astrai_core.tokenizer.message_parsing.tool_calls import CallReader


class MessageParser(CallReader):
    """Takes one answer apart; made by `MessageFormat.parser`.

    Args:
        format: the model's.
        where: where the answer begins.
        reads_tools: whether calls are told apart.
    """

    def __init__(
        self,
        format: Markup,  # noqa: A002 - the word that fits
        *,
        where: Where,
        reads_tools: bool,
    ):
        self.format = format
        self._thoughts = (0, 0)  # characters at which they were opened and closed
        self._where: Where = where
        self._reads_tools = reads_tools
        super().__init__()

    def thinks_after(self, num_characters: int) -> bool:
        """Whether the text fed so far, cut after so many characters, ends within thoughts."""
        opened, closed = self._thoughts
        return opened <= num_characters < closed

    def _read(self) -> Reading:
        where = self._where
        try:
            if where == "start" and self.format.thoughts is not None:
                opens = yield from self._begins_with(self.format.thoughts[0])
                where = "thoughts" if opens else "content"
            if where == "thoughts" and self.format.thoughts is not None:
                self._thoughts = (self.num_characters, sys.maxsize)
                yield from self._skip("\n")
                yield from self._text_until(self.format.thoughts[1], self._think, "\n")
                self._thoughts = (self._thoughts[0], self.num_characters)
                yield from self._skip("\n")
            if self._reads_tools and self.format.tools is not None:
                yield from self._read_content(self.format.tools)
            while True:
                self._say((yield from self._next()))
        except EndOfTextError:
            return

    def _read_content(self, style: ToolStyle) -> Reading:
        """Text with calls in it; ends with the text."""
        if style == "llama":
            yield from self._attempt(self._read_bare_calls())
        while True:
            space = yield from self._text_until(OPENERS[style], self._say, SPACE)
            self._pending = [space, OPENERS[style]]
            yield from self._read_calls(style)
