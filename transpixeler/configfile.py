"""Read YAML files and `a.b=value` overrides into a checked `Config`, and write one back as YAML.

Every error names the key and the file, or the command line, that set it.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import math
import os
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from transpixeler.config import Config, PathKind, Range, UserError, faults

Key = tuple[str, ...]
COMMAND_LINE = "the command line"
MERGE_KEY = "tag:yaml.org,2002:merge"  # `<<: *other`
# what yaml raises for text it cannot read: a date of 2024-13-45, a bool of 7, a thousand brackets
BAD_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)


class Raw(str):
    """Text as typed on the command line, so that a text key can take `007` as it is."""


@dataclasses.dataclass
class Tree:
    """Merged plain values, and for each key the file that set it last."""

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    origins: dict[Key, str] = dataclasses.field(default_factory=dict)

    def origin(self, key: Key) -> str:
        """Return the file that set a key, or the section around it."""
        while key and key not in self.origins:
            key = key[:-1]
        return self.origins.get(key, "the defaults")

    def fault(self, key: Key, message: str) -> UserError:
        """Return the error for a key, with the place that set it."""
        origin = self.origin(key)
        return UserError(f"{'.'.join(key)}: {message} ({'on' if origin == COMMAND_LINE else 'in'} {origin})")


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Return the config of a file, its bases and the overrides."""
    return build(read(path), overrides)


def read(path: str | Path) -> Tree:
    """Read a file and its bases, for one or more configs to be built from."""
    tree = Tree()
    _merge_file(tree, Path(path), ())
    return tree


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
    config = _dataclass(Config, tree.values, (), tree)
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


def _read(path: Path, named_in: str = "") -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{named_in}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a YAML file{named_in}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}{named_in}") from None
    try:
        content = yaml.load(text, Loader=_Loader)
    except BAD_YAML as error:
        raise UserError(_bad_yaml(path, error)) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected `key: value` lines, found {_kind(content)}")
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
        raise UserError(f"base: expected a file or a list of files, found {_kind(bases)} (in {path})")
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
            hint = _fields(hint).get(name)
        else:
            hint = get_args(hint)[0] if get_origin(hint) is tuple else None
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
    level[place] = _in_full(_hint(key), found)
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
        return Raw(text)
    if value is None or isinstance(value, list) or (isinstance(value, dict) and text.lstrip().startswith("{")):
        return value
    return Raw(text)


# --- typing ----------------------------------------------------------------------------------------------------------


@functools.cache
def _fields(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _dataclass(cls: type, value: Any, key: Key, tree: Tree) -> Any:
    fields = _fields(cls)
    if not isinstance(value, dict):
        raise tree.fault(key, f"expected {', '.join(fields)} as `key: value` lines, found {_kind(value)}")
    for name in value:
        if name not in fields:
            raise tree.fault((*key, name), _unknown(name, fields))
    given = {
        name: _convert(hint, value[name], (*key, name), tree)
        for name, hint in fields.items()
        if name in value and (value[name] is not None or _optional(hint))
    }
    for field in dataclasses.fields(cls):
        if field.name not in given and field.default is field.default_factory is dataclasses.MISSING:
            raise tree.fault((*key, field.name), "must be given")
    return cls(**given)


def _unknown(name: str, fields: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(fields), n=1, cutoff=0.5)
    return f"unknown key; did you mean `{near[0]}`?" if near else f"unknown key; known here: {', '.join(fields)}"


def _in_full(hint: Any, value: Any) -> Any:
    """Expand short forms: a single data set needs no list, and a bare path means {path: …}."""
    if isinstance(value, str) and dataclasses.is_dataclass(hint) and "path" in _fields(hint):
        return {"path": value}
    several = get_origin(hint) is tuple and dataclasses.is_dataclass(get_args(hint)[0])
    return [value] if several and isinstance(value, str | dict) else value


def _convert(hint: Any, value: Any, key: Key, tree: Tree) -> Any:
    origin = get_origin(hint)
    if hasattr(hint, "__metadata__"):
        return _annotated(hint, value, key, tree)
    value = _in_full(hint, value)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, key, tree)
    if origin in (Union, types.UnionType):
        return _union(get_args(hint), value, key, tree)
    if origin is Literal:
        if isinstance(value, bool):
            value = "on" if value else "off"  # YAML 1.1 reads on and off as true and false
        if value not in get_args(hint):
            near = difflib.get_close_matches(str(value), [str(a) for a in get_args(hint)], n=1)
            hint_text = f"; did you mean {near[0]}?" if near else ""
            raise tree.fault(key, f"{value!r} is not one of {', '.join(map(str, get_args(hint)))}{hint_text}")
        return str(value)
    if origin is tuple:
        return _tuple(get_args(hint), value, key, tree)
    if origin is dict:
        if not isinstance(value, dict):
            raise tree.fault(key, f"expected `name: value` lines, found {_kind(value)}")
        items = {name: v for name, v in value.items() if v is not None}
        return {name: _convert(get_args(hint)[1], v, (*key, name), tree) for name, v in items.items()}
    return _scalar(hint, value, key, tree)


