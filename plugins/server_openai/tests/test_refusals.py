"""Test rejected requests: all errors have the same format, none is a 5xx, and nothing is left
behind."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]
JSON = {"content-type": "application/json"}
NAN, INFINITY = float("nan"), float("inf")


def refusal(answer: httpx.Response, status: int) -> dict[str, Any]:
    """Return the error of a response and check its format."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert error["message"]
    assert len(error["message"]) <= 1002
    assert "Traceback" not in answer.text
    assert "site-packages" not in answer.text
    return error


BOTH: list[tuple[dict[str, Any], str | None]] = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": NAN}, "temperature"),
    ({"temperature": INFINITY}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"repetition_penalty": 10**400}, "repetition_penalty"),
    ({"temperature": "0.5"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_p": NAN}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 10**30}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "s" * 257}, "cache_salt"),
    ({"cache_salt": 7}, "cache_salt"),
    ({"cache_salt": ["a"]}, "cache_salt"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": INFINITY}, "repetition_penalty"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": "2"}, "n"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 257}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": ["ok", ""]}, "stop"),
    ({"stop": [f"{i}" for i in range(10_000)]}, "stop"),
    ({"stop": "x" * 2000}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": [5]}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"five": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5": NAN}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": "yes"}, "stream"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"priority": 10**30}, "priority"),
    ({"guided_regex": "[a-z]+"}, "guided_regex"),
    ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
    ({"use_beam_search": True}, "use_beam_search"),
]
COMPLETION_ONLY: list[tuple[dict[str, Any], str | None]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["ok", ""]}, "prompt"),
    ({"prompt": {"text": "x"}}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [5, 261]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": "x" * 257}, "prompt"),
    ({"prompt": "x" * 256}, "prompt"),
    ({"prompt": "x" * 1_000_000}, "prompt"),
    ({"prompt": "x" * 300, "stream": True}, "prompt"),
    ({"prompt": ["a"] * 2000}, "prompt"),
    ({"prompt": ["a"] * 20, "n": 100}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 3}, "best_of"),
]
CHAT_ONLY: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{}]}, "messages"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
            ]
        },
        "messages",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 300}], "stream": True}, "prompt"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 2}, "logprobs"),
    ({"max_completion_tokens": 0}, "max_tokens"),
    ({"tools": []}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
]


@pytest.mark.parametrize(
    ("route", "change", "param"),
    [(r, *c) for r in (COMPLETIONS, CHAT) for c in BOTH]
    + [(COMPLETIONS, *c) for c in COMPLETION_ONLY]
    + [(CHAT, *c) for c in CHAT_ONLY],
    ids=lambda v: (v if isinstance(v, str) else json.dumps(v))[:40],
)
def test_bad_values_name_their_field(
    http: httpx.Client, route: str, change: dict[str, Any], param: str | None
) -> None:
    body = {
        **({"prompt": "hi"} if route == COMPLETIONS else {"messages": HELLO}),
        "max_tokens": 5,
        **change,
    }
    error = refusal(http.post(route, content=json.dumps(body), headers=JSON), 400)
    assert (error["param"], error["type"]) == (param, "BadRequestError")


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"", JSON),
        (b"{", JSON),
        (b"null", JSON),
        (b"[1, 2]", JSON),
        (b'"text"', JSON),
        (b'{"prompt": "\xff\xfe"}', JSON),
        (b'{"prompt": "\\ud800"}', JSON),
        (b'{"prompt": "hi"}', {"content-type": "text/plain"}),
        (b"prompt=hi", {"content-type": "application/x-www-form-urlencoded"}),
        (b'{"prompt": "hi"}', {}),
        (b'{"prompt": ' + b"9" * 10_000 + b"}", JSON),
        (b'{"prompt": "hi", "made_up": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", JSON),
        (b"[" * 2_000_000, JSON),
        (
            b'{"messages": [{"role": "user", "content": "hi", "x": '
            + b'{"a":' * 5000
            + b"1"
            + b"}" * 5001
            + b"]}",
            JSON,
        ),
    ],
    ids=lambda v: repr(v)[:40],
)
@pytest.mark.parametrize("route", [COMPLETIONS, CHAT, "/tokenize"])
def test_bad_bodies(
    http: httpx.Client, route: str, content: bytes, headers: dict[str, str]
) -> None:
    refusal(http.post(route, content=content, headers=headers), 400)


@pytest.mark.parametrize("depth", [10, 200, 300, 700])
def test_deep_bodies_never_break_the_server(http: httpx.Client, depth: int) -> None:
    deep = '{"a":' * depth + "1" + "}" * depth
    for route, body in (
        (
            CHAT,
            (
                '{"max_tokens": 2, "messages": [{"role": "user", "content": "hi", "made_up":'
                f" {deep}}}]}}"
            ),
        ),
        (
            CHAT,
            (
                '{"max_tokens": 2, "messages": [{"role": "user", "content": "hi"}],'
                f' "chat_template_kwargs": {deep}}}'
            ),
        ),
        (COMPLETIONS, f'{{"max_tokens": 2, "prompt": "hi", "made_up": {deep}}}'),
    ):
        assert http.post(route, content=body, headers=JSON).status_code in (200, 400)


