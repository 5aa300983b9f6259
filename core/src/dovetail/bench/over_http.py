"""The load against a running server: streamed completions of the OpenAI API."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from dovetail.bench.load import Clock, Figures, Work
from dovetail.errors import ConfigError

if TYPE_CHECKING:
    import aiohttp

EMPTY = (b'"text":""', b'"text": ""', b'"choices":[]', b'"choices": []')


def serve_round(url: str, model: str, work: Work, seed: int) -> Figures:
    """`work.concurrency` clients, each sending its next request when the last one is answered.

    What counts as a token's coming is an event with text: half a character, say, has none, or not even an event.
    """
    return asyncio.run(_drive(url, model, work, seed))


def about_server(url: str) -> dict[str, Any]:
    """`model`: the first one that it serves; `version` and `plan` (the fingerprint) where the server tells."""
    return asyncio.run(_ask(url))


def _aiohttp() -> Any:
    try:
        import aiohttp
    except ImportError:
        raise ConfigError("bench serve needs aiohttp: pip install 'dovetail-core[bench]'") from None
    return aiohttp


async def _ask(url: str) -> dict[str, Any]:
    aiohttp = _aiohttp()
    async with aiohttp.ClientSession() as session:
        try:
            async with session.get(f"{url}/v1/models") as response:
                model = (await response.json())["data"][0]["id"]
            async with session.get(f"{url}/version") as response:
                about = await response.json() if response.ok else {}
        except (aiohttp.ClientError, ValueError, LookupError) as e:
            raise ConfigError(f"no server at {url}: {e}") from None
    return {"model": model, **{k: about[k] for k in ("version", "plan") if k in about}}


async def _drive(url: str, model: str, work: Work, seed: int) -> Figures:
    http = _aiohttp()
    clock, queue = Clock(), iter(enumerate(work.prompts(seed, 4000)))

    async def client(session: aiohttp.ClientSession) -> None:
        for i, prompt in queue:
            body = {
                "model": model, "prompt": prompt, "stream": True, "max_tokens": work.output_len,
                "temperature": 0, "ignore_eos": True,
            }  # fmt: skip
            clock.began(str(i), time.perf_counter())
            async with session.post(f"{url}/v1/completions", json=body) as response:
                if response.status != 200:
                    raise ConfigError(f"the server answered {response.status}: {await response.text()}")
                async for line in response.content:
                    if line.startswith(b"data: {") and not any(empty in line for empty in EMPTY):
                        clock.token(str(i), time.perf_counter())

    # A connection a request: some servers close a kept one without a word, just when the next request takes it.
    connector, patience = http.TCPConnector(force_close=True), http.ClientTimeout(total=None)
    async with http.ClientSession(connector=connector, timeout=patience) as session:
        began = time.perf_counter()
        try:
            await asyncio.gather(*(client(session) for _ in range(work.concurrency)))
        except http.ClientError as e:
            raise ConfigError(f"the server at {url} went away: {e}") from None
        seconds = time.perf_counter() - began
    return {
        "requests/s": work.num_requests / seconds,
        "output tokens/s": work.num_requests * work.output_len / seconds,
        **clock.figures(),
    }
