"""`why_not` states why the kernel is not usable."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dovetail.facts import DeviceFacts
from dovetail.plugin.provider import Context
from dovetail_attention_cpu import why_not

GOOD = DeviceFacts("Linux", "x86_64", 4, 2**33, frozenset({"avx2", "fma", "f16c"}), "/usr/bin/c++")


def reasons(**changes):
    return [str(r) for r in why_not(Context(replace(GOOD, **changes), None, "cpu", "float32"))]


def test_usable():
    assert reasons() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compiler": None}, "no C++ compiler"),
        ({"machine": "aarch64"}, "this machine is aarch64"),
        ({"system": "Darwin"}, "requires Linux, but this system is Darwin"),
        ({"cpu_flags": frozenset({"avx2"})}, "this CPU lacks fma, f16c"),
    ],
)
def test_why_not(changes, words):
    (reason,) = reasons(**changes)
    assert words in reason
