"""The PyTorch worker. This root is light: torch is imported when a provider is built."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from pydantic import Field

from dovetail.hookspecs import hookimpl
from dovetail.interfaces.attention import AttentionCapabilities
from dovetail.provider import Context, Options, Provider, Reason
from dovetail_worker_torch.execution import EXECUTION, Execution, settle

if TYPE_CHECKING:
    from dovetail.compose import BuildContext
    from dovetail_worker_torch.attention import ReferenceAttention
    from dovetail_worker_torch.worker import TorchWorker

REFERENCE_CAPABILITIES = AttentionCapabilities(
    devices=("cpu", "cuda"), sliding_window=True, logit_soft_cap=True, sinks=True
)  # fmt: skip


class WorkerOptions(Options):
    execution: Execution = Field("auto", description=EXECUTION)
    num_threads: int | None = Field(None, ge=1, description="CPU threads of a step; default: torch's own choice")


def _needs_torch(context: Context) -> list[Reason]:
    if importlib.util.find_spec("torch") is None:
        return [Reason("torch is not installed", "pip install torch, with the constraints file for the CPU build")]
    return []


def _settle(context: Context, options: WorkerOptions) -> tuple[WorkerOptions, list[str]]:
    execution, remarks = settle(context, options.execution)
    return options.model_copy(update={"execution": execution}), remarks


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
            why_not=_needs_torch, settle=_settle, priority=50,
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
