"""A GGUF file of 16 bits in one of llama.cpp's quantized types: python quantize_gguf.py IN.gguf
OUT.gguf Q4_K_M

By llama.cpp's own quantizer with its defaults, as `llama-quantize` does: a tied output projection
has more bits than the rest.
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp as c


def main(source: str, out: str, kind: str) -> int:
    c.llama_backend_init()
    params = c.llama_model_quantize_default_params()
    params.ftype = getattr(c, f"LLAMA_FTYPE_MOSTLY_{kind}")
    status: int = c.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params))
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
