from __future__ import annotations
from typing import TYPE_CHECKING, Any
if TYPE_CHECKING:
    from dovetail.config import EngineConfig, load_config
    from dovetail.hookspecs import hookimpl
    from dovetail.llm import LLM, Completion, RequestOutput
    from dovetail.provider import Options, Provider, Reason
    from dovetail.serving import AsyncEngine
    from dovetail.types import SamplingParams
__all__ = ['LLM', 'AsyncEngine', 'Completion', 'EngineConfig', 'Options', 'Provider', 'Reason', 'RequestOutput', 'SamplingParams', 'hookimpl', 'load_config']