@pytest.mark.parametrize(
    "key", ["messages", "template", "add_generation_prompt", "self", "a b", "bos_token"]
)
def test_template_variables_cannot_break_the_template(http: httpx.Client, key: str) -> None:
    body = {"messages": HELLO, "max_tokens": 3, "seed": 1}
    plain = http.post(CHAT, json=body).json()
    answer = http.post(CHAT, json={**body, "chat_template_kwargs": {key: "x"}})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == plain["choices"]


def test_a_list_of_a_million_bad_items_is_one_error(http: httpx.Client) -> None:
    refusal(
        http.post(
            COMPLETIONS, content=b'{"prompt": ["a"' + b",1" * 1_000_000 + b"]}", headers=JSON
        ),
        400,
    )


def test_tokenize_and_detokenize(http: httpx.Client) -> None:
    for body in ({}, {"prompt": "a", "messages": HELLO}, {"prompt": 5}, {"prompt": "x" * 100_000}):
        refusal(http.post("/tokenize", json=body), 400)
    for tokens in ([-1], [10**9], [10**30], ["a"], "a"):
        refusal(http.post("/detokenize", json={"tokens": tokens}), 400)


def test_unknown_models_routes_and_methods(http: httpx.Client) -> None:
    for route, body in (
        (COMPLETIONS, {"prompt": "a"}),
        (CHAT, {"messages": HELLO}),
        ("/tokenize", {"prompt": "a"}),
    ):
        assert refusal(http.post(route, json={**body, "model": "other"}), 404)["param"] == "model"
    refusal(http.get("/v1/models/other"), 404)
    refusal(http.get("/nowhere"), 404)
    refusal(http.post("/v1/nowhere"), 404)
    answer = http.get(COMPLETIONS)
    refusal(answer, 405)
    assert answer.headers["allow"] == "POST"
    refusal(http.delete("/health"), 405)


def test_the_clients_exceptions_fit(server: Any) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(model="sim", prompt="x" * 300)
        assert bad.value.param == "prompt"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt="x")


@pytest.fixture(scope="module")
def guarded(start_any: Any) -> Iterator[Any]:
    served = start_any("--api-key", "s3cret-key", server={"max_body_mb": 0.01, "max_logprobs": 3})
    yield served
    assert served.stop() == 0


def test_the_key_guards_all_but_what_a_load_balancer_asks(guarded: Any) -> None:
    with guarded.client() as http:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "s3cret-key"},
            {"authorization": "Basic s3cret-key"},
            {"authorization": "Bearer"},
            {"authorization": "Bearer s3cret-key2"},
        ):
            answer = http.get("/v1/models", headers={**headers, "X-Request-Id": "7"})
            assert refusal(answer, 401)["type"] == "AuthenticationError"
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["x-request-id"] == "7"
            refusal(http.post(COMPLETIONS, json={"prompt": "a"}, headers=headers), 401)
            refusal(http.get("/%761/models", headers=headers), 401)
        for path in ("/health", "/live", "/version"):
            assert http.get(path).status_code == 200
        for path in (
            "/metrics",
            "/openapi.json",
            "/docs",
            "/load",
            "/tokenizer_info",
            "/nowhere",
            "/v1/dovetail/plan",
        ):
            refusal(http.get(path), 401)
        for path in ("/tokenize", "/detokenize", "/reset_prefix_cache"):
            refusal(http.post(path, json={"prompt": "a", "tokens": [5]}), 401)
        assert http.options("/v1/models").status_code == 405
        for scheme in ("Bearer", "bearer"):
            assert (
                http.get(
                    "/v1/models", headers={"authorization": f"{scheme} s3cret-key"}
                ).status_code
                == 200
            )
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="s3cret-key", max_retries=0) as client:
        assert client.completions.create(model="sim", prompt="a", max_tokens=2).choices
        with pytest.raises(openai.BadRequestError, match="between 0 and 3"):
            client.completions.create(model="sim", prompt="a", logprobs=4)
    with (
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="nope", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_the_key_is_told_nowhere(guarded: Any) -> None:
    with guarded.client(headers={"authorization": "Bearer s3cret-key"}) as http:
        for path in (
            "/version",
            "/metrics",
            "/openapi.json",
            "/tokenizer_info",
            "/v1/models",
            "/v1/dovetail/plan",
        ):
            answer = http.get(path)
            assert answer.status_code == 200
            assert "s3cret" not in answer.text
    assert "s3cret" not in guarded.output()


def test_the_key_is_no_part_of_the_plan(guarded: Any) -> None:
    """`explain` does not print the key either."""
    config = guarded.log.with_name(
        guarded.log.name.replace("log-", "config-").replace(".txt", ".yaml")
    )
    secret = config.with_name("secret.yaml")
    secret.write_text(
        config.read_text().replace("max_body_mb", "api_key: s3cret-key\n  max_body_mb")
    )
    environ = {"PYTHONPATH": _environ(guarded)}
    for flags in ([], ["--json"]):
        command = [sys.executable, "-m", "dovetail.cli.main", "explain", str(secret), *flags]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environ, timeout=30, check=True
        )
        assert "max_body_mb" in done.stdout
        assert "s3cret" not in done.stdout + done.stderr


