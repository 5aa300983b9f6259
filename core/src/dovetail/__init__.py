"""Public API of Dovetail, an LLM inference engine built from plugins. It imports no tensor
library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dovetail.plan import Reason
    from dovetail.plugin.config import EngineConfig, load_config
    from dovetail.plugin.hookspecs import hookimpl
    from dovetail.plugin.provider import Options, Provider
    from dovetail.runtime.llm import LLM, Completion, RequestOutput
    from dovetail.runtime.serving import AsyncEngine
    from dovetail.types import SamplingParams

__version__ = "0.1.0"

_HOME = {
    "LLM": "runtime.llm",
    "Completion": "runtime.llm",
    "RequestOutput": "runtime.llm",
    "AsyncEngine": "runtime.serving",
    "SamplingParams": "types",
    "EngineConfig": "plugin.config",
    "load_config": "plugin.config",
    "hookimpl": "plugin.hookspecs",
    "Options": "plugin.provider",
    "Provider": "plugin.provider",
    "Reason": "plan",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "Completion",
    "EngineConfig",
    "Options",
    "Provider",
    "Reason",
    "RequestOutput",
    "SamplingParams",
    "hookimpl",
    "load_config",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `dovetail plugins` and light plugin roots stay light."""
    if name not in _HOME:
        raise AttributeError(f"module 'dovetail' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"dovetail.{_HOME[name]}"), name)
