"""Say whether data match a JSON Schema, some thirty times as fast as ``jsonschema`` does.

A schema is turned into nested functions once. They say yes or no; what is wrong with data that
do not match is asked of ``jsonschema``. Only the keywords that plan files use are
known; a schema with another one is refused, so that none is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Matches = Callable[[Any], bool]

_NOTES = {"$schema", "$defs", "title", "description", "default"}


class CompiledSchema:
    """A schema as functions.

    Parameters
    ----------
    schema
        Of JSON Schema 2020-12, with references into its own ``$defs`` only. Unlike there, 1.0
        is no integer.

    Raises
    ------
    ValueError
        When it has a keyword that is not known here.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._definitions: dict[str, Matches] = {}
        for name, definition in schema.get("$defs", {}).items():
            self._definitions[f"#/$defs/{name}"] = self._compiled(definition)
        self._matches = self._compiled(schema)

    def matches(self, data: Any) -> bool:
        """Return whether data match the schema."""
        return self._matches(data)

    def _compiled(self, schema: Mapping[str, Any]) -> Matches:
        checks: list[Matches] = []
        used = set(_NOTES)
        for keywords, make in (
            (("$ref",), self._reference),
            (("type",), _type),
            (("const",), _const),
            (("enum",), _enum),
            (("minimum", "maximum", "exclusiveMinimum"), _limits),
            (("pattern",), _pattern),
            (("minItems", "maxItems"), _lengths),
            (("items",), self._items),
            (("properties", "additionalProperties", "required", "propertyNames"), self._object),
            (("oneOf",), self._one_of),
        ):
            used.update(keywords)
            if any(keyword in schema for keyword in keywords):
                checks.append(make(schema))
        unknown = set(schema) - used
        if unknown:
            raise ValueError(f"a schema with {min(unknown)!r} cannot be compiled")
        if len(checks) == 1:
            return checks[0]
        return lambda data: all(check(data) for check in checks)

    def _reference(self, schema: Mapping[str, Any]) -> Matches:
        to, definitions = schema["$ref"], self._definitions
        return lambda data: definitions[to](data)  # perhaps compiled later

    def _items(self, schema: Mapping[str, Any]) -> Matches:
        item = self._compiled(schema["items"])
        return lambda data: not isinstance(data, list) or all(map(item, data))

    def _one_of(self, schema: Mapping[str, Any]) -> Matches:
        ways = [self._compiled(way) for way in schema["oneOf"]]
        return lambda data: sum(way(data) for way in ways) == 1

    def _object(self, schema: Mapping[str, Any]) -> Matches:
        known = {key: self._compiled(part) for key, part in schema.get("properties", {}).items()}
        required = frozenset(schema.get("required", ()))
        others = schema.get("additionalProperties", True)
        other = (lambda _: others) if isinstance(others, bool) else self._compiled(others)
        names = self._compiled(schema["propertyNames"]) if "propertyNames" in schema else None

        def matches(data: Any) -> bool:
            if not isinstance(data, dict):
                return True
            if not required <= data.keys():
                return False
            if names is not None and not all(map(names, data)):
                return False
            return all(known.get(key, other)(value) for key, value in data.items())

        return matches


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_TYPES: Mapping[str, Matches] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": _is_number,
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
}


def _type(schema: Mapping[str, Any]) -> Matches:
    said = schema["type"]
    if isinstance(said, str):
        return _TYPES[said]
    ways = [_TYPES[name] for name in said]
    return lambda data: any(way(data) for way in ways)


def _same(a: Any, b: Any) -> bool:
    """Equality of JSON's plain values, among which true is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _plain(values: list[Any]) -> list[Any]:
    if any(isinstance(value, (dict, list)) for value in values):
        raise ValueError("a schema with a constant that is no plain value cannot be compiled")
    return values


def _const(schema: Mapping[str, Any]) -> Matches:
    (value,) = _plain([schema["const"]])
    return lambda data: _same(data, value)


def _enum(schema: Mapping[str, Any]) -> Matches:
    values = _plain(schema["enum"])
    return lambda data: any(_same(data, value) for value in values)


def _limits(schema: Mapping[str, Any]) -> Matches:
    least, most = schema.get("minimum"), schema.get("maximum")
    above = schema.get("exclusiveMinimum")

    def matches(data: Any) -> bool:
        return not _is_number(data) or not (
            (least is not None and data < least)
            or (most is not None and data > most)
            or (above is not None and data <= above)
        )

    return matches


def _pattern(schema: Mapping[str, Any]) -> Matches:
    search = re.compile(schema["pattern"]).search
    return lambda data: not isinstance(data, str) or search(data) is not None


def _lengths(schema: Mapping[str, Any]) -> Matches:
    least, most = schema.get("minItems", 0), schema.get("maxItems", float("inf"))
    return lambda data: not isinstance(data, list) or least <= len(data) <= most


__all__ = ["CompiledSchema"]
