"""What a model says, taken apart: what it thinks, what it answers, and the tools it calls.

A chat template fixes how a model writes thoughts and calls; `MessageFormat.of` reads it off the
template. `MessageParser` takes the text as it comes and gives typed deltas. It reads one character
after another and decides by what it has read alone, so however a text is cut into pieces, the
deltas join to the same message. It holds back only what could still become markup.

    format = MessageFormat.of(tokenizer)
    parser = format.parser(prompt=tokenizer.decode(prompt_ids[-16:], False), reads_tools=True)
    for text in stream:
        for delta in parser.feed(text): ...
    for delta in parser.finish(): ...

A call is told as soon as its name is known and its arguments begin. What cannot be a call comes out
as content, to the last character. What turns out to be none only after it was told ends with
`is_complete=False`, and the rest of its text is content.

Markup may be control tokens, which have no text: give `MessageFormat.control_texts` to
`SamplingParams` so that the engine writes them out.
"""

import contextlib
import json
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Literal

from astrai_core.tokenizer.incremental_json import JsonScanner
from astrai_core.tokenizer.tokenizer import AutoTokenizer

ToolStyle = Literal["hermes", "llama", "mistral", "mistral_named", "deepseek", "deepseek_fenced"]
"""How calls are written, NAME and {} being what they call and with what:

hermes           <tool_call>\\n{"name": NAME, "arguments": {}}\\n</tool_call>, also Qwen's
llama            {"name": NAME, "parameters": {}}, bare or after <|python_tag|>, joined by ;
mistral          [TOOL_CALLS] [{"name": NAME, "arguments": {}}, ...]
mistral_named    [TOOL_CALLS]NAME[ARGS]{}, since version 11 of its tokenizers
deepseek         <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{}<｜tool▁call▁end｜>, since V3.1
deepseek_fenced  with the word `function` as NAME, then NAME and {} in a fence of JSON; V3, R1

The parser tells the two of Mistral, and the two of DeepSeek, apart as it reads.
"""
Where = Literal["start", "thoughts", "content"]
"""Where an answer begins: thoughts may be opened, are open, or are over."""

_THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
_SPACE = " \t\r\n"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
CALLS_END, SEPARATOR = "<｜tool▁calls▁end｜>", "<｜tool▁sep｜>"
OPENERS: dict[ToolStyle, str] = {
    "hermes": "<tool_call>",
    "llama": "<|python_tag|>",
    "mistral": "[TOOL_CALLS]",
    "mistral_named": "[TOOL_CALLS]",
    "deepseek": "<｜tool▁calls▁begin｜>",
    "deepseek_fenced": "<｜tool▁calls▁begin｜>",
}
_MARKUP = frozenset(
    {*OPENERS.values(), "</tool_call>", "[ARGS]", "[CALL_ID]"}
    | {CALL_BEGIN, CALL_END, CALLS_END, SEPARATOR}
    | {tag for pair in _THOUGHTS for tag in pair}
)
_ARGUMENTS = ("arguments", "parameters")
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")
_MAX_NAME = 256


@dataclass(frozen=True)
class ReasoningText:
    """More of what the model thinks."""

    text: str


@dataclass(frozen=True)
class ContentText:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A call begins; calls are numbered from 0 and never overlap."""

    index: int
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """More of a call's arguments, which are a JSON object."""

    index: int
    text: str


@dataclass(frozen=True)
class ToolCallEnd:
    """A call has ended."""

    index: int
    is_complete: bool
    """Whether the arguments are a whole JSON object."""


Delta = ReasoningText | ContentText | ToolCallStart | ToolCallArguments | ToolCallEnd


@dataclass(kw_only=True)
class ParsedCall:
    """A call of a tool."""

    name: str
    arguments: str = ""
    """JSON; the beginning of it if the call was cut off."""
    is_complete: bool = False


