"""Read YAML files and `a.b=value` overrides into a checked `Config`, and write one back as YAML.

Every error names the key and the file, or the command line, that set it.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from transpixeler.config.faults import faults
from transpixeler.config.sections import Config, StreamConfig, UserError
from transpixeler.config.values import COMMAND_LINE, DEFAULTS, Key, Raw, Tree, fields_of, in_full, kind_of, to_dataclass

MERGE_KEY = "tag:yaml.org,2002:merge"  # `<<: *other`
MOST_VALUES = 100_000  # of a file with its aliases written out; ours have some hundreds
# what yaml raises for text it cannot read: a date of 2024-13-45, a bool of 7, a thousand brackets
BAD_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Return the config of a file, its bases and the overrides."""
    return build(read(path), overrides)


def read(path: str | Path) -> Tree:
    """Read a file and its bases, for one or more configs to be built from."""
    tree = Tree()
    _merge_file(tree, Path(path), ())
    return tree


def origin_of(key: str, path: str | Path, overrides: Iterable[str] = ()) -> str:
    """Return the base of a config that sets a key, or the section around it; nothing where it does so itself."""
    tree = read(path)
    for override in overrides:
        _merge_override(tree, override)
    origin = tree.origin(tuple(key.split(".")))
    return "" if origin in (str(Path(path)), COMMAND_LINE, DEFAULTS) else origin


def build(tree: Tree, overrides: Iterable[str] = ()) -> Config:
    """Build the config that a tree and overrides make together; the tree stays as it is."""
    return _build(Tree(copy.deepcopy(tree.values), dict(tree.origins)), overrides)


def from_overrides(overrides: Iterable[str]) -> Config:
    """Return the defaults with overrides applied."""
    return _build(Tree(), overrides)


