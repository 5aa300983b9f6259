"""How a model's forward pass will run here: decided when the plan is made, from facts alone.
Imports no torch.

What an architecture provider declares as `compiled` says how: "operations", a list of C++
operations that run in one call a step, where the machine and the attention and linear layers chosen
allow it; "torch.compile", only where that is asked for. Linear layers that no scheme supplies are
packed for the C++ kernels wherever those run, whoever wrote the model.
"""

from __future__ import annotations

import importlib.util

from dovetail.errors import ConfigError
from dovetail.interfaces.architecture import ArchitectureCapabilities
from dovetail.plan import Reason
from dovetail.plugin.provider import NO_COMPILER, Context
from dovetail_worker_torch.options import Execution, LinearKind, WorkerOptions

OPERATIONS, TORCH_COMPILE = "operations", "torch.compile"
"""Values of `ArchitectureCapabilities.compiled`."""
NEEDED_FLAGS = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
"""What the C++ kernels of linear layers and of compiled steps require of a CPU."""


def resolve_options(context: Context, options: WorkerOptions) -> tuple[WorkerOptions, list[str]]:
    """Say what `auto` is here, and why. Raises `ConfigError` for what was asked for and cannot be
    had."""
    made: ArchitectureCapabilities = context.needs["architecture"]
    no_kernels = _why_no_kernels(context)
    linear = options.linear
    if linear == "packed" and no_kernels:
        raise ConfigError(
            f"worker.linear: packed cannot be had here: {_listed(no_kernels)}. Set it to auto or"
            " torch"
        )
    if linear == "auto":
        linear = (
            "torch"
            if no_kernels or options.execution == "plain" or not made.quantization
            else "packed"
        )
    execution, remarks = options.execution, list[str]()
    if context.device_name.startswith("cuda") or execution == "graphs":
        execution, remarks = _graphs(context, execution)
        if made.fused and execution != "plain":
            whose = "Triton's" if has_triton() else "torch's, because Triton is not installed"
            remarks.append(f"norms, rotations and activations are {whose}")
    elif execution != "plain":
        reasons = _why_not_compiled(context, made, options.linear, no_kernels)
        if reasons and execution == "compiled":
            raise ConfigError(
                f"worker.execution: compiled cannot be had here: {_listed(reasons)}. Set it to auto"
                " or plain"
            )
        if reasons:
            execution, remarks = "plain", [f"steps are not compiled: {_listed(reasons)}"]
        elif made.compiled == OPERATIONS:
            execution = "compiled"
        elif execution == "auto":
            execution, remarks = (
                "plain",
                ["steps are compiled by torch.compile only where that is asked for"],
            )
        else:
            remarks = ["steps are compiled by torch.compile"]
    if linear == "packed":
        remarks.append(_kernel(context))
    return options.model_copy(update={"execution": execution, "linear": linear}), remarks


def _graphs(context: Context, wanted: Execution) -> tuple[Execution, list[str]]:
    """On a GPU, or where graphs are asked for. torch.compile is what "compiled" means there, for
    models that it serves."""
    made: ArchitectureCapabilities = context.needs["architecture"]
    if wanted == "plain" or (wanted == "compiled" and made.compiled == TORCH_COMPILE):
        return wanted, []
    if wanted == "compiled":
        raise ConfigError(
            "worker.execution: compiled steps are for CPUs. Set it to auto, graphs or plain"
        )
    reasons: list[Reason] = []
    if not context.device_name.startswith("cuda"):
        reasons.append(Reason(f"graphs are CUDA's, and the device is {context.device_name}"))
    if not context.needs.get("graph_capture", False):
        reasons.append(Reason("the attention chosen does not declare graph_capture"))
    if context.needs.get("shadow"):
        reasons.append(Reason("a shadow run compares layers one by one", "remove shadow"))
    if reasons and wanted == "graphs":
        raise ConfigError(
            f"worker.execution: graphs cannot be had here: {_listed(reasons)}. Set it to auto or"
            " plain"
        )
    if reasons:
        return "plain", [f"steps are not captured and run in plain torch: {_listed(reasons)}"]
    return "graphs", ["decode steps are CUDA graphs"]


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def fuses(execution: Execution, device: str, made: ArchitectureCapabilities) -> bool:
    """Return whether a model uses its fused kernels: on a GPU with Triton, unless plain torch was
    requested."""
    return device.startswith("cuda") and execution != "plain" and made.fused and has_triton()


def _listed(reasons: list[Reason]) -> str:
    return "; ".join(map(str, reasons))


def _why_not_compiled(
    context: Context, made: ArchitectureCapabilities, linear: LinearKind, no_kernels: list[Reason]
) -> list[Reason]:
    if context.needs.get("shadow"):
        return [Reason("a shadow run compares layers one by one", "remove shadow")]
    name = context.model.architecture if context.model else "the model"
    if made.compiled == TORCH_COMPILE:
        return (
            [NO_COMPILER]
            if context.device_name == "cpu" and context.device.compiler is None
            else []
        )
    if made.compiled != OPERATIONS:
        return [Reason(f"the code of {name} does not offer it")]
    reasons = list(no_kernels)
    if not context.needs.get("compiled_attention", False):
        reasons.append(Reason("the attention chosen cannot be part of a compiled step"))
    if not all(scheme.compiled_steps for scheme in context.needs["quantization"]):
        reasons.append(Reason("the quantization chosen cannot be part of a compiled step"))
    if not all(matmul.compiled_steps for matmul in context.needs.get("matmul", {}).values()):
        reasons.append(Reason("the matmul chosen cannot be part of a compiled step"))
    if linear == "torch":
        reasons.append(Reason("worker.linear is torch"))
    return reasons


def _why_no_kernels(context: Context) -> list[Reason]:
    device, reasons = context.device, []
    if context.device_name != "cpu":
        return [Reason(f"the kernels are for CPUs, and the device is {context.device_name}")]
    if device.system != "Linux" or device.machine not in ("x86_64", "AMD64"):
        reasons.append(
            Reason(
                f"the kernels are for Linux on x86-64, and this is {device.system} on"
                f" {device.machine}"
            )
        )
    elif missing := [f for f in NEEDED_FLAGS if f not in device.cpu_flags]:
        reasons.append(Reason(f"this CPU has no {', '.join(missing)}"))
    if device.compiler is None:
        reasons.append(NO_COMPILER)
    if context.dtype not in ("float32", "bfloat16"):
        reasons.append(Reason(f"the kernels compute in float32 or bfloat16, not {context.dtype}"))
    return reasons


MEASURED = {"AVX-512 with BF16": {1: 1.5, 16: 1.9, 32: 1.7, 128: 1.2, 512: 1.05, 2048: 1.0}}
"""By instruction set, for bfloat16: by number of rows, times the rate of torch's linear layer
(benchmarks/linear_cpu.py). The packed layers were at least as fast wherever they were measured, so
they are what compiled steps take."""


def _kernel(context: Context) -> str:
    flags = context.device.cpu_flags
    if context.dtype == "float32":
        return "linear layers: packed float32, AVX-512"
    kernel = "AVX-512 with BF16" if "avx512_bf16" in flags else "AVX-512, widened to float32"
    if {"amx_bf16", "amx_tile"} <= flags:
        kernel = "AMX"
    measured = ", ".join(
        f"{rows} rows {times:g} ×" for rows, times in MEASURED.get(kernel, {}).items()
    )
    return (
        f"linear layers: packed bfloat16, {kernel} (beside torch: {measured or 'not measured yet'})"
    )
