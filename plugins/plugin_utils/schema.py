# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Holds a value against the declaration's schema and says each problem in one sentence.

The schema is JSON Schema (schema.yml). No JSON Schema library comes with ansible-core, and their messages do not name
the nearest known key; the part of the vocabulary that schema.yml uses is small, and a test holds this reader against
the C(jsonschema) library.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
TYPES: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}
NAMES = {
    "string": "a text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
}
NAMES |= {"object": "a mapping of keys to values", "null": "empty"}


def load(name: str) -> dict[str, Any]:
    """Return one of the data files that lie beside this module, C(schema.yml) or C(catalogue.yml)."""
    return yaml.safe_load((HERE / name).read_text(encoding="utf-8"))


def nearest(word: str, known: Any) -> str:
    """Return C('; did you mean X?') for the known word most like C(word), else an empty text."""
    match = difflib.get_close_matches(word, [str(name) for name in known], n=1, cutoff=0.6)
    return f"; did you mean {match[0]}?" if match else ""


def is_type(value: Any, kind: str) -> bool:
    """Say whether C(value) is of the JSON Schema type C(kind); a boolean is no number."""
    if isinstance(value, bool) and kind != "boolean":
        return False
    return isinstance(value, TYPES[kind])


class Checker:
    """Holds values against one schema document."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document

    def resolve(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Follow a C($ref) into C($defs); words beside the reference stay."""
        if "$ref" not in schema:
            return schema
        target = self.document
        for step in schema["$ref"].removeprefix("#/").split("/"):
            target = target[step]
        return {**self.resolve(target), **{key: word for key, word in schema.items() if key != "$ref"}}

    def check(self, value: Any, schema: dict[str, Any], where: str) -> Iterator[str]:
        """Yield a sentence for each thing in C(value) that C(schema) does not allow; C(where) is the value's path."""
        schema = self.resolve(schema)
        if "anyOf" in schema:
            yield from self.check(value, self.alternative(value, schema["anyOf"]), where)
            return
        kinds = schema.get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if kinds and not any(is_type(value, kind) for kind in kinds):
            allowed = " or ".join(NAMES[kind] for kind in kinds)
            yield f"{where} is {value!r}, but has to be {allowed}{self.hint(schema)}."
            return
        if "enum" in schema and value not in schema["enum"]:
            allowed = ", ".join(map(str, schema["enum"]))
            yield f"{where} is {value!r}, but has to be one of {allowed}{nearest(str(value), schema['enum'])}."
        if "const" in schema and value != schema["const"]:
            yield f"{where} is {value!r}, but has to be {schema['const']!r}."
        if isinstance(value, str):
            if "pattern" in schema and not re.search(schema["pattern"], value):
                meaning = schema.get("description", f"a text of the form {schema['pattern']}")
                yield f"{where} is {value!r}, which has not the right form ({meaning.rstrip('.')}){self.hint(schema)}."
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield from self.limits(value, schema, where)
        elif isinstance(value, list):
            if len(value) < schema.get("minItems", 0):
                yield f"{where} is an empty list; name at least {schema['minItems']}, or leave the key out."
            for number, item in enumerate(value):
                yield from self.check(item, schema.get("items", {}), f"{where}[{number}]")
        elif isinstance(value, dict):
            yield from self.keys(value, schema, where)

    def alternative(self, value: Any, schemas: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the alternative that C(value) was likely meant for: the first that takes it, else one of its kind."""
        for schema in schemas:
            if not list(self.check(value, schema, "")):
                return schema
        for schema in map(self.resolve, schemas):
            if is_type(value, schema.get("type", "null")):
                return schema
        return schemas[0]

    @staticmethod
    def hint(schema: dict[str, Any]) -> str:
        """Return an example in brackets where the schema has one."""
        return f" (for example {schema['examples'][0]!r})" if "examples" in schema else ""

    @staticmethod
    def limits(value: float, schema: dict[str, Any], where: str) -> Iterator[str]:
        """Yield a sentence for each limit that a number breaks."""
        unit = f" {schema['x-unit']}" if "x-unit" in schema else ""
        if "minimum" in schema and value < schema["minimum"]:
            yield f"{where} is {value}{unit}, but has to be at least {schema['minimum']}{unit}."
        if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
            yield f"{where} is {value}{unit}, but has to be more than {schema['exclusiveMinimum']}{unit}."
        if "maximum" in schema and value > schema["maximum"]:
            yield f"{where} is {value}{unit}, but has to be at most {schema['maximum']}{unit}."

    def keys(self, value: dict[str, Any], schema: dict[str, Any], where: str) -> Iterator[str]:
        """Yield a sentence for each unknown, missing or wrong key of a mapping."""
        known = schema.get("properties", {})
        others = schema.get("additionalProperties", True)
        for key in schema.get("required", []):
            if key not in value:
                yield f"{where}.{key} is missing; add it."
        for key, item in value.items():
            place = f"{where}.{key}".removeprefix(".")
            if "propertyNames" in schema:
                yield from self.check(key, schema["propertyNames"], f"The name {place}")
            if key in known:
                yield from self.check(item, known[key], place)
            elif others is False:
                yield f"{place} is not a known key{nearest(key, known) or '; known are ' + ', '.join(known)}."
            elif isinstance(others, dict):
                yield from self.check(item, others, place)
