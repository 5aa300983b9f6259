"""Dovetail: an LLM inference engine made of joints. This is the public API of the core; it imports no tensor library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dovetail.config import EngineConfig, load_config
    from dovetail.hookspecs import hookimpl
    from dovetail.llm import LLM, Completion, RequestOutput
    from dovetail.provider import Options, Provider, Reason
    from dovetail.serving import AsyncEngine
    from dovetail.types import SamplingParams

__version__ = "0.1.0"

_HOME = {
    "LLM": "llm", "Completion": "llm", "RequestOutput": "llm", "AsyncEngine": "serving", "SamplingParams": "types",
    "EngineConfig": "config", "load_config": "config", "hookimpl": "hookspecs", "Options": "provider",
    "Provider": "provider", "Reason": "provider",
}  # fmt: skip

__all__ = [
    "LLM", "AsyncEngine", "Completion", "EngineConfig", "Options", "Provider", "Reason", "RequestOutput",
    "SamplingParams", "hookimpl", "load_config",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import on first use, so that `dovetail plugins` and light plugin roots stay light."""
    if name not in _HOME:
        raise AttributeError(f"module 'dovetail' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"dovetail.{_HOME[name]}"), name)
