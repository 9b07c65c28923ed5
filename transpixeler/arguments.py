"""What may be said on the command line: one function a command. In: nothing. Out: the parser that `cli` runs."""

from __future__ import annotations

import argparse
from typing import Any


class _Help(argparse.RawDescriptionHelpFormatter):
    """Room for the texts, and defaults left to the reference."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="transpixeler",
        formatter_class=_Help,
        description="Teaches a video diffusion transformer to generate an RGB video and its companion together.",
        epilog="Keys of a config: configs/reference.yaml. Any of them is set on the command line as a.b=value.",
    )
    _add_debug(parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    _add_demo(commands)
    _add_plan(commands)
    _add_cache(commands)
    _add_train(commands)
    _add_eval(commands)
    _add_sample(commands)
    _add_inspect(commands)
    _add_export(commands)
    _add_push(commands)
    _add_report(commands)
    return parser


def _add(commands: Any, name: str, help: str, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=text, formatter_class=_Help)
    _add_debug(parser, default=argparse.SUPPRESS)  # which leaves what was said before the command
    return parser


def _add_debug(parser: argparse.ArgumentParser, **options: Any) -> None:
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of a user's mistake as well", **options
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file; see configs/ for examples")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="keys to set over the file's")


def _add_demo(commands: Any) -> None:
    text = "Writes a tiny trained Wan pipeline, a synthetic set of RGBA pairs and a config that trains on them."
    parser = _add(commands, "demo", "write a tiny model, data and config to try everything on", text)
    parser.add_argument("folder", metavar="DIR", help="where to write")
    parser.add_argument("--seed", type=int, default=0, help="of the clips (0)")
    parser.add_argument("--depth", action="store_true", help="a third stream beside RGB and alpha: NAME_depth.mp4")
    parser.add_argument("--force", action="store_true", help="replace the demo that stands in DIR")


def _add_plan(commands: Any) -> None:
    text = "Says what a config will do, without reading weights or encoding: buckets, steps, memory, time and layouts."
    parser = _add(commands, "plan", "steps, memory, time and layouts, before anything is loaded", text)
    _add_config(parser)
    option = parser.add_argument
    option("--gpus", type=_count, default=0, metavar="N", help="find layouts for so many (as the config's parallel.*)")
    option("--device", default="", metavar="NAME", help="h100, a100, 4090 …, or cpu (the GPU that is here, else h100)")
    option("--memory", type=float, default=0.0, metavar="GB", help="of one GPU, where it is not the device's usual")
    option("--peak", type=float, default=0.0, metavar="TFLOPS", help="dense bf16 peak of one GPU, likewise")
    option("--json", action="store_true", help="the same for other programs: bytes, seconds and FLOP")


def _add_cache(commands: Any) -> None:
    text = "Encodes every clip and caption that the cache lacks. Runs alone, under torchrun, and again after any stop."
    parser = _add(commands, "cache", "encode what the cache lacks", text)
    _add_config(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--verify", action="store_true", help="read every record, name each that is damaged and drop it")
    what.add_argument("--gc", action="store_true", help="remove what this config does not refer to")
    what.add_argument("--rebuild", action="store_true", help="encode everything anew")
    what.add_argument("--list", action="store_true", help="show what is in the cache")


def _add_train(commands: Any) -> None:
    text = "Caches what is missing, then trains. Under torchrun it uses every process it is given."
    parser = _add(commands, "train", "train an adapter, or the whole model", text)
    _add_config(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on from the newest valid checkpoint of the run that run_name names, else of the latest, or of this "
        "run or checkpoint folder",
    )


def _add_eval(commands: Any) -> None:
    text = "Held-out losses, sample videos and measures of them, on data.eval: of a run's newest save, or as told."
    parser = _add(commands, "eval", "what a run, an adapter or the base has learned", text)
    source = "a YAML file (the run that its run_name names, else its latest) or a run's folder"
    parser.add_argument("config", metavar="CONFIG_OR_RUN", help=source)
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="keys to set over the file's")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--adapter", default="", metavar="PATH", help="evaluate this adapter")
    what.add_argument("--base", action="store_true", help="evaluate the base model, without any adapter")
    _add_ema(parser)
    parser.add_argument(
        "--out", default="", metavar="DIR", help="where to write (RUN/eval/STEP, or STEP-raw for raw weights)"
    )


def _add_ema(parser: argparse.ArgumentParser) -> None:
    text = "the averaged weights, or the raw ones (averaged where there are any)"
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, default=None, help=text)


def _add_sample(commands: Any) -> None:
    text = "Makes videos of prompts. Without RUN_OR_ADAPTER, by the base model that --model names."
    parser = _add(commands, "sample", "prompts to videos, by a run, an adapter or the base", text)
    option = parser.add_argument
    option("source", metavar="RUN_OR_ADAPTER", nargs="?", default="", help="a run, a save, an adapter file or Hub id")
    option("overrides", metavar="key=value", nargs="*", help="keys to set over the run's config")
    option("--model", default="", metavar="PATH", help="the base, where it is not where it was trained on")
    option("--prompt", action="append", default=[], metavar="TEXT", help="what to make; may be given again")
    option("--prompts", default="", metavar="FILE", help="a text file with one prompt a line")
    option("--count", type=_count, default=1, metavar="N", help="videos of each prompt, with seeds that count up (1)")
    option("--size", default="", metavar="WxHxF", help="width, height and frames, such as 832x480x33; of a CLIP too")
    option("--rgb", default="", metavar="CLIP", help="make the other streams of this video's beginning: matting")
    option("--alpha", default="", metavar="CLIP", help="make the RGB of this matte's beginning: painting")
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
    parser = _add(commands, "inspect", "find every bad pair, and see the good ones", text)
    parser.add_argument("dataset", metavar="DATASET", help="a folder of pairs, a manifest, or a config")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="keys to set, such as data.fill=black")
    parser.add_argument("--out", default="inspect.html", metavar="PAGE", help="a file or a folder (inspect.html)")


def _add_export(commands: Any) -> None:
    text = "Writes an adapter, or a run's newest, under the names that another program reads, or merged into its base."
    parser = _add(commands, "export", "an adapter for other programs, or merged", text)
    parser.add_argument("path", metavar="RUN_OR_ADAPTER", help="a run's folder, an adapter's, a file or a Hub id")
    formats = ("transpixeler", "comfyui", "diffusers", "kohya", "merged")
    parser.add_argument("--format", required=True, choices=formats, help="whose names, or `merged` for a full model")
    parser.add_argument("--out", required=True, metavar="PATH", help="a folder, or a .safetensors file")
    parser.add_argument("--base", default="", metavar="MODEL", help="for `merged`, where the adapter does not say it")
    parser.add_argument("--alpha", type=float, help="of a foreign adapter whose file does not say it")
    parser.add_argument("--stream", default="seg", help="that a foreign joint adapter's embedding is for (seg)")
    _add_ema(parser)


def _add_push(commands: Any) -> None:
    text = "Uploads what was trained, with its config, samples and a model card, to the Hub; only what has changed."
    parser = _add(commands, "push", "what was trained to the Hub, with a model card", text)
    option = parser.add_argument
    option("path", metavar="RUN_OR_ADAPTER", help="a run's folder (its newest save), a save or an adapter file")
    option("--repo", required=True, metavar="USER/NAME", help="made if it does not exist")
    option("--public", action="store_true", help="a new repo is private otherwise")
    option("--base", default="", metavar="USER/NAME", help="the base's Hub id, where it was trained from a folder")
    option("--license", default="apache-2.0", metavar="ID", help="of the adapter, for its card (apache-2.0)")
    option("--dry-run", action="store_true", help="show what would go and the card; talk to nobody")
    _add_ema(parser)


def _add_report(commands: Any) -> None:
    text = "Writes RUN/report.html anew: curves, held-out losses, alpha, sample videos, speed and skipped clips."
    parser = _add(commands, "report", "write a run's report page", text)
    parser.add_argument("run", metavar="RUN", help="a run's folder, such as OUTPUT_DIR/latest")
