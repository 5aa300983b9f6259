"""How others read a checkpoint: `python theirs.py OUT FOLDER…`, in their environment (`make
interop`).

Writes, by reader and folder, the logits of `PROMPT`, or why there are none; and the versions of the
libraries.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import traceback
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
import transformers

PROMPT = [5, 17, 99, 42, 7, 150, 31]
LIBRARIES = ("gptqmodel", "optimum", "transformers", "torch")


def import_gptqmodel() -> ModuleType:
    """It imports torchvision for models of images, of which there is no build for every torch for
    CPUs."""
    pictures = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    for name in pictures:
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None), __path__=[])
    import gptqmodel

    for name in pictures:
        del sys.modules[name]
    return gptqmodel  # type: ignore[no-any-return]


def load(reader: str, folder: Path, gptqmodel: Any) -> Any:
    """In float16, which both have kernels for on a CPU."""
    if reader == "gptqmodel":
        method = json.loads((folder / "config.json").read_text())["quantization_config"][
            "quant_method"
        ]
        backend = {"awq": gptqmodel.BACKEND.AWQ_TORCH, "gptq": gptqmodel.BACKEND.GPTQ_TORCH}[method]
        return gptqmodel.GPTQModel.load(
            str(folder), backend=backend, device="cpu", dtype=torch.float16
        ).model
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, device_map="cpu"
    )


def main() -> None:
    out, gptqmodel = Path(sys.argv[1]), import_gptqmodel()
    found: dict[str, Any] = {
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "reads": [],
    }
    for folder in map(Path, sys.argv[2:]):
        for reader in ("gptqmodel", "transformers"):
            read: dict[str, Any] = {"folder": folder.name, "reader": reader}
            try:
                model = load(reader, folder, gptqmodel)
                with torch.inference_mode():
                    read["logits"] = model(torch.tensor([PROMPT])).logits[0].float().tolist()
                kinds = {type(module).__name__ for module in model.model.layers.modules()}
                read["linear"] = sorted(kind for kind in kinds if "Linear" in kind)
            except Exception as e:
                traceback.print_exc()
                read["error"] = f"{type(e).__name__}: {e}"
            found["reads"].append(read)
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
