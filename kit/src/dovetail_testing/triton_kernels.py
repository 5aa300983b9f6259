"""Compile Triton kernels for NVIDIA GPUs on a machine without one, and report registers, shared
memory, spilling, and whether loads are pipelined.

    arguments = {"q": "*bf16", "n": "i32"}
    case = KernelCase("decode", "my_package.kernels:attend", arguments, {"BLOCK": 64})
    compiled = compile_kernels([case])
    problems(case, compiled[0])

Kernels are compiled in a process of its own without TRITON_INTERPRET, so that tests which interpret
kernels can use it too. Results are stored in a table with a hash of each kernel's source, so that a
stale row is detected without compiling.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
"""Ampere, Hopper, Blackwell: sm_80, sm_90, sm_100."""
LARGEST_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Maximum shared memory of a thread block in bytes, by architecture."""


@dataclass(frozen=True)
class KernelCase:
    """A kernel, its specialization, and the requirements on it."""

    name: str
    kernel: str
    """ "module:function" of a function under `triton.jit`."""
    signature: dict[str, str]
    """Types by argument, in Triton's notation: "*bf16", "i32", "fp32". Pointers are aligned to 16
    bytes; ":16" after an integer means that it is a multiple of 16."""
    constants: dict[str, Any] = field(default_factory=dict)
    """Values of the other arguments. A type is given by name: "tl.bfloat16"."""
    num_warps: int = 4
    num_stages: int = 3
    architectures: tuple[int, ...] = ARCHITECTURES
    """Architectures that the kernel with this specialization is for."""
    max_spilled_bytes: int = 0
    """Maximum number of spilled bytes per thread."""
    products: tuple[str, ...] = ()
    """Tensor-core instructions of which the kernel must use one; empty if none is required."""
    divides_exactly: bool = False
    """True if float32 divisions must round to nearest, as `tl.div_rn` does and `/` does not."""


@dataclass(frozen=True)
class Compiled:
    """A kernel as Triton and ptxas compiled it for an architecture."""

    name: str
    """Name of the case."""
    architecture: int
    triton: str
    """Version of Triton."""
    source: str
    """Result of `source_hash` for the case."""
    registers: int
    """Registers per thread."""
    spilled_bytes: int
    """Bytes of registers spilled to memory per thread."""
    shared_bytes: int
    """Bytes of shared memory per thread block."""
    async_wait: list[int]
    """Operands of the `cp.async.wait_group` instructions in order: how many groups of copies to
    shared memory may still be pending. If those of a loop are all 0, or there are none, its loads
    are not prefetched."""
    inexact_divisions: int
    """Number of divisions within 2 ulp (`div.full.f32`) and of approximate ones."""
    products: str
    """Tensor-core instruction that the kernel uses: "tcgen05", "wgmma", "mma", or "" for none."""


def compile_kernels(
    cases: Sequence[KernelCase],
    architectures: Sequence[int] = ARCHITECTURES,
    triton: Path | None = None,
) -> list[Compiled]:
    """Compile each case for those of its architectures that are in `architectures`.

    `triton` is a folder with another version of Triton, as written by `pip install --target`.
    Raises `RuntimeError` with the compiler's message.
    """
    path = sys.path if triton is None else [str(triton), *sys.path]
    wanted = json.dumps(
        {
            "cases": [asdict(case) for case in cases],
            "architectures": list(architectures),
            "path": path,
        }
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=wanted,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"a kernel could not be compiled:\n{done.stderr[-4000:]}")
    return [Compiled(**found) for found in json.loads(done.stdout)]


def problems(case: KernelCase, compiled: Compiled) -> list[str]:
    """Return what is wrong with a compiled case: too much shared memory, spilled registers, no
    tensor cores."""
    found = []
    if compiled.shared_bytes > LARGEST_SHARED[compiled.architecture]:
        found.append(
            f"uses {compiled.shared_bytes} bytes of shared memory; the maximum is"
            f" {LARGEST_SHARED[compiled.architecture]}"
        )
    if compiled.spilled_bytes > case.max_spilled_bytes:
        found.append(f"spills {compiled.spilled_bytes} bytes")
    if case.products and compiled.products not in case.products:
        found.append(
            f"uses {compiled.products or 'no tensor cores'} instead of {' or '.join(case.products)}"
        )
    if compiled.inexact_divisions and case.divides_exactly:
        found.append(f"has {compiled.inexact_divisions} divisions that do not round to the nearest")
    return [
        f"{case.name}, sm_{compiled.architecture}, Triton {compiled.triton}: {what}"
        for what in found
    ]


