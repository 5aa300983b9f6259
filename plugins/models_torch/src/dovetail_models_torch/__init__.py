"""Decoders of the Llama family in PyTorch. This root is light: torch is imported when the provider
is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.interfaces.architecture import ArchitectureCapabilities
from dovetail.plan import Reason
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Context, Options, Provider, why_not_installed
from dovetail_models_torch.tiny import TINY_CONFIGS

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from dovetail_models_torch.decoder import DecoderArchitecture

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
CAPABILITIES = ArchitectureCapabilities(
    ARCHITECTURES, examples=TINY_CONFIGS, compiled="operations", fused=True
)


def _why_not(context: Context) -> list[Reason]:
    return why_not_installed(
        "torch", "pip install torch, with the constraints file for the CPU build"
    )


def _build(context: BuildContext, options: Options) -> DecoderArchitecture:
    from dovetail_models_torch.decoder import DecoderArchitecture

    return DecoderArchitecture()


DECODER = Provider(
    "decoder",
    "decoders of the Llama family: Llama 2 and 3, Mistral, Qwen2, Qwen3",
    _build,
    capabilities=CAPABILITIES,
    why_not=_why_not,
    priority=50,
)


@hookimpl
def dovetail_architectures() -> list[Provider[DecoderArchitecture]]:
    return [DECODER]
