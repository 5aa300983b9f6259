"""Test attacks known from other engines' servers that no test of a single feature covers; see
tests/vulnerabilities.py."""

from __future__ import annotations

import gzip
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def all_said(served: Any, sent: bytes) -> bytes:
    with served.connect() as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        said: bytes = served.until_closed(sock)
    return said


def test_the_engine_listens_on_no_port(server: Any) -> None:
    """The two processes communicate over a socket pair, to which no other process can connect."""
    root = server.process.pid
    children = Path(f"/proc/{root}/task/{root}/children").read_text().split()
    listening = {
        (pid, line.split()[1])
        for pid in (str(root), *children)
        for table in ("tcp", "tcp6", "udp", "udp6")
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        if line.split()[9] in inodes_of(pid)
        and (line.split()[3] == "0A" or table.startswith("udp"))
    }
    port = httpx.URL(server.url).port
    assert {(pid, int(address.split(":")[1], 16)) for pid, address in listening} == {
        (str(root), port)
    }
    named = [
        line
        for line in Path(f"/proc/{root}/net/unix").read_text().splitlines()[1:]
        if len(line.split()) > 7
    ]
    assert not [
        line
        for line in named
        if any(line.split()[6] in inodes_of(pid) for pid in (str(root), *children))
    ]


def inodes_of(pid: str) -> set[str]:
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(link.readlink())
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            found.add(target[8:-1])
    return found


@pytest.mark.parametrize(
    "heads",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\nContent-Length: 50\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\nContent-Length: 5\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: 5\r\nX: a\r\n b\r\n",
    ],
    ids=["CL+TE", "two lengths", "two encodings", "a signed length", "a folded line"],
)
def test_requests_cannot_be_smuggled(server: Any, heads: bytes) -> None:
    """A proxy in front and this server must not parse different requests from the same bytes."""
    smuggled = b"0\r\n\r\nGET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    sent = (
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        + heads
        + b"\r\n"
        + smuggled
    )
    assert b'"version"' not in all_said(server, sent)


def test_a_request_id_cannot_write_headers(server: Any) -> None:
    for value in (b"a\nSet-Cookie: b", b"a\rSet-Cookie: b", b"a\x00b"):
        head = (
            b"GET /version HTTP/1.1\r\nHost: x\r\nX-Request-Id: "
            + value
            + b"\r\nConnection: close\r\n\r\n"
        )
        said = all_said(server, head)
        assert b"\nset-cookie" not in said.lower()
        assert b"\x00" not in said


def test_compressed_bodies_are_not_expanded(server: Any) -> None:
    bomb = gzip.compress(b'{"prompt": "' + b"a" * 50_000_000 + b'"}')
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    began = time.monotonic()
    assert (
        httpx.post(f"{server.url}{COMPLETIONS}", content=bomb, headers=headers).status_code == 400
    )
    assert time.monotonic() - began < 10


def test_pages_of_other_origins_may_not_read_answers(server: Any) -> None:
    answer = httpx.get(f"{server.url}/v1/models", headers={"origin": "https://attacker.example"})
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    preflight = {"origin": "https://attacker.example", "access-control-request-method": "POST"}
    assert httpx.options(f"{server.url}{COMPLETIONS}", headers=preflight).status_code == 405
    simple = httpx.post(
        f"{server.url}{COMPLETIONS}",
        content='{"prompt": "a"}',
        headers={"content-type": "text/plain"},
    )
    assert simple.status_code == 400, (
        "text/plain needs no preflight, so a page of another origin could send it"
    )


def test_websockets_are_no_way_round_the_key(start: Any) -> None:
    served = start(server={"api_key": "k"})
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    key = b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    said = all_said(served, b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + upgrade + key + b"\r\n")
    assert b" 101 " not in said
    assert b" 401 " in said


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "http://127.0.0.1:22"}},
    ],
    ids=lambda part: part["type"],
)
def test_no_address_from_a_request_is_fetched(server: Any, part: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "look"}, part]}]}
    answer = httpx.post(f"{server.url}{CHAT}", json=body)
    assert answer.status_code == 400
    assert part["type"] in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "field",
    [
        "guided_regex",
        "guided_json",
        "guided_grammar",
        "structured_outputs",
        "response_format",
        "logits_processors",
        "tools",
    ],
)
def test_expressions_and_schemas_of_clients_are_not_evaluated(server: Any, field: str) -> None:
    """Backtracking regular expressions, recursive schemas and names of processors have stalled
    other engines or executed code there."""
    value: Any = {
        "guided_regex": "(a+)+$",
        "logits_processors": ["os.system"],
        "tools": [{"type": "function"}],
    }
    body = {
        "prompt": "a",
        "max_tokens": 1,
        field: value.get(field, {"type": "object", "pattern": "(a+)+$"}),
    }
    answer = httpx.post(f"{server.url}{COMPLETIONS}", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "sim/../../x", "http://attacker.example/m", "sim\x00"],
)
def test_the_model_of_a_request_is_a_name_and_no_path(server: Any, name: str) -> None:
    answer = httpx.post(f"{server.url}{COMPLETIONS}", json={"model": name, "prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")


def test_tensors_of_clients_are_not_read(server: Any) -> None:
    """In other engines, pickled tensors sent as prompt embeddings have executed code. This server
    has no such field."""
    answer = httpx.post(
        f"{server.url}{COMPLETIONS}", json={"prompt_embeds": "gASVIQAAAA==", "max_tokens": 1}
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def test_prompts_and_answers_are_not_logged(start: Any) -> None:
    served = start()
    for body in (
        {"prompt": "s3cret words", "max_tokens": 4},
        {"prompt": "s3cret words", "temperature": "x"},
    ):
        httpx.post(f"{served.url}{COMPLETIONS}", json=body)
    httpx.get(f"{served.url}/nowhere?x=s3cret%0d%0awords")
    assert served.stop() == 0
    assert "s3cret" not in served.output()
