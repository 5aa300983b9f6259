"""An example plugin: paged attention in NumPy. This module imports no array library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dovetail.interfaces.attention import AttentionCapabilities
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider

if TYPE_CHECKING:
    from dovetail_attention_numpy.backend import NumpyAttention

CAPABILITIES = AttentionCapabilities(
    devices=("cpu",),
    dtypes=("float32", "float16"),
    kv_dtypes=("float32", "float16"),
    sliding_window=True,
    logit_soft_cap=True,
    sinks=True,
    kv_layout="HDN",
)


class NumpyOptions(Options):
    """This provider has no options."""


def build(context: Any, options: NumpyOptions) -> NumpyAttention:
    from dovetail_attention_numpy.backend import NumpyAttention

    return NumpyAttention()


PROVIDER = Provider(
    "numpy",
    "paged attention in NumPy, one sequence at a time",
    build,
    NumpyOptions,
    CAPABILITIES,
    priority=-10,
)


@hookimpl
def dovetail_attention() -> list[Provider[NumpyAttention]]:
    return [PROVIDER]
