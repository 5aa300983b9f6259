from __future__ import annotations
import functools
import os
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar
import pytest
from hypothesis import Phase, given, seed
from hypothesis.strategies import SearchStrategy
from dovetail.assembly.compose import PlanContext
from dovetail.composition.selection import choose
from dovetail.errors import PluginError
from dovetail.facts import LayerKind, ModelFacts, device_facts
from dovetail.plan import Choice, Plan
from dovetail.plugin.build_context import BuildContext
from dovetail.plugin.config import ProviderConfig
from dovetail.plugin.discovery import Offer, PluginInfo, Registry
from dovetail.plugin.extension_points import EXTENSION_POINTS, ExtensionPoint
from dovetail.plugin.provider import Context, KVCacheOptions, Options, Provider, SchedulerOptions
from dovetail_testing.machines import Machine, limits, run_machine, shown
RUN_SEED = int(os.environ.get('DOVETAIL_TEST_SEED') or random.SystemRandom().randrange(2 ** 31))
SCALE = int(os.environ.get('DOVETAIL_SOAK', '1'))
Check = TypeVar('Check', bound=Callable[..., None])
Input = TypeVar('Input')

class Broken(AssertionError):

    def __init__(self, found: str, *, input: str='', asks: str='', causes: str='', seed: int=RUN_SEED) -> None:
        ...

def common_causes(*causes: str) -> Callable[[Check], Check]:
    ...

def completed(error: Exception, given: str, asks: str, causes: str, seed: int) -> Broken:
    ...

class Contract:
    extension_point: ClassVar[str]
    provider: ClassVar[Provider[Any]]
    device: ClassVar[str] = 'cpu'
    options: ClassVar[dict[str, Any]] = {}
    version: ClassVar[str] = ''
    inner: ClassVar[dict[str, Provider[Any]]] = {}
    added: ClassVar[tuple[ExtensionPoint, ...]] = ()
    expected_failures: ClassVar[dict[str, str]] = {}
    seed: ClassVar[int] = RUN_SEED

    def prepare(self) -> None:
        ...

    def settled_options(self, model: ModelFacts | None=None) -> Options:
        ...

    def build(self, context: BuildContext | None=None) -> Any:
        ...

    def build_context(self, **changes: Any) -> BuildContext:
        ...

    def registry(self) -> Registry:
        ...

    def selection_context(self, dtype: str='float32', **needs: Any) -> Context:
        ...

    def refusal(self, context: Context) -> str | None:
        ...

    def needs(self, declared: object, what: str, context: Context) -> None:
        ...

    def run_machine(self, new: Callable[[], Machine], *, examples: int, steps: int=40) -> None:
        ...

    def run_examples(self, test: Callable[..., None], *, examples: int, **strategies: SearchStrategy[Any]) -> None:
        ...

    def attempt(self, given: Input, attempt: Callable[[Input], None], simpler: Callable[[Input], list[Input]], limit: int=60) -> None:
        ...

def failure_of(attempt: Callable[[Input], None], given: Input) -> Exception | None:
    ...
DISTRIBUTION = 'under-test'
BUILDS = 'With the options under test, `build` returns the object that its extension point requires.'
KIT_MODEL = ModelFacts(folder=Path('kit-model'), architecture='KitForCausalLM', model_type='kit', dtype='float32', num_layers=1, hidden_size=128, num_heads=2, num_kv_heads=2, head_size=64, vocab_size=64, max_position_embeddings=4096, layer_kinds=(LayerKind('full', None),), logit_soft_cap=None, eos_token_ids=(), has_sinks=False)
