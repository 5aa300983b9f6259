"""Every Triton kernel compiles for the GPUs it is for, within their shared memory, and spills no
registers.

`make test` compiles one case of each kernel for sm_90, and compares it with a committed table; the
soak compiles all cases for all architectures and versions of Triton, and writes the table.
"""

from __future__ import annotations

import importlib
from collections import Counter
from dataclasses import replace

import pytest
from triton_table import (
    COMMAND,
    INSTALLED,
    TABLE,
    VERSIONS,
    all_cases,
    all_kernels,
    case_modules,
    key_of,
    refresh,
    stale,
    wanted,
)

from dovetail_testing import triton_kernels
from dovetail_testing.triton_kernels import (
    Compiled,
    KernelCase,
    compile_kernels,
    entry_kernels,
    problems,
    read_table,
    source_hash,
)

CASES = all_cases()


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_refresh():
    """First, so that what follows judges the new table."""
    refresh(everything=True)


def test_every_kernel_has_cases():
    assert {case.kernel for case in CASES} == set(all_kernels())
    assert [name for name, count in Counter(case.name for case in CASES).items() if count > 1] == []


def test_the_table_is_of_this_source():
    """Rows of other sources than these say nothing."""
    assert stale(CASES, read_table(TABLE)) == [], (
        f"rows of {TABLE.name} are missing or of older source: run `{COMMAND}`"
    )


def test_the_table_keeps_the_limits():
    of = {case.name: case for case in CASES}
    rows = read_table(TABLE)
    assert [problem for row in rows for problem in problems(of[row.name], row)] == []
    for module in case_modules():
        names = {case.name for case in module.CASES}
        if hasattr(module, "check"):
            module.check([row for row in rows if row.name in names])


def test_one_case_of_each_kernel():
    """Compiled here and now, it is what the table says."""
    assert INSTALLED in VERSIONS, (
        f"the table has no rows of Triton {INSTALLED}: add it to VERSIONS, and run `{COMMAND}`"
    )
    rows = {key_of(row): row for row in read_table(TABLE)}
    firsts = list({case.kernel: case for case in reversed(CASES)}.values())
    for row in compile_kernels(firsts, [90]):
        assert row == rows[key_of(row)], f"run `{COMMAND}`"


# The machinery.

KERNELS = """
import triton as tr
import triton.language as tl
from triton import jit
from jax import jit as other

SIZE = tl.constexpr(4)  # a comment

@tr.jit
def helper(x):
    '''A docstring.'''
    return x + SIZE

@jit
def launched(x):
    y = helper(x)  # another
    tl.store(x, y)

@tr.jit(do_not_specialize=["n"])
def nobody_uses(x, n):
    tl.store(x, n)

@other
def of_jax(x):
    return x

def launch(x):
    helper[(1,)](x)
    launched[(1,)](x)
"""


CASE = KernelCase("case", "kernels_of_this_test:launched", {"x": "*fp32"})


@pytest.fixture
def hash_of(tmp_path, monkeypatch):
    """A function that returns the hash of CASE, where the module has a source."""
    monkeypatch.syspath_prepend(tmp_path)

    def hash_of(source, case=CASE):
        (tmp_path / "kernels_of_this_test.py").write_text(source)
        triton_kernels._module.cache_clear()
        importlib.invalidate_caches()
        return source_hash(case)

    return hash_of


def test_kernels_are_found_in_the_source(tmp_path):
    """Those that are launched, and those that no kernel uses, which a launch in some other form may
    reach."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package/kernels.py").write_text(KERNELS.replace("    helper[(1,)](x)\n", ""))
    assert entry_kernels(tmp_path) == ["package.kernels:launched", "package.kernels:nobody_uses"]
    (tmp_path / "package/kernels.py").write_text(KERNELS)
    assert entry_kernels(tmp_path)[0] == "package.kernels:helper"


COMPILED = {
    "a helper": ("x + SIZE", "x - SIZE"),
    "a constant": ("constexpr(4)", "constexpr(8)"),
    "the kernel": ("(x, y)", "(x, x)"),
    "its decorator": ("@jit", "@jit()"),
    "indentation": ("    tl.store(x, y)", "    if x:\n        tl.store(x, y)"),
}
NOT_COMPILED = {
    "a comment": ("  # a comment", "  # 1"),
    "no comment": ("  # another", ""),
    "a docstring": ("A docstring.", "Another."),
    "blank lines": ("\n@jit", "\n\n\n@jit"),
    "another kernel": ("(x, n)\n", "(x, n + 1)\n"),
    "a launch": ("(1,)", "(2,)"),
}


@pytest.mark.parametrize("what", COMPILED)
def test_a_hash_follows_what_is_compiled(hash_of, what):
    old, new = COMPILED[what]
    assert old in KERNELS
    assert hash_of(KERNELS) != hash_of(KERNELS.replace(old, new))


@pytest.mark.parametrize("what", NOT_COMPILED)
def test_a_hash_follows_nothing_else(hash_of, what):
    old, new = NOT_COMPILED[what]
    assert old in KERNELS
    assert hash_of(KERNELS) == hash_of(KERNELS.replace(old, new))


@pytest.mark.parametrize(
    "change",
    [{"num_warps": 8}, {"num_stages": 2}, {"constants": {"N": 2}}, {"signature": {"x": "*bf16"}}],
)
def test_a_hash_follows_the_case(hash_of, change):
    assert hash_of(KERNELS) != hash_of(KERNELS, replace(CASE, **change))


ROW = Compiled("case", 80, "3.7.1", "", 200, 0, 1000, [2, 0], 1, "mma")


def test_stale_rows_are_found():
    rows = [
        replace(ROW, name=n, architecture=a, triton=v, source=hashed)
        for (n, a, v), hashed in wanted(CASES).items()
    ]
    assert stale(CASES, rows) == []
    changed = [replace(rows[0], source=""), *rows[2:]]
    assert stale(CASES, changed) == [key_of(row) for row in rows[:2]]


@pytest.mark.parametrize(
    ("row", "expected", "words"),
    [
        (ROW, {}, ""),
        (ROW, {"products": ("wgmma", "mma")}, ""),
        (replace(ROW, products=""), {"products": ("mma",)}, "uses no tensor cores instead of"),
        (replace(ROW, shared_bytes=170_000), {}, "shared memory"),
        (replace(ROW, spilled_bytes=8), {}, "spills 8"),
        (ROW, {"divides_exactly": True}, "has 1 divisions"),
        (replace(ROW, inexact_divisions=0), {"divides_exactly": True}, ""),
        (replace(ROW, spilled_bytes=8), {"max_spilled_bytes": 8}, ""),
    ],
)
def test_limits(row, expected, words):
    found = problems(KernelCase("case", "m:f", {}, **expected), row)
    assert (not found and not words) or (len(found) == 1 and words and words in found[0])
