"""Paged attention in JAX Pallas, written for TPU and interpreted on a CPU.

This module registers the provider and imports neither JAX nor torch.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from dovetail.interfaces.attention import AttentionCapabilities
from dovetail.plan import Reason
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Context, Options, Provider

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from dovetail_attention_pallas.backend import PallasAttention

CAPABILITIES = AttentionCapabilities(
    dtypes=("float32", "bfloat16"),
    kv_dtypes=("float32", "bfloat16"),
    block_sizes=(16, 32, 64, 128, 256),
    # Each block is one copy to the memory of a TPU core, and few large copies are the most
    # efficient.
    blocks_per_sequence=16,
    sliding_window=True,
    logit_soft_cap=True,
    sinks=True,
    kv_layout="HND",
)


class PallasOptions(Options):
    """This provider has no options."""


def why_not(context: Context) -> list[Reason]:
    reasons = []
    if importlib.util.find_spec("jax") is None:
        reasons.append(
            Reason("JAX is not installed", "pip install 'dovetail-attention-pallas[jax]'")
        )
    if context.device_name.startswith("tpu"):
        reasons.append(
            Reason(
                "no worker keeps its tensors on a TPU yet",
                "use the functional form, kernel.paged_attention",
            )
        )
    return reasons


def build(context: BuildContext, options: PallasOptions) -> PallasAttention:
    from dovetail_attention_pallas.backend import PallasAttention

    return PallasAttention()


PROVIDER = Provider(
    "pallas",
    "paged attention in JAX Pallas for TPU; on CPUs it is interpreted, which is slow and for tests",
    build,
    PallasOptions,
    CAPABILITIES,
    why_not,
    priority=-50,
)


@hookimpl
def dovetail_attention() -> list[Provider[PallasAttention]]:
    return [PROVIDER]
