"""A small validator of JSON schemas: the words that ours use, and an error for any other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

SILENT = {"$schema", "title", "description", "default", "definitions"}
KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def faults(value: Any, schema: dict[str, Any], whole: dict[str, Any], place: str = "") -> Iterator[str]:
    """Yield where a value is not as its schema says."""
    for word, said in schema.items():
        if word not in SILENT and not _holds(word, said, value, schema, whole):
            yield f"{place or 'the file'}: {value!r} fails {word} {str(said)[:80]}"
    if isinstance(value, dict):
        for name, inner in value.items():
            below = schema.get("properties", {}).get(name, schema.get("additionalProperties", True))
            if below is False:
                yield f"{place}.{name}: unknown key"
            elif isinstance(below, dict):
                yield from faults(inner, below, whole, f"{place}.{name}")
    if isinstance(value, list) and "items" in schema:
        items = schema["items"] if isinstance(schema["items"], list) else [schema["items"]] * len(value)
        for number, (inner, below) in enumerate(zip(value, items)):
            yield from faults(inner, below, whole, f"{place}.{number}")


def _holds(word: str, said: Any, value: Any, schema: dict[str, Any], whole: dict[str, Any]) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if word == "type":
        of_number = number and (said == "number" or (said == "integer" and isinstance(value, int)))
        return of_number or (said in KINDS and isinstance(value, KINDS[said]))
    if word == "anyOf":
        return any(not list(faults(value, one, whole)) for one in said)
    if word == "enum":
        return any(value == one and type(value) is type(one) for one in said)
    if word == "$ref":
        return not list(faults(value, whole["definitions"][said.removeprefix("#/definitions/")], whole))
    if word in ("minimum", "maximum", "exclusiveMinimum"):
        return (
            not number or {"minimum": value >= said, "maximum": value <= said, "exclusiveMinimum": value > said}[word]
        )
    if word in ("minItems", "maxItems"):
        return not isinstance(value, list) or (len(value) >= said if word == "minItems" else len(value) <= said)
    if word == "pattern":
        return not isinstance(value, str) or re.search(said, value) is not None
    if word == "required":
        return not isinstance(value, dict) or set(said) <= set(value)
    assert word in ("properties", "additionalProperties", "items"), f"{word} is not known here"
    return True
