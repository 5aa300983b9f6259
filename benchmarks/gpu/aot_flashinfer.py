"""Compile FlashInfer's kernels ahead of time, for a machine with a GPU where minutes are dear.

    python benchmarks/gpu/aot_flashinfer.py [MODULE …]      # default: those of the check; FA3's
        take over an hour on two cores

Needs nvcc, and flashinfer-python as benchmarks/gpu/requirements.txt pins it on the path; no GPU.
`make gpu-flashinfer` sees to both. What is there already is not compiled again. `check.py` puts the
results where FlashInfer looks for them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUT, WORK = ROOT / ".gpu/flashinfer", ROOT / "build/flashinfer"
VERSION = OUT / "version"
ARCHITECTURE = "9.0a"
"""As FLASHINFER_CUDA_ARCH_LIST has it."""
USUAL_CUDA = Path("/usr/local/cuda")
FOR_THE_CHECK = ("page", "decode", "decode-fp8", "prefill", "prefill-fp8")
"""Heads of 128 in bfloat16 without windows and caps: groups of 4 and more decode by the prefill's
kernels."""


def modules() -> dict[str, Callable[[], Any]]:
    """What compiles them, by our names."""
    import torch
    from flashinfer.jit.attention import gen_batch_decode_module, gen_batch_prefill_module
    from flashinfer.jit.page import gen_page_module

    q, fp8, size = torch.bfloat16, torch.float8_e4m3fn, 128

    def decode(kv: torch.dtype, has_window: bool) -> Any:
        return gen_batch_decode_module(q, kv, q, torch.int32, size, size, 0, has_window, False)

    def prefill(backend: str, kv: torch.dtype, has_window: bool) -> Any:
        return gen_batch_prefill_module(
            backend, q, kv, q, torch.int32, size, size, 0, has_window, False, False
        )

    return {
        "page": gen_page_module,
        "decode": lambda: decode(q, False),
        "decode-fp8": lambda: decode(fp8, False),
        "decode-window": lambda: decode(q, True),
        "prefill": lambda: prefill("fa2", q, False),
        "prefill-fp8": lambda: prefill("fa2", fp8, False),
        "prefill-window": lambda: prefill("fa2", q, True),
        "prefill-fa3": lambda: prefill("fa3", q, False),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", metavar="MODULE")
    args = parser.parse_args()
    environment()
    known, installed = modules(), version("flashinfer-python")
    if VERSION.is_file() and VERSION.read_text() != installed:
        shutil.rmtree(OUT)
    OUT.mkdir(parents=True, exist_ok=True)
    VERSION.write_text(installed)
    if unknown := set(args.modules) - set(known):
        parser.error(f"no module {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for name in args.modules or FOR_THE_CHECK:
        spec, start = known[name](), time.monotonic()
        place = OUT / spec.name / f"{spec.name}.so"
        if not place.is_file():
            spec.build(False)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(spec.jit_library_path, place)
        print(
            f"{name:16} {place.stat().st_size / 2**20:5.2f} MiB {time.monotonic() - start:6.0f} s "
            f" {spec.name}",
            flush=True,
        )
    return 0


def environment() -> None:
    """What FlashInfer's build reads: where to work, for which GPU, and a stand-in for the driver's
    library to link with."""
    stub = WORK / "stub/libcuda.so"
    if not stub.is_file():
        stub.parent.mkdir(parents=True, exist_ok=True)
        command = [
            os.environ.get("CC", "gcc"),
            "-shared",
            "-x",
            "c",
            "-Wl,-soname,libcuda.so.1",
            "-o",
            str(stub),
            "-",
        ]
        subprocess.run(command, input=b"", check=True)
    flags = [os.environ.get("FLASHINFER_EXTRA_LDFLAGS", ""), f"-L{stub.parent}"]
    os.environ |= {
        "FLASHINFER_CUDA_ARCH_LIST": ARCHITECTURE,
        "FLASHINFER_WORKSPACE_BASE": str(WORK),
        "FLASHINFER_EXTRA_LDFLAGS": " ".join(filter(None, flags)),
    }
    if USUAL_CUDA.is_dir():
        os.environ.setdefault(
            "CUDA_HOME", str(USUAL_CUDA)
        )  # FlashInfer looks where `nvcc` is, which may be a script
    os.environ.setdefault("MAX_JOBS", "1")
    os.environ.setdefault("FLASHINFER_NVCC_THREADS", "1")


if __name__ == "__main__":
    sys.exit(main())
