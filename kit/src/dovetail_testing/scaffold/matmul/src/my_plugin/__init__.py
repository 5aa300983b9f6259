"""Register GEMM with quantized weights. This module is imported whenever an engine is composed, so
it must be light."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.interfaces.matmul import MatmulCapabilities
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from my_plugin.products import MyPluginMatmul

# What the provider supports, as data. The core rejects what is not declared here, with the reason,
# and the conformance test covers everything that is.
CAPABILITIES = MatmulCapabilities(
    codes=("int8", "uint4", "float8_e4m3fn"),
    inputs=("int8", "float8_e4m3fn"),  # types to which x may be quantized before the GEMM
    devices=("cpu", "cuda"),
)


class MyPluginOptions(Options):
    """Options beside `use: my-plugin` in an engine config. Add fields, each with a
    default and a description."""


def build(
    context: BuildContext,
    options: MyPluginOptions,
) -> MyPluginMatmul:
    """Build the provider's object. Called once per engine, if a selected scheme needs GEMM."""
    from my_plugin.products import MyPluginMatmul

    return MyPluginMatmul()


PROVIDER = Provider(
    "my-plugin",  # the name in an engine config
    "computes one group of inputs after the other, in float32",
    build,
    MyPluginOptions,
    CAPABILITIES,
    priority=-10,  # lower than all of Dovetail's own: used only on request
)


@hookimpl  # the function's name is the hook's name: a misspelt one is an error
def dovetail_matmuls() -> list[Provider[MyPluginMatmul]]:
    return [PROVIDER]