@dataclass(kw_only=True)
class ParsedMessage:
    """Deltas put together."""

    reasoning: str = ""
    content: str = ""
    calls: list[ParsedCall] = field(default_factory=list[ParsedCall])

    def add(self, deltas: Iterable[Delta]) -> None:
        """Take in what a parser gave."""
        for delta in deltas:
            match delta:
                case ReasoningText():
                    self.reasoning += delta.text
                case ContentText():
                    self.content += delta.text
                case ToolCallStart():
                    self.calls.append(ParsedCall(name=delta.name))
                case ToolCallArguments():
                    self.calls[delta.index].arguments += delta.text
                case ToolCallEnd():
                    self.calls[delta.index].is_complete = delta.is_complete


@dataclass(frozen=True, kw_only=True)
class MessageFormat:
    """How a model writes thoughts and calls of tools; None where it does neither."""

    thoughts: tuple[str, str] | None = None
    """What opens and closes them."""
    tools: ToolStyle | None = None
    control_texts: tuple[tuple[int, str], ...] = ()
    """Markup that is a control token: its id, and the text that the parser wants to see."""

    @classmethod
    def of(cls, tokenizer: AutoTokenizer) -> "MessageFormat":
        """Read the format off a tokenizer's chat templates."""
        templates = (tokenizer.chat_template, tokenizer.tool_template)
        source = "\n".join(template.source for template in templates if template is not None)
        shown = [(i, text) for text, i in tokenizer.control_tokens.items() if text in _MARKUP]
        return cls(
            thoughts=next((pair for pair in _THOUGHTS if pair[1] in source), None),
            tools=_style_of(source),
            control_texts=tuple(sorted(shown)),
        )

    def parser(
        self, *, prompt: str = "", continued: str | None = None, reads_tools: bool = False
    ) -> "MessageParser":
        """Start to read an answer.

        Args:
            prompt: the end of the prompt, control tokens included: it may have opened the thoughts,
                or closed them.
            continued: the beginning of the answer, where the prompt ends in the middle of one.
            reads_tools: whether calls are told apart; else they are content.
        """
        where = self.where_after(prompt, continued)
        return MessageParser(self, where=where, reads_tools=reads_tools)

    def where_after(self, prompt: str, continued: str | None = None) -> Where:
        """Where an answer to a prompt begins; the arguments are those of `parser`."""
        if self.thoughts is None:
            return "content"
        opener, closer = self.thoughts
        if continued is not None:
            if continued.lstrip().startswith(opener):
                return "content" if closer in continued else "thoughts"
            return "content" if continued.strip() else "start"
        end = prompt.rstrip()
        if end.endswith(opener):
            return "thoughts"
        return "content" if end.endswith(closer) else "start"

    def parse(self, text: str, *, prompt: str = "", reads_tools: bool = True) -> ParsedMessage:
        """Take a whole answer apart."""
        parser = self.parser(prompt=prompt, reads_tools=reads_tools)
        message = ParsedMessage()
        message.add(parser.feed(text))
        message.add(parser.finish())
        return message


def _style_of(source: str) -> ToolStyle | None:
    """The style of calls in a template; None where it has none that is known here."""
    if "<function=" in source or "<arg_key>" in source:
        return None  # calls written as XML, by Qwen3-Coder and GLM
    if OPENERS["hermes"] in source:
        return "hermes"
    if OPENERS["mistral"] in source:
        return "mistral_named" if "[ARGS]" in source else "mistral"
    if OPENERS["deepseek"] in source:
        return "deepseek_fenced" if "```json" in source else "deepseek"
    # Llama 3.2 writes its calls bare
    is_llama = OPENERS["llama"] in source or ('{"name": ' in source and '"parameters": ' in source)
    return "llama" if is_llama else None


class _EndError(Exception):
    """The text is over."""


class _MalformedError(Exception):
    """This is no call: all that was read is text.

    Args:
        again: the last character may begin something else.
    """

    def __init__(self, again: bool = True):
        self.again = again


_Reading = Generator[None, str, None]


