"""A plugin's C++ is built once a machine, and whatever goes wrong is said."""

from __future__ import annotations

import ctypes
import multiprocessing
import stat
from dataclasses import replace

import pytest
from native_build import build, sources

from dovetail.errors import PluginError
from dovetail.facts import device_facts
from dovetail.native import build_library, zeros


def test_a_library_is_compiled_from_all_its_sources(tmp_path):
    if device_facts().machine not in ("x86_64", "AMD64"):
        pytest.skip("the shared headers are for x86-64")
    assert ctypes.CDLL(str(build(device_facts(), tmp_path / "cache"))).two() == 2


def test_other_sources_are_another_library(tmp_path, compiler):
    facts = compiler(TINY)
    before = build(facts, tmp_path / "cache")
    path = sources(tmp_path)
    (path / "three.cpp").write_text("")
    assert build_library("kernels", path, facts, folder=tmp_path / "cache") != before


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
        build(replace(device_facts(), compiler=None), tmp_path)


def test_a_failed_build_shows_the_compilers_last_lines(compiler, tmp_path):
    facts = compiler("for i in $(seq 40); do echo line $i >&2; done; echo error: no such register >&2; exit 1")
    with pytest.raises(PluginError, match="error: no such register") as caught:
        build(facts, tmp_path / "cache")
    assert "line 40" in caught.value.message
    assert "line 2\n" not in caught.value.message
    assert not list((tmp_path / "cache").glob("*.so"))


def test_a_library_that_cannot_be_loaded_is_an_error(compiler, tmp_path):
    facts = compiler('while [ "$1" != -o ]; do shift; done; touch "$2"')
    with pytest.raises(PluginError, match="cannot be loaded"):
        build(facts, tmp_path / "cache")


def test_a_folder_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(PluginError, match="XDG_CACHE_HOME"):
        build_library("kernels", sources(tmp_path), device_facts(), folder=blocked / "cache")


TINY = """while [ "$1" != -o ]; do shift; done
echo 'int dovetail_nothing(void) { return 0; }' | exec cc -x c -shared -fPIC - -o "$2"
"""


def test_a_broken_library_is_built_again(compiler, tmp_path, caplog):
    facts = compiler(TINY)
    elsewhere = multiprocessing.get_context("spawn").Process(
        target=build, args=(facts, tmp_path / "cache")
    )
    elsewhere.start()  # this process would find again what it has loaded, whatever became of the file
    elsewhere.join()
    (library,) = (tmp_path / "cache").glob("*.so")
    library.write_bytes(library.read_bytes()[:100])
    assert build(facts, tmp_path / "cache") == library
    assert library.stat().st_size > 100
    assert "built again" in caplog.text


def test_two_processes_build_once(compiler, tmp_path):
    facts = compiler(TINY + "sleep 0.2")
    context = multiprocessing.get_context("spawn")
    arguments = (facts, tmp_path / "cache")
    both = [context.Process(target=build, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [p.exitcode for p in both] == [0, 0]
    calls = (tmp_path / "calls").read_text().count("call")
    assert calls == 2 + 1, "one compiles two sources and links"


def test_zeros_can_be_written():
    for size in (0, 1, 3 << 20):
        memory = zeros(size)
        assert not any(memory[:])
        memory[-1:] = b"x"
