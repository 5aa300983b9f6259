"""A plugin's C++ is built once a machine, and whatever goes wrong is said."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import stat
import subprocess
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
    facts = compiler(
        "for i in $(seq 40); do echo line $i >&2; done; echo error: no such register >&2; exit 1"
    )
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
    # this process would find again what it has loaded, whatever became of the file
    elsewhere.start()
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


def test_the_folder_is_its_owners(compiler, tmp_path):
    library = build_library(
        "kernels", sources(tmp_path), compiler(TINY), folder=tmp_path / "new" / "cache"
    )
    for made in (tmp_path / "new", library.parent, library, library.with_suffix(".lock")):
        assert made.stat().st_mode & 0o077 == 0, made


def mark(library, text):
    """A library that says so when it is loaded."""
    body = (
        f'__attribute__((constructor)) static void f(void) {{ FILE* x = fopen("{text}", "w"); if'
        " (x) fclose(x); }"
    )
    command = ["cc", "-x", "c", "-shared", "-fPIC", "-", "-o", str(library)]
    subprocess.run(command, input=f"#include <stdio.h>\n{body}\n", text=True, check=True)


@pytest.fixture
def planted(compiler, tmp_path):
    """Facts, the library that `build` wants in a fresh cache, made by somebody else, and the file
    that it writes if loaded."""
    facts = compiler(TINY)
    library = tmp_path / "cache" / build(facts, tmp_path / "first").name
    library.parent.mkdir(mode=0o700)
    mark(library, tmp_path / "loaded")
    return facts, library, tmp_path / "loaded"


def test_a_sound_library_is_loaded_as_it_stands(planted):
    facts, library, loaded = planted
    library.chmod(0o755)
    build(facts, library.parent)
    assert loaded.exists(), "the next tests would say nothing"


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")


@pytest.mark.parametrize("mode", [0o666, 0o702, pytest.param(0o720, marks=needs_root)])
def test_a_library_that_others_can_write_is_built_again(planted, mode, caplog):
    facts, library, loaded = planted
    library.chmod(mode)
    if mode == 0o720:
        os.chown(library, -1, 12345)
    assert build(facts, library.parent) == library
    assert not loaded.exists()
    assert library.stat().st_mode & 0o777 == 0o700
    assert "is writable by" in caplog.text
    assert "built again" in caplog.text


def test_a_library_behind_a_link_is_built_again(planted, tmp_path, caplog):
    facts, library, loaded = planted
    elsewhere = library.rename(tmp_path / "elsewhere.so")
    library.symlink_to(elsewhere)
    build(facts, library.parent)
    assert not loaded.exists()
    assert not library.is_symlink()
    assert elsewhere.is_file()
    assert "neither a regular file" in caplog.text


@needs_root
def test_somebody_elses_library_is_built_again(planted, caplog):
    facts, library, loaded = planted
    os.chown(library, 12345, -1)
    build(facts, library.parent)
    assert not loaded.exists()
    assert "belongs to user 12345" in caplog.text


@needs_root
def test_somebody_elses_folder_is_refused(planted):
    facts, library, loaded = planted
    os.chown(library.parent, 12345, -1)
    with pytest.raises(
        PluginError, match=r"does not load code from .* belongs to user 12345.*set XDG_CACHE_HOME"
    ):
        build(facts, library.parent)
    assert not loaded.exists()


def test_a_folder_that_others_can_write_to_is_refused(planted):
    facts, library, loaded = planted
    library.parent.chmod(0o1777)  # of a sticky folder too: others can add a library there
    with pytest.raises(
        PluginError, match=r"does not load code from .* by all users .* `chmod go-w"
    ):
        build(facts, library.parent)
    assert not loaded.exists()


def test_nor_may_others_replace_the_folder(planted, tmp_path):
    facts, library, loaded = planted
    folder = (tmp_path / "shared").mkdir() or tmp_path / "shared" / "mine"
    library.parent.rename(folder)
    (tmp_path / "shared").chmod(0o777)
    with pytest.raises(PluginError, match=r"which lies in .*/shared,"):
        build(facts, folder)
    assert not loaded.exists()
    (tmp_path / "shared").chmod(0o1777)  # sticky, as /tmp is: others cannot rename what is ours
    os.chmod(folder / library.name, 0o755)
    build(facts, folder)
    assert loaded.exists()


@needs_root
@pytest.mark.parametrize("mode", [0o755, 0o1777])
def test_nor_may_the_owner_of_what_it_lies_in(planted, tmp_path, mode):
    facts, library, loaded = planted
    folder = (tmp_path / "theirs").mkdir() or tmp_path / "theirs" / "mine"
    library.parent.rename(folder)
    (tmp_path / "theirs").chmod(mode)
    os.chown(tmp_path / "theirs", 12345, -1)
    with pytest.raises(
        PluginError,
        match=r"which lies in .*/theirs, because it belongs to user 12345.*that you own$",
    ):
        build(facts, folder)
    assert not loaded.exists()
    os.chown(tmp_path / "theirs", 65534, -1)  # in a user namespace: the host's
    build(facts, folder)
    assert loaded.exists()


@needs_root
@pytest.mark.parametrize("linked", ["folder", "above"])
def test_nor_may_the_owner_of_a_link(planted, tmp_path, linked):
    facts, library, loaded = planted
    link, target = tmp_path / "link", library.parent if linked == "folder" else tmp_path
    link.symlink_to(target)
    folder = link if linked == "folder" else link / library.parent.name
    os.lchown(link, 12345, -1)
    with pytest.raises(
        PluginError, match=r"/link.* because it is a link that belongs to user 12345"
    ):
        build(facts, folder)
    assert not loaded.exists()
    os.lchown(link, 0, -1)
    build(facts, folder)
    assert loaded.exists()


def test_a_linked_lock_empties_nothing(compiler, tmp_path):
    facts = compiler(TINY)
    library = tmp_path / "cache" / build(facts, tmp_path / "first").name
    library.parent.mkdir(mode=0o700)
    precious = tmp_path / "precious"
    precious.write_text("kept")
    library.with_suffix(".lock").symlink_to(precious)
    with pytest.raises(PluginError, match=r"\.lock is a link: remove it"):
        build(facts, library.parent)
    assert precious.read_text() == "kept"
    library.with_suffix(".lock").unlink()
    library.with_suffix(".lock").write_text("whatever")
    build(facts, library.parent)
    assert library.with_suffix(".lock").read_text() == "whatever"


def test_zeros_can_be_written():
    for size in (0, 1, 3 << 20):
        memory = zeros(size)
        assert not any(memory[:])
        memory[-1:] = b"x"
