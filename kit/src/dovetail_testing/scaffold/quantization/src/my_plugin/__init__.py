"""A quantization scheme: the hook, and what this package offers. Imported when an engine is
composed: nothing heavy here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.interfaces.quantization import QuantizationCapabilities
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from my_plugin.scheme import MyPluginScheme

# What it can do, as data. The core refuses what is not declared here, with the reason, and the kit
# tries all that is.
CAPABILITIES = QuantizationCapabilities(
    on_the_fly=True,  # it quantizes plain checkpoints while they are read
    devices=("cpu", "cuda"),
    dtypes=("float32", "bfloat16", "float16"),  # of a layer's input and output
    # A scheme that reads checkpoints of its own names their quant_method, and gives one such
    # quantization_config for the kit: methods=("my-plugin",), examples=({"quant_method":
    # "my-plugin"},),
)


class MyPluginOptions(Options):
    """What a user may write beside `use: my-plugin`. Add fields, each with a default and a
    description."""


def build(context: BuildContext, options: MyPluginOptions) -> MyPluginScheme:
    """Called once for each rule of the configuration. `context.model.quantization_config` is what
    the checkpoint says."""
    from my_plugin.scheme import MyPluginScheme

    return MyPluginScheme()


PROVIDER = Provider(
    "my-plugin",  # the name in an engine config
    "8-bit weights, a scale for each output",
    build,
    MyPluginOptions,
    CAPABILITIES,
    # counts among schemes that read one checkpoint; plain weights are never quantized without being
    # asked
    priority=-10,
)


@hookimpl  # the name of the function is the hook: a misspelt one is an error
def dovetail_quantization() -> list[Provider[MyPluginScheme]]:
    return [PROVIDER]
