"""The engine's end of the socket: in order and complete, whether or not somebody reads."""

from __future__ import annotations

import subprocess
import sys

# In a process of its own: a link ends its process when the other side goes away.
SCRIPT = """
import os, socket, time
from dovetail.runtime import wire
from dovetail.runtime.engine_process import Link

ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
link = Link(theirs)
for i in range(500):  # more than a socket holds, and nobody reads
    link.send(wire.Loading("x" * 5000, i, 500))
received = []
while len(received) < 500:
    message = wire.from_engine.decode(wire.read_frame(ours))
    if isinstance(message, wire.Loading):
        received.append(message.done)
assert received == list(range(500)), received
while not isinstance(wire.from_engine.decode(wire.read_frame(ours)), wire.Heartbeat):
    pass  # silence is filled
link.send(wire.Failed("code", "last words"))
link.close()
while not isinstance(message := wire.from_engine.decode(wire.read_frame(ours)), wire.Failed):
    pass
print(message.message, flush=True)
os._exit(0)
"""


def test_news_never_block_and_come_in_order() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "last words\n", done.stderr
