"""Products by quantized weights: the hook, and the offer. Imported when an engine is composed:
nothing heavy here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.interfaces.matmul import MatmulCapabilities
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from my_plugin.products import MyPluginMatmul

# What it can do, as data. The core refuses what is not declared here, with the reason, and the kit
# tries all that is.
CAPABILITIES = MatmulCapabilities(
    codes=("int8", "uint4", "float8_e4m3fn"),
    inputs=("int8", "float8_e4m3fn"),  # what x may be rounded to before the product
    devices=("cpu", "cuda"),
)


class MyPluginOptions(Options):
    """What a user may write beside `use: my-plugin`. Add fields, each with a default and a
    description."""


def build(context: BuildContext, options: MyPluginOptions) -> MyPluginMatmul:
    """Called once an engine, if a scheme was chosen that needs products."""
    from my_plugin.products import MyPluginMatmul

    return MyPluginMatmul()


PROVIDER = Provider(
    "my-plugin",  # the name in an engine config
    "one group of inputs after the other, in float32",
    build,
    MyPluginOptions,
    CAPABILITIES,
    priority=-10,  # below those that come with Dovetail: it is taken only when it is asked for
)


@hookimpl  # the name of the function is the hook: a misspelt one is an error
def dovetail_matmuls() -> list[Provider[MyPluginMatmul]]:
    return [PROVIDER]
