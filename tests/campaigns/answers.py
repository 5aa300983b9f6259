"""What any client might ask, which must be answered in full; and bytes that no client sends, which
must do no harm."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
from collections.abc import Iterator
from typing import Any

from campaigns.base import Campaign, Report, Trial
from campaigns.served import COMPLETIONS, HOST, NAME, PATIENCE, Server, servers

CHAT = "/v1/chat/completions"
REQUESTS_PER_TRIAL = 20
NOT_HTTP = (
    b"\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"A" * 100_000,
    b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length:"
        b" 3\r\n\r\n3\r\n{} \r\n0\r\n\r\n"
    ),
    b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{"prompt":',
    (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length:"
        b" 2\r\n\r\n{}"
    ),
    (
        b"GET /health HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection:"
        b" Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key:"
        b" dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    ),
)


def sensible_body(rng: random.Random) -> dict[str, Any]:
    """A request that any client might send."""
    some: dict[str, Any] = {
        "model": NAME,
        "n": rng.randint(1, 3),
        "temperature": rng.choice([0, 0.5, 2]),
        "top_p": rng.uniform(0.01, 1),
        "top_k": rng.choice([-1, 0, 7]),
        "min_p": rng.random(),
        "seed": rng.randrange(2**31),
        "user": "é",
        "presence_penalty": rng.uniform(-2, 2),
        "frequency_penalty": rng.uniform(-2, 2),
        "stop": rng.choice(["a", ["b", "\n"]]),
        "logit_bias": {str(rng.randrange(200)): rng.uniform(-100, 100)},
        "ignore_eos": True,
        "stream": rng.random() < 0.7,
        "cache_salt": "s",
        "priority": rng.randint(-9, 9),
        "skip_special_tokens": False,
        "return_token_ids": True,
        "stop_token_ids": [rng.randrange(200)],
        "repetition_penalty": rng.uniform(0.5, 2),
    }
    body = {
        "max_tokens": rng.randint(1, 10),
        **{name: value for name, value in some.items() if rng.random() < 0.25},
    }
    if body.get("stream") and rng.random() < 0.5:
        body["stream_options"] = {
            "include_usage": True,
            "continuous_usage_stats": rng.random() < 0.5,
        }
    text = "".join(rng.choice("abc é😀\n") for _ in range(rng.randint(1, 9)))
    if rng.random() < 0.5:
        if rng.random() < 0.4:
            body |= {"logprobs": True, "top_logprobs": rng.randint(0, 20)}
        content: Any = rng.choice([text, [{"type": "text", "text": text}]])
        return {**body, "messages": [{"role": rng.choice(["user", "system"]), "content": content}]}
    if rng.random() < 0.4:
        body |= {"logprobs": rng.randint(0, 20)}
    body["echo"] = rng.random() < 0.2
    prompt = rng.choice([text, [text, "b"], [5, 6, 7], [[8], [9, 10]]])
    return {**body, "prompt": prompt}


def ask(connection: http.client.HTTPConnection, rng: random.Random, report: Report) -> None:
    body = sensible_body(rng)
    path = CHAT if "messages" in body else COMPLETIONS
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    data = answer.read()
    report.counts[f"{path}, {'streamed' if body.get('stream') else 'whole'}"] += 1
    assert answer.status == 200, f"{path} {body}: {answer.status} {data[:500]!r}"
    check_completion(body, data)


def garble(server: Server, rng: random.Random, report: Report) -> None:
    """An answer of 4xx, or none."""
    data = rng.choice(NOT_HTTP) if rng.random() < 0.8 else rng.randbytes(rng.randint(1, 300))
    answer = b""
    with socket.create_connection((HOST, server.port), timeout=PATIENCE) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while piece := sock.recv(1 << 16):
                answer += piece
    report.counts[f"garbled: {answer[9:12].decode('latin-1') or 'no answer'}"] += 1
    assert not answer.startswith((b"HTTP/1.1 5", b"HTTP/1.0 5")), (
        f"{data[:200]!r}: {answer[:500]!r}"
    )


def check_completion(body: dict[str, Any], reply: bytes) -> None:
    """Every sample ends once, for a reason, within its length; the usage adds up."""
    prompt = body.get("prompt")
    num_prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    num_choices = num_prompts * body.get("n", 1)
    if body.get("stream"):
        parts = [p.removeprefix("data: ") for p in reply.decode().split("\n\n") if p]
        assert parts[-1] == "[DONE]", f"{body}: {parts[-1]}"
        events = [json.loads(p) for p in parts[:-1]]
        choices = [c for e in events for c in e["choices"]]
        usages = [e["usage"] for e in events if e.get("usage")]
        assert bool(usages) == ("stream_options" in body), f"{body}: {events[-1]}"
    else:
        whole = json.loads(reply)
        choices, usages = whole["choices"], [whole["usage"]]
    ends = [(c["index"], c["finish_reason"]) for c in choices if c["finish_reason"] is not None]
    assert sorted(i for i, _ in ends) == list(range(num_choices)), f"{body}: {ends}"
    assert {reason for _, reason in ends} <= {"stop", "length"}, f"{body}: {ends}"
    for usage in usages[-1:]:
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"], (
            f"{body}: {usage}"
        )
        assert 0 < usage["completion_tokens"] <= num_choices * body["max_tokens"], (
            f"{body}: {usage}"
        )


@contextlib.contextmanager
def opened(report: Report) -> Iterator[Trial]:
    """A trial is some requests of both kinds to one server for all."""
    with servers() as serve:
        server = serve(scheduler={"max_num_seqs": 16})
        connection = http.client.HTTPConnection(HOST, server.port, timeout=PATIENCE)

        def trial(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(REQUESTS_PER_TRIAL):
                if rng.random() < 0.2:
                    garble(server, rng, report)
                else:
                    ask(connection, rng, report)
                report.counts["requests"] += 1

        yield trial
        connection.close()
        server.assert_no_traceback()
        assert server.stop() == 0, "the server did not end well"


ANSWERS = Campaign(
    "answers",
    "what any client might ask, answered in full, between bytes that are no HTTP",
    opened,
    full=20_000 // REQUESTS_PER_TRIAL,
    slice=5,
)