def read_table(path: Path) -> list[Compiled]:
    return [Compiled(**row) for row in json.loads(path.read_text())["rows"]]


def write_table(path: Path, rows: Sequence[Compiled]) -> None:
    """Write one row per line, for readable diffs."""
    lines = ",\n  ".join(json.dumps(asdict(row), ensure_ascii=False) for row in rows)
    path.write_text(f'{{"rows": [\n  {lines}\n]}}\n')


def table(compiled: Sequence[Compiled]) -> str:
    """Format a table for people."""
    width = max(len(c.name) for c in compiled)
    lines = [
        f"{'kernel':{width}}  arch    Triton  registers  spilled  shared KiB  products  async_wait"
    ]
    for c in compiled:
        numbers = f"{c.registers:9}  {c.spilled_bytes:7}  {c.shared_bytes / 1024:10.1f}"
        where, waits = f"sm_{c.architecture:<4} {c.triton:6}", ",".join(map(str, c.async_wait))
        lines.append(f"{c.name:{width}}  {where}  {numbers}  {c.products:8}  {waits}")
    return "\n".join(lines)


# Kernels in source code, which is parsed but not imported.


def entry_kernels(folder: Path) -> list[str]:
    """Return the kernels in the packages below `folder` that Python launches, as "module:function":
    functions under `triton.jit` that are launched (`kernel[grid](…)`) or not used by any other such
    function."""
    kernels: dict[str, str] = {}
    launched: set[str] = set()
    used: set[str] = set()
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        launched |= set(_launched(tree))
        marks = _jit_names(tree)
        functions = (
            [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)] if marks else []
        )
        compiled = [
            f
            for f in functions
            if any(_dotted(decorator) in marks for decorator in f.decorator_list)
        ]
        module = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        kernels |= {f"{module}:{f.name}": f.name for f in compiled}
        for function in compiled:
            used |= {name for node in ast.walk(function) for name in _names(node)} - {function.name}
    return [kernel for kernel, name in kernels.items() if name in launched or name not in used]


def source_hash(case: KernelCase) -> str:
    """Return a hash of everything that a kernel is compiled from: its source and that of the
    functions and constants it uses, without comments and docstrings, and its specialization. The
    hash is the same on every machine."""
    module, _, function = case.kernel.partition(":")
    specialized = [case.signature, case.constants, case.num_warps, case.num_stages]
    whole = json.dumps([specialized, dict(_sources(module, function))], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def _sources(module: str, name: str) -> Iterator[tuple[str, list[str]]]:
    """Yield "module:name" and the tokens of everything that `name` depends on."""
    waiting, seen = [(module, name)], set()
    while waiting:
        module, name = waiting.pop()
        if (module, name) in seen:
            continue
        seen.add((module, name))
        source, defined, imported = _module(module)
        if name in imported:
            waiting.append((imported[name], name))
        elif name in defined:
            node = defined[name]
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            yield (
                f"{module}:{name}",
                _tokens("\n".join(source.splitlines()[first - 1 : node.end_lineno])),
            )
            waiting += [(module, used) for inner in ast.walk(node) for used in _names(inner)]


@functools.cache
def _module(name: str) -> tuple[str, dict[str, ast.stmt], dict[str, str]]:
    """Return the source, the names defined at its top level, and the modules from which other names
    are imported, except Triton's own."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(f"module {name} does not exist")
    source = Path(spec.origin).read_text(encoding="utf-8")
    defined: dict[str, ast.stmt] = {}
    imported: dict[str, str] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {
                n.id: node
                for target in targets
                for n in ast.walk(target)
                if isinstance(n, ast.Name)
            }
        elif (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.partition(".")[0] not in ("triton", "__future__")
        ):
            imported |= {alias.name: node.module for alias in node.names if alias.asname is None}
    return source, defined, imported


def _tokens(source: str) -> list[str]:
    found: list[str] = []
    line: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
            continue
        line.append(token)
        if token.type == tokenize.NEWLINE:
            words = [t for t in line if t.type not in (tokenize.INDENT, tokenize.DEDENT)]
            is_docstring = [t.type for t in words] == [tokenize.STRING, tokenize.NEWLINE]
            kept = [t for t in line if t not in words] if is_docstring else line
            found += [t.string if t.string.strip() else tokenize.tok_name[t.type] for t in kept]
            line = []
    return found


def _names(node: ast.AST) -> list[str]:
    return (
        [node.id]
        if isinstance(node, ast.Name)
        else [node.attr]
        if isinstance(node, ast.Attribute)
        else []
    )


def _launched(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            yield from _names(node.func.value)


def _jit_names(tree: ast.Module) -> set[str]:
    """Return the names under which a module uses `triton.jit`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {f"{a.asname or a.name}.jit" for a in node.names if a.name == "triton"}
        elif isinstance(node, ast.ImportFrom) and node.module == "triton":
            names |= {a.asname or a.name for a in node.names if a.name == "jit"}
    return names


def _dotted(decorator: ast.expr) -> str:
    """Format `@triton.jit` and `@triton.jit(…)` as "triton.jit"."""
    return ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)


