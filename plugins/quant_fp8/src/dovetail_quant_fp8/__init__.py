"""Register FP8 (E4M3) quantization of weights and activations: checkpoints of the method `fp8`, and
unquantized checkpoints, quantized at load time.

This module imports no tensor library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dovetail.errors import ConfigError
from dovetail.interfaces.quantization import QuantizationCapabilities
from dovetail.plan import Reason
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Context, Options, Provider
from dovetail_quant_fp8.options import Fp8Options

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from dovetail_quant_fp8.scheme import Fp8

METHOD = "fp8"
EXAMPLES: tuple[dict[str, Any], ...] = (
    {"quant_method": METHOD, "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    {
        "quant_method": METHOD,
        "activation_scheme": "dynamic",
        "weight_block_size": [64, 32],
        "modules_to_not_convert": ["kit"],
    },
    {"quant_method": METHOD, "activation_scheme": "dynamic", "weight_block_size": None},
    {"quant_method": METHOD, "activation_scheme": "static", "weight_block_size": None},
    {"quant_method": METHOD, "activation_scheme": "static", "ignored_layers": ["lm_head"]},
)
"""The last config is as AutoFP8 writes it, and the others as transformers does."""


def why_not(context: Context) -> list[Reason]:
    config = _own_config(context.model.quantization_config if context.model else None)
    if config is None:
        return []
    block = config.get("weight_block_size")
    is_block = block is None or (
        isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    )
    known = {
        "activation_scheme": ("dynamic", "static"),
        "scale_fmt": ("float", "ue8m0"),
        "fmt": ("e4m3", "float8_e4m3fn"),
    }
    wrong = {
        key: " or ".join(values)
        for key, values in known.items()
        if config.get(key, values[0]) not in values
    }
    if not is_block:
        wrong["weight_block_size"] = "two sizes or null"
    return [
        Reason(f"the checkpoint's {key} is {config[key]!r}", f"supported: {values}")
        for key, values in wrong.items()
    ]


def resolve_options(context: Context, options: Fp8Options) -> tuple[Options, list[str]]:
    """Resolve options left at `auto`: from an FP8 checkpoint, or to the defaults."""
    config = _own_config(context.model.quantization_config if context.model else None)
    stored = (
        None if config is None else "tensor" if config.get("weight_block_size") is None else "block"
    )
    granularity = (stored or "channel") if options.granularity == "auto" else options.granularity
    if granularity != (stored or granularity):
        raise ConfigError(
            f"quantization.granularity: {granularity!r} is requested, but the checkpoint has one"
            f" scale per {stored}: remove the option, or quantize the original weights"
        )
    has_scale = config is not None and config.get("activation_scheme") == "static"
    if options.activations == "static" and not has_scale:
        raise ConfigError(
            "quantization.activations: 'static' is requested, but the checkpoint has no activation"
            " scales"
        )
    activations: str = options.activations
    if activations == "auto":
        # With block scales, the method's reference kernels round inputs in groups of 128; not
        # rounding at all is closer to that than one scale per row. On a CPU all products are
        # computed in 16 bits anyway, so rounding pays only if the checkpoint was made for it.
        unrounded = granularity == "block" or (config is None and context.device_name == "cpu")
        activations = "static" if has_scale else "none" if unrounded else "dynamic"
    return options.model_copy(update={"granularity": granularity, "activations": activations}), []


def needs(context: Context, options: Fp8Options) -> dict[str, dict[str, Any]]:
    return {"matmul": {"inputs": [] if options.activations == "none" else ["float8_e4m3fn"]}}


def _own_config(config: dict[str, Any] | None) -> dict[str, Any] | None:
    return config if config is not None and config["quant_method"] == METHOD else None


def _build(context: BuildContext, options: Fp8Options) -> Fp8:
    from dovetail_quant_fp8.scheme import Fp8

    return Fp8(context.build("matmul"), _own_config(context.model.quantization_config), options)


PROVIDER = Provider(
    METHOD,
    "FP8 (E4M3) weights and activations: FP8 checkpoints, or quantization at load time",
    _build,
    Fp8Options,
    QuantizationCapabilities(
        (METHOD,),
        on_the_fly=True,
        devices=None,
        activations="float8_e4m3fn",
        examples=EXAMPLES,
        codes=("float8_e4m3fn",),
        compiled_steps=True,
    ),
    why_not,
    resolve_options,
    needs=needs,
    priority=50,
)


@hookimpl
def dovetail_quantization() -> list[Provider[Fp8]]:
    return [PROVIDER]
