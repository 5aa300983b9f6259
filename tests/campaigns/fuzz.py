"""Requests to every route of the server: valid by its OpenAPI document, sensible ones, wrong ones, and bytes that are no HTTP.

No answer may be a 5xx, or other than the document and the API's own shape say.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple

from campaigns.base import Campaign, Report, Trial
from campaigns.schemas import Schemas
from campaigns.served import Served, servers

REQUESTS_PER_TRIAL = 100
TIMEOUT = 30
ENGINE = {"max_model_len": 64, "max_num_waiting": 64, "scheduler": {"max_num_seqs": 16}}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
NOT_JSON = (
    b"", b"{", b"[1,", b"{\"prompt\": NaN}", b"{\"prompt\": \"a\", \"temperature\": Infinity}", b"\xff\xfe{}", b"\"\\ud800\"",
    b"{\"prompt\": \"\\ud800\"}", b"null", b"[]", b"1", b"\"x\"", b"{} {}", b"{\"prompt\":\"a\",\"prompt\":3}",
    b"[" * 20_000, b"{\"prompt\":" * 5_000, b"{\"prompt\": " + b"9" * 5_000 + b"}", b"prompt=a&n=1", b"\x00" * 100,
)  # fmt: skip
NOT_HTTP = (
    b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"A" * 100_000,
    b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n3\r\n{} \r\n0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{\"prompt\":",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
    b"GET /health HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
)  # fmt: skip


class Route(NamedTuple):
    method: str
    path: str
    operation: dict[str, Any]

    @property
    def body(self) -> dict[str, Any] | None:
        content = self.operation.get("requestBody", {}).get("content", {})
        found: dict[str, Any] | None = content.get("application/json", {}).get("schema")
        return found


class Reply(NamedTuple):
    status: int
    kind: str
    body: bytes


class Fuzzer:
    """One server under test."""

    def __init__(self, served: Served, report: Report) -> None:
        self.served, self.report = served, report
        self.connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=TIMEOUT)
        document = json.loads(self.send("GET", "/openapi.json", None).body)
        self.schemas = Schemas(document)
        self.routes = [Route(m.upper(), p, op) for p, methods in document["paths"].items() for m, op in methods.items()]

    def send(self, method: str, path: str, body: bytes | None, headers: dict[str, str] | None = None) -> Reply:
        try:
            self.connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
            found = self.connection.getresponse()
            return Reply(found.status, found.headers.get_content_type(), found.read())
        except (OSError, http.client.HTTPException):
            self.connection.close()
            raise

    def trial(self, seed: int) -> None:
        rng = random.Random(seed)
        kinds = [self.valid, self.valid, self.sensible, self.wrong_body, self.wrong_json, self.wrong_route, self.no_http]
        for _ in range(REQUESTS_PER_TRIAL):
            rng.choice(kinds)(rng)
            self.report.counts["requests"] += 1
        assert self.send("GET", "/health", None).status == 200
        self.served.until(self.served.is_quiet, "nothing is left of the requests")

    # What is sent.

    def valid(self, rng: random.Random) -> None:
        """Valid by the document: also with values that the server has limits for."""
        route = rng.choice(self.routes) if rng.random() < 0.3 else rng.choice([r for r in self.routes if r.body])
        body = None
        if route.body is not None:
            data = self.schemas.value(rng, route.body)
            if "model" in data and rng.random() < 0.9:
                data["model"] = "sim"
            body = json.dumps(data).encode()
        name = rng.choice(["sim", "x", "a/b", "%00", "%F0%9F%98%80"])
        self._ask(route, route.path.replace("{name}", name), body, "valid")

    def sensible(self, rng: random.Random) -> None:
        """What must be answered."""
        body = sensible_body(rng)
        path = CHAT if "messages" in body else COMPLETIONS
        route = next(r for r in self.routes if r.path == path)
        reply = self._ask(route, path, json.dumps(body).encode(), "sensible")
        assert reply.status == 200, f"{path} {body}: {reply}"
        check_completion(body, reply)

    def wrong_body(self, rng: random.Random) -> None:
        """A valid body of which one member is something else, or gone."""
        route = rng.choice([r for r in self.routes if r.body])
        data = self.schemas.value(rng, route.body or {})
        names = list(self.schemas.resolved(route.body or {}).get("properties", {}))
        name = rng.choice(names)
        if rng.random() < 0.2:
            data.pop(name, None)
        else:
            data[name] = self.schemas.anything(rng)
        self._ask(route, route.path, json.dumps(data).encode(), "wrong body")

    def wrong_json(self, rng: random.Random) -> None:
        route = rng.choice([r for r in self.routes if r.body])
        kind = rng.choice(["application/json"] * 3 + ["text/plain", "application/x-www-form-urlencoded", "", "*/*"])
        encoding = rng.choice([{}, {}, {"Content-Encoding": "gzip"}])
        body = rng.choice(NOT_JSON) if rng.random() < 0.7 else rng.randbytes(rng.randint(1, 60))
        self._ask(route, route.path, body, "wrong JSON", {"Content-Type": kind, **encoding})

    def wrong_route(self, rng: random.Random) -> None:
        method = rng.choice(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "FOO"])
        others = ["/", "/v1", "/v1/", "//", "/v1/engines", "/%2e%2e/etc", "/v1/models/"]
        path = rng.choice([*(r.path for r in self.routes), *others])
        reply = self.send(method, path.replace("{name}", "x"), b"{}" if method in ("POST", "PUT", "PATCH") else None,
                          {"X-Request-Id": rng.choice(["", "a", "é", "x" * 1000]), "Authorization": "Bearer \xff"})  # fmt: skip
        self.report.counts[f"wrong route: {reply.status}"] += 1
        assert reply.status < 500, f"{method} {path}: {reply}"
        if reply.status in (404, 405) and method != "HEAD":
            check_error(f"{method} {path}", reply)

    def no_http(self, rng: random.Random) -> None:
        """Bytes that no client sends, or too few: an answer of 4xx, or none."""
        data = rng.choice(NOT_HTTP) if rng.random() < 0.8 else rng.randbytes(rng.randint(1, 300))
        with socket.create_connection(("127.0.0.1", self.served.port), timeout=TIMEOUT) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
            answer = b""
            with contextlib.suppress(ConnectionError):
                while piece := sock.recv(1 << 16):
                    answer += piece
        self.report.counts["no HTTP"] += 1
        assert not answer.startswith((b"HTTP/1.1 5", b"HTTP/1.0 5")), f"{data[:200]!r}: {answer[:500]!r}"

    # What comes back.

    def _ask(self, route: Route, path: str, body: bytes | None, what: str, headers: dict[str, str] | None = None) -> Reply:
        try:
            reply = self.send(route.method, path, body, headers)
        except (OSError, http.client.HTTPException) as e:
            raise AssertionError(f"{route.method} {path} {(body or b'')[:1000]!r}: {type(e).__name__}: {e}") from e
        self.report.counts[f"{what}: {reply.status}"] += 1
        asked = f"{route.method} {path} {(body or b'')[:2000]!r}"
        assert reply.status < 500, f"{asked}: {reply}"
        declared = route.operation["responses"]
        assert str(reply.status) in declared, f"{asked}: status {reply.status}, declared are {list(declared)}"
        if reply.status != 200:
            check_error(asked, reply)
        elif reply.kind == "application/json" and reply.body:
            schema = declared["200"].get("content", {}).get("application/json", {}).get("schema", {})
            problem = self.schemas.problem(json.loads(reply.body), schema)
            assert not problem, f"{asked}: {problem}"
        return reply


def check_error(asked: str, reply: Reply) -> None:
    """OpenAI's shape."""
    assert reply.kind == "application/json", f"{asked}: an error of type {reply.kind}: {reply.body[:300]!r}"
    error = json.loads(reply.body).get("error")
    assert isinstance(error, dict), f"{asked}: {reply.body[:300]!r}"
    assert set(error) >= {"message", "type", "param", "code"}, f"{asked}: {error}"
    assert error["code"] == reply.status, f"{asked}: {error} with status {reply.status}"
    assert isinstance(error["message"], str), f"{asked}: {error}"
    assert 0 < len(error["message"]) < 1100, f"{asked}: a message of {len(error['message'])} characters"
    assert error["param"] is None or isinstance(error["param"], str), f"{asked}: {error}"


