"""Test the life cycle of a server: loading, metrics, disconnecting clients, a crashing engine,
overload and shutdown."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SLOW = {"worker": {"use": "simulated", "step_seconds": 0.02}}
LONG = {"prompt": "a", "max_tokens": 200, "ignore_eos": True}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Stream:
    """A streamed completion that a test reads line by line."""

    def __init__(self, url: str, **body: Any) -> None:
        self._client = httpx.Client(base_url=url, timeout=30)
        self._context = self._client.stream(
            "POST", COMPLETIONS, json={**LONG, "stream": True, **body}
        )
        self.answer = self._context.__enter__()
        self._lines = self.answer.iter_lines()
        self.first = self.read()

    def read(self) -> str:
        """Return the data of the next event."""
        while True:
            line = next(self._lines)
            if line:
                return line.removeprefix("data: ")

    def rest(self) -> list[str]:
        return [line.removeprefix("data: ") for line in self._lines if line]

    def leave(self) -> None:
        self._context.__exit__(None, None, None)
        self._client.close()


Open = Callable[..., Stream]


@pytest.fixture
def open_stream() -> Iterator[Open]:
    """Open streams that are closed at the end of the test, at the latest."""
    with contextlib.ExitStack() as stack:

        def begin(*args: Any, **body: Any) -> Stream:
            stream = Stream(*args, **body)
            stack.callback(stream.leave)
            return stream

        yield begin


def engine_pids(served: Any) -> list[int]:
    return [
        int(p)
        for p in (
            Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children")
            .read_text()
            .split()
        )
    ]


def test_while_it_loads_it_says_so(start: Any) -> None:
    port = free_port()
    served = start(
        "--port", str(port), wait=False, worker={"use": "simulated", "load_seconds": 1.0}
    )
    served.url = f"http://127.0.0.1:{port}"

    served.until(lambda: _reachable(served.url))
    for answer in (
        httpx.get(f"{served.url}/health"),
        httpx.post(f"{served.url}{COMPLETIONS}", json={"prompt": "a"}),
    ):
        assert answer.status_code == 503
        assert 1 <= int(answer.headers["retry-after"]) <= 8
        assert "loading" in answer.json()["error"]["message"]
    assert httpx.get(f"{served.url}/live").status_code == 200
    assert httpx.get(f"{served.url}/v1/models").status_code == 200
    served.wait_ready()
    served.until(lambda: httpx.get(f"{served.url}/health").status_code == 200)
    assert served.stop() == 0


def _reachable(url: str) -> bool:
    try:
        httpx.get(f"{url}/version")
    except httpx.TransportError:
        return False
    return True


def test_a_stop_while_it_loads_is_no_failure(start: Any) -> None:
    port = free_port()
    served = start(
        "--port", str(port), wait=False, worker={"use": "simulated", "load_seconds": 20.0}
    )
    served.until(lambda: _reachable(f"http://127.0.0.1:{port}"))
    assert served.stop() == 0
    assert "Traceback" not in served.output()


def test_what_keeps_it_from_starting_is_one_line(start: Any, server: Any) -> None:
    taken = httpx.URL(server.url).port
    for flags, values, message in (
        (("--port", str(taken)), {}, "cannot listen on 127.0.0.1"),
        (("--port", "99999"), {}, "cannot listen on 127.0.0.1:99999"),
        (("--host", "no.such.host.invalid"), {}, "cannot listen on no.such.host.invalid"),
        ((), {"model": "/nowhere"}, "'/nowhere'"),
        ((), {"server": {"max_body": 1}}, "max_body"),
        (
            (),
            {"worker": {"use": "simulated", "load_seconds": 0, "step_seconds": "x"}},
            "step_seconds",
        ),
    ):
        served = start(*flags, wait=False, **values)
        assert served.process.wait(30) == 2
        assert message in served.output()
        assert "Traceback" not in served.output()


def test_counters_are_exact(start: Any) -> None:
    served = start()
    before = served.metrics()
    assert before["prompt_tokens_total"] == before["generation_tokens_total"] == 0
    with served.client() as http, ThreadPoolExecutor(8) as pool:

        def ask(i: int) -> None:
            body = {
                "prompt": "x" * (10 + i),
                "max_tokens": 5,
                "ignore_eos": True,
                "stream": i % 2 == 0,
                "n": 1 + i % 2,
            }
            assert http.post(COMPLETIONS, json=body).status_code == 200

        list(pool.map(ask, range(20)))
        assert http.post(COMPLETIONS, json={**LONG, "prompt": ""}).status_code == 400
        found = http.post(
            COMPLETIONS,
            json={"prompt": "y", "max_tokens": 100, "stop_token_ids": list(range(200, 260))},
        )
        stopped = found.json()["usage"]["completion_tokens"]
    served.until(served.quiet)
    m = served.metrics()
    num_prompt = sum(10 + i for i in range(20)) + 1
    assert m["prompt_tokens_total"] == num_prompt
    assert m["generation_tokens_total"] == 10 * 5 + 10 * 10 + stopped
    assert m["request_success_total{length}"] == 20
    assert m["request_success_total{stop}"] == 1
    assert m["time_to_first_token_seconds_count"] == m["e2e_request_latency_seconds_count"] == 21
    assert m["request_prompt_tokens_sum"] == num_prompt
    assert m["request_generation_tokens_sum"] == m["generation_tokens_total"]
    assert m["request_params_n_sum"] == 31
    assert m["num_preemptions_total"] == m["engine_restarts_total"] == 0


def test_metric_names_can_be_vllms(start: Any) -> None:
    served = start(server={"metrics_prefix": "vllm:"})
    text = httpx.get(f"{served.url}/metrics").text
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "generation_tokens_total",
    ):
        assert f'vllm:{name}{{model_name="sim"}} 0.0' in text


@pytest.fixture(scope="module")
def slow(start_any: Any) -> Any:
    served = start_any(scheduler={"max_num_seqs": 4}, max_num_waiting=4, **SLOW)
    yield served
    assert served.stop() == 0
    assert "Traceback" not in served.output()
    assert "ERROR" not in served.output()


def test_a_client_that_leaves_a_stream_stops_the_work(slow: Any, open_stream: Open) -> None:
    before = slow.metrics()
    streams = [open_stream(slow.url) for _ in range(3)]
    slow.until(lambda: slow.metrics()["num_requests_running"] == 3)
    assert slow.metrics()["kv_cache_usage_perc"] > 0
    for stream in streams:
        stream.leave()
    slow.until(slow.quiet)
    after = slow.metrics()
    assert after["generation_tokens_total"] - before["generation_tokens_total"] < 300
    assert (
        after["request_success_total{abort}"] - before.get("request_success_total{abort}", 0) == 3
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompts", [1, 3])
def test_a_client_that_leaves_before_its_answer_stops_the_work(
    slow: Any, open_stream: Open, stream: bool, prompts: int
) -> None:
    """This includes requests that still wait for their first token."""
    busy = [open_stream(slow.url, max_tokens=100) for _ in range(4)]  # occupies all batch rows
    before = slow.metrics()
    body = {**LONG, "prompt": ["b"] * prompts, "stream": stream}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{slow.url}{COMPLETIONS}", json=body, timeout=httpx.Timeout(30, read=0.3))
    slow.until(lambda: slow.metrics()["num_requests_waiting"] == 0)
    after = slow.metrics()
    assert (
        after["request_success_total{abort}"] - before.get("request_success_total{abort}", 0)
        == prompts
    )
    for s in busy:
        assert s.rest()[-1] == "[DONE]"
    slow.until(slow.quiet)


def test_a_client_that_leaves_a_whole_answer_stops_the_work(slow: Any) -> None:
    before = slow.metrics()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{slow.url}{CHAT}",
            json={"messages": [{"role": "user", "content": "a"}], "n": 2, "ignore_eos": True},
            timeout=httpx.Timeout(30, read=0.3),
        )
    slow.until(slow.quiet)
    after = slow.metrics()
    assert after["generation_tokens_total"] - before["generation_tokens_total"] < 200
    assert (
        after["request_success_total{abort}"] - before.get("request_success_total{abort}", 0) == 1
    )


def test_overload_is_told_and_loses_nothing(slow: Any) -> None:
    def ask(i: int) -> httpx.Response:
        return httpx.post(
            f"{slow.url}{COMPLETIONS}",
            json={**LONG, "max_tokens": 20, "stream": i % 2 == 0},
            timeout=30,
        )

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(24)))
    refused = [a for a in answers if a.status_code == 429]
    assert refused
    for answer in refused:
        assert 1 <= int(answer.headers["retry-after"]) <= 8
        assert answer.json()["error"]["type"] == "RateLimitError"
    served = [a for a in answers if a.status_code == 200]
    assert len(served) + len(refused) == 24
    assert len(served) >= 4
    slow.until(slow.quiet)


def test_when_the_engine_dies_everybody_is_told_and_a_new_one_serves(
    start: Any, open_stream: Open
) -> None:
    served = start(**SLOW)
    [pid] = engine_pids(served)
    stream = open_stream(served.url)
    with ThreadPoolExecutor(1) as pool:
        unary = pool.submit(httpx.post, f"{served.url}{COMPLETIONS}", json=LONG, timeout=30)
        served.until(lambda: served.metrics()["num_requests_running"] == 2)
        os.kill(pid, signal.SIGKILL)
        *_, error, done = stream.rest()
        answer = unary.result()
    assert done == "[DONE]"
    assert json.loads(error)["error"]["code"] == answer.status_code == 503
    assert "signal 9" in answer.json()["error"]["message"]
    assert served.quiet()
    refused = httpx.post(f"{served.url}{COMPLETIONS}", json=LONG)
    assert refused.status_code == 503
    assert 1 <= int(refused.headers["retry-after"]) <= 10
    assert httpx.get(f"{served.url}/health").status_code == 503
    served.until(lambda: httpx.get(f"{served.url}/health").status_code == 200)
    assert (
        httpx.post(f"{served.url}{COMPLETIONS}", json={"prompt": "a", "max_tokens": 2}).status_code
        == 200
    )
    assert served.metrics()["engine_restarts_total"] == 1
    assert engine_pids(served) != [pid]
    assert "Traceback" not in served.output()
    assert served.stop() == 0


def test_a_step_that_fails_is_a_500_and_the_next_request_is_served(start: Any) -> None:
    served = start(worker={"use": "simulated", "raise_at": 3})
    answer = httpx.post(f"{served.url}{COMPLETIONS}", json=LONG, timeout=30)
    assert answer.status_code == 500
    assert "simulated fault" in answer.json()["error"]["message"]
    assert httpx.post(f"{served.url}{COMPLETIONS}", json=LONG, timeout=30).status_code == 200


# How it ends.


def test_sigterm_lets_streams_end(start: Any, open_stream: Open) -> None:
    served = start(**SLOW)
    stream = open_stream(served.url, max_tokens=60)
    [engine] = engine_pids(served)
    served.process.send_signal(signal.SIGTERM)
    served.until(lambda: httpx.get(f"{served.url}/health").status_code == 503)
    refused = httpx.post(f"{served.url}{COMPLETIONS}", json=LONG)
    assert refused.status_code == 503
    assert "draining" in refused.json()["error"]["message"]
    *_, last, done = stream.rest()
    assert done == "[DONE]"
    assert json.loads(last)["choices"][0]["finish_reason"] == "length"
    assert served.process.wait(30) == 0
    assert not Path(f"/proc/{engine}").exists()
    assert "Traceback" not in served.output()
    assert "ERROR" not in served.output()


def test_a_drain_that_takes_too_long_is_cut_and_says_so(start: Any, open_stream: Open) -> None:
    served = start(server={"drain_seconds": 0.3}, **SLOW)
    stream = open_stream(served.url)
    served.process.send_signal(signal.SIGTERM)
    *_, error, done = stream.rest()
    assert done == "[DONE]"
    assert "closed" in json.loads(error)["error"]["message"]
    assert served.process.wait(30) == 0
    assert "Traceback" not in served.output()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(start: Any, open_stream: Open, number: int) -> None:
    # Waiting for its 200 steps would exceed the timeout of this test.
    served = start(worker={"use": "simulated", "step_seconds": 0.3}, server={"drain_seconds": 1000})
    open_stream(served.url)
    unary = threading.Thread(target=_ask_in_vain, args=(served.url,))
    unary.start()
    served.until(lambda: served.metrics()["num_requests_running"] == 2)
    served.process.send_signal(number)
    served.until(lambda: httpx.get(f"{served.url}/health").status_code == 503)
    served.process.send_signal(number)
    assert served.process.wait(30) == 0
    unary.join(30)
    assert not unary.is_alive()
    assert "Traceback" not in served.output()


def _ask_in_vain(url: str) -> None:
    with contextlib.suppress(httpx.TransportError):
        assert httpx.post(f"{url}{COMPLETIONS}", json=LONG, timeout=30).status_code == 503


def test_a_client_that_does_not_read_cannot_keep_it_alive(start: Any) -> None:
    served = start(server={"drain_seconds": 0.5})
    url = httpx.URL(served.url)
    body = json.dumps(
        {**LONG, "stream": True, "n": 20, "return_token_ids": True, "logprobs": 9}
    ).encode()
    head = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type:"
        f" application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((url.host, url.port))
        sock.sendall(head.encode() + body)
        assert sock.recv(100)
        assert served.stop() == 0
