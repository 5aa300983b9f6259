"""A worker: the hook, and what this package offers. Imported whenever an engine is composed, so
nothing heavy here."""

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
    """What a user may write beside `use: my-plugin`. Add fields, each with a default and a
    description."""


def why_not(context: Context) -> list[Reason]:
    """What this worker cannot do with the machine and with the parts that were chosen before it. An
    empty list: it can."""
    made, schemes = context.needs.get("architecture"), context.needs.get("quantization", [])
    reasons = []
    if context.device_name != "cpu":
        reasons.append(Reason(f"it computes on the cpu, not on {context.device_name}"))
    if made is None or made.framework != "torch" or made.loads_weights:
        reasons.append(
            Reason(
                "it needs model code in torch that leaves the reading of weights to it",
                "architecture: decoder",
            )
        )
    if not all(PLAIN in scheme.methods for scheme in schemes):
        reasons.append(Reason("its linear layers are plain", "quantization: none"))
    return reasons


def build(context: BuildContext, options: MyPluginOptions) -> MyPluginWorker:
    """Called once, in the process that computes. Nothing is loaded before `load` is called."""
    from my_plugin.worker import MyPluginWorker  # heavy imports belong here

    return MyPluginWorker(context)


PROVIDER = Provider(
    "my-plugin",  # the name in an engine config
    "one CPU, every row on its own: short and slow",
    build,
    MyPluginOptions,
    why_not=why_not,
    priority=-10,  # `auto` takes the highest: `torch` has 50. Below 0: only when asked for
)


@hookimpl  # the name of the function is the hook: a misspelt one is an error
def dovetail_workers() -> list[Provider[MyPluginWorker]]:
    return [PROVIDER]
