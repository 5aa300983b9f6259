"""The table of compiled Triton kernels, benchmarks/results/triton_kernels.json: for each case of a
kernel, architecture and version of Triton, the registers, shared memory and spills, and whether
loads are pipelined.

    python tests/triton_table.py          compile what is missing or whose source has changed
    python tests/triton_table.py --all    compile everything

Needs no GPU. Versions of Triton that are not installed are installed to build/ (pip, the first
time).
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from dovetail_testing.triton_kernels import (
    Compiled,
    KernelCase,
    compile_kernels,
    entry_kernels,
    problems,
    read_table,
    source_hash,
    table,
    write_table,
)

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "benchmarks/results/triton_kernels.json"
COMMAND = "python tests/triton_table.py"
INSTALLED = version("triton")
VERSIONS = ("3.7.1", "3.6.0")
"""The one that constraints.txt pins, and the one that PyTorch 2.10 and 2.11 for CUDA bring
along."""
AT_A_TIME = 8
"""Cases in a process, after which the table is written."""

Key = tuple[str, int, str]
"""Name of a case, architecture, version of Triton."""


def case_modules() -> list[ModuleType]:
    """`tests/kernel_cases.py` of every plugin that has one: `CASES`, and maybe `check(rows)`."""
    found = []
    for path in sorted(ROOT.glob("plugins/*/tests/kernel_cases.py")):
        spec = importlib.util.spec_from_file_location(f"kernel_cases_of_{path.parts[-3]}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found.append(module)
    return found


def all_cases() -> list[KernelCase]:
    return [case for module in case_modules() for case in module.CASES]


def all_kernels() -> list[str]:
    """Every entry kernel of the repository's packages."""
    return [
        kernel
        for folder in sorted([ROOT / "core/src", *ROOT.glob("plugins/*/src")])
        for kernel in entry_kernels(folder)
    ]


def key_of(row: Compiled) -> Key:
    return row.name, row.architecture, row.triton


def wanted(cases: Sequence[KernelCase]) -> dict[Key, str]:
    """Rows that the table has to have, and the hash of their source."""
    hashes = {case.name: source_hash(case) for case in cases}
    return {
        (c.name, a, v): hashes[c.name] for c in cases for v in VERSIONS for a in c.architectures
    }


def stale(cases: Sequence[KernelCase], rows: Sequence[Compiled]) -> list[Key]:
    """Rows that are missing, or whose source has changed."""
    found = {key_of(row): row.source for row in rows}
    return [key for key, source in wanted(cases).items() if found.get(key) != source]


def folder_of(triton: str) -> Path | None:
    """Where a version of Triton is, installed there if it is not; None for the one in this
    environment."""
    if triton == INSTALLED:
        return None
    folder = ROOT / f"build/triton-{triton}"
    if not (folder / "triton").exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        subprocess.run([*command, "--target", str(folder), f"triton=={triton}"], check=True)
    return folder


def refresh(everything: bool = False) -> list[Compiled]:
    """Compile the stale rows, or all, and write the table. Raises `RuntimeError` if a kernel cannot
    be compiled."""
    cases = all_cases()
    known = {key_of(row): row for row in read_table(TABLE)} if TABLE.exists() else {}
    todo = list(wanted(cases)) if everything else stale(cases, list(known.values()))
    for triton in VERSIONS:
        for architecture in sorted({a for _, a, v in todo if v == triton}):
            names = [name for name, a, v in todo if (a, v) == (architecture, triton)]
            chosen = [case for case in cases if case.name in names]
            for start in range(0, len(chosen), AT_A_TIME):
                made = compile_kernels(
                    chosen[start : start + AT_A_TIME], [architecture], folder_of(triton)
                )
                print(table(made), flush=True)
                known |= {key_of(row): row for row in made}
                rows = [known[key] for key in wanted(cases) if key in known]
                write_table(TABLE, rows)
    return [known[key] for key in wanted(cases)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--all", action="store_true", help="compile everything, not only what has changed"
    )
    rows = refresh(parser.parse_args().all)
    of = {case.name: case for case in all_cases()}
    found = [problem for row in rows for problem in problems(of[row.name], row)]
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
