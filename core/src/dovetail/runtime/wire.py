"""Define the messages between front-end and engine process: typed msgspec messages with a length
prefix, never pickle."""

from __future__ import annotations

import asyncio
import socket

import msgspec

from dovetail.interfaces.shadow import ShadowReport
from dovetail.interfaces.weights import LayerWeights
from dovetail.types import EngineStats, Request, SequenceOutput

MAX_FRAME = 256 * 2**20


class Start(msgspec.Struct, tag=True):
    """The first message to the engine: the plan to build from, as JSON."""

    plan: bytes


class Add(msgspec.Struct, tag=True):
    """Add a request."""

    request: Request


class Abort(msgspec.Struct, tag=True):
    """Abort a request, or one of its samples."""

    request_id: str
    sample_index: int | None = None


class Expire(msgspec.Struct, tag=True):
    """Fail the request if it is still waiting for its first step."""

    request_id: str


class ResetPrefixCache(msgspec.Struct, tag=True):
    """Clear the prefix cache: requests added later find nothing computed before."""


class Shutdown(msgspec.Struct, tag=True):
    """Stop after the running step."""


class Loading(msgspec.Struct, tag=True):
    """Progress of loading, before `Ready`."""

    what: str
    done: int
    total: int


class Ready(msgspec.Struct, tag=True):
    """The engine is ready. `fingerprint` is that of the plan from which it was built."""

    fingerprint: str
    stats: EngineStats
    weights: list[LayerWeights] = []
    """The linear layers. See `compose.weights_of`."""


class Failed(msgspec.Struct, tag=True):
    """The engine could not start, or its loop failed, and the process ends. `code` is one of
    errors.py."""

    code: str
    message: str


class StepOutputs(msgspec.Struct, tag=True):
    """The outputs of a step."""

    outputs: list[SequenceOutput]
    stats: EngineStats


class Invoked(msgspec.Struct, tag=True):
    """Invocation state of each provider, by plan key; sent when it changes."""

    invoked: dict[str, bool]


class Refused(msgspec.Struct, tag=True):
    """The engine rejected a request."""

    request_id: str
    code: str
    message: str


class Heartbeat(msgspec.Struct, tag=True):
    """The process is alive, and its loop has been busy with the same step for `busy` seconds (0
    when idle)."""

    busy: float
    where: str = ""
    """Provider whose code is running, if the step has taken more than one second."""
    expected: float = 0.0
    """Predicted duration of the step in seconds; 0 if unknown."""


class Shadow(msgspec.Struct, tag=True):
    """Results of a shadow run so far: sent about once a second while it runs, and at the end."""

    report: ShadowReport


ToEngine = Start | Add | Abort | Expire | ResetPrefixCache | Shutdown
FromEngine = Loading | Ready | Failed | StepOutputs | Invoked | Refused | Heartbeat | Shadow

to_engine = msgspec.msgpack.Decoder(ToEngine)
from_engine = msgspec.msgpack.Decoder(FromEngine)
_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """Encode a frame: four bytes of length, little-endian, then msgpack."""
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "little") + body


def read_frame(sock: socket.socket) -> bytes | None:
    """Read the body of the next frame, or None at the end of the stream. Blocks. Raises `OSError`,
    and `ValueError` for an invalid frame."""
    head = _read_exactly(sock, 4)
    return None if head is None else _read_exactly(sock, _length(head))


async def read_frame_async(reader: asyncio.StreamReader) -> bytes | None:
    """Do what `read_frame` does, in an event loop."""
    try:
        return await reader.readexactly(_length(await reader.readexactly(4)))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _length(head: bytes) -> int:
    length = int.from_bytes(head, "little")
    if length > MAX_FRAME:
        raise ValueError(f"a frame has {length} bytes; the maximum is {MAX_FRAME}")
    return length


def _read_exactly(sock: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        part = sock.recv(min(count - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return bytes(parts)
