"""Run one command: the command line in, an exit code out (0 done, 1 a fault, 2 the user's input is wrong).

These are the exit codes of a rank; torchrun itself reports them in its summary and always exits with 1.
"""

from __future__ import annotations

import argparse
import atexit
import difflib
import errno
import gc
import os
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Sequence

from transpixeler.arguments import commands_of, make_parser
from transpixeler.commands import COMMANDS
from transpixeler.config import loading
from transpixeler.config.sections import Fault, UserError
from transpixeler.files import near, printable, shown_path
from transpixeler.usage import OTHERS_OPTIONS

SECONDS_FOR_MAIN = 5.0  # that other ranks leave rank 0 to tell an error
# What a user can do about a file; the rest, such as a full disk, is no mistake in the input.
MENDABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that argv names and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parse(argv)
    threading.excepthook = _tell_thread_error
    atexit.register(gc.freeze)  # or the interpreter's end searches all of torch for cycles: about a second a process
    try:
        return COMMANDS[arguments.command](arguments)
    except UserError as error:
        if arguments.debug:
            traceback.print_exc()
        _say(_with_origin(str(error), arguments))
        return 2
    except Fault as fault:
        _say(str(fault))
        return 1
    except KeyboardInterrupt as stop:
        _say_stopped(stop, arguments, argv)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if arguments.debug:
            traceback.print_exc()
        _say(_disk_error(error))
        return 2 if error.errno in MENDABLE else 1


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse argv; `key=value` may stand anywhere after the command, also between options."""
    parser = make_parser()
    own = commands_of(parser)
    command = next((word for word in argv if not word.startswith("-")), "")
    if command and command not in own:
        parser.error(f"{command!r} is not a command; {_near(command, list(own), 'commands')}")
    arguments, left = parser.parse_known_args(_explicit_resume(argv))
    for word in left:
        option = word.partition("=")[0]
        if (ours := OTHERS_OPTIONS.get(option)) is not None:
            parser.error(f"{option} {ours}")
    overrides = [word for word in left if "=" in word and not word.startswith("-")]
    if left != overrides or (overrides and not hasattr(arguments, "overrides")):
        known = [option for action in own[command]._actions for option in action.option_strings]
        wrong = [word.partition("=")[0] for word in left if word.startswith("--")][:1]
        near = [f"; {_near(word, known, 'options')}" for word in wrong]
        own[command].error(f"unrecognized arguments: {' '.join([*left])}{''.join(near)}")
    if overrides:
        arguments.overrides = [*arguments.overrides, *overrides]
    return arguments


def _near(word: str, known: Sequence[str], what: str) -> str:
    """Return the nearest of some known words as a question, or all of them."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {found[0]}?" if found else f"{what} are {', '.join(known)}"


def _with_origin(message: str, arguments: argparse.Namespace) -> str:
    """Add the file that set the key of a message, where that is a base of the config that the user named.

    What is found before anything is loaded names its file already; this is for what only the model or the data tell.
    """
    path = getattr(arguments, "config", "") or getattr(arguments, "dataset", "")
    if not path.endswith((".yaml", ".yml")):
        return message
    try:
        origin = loading.origin_of(message.partition(": ")[0], path, arguments.overrides)
    except UserError:  # the config itself cannot be read, which the message says
        return message
    return message if not origin or f" {origin})" in message else f"{message} (in {origin})"


def _disk_error(error: OSError) -> str:
    """Return one line for an error of the file system, which names the file."""
    said = error.strerror or str(error) or type(error).__name__
    return f"{os.fsdecode(error.filename)}: {said}" if isinstance(error.filename, str | bytes) else said


def _tell_thread_error(told: threading.ExceptHookArgs) -> None:
    """Print one line for an error of the file system in a library's thread, such as TensorBoard's on a full disk."""
    if isinstance(told.exc_value, OSError):
        print(f"transpixeler: {_disk_error(told.exc_value)}", file=sys.stderr, flush=True)
    else:
        threading.__excepthook__(told)


def _say(message: str) -> None:
    """Print one line for all ranks: other ranks are silent when rank 0 tells an error."""
    rank = os.environ.get("RANK", "0")
    if "torch" in sys.modules and "MASTER_ADDR" in os.environ:
        from transpixeler.parallel import runtime

        if runtime.main_tells(SECONDS_FOR_MAIN):
            return
    elif rank != "0":
        time.sleep(SECONDS_FOR_MAIN)  # when rank 0 has met the same error, torchrun ends this process meanwhile
    print(
        f"transpixeler: {f'[rank {rank}] ' if rank != '0' else ''}{printable(near(message))}",
        file=sys.stderr,
        flush=True,
    )


def _say_stopped(stop: KeyboardInterrupt, arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """Print that Ctrl-C ended the command and, where something was kept, the command that goes on with it."""
    if os.environ.get("RANK", "0") != "0":
        return
    print(f"transpixeler: {str(stop) or 'stopped'}", file=sys.stderr)
    if run := getattr(stop, "run", None):
        words = ["train", arguments.config, *arguments.overrides, "--resume", shown_path(run)]
        print(f"transpixeler: to go on: transpixeler {shlex.join(words)}", file=sys.stderr)
    elif arguments.command == "sample":
        words = [*argv, *(() if arguments.resume else ("--resume",))]
        print(f"transpixeler: to go on: transpixeler {shlex.join(words)}", file=sys.stderr)


def _explicit_resume(argv: Sequence[str]) -> list[str]:
    """Write `--resume` before a config or an override as `--resume=`, so that argparse takes neither for the run."""
    words = list(argv)
    if "train" not in words:
        return words
    for i, word in enumerate(words[:-1]):
        following = words[i + 1]
        if word == "--resume" and ("=" in following or following.endswith((".yaml", ".yml")) or following[:1] == "-"):
            words[i] = "--resume="
    return words
