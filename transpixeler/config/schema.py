"""Describe the config to editors: the dataclasses go in, a JSON schema (draft 7) of a YAML file comes out.

It accepts what `loading` accepts of one file. What only a whole config can show, such as a stream that is not
there, is left to the program.
"""

from __future__ import annotations

import dataclasses
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from transpixeler.config.loading import plain
from transpixeler.config.sections import Config, Range, family_names
from transpixeler.config.values import fields_of

Schema = dict[str, Any]
NUMBER_TEXT = r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"  # YAML 1.1 reads 1e-4 as text


def config_schema() -> Schema:
    """Return the schema of a config file."""
    found: dict[str, Schema] = {}
    texts = _explained()
    schema = _section(Config, (), found, texts)
    files: Schema = {"type": "string"}
    base = {"description": "The config, or configs, that this one builds on.", "anyOf": [files, _list(files)]}
    schema["properties"] = {"base": base, **schema["properties"]}
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "transpixeler config"}
    return {**head, **schema, "definitions": found}


def _section(cls: type, key: tuple[str, ...], found: dict[str, Schema], texts: dict[str, str]) -> Schema:
    properties, required = {}, []
    for field in dataclasses.fields(cls):
        name = (*key, field.name)
        made = _nullable(_type(fields_of(cls)[field.name], name, found, texts))
        if name == ("model", "family"):
            made = {"enum": [*family_names(), "", None]}
        if text := texts.get(".".join(name)):
            made = {"description": text, **made}
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if default is dataclasses.MISSING:
            required.append(field.name)
        elif not dataclasses.is_dataclass(default):
            made["default"] = plain(default)
        properties[field.name] = made
    schema: Schema = {"type": "object", "additionalProperties": False, "properties": properties}
    return schema | ({"required": required} if required else {})


def _type(hint: Any, key: tuple[str, ...], found: dict[str, Schema], texts: dict[str, str]) -> Schema:
    origin, inner = get_origin(hint), get_args(hint)
    if hasattr(hint, "__metadata__"):
        marks = [mark for mark in hint.__metadata__ if isinstance(mark, Range)]
        made = _type(hint.__origin__, key, found, texts)
        return _limited(made, marks[0]) if marks else made
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _dataclass(hint, key, found, texts)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_type(one, key, found, texts) for one in inner]}
    if origin is Literal:
        switch = [True, False] if {"on", "off"} & set(inner) else []  # as YAML 1.1 reads on and off
        return {"enum": [*inner, *switch]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _nullable(_type(inner[1], key, found, texts))}
    if origin is tuple and inner[-1] is Ellipsis:
        items = _type(inner[0], key, found, texts)
        single = [items] if dataclasses.is_dataclass(inner[0]) else []  # a single one needs no list
        return {"anyOf": [_list(items), *single]} if single else _list(items)
    if origin is tuple:
        items = [_type(one, key, found, texts) for one in inner]
        return {"type": "array", "items": items, "minItems": len(inner), "maxItems": len(inner)}
    if hint is float:
        return {"anyOf": [{"type": "number"}, {"type": "string", "pattern": NUMBER_TEXT}]}
    return {"type": {str: "string", int: "integer", bool: "boolean", type(None): "null"}[hint]}


def _dataclass(cls: type, key: tuple[str, ...], found: dict[str, Schema], texts: dict[str, str]) -> Schema:
    """Refer to a section or a table, which is defined once; a table with a path may be the path alone."""
    name = cls.__name__.removesuffix("Config")
    if name not in found:
        found[name] = {}  # so that one that holds itself ends
        found[name] = _section(cls, key, found, texts)
    table = {"$ref": f"#/definitions/{name}"}
    return {"anyOf": [{"type": "string"}, table]} if "path" in fields_of(cls) else table


def _limited(made: Schema, limits: Range) -> Schema:
    """Add a range to a number's schema."""
    low = "exclusiveMinimum" if limits.open_low else "minimum"
    ends = {low: limits.low, "maximum": limits.high}
    ends = {name: end for name, end in ends.items() if abs(end) != float("inf")}
    if "anyOf" in made:
        return {"anyOf": [one | ends if one.get("type") == "number" else one for one in made["anyOf"]]}
    return made | ends


def _nullable(made: Schema) -> Schema:
    """Accept a key without a value, which leaves the default."""
    return {"anyOf": [*(made["anyOf"] if set(made) == {"anyOf"} else [made]), {"type": "null"}]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _explained() -> dict[str, str]:
    """Return by key what configs/reference.yaml says of it; nothing where the package stands without it."""
    path = Path(__file__).parents[2] / "configs" / "reference.yaml"
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    said: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        if comment := re.match(r"\s*#(?! ---) ?(.*)", line):
            said.append(comment[1].rstrip())
        elif key := re.match(r"( *)([A-Za-z_]+):", line):
            above = [(indent, name) for indent, name in above if indent < len(key[1])] + [(len(key[1]), key[2])]
            found[".".join(name for _, name in above)] = "\n".join(said)
            said = []
        else:
            said = []
    return {key: text for key, text in found.items() if text}
