"""Calls of tools as each family of models writes them."""

from collections.abc import Generator

from astrai_core.tokenizer.incremental_json import JsonScanner
from astrai_core.tokenizer.message_parsing.call_object import CallObject
from astrai_core.tokenizer.message_parsing.deltas import (
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from astrai_core.tokenizer.message_parsing.markup import (
    CALL_BEGIN,
    CALL_END,
    CALLS_END,
    SEPARATOR,
    ToolStyle,
)
from astrai_core.tokenizer.message_parsing.reader import (
    MAX_NAME,
    NAME_CHARACTERS,
    AnswerReader,
    EndOfTextError,
    MalformedError,
    Reading,
)


class CallReader(AnswerReader):
    """Reads calls, and gives back as content what turns out to be none."""

    def __init__(self) -> None:
        self.num_calls = 0
        """Calls told of so far."""
        self._open: int | None = None  # the call whose arguments are coming
        self._is_whole = False  # and whether they have all come
        super().__init__()

    def _read_calls(self, style: ToolStyle) -> Reading:
        """Read what follows the opener of a style."""
        match style:
            case "hermes":
                reading = self._read_hermes_call()
            case "llama":
                reading = self._read_joined_calls()
            case "mistral" | "mistral_named":
                reading = self._read_mistral_calls()
            case "deepseek" | "deepseek_fenced":
                reading = self._read_deepseek_calls()
        yield from self._attempt(reading)

    def _attempt(self, reading: Reading) -> Reading:
        """Read calls; what is none of theirs is content."""
        try:
            yield from reading
        except MalformedError as error:
            if error.again:
                self._unread(self._pending.pop())
            self._give_back()
        except EndOfTextError:
            self._give_back()
            raise

    def _give_back(self) -> None:
        if self._open is not None:
            self._end_call()
        text, self._pending = "".join(self._pending), []
        self._release(self._say, text)

    def _read_hermes_call(self) -> Reading:
        yield from self._read_call(closer="<")
        yield from self._expect("</tool_call>")

    def _read_bare_calls(self) -> Reading:
        """Llama's calls without a mark, at the very start of an answer."""
        yield from self._read_call(is_bare=True)
        yield from self._read_more_calls()

    def _read_joined_calls(self) -> Reading:
        yield from self._read_call()
        yield from self._read_more_calls()

    def _read_more_calls(self) -> Reading:
        while True:
            yield from self._expect(";")
            yield from self._read_call()

    def _read_mistral_calls(self) -> Reading:
        character = yield from self._take_after_space()
        if character == "[":
            while character != "]":
                yield from self._read_call()
                character = yield from self._expect(",", "]")
            return
        name = ""
        while character in NAME_CHARACTERS and len(name) < MAX_NAME:
            name += character
            character = yield from self._take()
        while character == "[":
            character = yield from self._read_mistral_mark()
        if not name or character != "{":
            raise MalformedError
        yield from self._read_arguments(name)

    def _read_mistral_mark(self) -> Generator[None, str, str]:
        """Read `[ARGS]`, or `[CALL_ID]` and the id; return the character after it."""
        mark = "["
        while mark not in ("[ARGS]", "[CALL_ID]"):
            mark += yield from self._take()
            if not any(known.startswith(mark) for known in ("[ARGS]", "[CALL_ID]")):
                raise MalformedError
        character = yield from self._take_after_space()
        while mark == "[CALL_ID]" and character in NAME_CHARACTERS:
            character = yield from self._take()
        return character

    def _read_deepseek_calls(self) -> Reading:
        mark = yield from self._expect(CALL_BEGIN, keep=True)
        while mark == CALL_BEGIN:
            name = yield from self._take_name(SEPARATOR)
            character = yield from self._take_after_space()
            is_fenced = character != "{"
            if is_fenced:
                name = character + (yield from self._take_name("```json"))
                character = yield from self._take_after_space()
            if not name.strip() or character != "{":
                raise MalformedError
            yield from self._read_arguments(name.strip())
            if is_fenced:
                yield from self._expect("```")
            yield from self._expect(CALL_END)
            mark = yield from self._expect(CALL_BEGIN, CALLS_END)

    def _read_call(self, closer: str = "", is_bare: bool = False) -> Reading:
        """Read an object with a name and arguments.

        Args:
            closer: what may follow at once on the arguments of an object that was not closed.
            is_bare: nothing marks it as a call, so it must have both and little else.
        """
        call = CallObject(is_bare)
        while not call.is_complete:
            character = yield from self._take()
            try:
                call.feed(character)
            except ValueError:
                if self._open is not None and call.has_arguments and character == closer:
                    self._unread(self._pending.pop())
                    break  # a brace was forgotten
                raise MalformedError from None
            if call.name is not None and call.fresh:
                if self._open is None:
                    self._start_call(call.name)
                self._argue(call.take_fresh())
            self._is_whole = call.has_arguments
        if self._open is None:
            if call.name is None or is_bare:
                raise MalformedError(again=False)
            self._start_call(call.name)
            self._argue("{}")
            self._is_whole = True
        self._pending = []
        self._end_call()

    def _read_arguments(self, name: str) -> Reading:
        """Read an object of arguments whose brace was taken."""
        self._start_call(name)
        scanner = JsonScanner()
        self._argue(scanner.feed("{"))
        while not scanner.is_complete:
            character = yield from self._take()
            try:
                written = scanner.feed(character)
            except ValueError:
                raise MalformedError from None
            self._argue(written)
        self._is_whole = True
        self._end_call()

    def _start_call(self, name: str) -> None:
        self._open = self.num_calls
        self._is_whole = False
        self.num_calls += 1
        self._tell(ToolCallStart(self._open, name))

    def _argue(self, text: str) -> None:
        assert self._open is not None
        self._pending = []
        self._tell(ToolCallArguments(self._open, text))

    def _end_call(self) -> None:
        assert self._open is not None
        self._tell(ToolCallEnd(self._open, self._is_whole))
        if self._is_whole:
            self._after_call = True
        self._open = None