def _annotated(hint: Any, value: Any, key: Key, tree: Tree) -> Any:
    converted: Any = _convert(hint.__origin__, value, key, tree)
    for mark in hint.__metadata__:
        if isinstance(mark, Range) and not mark.holds(converted):
            raise tree.fault(key, f"{converted} is out of range: must be {mark}")
        if isinstance(mark, PathKind):
            converted = _path(mark, converted, tree.origin(key))
    return converted


def _path(kind: PathKind, value: str, origin: str) -> str:
    """Return a path relative to the file that sets it, or to the working folder for the command line."""
    if not value:
        return value
    folder = Path.cwd() if origin == COMMAND_LINE else Path(origin).resolve().parent
    path = folder / os.path.expanduser(value)  # noqa: PTH111  keeps ~name of an unknown user; Path.expanduser raises
    there = os.path.exists(path)  # noqa: PTH110  false for a name that is too long; Path.exists raises
    if kind is PathKind.HUB_OR_LOCAL and not there and not value.startswith((".", "/", "~")):
        return value
    return str(path)


def _union(hints: tuple[Any, ...], value: Any, key: Key, tree: Tree) -> Any:
    if value is None and type(None) in hints:
        return None
    faults = []
    for hint in (h for h in hints if h is not type(None)):
        try:
            return _convert(hint, value, key, tree)
        except UserError as error:
            faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    raise tree.fault(key, f"{value!r} is not {' or '.join(_name(h) for h in hints if h is not type(None))}")


def _tuple(hints: tuple[Any, ...], value: Any, key: Key, tree: Tree) -> tuple:
    repeated = len(hints) == 2 and hints[1] is Ellipsis
    if not isinstance(value, list):
        raise tree.fault(key, f"expected a list, found {_kind(value)}")
    if not repeated and len(value) != len(hints):
        raise tree.fault(key, f"expected {len(hints)} values, found {len(value)}")
    of = [hints[0]] * len(value) if repeated else hints
    return tuple(_convert(hint, v, (*key, str(i)), tree) for i, (hint, v) in enumerate(zip(of, value)))


def _scalar(hint: type, value: Any, key: Key, tree: Tree) -> Any:
    if hint is str and isinstance(value, str):
        return str(value)
    read = _override_scalar(value) if isinstance(value, Raw) else value
    if hint is bool and isinstance(read, bool):
        return read
    if hint is int and isinstance(read, int) and not isinstance(read, bool):
        return read
    if hint is float and _number(read):
        return float(str(read))  # YAML 1.1 reads 1e-4 as text
    quote = "; put it in quotes" if hint is str and not isinstance(value, dict | list | None) else ""
    raise tree.fault(key, f"expected {_name(hint)}, found {_kind(value)}{quote}")


def _override_scalar(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except BAD_YAML:
        return text


def _number(value: Any) -> bool:
    written = isinstance(value, str | int | float) and not isinstance(value, bool)
    pattern = r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?"
    return written and bool(re.fullmatch(pattern, str(value).strip(), re.I)) and math.isfinite(float(str(value)))


def _optional(hint: Any) -> bool:
    return type(None) in get_args(hint)


def _name(hint: Any) -> str:
    if hasattr(hint, "__metadata__"):
        limits = [f" {mark}" for mark in hint.__metadata__ if isinstance(mark, Range)]
        return "".join([_name(hint.__origin__), *limits])
    if get_origin(hint) is Literal:
        return ", ".join(map(str, get_args(hint)))
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(hint, "a list" if get_origin(hint) is tuple else getattr(hint, "__name__", str(hint)))


def _kind(value: Any) -> str:
    if isinstance(value, dict | list):
        return "`key: value` lines" if isinstance(value, dict) else "a list"
    return "nothing" if value is None else repr(str(value) if isinstance(value, Raw) else value)


def plain(value: Any) -> Any:
    """Return dataclasses and tuples as dicts and lists, for YAML and JSON."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, tuple) else value
