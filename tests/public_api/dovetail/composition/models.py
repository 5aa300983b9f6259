from __future__ import annotations
from pathlib import Path
from dovetail.composition.hub import commit_of, download
from dovetail.composition.selection import choose, find
from dovetail.errors import ConfigError, DovetailError, PluginError
from dovetail.facts import device_facts
from dovetail.interfaces.model import ModelSource
from dovetail.plan import Choice
from dovetail.plugin.config import ProviderConfig
from dovetail.plugin.discovery import Registry, load_registry
from dovetail.plugin.provider import Context

def find_model(name: str, *, trust_remote_code: bool=False, revision: str | None=None) -> ModelSource:
    ...

def model_and_choice(name: str, where: str, with_code: bool, registry: Registry, context: Context, revision: str | None=None) -> tuple[ModelSource, Choice | None]:
    ...
