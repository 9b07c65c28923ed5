"""Convert plain values to the types of the config's dataclasses, and refuse unknown keys.

In: a `Tree` of values, each with the file that set it. Out: dataclasses; every error names the key and that file.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transpixeler.config.sections import PathKind, Range, UserError, is_path

Key = tuple[str, ...]
COMMAND_LINE = "the command line"
DEFAULTS = "the defaults"


class Raw(str):
    """Text as typed on the command line, so that a text key can take `007` as it is; `read`: what YAML reads in it."""

    read: Any

    def __new__(cls, text: str, read: Any) -> Raw:
        """Keep both."""
        made = super().__new__(cls, text)
        made.read = read
        return made

    def __deepcopy__(self, _: object) -> Raw:
        return self


@dataclasses.dataclass
class Tree:
    """Merged plain values, and for each key the file that set it last."""

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    origins: dict[Key, str] = dataclasses.field(default_factory=dict)

    def origin(self, key: Key) -> str:
        """Return the file that set a key, or the section around it."""
        while key and key not in self.origins:
            key = key[:-1]
        return self.origins.get(key, DEFAULTS)

    def fault(self, key: Key, message: str) -> UserError:
        """Return the error for a key, with the place that set it."""
        origin = self.origin(key)
        return UserError(f"{'.'.join(key)}: {message} ({'on' if origin == COMMAND_LINE else 'in'} {origin})")


@functools.cache
def fields_of(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def to_dataclass(cls: type, value: Any, key: Key, tree: Tree) -> Any:
    fields = fields_of(cls)
    if not isinstance(value, dict):
        raise tree.fault(key, f"expected {', '.join(fields)} as `key: value` lines, found {kind_of(value)}")
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


def in_full(hint: Any, value: Any) -> Any:
    """Expand short forms: a single data set needs no list, and a bare path means {path: …}."""
    if isinstance(value, str) and dataclasses.is_dataclass(hint) and "path" in fields_of(hint):
        return {"path": value}
    several = get_origin(hint) is tuple and dataclasses.is_dataclass(get_args(hint)[0])
    return [value] if several and isinstance(value, str | dict) else value


def _convert(hint: Any, value: Any, key: Key, tree: Tree) -> Any:
    origin = get_origin(hint)
    if hasattr(hint, "__metadata__"):
        return _annotated(hint, value, key, tree)
    value = in_full(hint, value)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return to_dataclass(hint, value, key, tree)
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
            raise tree.fault(key, f"expected `name: value` lines, found {kind_of(value)}")
        items = {name: v for name, v in value.items() if v is not None}
        return {name: _convert(get_args(hint)[1], v, (*key, name), tree) for name, v in items.items()}
    return _scalar(hint, value, key, tree)


def _annotated(hint: Any, value: Any, key: Key, tree: Tree) -> Any:
    converted: Any = _convert(hint.__origin__, value, key, tree)
    for mark in hint.__metadata__:
        if isinstance(mark, Range) and not mark.holds(converted):
            raise tree.fault(key, f"{converted} is out of range: must be {mark}")
        if isinstance(mark, PathKind):
            converted = _path(mark, converted, key, tree)
    return converted


def _path(kind: PathKind, value: str, key: Key, tree: Tree) -> str:
    """Return a path relative to the file that sets it, or to the working folder for the command line."""
    if not is_path(value):
        raise tree.fault(key, f"{value!r} is not a path: it has a NUL, or what no file name can hold")
    folder = Path.cwd() if tree.origin(key) == COMMAND_LINE else Path(tree.origin(key)).resolve().parent
    path = folder / os.path.expanduser(value)  # noqa: PTH111  keeps ~name of an unknown user; Path.expanduser raises
    there = os.path.exists(path)  # noqa: PTH110  false for a name that is too long; Path.exists raises
    if not value or (kind is PathKind.HUB_OR_LOCAL and not there and not value.startswith((".", "/", "~"))):
        return value
    return str(path)


def _union(hints: tuple[Any, ...], value: Any, key: Key, tree: Tree) -> Any:
    if value is None and type(None) in hints:
        return None
    for hint in hints:
        if isinstance(value, dict) and dataclasses.is_dataclass(hint):
            return _convert(hint, value, key, tree)  # only this one takes it, so its error is the one that helps
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
        raise tree.fault(key, f"expected a list, found {kind_of(value)}")
    if not repeated and len(value) != len(hints):
        raise tree.fault(key, f"expected {len(hints)} values, found {len(value)}")
    of = [hints[0]] * len(value) if repeated else hints
    return tuple(_convert(hint, v, (*key, str(i)), tree) for i, (hint, v) in enumerate(zip(of, value)))


def _scalar(hint: type, value: Any, key: Key, tree: Tree) -> Any:
    if hint is str and isinstance(value, str):
        return str(value)
    read = value.read if isinstance(value, Raw) else value
    if hint is bool and isinstance(read, bool):
        return read
    if hint is int and isinstance(read, int) and not isinstance(read, bool):
        return read
    if hint is float and _number(read):
        return float(str(read))  # YAML 1.1 reads 1e-4 as text
    quote = "; put it in quotes" if hint is str and not isinstance(value, dict | list | None) else ""
    raise tree.fault(key, f"expected {_name(hint)}, found {kind_of(value)}{quote}")


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


def kind_of(value: Any) -> str:
    if isinstance(value, dict | list):
        return "`key: value` lines" if isinstance(value, dict) else "a list"
    return "nothing" if value is None else repr(str(value) if isinstance(value, Raw) else value)
