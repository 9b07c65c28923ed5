"""Command line in, one function a command, exit code out: 0 done, 1 a fault, 2 the user's input is wrong.

Argv and YAML enter here and nowhere else. Each command imports what it needs when it runs, so that `--help`
and a misspelt key answer in a blink.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from transpixeler.config import Config, UserError

if TYPE_CHECKING:
    from transpixeler.data.upkeep import Report

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    try:
        return arguments.command(arguments)
    except UserError as error:
        if arguments.debug:
            raise
        _say(str(error))
        return 2
    except KeyboardInterrupt:
        print("transpixeler: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Overrides may stand anywhere after the command, between options too."""
    parser = _parser()
    arguments, left = parser.parse_known_args(_explicit_resume(argv))
    overrides = [word for word in left if "=" in word and not word.startswith("-")]
    if left != overrides or (overrides and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if overrides:
        arguments.overrides = [*arguments.overrides, *overrides]
    return arguments


def _say(message: str) -> None:
    """One line for all ranks: another one speaks only where the first has met no mistake."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(2.0)  # torchrun ends this process first when rank 0 has said it
    print(f"transpixeler: {f'[rank {rank}] ' if rank != '0' else ''}{message}", file=sys.stderr)


def _explicit_resume(argv: Sequence[str]) -> list[str]:
    """`--resume` may stand alone before the config or an override, without taking it for a run."""
    words = list(argv)
    for i, word in enumerate(words[:-1]):
        following = words[i + 1]
        if word == "--resume" and ("=" in following or following.endswith((".yaml", ".yml")) or following[0] == "-"):
            words[i] = "--resume="
    return words


# --- commands --------------------------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from transpixeler import demo

    with _running():
        demo.write_demo(Path(arguments.folder), seed=arguments.seed, force=arguments.force)
    return 0


def _cache(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    from transpixeler.data import upkeep

    what = {name: getattr(arguments, name) for name in ("verify", "gc", "rebuild", "list")}
    with _running(config) as runtime:
        report = upkeep.cache_command(config, runtime, **what)
        if runtime.is_main:
            _print_cache(report, arguments)
    return 1 if report.problems else 0


def _print_cache(report: Report, arguments: argparse.Namespace) -> None:
    for shelf in report.shelves:
        size = f"{shelf.bytes / 2**20:,.1f} MiB in {shelf.segments} segments"
        print(f"{shelf.name:40} {shelf.records:>9,} records, {size}")
    for problem in report.problems:
        print(problem)
    if arguments.verify:
        bad = len(report.problems)
        print(f"{bad} damaged: they count as missing now and are encoded next time" if bad else "every record is whole")
    if arguments.gc or arguments.rebuild:
        print(f"removed {report.removed_records:,} records, {report.removed_bytes / 2**20:,.1f} MiB")


def _train(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    from transpixeler import trainer

    with _running(config) as runtime:
        folder = trainer.train(config, runtime, resume=arguments.resume)
        if runtime.is_main:
            print(folder)
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from transpixeler import evaluate, trained

    overrides = arguments.overrides
    source = trained.chosen(
        arguments.config, overrides, adapter=arguments.adapter, bare=arguments.base, ema=arguments.ema
    )
    with _running(source.config) as runtime:
        evaluate.eval_command(source, runtime, out=arguments.out, asked_layout=_asks_layout(overrides))
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    path, overrides = arguments.source, [*arguments.overrides, *_sample_overrides(arguments)]
    if "=" in path and not Path(path).exists():  # no source but an override
        path, overrides = "", [path, *overrides]
    from transpixeler import generate, trained

    source = trained.find(path, overrides, ema=arguments.ema) if path else trained.base_alone(overrides)
    wish = generate.Wish(
        prompts=tuple(arguments.prompt),
        prompts_file=arguments.prompts,
        count=arguments.count,
        out=arguments.out,
        rgb=arguments.rgb,
        alpha=arguments.alpha,
        asked_layout=_asks_layout(overrides),
    )
    with _running(source.config) as runtime:
        generate.sample_command(source, runtime, wish)
        if runtime.is_main:
            print(wish.out)
    return 0


def _sample_overrides(arguments: argparse.Namespace) -> list[str]:
    """Options that are keys of a config by another name."""
    keys = ("steps", "guidance", "shift", "seed", "scheduler", "alpha_mode", "background")
    found = [f"sample.{key}={getattr(arguments, key)}" for key in keys if getattr(arguments, key) is not None]
    if arguments.model:
        found.append(f"model.path={arguments.model}")
    if arguments.format:
        found.append(f"sample.formats=[{', '.join(arguments.format)}]")
    if arguments.size:
        numbers = arguments.size.lower().split("x")
        if len(numbers) != 3 or not all(number.isdigit() for number in numbers):
            raise UserError(f"--size: {arguments.size} is not WIDTHxHEIGHTxFRAMES, such as 832x480x33")
        found.append(f"sample.size=[{', '.join(numbers)}]")
    return found


def _asks_layout(overrides: Sequence[str]) -> bool:
    return any(override.startswith("parallel.") for override in overrides)


def _inspect(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from transpixeler import configfile

    if arguments.dataset.endswith((".yaml", ".yml")):
        config = configfile.load(arguments.dataset, arguments.overrides)
    else:
        config = configfile.from_overrides([f"data.train=[{{path: {arguments.dataset!r}}}]", *arguments.overrides])
    from transpixeler import inspection

    sources = (*config.data.train, *config.data.eval)
    found = inspection.inspect_dataset(sources, Path(arguments.out), streams=config.streams, data=config.data)
    print("\n".join(found.lines()))
    return 2 if found.bad else 0


def _export(arguments: argparse.Namespace) -> int:
    from transpixeler import export

    made = export.export_command(
        arguments.path,
        format=arguments.format,
        out=arguments.out,
        base=arguments.base,
        alpha=arguments.alpha,
        stream=arguments.stream,
    )
    print(made)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from transpixeler import report

    print(report.write_report(Path(arguments.run)))
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
    _add_cache(commands)
    _add_train(commands)
    _add_eval(commands)
    _add_sample(commands)
    _add_inspect(commands)
    _add_export(commands)
    _add_report(commands)
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


def _add_cache(commands: Any) -> None:
    text = "Encodes every clip and caption that the cache lacks. Runs alone, under torchrun, and again after any stop."
    parser = _add(commands, "cache", _cache, "encode what the cache lacks", text)
    _add_config(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--verify", action="store_true", help="read every record and name each that is damaged")
    what.add_argument("--gc", action="store_true", help="remove what this config does not refer to")
    what.add_argument("--rebuild", action="store_true", help="encode everything anew")
    what.add_argument("--list", action="store_true", help="show what is in the cache")


def _add_train(commands: Any) -> None:
    text = "Caches what is missing, then trains. Under torchrun it uses every process it is given."
    parser = _add(commands, "train", _train, "train an adapter, or the whole model", text)
    _add_config(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on from the newest valid checkpoint of the latest run, or of this run or checkpoint folder",
    )


def _add_eval(commands: Any) -> None:
    text = "Held-out losses, sample videos and measures of them, on data.eval: of a run's newest save, or as told."
    parser = _add(commands, "eval", _eval, "what a run, an adapter or the base has learned", text)
    parser.add_argument("config", metavar="CONFIG_OR_RUN", help="a YAML file (its latest run) or a run's folder")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="keys to set over the file's")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--adapter", default="", metavar="PATH", help="evaluate this adapter")
    what.add_argument("--base", action="store_true", help="evaluate the base model, without any adapter")
    _add_ema(parser)
    parser.add_argument("--out", default="", metavar="DIR", help="where to write (eval/ in the run's folder)")


def _add_ema(parser: argparse.ArgumentParser) -> None:
    text = "the averaged weights, or the raw ones (averaged where there are any)"
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, default=None, help=text)


def _add_sample(commands: Any) -> None:
    text = "Makes videos of prompts. Without RUN_OR_ADAPTER, by the base model that --model names."
    parser = _add(commands, "sample", _sample, "prompts to videos, by a run, an adapter or the base", text)
    option = parser.add_argument
    option("source", metavar="RUN_OR_ADAPTER", nargs="?", default="", help="a run, a save, an adapter file or Hub id")
    option("overrides", metavar="key=value", nargs="*", help="keys to set over the run's config")
    option("--model", default="", metavar="PATH", help="the base, where it is not where it was trained on")
    option("--prompt", action="append", default=[], metavar="TEXT", help="what to make; may be given again")
    option("--prompts", default="", metavar="FILE", help="a text file with one prompt a line")
    option("--count", type=_count, default=1, metavar="N", help="videos of each prompt, with seeds that count up (1)")
    option("--size", default="", metavar="WxHxF", help="width, height and frames, such as 832x480x33")
    option("--rgb", default="", metavar="CLIP", help="make the other streams of this video: matting")
    option("--alpha", default="", metavar="CLIP", help="make the RGB of this matte: painting")
    option("--out", default="samples", metavar="DIR", help="where to write (samples)")
    option("--format", action="append", default=[], metavar="NAME", help="mov, webm, png, …; may be given again")
    for name in ("steps", "guidance", "shift", "seed", "scheduler", "alpha-mode", "background"):
        option(f"--{name}", metavar="VALUE", help=f"as sample.{name.replace('-', '_')}")
    _add_ema(parser)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _add_inspect(commands: Any) -> None:
    text = "Opens every sample of a data set, judges its matte, and writes one page that shows them all."
    parser = _add(commands, "inspect", _inspect, "find every bad pair, and see the good ones", text)
    parser.add_argument("dataset", metavar="DATASET", help="a folder of pairs, a manifest, or a config")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="keys to set, such as data.fill=black")
    parser.add_argument("--out", default="inspect.html", metavar="PAGE", help="where to write (inspect.html)")


def _add_export(commands: Any) -> None:
    text = "Writes an adapter, or a run's newest, under the names that another program reads, or merged into its base."
    parser = _add(commands, "export", _export, "an adapter for other programs, or merged", text)
    parser.add_argument("path", metavar="RUN_OR_ADAPTER", help="a run's folder, an adapter's, a file or a Hub id")
    formats = ("transpixeler", "comfyui", "diffusers", "kohya", "merged")
    parser.add_argument("--format", required=True, choices=formats, help="whose names, or `merged` for a full model")
    parser.add_argument("--out", required=True, metavar="PATH", help="a folder, or a .safetensors file")
    parser.add_argument("--base", default="", metavar="MODEL", help="for `merged`, where the adapter does not say it")
    parser.add_argument("--alpha", type=float, help="of a foreign adapter whose file does not say it")
    parser.add_argument("--stream", default="seg", help="that a foreign joint adapter's embedding is for (seg)")


def _add_report(commands: Any) -> None:
    text = "Writes RUN/report.html anew: curves, held-out losses, alpha, sample videos, speed and skipped clips."
    parser = _add(commands, "report", _report, "write a run's report page", text)
    parser.add_argument("run", metavar="RUN", help="a run's folder, such as OUTPUT_DIR/latest")


# --- shared ----------------------------------------------------------------------------------------------------------


def _config(arguments: argparse.Namespace) -> Config:
    from transpixeler import configfile

    return configfile.load(arguments.config, arguments.overrides)


def _running(config: Config | None = None):
    from transpixeler import runtime

    minutes = config.parallel.timeout_minutes if config else 10.0
    return runtime.running(timeout_minutes=minutes)
