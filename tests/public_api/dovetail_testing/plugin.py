from __future__ import annotations
import json
from pathlib import Path
from typing import Any
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from dovetail.facts import window_of_layers
from dovetail.interfaces.attention import AttentionCapabilities
from dovetail.interfaces.worker import WorkerCapabilities
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider
from dovetail.types import KVGroup
from dovetail_testing.simulated import Faults, SimulatedWorker
SIMULATED = {'worker': 'simulated', 'attention': 'simulated'}
SPECIAL = ['<pad>', '<eos>', '<user>', '<assistant>', '<end>']
TEMPLATE = '{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}'

class SimulatedOptions(Options):
    raise_at: int | None = None
    exit_at: int | None = None
    hang_at: int | None = None
    step_seconds: float = 0.0
    load_seconds: float = 0.0
CAN = WorkerCapabilities(drafts=True, host_tier=True)

@hookimpl
def dovetail_workers() -> list[Provider[SimulatedWorker]]:
    ...

@hookimpl
def dovetail_attention() -> list[Provider[None]]:
    ...

def install(site: Path, module: str=__name__, name: str='simulated', version: str='0.1.0') -> None:
    ...

def make_model(folder: Path, *, max_len: int=256, window: int | None=None) -> Path:
    ...
