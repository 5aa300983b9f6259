"""Register a model that comes with this package, and locate its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dovetail.interfaces.model import ModelSource
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext

# A folder as on the Hugging Face hub: config.json, *.safetensors, tokenizer.json,
# tokenizer_config.json. It contains a Llama with one layer, random weights and byte tokens: replace
# it by your own files.
WEIGHTS = Path(__file__).parent / "weights"


def build(context: BuildContext, options: Options) -> ModelSource:
    """Return the model's location. Called before there is a plan, because all later selections
    depend on the model: `context` is None and must not be used."""
    return ModelSource(WEIGHTS, licence="CC0-1.0 (random numbers)")


PROVIDER = Provider(
    "my-plugin",  # the name: `dovetail serve my-plugin`
    "a Llama with one layer and random weights",
    build,
    Options,  # no options
)


@hookimpl  # the function's name is the hook's name: a misspelt one is an error
def dovetail_models() -> list[Provider[ModelSource]]:
    return [PROVIDER]
