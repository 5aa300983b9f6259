"""Models of transformers on the engine's attention. This root is light: transformers is imported
when the provider is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.interfaces.architecture import ArchitectureCapabilities
from dovetail.plan import Reason
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Context, Options, Provider, why_not_installed

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from dovetail_models_transformers.bridge import BridgeArchitecture

CAPABILITIES = ArchitectureCapabilities(
    None, quantization=False, loads_weights=True, compiled="torch.compile"
)


def _why_not(context: Context) -> list[Reason]:
    return [
        *why_not_installed(
            "torch", "pip install torch, with the constraints file for the CPU build"
        ),
        *why_not_installed("transformers", "pip install 'transformers>=5.23,<6'"),
    ]


def _build(context: BuildContext, options: Options) -> BridgeArchitecture:
    # It imports transformers, which takes seconds.
    from dovetail_models_transformers.bridge import BridgeArchitecture

    return BridgeArchitecture(context.plan.trust_remote_code)


TRANSFORMERS = Provider(
    "transformers",
    "any decoder-only model of transformers, on the engine's attention",
    _build,
    capabilities=CAPABILITIES,
    why_not=_why_not,
    priority=0,
)


@hookimpl
def dovetail_architectures() -> list[Provider[BridgeArchitecture]]:
    return [TRANSFORMERS]
