"""Requests at random, from the server's own OpenAPI description: valid by it and not. No 5xx, and
no answer beside it."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from campaigns.base import Campaign, Report, Trial
from campaigns.served import HOST, NAME, PATIENCE, servers

Schema = dict[str, Any]
ERROR_KEYS = {"message", "type", "param", "code"}
TEXTS = (
    "",
    "a",
    "hello world",
    "ü😀",
    "\x00",
    "x" * 300,
    "\ud800",
    "<|system|>",
    "{{ 7 * 7 }}",
    NAME,
)
INTEGERS = (0, 1, 1, 2, 2, 3, 5, 64, -1, 65, 300, 2**31, 2**63, -(2**63) - 1, 10**30)
NUMBERS = (0, 0.5, 1, 1.0, 1.5, -0.5, 2.5, 1e-40, 1e308, 5e-324, -1e308)
TYPES: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": int | float,
    "null": type(None),
    "array": list,
    "object": dict,
}
TARGETS = (
    "/",
    "/v1",
    "//",
    "/v1/completions/",
    "/%ff",
    "/v1/models/",
    "/../etc/passwd",
    "/v1/engines",
)
"""That are not in the description."""
PROPERTY_SHARE = 0.2
"""Of the optional properties that a body has."""


@dataclass
class Sent:
    method: str
    path: str
    """As in the description; empty: none of those."""
    target: str
    body: bytes = b""
    content_type: str | None = "application/json"
    kind: str = "valid"
    """`valid` by the description; `invalid`: must be refused; `hostile`: may be answered in any way
    but a 5xx."""


class Description:
    """An OpenAPI document: what may be sent, and what may come back."""

    def __init__(self, document: Schema) -> None:
        self._document = document
        self.operations = [
            (method.upper(), path, operation)
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
        ]

    def resolved(self, schema: Schema) -> Schema:
        while "$ref" in schema:
            found: Any = self._document
            for part in schema["$ref"].removeprefix("#/").split("/"):
                found = found[part]
            schema = found
        return schema

    def value(self, schema: Schema, rng: random.Random, depth: int = 0) -> Any:
        """Something that is valid by `schema`."""
        schema = self.resolved(schema)
        if "enum" in schema:
            return rng.choice(schema["enum"])
        if "anyOf" in schema:
            return self.value(rng.choice(schema["anyOf"]), rng, depth)
        match schema.get("type"):
            case "string":
                return rng.choice(TEXTS)
            case "integer":
                return rng.choice(INTEGERS)
            case "number":
                return rng.choice(NUMBERS + INTEGERS)
            case "boolean":
                return rng.random() < 0.5
            case "null":
                return None
            case "array":
                count = rng.choice([0, 1, 1, 2, 5]) or schema.get("minItems", 0)
                return [self.value(schema.get("items", {}), rng, depth + 1) for _ in range(count)]
            case "object":
                return self._object(schema, rng, depth)
        return rng.choice([None, 1, "a", [], {}]) if depth else {}

    def _object(self, schema: Schema, rng: random.Random, depth: int) -> dict[str, Any]:
        required, made = schema.get("required", ()), dict[str, Any]()
        for name, inner in schema.get("properties", {}).items():
            if name in required or rng.random() < PROPERTY_SHARE:
                made[name] = (
                    NAME
                    if name == "model" and rng.random() < 0.9
                    else self.value(inner, rng, depth + 1)
                )
        if schema.get("additionalProperties") and rng.random() < 0.2:
            more = schema["additionalProperties"]
            made[rng.choice(TEXTS[:4])] = self.value(
                more if isinstance(more, dict) else {}, rng, depth + 1
            )
        return made

    def problem(self, schema: Schema, value: Any, where: str = "") -> str:
        """How `value` is not valid by `schema`; empty if it is."""
        schema = self.resolved(schema)
        if "anyOf" in schema:
            problems = [self.problem(s, value, where) for s in schema["anyOf"]]
            return problems[0] if all(problems) else ""
        if "enum" in schema and value not in schema["enum"]:
            return f"{where}: {value!r} is none of {schema['enum']}"
        kind = schema.get("type")
        if kind is not None and not _is(kind, value):
            return f"{where}: {str(value)[:80]!r} is no {kind}"
        if kind == "array":
            if len(value) < schema.get("minItems", 0):
                return f"{where}: too short"
            items = schema.get("items", {})
            return next(
                filter(
                    None, (self.problem(items, v, f"{where}[{i}]") for i, v in enumerate(value))
                ),
                "",
            )
        if kind == "object":
            missing = [name for name in schema.get("required", ()) if name not in value]
            if missing:
                return f"{where}: {missing[0]} is missing"
            more = schema.get("additionalProperties", True)
            inner = {
                k: schema.get("properties", {}).get(k, more if isinstance(more, dict) else {})
                for k in value
            }
            return next(
                filter(None, (self.problem(inner[k], v, f"{where}.{k}") for k, v in value.items())),
                "",
            )
        return ""


def _is(kind: str, value: Any) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return kind in TYPES and isinstance(value, TYPES[kind])


# What is sent.


def chosen(description: Description, rng: random.Random) -> Sent:
    method, path, operation = rng.choice(
        [o for o in description.operations for _ in range(4 if "requestBody" in o[2] else 1)]
    )
    target = path
    for parameter in operation.get("parameters", ()):
        target = target.replace(
            f"{{{parameter['name']}}}", rng.choice([NAME, "x", "%00", "a%2Fb", "%F0%9F%98%80"])
        )
    if "requestBody" not in operation:
        sent = Sent(method, path, target, content_type=None)
        return _twisted(sent, rng) if rng.random() < 0.3 else sent
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    body = description.value(schema, rng)
    sent = Sent(method, path, target, _dumped(body))
    draw = rng.random()
    if draw < 0.5:
        return sent
    return _spoilt(description, schema, body, sent, rng) if draw < 0.8 else _twisted(sent, rng)


def _dumped(body: Any) -> bytes:
    return json.dumps(body).encode()


def _spoilt(
    description: Description, schema: Schema, body: dict[str, Any], sent: Sent, rng: random.Random
) -> Sent:
    """A body with one property that is missing, or of another type than it may have."""
    resolved = description.resolved(schema)
    name = rng.choice(list(resolved["properties"]))
    if name in resolved.get("required", ()) and rng.random() < 0.3:
        del body[name]
    else:
        body[name] = rng.choice(
            [[[[]]], {"a": {"b": []}}, True, "text", -1.5, [None], {"x": 1}, [1, "a"]]
        )
    if description.problem(schema, body):
        sent.kind = "invalid"
    sent.body = _dumped(body)
    return sent


def _twisted(sent: Sent, rng: random.Random) -> Sent:
    """What no client of goodwill sends."""
    sent.kind = "hostile"
    match rng.randrange(8):
        case 0:
            sent.method = rng.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"])
        case 1:
            sent.path = ""
            sent.target = rng.choice(TARGETS)
        case 2:
            sent.content_type = rng.choice(
                [None, "text/plain", "application/xml", "application/json; charset=utf-16", '"']
            )
        case 3:
            sent.body = sent.body[: rng.randint(0, len(sent.body))]
        case 4:
            sent.body = rng.choice(
                [
                    b"[" * 50_000,
                    b'{"a":' * 20_000,
                    b"null",
                    b"[]",
                    b'"',
                    b"\xff\xfe",
                    b"NaN",
                    b"1e999",
                ]
            )
        case 5:
            sent.body = sent.body[:-1] + b',"temperature":NaN,"n":Infinity}'
        case 6:
            at = rng.randint(0, len(sent.body))
            sent.body = sent.body[:at] + rng.randbytes(3) + sent.body[at:]
        case 7:
            sent.body = (
                sent.body[:-1]
                + b',"prompt":"a","prompt":["b"],"messages":[{"role":"user","content":[]}]}'
            )
    return sent


# What comes back.


def check(
    description: Description, sent: Sent, status: int, content_type: str, body: bytes
) -> None:
    what = (
        f"{sent.method} {sent.target} ({sent.kind}, {sent.content_type}) {sent.body[:400]!r} ->"
        f" {status} {body[:300]!r}"
    )
    assert status < 500, f"a 5xx: {what}"
    assert sent.kind != "invalid" or status >= 400, f"accepted, and invalid: {what}"
    if sent.method == "HEAD":
        return
    if status >= 400:
        assert content_type == "application/json", f"an error that is no JSON: {what}"
        assert set(json.loads(body).get("error", ())) == ERROR_KEYS, (
            f"no error of OpenAI's shape: {what}"
        )
    operation = next(
        (o for m, p, o in description.operations if (m, p) == (sent.method, sent.path)), None
    )
    if operation is None or (sent.target.split("?")[0] != sent.path and "{" not in sent.path):
        return
    assert str(status) in operation["responses"], (
        f"status {status} is not in the description: {what}"
    )
    contents = operation["responses"][str(status)].get("content", {})
    if status != 200:
        return
    assert not (body and not contents), f"a body, and none in the description: {what}"
    assert not contents or content_type in contents, (
        f"content type {content_type!r} is not in the description: {what}"
    )
    if content_type == "application/json":
        problem = description.problem(contents[content_type].get("schema", {}), json.loads(body))
        assert not problem, f"{problem}: {what}"
    elif content_type == "text/event-stream":
        *events, last = [line.removeprefix(b"data: ") for line in body.split(b"\n") if line]
        assert last == b"[DONE]", f"a stream without an end: {what}"
        errors = [e for e in map(json.loads, events) if "error" in e]
        assert not errors, f"an error in a stream: {errors[0]}: {what}"


@contextlib.contextmanager
def opened(report: Report) -> Iterator[Trial]:
    with servers() as serve:
        server = serve(scheduler={"max_num_seqs": 64})
        connection = http.client.HTTPConnection(HOST, server.port, timeout=PATIENCE)
        connection.request("GET", "/openapi.json")
        description = Description(json.load(connection.getresponse()))

        def trial(seed: int) -> None:
            sent = chosen(description, random.Random(seed))
            headers = {"Content-Type": sent.content_type} if sent.content_type is not None else {}
            try:
                connection.request(sent.method, sent.target, sent.body or None, headers)
                answer = connection.getresponse()
                body = answer.read()
            except (OSError, http.client.HTTPException) as e:
                connection.close()
                raise AssertionError(f"{sent} got no answer: {type(e).__name__}: {e}") from e
            if answer.status >= 500:
                connection.close()  # the server closes it, too
            report.counts[f"{sent.kind}: {answer.status}"] += 1
            check(
                description,
                sent,
                answer.status,
                (answer.getheader("content-type") or "").split(";")[0],
                body,
            )

        yield trial
        connection.close()
        server.assert_no_traceback()
        assert server.stop() == 0, "the server did not end well"


FUZZ = Campaign(
    "fuzz",
    "requests at random, valid by the server's OpenAPI description and not: no 5xx, no answer"
    " beside the description",
    opened,
    full=20_000,
    slice=200,
)
