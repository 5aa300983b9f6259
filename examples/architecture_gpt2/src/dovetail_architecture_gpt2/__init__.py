"""An example plugin: the model code of GPT-2. This module imports no tensor library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dovetail.interfaces.architecture import ArchitectureCapabilities
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Provider

if TYPE_CHECKING:
    from dovetail_architecture_gpt2.model import GPT2Architecture

NAME = "GPT2LMHeadModel"
TINY = {
    "architectures": [NAME],
    "vocab_size": 203,
    "n_embd": 48,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 64,
}
OTHER = {**TINY, "n_inner": 80, "scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-3}
CAPABILITIES = ArchitectureCapabilities(architectures=(NAME,), examples=(TINY, OTHER))


def build(context: Any, options: Any) -> GPT2Architecture:
    from dovetail_architecture_gpt2.model import GPT2Architecture

    return GPT2Architecture()


PROVIDER = Provider("gpt2", "GPT-2 in 90 lines", build, capabilities=CAPABILITIES, priority=10)


@hookimpl
def dovetail_architectures() -> list[Provider[GPT2Architecture]]:
    return [PROVIDER]
