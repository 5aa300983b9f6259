"""What front-end and engine process say to each other: typed msgspec messages, length-prefixed,
never pickle."""

from __future__ import annotations

import asyncio
import socket

import msgspec

from dovetail.interfaces.shadow import ShadowReport
from dovetail.interfaces.weights import LayerWeights
from dovetail.types import EngineStats, Request, SequenceOutput

MAX_FRAME = 256 * 2**20


class Start(msgspec.Struct, tag=True):
    """First message to the engine: the plan to build from, as JSON."""

    plan: bytes


class Add(msgspec.Struct, tag=True):
    request: Request


class Abort(msgspec.Struct, tag=True):
    request_id: str
    sample_index: int | None = None


class Expire(msgspec.Struct, tag=True):
    """Fail the request if it still waits for its first step."""

    request_id: str


class ResetPrefixCache(msgspec.Struct, tag=True):
    """Find nothing of what was computed for the requests added so far."""


class Shutdown(msgspec.Struct, tag=True):
    """Stop after the step that is running."""


class Loading(msgspec.Struct, tag=True):
    """Progress before `Ready`."""

    what: str
    done: int
    total: int


class Ready(msgspec.Struct, tag=True):
    """The engine runs; `fingerprint` is that of the plan it built."""

    fingerprint: str
    stats: EngineStats
    weights: list[LayerWeights] = []
    """See `compose.weights_of`."""


class Failed(msgspec.Struct, tag=True):
    """The engine could not start, or its loop broke; the process ends. `code` is one of
    errors.py."""

    code: str
    message: str


class StepOutputs(msgspec.Struct, tag=True):
    """What a step brought."""

    outputs: list[SequenceOutput]
    stats: EngineStats


class Invoked(msgspec.Struct, tag=True):
    """Parts that have been seen at work, by key of the plan; sent when it changes."""

    invoked: dict[str, bool]


class Refused(msgspec.Struct, tag=True):
    """The engine did not take a request in."""

    request_id: str
    code: str
    message: str


class Heartbeat(msgspec.Struct, tag=True):
    """The process lives; its loop has been busy with the same step for `busy` seconds (0 when
    idle)."""

    busy: float
    where: str = ""
    """In whose code, after the first second."""
    expected: float = 0.0
    """Seconds that the step was predicted to take; 0 if nothing is known."""


class Shadow(msgspec.Struct, tag=True):
    """What a shadow run has shown so far: about once a second while it runs, and at the end."""

    report: ShadowReport


ToEngine = Start | Add | Abort | Expire | ResetPrefixCache | Shutdown
FromEngine = Loading | Ready | Failed | StepOutputs | Invoked | Refused | Heartbeat | Shadow

to_engine = msgspec.msgpack.Decoder(ToEngine)
from_engine = msgspec.msgpack.Decoder(FromEngine)
_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """A frame: four bytes of length, little-endian, then msgpack."""
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "little") + body


def read_frame(sock: socket.socket) -> bytes | None:
    """The next frame's body, or None at the end. Blocks. Raises `OSError`, and `ValueError` for
    what is no frame."""
    head = _read_exactly(sock, 4)
    return None if head is None else _read_exactly(sock, _length(head))


async def read_frame_async(reader: asyncio.StreamReader) -> bytes | None:
    """The same, for an event loop."""
    try:
        return await reader.readexactly(_length(await reader.readexactly(4)))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _length(head: bytes) -> int:
    length = int.from_bytes(head, "little")
    if length > MAX_FRAME:
        raise ValueError(f"a frame of {length} bytes; at most {MAX_FRAME}")
    return length


def _read_exactly(sock: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        part = sock.recv(min(count - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return bytes(parts)
