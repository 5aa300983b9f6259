"""Model code: the hook, and what this package offers. Imported whenever an engine is composed, so
nothing heavy here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.interfaces.architecture import ArchitectureCapabilities
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from my_plugin.model import MyPluginArchitecture

# `architectures` of the config.json that this is code for, and tiny configs of such models: what
# the kit tries it with.
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
    """Called once, in the process that computes. The worker then asks what this returns for the
    checkpoint's model."""
    from my_plugin.model import MyPluginArchitecture  # heavy imports belong here

    return MyPluginArchitecture()


PROVIDER = Provider(
    "my-plugin",  # the name in an engine config
    "Llama in a hundred lines",
    build,
    Options,  # none of its own
    CAPABILITIES,
    # `auto` takes the highest. Below 0: only when asked for. A new architecture's code has no
    # rival: take 10
    priority=-10,
)


@hookimpl  # the name of the function is the hook: a misspelt one is an error
def dovetail_architectures() -> list[Provider[MyPluginArchitecture]]:
    return [PROVIDER]
