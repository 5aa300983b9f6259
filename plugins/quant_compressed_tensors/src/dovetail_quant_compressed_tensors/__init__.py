"""Register support for compressed-tensors checkpoints: FP8, INT8, and packed 4-bit and 8-bit
weights.

This module imports no tensor library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dovetail.interfaces.quantization import QuantizationCapabilities
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Context, Options, Provider

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from dovetail_quant_compressed_tensors.scheme import CompressedTensors

METHOD = "compressed-tensors"


def example(
    format: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return a quantization_config with one group for all linear layers except the output
    projection."""
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "format": format,
    }
    return {
        "quant_method": METHOD,
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


FLOAT, INT = (
    {"num_bits": 8, "type": "float", "symmetric": True},
    {"num_bits": 8, "type": "int", "symmetric": True},
)
NIBBLE = {"num_bits": 4, "type": "int"}
BY_TOKEN = {"strategy": "token", "dynamic": True}
EXAMPLES = (
    example("float-quantized", FLOAT | {"strategy": "channel"}, FLOAT | BY_TOKEN),
    example(
        "float-quantized",
        FLOAT | {"strategy": "tensor"},
        FLOAT | {"strategy": "tensor", "dynamic": False},
    ),
    example("float-quantized", FLOAT | {"strategy": "block", "block_structure": [128, 128]}),
    example("int-quantized", INT | {"strategy": "channel"}, INT | BY_TOKEN),
    example("int-quantized", INT | {"strategy": "channel", "symmetric": False}, INT | BY_TOKEN),
    example("pack-quantized", INT | {"strategy": "channel"}),
    example("pack-quantized", NIBBLE | {"strategy": "channel", "symmetric": False}),
    example("pack-quantized", NIBBLE | {"strategy": "group", "group_size": 64, "symmetric": True}),
    example("pack-quantized", NIBBLE | {"strategy": "group", "group_size": 32, "symmetric": False}),
    example(
        "pack-quantized",
        NIBBLE | {"strategy": "group", "group_size": 64, "symmetric": True, "actorder": "group"},
    ),
)


def _build(context: BuildContext, options: Options) -> CompressedTensors:
    from dovetail_quant_compressed_tensors.scheme import CompressedTensors

    where = f"{context.model.folder / 'config.json'}"
    return CompressedTensors(
        context.build("matmul"), context.model.quantization_config or {}, where
    )


def needs(context: Context, options: Options) -> dict[str, dict[str, Any]]:
    """Return what the groups of the checkpoint need from the GEMM backend."""
    from dovetail_quant_compressed_tensors.groups import Groups

    if context.model is None or context.model.quantization_method != METHOD:
        return {}
    groups = [
        g
        for _, g in Groups(
            f"{context.model.folder / 'config.json'}", context.model.quantization_config or {}
        ).all
    ]
    return {
        "matmul": {
            "codes": [g.codes for g in groups],
            "inputs": [g.inputs for g in groups if g.inputs],
        }
    }


PROVIDER = Provider(
    METHOD,
    "compressed-tensors checkpoints: FP8, INT8, packed 4-bit and 8-bit weights",
    _build,
    capabilities=QuantizationCapabilities(
        (METHOD,),
        devices=None,
        activations="float8_e4m3fn",
        examples=EXAMPLES,
        compiled_steps=True,
        codes=("int8", "uint4", "float8_e4m3fn"),
    ),
    needs=needs,
    priority=50,
)


@hookimpl
def dovetail_quantization() -> list[Provider[CompressedTensors]]:
    return [PROVIDER]
