"""Register a paged attention backend. This module is imported whenever an engine is composed, so it
must be light."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.interfaces.attention import AttentionCapabilities
from dovetail.plan import Reason
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Context, Options, Provider

if TYPE_CHECKING:  # the backend imports torch, so `build` imports it
    from dovetail.plugin.build_context import BuildContext
    from my_plugin.backend import MyPluginAttention

# What the provider supports, as data. The core rejects what is not declared here, with the reason,
# and the conformance test covers everything that is.
CAPABILITIES = AttentionCapabilities(
    framework="torch",
    devices=("cpu",),
    dtypes=("float32", "bfloat16", "float16"),  # of q, k, v and the output
    kv_dtypes=("float32", "bfloat16", "float16"),  # of the cache
    sliding_window=True,
    batch_invariant=True,  # each token is computed by itself, so other rows cannot change its bits
    # Not declared, and therefore rejected: logit_soft_cap, sinks, compiled_steps. head_sizes and
    # block_sizes are None, which means any.
)


class MyPluginOptions(Options):
    """Options beside `use: my-plugin` in an engine config. Example of a field:
    `chunk: int = Field(64, ge=1, description="tokens")`."""


def why_not(context: Context) -> list[Reason]:
    """Return reasons that capabilities cannot express, such as a required instruction set:

    if "avx2" not in context.device.cpu_flags:
        return [Reason("this CPU lacks AVX2", "use torch-reference")]
    """
    return []


def build(
    context: BuildContext,
    options: MyPluginOptions,
) -> MyPluginAttention:
    """Build the backend. Called once, in the worker's process, with the options of the engine
    config."""
    # Heavy imports belong here.
    from my_plugin.backend import MyPluginAttention

    return MyPluginAttention()


PROVIDER = Provider(
    "my-plugin",  # the name in an engine config
    "paged attention in plain loops",
    build,
    MyPluginOptions,
    CAPABILITIES,
    why_not,
    # `auto` selects the highest priority: the torch reference has 0, tuned kernels have 50. Below
    # 0: used only on request.
    priority=-10,
)


@hookimpl  # the function's name is the hook's name: a misspelt one is an error
def dovetail_attention() -> list[Provider[MyPluginAttention]]:
    return [PROVIDER]
