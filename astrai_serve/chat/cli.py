"""The program: options, the loop of messages and commands, and pipes.

Ctrl-C stops the answer and keeps what was said so far; at the prompt it drops the line. Without a
terminal at its input it sends that input as one message and prints the answer, for pipes.
"""

import contextlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from astrai_core.command_line import CommandLineError, needs_extra, parse_one, told
from astrai_serve.chat.client import Answer, ChatError, Client
from astrai_serve.chat.conversation import Conversation
from astrai_serve.chat.options import ChatOptions
from astrai_serve.chat.screen import Screen, printable

PROGRAM = "astrai-chat"
HELP = """\
/system [TEXT]  show the system prompt, or set it and begin anew; - takes it away
/retry          answer the last message again, or send again what failed
/save FILE      write the conversation: chat.md to read, chat.json for programs
/clear          forget the conversation
/help           this list
/quit           leave (also Ctrl-D)
Ctrl-C stops an answer. Alt-Enter or Ctrl-J starts a line, as does Enter after a \\.
Arrows move in the text and through what was typed before, Ctrl-R searches it."""


@needs_extra(PROGRAM, "serve")
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    try:
        options = parse_one(sys.argv[1:] if arguments is None else arguments, PROGRAM, ChatOptions)
    except CommandLineError as error:
        _fail(str(error), status=2)
    try:
        client = Client(options)
        with contextlib.closing(client):
            client.connect()
            if sys.stdin.isatty():
                _converse(Conversation(client, options.system, Screen()))
            else:
                _answer_input(client, options.system)
    except (ChatError, OSError, ValueError) as error:
        _fail(told(error), status=1)
    except KeyboardInterrupt:
        print()
        sys.exit(130)


def _converse(conversation: Conversation) -> None:
    # pipes and mistakes need no line editor
    from astrai_serve.chat.keyboard import Keyboard

    client, note = conversation.client, conversation.screen.note
    try:
        keyboard = Keyboard(client.options.history_file)
    except OSError as error:
        note(f"what you type is not kept: {error}")
        keyboard = Keyboard(None)
    note(f"{client.model} at {client.options.url}; /help lists the commands")
    while True:
        try:
            text = keyboard.read()
        except KeyboardInterrupt:
            note("Ctrl-D or /quit leaves")
            continue
        except EOFError:
            return
        command, _, rest = text.strip().partition(" ")
        match command:
            case "":
                continue
            case "/quit" | "/exit":
                return
            case "/help":
                note(HELP)
            case "/clear":
                conversation.clear()
            case "/retry":
                conversation.retry()
            case "/save":
                conversation.save(rest.strip())
            case "/system":
                conversation.set_system(rest.strip())
            case _ if command.startswith("/") and command[1:].isalpha():
                note(f"there is no {command}; /help lists the commands")
            case _:
                conversation.say(text)


def _answer_input(client: Client, system: str) -> None:
    """Send what is piped in, and print the answer alone."""
    try:
        text = sys.stdin.buffer.read().decode().strip()
    except UnicodeDecodeError as error:
        raise ChatError(f"the input is not UTF-8: {error}") from None
    if not text:
        raise ChatError("the input is empty; pipe a message in, or run in a terminal to chat")
    messages = [{"role": "system", "content": system}] if system else []
    answer = Answer()
    for piece in client.answer([*messages, {"role": "user", "content": text}], answer):
        if piece.kind == "text":
            print(piece.text, end="", flush=True)
    print()
    if answer.finish_reason == "length":
        sys.stderr.write(f"{PROGRAM}: the answer was cut off by its length limit\n")


def _fail(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"{PROGRAM}: {' '.join(printable(message).split())}\n")
    sys.exit(status)
