"""Register INT8 quantization of weights and activations: quantization at load time, and 8-bit
bitsandbytes checkpoints.

This module imports no tensor library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from dovetail.errors import ConfigError
from dovetail.interfaces.quantization import QuantizationCapabilities
from dovetail.plan import Reason
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Context, Options, Provider

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from dovetail_quant_int8.bitsandbytes import BitsAndBytes
    from dovetail_quant_int8.int8 import Int8

METHOD = "bitsandbytes"
THRESHOLD = 6.0
EXAMPLE = {
    "quant_method": METHOD,
    "load_in_8bit": True,
    "load_in_4bit": False,
    "llm_int8_threshold": 6.0,
}


class Int8Options(Options):
    activations: Literal["dynamic", "none"] = Field(
        "dynamic",
        description=(
            "dynamic: activations are rounded to INT8 with one scale per row; none: they are not"
            " rounded"
        ),
    )


class BitsAndBytesOptions(Options):
    threshold: float | Literal["auto"] = Field(
        "auto",
        description=(
            "outlier threshold: activations of at least this magnitude are not rounded to INT8; 0:"
            " all are rounded; auto: as in the checkpoint, or 6"
        ),
    )


def own_config(context: Context | BuildContext) -> dict[str, Any] | None:
    """Return the quantization_config of a bitsandbytes checkpoint, or None."""
    config = context.model.quantization_config if context.model else None
    return config if config is not None and config["quant_method"] == METHOD else None


def why_not(context: Context) -> list[Reason]:
    config = own_config(context)
    if config is None:
        return []
    reasons = []
    if config.get("load_in_4bit") or config.get("_load_in_4bit"):
        kind = config.get("bnb_4bit_quant_type", "fp4")
        reasons.append(
            Reason(
                f"the checkpoint has 4-bit weights ({kind}), but only 8-bit bitsandbytes weights"
                " are supported",
                "use the original weights, or 4-bit ones of AWQ, GPTQ or compressed-tensors",
            )
        )
    elif not (config.get("load_in_8bit") or config.get("_load_in_8bit")):
        reasons.append(
            Reason(
                "the checkpoint's quantization_config sets neither load_in_8bit nor load_in_4bit"
            )
        )
    if config.get("llm_int8_has_fp16_weight"):
        reasons.append(
            Reason(
                "its weights are 16-bit (llm_int8_has_fp16_weight)",
                "remove its quantization_config",
            )
        )
    threshold = config.get("llm_int8_threshold", THRESHOLD)
    if type(threshold) not in (int, float) or threshold < 0:
        reasons.append(
            Reason(
                f"the checkpoint's llm_int8_threshold is {threshold!r}", "it must be a number ≥ 0"
            )
        )
    return reasons


def resolve_options(context: Context, options: BitsAndBytesOptions) -> tuple[Options, list[str]]:
    if options.threshold != "auto":
        if options.threshold < 0:
            raise ConfigError(
                f"quantization.threshold: must not be negative, found {options.threshold:g}"
            )
        return options, []
    config = own_config(context) or {}
    return BitsAndBytesOptions(threshold=config.get("llm_int8_threshold", THRESHOLD)), []


def needs(context: Context, options: Int8Options) -> dict[str, dict[str, Any]]:
    return {"matmul": {"inputs": [] if options.activations == "none" else ["int8"]}}


def _build_int8(context: BuildContext, options: Int8Options) -> Int8:
    from dovetail_quant_int8.int8 import Int8

    return Int8(context.build("matmul"), rounds_inputs=options.activations == "dynamic")


def _build_bitsandbytes(context: BuildContext, options: BitsAndBytesOptions) -> BitsAndBytes:
    from dovetail_quant_int8.bitsandbytes import BitsAndBytes, check_row_major

    config = own_config(context)
    if config is not None:
        check_row_major(context.model.folder)
    assert options.threshold != "auto"
    return BitsAndBytes(context.build("matmul"), config or {}, options.threshold)


INT8 = Provider(
    "int8",
    "INT8 weights and activations, quantized at load time",
    _build_int8,
    Int8Options,
    QuantizationCapabilities(
        on_the_fly=True, devices=None, activations="int8", codes=("int8",), compiled_steps=True
    ),
    needs=needs,
    priority=50,
)
BITSANDBYTES = Provider(
    METHOD,
    "LLM.int8(): INT8 weights and activations except outliers; bitsandbytes checkpoints, or"
    " quantization at load time",
    _build_bitsandbytes,
    BitsAndBytesOptions,
    QuantizationCapabilities(
        (METHOD,),
        on_the_fly=True,
        devices=None,
        activations="int8",
        examples=(EXAMPLE,),
        codes=("int8",),
    ),
    why_not,
    resolve_options,
    priority=50,
)


@hookimpl
def dovetail_quantization() -> list[Provider[Any]]:
    return [INT8, BITSANDBYTES]