# In the compiling process.


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
        raise ValueError(
            f"{case.name}: {', '.join(missing)} of {case.kernel} is neither in the signature nor a"
            " constant"
        )
    types = {
        n: case.signature[n].partition(":")[0] if n in case.signature else "constexpr"
        for n in names
    }
    aligned = [
        i
        for i, n in enumerate(names)
        if types[n].startswith("*") or case.signature.get(n, "").endswith(":16")
    ]
    constants = {
        (i,): (
            getattr(tl, value[3:])
            if isinstance(value := case.constants[n], str) and value.startswith("tl.")
            else value
        )
        for i, n in enumerate(names)
        if n not in case.signature
    }
    specialized = ASTSource(
        kernel, types, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    binary = triton.compile(
        specialized, target=GPUTarget("cuda", architecture, 32), options=options
    )
    ptx = binary.asm["ptx"]
    registers, spilled = _assembled(ptx, architecture)
    waits = [int(number) for number in re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)]
    products = next((p for p, mark in PRODUCTS.items() if mark in ptx), "")
    shared: int = binary.metadata.shared
    divisions = len(re.findall(r"\bdiv\.(?:full|approx)", ptx))
    about = (case.name, architecture, triton.__version__, source_hash(case))
    return Compiled(*about, registers, spilled, shared, waits, divisions, products)


PRODUCTS = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync"}


def _assembled(ptx: str, architecture: int) -> tuple[int, int]:
    """Return the number of registers and of spilled bytes, as reported by ptxas."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    ptxas = tools / (
        "ptxas-blackwell"
        if architecture >= 100 and (tools / "ptxas-blackwell").exists()
        else "ptxas"
    )
    found = re.search(r"^\.target (\w+)", ptx, re.M)
    assert found is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [
            str(ptxas),
            "-v",
            f"--gpu-name={found[1]}",
            str(path),
            "-o",
            str(path.with_suffix(".cubin")),
        ]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used = re.search(r"Used (\d+) registers", report)
    spilled = re.search(r"(\d+) bytes spill stores", report)
    assert used is not None, report
    return int(used[1]), int(spilled[1]) if spilled else 0


def _main() -> None:
    wanted = json.load(sys.stdin)
    sys.path[:] = wanted["path"]
    cases = [KernelCase(**case) for case in wanted["cases"]]
    pairs = [
        (case, a) for case in cases for a in wanted["architectures"] if a in case.architectures
    ]
    print(json.dumps([asdict(_compile(case, a)) for case, a in pairs]))


if __name__ == "__main__":
    _main()
