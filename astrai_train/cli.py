"""`astrai-train`: train a model, measure it, plan a run.

What costs nothing to check is checked first, and torch is imported after that, so that a mistake
is answered at once. `ASTRAI_DEBUG=1` shows where an error came from.
"""

import logging
import os
import re
import signal
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

import yaml

from astrai_core.command_line import CommandLineError, needs_extra, told
from astrai_core.nearest_name import did_you_mean

PROGRAM = "astrai-train"
DEBUG_VARIABLE = "ASTRAI_DEBUG"
COMMANDS = {
    "fit": "train; run again, it goes on from its last checkpoint",
    "validate": "measure the last checkpoint on the validation data",
    "test": "measure the last checkpoint on the test data",
    "predict": "run the last checkpoint over the prediction data",
    "plan": "memory, speed and duration of a run, before it begins",
    "lr-find": "try learning rates on a run's first steps, with a plot",
    "report": "write the page of a run, as fit does at its end: report FOLDER",
    "compare": "put runs side by side: compare FOLDER FOLDER ...",
    "watch": "follow a run in the browser: watch FOLDER",
}
_LOOKING = ("report", "compare", "watch")
_HELP = f"""\
usage: {PROGRAM} COMMAND --config FILE [--config FILE ...] [--KEY VALUE ...]

Train a model as YAML files describe it. Later files and options win over earlier ones.

commands:
{chr(10).join(f"  {name:<10}{what}" for name, what in COMMANDS.items())}

options of every command:
  --config FILE         a configuration; configs/ holds commented ones
  --trainer.KEY VALUE   any key of the configuration by its dotted name,
                        as --trainer.max_steps 100 or --model.init_args.KEY VALUE
  --print_config        print the whole configuration and stop
  --fresh               fit: put an earlier run of the same folder aside and start over
  --help                all options of a command, as in {PROGRAM} fit --help

{DEBUG_VARIABLE}=1 shows where an error came from.
"""
_SECTIONS = ("trainer", "model", "data", "checkpoint", "fresh", "seed_everything", "ckpt_path")
_TOO_LARGE = f"the model does not fit into memory: make it smaller; {PROGRAM} plan tells what fits"
_OF_CLASS = ("class_path", "init_args")
_MORE_OPTIONS = ("config", "print_config", "help", "weights_only", "verbose", "return_predictions")


@needs_extra(PROGRAM, "train")
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with its status: 2 for wrong options, 1 for what failed later."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_HELP)
        sys.exit(0 if arguments else 2)
    _end_quietly_on_interrupt()
    try:
        command, options = check(arguments)
    except CommandLineError as error:
        _fail(error, 2)
    if command == "plan":
        from astrai_train.plan import main as plan

        plan(options)
    elif command == "lr-find":
        from astrai_train.lr_find import main as lr_find

        _silence_others()
        lr_find(options)
    elif command in _LOOKING:
        _look(command, options)
    else:
        _run(command, options)


