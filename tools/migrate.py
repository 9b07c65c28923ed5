"""Convert the config of another trainer into one of ours.

Read are the TOML files of diffusion-pipe and TransPixeler, and Open-Sora's Python files, of which nothing is executed.
Every key is carried over or listed with a reason, on the terminal and at the top of the YAML. Defaults that differ
between the programs are written out or noted. Batch sizes there are per GPU and here for all GPUs together, so say with
--gpus how many there were. The YAML is checked before it is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import migrate_open_sora
import migrate_toml
import yaml
from migrate_buckets import Rule
from migrate_keys import Migration
from tooling import check_counts, folder_given, run

from transpixeler.config import loading
from transpixeler.config.sections import Config, UserError
from transpixeler.data.names import printable
from transpixeler.files import whole

SECTIONS = [field.name for field in dataclasses.fields(Config)]


class _Dumper(yaml.SafeDumper):
    """Write rules of buckets in one line each, as there may be hundreds."""


_Dumper.add_representer(
    Rule, lambda dumper, rule: dumper.represent_mapping("tag:yaml.org,2002:map", rule, flow_style=True)
)


def main(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    check_counts(gpus=arguments.gpus)
    folder_given(arguments.root, "the folder that training was started in")
    if arguments.out.exists() and not arguments.force:
        raise UserError(f"{arguments.out}: already exists; choose another --out, or --force")
    migration = Migration(arguments)
    if arguments.config.suffix == ".py":
        migrate_open_sora.convert(arguments, migration)
    elif arguments.model:
        raise UserError("--model: a TOML names its own model; change model.path in the YAML")
    else:
        migrate_toml.convert(arguments, migration)
    _write(migration, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("config", type=Path, help="the training TOML, or a .py of Open-Sora")
    add("--dataset", type=Path, help="the dataset TOML, or Open-Sora's csv (default: the one that the config names)")
    add("--model", help="for Open-Sora: the base to train, a folder or Hub id (default: from_pretrained)")
    add("--out", type=Path, required=True, help="the YAML file to write")
    add("--gpus", type=int, help="number of GPUs that it was used with (default for a TOML: pipeline_stages)")
    add(
        "--root",
        type=Path,
        default=Path(),
        help="the folder that training was started in, for relative paths",
    )
    add("--force", action="store_true", help="replace an existing YAML file")
    return parser


def _write(migration: Migration, arguments: argparse.Namespace) -> None:
    config = {name: migration.config[name] for name in SECTIONS if name in migration.config}
    head = [
        f"Made from {arguments.config.name}. Not carried over:",
        *(f"  {k}: {why}" for k, why in migration.left_out),
    ]
    head = head if migration.left_out else [f"Made from {arguments.config.name}. Every key is carried over."]
    comments = "".join(f"# {_one_line(line)}\n" for line in [*head, *(f"Note: {note}" for note in migration.notes)])
    text = comments + "\n" + yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    with whole(arguments.out) as draft:
        draft.write_text(text, encoding="utf-8")
        try:
            loading.load(draft)
        except UserError as error:
            raise UserError(f"{arguments.config}: {str(error).replace(str(draft), 'the YAML made of it')}") from None
    print(f"{arguments.out}: {migration.mapped} keys carried over, {len(migration.left_out)} not")
    for key, why in migration.left_out:
        print(_one_line(f"  {key}: {why}"))
    for note in migration.notes:
        print(_one_line(f"note: {note}"))


def _one_line(text: str) -> str:
    """Escape all that would end a line of YAML, so that a comment stays one, and all that a terminal would obey."""
    return re.sub("[\u2028\u2029]", lambda found: repr(found[0])[1:-1], printable(text))


if __name__ == "__main__":
    raise SystemExit(run("migrate", main))
