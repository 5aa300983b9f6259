"""The CUDA C++ kernels fulfil the contract, with CUDA threads emulated by fibers on the CPU, and
nvcc compiles them if it is installed."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import triton

from dovetail.facts import device_facts
from dovetail.facts.gpus import GpuFacts
from dovetail.native import build_cuda_library
from dovetail.plugin.provider import Context, Options, Provider
from dovetail_attention_cuda import CUDA, CUDA_CAPABILITIES, SOURCES, TRITON
from dovetail_attention_cuda.native import CudaAttention
from dovetail_testing.attention import AttentionContract

EMULATION = Path(__file__).parent / "emulated/cuda_on_cpu.h"
HEADERS = Path(triton.__file__).parent / "backends/nvidia/include"
"""The CUDA headers that Triton ships."""
NUM_SMS = 4


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """Return the kernels, compiled for the CPU with the emulation."""
    path = tmp_path_factory.mktemp("emulated") / "paged_attention.so"
    command = [
        device_facts().compiler,
        "-std=c++20",
        "-O2",
        "-fPIC",
        "-shared",
        "-w",
        f"-I{EMULATION.parent}",
        f"-I{HEADERS}",
    ]
    command += ["-include", str(EMULATION)]
    subprocess.run(
        [*map(str, command), "-x", "c++", str(SOURCES / "paged_attention.cu"), "-o", str(path)],
        check=True,
    )
    return path


@pytest.mark.skipif(device_facts().nvcc is None, reason="nvcc is not installed")
@pytest.mark.parametrize(
    "architectures", [["sm_90"], pytest.param(["sm_80", "sm_90", "sm_100"], marks=pytest.mark.soak)]
)
def test_nvcc_compiles_them(tmp_path, architectures):
    """The library loads without a GPU and has the functions that are called."""
    path = build_cuda_library(
        "attention-cuda", SOURCES, device_facts(), architectures, folder=tmp_path
    )
    functions = ctypes.CDLL(str(path))
    functions.dovetail_cuda_error.restype = ctypes.c_char_p
    assert functions.dovetail_cuda_error(0) == b"no error"
    assert path == build_cuda_library(
        "attention-cuda", SOURCES, device_facts(), architectures, folder=tmp_path
    )


def test_why_not():
    facts = replace(device_facts(), nvcc=None, gpus=(GpuFacts("Tesla T4", (7, 5), 2**34, (12, 4)),))
    old, missing = (
        str(reason) for reason in CUDA.why_not(Context(facts, None, "cuda:0", "float16"))
    )
    assert old == "requires sm_80 or newer, but cuda:0 (Tesla T4) is sm_75"
    assert missing == "CUDA's compiler was not found (install the CUDA toolkit, or set CUDA_HOME)"
    ada, hopper = (
        replace(facts, gpus=(GpuFacts("GPU", c, 2**34, (12, 4)),)) for c in ((8, 6), (9, 0))
    )
    fp8 = {"kv_dtype": "float8_e4m3fn"}
    assert [r.code for r in TRITON.why_not(Context(ada, None, "cuda:0", "float16", fp8))] == [
        "device"
    ]
    assert TRITON.why_not(Context(ada, None, "cuda:0", "float16")) == []
    assert TRITON.why_not(Context(hopper, None, "cuda:0", "float16", fp8)) == []


@pytest.mark.parametrize(
    ("num_rows", "num_heads", "splits"),
    [(1, 32, 32), (4, 32, 8), (33, 32, 1), (1000, 32, 1), (1, 2, 32)],
)
def test_contexts_are_split_where_rows_are_few(library, num_rows, num_heads, splits):
    """The number of parts depends on the numbers of rows and heads: two thread blocks for each of
    132 multiprocessors."""
    assert CudaAttention(library, "cpu", 132)._splits(num_rows, num_heads) == splits


class TestCuda(AttentionContract):
    provider = Provider(
        "cuda", CUDA.summary, None, Options, replace(CUDA_CAPABILITIES, devices=("cpu",))
    )

    @pytest.fixture(autouse=True)
    def _emulated(self, library):
        type(self).provider = replace(
            self.provider, build=lambda context, options: CudaAttention(library, "cpu", NUM_SMS)
        )
