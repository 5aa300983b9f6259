"""The PyTorch worker. This root is light: torch is imported when a provider is built."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from dovetail.errors import ConfigError
from dovetail.hookspecs import hookimpl
from dovetail.interfaces.attention import AttentionCapabilities
from dovetail.provider import Context, Options, Provider, Reason

if TYPE_CHECKING:
    from dovetail.compose import BuildContext
    from dovetail_worker_torch.attention import ReferenceAttention
    from dovetail_worker_torch.worker import TorchWorker

REFERENCE_CAPABILITIES = AttentionCapabilities(
    devices=("cpu", "cuda"), sliding_window=True, logit_soft_cap=True, sinks=True
)  # fmt: skip


OWN_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures that run our own decoder; any other goes through transformers."""


class WorkerOptions(Options):
    execution: Literal["auto", "plain", "compiled"] = Field(
        "auto",
        description="how a model's forward pass runs: plain is torch, operation by operation; compiled is one call a step of "
        "C++ kernels with packed weights (CPU); auto compiles where that can be had",
    )
    num_threads: int | None = Field(None, ge=1, description="CPU threads of a step; default: torch's own choice")


def _needs_torch(context: Context) -> list[Reason]:
    if importlib.util.find_spec("torch") is None:
        return [Reason("torch is not installed", "pip install torch, with the constraints file for the CPU build")]
    return []


def why_not_compiled(context: Context) -> list[Reason]:
    """Why a model's steps cannot be compiled here."""
    device, reasons = context.device, []
    if context.device_name != "cpu":
        return [Reason(f"compiled steps are for CPUs, and the device is {context.device_name}")]
    if device.system != "Linux" or device.machine not in ("x86_64", "AMD64"):
        reasons.append(Reason(f"compiled steps are for Linux on x86-64, and this is {device.system} on {device.machine}"))
    elif missing := [f for f in ("avx512f", "avx512bw", "avx512vl", "avx512dq") if f not in device.cpu_flags]:
        reasons.append(Reason(f"this CPU has no {', '.join(missing)}"))
    if device.compiler is None:
        reasons.append(Reason("no C++ compiler was found", "install g++ or clang++, or set CXX"))
    if context.dtype not in ("float32", "bfloat16"):
        reasons.append(Reason(f"compiled steps compute in float32 or bfloat16, not {context.dtype}"))
    if context.model is not None and context.model.architecture not in OWN_ARCHITECTURES:
        reasons.append(Reason(f"{context.model.architecture} runs through transformers"))
    if not context.needs.get("compiled_attention", False):
        reasons.append(Reason("the attention chosen cannot be part of a compiled step"))
    return reasons


def settle(context: Context, options: WorkerOptions) -> tuple[WorkerOptions, list[str]]:
    """Say what `execution: auto` is here, and why. Raises `ConfigError` for `compiled` where it cannot be had."""
    if options.execution == "plain":
        return options, []
    reasons = "; ".join(map(str, why_not_compiled(context)))
    if reasons and options.execution == "compiled":
        raise ConfigError(f"worker.execution: compiled cannot be had here: {reasons}. Set it to auto or plain")
    if reasons:
        return options.model_copy(update={"execution": "plain"}), [f"steps are not compiled: {reasons}"]
    return options.model_copy(update={"execution": "compiled"}), [_linear_kernel(context)]


def _linear_kernel(context: Context) -> str:
    flags = context.device.cpu_flags
    if context.dtype == "float32":
        return "linear layers: packed float32, AVX-512"
    if {"amx_bf16", "amx_tile"} <= flags:
        return "linear layers: packed bfloat16, AMX"
    return "linear layers: packed bfloat16, AVX-512" + (" with BF16" if "avx512_bf16" in flags else ", widened to float32")


def _worker(context: BuildContext, options: WorkerOptions) -> TorchWorker:
    from dovetail_worker_torch.worker import TorchWorker

    return TorchWorker(context, options)


def _reference(context: BuildContext, options: Any) -> ReferenceAttention:
    from dovetail_worker_torch.attention import ReferenceAttention

    return ReferenceAttention(context.plan.device)


@hookimpl
def dovetail_workers() -> list[Provider[TorchWorker]]:
    return [
        Provider(
            "torch", "PyTorch, one device in this process", _worker, WorkerOptions,
            why_not=_needs_torch, settle=settle, priority=50,
        )
    ]  # fmt: skip


@hookimpl
def dovetail_attention() -> list[Provider[ReferenceAttention]]:
    return [
        Provider(
            "torch-reference", "plain torch on any device: slow, obviously right", _reference,
            capabilities=REFERENCE_CAPABILITIES, why_not=_needs_torch, priority=0,
        )
    ]  # fmt: skip