def dump(config: Config) -> str:
    """Return YAML that reads back as an equal config."""
    return yaml.dump(plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _build(tree: Tree, overrides: Iterable[str]) -> Config:
    for override in overrides:
        _merge_override(tree, override)
    config = to_dataclass(Config, tree.values, (), tree)
    config = dataclasses.replace(config, output_dir=str(Path(config.output_dir).absolute()))
    for key, message in faults(config):
        raise tree.fault(tuple(key.split(".")), message)
    return config


class _Dumper(yaml.SafeDumper):
    """Safe YAML that quotes a NEL (U+0085), which would otherwise read back as two spaces."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if "\x85" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)


# --- reading ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys, keys that are not text, and values that contain themselves."""

    def construct_document(self, node: yaml.Node) -> Any:
        if _unfolded(node, {}) > MOST_VALUES:
            problem = f"its aliases unfold into more than {MOST_VALUES:,} values"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        self.deep_construct = True  # a second pass is what could make a value contain itself
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE_KEY:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _unfolded(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Count a node's values with each alias written out; `sizes` holds those of nodes counted before."""
    if id(node) not in sizes:
        sizes[id(node)] = 1  # for an alias to a node that holds it, which the loader refuses by itself
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        sizes[id(node)] += sum(_unfolded(part, sizes) for part in parts)
    return sizes[id(node)]


def _nearest(path: Path) -> str:
    """Name the YAML files beside a place, or in configs/, whose names are nearest to one that is not there."""
    folders = [folder for folder in (path.parent, Path("configs")) if folder.is_dir()]
    there = {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}
    found = difflib.get_close_matches(path.stem, there, n=1)
    return f"; did you mean {there[found[0]]}?" if found else "; name a YAML file, such as those in configs/"


def _read(path: Path, named_in: str = "") -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{named_in}{_nearest(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a YAML file{named_in}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is no text in UTF-8; give a YAML file{named_in}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}{named_in}") from None
    try:
        content = yaml.load(text, Loader=_Loader)
    except BAD_YAML as error:
        raise UserError(_bad_yaml(path, error)) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected `key: value` lines, found {kind_of(content)}")
    return content


def _bad_yaml(path: Path, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    said = [getattr(error, "context", None), getattr(error, "problem", None)]
    problem = ", ".join(part for part in said if part) or " ".join(str(error).split()) or type(error).__name__
    return f"{where}: not valid YAML: {problem}"


def _merge_file(tree: Tree, path: Path, above: tuple[Path, ...]) -> None:
    here = path.resolve()
    if here in above:
        chain = " → ".join(str(p) for p in (*above[above.index(here) :], here))
        raise UserError(f"{path}: `base:` goes round in a circle: {chain}")
    content = _read(path, f" (named as base in {above[-1]})" if above else "")
    bases = content.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"base: expected a file or a list of files, found {kind_of(bases)} (in {path})")
    for base in bases:
        _merge_file(tree, path.parent / base, (*above, here))
    _merge(tree, tree.values, content, (), str(path))


def _merge(tree: Tree, into: dict[str, Any], new: Mapping[str, Any], key: Key, origin: str) -> None:
    for name, value in new.items():
        inner = (*key, name)
        if value is None and isinstance(into.get(name), dict) and dataclasses.is_dataclass(_hint(inner)):
            continue  # a section whose keys are all commented out changes nothing
        tree.origins = {k: o for k, o in tree.origins.items() if k[: len(inner)] != inner or isinstance(value, dict)}
        tree.origins[inner] = origin
        if isinstance(value, dict):
            if not isinstance(into.get(name), dict):
                into[name] = {}
            _merge(tree, into[name], value, inner, origin)
        else:
            into[name] = copy.deepcopy(value)  # a YAML alias becomes an independent value


def _hint(key: Key) -> Any:
    """Return the type of a key in a section or a list, else None."""
    hint: Any = Config
    for name in key:
        if dataclasses.is_dataclass(hint):
            hint = fields_of(hint).get(name)
        else:
            hint = get_args(hint)[get_origin(hint) is dict] if get_origin(hint) in (tuple, dict) else None
    return hint


def _merge_override(tree: Tree, override: str) -> None:
    dotted, equals, text = override.partition("=")
    key = tuple(dotted.strip().split("."))
    if not equals or not all(key):
        raise UserError(f"{override!r}: expected key=value, such as optim.lr=1e-4 (on the command line)")
    value = _override_value(text)
    level: Any = tree.values
    for depth in range(1, len(key)):
        level = _opened(tree, level, key[:depth])
    tree.origins[key] = COMMAND_LINE
    place = _place(tree, level, key)
    if isinstance(level, list):
        level[place] = value
    else:
        _merge(tree, level, {place: value}, key[:-1], COMMAND_LINE)


def _opened(tree: Tree, level: Any, key: Key) -> Any:
    """Return the container at a key, for keys below it: from the files, in its full form, or the default."""
    place = _place(tree, level, key)
    found = level[place] if isinstance(level, list) else level.get(place)
    if found is None:
        default = functools.reduce(lambda value, name: getattr(value, name, None), key, Config())
        found = plain(default) if isinstance(default, dict | tuple) else {}
        tree.origins[key] = COMMAND_LINE
    if isinstance(found, str) and StreamConfig in get_args(_hint(key)):
        found = {"suffix": found}
    level[place] = in_full(_hint(key), found)
    return level[place]


def _place(tree: Tree, level: Any, key: Key) -> Any:
    """Return the index or name that a key's last part means in a section, a table or a list."""
    if isinstance(level, list):
        if not key[-1].isdigit() or int(key[-1]) >= len(level):
            raise tree.fault(key, f"{key[-1]!r} is not a position in a list of {len(level)}")
        return int(key[-1])
    if not isinstance(level, dict):
        raise tree.fault(key, f"{'.'.join(key[:-1])} is a value and has no keys")
    return key[-1]


def _override_value(text: str) -> Any:
    """Read lists, `{…}` and null as YAML; leave other text to be read by the type of its key."""
    try:
        value = yaml.load(text, Loader=_Loader) if text.strip() else text
    except BAD_YAML:
        return Raw(text, text)
    if value is None or isinstance(value, list) or (isinstance(value, dict) and text.lstrip().startswith("{")):
        return value
    return Raw(text, value)


def quoted(text: str) -> str:
    """Return a text as YAML reads it back, in one line."""
    return json.dumps(text, ensure_ascii=False)  # YAML reads a JSON text as it is


def plain(value: Any) -> Any:
    """Return dataclasses and tuples as dicts and lists, for YAML and JSON."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, tuple) else value


def flattened(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a plain config by their keys, a.b; the table of streams is one."""
    if not isinstance(tree, dict) or not tree or key == "streams":
        yield key, tree
        return
    for name, value in tree.items():
        yield from flattened(value, f"{key}.{name}" if key else name)


def changed(config: Config) -> dict[str, Any]:
    """Return the keys, a.b, whose values are not the defaults."""
    default = dict(flattened(plain(Config())))
    return {key: value for key, value in flattened(plain(config)) if default.get(key) != value}
