"""The Triton kernels fulfil the contract in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

from dovetail_attention_cuda import TRITON, TRITON_CAPABILITIES
from dovetail_testing.attention import AttentionContract


class TestTriton(AttentionContract):
    provider = replace(TRITON, capabilities=replace(TRITON_CAPABILITIES, devices=("cpu",)))
