"""The compiled kernel keeps the contract, for the CPU's own instructions and for AVX2 alone."""

from __future__ import annotations

from dovetail.testing.attention import AttentionContract
from dovetail_attention_cpu import PROVIDER


class TestAttentionCpu(AttentionContract):
    provider = PROVIDER


class TestAttentionCpuAvx2(AttentionContract):
    provider = PROVIDER
    options = {"target": "avx2"}  # noqa: RUF012
