"""An example plugin: attention with torch's scaled_dot_product_attention. This module imports no
tensor library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dovetail.interfaces.attention import AttentionCapabilities
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider

if TYPE_CHECKING:
    from dovetail_attention_sdpa.backend import SdpaAttention

# The core rejects what is not declared here, with the reason, before anything is built.
CAPABILITIES = AttentionCapabilities(devices=("cpu", "cuda"), sliding_window=True)


class SdpaOptions(Options):
    """This provider has no options."""


def build(context: Any, options: SdpaOptions) -> SdpaAttention:
    from dovetail_attention_sdpa.backend import SdpaAttention

    return SdpaAttention(context.plan.device)


SUMMARY = "torch's scaled_dot_product_attention, one sequence at a time"
PROVIDER = Provider("sdpa", SUMMARY, build, SdpaOptions, CAPABILITIES, priority=10)


@hookimpl
def dovetail_attention() -> list[Provider[SdpaAttention]]:
    return [PROVIDER]
