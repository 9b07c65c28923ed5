"""Define the command line, one function a command. Out: the parser that `cli` runs; nothing here imports torch."""

from __future__ import annotations

import argparse
import math
from functools import partial
from typing import Any

from transpixeler import __version__
from transpixeler.usage import EXAMPLES

_PATHS = {  # names of arguments that take a path
    *("CONFIG", "CONFIG_OR_RUN", "RUN", "RUN_OR_ADAPTER", "DATASET", "PATH", "MODEL", "SHAPE"),
    *("FILE", "CLIP", "DIR", "FOLDER", "PAGE"),
}


class _Help(argparse.RawDescriptionHelpFormatter):
    """Wide enough for our texts; the reference config lists the defaults."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="transpixeler",
        formatter_class=_Help,
        description="Train a video diffusion transformer to generate aligned videos at once: RGB and its alpha.",
        epilog="examples:\n  transpixeler demo demo\n  transpixeler train demo/config.yaml\n"
        '  transpixeler sample demo/output/latest --prompt "a red circle drifts left"\n\n'
        "configs/reference.yaml explains every config key. Any key can be set on the command line: a.b=value.\n"
        "`transpixeler COMMAND --help` shows the options and examples of a command.",
    )
    parser.add_argument(
        "--version", action="version", version=f"transpixeler {__version__}", help="show the version and exit"
    )
    _add_debug(parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    _add_demo(commands)
    _add_init(commands)
    _add_plan(commands)
    _add_cache(commands)
    _add_train(commands)
    _add_eval(commands)
    _add_scorer(commands)
    _add_sample(commands)
    _add_inspect(commands)
    _add_export(commands)
    _add_push(commands)
    _add_report(commands)
    _add_schema(commands)
    _add_completion(commands)
    return parser


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command."""
    return next(dict(action.choices) for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def mark_files(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Say of each argument that takes a path that it does, in the way that shtab reads; returns the parser."""
    for command in commands_of(parser).values():
        for action in command._actions:
            if action.metavar in _PATHS:
                action.complete = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}  # type: ignore[attr-defined]
    return parser


def _add(commands: Any, name: str, help: str, text: str) -> argparse.ArgumentParser:
    shown = "\n".join(["examples:", *(f"  {line}" for line in EXAMPLES[name])])
    parser = commands.add_parser(name, help=help, description=text, epilog=shown, formatter_class=_Help)
    _add_debug(parser, default=argparse.SUPPRESS)  # else it would reset a --debug given before the command
    return parser


def _add_debug(parser: argparse.ArgumentParser, **options: Any) -> None:
    parser.add_argument(
        "--debug", action="store_true", help="also show the traceback of an error in the input", **options
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file; configs/ has examples")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="config keys to set, in place of the file's values"
    )


def _add_demo(commands: Any) -> None:
    text = "Write a tiny trained model, a synthetic data set of RGBA pairs and a config that trains on them."
    parser = _add(commands, "demo", "write a tiny model, data set and config to try things with", text)
    parser.add_argument("folder", metavar="DIR", help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the synthetic clips (default: 0)")
    parser.add_argument("--depth", action="store_true", help="add a third stream, depth: NAME_depth.mp4")
    parser.add_argument("--force", action="store_true", help="replace a demo that is already in DIR")


def _add_init(commands: Any) -> None:
    text = "Write a base with random weights, of any shape, and the VAE and encoders of a model that is there."
    parser = _add(commands, "init", "write a base with random weights, to train from nothing", text)
    option = parser.add_argument
    option("--family", required=True, metavar="NAME", help="the architecture, as in model.family")
    option(
        "--shape",
        required=True,
        metavar="SHAPE",
        help="a JSON file like transformer/config.json, or a published shape by its name",
    )
    option("--encoders", required=True, metavar="MODEL", help="a folder or Hub id with the VAE and encoders to use")
    option("--out", required=True, metavar="DIR", help="the folder to write")
    option("--seed", type=int, default=0, help="seed of the weights (default: 0)")


def _add_plan(commands: Any) -> None:
    text = "Show buckets, steps, memory, time and layouts of a config, without loading weights or encoding anything."
    parser = _add(commands, "plan", "estimate steps, memory, time and layouts before training", text)
    _add_config(parser)
    option = parser.add_argument
    option(
        "--gpus",
        type=_count,
        default=0,
        metavar="N",
        help="compare layouts for N GPUs (default: the config's parallel.*)",
    )
    option(
        "--device",
        default="",
        metavar="NAME",
        help="h100, a100, 4090 …, or cpu (default: this machine's GPU, else h100)",
    )
    option(
        "--memory",
        type=_size,
        default=0.0,
        metavar="GB",
        help="memory of one GPU, if it is not the usual one for the device",
    )
    option(
        "--peak",
        type=_size,
        default=0.0,
        metavar="TFLOPS",
        help="dense bf16 peak of one GPU, if it is not known for the device",
    )
    option("--json", action="store_true", help="print JSON for other programs, in bytes, seconds and FLOP")


def _add_cache(commands: Any) -> None:
    text = "Encode every clip and caption that is not cached yet. Works under torchrun too, and resumes if stopped."
    parser = _add(commands, "cache", "encode clips and captions that are not cached yet", text)
    _add_config(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--verify", action="store_true", help="check every record, list damaged ones and drop them")
    what.add_argument("--gc", action="store_true", help="remove records that this config does not use")
    what.add_argument("--rebuild", action="store_true", help="encode everything again")
    what.add_argument("--list", action="store_true", help="list what is in the cache")
    what.add_argument(
        "--export",
        default="",
        metavar="FOLDER",
        help="encode, then write manifests and files with the features, for a machine that has no encoders",
    )


def _add_train(commands: Any) -> None:
    text = "Cache what is missing, then train. Start it with torchrun to use several GPUs."
    parser = _add(commands, "train", "train an adapter, or the whole model", text)
    _add_config(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="continue from the newest valid checkpoint of RUN (a run or checkpoint folder); without RUN, of the run "
        "that run_name names, else of the latest run",
    )
    parser.add_argument(
        "--restart-steps",
        action="store_true",
        help="with --resume: begin a new run with RUN's weights and optimizer; steps and order of samples from zero",
    )
    parser.add_argument(
        "--weights-only",
        action="store_true",
        help="with --resume: keep the weights and their averages, and begin with a fresh optimizer",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check all, build the model, read the first batch, say what would be trained, and make nothing",
    )


def _add_eval(commands: Any) -> None:
    text = "Compute held-out losses, sample videos and alpha metrics on data.eval, for a run's newest save by default."
    parser = _add(commands, "eval", "measure a run, an adapter or the base model", text)
    source = "a run's folder, or a YAML file (for the run that its run_name names, else its latest run)"
    parser.add_argument("config", metavar="CONFIG_OR_RUN", help=source)
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="config keys to set, in place of the file's values"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--adapter", default="", metavar="PATH", help="evaluate this adapter instead")
    what.add_argument("--base", action="store_true", help="evaluate the base model without an adapter")
    _add_ema(parser)
    text = "the folder to write (default: RUN/eval/STEP, or STEP-raw for raw weights)"
    parser.add_argument("--out", default="", metavar="DIR", help=text)


def _add_scorer(commands: Any) -> None:
    text = "Train a scorer on a config's clips: which caption and which companion belong to a video. See eval.scorer."
    parser = _add(commands, "scorer", "train a scorer of videos against captions and companions", text)
    _add_config(parser)
    parser.add_argument("--resume", action="store_true", help="go on with the training in OUTPUT_DIR/scorer")


def _add_ema(parser: argparse.ArgumentParser) -> None:
    text = "use the averaged (EMA) or the raw weights (default: averaged if the save has them)"
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, default=None, help=text)


def _add_sample(commands: Any) -> None:
    text = "Make videos from prompts. Without RUN_OR_ADAPTER the base model that --model names is used."
    parser = _add(commands, "sample", "make videos with a run, an adapter or the base model", text)
    option = parser.add_argument
    option("source", metavar="RUN_OR_ADAPTER", nargs="?", default="", help="a run, a save, an adapter file or a Hub id")
    option("overrides", metavar="key=value", nargs="*", help="config keys to set, in place of the run's values")
    option("--model", default="", metavar="PATH", help="the base model, if it is not at the path it was trained from")
    option("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    keys = "seed, negative, size, reference, rgb, alpha, image, last, between, factor, extend or frames"
    text = f"a text file with a prompt a line, or .jsonl: prompt, and {keys}"
    option("--prompts", default="", metavar="FILE", help=text)
    option("--resume", action="store_true", help="keep the videos in --out that are what is asked for, make the rest")
    option("--count", type=_count, default=1, metavar="N", help="videos per prompt, with increasing seeds (default: 1)")
    text = "width, height and frames, such as 832x480x33; a CLIP is resized to it"
    option("--size", default="", metavar="WxHxF", help=text)
    option("--rgb", default="", metavar="CLIP", help="matting: make the other streams for the start of this video")
    option("--alpha", default="", metavar="CLIP", help="painting: make RGB for the start of this matte")
    option("--image", default="", metavar="FILE", help="the first frame: the video goes on from it, and from its alpha")
    option("--last", default="", metavar="FILE", help="the last frame, beside --image: the video ends with it")
    option("--between", default="", metavar="CLIP", help="make frames between this clip's, and keep its own")
    factor = partial(_count, above=1)
    option("--factor", type=factor, default=0, metavar="K", help="with --between: K times the frames, and the rate")
    option("--extend", default="", metavar="CLIP", help="go on from the end of this clip, and keep its frames")
    option("--frames", type=_count, default=0, metavar="N", help="with --extend: frames of the video, the clip's too")
    option("--out", default="samples", metavar="DIR", help="the folder to write (default: samples)")
    option("--format", action="append", default=[], metavar="NAME", help="mov, webm, png, exr, …; may be repeated")
    for name in ("steps", "guidance", "shift", "seed", "scheduler", "alpha-mode", "background"):
        option(f"--{name}", metavar="VALUE", help=f"set sample.{name.replace('-', '_')}")
    _add_ema(parser)


def _count(text: str, *, above: int = 0) -> int:
    if not text.isdigit() or int(text) <= above:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above {above}")
    return int(text)


def _size(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return size


def _add_inspect(commands: Any) -> None:
    text = "Open every sample of a data set, check its matte, and write one page that shows them all."
    parser = _add(commands, "inspect", "check a data set and show every pair on one page", text)
    parser.add_argument("dataset", metavar="DATASET", help="a folder of pairs, a manifest, or a config")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="config keys to set, such as data.fill=black")
    text = "the file or folder to write (default: inspect.html)"
    parser.add_argument("--out", default="inspect.html", metavar="PAGE", help=text)


def _add_export(commands: Any) -> None:
    text = "Write an adapter (of a run: its newest) with another program's tensor names, or merged into its base model."
    parser = _add(commands, "export", "convert an adapter for other programs, or merge it", text)
    parser.add_argument("path", metavar="RUN_OR_ADAPTER", help="a run, a save, an adapter file or a Hub id")
    formats = ("transpixeler", "comfyui", "diffusers", "kohya", "merged")
    parser.add_argument(
        "--format", required=True, choices=formats, help="the program to write for, or `merged` for a whole model"
    )
    parser.add_argument("--out", required=True, metavar="PATH", help="a folder or a .safetensors file to write")
    parser.add_argument(
        "--base", default="", metavar="MODEL", help="the base model for `merged`, if the adapter does not name it"
    )
    parser.add_argument("--alpha", type=float, help="alpha of another program's adapter, if its file does not say it")
    parser.add_argument(
        "--stream", default="seg", help="the stream that another program's joint adapter was trained for (default: seg)"
    )
    parser.add_argument("--only", default="", metavar="COMPANION", help="of several companions, write this one's alone")
    _add_ema(parser)


def _add_push(commands: Any) -> None:
    text = "Upload a save with its config, samples and a model card to the Hub. Only changed files are sent."
    parser = _add(commands, "push", "upload a save to the Hub with a model card", text)
    option = parser.add_argument
    option("path", metavar="RUN_OR_ADAPTER", help="a run's folder (its newest save), a save or an adapter file")
    option("--repo", required=True, metavar="USER/NAME", help="the Hub repository; created if it does not exist")
    option("--public", action="store_true", help="create the repository as public (default: private)")
    option("--base", default="", metavar="USER/NAME", help="the base model's Hub id, if it was trained from a folder")
    option("--license", default="", metavar="ID", help="license in the model card (default: that of the base)")
    option("--dry-run", action="store_true", help="print the files and the card without sending anything")
    _add_ema(parser)


def _add_report(commands: Any) -> None:
    text = (
        "Write RUN/report.html: curves, held-out losses, alpha metrics, sample videos, speed and skipped clips. Of "
        "several runs: a page with their samples side by side, their curves over each other, and what differs."
    )
    parser = _add(commands, "report", "write a run's report page, or compare runs", text)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder, such as OUTPUT_DIR/latest")
    parser.add_argument(
        "--out",
        default="",
        metavar="PAGE",
        help="the file or folder to write (default: RUN/report.html, of several runs compare.html)",
    )


def _add_schema(commands: Any) -> None:
    text = "Print the JSON schema of a config. Editors complete and check a config with it; see the guide to commands."
    parser = _add(commands, "schema", "print a JSON schema of the config, for editors", text)
    parser.add_argument("--out", default="", metavar="FILE", help="write it to this file instead")


def _add_completion(commands: Any) -> None:
    text = "Print a script that completes commands and options in a shell. Needs the package shtab."
    parser = _add(commands, "completion", "print a script for completion in a shell", text)
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell to write for")
