"""The engines with weights of 8 and of 4 bits: for each of our forms, what the others have that is
nearest to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from models import gptq_folder_of

from peers.engines import CONVERTED, ENGINES, HERE, OURS, Engine, convert, to_gguf, to_openvino

HEAD = {"match": "lm_head", "use": "int8", "activations": "none"}
"""The output projection in 8 bits, as the peers have it, whatever the other layers are."""
IN_GROUPS = "--sym", "--group-size", "128"
WEIGHTS = {"match": "*", "use": "int8", "activations": "none"}


def composed(name: str, rules: list[dict[str, Any]], folder: Path, python: Path) -> Path:
    """A engine config for Dovetail: the model with rules for its weights. JSON is YAML."""
    out = CONVERTED / f"{folder.name}.{name}.yaml"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"model": str(folder), "quantization": rules}))
    return out


def composed_gptq(folder: Path, python: Path) -> Path:
    """The shape's GPTQ checkpoint, whose codes are random: what they are changes no time."""
    return composed(
        "gptq", [HEAD, {"match": "*", "use": "auto"}], gptq_folder_of(folder.name), python
    )


def quantized_gguf(kind: str, folder: Path, python: Path) -> Path:
    out = CONVERTED / f"{folder.name}.{kind.lower()}.gguf"
    if not out.exists():
        part = out.with_suffix(".part")
        convert([python, HERE / "quantize_gguf.py", to_gguf(folder, python), part, kind])
        part.rename(out)
    return out


def _form(of: str, name: str, title: str, model: Callable[[Path, Path], Path]) -> Engine:
    """One engine with weights in some form."""
    name = f"{of}-{name}" if name else of
    return replace(ENGINES[of], name=name, title=title, model=model, has_server=False)


def _gguf(kind: str) -> Engine:
    return _form("llama.cpp", kind.lower(), f"llama.cpp {kind}", partial(quantized_gguf, kind))


BY_BITS: dict[int, dict[str, Engine]] = {
    bits: {e.name: e for e in engines}
    for bits, engines in {
        16: tuple(ENGINES.values()),
        8: (
            _form(
                OURS,
                "",
                "Dovetail INT8",
                partial(composed, "int8", [HEAD, {"match": "*", "use": "int8"}]),
            ),
            _form(
                OURS,
                "weights",
                "Dovetail INT8, inputs as they are",
                partial(composed, "int8-weights", [HEAD, WEIGHTS]),
            ),
            _gguf("Q8_0"),
            _form("openvino", "int8", "OpenVINO INT8", partial(to_openvino, form="int8")),
        ),
        4: (
            _form(OURS, "", "Dovetail GPTQ", composed_gptq),
            _gguf("Q4_0"),
            _gguf("Q4_K_M"),
            _form(
                "openvino",
                "int4",
                "OpenVINO INT4",
                partial(to_openvino, form="int4", more=IN_GROUPS),
            ),
        ),
    }.items()
}
