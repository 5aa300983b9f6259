"""An example plugin: 4-bit weights on the quantiles of a normal distribution. This module imports
no tensor library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from dovetail.interfaces.quantization import QuantizationCapabilities
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider

if TYPE_CHECKING:
    from dovetail_quant_nf4.scheme import NF4

# The scheme reads checkpoints of its own method and quantizes unquantized ones at load time. The
# core rejects all others.
METHOD = "nf4-blocks"
EXAMPLE = {"quant_method": METHOD, "block_size": 32, "modules_to_not_convert": ["*.layers.3.*"]}
CAPABILITIES = QuantizationCapabilities(
    methods=(METHOD,), on_the_fly=True, devices=("cpu", "cuda"), examples=(EXAMPLE,)
)


class NF4Options(Options):
    block_size: int = Field(
        64,
        ge=2,
        description="number of inputs that share a scale; a quantized checkpoint overrides it",
    )


def build(context: Any, options: NF4Options) -> NF4:
    from dovetail_quant_nf4.scheme import NF4

    return NF4(context.model.quantization_config or {}, options.block_size)


SUMMARY = "4-bit weights on the quantiles of a normal distribution, one scale per block of inputs"
PROVIDER = Provider("nf4", SUMMARY, build, NF4Options, CAPABILITIES)


@hookimpl
def dovetail_quantization() -> list[Provider[NF4]]:
    return [PROVIDER]
