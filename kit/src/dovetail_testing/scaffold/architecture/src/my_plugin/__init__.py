"""Register model code. This module is imported whenever an engine is composed, so it must be
light."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.interfaces.architecture import ArchitectureCapabilities
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from my_plugin.model import MyPluginArchitecture

# The supported `architectures` of config.json, and configs of tiny models for the conformance
# test.
NAME = "LlamaForCausalLM"
TINY = {
    "architectures": [NAME],
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
UNTIED = {
    **TINY,
    "tie_word_embeddings": False,
    "head_dim": 16,
    "rope_theta": 500.0,
    "rms_norm_eps": 1e-3,
}
CAPABILITIES = ArchitectureCapabilities(architectures=(NAME,), examples=(TINY, UNTIED))


def build(context: BuildContext, options: Options) -> MyPluginArchitecture:
    """Build the architecture. Called once, in the engine process; the worker then uses it to build
    the model of the checkpoint."""
    # Heavy imports belong here.
    from my_plugin.model import MyPluginArchitecture

    return MyPluginArchitecture()


PROVIDER = Provider(
    "my-plugin",  # the name in an engine config
    "Llama in about a hundred lines",
    build,
    Options,  # no options
    CAPABILITIES,
    # `auto` selects the highest priority. Below 0: used only on request. Code for a new
    # architecture has no competitor: use 10.
    priority=-10,
)


@hookimpl  # the function's name is the hook's name: a misspelt one is an error
def dovetail_architectures() -> list[Provider[MyPluginArchitecture]]:
    return [PROVIDER]
