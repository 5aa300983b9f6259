"""Paged attention: the hook, and what this package offers. Imported whenever an engine is composed,
so nothing heavy here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.interfaces.attention import AttentionCapabilities
from dovetail.plan import Reason
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Context, Options, Provider

if (
    TYPE_CHECKING
):  # for type checkers alone: torch comes with the backend, and is imported in `build`
    from dovetail.plugin.build_context import BuildContext
    from my_plugin.backend import MyPluginAttention

# What it can do, as data. The core refuses what is not declared here, with the reason, and the kit
# tries all that is.
CAPABILITIES = AttentionCapabilities(
    framework="torch",
    devices=("cpu",),
    dtypes=("float32", "bfloat16", "float16"),  # of q, k, v and the output
    kv_dtypes=("float32", "bfloat16", "float16"),  # of the cache
    sliding_window=True,
    batch_invariant=True,  # each token is computed by itself, so its neighbours cannot change a bit
    # Not declared, and so refused: logit_soft_cap, sinks, compiled_steps. head_sizes and
    # block_sizes are None: any.
)


class MyPluginOptions(Options):
    """What a user may write beside `use: my-plugin`. A field: `chunk: int = Field(64, ge=1,
    description="tokens")`."""


def why_not(context: Context) -> list[Reason]:
    """What capabilities cannot say, such as an instruction set that is needed:

    if "avx2" not in context.device.cpu_flags: return [Reason("this CPU has no AVX2", "use
    torch-reference")]
    """
    return []


def build(context: BuildContext, options: MyPluginOptions) -> MyPluginAttention:
    """Called once, in the process that computes, with the options from the engine config."""
    from my_plugin.backend import MyPluginAttention  # heavy imports belong here

    return MyPluginAttention()


PROVIDER = Provider(
    "my-plugin",  # the name in an engine config
    "paged attention in plain loops",
    build,
    MyPluginOptions,
    CAPABILITIES,
    why_not,
    # `auto` takes the highest: the torch reference has 0, tuned kernels 50. Below 0: only when
    # asked for
    priority=-10,
)


@hookimpl  # the name of the function is the hook: a misspelt one is an error
def dovetail_attention() -> list[Provider[MyPluginAttention]]:
    return [PROVIDER]
