"""Quantize a model folder into a checkpoint of this scheme's layout.  Usage: python -m dovetail_quant_nf4.convert MODEL OUT"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from dovetail.interfaces.quantization import LinearLayer, Part
from dovetail_quant_nf4 import METHOD
from dovetail_quant_nf4.scheme import NF4

LEFT_OUT = ("*embed*", "lm_head")


def convert(source: Path, out: Path, block_size: int = 64) -> None:
    """Every matrix of whole blocks but the embeddings and the output projection. Raises `FileExistsError` if `out` exists."""
    settings = {"quant_method": METHOD, "block_size": block_size, "modules_to_not_convert": list(LEFT_OUT)}
    scheme = NF4(settings, block_size)
    out.mkdir(parents=True)
    for path in sorted(p for p in source.iterdir() if p.suffix in (".json", ".jinja", ".safetensors")):
        if path.suffix != ".safetensors":
            shutil.copy(path, out)
            continue
        packed: dict[str, Tensor] = {}
        for name, tensor in load_file(path).items():
            layer_name = name.removesuffix(".weight")
            layer = LinearLayer(layer_name, (Part(layer_name, len(tensor)),), tensor.shape[-1], False, "float32")
            if name == layer_name or tensor.ndim != 2 or not isinstance(scheme.parameters(layer), dict):
                packed[name] = tensor
                continue
            packed |= {f"{layer_name}.{suffix}": t.contiguous() for suffix, t in scheme.quantize(layer, tensor).items()}
        save_file(packed, out / path.name)
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": settings}, indent=2))


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
