"""Compile a form in a process of its own first, where it can be stopped.

Most of llguidance's work has limits, but not all: `{"multipleOf": 9999991}` takes minutes and
gigabytes, and a thread cannot be stopped. So a form is first compiled in a small process, without a
vocabulary, which is killed when its time or its memory is over. What passes there is compiled again
beside the engine. The process knows no torch and is started when the first form comes.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import weakref
from typing import TYPE_CHECKING

from astrai_core.generation import Structure

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MEMORY_BYTES = 1 << 30
START_SECONDS = 30.0
# white space in JSON is a space or a line's start: a small model would write it without end
_WHITESPACE = r"( |\n[ \t]{0,12})"


class GrammarTrial:
    """The process; one thread at a time may ask."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []  # one, or none
        self._lock = threading.Lock()
        # its caller may forget to close it
        self.close = weakref.finalize(self, _stop, self._processes, self._lock)
        """Stop the process, and start none any more."""

    def failure(self, structure: Structure, seconds: float) -> str | None:
        """Say what is wrong with a form, None if nothing is.

        Raises:
            TimeoutError: it takes longer than so many seconds, or too much memory.
        """
        form = json.dumps(dataclasses.asdict(structure)).encode() + b"\n"
        return json.loads(self._answer(self._running(), form, seconds))

    def _answer(self, process: "subprocess.Popen[bytes]", line: bytes, seconds: float) -> bytes:
        """Send a line and wait for one, but not for ever."""
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except (OSError, ValueError):  # it was stopped meanwhile
            answer = b""
        finally:
            timer.cancel()
        if not answer:
            _stop(self._processes, self._lock)
            raise TimeoutError
        return answer

    def _running(self) -> "subprocess.Popen[bytes]":
        with self._lock:
            if not self.close.alive:
                raise TimeoutError
            is_new = not self._processes
            if is_new:
                command = [sys.executable, "-m", __name__]
                self._processes.append(
                    subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                )
            process = self._processes[0]
        if is_new:  # its start is none of the form's time
            self._answer(process, b"", START_SECONDS)
        return process


def _stop(processes: "list[subprocess.Popen[bytes]]", lock: threading.Lock) -> None:
    with lock:
        for process in processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        processes.clear()


def compiled(structure: Structure, tokenizer: "LLTokenizer") -> "LLMatcher":
    """Compile a form and compute its first mask; the matcher says whether that went well."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        initial_lexer_fuel=500_000,
        step_lexer_fuel=200_000,
        max_lexer_states=50_000,
        max_grammar_size=50_000,
        verbose_errors=False,
    )
    matcher = LLMatcher(tokenizer, grammar_of(structure), log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()  # the first is the slowest, and shows what has no answer
    return matcher


def grammar_of(structure: Structure) -> str:
    """The form in llguidance's notation."""
    from llguidance import LLMatcher

    if structure.json_schema is not None:
        return LLMatcher.grammar_from_json_schema(
            structure.json_schema,
            # nothing of a schema is silently left out, whatever the schema itself says
            overrides={"whitespace_pattern": _WHITESPACE, "lenient": False, "coerce_one_of": False},
        )
    if structure.regex is not None:
        return LLMatcher.grammar_from_regex(structure.regex)
    if structure.choice is not None:
        return LLMatcher.grammar_from_regex("|".join(map(_literal, structure.choice)))
    assert structure.grammar is not None
    return LLMatcher.grammar_from_lark(structure.grammar)


def _literal(text: str) -> str:
    """A regular expression for this very text."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _limit() -> None:
    """Take little of the machine, where it can be limited."""
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.nice(5)


def main() -> None:
    """Answer each form on a line of the input by a line: null, or what is wrong with it."""
    from llguidance import LLTokenizer

    _limit()
    tokenizer = LLTokenizer("byte")
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - for as long as the process lives
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin.buffer:
        matcher = compiled(Structure(**json.loads(line)), tokenizer)
        error = matcher.get_error() if matcher.is_error() else None
        sys.stdout.write(json.dumps(error) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
