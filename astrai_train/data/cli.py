"""`astrai-data`: text becomes a tokenizer, and records become files to train on.

Nothing here needs torch, so that each command starts at once.
"""

import contextlib
import json
import logging
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NoReturn

from astrai_core.command_line import CommandLineError, needs_extra, parse_one, told
from astrai_core.nearest_name import did_you_mean
from astrai_train.data.duplicates import Duplicates
from astrai_train.data.record import Record, Stage
from astrai_train.data.records import Unusable, find_files, guess_stage, read_records
from astrai_train.data.tokenizing import Answers

PROGRAM = "astrai-data"
_SAMPLED_TEXTS = 2000
_TOLD = 5


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Train a byte-level BPE tokenizer; the same text always gives the same tokenizer."""

    input: list[Path]
    """Text or records to learn from: files, and folders of them."""
    out: Path
    """Folder to write."""
    vocab_size: int = 4096
    """Number of tokens; a large one costs a small model most of its time in the output layer."""
    portable: bool = True
    """Learn no token that joins a character with a part of another, so that the model can be
    exported to llama.cpp with the same tokens; costs a few percent more tokens in Chinese."""
    overwrite: bool = False
    """Replace a tokenizer that is there; data prepared with it must be prepared again."""


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Tokenise records into one H5 file; run again, it goes on where it was interrupted."""

    stage: Stage
    """seq for documents, {"text"}; sft for chats, {"messages"} or {"prompt", "completion"}; dpo for
    preferences, {"prompt", "chosen", "rejected"}; grpo for prompts, {"prompt", ...}."""
    tokenizer: Path
    """Folder of the tokenizer."""
    input: list[Path]
    """Records: .jsonl, .json, .parquet or .txt files, and folders of them."""
    out: Path
    """The .h5 file to write."""
    answers: Answers = "all"
    """Which answers of a chat are taught, where the chat template can tell them apart."""
    duplicates: Duplicates = "keep"
    """exact leaves out a record with the text of an earlier one; near also one that shares four
    fifths of its character 8-grams with one, which takes about 2 kB of memory a record."""
    unusable: Unusable = "refuse"
    """skip leaves out what cannot be used; either way file and line are told."""
    workers: int = 0
    """Processes; 0 takes one for each core."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Show what a file teaches: trained tokens green, the others dim, and its counts."""

    input: list[Path]
    """Files of one stage, prepared or not; may be given without the option's name."""
    tokenizer: Path
    """Folder of the tokenizer."""
    stage: Stage | None = None
    """What records are read as; null guesses it from the first one."""
    window_size: int = 0
    """Show rows of so many tokens, packed as training packs them, and in red what they cut or are
    too short for; 0 shows samples."""
    first: int = 0
    """Number of the first sample or row to show."""
    count: int = 3
    """How many to show, and how many of those that are too long."""


@dataclass(frozen=True, kw_only=True)
class CurriculumOptions:
    """Write the built-in bilingual curriculum: train.jsonl, val.jsonl, held_out.jsonl and pairs."""

    out: Path
    """Folder to write."""
    train: int = 80_000
    """Number of training items; a chat holds one or several."""
    held_out: int = 200
    """Number of held-out chats of each task."""
    pairs: int = 4000
    """Number of right answers beside wrong ones in train_pairs.jsonl, for stage dpo."""
    seed: int = 0
    """Another seed draws other items."""


@dataclass(frozen=True, kw_only=True)
class PromptsOptions:
    """Write prompts of the curriculum for stage grpo: train.jsonl, val.jsonl and held_out.jsonl."""

    out: Path
    """Folder to write."""
    tasks: list[str]
    """What the questions are about, as in the curriculum: follow_up, dates, sorting, ..."""
    train: int = 6000
    """Number of training prompts."""
    held_out: int = 200
    """Number of prompts to validate on, and of held-out ones."""
    joined: int = 3
    """Items of a chat; only its last question is asked."""
    seed: int = 11
    """Another seed draws other items."""


@dataclass(frozen=True, kw_only=True)
class ReasoningOptions:
    """Write tasks of reasoning_gym as prompts for stage grpo; needs astrai[reasoning]."""

    out: Path
    """The .jsonl file to write."""
    tasks: list[str]
    """Names of its data sets, which take turns: leg_counting, chain_sum, ..."""
    count: int = 2000
    """Number of prompts."""
    seed: int = 0
    """Another seed makes other prompts; validate on those of another one."""


