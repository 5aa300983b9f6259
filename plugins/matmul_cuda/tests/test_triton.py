"""The Triton kernels, interpreted, keep the contract."""

from __future__ import annotations

from dataclasses import replace

from dovetail.testing.matmul import MatmulContract
from dovetail_matmul_cuda import CAPABILITIES, PROVIDER


class TestTriton(MatmulContract):
    provider = replace(PROVIDER, capabilities=replace(CAPABILITIES, devices=("cpu",)))
