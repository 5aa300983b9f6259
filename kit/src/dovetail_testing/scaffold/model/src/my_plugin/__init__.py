"""A model that comes with a package: the hook, and where its files are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dovetail.interfaces.model import ModelSource
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext

# A folder as on the Hugging Face hub: config.json, *.safetensors, tokenizer.json,
# tokenizer_config.json. The one that is there now is a Llama of one layer with random weights,
# whose tokens are bytes: put your own files in its place.
WEIGHTS = Path(__file__).parent / "weights"


def build(context: BuildContext, options: Options) -> ModelSource:
    """Called before there is a plan: all later choices ask about the model. So `context` is None,
    and nothing is to be read."""
    return ModelSource(WEIGHTS, licence="CC0-1.0 (random numbers)")


PROVIDER = Provider(
    "my-plugin",  # the name: `dovetail serve my-plugin`
    "a Llama of one layer with random weights",
    build,
    Options,  # none of its own
)


@hookimpl  # the name of the function is the hook: a misspelt one is an error
def dovetail_models() -> list[Provider[ModelSource]]:
    return [PROVIDER]
