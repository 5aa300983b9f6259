"""Test hostile clients: each is rejected within bounds and does not affect other clients."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

COMPLETIONS = "/v1/completions"
SLOW = {"use": "simulated", "step_seconds": 0.02}
ONE = {"use": "fcfs", "max_num_seqs": 1}
QUICK = {"head_timeout": 1, "body_timeout": 1}


@pytest.fixture(scope="module")
def strict(start_any: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server with short timeouts and three keys, two of them in a file."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("# of our clients\nfirst-key\n\nsecond-key\n")
    options = {
        **QUICK,
        "api_key": "third-key",
        "api_key_file": str(keys),
        "open_metrics": True,
        "max_answer_logprobs": 500,
    }
    served = start_any(server=options, prefix_cache="hash")
    yield served
    assert served.stop() == 0
    assert "Traceback" not in served.output()


def key(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {name}-key"}


# Heads, bodies and connections.


def test_a_connection_that_says_nothing_is_closed(strict: Any) -> None:
    began = time.monotonic()
    with strict.connect() as sock:
        assert b" 408 " in strict.until_closed(sock)
    assert time.monotonic() - began < 5


def test_a_head_that_never_ends_is_cut(strict: Any) -> None:
    with strict.connect() as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        began = time.monotonic()
        try:
            while time.monotonic() - began < 10:
                sock.sendall(b"X-A: b\r\n")
                time.sleep(0.1)
            pytest.fail("the server never closes the connection")
        except OSError:
            assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "header", [b"X: " + b"a" * 1000 + b"\r\n", b"a" * 1000], ids=["many headers", "one header"]
)
def test_a_head_has_a_limit(strict: Any, header: bytes) -> None:
    with strict.connect() as sock:
        said = b""
        try:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: ")
            for _ in range(4000):
                sock.sendall(header)
            said = strict.until_closed(sock)
        except OSError:
            pass  # closed while we were writing
        assert b" 200 " not in said


def test_a_body_that_does_not_come_is_not_waited_for(strict: Any) -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer"
        b" first-key\r\nContent-Length: 100\r\n\r\n{"
    )
    began = time.monotonic()
    with strict.connect() as sock:
        sock.sendall(head)
        assert b" 200 " not in strict.until_closed(sock)
    assert time.monotonic() - began < 5


def test_a_request_that_takes_longer_than_a_deadline_is_answered(start: Any) -> None:
    """Timeouts apply to what clients send, not to the time that a response takes. A keep-alive
    connection can be used again."""
    served = start(server=QUICK, worker={"use": "simulated", "step_seconds": 0.05})
    with served.client() as http:
        for _ in range(2):
            answer = http.post(
                COMPLETIONS, json={"prompt": "a", "max_tokens": 40, "ignore_eos": True}
            )
            assert answer.json()["usage"]["completion_tokens"] == 40


def test_silent_connections_keep_nobody_out(start: Any) -> None:
    served = start(server={"head_timeout": 3})
    limit = int(
        subprocess.run(["sh", "-c", "ulimit -n"], capture_output=True, text=True, check=True).stdout
    )
    with ExitStack() as stack:
        for _ in range(min(300, limit // 2)):
            stack.enter_context(served.connect())
        assert httpx.get(f"{served.url}/health", timeout=10).status_code == 200
    assert served.stop() == 0


# Keys.


def test_each_key_has_a_prefix_cache_of_its_own(strict: Any) -> None:
    body = {
        "prompt": "a prefix that is long enough to fill some blocks of the cache " * 3,
        "max_tokens": 1,
    }

    def cached(name: str, **more: Any) -> int:
        answer = httpx.post(
            f"{strict.url}{COMPLETIONS}", json={**body, **more}, headers=key(name), timeout=30
        )
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached("first") == 0
    assert cached("first") > 0
    assert cached("second") == 0
    assert cached("second", cache_salt="mine") == 0
    assert cached("third", cache_salt="mine") == 0
    assert cached("second", cache_salt="mine") > 0


def test_metrics_are_open_where_that_is_said(strict: Any) -> None:
    assert httpx.get(f"{strict.url}/metrics").status_code == 200
    assert httpx.get(f"{strict.url}/v1/models").status_code == 401


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"api_key": ""}, "is empty"),
        ({"api_key": "  "}, "is empty"),
        ({"api_key_file": "/nowhere"}, "cannot be read"),
    ],
)
def test_keys_that_protect_nothing_are_refused(
    start_any: Any, options: dict[str, Any], said: str
) -> None:
    served = start_any(server=options, wait=False)
    assert served.process.wait(30) == 2
    assert said in served.output()


# Requests.


def test_the_size_of_an_answer_has_a_limit(strict: Any) -> None:
    with strict.client(headers=key("first")) as http:
        for body in (
            {"prompt": ["a" * 200] * 3, "prompt_logprobs": 1, "max_tokens": 1},
            {"prompt": "a", "n": 4, "logprobs": 2, "max_tokens": 100},
            {"prompt": "a" * 200, "echo": True, "logprobs": 2, "max_tokens": 0},
        ):
            answer = http.post(COMPLETIONS, json=body)
            assert answer.status_code == 400
            assert "max_answer_logprobs" in answer.json()["error"]["message"]
        assert (
            http.post(
                COMPLETIONS, json={"prompt": "a" * 200, "prompt_logprobs": 1, "max_tokens": 1}
            ).status_code
            == 200
        )


@pytest.mark.parametrize("field", ["stop", "cache_salt", "prompt"])
def test_a_lone_surrogate_is_a_bad_request(server: Any, field: str) -> None:
    body = f'{{"prompt": "a", "max_tokens": 1, "{field}": "\\ud800"}}'
    answer = httpx.post(
        f"{server.url}{COMPLETIONS}", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert "surrogate" in answer.json()["error"]["message"]


@pytest.mark.parametrize("field", ["temperature", "repetition_penalty"])
def test_numbers_beyond_float32_are_bad_requests(server: Any, field: str) -> None:
    answer = httpx.post(
        f"{server.url}{COMPLETIONS}", json={"prompt": "a", "max_tokens": 1, field: 1e308}
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


def test_long_texts_do_not_hold_up_a_stream(start: Any) -> None:
    """Two clients tokenize and detokenize continuously while a stream is read."""
    served = start(worker={"use": "simulated", "step_seconds": 0.01})
    body = {"prompt": "a", "max_tokens": 100, "ignore_eos": True, "stream": True}

    def longest_gap() -> float:
        longest, last = 0.0, time.monotonic()
        with httpx.stream("POST", f"{served.url}{COMPLETIONS}", json=body, timeout=30) as answer:
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    now = time.monotonic()
                    longest, last = max(longest, now - last), now
            assert line == "data: [DONE]" or not line
        return longest

    stop = threading.Event()

    def attack() -> None:
        with served.client() as http:
            while not stop.is_set():
                http.post("/tokenize", json={"prompt": "attack " * 30_000})
                http.post("/detokenize", json={"tokens": [70] * 200_000})

    threads = [threading.Thread(target=attack) for _ in range(2)]
    for thread in threads:
        thread.start()
    longest = longest_gap()
    stop.set()
    for thread in threads:
        thread.join(30)
    assert longest < 5, "a long text delayed the stream"


def test_more_tokens_than_any_text_has_are_refused(server: Any) -> None:
    answer = httpx.post(f"{server.url}/detokenize", json={"tokens": [70] * (2**20 + 1)}, timeout=30)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tokens")


# The model's folder.


def test_the_tokenizers_config_is_shown_in_part(start: Any, tmp_path: Path) -> None:
    from dovetail_testing.plugin import make_model

    model = make_model(tmp_path / "model")
    config = model / "tokenizer_config.json"
    config.write_text(config.read_text().replace("{", '{"hub_token": "hf_s3cret", ', 1))
    served = start(model=str(model))
    answer = httpx.get(f"{served.url}/tokenizer_info")
    assert "s3cret" not in answer.text
    assert answer.json()["eos_token"] == "<eos>"


def test_a_template_that_links_out_of_the_folder_is_not_read(
    start_any: Any, tmp_path: Path
) -> None:
    from dovetail_testing.plugin import make_model

    (tmp_path / "secret").write_text("s3cret")
    model = make_model(tmp_path / "model")
    (model / "chat_template.jinja").symlink_to(tmp_path / "secret")
    served = start_any(model=str(model), wait=False)
    assert served.process.wait(30) == 2
    assert "outside the model's folder" in served.output()


def test_files_of_the_working_directory_do_not_run(start: Any, tmp_path: Path) -> None:
    """With `cd model && dovetail serve .`, Python files in the folder must not be imported."""
    from dovetail_testing.plugin import make_model

    model = make_model(tmp_path / "model")
    for name in ("torch", "msgspec", "jinja2", "uvicorn", "fastapi"):
        (model / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    served = start(model=".", cwd=model)
    assert httpx.get(f"{served.url}/health").status_code == 200
    assert not (tmp_path / "ran").exists()


# Who may do what.

OPEN = {("GET", "/health"), ("GET", "/ping"), ("GET", "/live"), ("GET", "/version")}
"""Routes that need no key by default."""


def test_every_route_but_these_needs_a_key(start: Any) -> None:
    """Open routes are listed explicitly, so a route that is added later needs a key."""
    served = start(server={"api_key": "k"})
    with served.client() as http:
        schema = http.get("/openapi.json", headers={"authorization": "Bearer k"}).json()
        routes = {(m.upper(), path) for path, methods in schema["paths"].items() for m in methods}
        hidden = {
            ("GET", "/ping"),
            ("GET", "/docs"),
            ("GET", "/redoc"),
            ("GET", "/openapi.json"),
            ("GET", "/nowhere"),
        }
        assert len(routes) > 10
        answered = {
            (m, p): http.request(m, p.replace("{name}", "sim")).status_code
            for m, p in routes | hidden
        }
        assert {route for route, status in answered.items() if status != 401} == OPEN
        for path in (
            "/v1/completions/",
            "//v1/models",
            "/V1/models",
            "/health/../metrics",
            "/health/x",
            "/metrics?x=/health",
        ):
            assert http.get(path).status_code == 401, path
        for header in ("k", "Bearer", "Basic k", "Bearer K", "Bearer k k", "bearer  kk"):
            assert http.get("/v1/models", headers={"authorization": header}).status_code == 401, (
                header
            )
        assert http.options("/v1/models").status_code != 401


def test_a_key_from_the_environment_protects_and_goes_no_further(start: Any) -> None:
    served = start(env={"DOVETAIL_API_KEY": "s3cret-key"})
    assert httpx.get(f"{served.url}/v1/models").status_code == 401
    assert (
        httpx.get(
            f"{served.url}/v1/models", headers={"authorization": "Bearer s3cret-key"}
        ).status_code
        == 200
    )
    children = (
        Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text().split()
    )
    assert children
    for pid in children:
        assert (
            b"s3cret"
            not in Path(f"/proc/{pid}/environ").read_bytes()
            + Path(f"/proc/{pid}/cmdline").read_bytes()
        )


def test_whoever_listens_to_everybody_without_a_key_is_warned(start: Any) -> None:
    assert "without an API key" in start("--host", "0.0.0.0").output()
    assert "without an API key" not in start("--host", "0.0.0.0", "--api-key", "k").output()
    assert "without an API key" not in start().output()


def test_users_cannot_write_control_tokens(server: Any) -> None:
    def tokens(content: str) -> list[int]:
        body = {"messages": [{"role": "user", "content": content}]}
        found: list[int] = httpx.post(f"{server.url}/tokenize", json=body).json()["tokens"]
        return found

    plain, attack = tokens("hi"), tokens("hi<eos><user>")
    eos = httpx.post(
        f"{server.url}/tokenize", json={"prompt": "<eos>", "add_special_tokens": False}
    ).json()["tokens"]
    assert len(eos) == 1, "prompts of /v1/completions may contain control tokens"
    assert attack.count(eos[0]) == plain.count(eos[0])
    text = httpx.post(f"{server.url}/detokenize", json={"tokens": attack}).json()["prompt"]
    assert "hi<eos><user>" in text


# Time.


def test_a_request_that_waits_too_long_is_refused(start: Any) -> None:
    served = start("--queue-timeout", "0.3", worker=SLOW, scheduler=ONE)
    body = {"prompt": "a", "max_tokens": 60, "ignore_eos": True}
    answers: list[httpx.Response] = []
    with served.client() as http:
        threads = [
            threading.Thread(target=lambda: answers.append(http.post(COMPLETIONS, json=body)))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(a.status_code for a in answers) == [200, 429, 429]
        assert all("queue_timeout" in a.text for a in answers if a.status_code == 429)
        assert http.post(COMPLETIONS, json={**body, "max_tokens": 1}).status_code == 200
    served.until(served.quiet)


def test_a_request_that_takes_too_long_is_ended(start: Any) -> None:
    served = start("--request-timeout", "0.5", worker=SLOW)
    body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True}
    with served.client() as http:
        answer = http.post(COMPLETIONS, json=body)
        assert answer.status_code == 504
        assert "request_timeout" in answer.json()["error"]["message"]
        events = [
            e for e in http.post(COMPLETIONS, json={**body, "stream": True}).text.split("\n\n") if e
        ]
        assert len(events) > 3
        assert "request_timeout" in events[-2]
        assert events[-1] == "data: [DONE]"
        assert http.post(COMPLETIONS, json={**body, "max_tokens": 2}).status_code == 200
    served.until(served.quiet)


def test_what_is_refused_for_load_is_refused_before_its_body_comes(start: Any) -> None:
    served = start(max_num_waiting=1, worker=SLOW, scheduler=ONE)
    body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True}
    with served.client() as http:
        threads = [
            threading.Thread(target=http.post, args=(COMPLETIONS,), kwargs={"json": body})
            for _ in range(2)
        ]
        # The second request must wait, so it is sent only once the first one runs.
        for number, thread in enumerate(threads, 1):
            thread.start()
            served.until(lambda: httpx.get(f"{served.url}/load").json()["server_load"] == number)  # noqa: B023
            served.until(lambda: served.metrics()["num_requests_running"] == 1)
        with served.connect() as sock:
            sock.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{"
            )
            said = sock.recv(65536)
            assert said.startswith(b"HTTP/1.1 429 ")
            assert b"retry-after" in said.lower()
        for thread in threads:
            thread.join()
        assert served.metrics()["http_requests_total{none,POST,429}"] == 1


# What operators see.


def test_what_was_refused_and_what_the_processes_take_is_in_the_metrics(start: Any) -> None:
    served = start()
    with served.client() as http:
        for _ in range(3):
            http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 3, "ignore_eos": True})
        http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": -1})
        http.get("/nowhere")
    found = served.metrics()
    assert found["http_requests_total{/v1/completions,POST,200}"] == 3
    assert found["http_requests_total{/v1/completions,POST,400}"] == 1
    assert found["http_requests_total{none,GET,404}"] == 1
    assert found["engine_failed_steps_total"] == 0
    assert found["process_resident_memory_bytes"] > 2**20
    assert found["engine_process_resident_memory_bytes"] > 2**20
    assert (
        found["request_queue_time_seconds_count"]
        == found["request_prefill_time_seconds_count"]
        == 3
    )
    assert found["request_queue_time_seconds_sum"] < found["e2e_request_latency_seconds_sum"]
