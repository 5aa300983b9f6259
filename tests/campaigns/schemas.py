"""Random values of a JSON schema, and whether a value is one: as much of JSON schema as pydantic's documents use."""

from __future__ import annotations

import math
import random
from typing import Any

STRINGS = ("", "a", "hello", "\x00", "é\u0301", "日本語", "😀" * 3, "‮x", "<eos>", "null", "{{ 1 }}", "a\r\nb", "x" * 300)
INTEGERS = (-(2**63) - 1, -(2**31), -2, -1, 0, 1, 2, 3, 5, 20, 21, 64, 65, 128, 129, 2**31, 2**63, 10**40)
NUMBERS = (-1e308, -2.0, -0.1, -0.0, 0.0, 1e-45, 1e-9, 0.3, 0.7, 1.0, 1.5, 2.0, 2.1, 100.0, 1e6, 1e39, 1.7e308)
MAX_DEPTH = 6
Schema = dict[str, Any]


class Schemas:
    """Of one OpenAPI document."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document

    def resolved(self, schema: Schema) -> Schema:
        if "$ref" not in schema:
            return schema
        found: Any = self._document
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        return self.resolved(found)

    def value(self, rng: random.Random, schema: Schema, depth: int = 0) -> Any:
        """A value that the schema allows, often at an edge."""
        schema = self.resolved(schema)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return rng.choice(schema["enum"])
        if "anyOf" in schema:
            return self.value(rng, rng.choice(schema["anyOf"]), depth)
        match schema.get("type"):
            case "null":
                return None
            case "boolean":
                return rng.random() < 0.5
            case "integer":
                return rng.choice(INTEGERS) if rng.random() < 0.2 else rng.randint(0, 20)
            case "number":
                return rng.choice(NUMBERS) if rng.random() < 0.3 else rng.uniform(0, 1)
            case "string":
                return rng.choice(STRINGS) if rng.random() < 0.5 else "".join(rng.choices("abc <>{}", k=rng.randint(1, 12)))
            case "array":
                count = max(schema.get("minItems", 0), rng.choice([0, 1, 1, 2, 3, 30 if depth < 2 else 1]))
                return [self.value(rng, schema.get("items", {}), depth + 1) for _ in range(count)]
            case "object":
                return self._object(rng, schema, depth)
        return self.anything(rng, depth)

    def _object(self, rng: random.Random, schema: Schema, depth: int) -> dict[str, Any]:
        """Required properties, and some of the others: sometimes none, sometimes all."""
        share = rng.choice([0.0, 0.05, 0.1, 0.1, 0.3, 1.0])
        required = schema.get("required", ())
        names = [n for n in schema.get("properties", {}) if n in required or rng.random() < share]
        found = {n: self.value(rng, schema["properties"][n], depth + 1) for n in names}
        more = schema.get("additionalProperties")
        if more and rng.random() < 0.5:
            of = more if isinstance(more, dict) else {}
            keys = rng.choices(["1", "5", "x", *STRINGS[:6]], k=rng.randint(0, 3))
            found |= {key: self.value(rng, of, depth + 1) for key in keys}
        return found

    def anything(self, rng: random.Random, depth: int = 0) -> Any:
        """Any JSON value."""
        kinds = ["null", "boolean", "integer", "number", "string"]
        kind = rng.choice(kinds if depth >= MAX_DEPTH else [*kinds, "array", "object"])
        return self.value(rng, {"type": kind, "additionalProperties": True}, depth + 1)

    def problem(self, value: Any, schema: Schema, at: str = "$") -> str:
        """Why the schema does not allow a value; empty if it does."""
        schema = self.resolved(schema)
        if "anyOf" in schema:
            problems = [self.problem(value, s, at) for s in schema["anyOf"]]
            return "" if "" in problems else problems[0]
        if "const" in schema and value != schema["const"]:
            return f"{at} is {value!r}, not {schema['const']!r}"
        if "enum" in schema and value not in schema["enum"]:
            return f"{at} is {value!r}, none of {schema['enum']}"
        kind = schema.get("type")
        if kind is not None and not _is_of(kind, value):
            return f"{at} is {value!r:.100}, no {kind}"
        if isinstance(value, list):
            if len(value) < schema.get("minItems", 0):
                return f"{at} has {len(value)} items"
            problems = [self.problem(v, schema.get("items", {}), f"{at}[{i}]") for i, v in enumerate(value)]
            return next(filter(None, problems), "")
        if isinstance(value, dict):
            return self._object_problem(value, schema, at)
        return ""

    def _object_problem(self, value: dict[str, Any], schema: Schema, at: str) -> str:
        properties, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        for name in schema.get("required", ()):
            if name not in value:
                return f"{at}.{name} is missing"
        for name, member in value.items():
            if name not in properties and more is False:
                return f"{at}.{name} is not in the schema"
            of = properties.get(name, more if isinstance(more, dict) else {})
            if problem := self.problem(member, of, f"{at}.{name}"):
                return problem
        return ""


def _is_of(kind: str, value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {
        "null": value is None, "boolean": isinstance(value, bool), "string": isinstance(value, str),
        "array": isinstance(value, list), "object": isinstance(value, dict),
        "number": is_number and math.isfinite(value), "integer": is_number and isinstance(value, int),
    }[kind]  # fmt: skip
