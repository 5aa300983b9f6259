"""The PyTorch worker. This root is light: torch is imported when a provider is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dovetail.interfaces.attention import AttentionCapabilities
from dovetail.interfaces.matmul import MatmulCapabilities
from dovetail.interfaces.worker import WorkerCapabilities
from dovetail.plan import Reason
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Context, Provider, why_not_installed
from dovetail_worker_torch.execution import resolve_options
from dovetail_worker_torch.options import WorkerOptions

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from dovetail_worker_torch.attention import ReferenceAttention
    from dovetail_worker_torch.matmul import TorchMatmul
    from dovetail_worker_torch.worker import TorchWorker

REFERENCE_CAPABILITIES = AttentionCapabilities(
    devices=("cpu", "cuda"),
    kv_dtypes=("float32", "bfloat16", "float16", "float8_e4m3fn", "int8"),
    sliding_window=True,
    logit_soft_cap=True,
    sinks=True,
)

MATMUL_CAPABILITIES = MatmulCapabilities(
    ("int8", "uint4", "float8_e4m3fn"), ("int8", "float8_e4m3fn"), devices=("cpu", "cuda")
)


def _needs_torch(context: Context) -> list[Reason]:
    return why_not_installed(
        "torch", "pip install torch, with the constraints file for the CPU build"
    )


def _why_no_worker(context: Context) -> list[Reason]:
    made = context.needs.get("architecture")
    if made is None:
        return [
            *_needs_torch(context),
            Reason("no plugin that offers model code (an architecture) is installed"),
        ]
    frameworks = {
        made.framework,
        *(scheme.framework for scheme in context.needs["quantization"]),
    } - {"torch"}
    return [
        *_needs_torch(context),
        *(Reason(f"the model's parts are written for {other}") for other in sorted(frameworks)),
    ]


def _worker(context: BuildContext, options: WorkerOptions) -> TorchWorker:
    from dovetail_worker_torch.worker import TorchWorker

    return TorchWorker(context, options)


def _matmul(context: BuildContext, options: Any) -> TorchMatmul:
    from dovetail_worker_torch.matmul import TorchMatmul

    return TorchMatmul()


def _reference(context: BuildContext, options: Any) -> ReferenceAttention:
    from dovetail_worker_torch.attention import ReferenceAttention

    return ReferenceAttention(context.plan.device)


@hookimpl
def dovetail_workers() -> list[Provider[TorchWorker]]:
    return [
        Provider(
            "torch",
            "PyTorch, one device in this process",
            _worker,
            WorkerOptions,
            capabilities=WorkerCapabilities(
                shadow=True, drafts=True, host_tier=True, describes_weights=True
            ),
            why_not=_why_no_worker,
            resolve_options=resolve_options,
            priority=50,
        )
    ]


@hookimpl
def dovetail_matmuls() -> list[Provider[TorchMatmul]]:
    return [
        Provider(
            "torch",
            "plain torch on any device, which expands a weight for every product: slow, obviously"
            " right",
            _matmul,
            capabilities=MATMUL_CAPABILITIES,
            why_not=_needs_torch,
            priority=0,
        )
    ]


@hookimpl
def dovetail_attention() -> list[Provider[ReferenceAttention]]:
    return [
        Provider(
            "torch-reference",
            "plain torch on any device: slow, obviously right",
            _reference,
            capabilities=REFERENCE_CAPABILITIES,
            why_not=_needs_torch,
            priority=0,
        )
    ]
