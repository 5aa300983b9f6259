"""How a model's forward pass will run here: decided when the plan is made, from facts alone. Imports no torch.

Our own decoder is compiled into a list of C++ operations that run in one call a step (`compiled`), where the machine and
the attention chosen allow it; a model of the bridge by `torch.compile`, only where that is asked for.
"""

from __future__ import annotations

from typing import Literal

from dovetail.errors import ConfigError
from dovetail.provider import Context, Reason

OWN_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures that run our own decoder; any other goes through transformers."""

Execution = Literal["auto", "plain", "compiled"]
EXECUTION = (
    "how a model's forward pass runs. plain: torch, operation by operation. compiled: C++ kernels with packed weights, one "
    "call a step (CPU); for a model that runs through transformers, torch.compile, whose first start takes a minute or so and "
    "later ones use a cache. auto: C++ kernels where they can be had, else plain"
)


def settle(context: Context, execution: Execution) -> tuple[Execution, list[str]]:
    """Say what `auto` is here, and why. Raises `ConfigError` for `compiled` where it cannot be had."""
    own = context.model is None or context.model.architecture in OWN_ARCHITECTURES
    if execution == "plain":
        return "plain", []
    if not own and execution == "auto":
        return "plain", [f"{context.model and context.model.architecture} runs through transformers: plain torch"]
    reasons = "; ".join(map(str, _why_no_kernels(context) if own else _why_no_torch_compile(context)))
    if reasons and execution == "compiled":
        raise ConfigError(f"worker.execution: compiled cannot be had here: {reasons}. Set it to auto or plain")
    if reasons:
        return "plain", [f"steps are not compiled: {reasons}"]
    return "compiled", [_kernel(context) if own else "torch.compile, of a model that runs through transformers"]


def _why_no_kernels(context: Context) -> list[Reason]:
    device, reasons = context.device, []
    if context.device_name != "cpu":
        return [Reason(f"the kernels are for CPUs, and the device is {context.device_name}")]
    if device.system != "Linux" or device.machine not in ("x86_64", "AMD64"):
        reasons.append(Reason(f"the kernels are for Linux on x86-64, and this is {device.system} on {device.machine}"))
    elif missing := [f for f in ("avx512f", "avx512bw", "avx512vl", "avx512dq") if f not in device.cpu_flags]:
        reasons.append(Reason(f"this CPU has no {', '.join(missing)}"))
    if device.compiler is None:
        reasons.append(_NO_COMPILER)
    if context.dtype not in ("float32", "bfloat16"):
        reasons.append(Reason(f"the kernels compute in float32 or bfloat16, not {context.dtype}"))
    if not context.needs.get("compiled_attention", False):
        reasons.append(Reason("the attention chosen cannot be part of a compiled step"))
    return reasons


def _why_no_torch_compile(context: Context) -> list[Reason]:
    return [_NO_COMPILER] if context.device_name == "cpu" and context.device.compiler is None else []


_NO_COMPILER = Reason("no C++ compiler was found", "install g++ or clang++, or set CXX")


MEASURED = {"AVX-512 with BF16": {1: 1.5, 16: 1.9, 32: 1.7, 128: 1.2, 512: 1.05, 2048: 1.0}}
"""By instruction set, for bfloat16: by number of rows, times the rate of torch's linear layer (benchmarks/linear_cpu.py). The
packed layers were at least as fast wherever they were measured, so they are what compiled steps take."""


def _kernel(context: Context) -> str:
    flags = context.device.cpu_flags
    if context.dtype == "float32":
        return "linear layers: packed float32, AVX-512"
    kernel = "AVX-512 with BF16" if "avx512_bf16" in flags else "AVX-512, widened to float32"
    if {"amx_bf16", "amx_tile"} <= flags:
        kernel = "AMX"
    measured = ", ".join(f"{rows} rows {times:g} ×" for rows, times in MEASURED.get(kernel, {}).items())
    return f"linear layers: packed bfloat16, {kernel} (beside torch: {measured or 'not measured yet'})"
