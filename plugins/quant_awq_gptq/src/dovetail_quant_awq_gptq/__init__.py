"""Register support for AWQ and GPTQ checkpoints: 4-bit and 8-bit weights with a scale and a zero
point per group of inputs.

This module imports no tensor library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dovetail.interfaces.quantization import QuantizationCapabilities
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Context, Options, Provider

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from dovetail_quant_awq_gptq.awq import Awq
    from dovetail_quant_awq_gptq.gptq import Gptq

AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}
AWQ_EXAMPLES = (
    AWQ_CONFIG | {"group_size": 64},
    AWQ_CONFIG | {"group_size": -1, "modules_to_not_convert": ["kit_out"]},
)
GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False}
GPTQ_EXAMPLES = (
    GPTQ_CONFIG,
    GPTQ_CONFIG | {"group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"},
    GPTQ_CONFIG | {"desc_act": True},
    GPTQ_CONFIG | {"bits": 8, "group_size": -1, "sym": False},
)


def _awq(context: BuildContext, options: Options) -> Awq:
    from dovetail_quant_awq_gptq.awq import Awq

    return Awq(
        context.build("matmul"),
        context.model.quantization_config or {},
        f"{context.model.folder / 'config.json'}",
    )


def _gptq(context: BuildContext, options: Options) -> Gptq:
    from dovetail_quant_awq_gptq.gptq import Gptq

    return Gptq(
        context.build("matmul"),
        context.model.quantization_config or {},
        f"{context.model.folder / 'config.json'}",
    )


def needs(context: Context, options: Options) -> dict[str, dict[str, Any]]:
    """Return the code types that a GPTQ checkpoint needs from the GEMM backend. Rules for layers
    (`dynamic`) may differ from the default."""
    config = (context.model.quantization_config if context.model else None) or {}
    rules = (config.get("dynamic") or {}).values()
    bits = [config.get("bits"), *(rule.get("bits") for rule in rules if rule)]
    codes = ["uint4"] * (4 in bits) + ["int8"] * (8 in bits)
    return {"matmul": {"codes": codes}} if codes else {}


def _capabilities(
    method: str, codes: tuple[str, ...], examples: tuple[dict[str, Any], ...]
) -> QuantizationCapabilities:
    return QuantizationCapabilities(
        (method,), devices=None, codes=codes, examples=examples, compiled_steps=True
    )


AWQ = Provider(
    "awq",
    "AWQ checkpoints: 4-bit group-wise weights with activation-aware scaling",
    _awq,
    capabilities=_capabilities("awq", ("uint4",), AWQ_EXAMPLES),
    priority=50,
)
GPTQ = Provider(
    "gptq",
    "GPTQ checkpoints: 4-bit and 8-bit group-wise weights with error compensation",
    _gptq,
    capabilities=_capabilities("gptq", ("uint4", "int8"), GPTQ_EXAMPLES),
    needs=needs,
    priority=50,
)


@hookimpl
def dovetail_quantization() -> list[Provider[Any]]:
    return [AWQ, GPTQ]