def sensible_body(rng: random.Random) -> dict[str, Any]:
    """A request that any client might send."""
    some: dict[str, Any] = {
        "model": "sim", "n": rng.randint(1, 3), "temperature": rng.choice([0, 0.5, 2]), "top_p": rng.uniform(0.01, 1),
        "top_k": rng.choice([-1, 0, 7]), "min_p": rng.random(), "seed": rng.randrange(2**31), "user": "é",
        "presence_penalty": rng.uniform(-2, 2), "frequency_penalty": rng.uniform(-2, 2),
        "stop": rng.choice(["a", ["b", "\n"]]), "logit_bias": {str(rng.randrange(200)): rng.uniform(-100, 100)},
        "ignore_eos": True, "stream": rng.random() < 0.7, "cache_salt": "s", "priority": rng.randint(-9, 9),
        "skip_special_tokens": False, "return_token_ids": True, "stop_token_ids": [rng.randrange(200)],
        "repetition_penalty": rng.uniform(0.5, 2),
    }  # fmt: skip
    body = {"max_tokens": rng.randint(1, 10), **{name: value for name, value in some.items() if rng.random() < 0.25}}
    if body.get("stream") and rng.random() < 0.5:
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": rng.random() < 0.5}
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


def check_completion(body: dict[str, Any], reply: Reply) -> None:
    """Every sample ends once, for a reason, within its length; the usage adds up."""
    prompt = body.get("prompt")
    num_prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    num_choices = num_prompts * body.get("n", 1)
    if body.get("stream"):
        parts = [p.removeprefix("data: ") for p in reply.body.decode().split("\n\n") if p]
        assert parts[-1] == "[DONE]", f"{body}: {parts[-1]}"
        events = [json.loads(p) for p in parts[:-1]]
        choices = [c for e in events for c in e["choices"]]
        usages = [e["usage"] for e in events if e.get("usage")]
        assert bool(usages) == ("stream_options" in body), f"{body}: {events[-1]}"
    else:
        whole = json.loads(reply.body)
        choices, usages = whole["choices"], [whole["usage"]]
    ends = [(c["index"], c["finish_reason"]) for c in choices if c["finish_reason"] is not None]
    assert sorted(i for i, _ in ends) == list(range(num_choices)), f"{body}: {ends}"
    assert {reason for _, reason in ends} <= {"stop", "length"}, f"{body}: {ends}"
    for usage in usages[-1:]:
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"], f"{body}: {usage}"
        assert 0 < usage["completion_tokens"] <= num_choices * body["max_tokens"], f"{body}: {usage}"


@contextlib.contextmanager
def opened(report: Report) -> Iterator[Trial]:
    """A trial is `REQUESTS_PER_TRIAL` requests to one server for all."""
    with servers() as serve:
        served = serve(**ENGINE)
        yield Fuzzer(served, report).trial
        served.check_log()
        assert served.stop() == 0


FUZZ = Campaign(
    "fuzz", "the HTTP API under valid, sensible, wrong and garbled requests: no 5xx, nothing against its document", opened,
    full=20_000 // REQUESTS_PER_TRIAL, slice=1,
)  # fmt: skip
