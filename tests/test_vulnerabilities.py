"""The list in vulnerabilities.py is of tests that there are; and the one of them that has no other
place."""

from __future__ import annotations

import ast
import asyncio
import hmac
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vulnerabilities import CLASSES

from dovetail_server_openai import ServerOptions
from dovetail_server_openai.guard import Guard

ROOT = Path(__file__).parent.parent


def functions_of(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_each_class_has_a_test() -> None:
    for what, node_id in CLASSES.items():
        path, _, name = node_id.partition("::")
        assert name.startswith("test_"), what
        assert name in functions_of(path), f"{what}: {node_id} is no test"
    assert len(set(CLASSES.values())) >= 30


@pytest.mark.parametrize(
    "given", [b"", b"Bearer f", b"Bearer first-keY", b"Bearer second-key", b"Bearer " + b"x" * 1000]
)
def test_keys_are_compared_in_constant_time(given: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with each, whatever was found: how long it takes says nothing about how much was
    right."""
    compared: list[bytes] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(b)
        return real(a, b)

    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare)
    answered: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        answered.append(200)

    async def send(message: Any) -> None:
        answered.append(message.get("status", 0))

    keys = [b"first-key", b"second-key", b"third-key"]
    guard = Guard(
        app,
        ServerOptions(),
        keys,
        [],
        lambda: None,
        SimpleNamespace(count_response=lambda *_: None),
    )  # type: ignore[arg-type]
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/v1/models",
        "headers": [(b"authorization", given)],
    }
    asyncio.run(guard(scope, None, send))  # type: ignore[arg-type]
    assert compared == keys
    assert answered[0] == (200 if given == b"Bearer second-key" else 401)