class MessageParser:
    """Takes one answer apart; made by `MessageFormat.parser`.

    Args:
        format: the model's.
        where: where the answer begins.
        reads_tools: whether calls are told apart.
    """

    def __init__(
        self,
        format: MessageFormat,  # noqa: A002 - the word that fits
        *,
        where: Where,
        reads_tools: bool,
    ):
        self.format = format
        self.num_calls = 0
        """Calls told of so far."""
        self.thinks = False
        """Whether the text so far ends within thoughts."""
        self._deltas: list[Delta] = []
        self._again: list[str] = []  # characters to read again, the next one last
        self._pending: list[str] = []  # read as parts of a call and not yet told
        self._ended = False
        self._open: int | None = None  # the call whose arguments are coming
        self._is_whole = False  # and whether they have all come
        self._after_call = False
        self._reading = self._read_message(where, reads_tools)
        next(self._reading)

    def feed(self, text: str) -> list[Delta]:
        """Take more text and return what it makes certain."""
        for character in text:
            self._reading.send(character)
        return self._take_deltas()

    def finish(self) -> list[Delta]:
        """Return what was held back, for nothing follows."""
        self._ended = True
        with contextlib.suppress(StopIteration):
            self._reading.send("")
        return self._take_deltas()

    def _take_deltas(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas

    def _read_message(self, where: Where, reads_tools: bool) -> _Reading:
        """The whole answer; ends with the text."""
        try:
            if where == "start" and self.format.thoughts is not None:
                opens = yield from self._begins_with(self.format.thoughts[0])
                where = "thoughts" if opens else "content"
            if where == "thoughts" and self.format.thoughts is not None:
                self.thinks = True
                yield from self._skip("\n")
                yield from self._text_until(self.format.thoughts[1], self._think, "\n")
                self.thinks = False
                yield from self._skip("\n")
            if reads_tools and self.format.tools is not None:
                yield from self._read_content(self.format.tools)
            while True:
                self._say((yield from self._next()))
        except _EndError:
            return

    def _read_content(self, style: ToolStyle) -> _Reading:
        """Text with calls in it; ends with the text."""
        if style == "llama":
            yield from self._attempt(self._read_bare_calls())
        while True:
            space = yield from self._text_until(OPENERS[style], self._say, _SPACE)
            self._pending = [space, OPENERS[style]]
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

    def _attempt(self, reading: _Reading) -> _Reading:
        """Read calls; what is none of theirs is content."""
        try:
            yield from reading
        except _MalformedError as error:
            if error.again:
                self._unread(self._pending.pop())
            self._give_back()
        except _EndError:
            self._give_back()
            raise

    def _give_back(self) -> None:
        if self._open is not None:
            self._end_call()
        text, self._pending = "".join(self._pending), []
        self._release(self._say, text)

    def _read_hermes_call(self) -> _Reading:
        yield from self._read_call(closer="<")
        yield from self._expect("</tool_call>")

    def _read_bare_calls(self) -> _Reading:
        """Llama's calls without a mark, at the very start of an answer."""
        yield from self._read_call(is_bare=True)
        yield from self._read_more_calls()

    def _read_joined_calls(self) -> _Reading:
        yield from self._read_call()
        yield from self._read_more_calls()

    def _read_more_calls(self) -> _Reading:
        while True:
            yield from self._expect(";")
            yield from self._read_call()

    def _read_mistral_calls(self) -> _Reading:
        character = yield from self._take_after_space()
        if character == "[":
            while character != "]":
                yield from self._read_call()
                character = yield from self._expect(",", "]")
            return
        name = ""
        while character in _NAME_CHARACTERS and len(name) < _MAX_NAME:
            name += character
            character = yield from self._take()
        while character == "[":
            character = yield from self._read_mistral_mark()
        if not name or character != "{":
            raise _MalformedError
        yield from self._read_arguments(name)

    def _read_mistral_mark(self) -> Generator[None, str, str]:
        """Read `[ARGS]`, or `[CALL_ID]` and the id; return the character after it."""
        mark = "["
        while mark not in ("[ARGS]", "[CALL_ID]"):
            mark += yield from self._take()
            if not any(known.startswith(mark) for known in ("[ARGS]", "[CALL_ID]")):
                raise _MalformedError
        character = yield from self._take_after_space()
        while mark == "[CALL_ID]" and character in _NAME_CHARACTERS:
            character = yield from self._take()
        return character

    def _read_deepseek_calls(self) -> _Reading:
        mark = yield from self._expect(CALL_BEGIN, keep=True)
        while mark == CALL_BEGIN:
            name = yield from self._take_name(SEPARATOR)
            character = yield from self._take_after_space()
            is_fenced = character != "{"
            if is_fenced:
                name = character + (yield from self._take_name("```json"))
                character = yield from self._take_after_space()
            if not name.strip() or character != "{":
                raise _MalformedError
            yield from self._read_arguments(name.strip())
            if is_fenced:
                yield from self._expect("```")
            yield from self._expect(CALL_END)
            mark = yield from self._expect(CALL_BEGIN, CALLS_END)

    def _read_call(self, closer: str = "", is_bare: bool = False) -> _Reading:
        """Read an object with a name and arguments.

        Args:
            closer: what may follow at once on the arguments of an object that was not closed.
            is_bare: nothing marks it as a call, so it must have both and little else.
        """
        call = _CallObject(is_bare)
        while not call.is_complete:
            character = yield from self._take()
            try:
                call.feed(character)
            except ValueError:
                if self._open is not None and call.has_arguments and character == closer:
                    self._unread(self._pending.pop())
                    break  # a brace was forgotten
                raise _MalformedError from None
            if call.name is not None and call.fresh:
                if self._open is None:
                    self._start_call(call.name)
                self._argue(call.take_fresh())
            self._is_whole = call.has_arguments
        if self._open is None:
            if call.name is None or is_bare:
                raise _MalformedError(again=False)
            self._start_call(call.name)
            self._argue("{}")
            self._is_whole = True
        self._pending = []
        self._end_call()

    def _read_arguments(self, name: str) -> _Reading:
        """Read an object of arguments whose brace was taken."""
        self._start_call(name)
        scanner = JsonScanner()
        self._argue(scanner.feed("{"))
        while not scanner.is_complete:
            character = yield from self._take()
            try:
                written = scanner.feed(character)
            except ValueError:
                raise _MalformedError from None
            self._argue(written)
        self._is_whole = True
        self._end_call()

    def _next(self) -> Generator[None, str, str]:
        """The next character.

        Raises:
            _EndError: there is none.
        """
        if self._again:
            return self._again.pop()
        character = "" if self._ended else (yield)
        if self._ended:
            raise _EndError
        return character

    def _unread(self, text: str) -> None:
        self._again += reversed(text)

    def _begins_with(self, mark: str) -> Generator[None, str, bool]:
        """Whether the text, but for space, begins with a mark, which is read then."""
        read = ""
        while True:
            try:
                read += yield from self._next()
            except _EndError:
                self._unread(read)
                return False
            if (begun := read.lstrip(_SPACE)) == mark:
                return True
            if not mark.startswith(begun):
                self._unread(read)
                return False

    def _skip(self, space: str) -> _Reading:
        while (character := (yield from self._next())) in space:
            pass
        self._unread(character)

    def _text_until(
        self, mark: str, emit: Callable[[str], None], space: str
    ) -> Generator[None, str, str]:
        """Emit text up to a mark and the space before it, which is returned."""
        held, begun = "", ""  # space, and what of the mark has come
        while begun != mark:
            try:
                character = yield from self._next()
            except _EndError:
                self._release(emit, held + begun)
                raise
            if mark.startswith(begun + character):
                begun += character
            elif not begun and character in space:
                held += character
            else:
                # of a mark, only its first character may begin it anew
                emit(held + begun)
                held, begun = "", ""
                if mark.startswith(character):
                    begun = character
                elif character in space:
                    held = character
                else:
                    emit(character)
        return held

    def _take(self) -> Generator[None, str, str]:
        """The next character, as part of a call."""
        character = yield from self._next()
        self._pending.append(character)
        return character

    def _take_after_space(self) -> Generator[None, str, str]:
        while (character := (yield from self._take())) in _SPACE:
            pass
        return character

    def _take_name(self, mark: str) -> Generator[None, str, str]:
        """A name up to a mark."""
        name = ""
        while not name.endswith(mark):
            name += yield from self._take()
            if name[-1] not in _NAME_CHARACTERS and name[-1] not in mark + _SPACE:
                raise _MalformedError
            if len(name) > _MAX_NAME:
                raise _MalformedError
        return name.removesuffix(mark)

    def _expect(self, *marks: str, keep: bool = False) -> Generator[None, str, str]:
        """Read one of these, after space.

        Args:
            marks: what may come.
            keep: it is not known yet whether it belongs to a call.
        """
        mark = yield from self._take_after_space()
        while mark not in marks:
            if not any(known.startswith(mark) for known in marks):
                raise _MalformedError
            mark += yield from self._take()
        if not keep:
            self._pending = []
        return mark

    def _tell(self, delta: Delta) -> None:
        """Add a delta, or more text to the last one."""
        last = self._deltas[-1] if self._deltas else None
        match last, delta:
            case (ReasoningText(), ReasoningText()) | (ContentText(), ContentText()):
                self._deltas[-1] = type(delta)(last.text + delta.text)
            case ToolCallArguments(), ToolCallArguments():
                self._deltas[-1] = ToolCallArguments(delta.index, last.text + delta.text)
            case _:
                self._deltas.append(delta)

    def _think(self, text: str) -> None:
        if text:
            self._tell(ReasoningText(text))

    def _say(self, text: str) -> None:
        if text:
            self._tell(ContentText(text))
            self._after_call = False

    def _release(self, emit: Callable[[str], None], text: str) -> None:
        """Emit what was held back; space behind a call is markup like that between calls."""
        if not (self._after_call and text.isspace()):
            emit(text)

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


class _CallObject:
    """The JSON object of a call, character by character.

    Args:
        is_bare: nothing marks it as a call, so few keys may come up.
    """

    def __init__(self, is_bare: bool):
        self.name: str | None = None
        self.fresh = ""
        """Text of the arguments that was not taken yet."""
        self.has_arguments = False
        """They are whole."""
        self._is_bare = is_bare
        self._scanner = JsonScanner()
        self._key: str | None = None  # whose value is being read, if it matters
        self._string: str | None = None  # that value, if it is a string

    @property
    def is_complete(self) -> bool:
        """The object is closed."""
        return self._scanner.is_complete

    def take_fresh(self) -> str:
        """Return `fresh` and empty it."""
        fresh, self.fresh = self.fresh, ""
        return fresh

    def feed(self, character: str) -> None:
        """Take a character.

        Raises:
            ValueError: it makes this no call.
        """
        scanner = self._scanner
        if character not in _SPACE:
            if scanner.depth == 0 and character != "{":
                raise ValueError("a call is an object")
            if scanner.depth == 1 and scanner.expects_value:
                self._begin_value(scanner.key, character)
        written = scanner.feed(character)
        if self._key is None:
            return
        if self._string is None:
            self.fresh += written
        else:
            self._string += written
        if scanner.depth == 1 and scanner.has_value:
            self._end_value(self._key)

    def _begin_value(self, key: str, character: str) -> None:
        self._key, self._string = None, None
        if key == "name":
            if character != '"' or self.name is not None:
                raise ValueError("a name is a string")
            self._key, self._string = key, ""
        elif key in _ARGUMENTS:
            if character not in '{"n' or self.has_arguments:
                raise ValueError("arguments are an object")
            if character != "n":  # null, as the scanner will see to
                self._key, self._string = key, "" if character == '"' else None
        elif self._is_bare and key not in ("type", "id"):
            raise ValueError("this is another object")

    def _end_value(self, key: str) -> None:
        text = json.loads(self._string) if self._string is not None else None
        self._key, self._string = None, None
        if key == "name":
            if not text or text.isspace():
                raise ValueError("the name is empty")
            text.encode()  # half a surrogate pair is no text
            self.name = text
            return
        if text is not None:  # some models write the arguments as a string of JSON
            self.fresh = _whole_object(text)
        self.has_arguments = True


def _whole_object(text: str) -> str:
    """The text of a JSON object, as it should be written.

    Raises:
        ValueError: it is none.
    """
    text.encode()  # half a surrogate pair is no text
    text = text.strip()
    scanner = JsonScanner()
    written = "".join(map(scanner.feed, text))
    if not (scanner.is_complete and text.startswith("{")):
        raise ValueError("this is no JSON object")
    return written