@dataclass(frozen=True, kw_only=True)
class CorporaOptions:
    """Write the demo's Chinese and English text, from packages, as train.jsonl and val.jsonl."""

    out: Path
    """Folder to write."""
    characters: int = 1_000_000
    """At most so many of each source."""


Options = (
    TokenizerOptions
    | PrepareOptions
    | InspectOptions
    | CurriculumOptions
    | PromptsOptions
    | ReasoningOptions
    | CorporaOptions
)

COMMANDS: dict[str, type[Options]] = {
    "tokenizer": TokenizerOptions,
    "prepare": PrepareOptions,
    "inspect": InspectOptions,
    "curriculum": CurriculumOptions,
    "prompts": PromptsOptions,
    "reasoning": ReasoningOptions,
    "corpora": CorporaOptions,
}


@needs_extra(PROGRAM, "train")
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit: 2 for wrong options, 1 for what failed later."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        sys.exit(0 if arguments else 2)
    try:
        options = _parse(arguments[0], arguments[1:])
    except CommandLineError as error:
        _fail(error, status=2)
    logging.basicConfig(level=logging.WARNING, format=f"{PROGRAM}: %(message)s")
    try:
        _run(options)
    except KeyboardInterrupt:
        _fail(InterruptedError("interrupted"), status=130)
    except _SigtermError:
        _fail(InterruptedError("stopped by SIGTERM; run it again to go on"), status=143)
    except (ValueError, OSError, MemoryError) as error:
        _fail(error, status=1)


class _SigtermError(BaseException):
    """Somebody wants this to end."""


@contextlib.contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    """End as with Ctrl-C, so that worker processes end too and leave nothing behind."""

    def handle(*_: object) -> NoReturn:
        raise _SigtermError

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _help() -> str:
    lines = [f"usage: {PROGRAM} COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<12}{kind.__doc__}" for name, kind in COMMANDS.items()]
    return "\n".join([*lines, "", f"{PROGRAM} COMMAND --help lists the options of a command."])


def _parse(command: str, arguments: list[str]) -> Options:
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS)
        raise CommandLineError(f"no command {command}{hint} ({PROGRAM} --help lists all)")
    if command == "inspect" and arguments and not arguments[0].startswith("-"):
        arguments = ["--input", *arguments]
    return parse_one(arguments, f"{PROGRAM} {command}", COMMANDS[command])


def _run(options: Options) -> None:
    match options:
        case TokenizerOptions():
            train_tokenizer(options)
        case PrepareOptions():
            prepare_file(options)
        case InspectOptions():
            inspect_files(options)
        case CurriculumOptions():
            curriculum(options)
        case PromptsOptions():
            prompts(options)
        case ReasoningOptions():
            reasoning(options)
        case CorporaOptions():
            corpora(options)


def train_tokenizer(options: TokenizerOptions) -> None:
    """Run `astrai-data tokenizer`."""
    from astrai_core.tokenizer import AutoTokenizer

    if (options.out / "tokenizer.json").exists() and not options.overwrite:
        raise ValueError(
            f"--out {options.out} holds a tokenizer already; --overwrite replaces it, and what was "
            "prepared with it must be prepared again"
        )
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out} is a file; name a folder")
    files = find_files(options.input)
    tokenizer = AutoTokenizer.train(
        _texts(files),
        options.vocab_size,
        show_progress=sys.stderr.isatty(),
        portable=options.portable,
    )
    tokenizer.save_pretrained(options.out)
    sample = [text for text, _ in zip(_texts(files), range(_SAMPLED_TEXTS), strict=False)]
    tokens = sum(map(len, tokenizer.encode_batch(sample)))
    rate = sum(len(text.encode()) for text in sample) / max(tokens, 1)
    print(f"{options.out}: {tokenizer.vocab_size:,} tokens, {rate:.2f} bytes per token")


def _texts(files: Iterable[Path]) -> Iterator[str]:
    """All that is written in the records, whatever their stage."""
    empty = True
    for file in files:
        for record in read_records(file):
            for text in _record_texts(record):
                empty = False
                yield text
    if empty:
        raise ValueError("there is no text in --input")


def _record_texts(record: Record) -> list[str]:
    if "text" in record.content:
        return [record.text()]
    # roles too: the chat template writes one before every message, so each should be one token
    parts = [
        part
        for message in record.all_messages()
        for part in (message["role"], message.get("content"))
    ]
    return [part for part in parts if isinstance(part, str)]


