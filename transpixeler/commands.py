"""Run each command: parsed arguments go in, an exit code comes out.

Each command imports what it needs when it runs, so that `--help` and a misspelt key answer without loading torch.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from transpixeler.config.sections import Config, UserError, parse_size
from transpixeler.files import near, printable, shown_path

if TYPE_CHECKING:
    from pathlib import Path

    from transpixeler.data.features.needs import Needs
    from transpixeler.data.upkeep import Report
    from transpixeler.parallel.runtime import Runtime

logger = logging.getLogger("transpixeler")
GIVEN_OPTIONS = ("rgb", "alpha", "image", "last", "between", "factor", "extend", "frames")
Command = Callable[[argparse.Namespace], int]


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
    print(printable(shown_path(out)))
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
        print(printable(f"{shown_path(made.path)}: {made.rows:,} rows for data.{made.key}{repeats}"))
    for problem in report.problems:
        print(printable(near(str(problem))))
    if arguments.verify:
        bad = len(report.problems)
        print(f"{bad} damaged: they count as missing now and are encoded next time" if bad else "every record is whole")
    if arguments.gc or arguments.rebuild:
        print(f"removed {report.removed_records:,} records, {report.removed_bytes / 2**20:,.1f} MiB")


def _train(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    from transpixeler.publishing import report
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
            _name_page("report", folder / report.PAGE)
            print(printable(shown_path(folder)))
    return 0


def _name_page(what: str, page: Path) -> None:
    """Log where the page is that shows what was made, if it was written."""
    if page.is_file():
        logger.info("%-8s %s", what, shown_path(page))


def _plan(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    import json

    from transpixeler.parallel.runtime import quiet_libraries
    from transpixeler.planning import plan, text

    quiet_libraries()
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


def _scorer(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    from transpixeler.scoring.training import train_scorer

    with _running(config) as runtime:
        file = train_scorer(config, runtime, resume=arguments.resume)
        if runtime.is_main:
            print(printable(shown_path(file)))
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    path, overrides = arguments.source, [*arguments.overrides, *_sample_overrides(arguments)]
    if "=" in path and not Path(path).exists():  # an override in the place of the source
        path, overrides = "", [path, *overrides]
    from transpixeler.data.prompts import GivenFiles
    from transpixeler.publishing.sheet_page import write_sheet_page
    from transpixeler.sampling.command import SampleOptions, sample_command
    from transpixeler.sampling.saves import base_model_alone, load_saved

    source = load_saved(path, overrides, ema=arguments.ema) if path else base_model_alone(overrides)
    options = SampleOptions(
        prompts=tuple(arguments.prompt),
        prompts_file=arguments.prompts,
        count=arguments.count,
        out=arguments.out,
        resume=arguments.resume,
        given=GivenFiles(**{name: getattr(arguments, name) for name in GIVEN_OPTIONS}),
        asked_layout=_asks_layout(overrides),
    )
    with _running(source.config) as runtime:
        made = sample_command(source, runtime, options)
        if runtime.is_main:
            _name_page("sheet", write_sheet_page(Path(options.out), made.folders))
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
        if (size := parse_size(arguments.size)) is None:
            raise UserError(f"--size: {arguments.size} is not WIDTHxHEIGHTxFRAMES, for example 832x480x33")
        found.append(f"sample.size={list(size)}")
    return found


def _asks_layout(overrides: Sequence[str]) -> bool:
    return any(override.startswith("parallel.") for override in overrides)


def _inspect(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from transpixeler.config import loading

    if arguments.dataset.endswith((".yaml", ".yml")):
        config = _on_base(loading.load(arguments.dataset, arguments.overrides))
    else:
        source = loading.quoted(arguments.dataset)
        config = loading.from_overrides([f"data.train=[{{path: {source}}}]", *arguments.overrides])
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
    print(printable(near("\n".join(found.lines()))))
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
    steps = f"widths in steps of {wide}, heights in steps of {tall}, and {usual.stride[0]}k+1 frames"
    print(f"model.path: the model, which says what sizes it takes, is not here; clips are counted for {steps}")
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
        companion=arguments.only,
    )
    print(printable("\n".join(map(shown_path, made))))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from transpixeler.publishing import compare, report

    runs, out = [Path(run) for run in arguments.runs], Path(arguments.out) if arguments.out else None
    if len(runs) > 1:
        made = compare.write_comparison(runs, out or Path(compare.PAGE))
    else:
        made = report.write_report(runs[0], out=out / report.PAGE if out and out.is_dir() else out)
    print(printable(shown_path(made)))
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from transpixeler.config.schema import config_schema
    from transpixeler.files import write_text, writing_to

    text = json.dumps(config_schema(), indent=1, ensure_ascii=False) + "\n"
    if not arguments.out:
        print(text, end="")
        return 0
    with writing_to(Path(arguments.out), "--out"):
        write_text(Path(arguments.out), text)
    print(printable(shown_path(arguments.out)))
    return 0


def _completion(arguments: argparse.Namespace) -> int:
    try:
        import shtab  # pyright: ignore[reportMissingImports]  an optional extra
    except ModuleNotFoundError:
        raise UserError("completion: needs the package shtab; run `pip install 'transpixeler[completion]'`") from None
    from transpixeler.arguments import make_parser, mark_files

    print(shtab.complete(mark_files(make_parser()), shell=arguments.shell))
    return 0


COMMANDS: dict[str, Command] = {
    "demo": _demo,
    "init": _init,
    "plan": _plan,
    "cache": _cache,
    "train": _train,
    "eval": _eval,
    "scorer": _scorer,
    "sample": _sample,
    "inspect": _inspect,
    "export": _export,
    "push": _push,
    "report": _report,
    "schema": _schema,
    "completion": _completion,
}


# --- shared ----------------------------------------------------------------------------------------------------------


def _config(arguments: argparse.Namespace) -> Config:
    from transpixeler.config import loading

    return _on_base(loading.load(arguments.config, arguments.overrides))


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
