"""Paged attention for NVIDIA GPUs with FlashInfer.

This module registers the provider and imports neither FlashInfer nor torch.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from dovetail.interfaces.attention import AttentionCapabilities
from dovetail.plan import Reason
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Context, Provider, why_not_gpu
from dovetail_attention_flashinfer.options import FlashInferOptions

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from dovetail_attention_flashinfer.backend import FlashInferAttention

FLASHINFER_CAPABILITIES = AttentionCapabilities(
    devices=("cuda",),
    dtypes=("bfloat16", "float16"),
    kv_dtypes=("bfloat16", "float16", "float8_e4m3fn"),
    head_sizes=(64, 128, 256),
    block_sizes=(8, 16, 32, 64, 128),
    sliding_window=True,
    logit_soft_cap=True,
    graph_capture=True,
)
TESTED = ((0, 6, 13), (0, 7))
"""Supported FlashInfer versions: from the first to before the second."""
OLDEST_TORCH = (2, 6)


def why_no_flashinfer(context: Context) -> list[Reason]:
    reasons = why_not_gpu(context, (8, 0))
    least, before = TESTED
    wanted = f"flashinfer-python>={'.'.join(map(str, least))},<{'.'.join(map(str, before))}"
    found = installed("flashinfer-python")
    if found is None:
        reasons.append(Reason("FlashInfer is not installed", f"pip install '{wanted}'"))
    elif not least <= numbers(found) < before:
        reasons.append(
            Reason(
                f"FlashInfer {found} is installed, but this plugin has not been tested with it",
                f"pip install '{wanted}'",
            )
        )
    torch = installed("torch")
    if torch is None or numbers(torch) < OLDEST_TORCH:
        reasons.append(
            Reason(
                f"requires PyTorch {'.'.join(map(str, OLDEST_TORCH))} or newer, but the installed"
                f" version is {torch or 'none'}"
            )
        )
    return reasons


def installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of the release, such as (0, 6, 13) for 0.6.13.post1+cu130."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(n) for n in found[0].split(".")) if found else ()


def build_flashinfer(context: BuildContext, options: FlashInferOptions) -> FlashInferAttention:
    from importlib import import_module

    from dovetail_attention_flashinfer.backend import FlashInferAttention

    max_num_seqs: int = context.option("scheduler", "max_num_seqs")
    return FlashInferAttention(
        context.plan.device, options, import_module("flashinfer"), max_num_seqs
    )


FLASHINFER = Provider(
    "flashinfer",
    "paged attention with FlashInfer for NVIDIA GPUs (sm_80 and newer)",
    build_flashinfer,
    FlashInferOptions,
    FLASHINFER_CAPABILITIES,
    why_no_flashinfer,
    priority=30,
)


@hookimpl
def dovetail_attention() -> list[Provider[FlashInferAttention]]:
    return [FLASHINFER]