def prepare_file(options: PrepareOptions) -> None:
    """Run `astrai-data prepare`."""
    from astrai_train.data.left_out import left_out_file
    from astrai_train.data.prepare import prepare
    from astrai_train.data.storage import H5Storage

    start = time.monotonic()
    with _sigterm_as_exception():
        done = prepare(
            options.input,
            options.out,
            stage=options.stage,
            tokenizer=options.tokenizer,
            answers=options.answers,
            duplicates=options.duplicates,
            unusable=options.unusable,
            workers=options.workers,
            show_progress=True,
        )
    storage = H5Storage(options.out)
    how = f"{time.monotonic() - start:.1f} s" if done else "nothing to do, it is up to date"
    print(
        f"{options.out}: {storage.content}, {storage.num_tokens:,} tokens, "
        f"{storage.num_trained_tokens:,} trained ({how})"
    )
    _tell_left_out(left_out_file(options.out))


def _tell_left_out(file: Path) -> None:
    if not file.is_file():
        return
    count = 0
    with file.open(encoding="utf-8") as lines:
        for count, line in enumerate(lines, 1):
            if count <= _TOLD:
                one = json.loads(line)
                print(f"  left out: {one['place']}: {one['reason']}")
    more = "" if count <= _TOLD else f", {count - _TOLD:,} more"
    print(f"  {count:,} records were left out{more}: {file} lists them")


def inspect_files(options: InspectOptions) -> None:
    """Run `astrai-data inspect`."""
    from rich.console import Console

    from astrai_core.tokenizer import AutoTokenizer
    from astrai_train.data.inspection import show_rows, show_samples, show_too_long, summary
    from astrai_train.data.storage import H5Storage, open_storage
    from astrai_train.data.truncation import Truncation

    first = options.input[0]
    stage = options.stage
    if stage is None:
        is_prepared = first.suffix.lower() in (".h5", ".hdf5")
        stage = H5Storage(first).stage if is_prepared else guess_stage(first)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    storage = open_storage(options.input, stage=stage, tokenizer=tokenizer)
    console = Console(highlight=False, soft_wrap=True)
    marks = not console.is_terminal
    count = options.count
    counts = summary(storage, tokenizer)
    if options.window_size:
        shown = show_rows(storage, tokenizer, options.window_size, options.first, count, marks)
        cut = Truncation.of(storage, options.window_size)
        counts["windows" if stage == "seq" else "too long"] = cut.describe(storage)
        if stage != "seq":
            shown = chain(shown, show_too_long(storage, tokenizer, cut, count, marks))
    else:
        shown = show_samples(storage, tokenizer, options.first, count, marks)
    for text in shown:
        console.print(text, end="\n\n")
    for name, value in counts.items():
        print(f"  {name:<11}{value}")


def curriculum(options: CurriculumOptions) -> None:
    """Run `astrai-data curriculum`."""
    from astrai_train.data.curriculum import VAL_PER_TASK, write_curriculum, write_pairs

    for path in write_curriculum(options.out, options.train, options.held_out, options.seed):
        print(f"{path}: {sum(1 for _ in read_records(path)):,} chats")
    for path in write_pairs(options.out, options.pairs, VAL_PER_TASK, options.seed):
        print(f"{path}: {sum(1 for _ in read_records(path)):,} pairs")


def prompts(options: PromptsOptions) -> None:
    """Run `astrai-data prompts`."""
    from astrai_train.data.curriculum.prompts import write_prompts

    for path in write_prompts(
        options.out, options.tasks, options.train, options.held_out, options.joined, options.seed
    ):
        print(f"{path}: {sum(1 for _ in read_records(path)):,} prompts")


def reasoning(options: ReasoningOptions) -> None:
    """Run `astrai-data reasoning`."""
    from astrai_train.data.curriculum.whole_file import write_lines
    from astrai_train.data.reasoning import reasoning_records

    records = reasoning_records(options.tasks, options.count, options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_lines(options.out, (json.dumps(one, ensure_ascii=False) for one in records))
    print(f"{options.out}: {options.count:,} prompts")


def corpora(options: CorporaOptions) -> None:
    """Run `astrai-data corpora`."""
    from astrai_train.data.corpora import write_corpora

    for taken in write_corpora(options.out, characters=options.characters):
        print(
            f"{taken.source.name} {taken.version} ({taken.licence}): {taken.source.about}, "
            f"{taken.documents:,} documents, {taken.characters:,} characters"
        )
    print(f"{options.out}: train.jsonl, val.jsonl")


def _fail(error: Exception, status: int) -> NoReturn:
    sys.stderr.write(f"{PROGRAM}: {told(error)}\n")
    sys.exit(status)
