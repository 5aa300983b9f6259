"""An example plugin: the model code of GPT-2. This root imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dovetail.hookspecs import hookimpl
from dovetail.interfaces.architecture import ArchitectureCapabilities
from dovetail.provider import Provider

if TYPE_CHECKING:
    from dovetail_architecture_gpt2.model import GPT2Architecture

CAPABILITIES = ArchitectureCapabilities(architectures=("GPT2LMHeadModel",))


def build(context: Any, options: Any) -> GPT2Architecture:
    from dovetail_architecture_gpt2.model import GPT2Architecture

    return GPT2Architecture()


PROVIDER = Provider("gpt2", "GPT-2 in 90 lines", build, capabilities=CAPABILITIES, priority=10)


@hookimpl
def dovetail_architectures() -> list[Provider[GPT2Architecture]]:
    return [PROVIDER]
