"""Read a config that is a Python file, as mmengine lays them out: a path in, plain values by name out.

Nothing in it is executed: values are literals, names given above, sums and products of numbers, `dict(key=value)` and
lists of those. Whatever else stands there is kept as its own text, an `Unread`.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from operator import add, mul, sub
from pathlib import Path
from typing import Any

from transpixeler.config.sections import UserError

MOST_BYTES = 1 << 20
MOST, MOST_POWER = 1 << 64, 64  # of numbers that are computed
DELETE = "_delete_"  # a key of a table: the base's table is replaced, not merged


class Unread(str):
    """The text of a value that only running the file could tell."""

    def __repr__(self) -> str:
        return str(self)


def read(path: Path, *, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], list[str]]:
    """Return a file's values over those of its `_base_` files, and the statements that were not read."""
    own, unread = _own(path)
    bases = own.pop("_base_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list | tuple) or not all(isinstance(one, str) for one in bases):
        raise UserError(f"{path}: _base_ = {bases!r} is not a file name or a list of them")
    merged: dict[str, Any] = {}
    for base in bases:
        file = (path.parent / base).resolve()
        if file in (path.resolve(), *above):
            raise UserError(f"{path}: _base_ names {base!r}, which is based on this file")
        values, more = read(file, above=(*above, path.resolve()))
        merged, unread = _merge(merged, values), [*more, *unread]
    return _merge(merged, own), unread


def _own(path: Path) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    unread: list[str] = []
    for statement in _parsed(path).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        value = getattr(statement, "value", None)
        if (
            isinstance(statement, ast.Assign | ast.AnnAssign)
            and value
            and all(isinstance(t, ast.Name) for t in targets)
        ):
            values |= {target.id: _value(value, values) for target in targets if isinstance(target, ast.Name)}
        elif not (isinstance(statement, ast.Expr) and isinstance(value, ast.Constant)):  # a docstring says nothing
            text = ast.unparse(statement)
            unread.append(text)
            if isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
                values[statement.target.id] = Unread(text)
    return values, unread


def _parsed(path: Path) -> ast.Module:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: is larger than {MOST_BYTES >> 20} MB, which no config is")
        return ast.parse(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = (
            f"line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else str(error) or "nested too deep"
        )
        raise UserError(f"{path}: not a Python file: {line}") from None


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """Return a value, or its text where it is no literal; parts of tables and lists stand for themselves."""
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "dict" and not node.args:
        return {part.arg: _value(part.value, names) for part in node.keywords if part.arg}
    try:
        if isinstance(node, ast.Dict) and None not in node.keys:
            keys = [ast.literal_eval(key) for key in node.keys if key]
            return dict(zip(keys, (_value(value, names) for value in node.values), strict=True))
        if isinstance(node, ast.Tuple | ast.List) and not any(isinstance(one, ast.Starred) for one in node.elts):
            parts = [_value(one, names) for one in node.elts]
            return tuple(parts) if isinstance(node, ast.Tuple) else parts
        return _sum(node, names) if isinstance(node, ast.BinOp) else ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return Unread(ast.unparse(node))


def _sum(node: ast.BinOp, names: Mapping[str, Any]) -> Any:
    """Return what two numbers give, such as 25 * 1024**3; of bounded size, as a file may say anything."""
    left, right = (_value(one, names) for one in (node.left, node.right))
    given = [one for one in (left, right) if isinstance(one, int | float) and abs(one) <= MOST]
    if len(given) < 2 or (isinstance(node.op, ast.Pow) and not 0 <= right <= MOST_POWER):
        return ast.literal_eval(node)  # of complex numbers, or refused
    found = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Pow: pow}.get(type(node.op), _refused)(left, right)
    return found if abs(found) <= MOST else _refused()


def _refused(*_: object) -> Any:
    raise ValueError("no literal")


def _merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return a table over another; tables within are merged too, unless the upper one says `_delete_`."""
    merged = dict(base)
    for key, value in own.items():
        if isinstance(value, dict):
            under = base.get(key)
            under = {} if value.get(DELETE) or not isinstance(under, dict) else under
            value = _merge(under, {name: one for name, one in value.items() if name != DELETE})
        merged[key] = value
    return merged
