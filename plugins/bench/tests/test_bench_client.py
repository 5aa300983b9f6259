"""Test the measuring client with a server that writes given bytes in given pieces."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from dovetail.errors import ConfigError
from dovetail_bench.client import drive

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices": [{"text": " so"}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {}}\n\n'
END = b"0\r\n\r\n"
CLOSE = b""  # as a piece: the connection is closed after one response, without notice


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


Serve = Callable[[list[bytes]], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Answer every request on every connection with these pieces. Returns the URL."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def answer(sock: socket.socket, pieces: list[bytes]) -> None:
            with sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while sock.recv(1 << 16):
                    for piece in pieces:
                        sock.sendall(piece)
                    if CLOSE in pieces:
                        return

        def accept(pieces: list[bytes]) -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(sock, pieces), daemon=True).start()

        def start(pieces: list[bytes]) -> str:
            threading.Thread(target=accept, args=(pieces,), daemon=True).start()
            return f"http://127.0.0.1:{listener.getsockname()[1]}"

        yield start
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "pieces",
    [
        [HEAD + chunk(EVENT) + chunk(EVENT) + chunk(b"data: [DONE]\n\n") + END],
        [HEAD, chunk(EVENT), chunk(EVENT), chunk(USAGE), chunk(b"data: [DONE]\n\n"), END],
        [HEAD + chunk(EVENT) + chunk(EVENT) + END, CLOSE],
        [
            HEAD[:5],
            HEAD[5:] + chunk(EVENT),
            chunk(EVENT) + chunk(b"data: [DONE]\n\n") + END[:2],
            END[2:],
        ],
    ],
)
def test_every_stream_is_read_to_its_end(serve: Serve, pieces: list[bytes]) -> None:
    measured = drive(serve(pieces), [{"prompt": str(i)} for i in range(9)], 4)
    assert measured.num_events == 18
    assert len(measured.ttft) == 9
    assert len(measured.gaps) <= 9
    assert all(0 < t <= measured.seconds for t in (*measured.ttft, *measured.gaps))


def test_a_refusal_is_an_error_with_the_servers_words(serve: Serve) -> None:
    url = serve([b"HTTP/1.1 400 Bad Request\r\nContent-Length: 9\r\n\r\nno prompt"])
    with pytest.raises(ConfigError, match="no prompt"):
        drive(url, [{}], 1)


def test_an_answer_that_breaks_off_is_an_error(serve: Serve) -> None:
    with pytest.raises(ConfigError, match="before the end of a response"):
        drive(serve([HEAD + chunk(EVENT), CLOSE]), [{}], 1)
