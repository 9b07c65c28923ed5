"""Command line in, one function a command, exit code out: 0 done, 1 a fault, 2 the user's input is wrong.

Argv and YAML enter here and nowhere else. Each command imports what it needs when it runs, so that `--help`
and a misspelt key answer in a blink.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from transpixeler.config import Config, UserError

if TYPE_CHECKING:
    pass

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except UserError as error:
        if arguments.debug:
            raise
        print(f"transpixeler: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("transpixeler: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


# --- commands --------------------------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from transpixeler import demo

    with _running():
        demo.write_demo(Path(arguments.folder), seed=arguments.seed, force=arguments.force)
    return 0


# --- the parser ------------------------------------------------------------------------------------------------------


class _Help(argparse.RawDescriptionHelpFormatter):
    """Room for the texts, and defaults left to the reference."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="transpixeler",
        formatter_class=_Help,
        description="Teaches a video diffusion transformer to generate an RGB video and its companion together.",
        epilog="Keys of a config: configs/reference.yaml. Any of them is set on the command line as a.b=value.",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user's mistake as well")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    return parser


def _add(commands: Any, name: str, run: Command, help: str, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=text, formatter_class=_Help)
    parser.set_defaults(command=run)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file; see configs/ for examples")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="keys to set over the file's")


def _add_demo(commands: Any) -> None:
    text = "Writes a tiny Wan pipeline, a synthetic set of RGBA pairs and a config that trains on them."
    parser = _add(commands, "demo", _demo, "write a tiny model, data and config to try everything on", text)
    parser.add_argument("folder", metavar="DIR", help="where to write")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the clips (0)")
    parser.add_argument("--force", action="store_true", help="replace what stands in DIR")


# --- shared ----------------------------------------------------------------------------------------------------------


def _config(arguments: argparse.Namespace) -> Config:
    from transpixeler import configfile

    return configfile.load(arguments.config, arguments.overrides)


def _running(config: Config | None = None):
    from transpixeler import runtime

    minutes = config.parallel.timeout_minutes if config else 10.0
    return runtime.running(timeout_minutes=minutes)
