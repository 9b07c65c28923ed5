"""Run one command: the command line in, an exit code out (0 done, 1 a fault, 2 the user's input is wrong).

These are the exit codes of a rank; torchrun itself reports them in its summary and always exits with 1.
Each command imports what it needs when it runs, so that `--help` and a misspelt key answer without loading torch.
"""

from __future__ import annotations

import argparse
import atexit
import errno
import gc
import os
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from transpixeler.arguments import OTHERS_OPTIONS, make_parser
from transpixeler.config import Config, Fault, UserError
from transpixeler.files import printable

if TYPE_CHECKING:
    from transpixeler.data.features.needs import Needs
    from transpixeler.data.upkeep import Report
    from transpixeler.parallel.runtime import Runtime

SECONDS_FOR_MAIN = 5.0  # that other ranks leave rank 0 to tell an error
# What a user can do about a file; the rest, such as a full disk, is no mistake in the input.
MENDABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
}
Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that argv names and return its exit code."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    threading.excepthook = _tell_thread_error
    atexit.register(gc.freeze)  # or the interpreter's end searches all of torch for cycles: about a second a process
    try:
        return COMMANDS[arguments.command](arguments)
    except UserError as error:
        if arguments.debug:
            traceback.print_exc()
        _say(str(error))
        return 2
    except Fault as fault:
        _say(str(fault))
        return 1
    except KeyboardInterrupt as stop:
        _say_stopped(stop, arguments)
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
    arguments, left = parser.parse_known_args(_explicit_resume(argv))
    for word in left:
        if (ours := OTHERS_OPTIONS.get(word.partition("=")[0])) is not None:
            parser.error(f"{word.partition('=')[0]} {ours}")
    overrides = [word for word in left if "=" in word and not word.startswith("-")]
    if left != overrides or (overrides and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if overrides:
        arguments.overrides = [*arguments.overrides, *overrides]
    return arguments


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
    print(f"transpixeler: {f'[rank {rank}] ' if rank != '0' else ''}{printable(message)}", file=sys.stderr, flush=True)


def _say_stopped(stop: KeyboardInterrupt, arguments: argparse.Namespace) -> None:
    """Print that Ctrl-C ended the command and, for a training that was saved, the command that goes on with it."""
    if os.environ.get("RANK", "0") != "0":
        return
    print(f"transpixeler: {str(stop) or 'stopped'}", file=sys.stderr)
    if run := getattr(stop, "run", None):
        words = ["train", arguments.config, *arguments.overrides, "--resume", str(run)]
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


# --- commands --------------------------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from transpixeler.demo.write import write_demo

    with _running():
        write_demo(Path(arguments.folder), seed=arguments.seed, depth=arguments.depth, force=arguments.force)
    return 0


def _init(arguments: argparse.Namespace) -> int:
    from transpixeler.adapters.fresh import init_command

    out = init_command(
        arguments.family,
        shape=arguments.shape,
        encoders=arguments.encoders,
        out=arguments.out,
        seed=arguments.seed,
    )
    print(out)
    return 0


def _cache(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    from transpixeler.data import upkeep

    what = {name: getattr(arguments, name) for name in ("verify", "gc", "rebuild", "list", "export")}
    with _running(config) as runtime:
        report = upkeep.cache_command(config, runtime, **what)
        if runtime.is_main:
            _print_cache(report, arguments)
    return 1 if report.problems else 0


def _print_cache(report: Report, arguments: argparse.Namespace) -> None:
    for shelf in report.shelves:
        size = f"{shelf.bytes / 2**20:,.1f} MiB in {shelf.segments} segments"
        print(f"{shelf.name:40} {shelf.records:>9,} records, {size}")
    for made in report.exported:
        repeats = f", for a source with repeats: {made.repeats}" if made.repeats > 1 else ""
        print(printable(f"{made.path}: {made.rows:,} rows for data.{made.key}{repeats}"))
    for problem in report.problems:
        print(problem)
    if arguments.verify:
        bad = len(report.problems)
        print(f"{bad} damaged: they count as missing now and are encoded next time" if bad else "every record is whole")
    if arguments.gc or arguments.rebuild:
        print(f"removed {report.removed_records:,} records, {report.removed_bytes / 2**20:,.1f} MiB")


def _train(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    from transpixeler.runs.folder import Going
    from transpixeler.training import preflight, rehearsal, trainer

    going = Going(restart_steps=arguments.restart_steps, weights_only=arguments.weights_only)
    preflight.check_import(config, arguments.config, arguments.overrides)
    with _running(config) as runtime:
        if arguments.dry_run:
            rehearsal.rehearse(config, runtime, resume=arguments.resume, going=going)
            return 0
        folder = trainer.train(config, runtime, resume=arguments.resume, going=going)
        if runtime.is_main:
            print(folder)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    import json

    from transpixeler.planning import plan, text

    asked = {name: getattr(arguments, name) for name in ("gpus", "memory", "device", "peak")}
    made = plan.make_plan(config, *plan.find_machine(config, **asked))
    as_json = arguments.json
    print(json.dumps(plan.plain(made), indent=1, ensure_ascii=False) if as_json else printable(text.describe(made)))
    return 0


def _push(arguments: argparse.Namespace) -> int:
    from transpixeler.publishing import hub

    terms = hub.Terms(arguments.repo, private=not arguments.public, base=arguments.base, license=arguments.license)
    parcel = hub.pack(arguments.path, terms, ema=arguments.ema)
    print(printable(hub.listing(parcel) if arguments.dry_run else hub.push(parcel)))
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from transpixeler.evaluation.command import eval_command
    from transpixeler.sampling.saves import load_for_eval

    overrides = arguments.overrides
    source = load_for_eval(
        arguments.config, overrides, adapter=arguments.adapter, base=arguments.base, ema=arguments.ema
    )
    with _running(source.config) as runtime:
        eval_command(source, runtime, out=arguments.out, asked_layout=_asks_layout(overrides))
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    path, overrides = arguments.source, [*arguments.overrides, *_sample_overrides(arguments)]
    if "=" in path and not Path(path).exists():  # an override in the place of the source
        path, overrides = "", [path, *overrides]
    from transpixeler.data.prompts import GivenFiles
    from transpixeler.sampling.command import SampleOptions, sample_command
    from transpixeler.sampling.saves import base_model_alone, load_saved

    source = load_saved(path, overrides, ema=arguments.ema) if path else base_model_alone(overrides)
    options = SampleOptions(
        prompts=tuple(arguments.prompt),
        prompts_file=arguments.prompts,
        count=arguments.count,
        out=arguments.out,
        resume=arguments.resume,
        given=GivenFiles(rgb=arguments.rgb, alpha=arguments.alpha, image=arguments.image, last=arguments.last),
        asked_layout=_asks_layout(overrides),
    )
    with _running(source.config) as runtime:
        sample_command(source, runtime, options)
        if runtime.is_main:
            print(printable(options.out))
    return 0


def _sample_overrides(arguments: argparse.Namespace) -> list[str]:
    """Return the overrides that options such as --steps stand for."""
    keys = ("steps", "guidance", "shift", "seed", "scheduler", "alpha_mode", "background")
    found = [f"sample.{key}={getattr(arguments, key)}" for key in keys if getattr(arguments, key) is not None]
    if arguments.model:
        found.append(f"model.path={arguments.model}")
    if arguments.format:
        found.append(f"sample.formats=[{', '.join(arguments.format)}]")
    if arguments.size:
        from transpixeler.data.prompts import parse_size

        if (size := parse_size(arguments.size)) is None:
            raise UserError(f"--size: {arguments.size} is not WIDTHxHEIGHTxFRAMES, for example 832x480x33")
        found.append(f"sample.size={list(size)}")
    return found


def _asks_layout(overrides: Sequence[str]) -> bool:
    return any(override.startswith("parallel.") for override in overrides)


def _inspect(arguments: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from transpixeler import configfile

    if arguments.dataset.endswith((".yaml", ".yml")):
        config = _on_base(configfile.load(arguments.dataset, arguments.overrides))
    else:
        source = json.dumps(arguments.dataset, ensure_ascii=False)  # YAML reads a JSON text as it is
        config = configfile.from_overrides([f"data.train=[{{path: {source}}}]", *arguments.overrides])
    from transpixeler.publishing.dataset import inspect_dataset

    sources = (*config.data.train, *config.data.eval)
    if not sources:
        raise UserError(f"data.train: {arguments.dataset} names no data; set it to a folder of pairs or a manifest")
    found = inspect_dataset(
        sources,
        Path(arguments.out),
        streams=config.suffixes,
        data=config.data,
        needs=_needs(config),
        seed=config.seed,
    )
    print(printable("\n".join(found.lines())))
    return 2 if found.bad or not found.buckets else 0


def _needs(config: Config) -> Needs:
    """Return what the model takes, or a usual one while the model is not here yet."""
    from pathlib import Path

    from transpixeler.data.features.needs import Needs
    from transpixeler.models.family import open_model

    if config.model.path and Path(config.model.path).exists():
        return Needs.of(config, open_model(config.model))
    needs = Needs.of(config, None)
    usual = needs.geometry
    tall, wide = usual.unit
    print(
        f"model.path: not here; buckets are counted for sides of {wide}×{tall} pixels and {usual.stride[0]}k+1 frames"
    )
    return needs


def _export(arguments: argparse.Namespace) -> int:
    from transpixeler.adapters.command import export_command
    from transpixeler.sampling.saves import find_save

    made = export_command(
        find_save(arguments.path, ema=arguments.ema).path,
        format=arguments.format,
        out=arguments.out,
        base=arguments.base,
        alpha=arguments.alpha,
        stream=arguments.stream,
    )
    print("\n".join(map(str, made)))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from transpixeler.publishing import report

    print(printable(str(report.write_report(Path(arguments.run)))))
    return 0


COMMANDS: dict[str, Command] = {
    "demo": _demo,
    "init": _init,
    "plan": _plan,
    "cache": _cache,
    "train": _train,
    "eval": _eval,
    "sample": _sample,
    "inspect": _inspect,
    "export": _export,
    "push": _push,
    "report": _report,
}


# --- shared ----------------------------------------------------------------------------------------------------------


def _config(arguments: argparse.Namespace) -> Config:
    from transpixeler import configfile

    return _on_base(configfile.load(arguments.config, arguments.overrides))


def _on_base(config: Config) -> Config:
    """Return the config with a run in `model.path` pinned to what it stands for."""
    if not os.path.isdir(config.model.path):  # noqa: PTH112  a Hub id, or a file: nothing that needs torch to be read
        return config
    from transpixeler.adapters.bases import on_trained_base

    return on_trained_base(config)


def _running(config: Config | None = None) -> AbstractContextManager[Runtime]:
    from transpixeler.parallel import runtime

    minutes = config.parallel.timeout_minutes if config else 10.0
    return runtime.running(timeout_minutes=minutes)
