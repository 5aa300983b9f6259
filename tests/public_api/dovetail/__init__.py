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
__all__ = ['LLM', 'AsyncEngine', 'Completion', 'EngineConfig', 'Options', 'Provider', 'Reason', 'RequestOutput', 'SamplingParams', 'hookimpl', 'load_config']