def _environ(served: Any) -> str:
    """Return PYTHONPATH of a running server."""
    from pathlib import Path

    pairs = Path(f"/proc/{served.process.pid}/environ").read_bytes().split(b"\0")
    return (
        next(p for p in pairs if p.startswith(b"PYTHONPATH=")).removeprefix(b"PYTHONPATH=").decode()
    )


def test_bodies_that_are_too_large(guarded: Any) -> None:
    key = {"authorization": "Bearer s3cret-key"}
    big = json.dumps({"prompt": "x" * 20_000}).encode()
    with guarded.client(headers=key) as http:
        error = refusal(http.post(COMPLETIONS, content=big, headers=JSON), 413)
        assert "max_body_mb" in error["message"]

        def chunks() -> Iterator[bytes]:
            yield from (big[i : i + 1000] for i in range(0, len(big), 1000))

        refusal(http.post(COMPLETIONS, content=chunks(), headers=JSON), 413)
        refusal(http.post("/tokenize", content=chunks(), headers=JSON), 413)
        assert http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_false_content_length_is_no_way_round(guarded: Any) -> None:
    url = httpx.URL(guarded.url)
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer"
        f" s3cret-key\r\nContent-Length: {10**15}\r\n\r\n"
    )
    with socket.create_connection((url.host, url.port or 0), timeout=30) as sock:
        sock.sendall(head.encode())
        assert b" 413 " in sock.recv(1000).split(b"\r\n")[0]


ANY = st.sampled_from(
    [None, True, 0, 1, -1, 2.5, "x", "", [], {}, [1], ["a"], {"a": 1}, 10**20, NAN, INFINITY]
)
PROMPT = st.one_of(
    st.text(max_size=20),
    st.lists(st.text(max_size=5), max_size=3),
    st.lists(st.integers(-1, 270), max_size=5),
    st.lists(st.lists(st.integers(0, 260), max_size=3), max_size=3),
    ANY,
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["sim", None, "other"]),
    "max_tokens": st.integers(-1, 8),
    "temperature": st.floats(),
    "top_p": st.floats(),
    "top_k": st.integers(),
    "min_p": st.floats(-1, 2),
    "n": st.integers(-1, 4),
    "seed": st.integers(),
    "stop": st.one_of(st.text(max_size=3), st.lists(st.text(max_size=3), max_size=3)),
    "stop_token_ids": st.lists(st.integers(-1, 270), max_size=3),
    "logprobs": st.integers(-1, 22),
    "prompt_logprobs": st.integers(-1, 3),
    "echo": st.booleans(),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "logit_bias": st.dictionaries(st.integers(-1, 300).map(str), st.floats(-200, 200), max_size=3),
    "presence_penalty": st.floats(-3, 3),
    "repetition_penalty": st.floats(-1, 3),
    "min_tokens": st.integers(-1, 9),
    "ignore_eos": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "return_token_ids": st.booleans(),
    "best_of": st.integers(0, 3),
    "priority": st.integers(),
}
MAYBE = {name: st.one_of(values, values, values, values, ANY) for name, values in FIELDS.items()}


@settings(max_examples=250, deadline=None)
@given(body=st.fixed_dictionaries({"prompt": PROMPT}, optional=MAYBE))
def test_no_body_breaks_the_server(server: Any, body: dict[str, Any]) -> None:
    """Any mix of valid and invalid fields gets a response or an error in the common format, never a
    5xx, and does not hang."""
    answer = httpx.post(
        f"{server.url}{COMPLETIONS}", content=json.dumps(body), headers=JSON, timeout=10
    )
    if answer.status_code != 200:
        assert answer.status_code in (400, 404), (body, answer.text)
        refusal(answer, answer.status_code)
    elif body.get("stream"):
        assert answer.text.endswith("data: [DONE]\n\n")
        assert '"error"' not in answer.text
    else:
        choices = answer.json()["choices"]
        assert all(c["finish_reason"] in ("stop", "length") for c in choices)
