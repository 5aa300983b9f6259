from __future__ import annotations
from typing import TYPE_CHECKING, Any
import pluggy
from dovetail.plugin.provider import Provider
if TYPE_CHECKING:
    from dovetail.plugin.extension_points import ExtensionPoint
PROJECT = 'dovetail'
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

@hookspec
def dovetail_models() -> list[Provider[Any]]:
    ...

@hookspec
def dovetail_quantization() -> list[Provider[Any]]:
    ...

@hookspec
def dovetail_matmuls() -> list[Provider[Any]]:
    ...

@hookspec
def dovetail_architectures() -> list[Provider[Any]]:
    ...

@hookspec
def dovetail_workers() -> list[Provider[Any]]:
    ...

@hookspec
def dovetail_attention() -> list[Provider[Any]]:
    ...

@hookspec
def dovetail_kv_caches() -> list[Provider[Any]]:
    ...

@hookspec
def dovetail_schedulers() -> list[Provider[Any]]:
    ...

@hookspec
def dovetail_prefix_caches() -> list[Provider[Any]]:
    ...

@hookspec
def dovetail_drafters() -> list[Provider[Any]]:
    ...

@hookspec
def dovetail_servers() -> list[Provider[Any]]:
    ...

@hookspec
def dovetail_extension_points() -> list[ExtensionPoint]:
    ...
