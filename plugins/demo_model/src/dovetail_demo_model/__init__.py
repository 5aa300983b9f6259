"""Provide the demo model, a small Llama that answers questions about the Python library, so that
serving needs no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dovetail.interfaces.model import ModelSource
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider

WEIGHTS = Path(__file__).parent / "weights"


class DemoOptions(Options):
    """The demo model has no options."""


LICENCE = "PSF-2.0 (trained on the Python documentation and standard library)"


def _source(context: Any, options: DemoOptions) -> ModelSource:
    return ModelSource(WEIGHTS, licence=LICENCE, draft="demo-draft")


def _draft(context: Any, options: DemoOptions) -> ModelSource:
    return ModelSource(WEIGHTS / "draft", licence=LICENCE)


@hookimpl
def dovetail_models() -> list[Provider[ModelSource]]:
    return [
        Provider(
            "demo",
            "answers questions about the Python library (Llama, 7 M parameters)",
            _source,
            DemoOptions,
        ),
        Provider(
            "demo-draft", "draft model for demo (Llama, 0.9 M parameters)", _draft, DemoOptions
        ),
    ]
