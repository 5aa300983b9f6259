"""Where the kernel cannot be had, and why; and that a machine builds it once."""

from __future__ import annotations

import multiprocessing
import stat
from dataclasses import replace

import pytest

from dovetail.errors import PluginError
from dovetail.facts import DeviceFacts, device_facts
from dovetail.provider import Context
from dovetail_attention_cpu import why_not
from dovetail_attention_cpu.build import load_kernel

GOOD = DeviceFacts("Linux", "x86_64", 4, 2**33, frozenset({"avx2", "fma", "f16c"}), 0, "/usr/bin/c++")


def reasons(**changes):
    return [str(r) for r in why_not(Context(replace(GOOD, **changes), None, "cpu", "float32"))]


def test_usable():
    assert reasons() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compiler": None}, "no C++ compiler"),
        ({"machine": "aarch64"}, "this machine is aarch64"),
        ({"system": "Darwin"}, "this is Darwin"),
        ({"cpu_flags": frozenset({"avx2"})}, "no fma, f16c"),
    ],
)
def test_why_not(changes, words):
    (reason,) = reasons(**changes)
    assert words in reason


@pytest.fixture
def compiler(tmp_path):
    """A compiler that notes each call, and writes an empty file, or fails as `fail` says."""

    def make(body):
        path = tmp_path / "c++"
        path.write_text(f"#!/bin/sh\necho call >> {tmp_path}/calls\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return replace(device_facts(), compiler=str(path))

    return make


def test_no_compiler(tmp_path):
    with pytest.raises(PluginError, match=r"needs a C\+\+ compiler"):
        load_kernel(replace(GOOD, compiler=None), "native", None, tmp_path)


def test_a_failed_build_shows_the_compilers_last_lines(compiler, tmp_path):
    facts = compiler("for i in $(seq 40); do echo line $i >&2; done; echo error: no such register >&2; exit 1")
    with pytest.raises(PluginError, match="error: no such register") as caught:
        load_kernel(facts, "native", None, tmp_path / "cache")
    assert "line 40" in caught.value.message
    assert "line 2\n" not in caught.value.message
    assert not list((tmp_path / "cache").glob("*.so"))


def test_a_library_that_cannot_be_loaded_is_an_error(compiler, tmp_path):
    facts = compiler('while [ "$1" != -o ]; do [ "$1" = --version ] && exit; shift; done; touch "$2"')
    with pytest.raises(PluginError, match="cannot be loaded"):
        load_kernel(facts, "native", None, tmp_path / "cache")


def test_a_folder_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(PluginError, match="XDG_CACHE_HOME"):
        load_kernel(device_facts(), "native", None, blocked / "cache")


TINY = """while [ "$1" != -o ]; do [ "$1" = --version ] && exit; shift; done
echo 'int dovetail_nothing(void) { return 0; }' | exec cc -x c -shared -fPIC - -o "$2"
"""


def test_a_broken_library_is_built_again(compiler, tmp_path, caplog):
    facts = compiler(TINY)
    elsewhere = multiprocessing.get_context("spawn").Process(
        target=load_kernel, args=(facts, "native", None, tmp_path / "cache")
    )
    elsewhere.start()  # this process would find again what it has loaded, whatever became of the file
    elsewhere.join()
    (library,) = (tmp_path / "cache").glob("*.so")
    library.write_bytes(library.read_bytes()[:100])
    assert load_kernel(facts, "native", None, tmp_path / "cache") == library
    assert library.stat().st_size > 100
    assert "built again" in caplog.text


def test_two_processes_build_once(compiler, tmp_path):
    facts = compiler(TINY + "sleep 0.2")
    context = multiprocessing.get_context("spawn")
    arguments = (facts, "native", None, tmp_path / "cache")
    both = [context.Process(target=load_kernel, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [p.exitcode for p in both] == [0, 0]
    calls = (tmp_path / "calls").read_text().count("call")
    assert calls == 2 + 5, "each asks for the version; one compiles four sources and links"
