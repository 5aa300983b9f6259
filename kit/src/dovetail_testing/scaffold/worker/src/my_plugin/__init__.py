"""Register a worker. This module is imported whenever an engine is composed, so it must be
light."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.interfaces.quantization import PLAIN
from dovetail.plan import Reason
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Context, Options, Provider

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from my_plugin.worker import MyPluginWorker


class MyPluginOptions(Options):
    """Options beside `use: my-plugin` in an engine config. Add fields, each with a
    default and a description."""


def why_not(context: Context) -> list[Reason]:
    """Return what this worker does not support of the machine and of the providers selected before
    it. An empty list means that it can be used."""
    code, schemes = context.needs.get("architecture"), context.needs.get("quantization", [])
    reasons = []
    if context.device_name != "cpu":
        reasons.append(Reason(f"it supports only the device cpu, not {context.device_name}"))
    if code is None or code.framework != "torch" or code.loads_weights:
        reasons.append(
            Reason(
                "it needs model code in torch that does not load the weights itself",
                "architecture: decoder",
            )
        )
    if not all(PLAIN in scheme.methods for scheme in schemes):
        reasons.append(Reason("its linear layers cannot be quantized", "quantization: none"))
    return reasons


def build(
    context: BuildContext,
    options: MyPluginOptions,
) -> MyPluginWorker:
    """Build the worker. Called once, in the engine process. Nothing is loaded before `load`."""
    # Heavy imports belong here.
    from my_plugin.worker import MyPluginWorker

    return MyPluginWorker(context)


PROVIDER = Provider(
    "my-plugin",  # the name in an engine config
    "computes every row separately on one CPU: short and slow",
    build,
    MyPluginOptions,
    why_not=why_not,
    # `auto` selects the highest priority; `torch` has 50. Below 0: used only on request.
    priority=-10,
)


@hookimpl  # the function's name is the hook's name: a misspelt one is an error
def dovetail_workers() -> list[Provider[MyPluginWorker]]:
    return [PROVIDER]
