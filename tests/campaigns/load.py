"""Load on a server, from a process of its own: so many clients, or so many requests a second
whatever becomes of them."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections import Counter

import msgspec

from campaigns.served import Answer, ask

WARM_UP = 0.25
"""Of the time: what is answered in it does not count."""


class Load(msgspec.Struct, frozen=True):
    seconds: float
    seed: int
    concurrency: int = 0
    """Clients, each with its next request when the last one is answered; or else:"""
    rate: float = 0.0
    """Requests a second, at random times."""


class Driven(msgspec.Struct):
    statuses: dict[int, int]
    offered: float
    """Requests a second."""
    finished: float
    """Requests a second that were answered in full."""
    goodput: float
    """Tokens a second of those: requests are of many lengths, so their number alone is noise."""


def drive(port: int, load: Load) -> Driven:
    command = [
        sys.executable,
        "-m",
        "campaigns.load",
        str(port),
        msgspec.json.encode(load).decode(),
    ]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return msgspec.json.decode(out.stdout, type=Driven)


class _Driver:
    def __init__(self, port: int, load: Load) -> None:
        self._port, self._load, self._rng = port, load, random.Random(load.seed)
        self._began = time.perf_counter()
        self._answers = list[tuple[Answer, int]]()
        """With the number of tokens that each asked for."""

    async def run(self) -> Driven:
        if self._load.concurrency:
            await asyncio.gather(*(self._client() for _ in range(self._load.concurrency)))
        else:
            await self._open()
        first, last = self._began + WARM_UP * self._load.seconds, self._began + self._load.seconds
        finished = [
            tokens
            for a, tokens in self._answers
            if a.status == 200 and a.whole and first < a.end <= last
        ]
        return Driven(
            statuses=Counter(a.status for a, _ in self._answers),
            offered=len(self._answers) / self._load.seconds,
            finished=len(finished) / (last - first),
            goodput=sum(finished) / (last - first),
        )

    @property
    def _is_over(self) -> bool:
        return time.perf_counter() > self._began + self._load.seconds

    async def _client(self) -> None:
        while not self._is_over:
            await self._ask()

    async def _open(self) -> None:
        """Until the time is over; then all are waited for."""
        asked, due = list[asyncio.Task[None]](), time.perf_counter()
        while not self._is_over:
            due += self._rng.expovariate(self._load.rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            asked.append(asyncio.create_task(self._ask()))
        await asyncio.gather(*asked)

    async def _ask(self) -> None:
        """Answers of many lengths, so that they do not all end at once."""
        body = {
            "prompt": "a" * self._rng.randint(1, 40),
            "max_tokens": self._rng.randint(5, 20),
            "ignore_eos": True,
        }
        self._answers.append((await ask(self._port, body), body["max_tokens"]))


if __name__ == "__main__":
    given = msgspec.json.decode(sys.argv[2], type=Load)
    sys.stdout.buffer.write(
        msgspec.json.encode(asyncio.run(_Driver(int(sys.argv[1]), given).run()))
    )
