"""Register a quantization scheme. This module is imported whenever an engine is composed, so it
must be light."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.interfaces.quantization import QuantizationCapabilities
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from my_plugin.scheme import MyPluginScheme

# What the provider supports, as data. The core rejects what is not declared here, with the reason,
# and the conformance test covers everything that is.
CAPABILITIES = QuantizationCapabilities(
    on_the_fly=True,  # it quantizes plain checkpoints while they are loaded
    devices=("cpu", "cuda"),
    dtypes=("float32", "bfloat16", "float16"),  # of a layer's input and output
    # A scheme that reads checkpoints of its own declares their quant_method, and an example of
    # their quantization_config for the conformance test: methods=("my-plugin",),
    # examples=({"quant_method": "my-plugin"},),
)


class MyPluginOptions(Options):
    """Options beside `use: my-plugin` in an engine config. Add fields, each with a
    default and a description."""


def build(
    context: BuildContext,
    options: MyPluginOptions,
) -> MyPluginScheme:
    """Build the scheme. Called once per quantization rule of the engine config.
    `context.model.quantization_config` is that of the checkpoint."""
    from my_plugin.scheme import MyPluginScheme

    return MyPluginScheme()


PROVIDER = Provider(
    "my-plugin",  # the name in an engine config
    "8-bit weights, one scale per output",
    build,
    MyPluginOptions,
    CAPABILITIES,
    # Compared among schemes that read the same checkpoint; plain weights are quantized only on
    # request.
    priority=-10,
)


@hookimpl  # the function's name is the hook's name: a misspelt one is an error
def dovetail_quantization() -> list[Provider[MyPluginScheme]]:
    return [PROVIDER]
