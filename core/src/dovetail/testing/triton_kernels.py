"""Compiling Triton kernels for NVIDIA GPUs where there is none: what each takes of registers and shared memory, and what it
spills.

    compiled = compile_kernels([KernelCase("decode", "my_package.kernels:attend", {"q": "*bf16", "n": "i32"}, {"BLOCK": 64})])

Compiling happens in a process of its own, without TRITON_INTERPRET, so that tests which interpret kernels can ask too.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
"""Ampere, Hopper, Blackwell: sm_80, sm_90, sm_100."""
LARGEST_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a block of threads can have."""


@dataclass(frozen=True)
class KernelCase:
    """A kernel and what it is specialized for."""

    name: str
    kernel: str
    """"module:function", of a function under `triton.jit`."""
    signature: dict[str, str]
    """By argument, as Triton writes types: "*bf16", "i32", "fp32". Pointers are aligned to 16 bytes; ":16" behind an integer
    says that it is a multiple of 16."""
    constants: dict[str, Any] = field(default_factory=dict)
    """The other arguments. A type is named: "tl.bfloat16"."""
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Compiled:
    """A kernel as ptxas made it for an architecture."""

    name: str
    architecture: int
    registers: int
    """Of a thread."""
    spilled_bytes: int
    """Of a thread: registers kept in memory for want of room."""
    shared_bytes: int
    """Of a block of threads."""
    products: str
    """The tensor-core instruction that it has: "tcgen05", "wgmma", "mma", or "" for none."""


def compile_kernels(cases: Sequence[KernelCase], architectures: Sequence[int] = ARCHITECTURES) -> list[Compiled]:
    """Compile each case for each architecture. Raises `RuntimeError` with the compiler's words."""
    asked = json.dumps({"cases": [asdict(case) for case in cases], "architectures": list(architectures), "path": sys.path})
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=asked, capture_output=True, text=True, env=environment, check=False
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"a kernel could not be compiled:\n{done.stderr[-4000:]}")
    return [Compiled(**found) for found in json.loads(done.stdout)]


def table(compiled: Sequence[Compiled]) -> str:
    """For people."""
    width = max(len(c.name) for c in compiled)
    lines = [f"{'kernel':{width}}  arch    registers  spilled  shared KiB  products"]
    for c in compiled:
        taken = f"{c.registers:9}  {c.spilled_bytes:7}  {c.shared_bytes / 1024:10.1f}"
        lines.append(f"{c.name:{width}}  sm_{c.architecture:<4} {taken}  {c.products}")
    return "\n".join(lines)


def _compile(case: KernelCase, architecture: int) -> Compiled:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, function = case.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), function)
    names: list[str] = kernel.arg_names
    if unknown := (case.signature.keys() | case.constants.keys()) - set(names):
        raise ValueError(f"{case.kernel} has no {', '.join(sorted(unknown))}")
    if missing := [n for n in names if n not in case.signature and n not in case.constants]:
        raise ValueError(f"{case.name}: {', '.join(missing)} of {case.kernel} is neither in the signature nor a constant")
    types = {n: case.signature[n].partition(":")[0] if n in case.signature else "constexpr" for n in names}
    aligned = [i for i, n in enumerate(names) if types[n].startswith("*") or case.signature.get(n, "").endswith(":16")]
    constants = {
        (i,): getattr(tl, value[3:]) if isinstance(value := case.constants[n], str) and value.startswith("tl.") else value
        for i, n in enumerate(names)
        if n not in case.signature
    }
    source = ASTSource(kernel, types, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, spilled = _assembled(made.asm["ptx"], architecture)
    products = next((p for p, mark in PRODUCTS.items() if mark in made.asm["ptx"]), "")
    return Compiled(case.name, architecture, registers, spilled, made.metadata.shared, products)


PRODUCTS = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync"}


def _assembled(ptx: str, architecture: int) -> tuple[int, int]:
    """Registers, and bytes spilled, as ptxas says."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    ptxas = tools / ("ptxas-blackwell" if architecture >= 100 and (tools / "ptxas-blackwell").exists() else "ptxas")
    found = re.search(r"^\.target (\w+)", ptx, re.M)
    assert found is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [str(ptxas), "-v", f"--gpu-name={found[1]}", str(path), "-o", str(path.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert used is not None, said
    return int(used[1]), int(spilled[1]) if spilled else 0


def _main() -> None:
    asked = json.load(sys.stdin)
    sys.path[:] = asked["path"]
    cases = [KernelCase(**case) for case in asked["cases"]]
    print(json.dumps([asdict(_compile(case, a)) for case in cases for a in asked["architectures"]]))


if __name__ == "__main__":
    _main()
