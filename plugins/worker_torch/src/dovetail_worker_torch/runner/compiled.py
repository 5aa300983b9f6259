"""A model whose forward pass is one call into C++ (csrc/step.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dovetail.interfaces.architecture import Attend, Target
from dovetail.interfaces.compiled import (
    CompilableModel,
    CompiledAttention,
    CompiledForward,
    Op,
    StepHeader,
)
from dovetail_worker_torch.native import Kernels

LONG_STEP = 1 << 28
"""Multiply-adds above which a step releases Python's lock."""


class StepAttend(Attend, Protocol):
    """An `Attend` for compiled steps too."""

    def addresses(self) -> list[int]:
        """By layer: what the operations of a compiled step read (`CompiledAttention.address`)."""


class CompiledModel:
    """A `Model` over the operations of a `CompilableModel`. `bind` comes before `forward`; one step
    at a time."""

    def __init__(self, model: CompilableModel, kernels: Kernels, max_num_tokens: int) -> None:
        self.model, self._kernels, self._max_num_tokens = model, kernels, max_num_tokens
        self.attention_layers, self.vocab_size = model.attention_layers, model.vocab_size
        self._forward: CompiledForward | None = None
        self._program: Program | None = None
        self._step = StepHeader()

    def bind(self, backends: Sequence[CompiledAttention], caches: Sequence[Any]) -> None:
        """Make the program; `backends` and `caches` are given by layer."""
        self._forward = self.model.compile_forward(self._max_num_tokens, backends, caches)
        self._program = Program(self._kernels, self._forward.compiled.ops)

    def forward(self, token_ids: Tensor, positions: Tensor, attend: StepAttend) -> Tensor:
        assert self._forward is not None
        assert self._program is not None
        num_tokens = len(token_ids)
        if num_tokens > self._max_num_tokens:
            raise ValueError(
                f"a step of {num_tokens} tokens: more than max_num_batched_tokens"
                f" {self._max_num_tokens}"
            )
        step = self._step
        step.num_tokens, step.num_threads = num_tokens, torch.get_num_threads()
        step.token_ids, step.positions = token_ids.data_ptr(), positions.data_ptr()
        addresses = attend.addresses()
        self._addresses = (ctypes.c_uint64 * len(addresses))(*addresses)
        step.attention = ctypes.addressof(self._addresses)
        self._program.run(step, hold=num_tokens * self._forward.num_multiplies < LONG_STEP)
        hidden: Tensor = self._forward.hidden[:num_tokens]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.logits(hidden)
        return logits

    def targets(self) -> dict[str, Target]:
        return self.model.targets()

    def unused(self) -> Collection[str]:
        return self.model.unused()


class Program:
    """A list of operations that run in one call."""

    def __init__(self, kernels: Kernels, ops: list[Op]) -> None:
        self._kernels = kernels
        self._pointer = kernels.holding.dovetail_new_program((Op * len(ops))(*ops), len(ops))

    def run(self, step: StepHeader, *, hold: bool) -> None:
        """`hold` keeps Python's lock."""
        functions = self._kernels.holding if hold else self._kernels.functions
        functions.dovetail_run_program(
            self._pointer, ctypes.addressof(step), None, self._kernels.team
        )

    def __del__(self) -> None:
        self._kernels.holding.dovetail_free_program(self._pointer)
