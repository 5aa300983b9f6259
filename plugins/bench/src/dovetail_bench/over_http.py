"""Measure a running server with streamed completions of the OpenAI API."""

from __future__ import annotations

import json
from typing import Any
from urllib.request import urlopen

from dovetail.errors import ConfigError
from dovetail_bench.client import drive
from dovetail_bench.load import Figures, Work, waits


def serve_round(url: str, model: str, work: Work, seed: int) -> Figures:
    """Run one round with `work.concurrency` clients, each of which sends its next request after the
    last response.

    A token counts as received when an event with text arrives. Part of a character has no text and
    may have no event.
    """
    bodies = [
        {
            "model": model,
            "prompt": prompt,
            "stream": True,
            "max_tokens": work.output_len,
            "temperature": 0,
            "ignore_eos": True,
        }
        for prompt in work.prompts(seed, 4000)
    ]
    measured = drive(url, bodies, work.concurrency)
    return {
        "requests/s": work.num_requests / measured.seconds,
        "output tokens/s": work.num_requests * work.output_len / measured.seconds,
        **waits(measured.ttft, measured.gaps),
    }


def about_server(url: str) -> dict[str, Any]:
    """Return `model`, the first model that the server has, and `version` and `plan` (the
    fingerprint) if it reports them."""
    try:
        model = _get(f"{url}/v1/models")["data"][0]["id"]
    except (OSError, ValueError, LookupError) as e:
        raise ConfigError(f"no server at {url}: {e}") from None
    try:
        about = _get(f"{url}/version")
    except (OSError, ValueError):  # another engine's server
        about = {}
    return {"model": model, **{k: about[k] for k in ("version", "plan") if k in about}}


def _get(url: str) -> dict[str, Any]:
    with urlopen(url, timeout=10) as response:
        answer: dict[str, Any] = json.load(response)
        return answer