def check(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Find the common mistakes without torch, and spell options as the parser wants them.

    Raises:
        CommandLineError: a command, option or configuration file is not there or not readable.
    """
    command, *rest = arguments
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS)
        names = ", ".join(COMMANDS)
        raise CommandLineError(f"{command} is not a command{hint} The commands are {names}")
    options: list[str] = []
    for position, argument in enumerate(rest):
        name, equals, value = argument.partition("=")
        following = rest[position + 1] if position + 1 < len(rest) else None
        if argument == "--fresh" and following not in ("true", "false"):
            argument = "--fresh=true"
        if name in ("--config", "-c"):
            file = value if equals else following
            if file is None:
                raise CommandLineError("--config needs a file")
            _check_config(file)
        elif name.startswith("--"):
            _check_option(name, command)
        elif name.endswith((".yaml", ".yml")) and (not position or "=" in rest[position - 1]):
            raise CommandLineError(f"{name} needs its option before it: --config {name}")
        options.append(argument)
    if command not in _LOOKING and not options:
        raise CommandLineError(
            f"{command} needs a configuration, as --config configs/seq.yaml; configs/ holds more"
        )
    return command, options


def _check_option(name: str, command: str) -> None:
    section = re.split(r"[.+]", name[2:])[0]
    if command not in ("plan", "lr-find", *_LOOKING) and section not in (
        *_SECTIONS,
        *_MORE_OPTIONS,
    ):
        hint = did_you_mean(section, (*_SECTIONS, *_MORE_OPTIONS), prefix="--")
        raise CommandLineError(
            f"unknown option {name}{hint} ({PROGRAM} {command} --help lists all; keys have a "
            "section, as --trainer.max_steps)"
        )


def _check_config(file: str) -> None:
    path = Path(file)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise CommandLineError(f"--config {file} {kind}; configs/ holds commented ones")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CommandLineError(f"--config {file} is not YAML: {_one_line(str(error))}") from error
    if not isinstance(content, dict):
        raise CommandLineError(f"--config {file} is not a mapping of sections to their keys")
    for key in content:
        if key not in _SECTIONS and key not in _MORE_OPTIONS:
            hint = did_you_mean(str(key), _SECTIONS)
            raise CommandLineError(
                f"--config {file}: unknown section {key}{hint} The sections are "
                f"{', '.join(_SECTIONS)}"
            )
    for section in ("model", "data"):
        _check_class(file, section, content.get(section))


def _check_class(file: str, section: str, content: object) -> None:
    """A misspelt class_path or init_args hides all that stands under it."""
    for key in content if isinstance(content, dict) else ():
        hint = did_you_mean(str(key), _OF_CLASS, cutoff=0.8)
        if hint and key not in _OF_CLASS:
            raise CommandLineError(f"--config {file}: {section} has {key}{hint}")


def _look(command: str, options: list[str]) -> None:
    from astrai_train.report import commands

    try:
        {"report": commands.report, "compare": commands.compare, "watch": commands.watch}[command](
            options
        )
    except (CommandLineError, OSError, ValueError) as error:
        _fail(error, 1)


def _run(command: str, options: list[str]) -> None:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from astrai_train.callbacks.preemption import StoppedBySignalError, TimeIsUpError
    from astrai_train.option_errors import explain
    from astrai_train.run import FinishedError, Run
    from astrai_train.shape import TooLargeError

    _silence_others()
    run = None
    try:
        run = Run([command, *options])
        run.execute()
    except ArgumentError as error:
        if "allocate memory" in str(error):  # the model is made while its options are read
            _fail(error, 1, _TOO_LARGE)
        _fail(error, 2, f"{explain(str(error))} ({PROGRAM} {command} --help lists all options)")
    except FinishedError as error:
        _say(str(error))
    except (StoppedBySignalError, TimeIsUpError) as error:
        # Lightning kills the first rank as soon as it sees that another one's status is not 0
        if run is not None and not run.trainer.is_global_zero:
            return
        status = error.exit_code if isinstance(error, StoppedBySignalError) else 0
        _say(f"{error}; the same command goes on from there", sys.stderr if status else sys.stdout)
        sys.exit(status)
    except TooLargeError as error:
        _fail(error, 1)
    except (ValueError, MisconfigurationException) as error:
        if "allocate memory" in str(error):
            _fail(error, 1, _TOO_LARGE)
        if "No supported gpu backend" in str(error):
            text = "trainer.accelerator is gpu, but torch finds none here; set it to cpu or auto"
            _fail(error, 2, text)
        _fail(error, 2 if run is None else 1, explain(str(error)))
    except OSError as error:
        _fail(_first(error), 1)
    except (MemoryError, RuntimeError) as error:
        if run is not None and run.stopped_by is not None:
            # a signal to the whole group ends the loader's workers too, before the step is done
            _say("stopped; the same command goes on from the last checkpoint", sys.stderr)
            sys.exit(128 + run.stopped_by)
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        _fail(error, 1, f"out of memory: lower data.batch_size; {PROGRAM} plan tells what fits")


def _silence_others() -> None:
    """Keep what libraries say to their developers, and of their services, from the user."""
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)
    for module in ("lightning", "torch", "jsonargparse"):
        warnings.filterwarnings("ignore", module=rf"{module}\b")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _first(error: OSError) -> OSError:
    """A full disk fails again while the run is taken down; the first failure says more."""
    while isinstance(error.__context__, OSError) and error.__cause__ is None:
        error = error.__context__
    return error


def _say(text: str, stream: TextIO | None = None) -> None:
    output: TextIO = sys.stdout if stream is None else stream
    output.write(f"{PROGRAM}: {text}\n")
    output.flush()


def _fail(error: BaseException, status: int, text: str = "") -> NoReturn:
    if os.environ.get(DEBUG_VARIABLE):
        raise error
    _say(_one_line(text) or told(error), sys.stderr)
    sys.exit(status)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _end_quietly_on_interrupt() -> None:
    """Until training takes Ctrl-C over, it ends the program without a traceback."""
    process = os.getpid()

    def end(number: int, _: FrameType | None) -> None:
        if os.getpid() == process:  # a loader's worker ends with its parent
            raise SystemExit(128 + number)

    signal.signal(signal.SIGINT, end)
