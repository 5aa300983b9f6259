"""Quantize a model folder into a checkpoint of this scheme's layout.

Usage: python -m dovetail_quant_nf4.convert MODEL OUT
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from dovetail.interfaces.quantization import Declined, LinearLayer, Part
from dovetail_quant_nf4 import METHOD
from dovetail_quant_nf4.scheme import NF4

LEFT_OUT = ["*embed*", "lm_head"]
INDEX = "model.safetensors.index.json"


def convert(source: Path, out: Path, block_size: int = 64) -> None:
    """Quantize every matrix whose rows are whole blocks, except the embeddings and the output
    projection. Raises `FileExistsError` if `out` exists."""
    settings = {
        "quant_method": METHOD,
        "block_size": block_size,
        "modules_to_not_convert": list(LEFT_OUT),
    }
    scheme = NF4(settings, block_size)
    out.mkdir(parents=True)
    files: dict[str, str] = {}
    for path in sorted(source.iterdir()):
        if path.suffix in (".json", ".jinja") and path.name not in (INDEX, "config.json"):
            shutil.copy(path, out)
        if path.suffix == ".safetensors":
            packed = {
                name: t
                for stored in load_file(path).items()
                for name, t in _pack(scheme, settings, *stored).items()
            }
            save_file(packed, out / path.name)
            files |= dict.fromkeys(packed, path.name)
    if (source / INDEX).exists():
        (out / INDEX).write_text(json.dumps({"weight_map": files}))
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(
        json.dumps({**config, "quantization_config": settings}, indent=2)
    )


def _pack(scheme: NF4, settings: dict[str, Any], name: str, tensor: Tensor) -> dict[str, Tensor]:
    layer_name = name.removesuffix(".weight")
    if name == layer_name or tensor.ndim != 2:
        return {name: tensor}
    layer = LinearLayer(
        layer_name,
        (Part(layer_name, len(tensor)),),
        tensor.shape[1],
        False,
        "float32",
        stored=False,
    )
    if isinstance(scheme.parameters(layer), Declined):
        settings["modules_to_not_convert"].append(layer_name)
        return {name: tensor}
    return {
        f"{layer_name}.{suffix}": t.contiguous()
        for suffix, t in scheme.quantize(layer, tensor).items()
    }


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
