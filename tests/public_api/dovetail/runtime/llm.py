from __future__ import annotations
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from dovetail.assembly.attestation import Attestation
from dovetail.assembly.compose import build_engine, shadow_report_of
from dovetail.composition.resolution import resolve
from dovetail.engine.engine import Engine
from dovetail.errors import CheckpointError, EngineUnavailable, InvalidRequest
from dovetail.facts import model_facts
from dovetail.frontend.outputs import Delta, RequestState
from dovetail.frontend.requests import Prompt, RequestMaker, sampling_defaults
from dovetail.frontend.tokenizer import Tokenizer
from dovetail.interfaces.shadow import ShadowReport
from dovetail.interfaces.worker import Progress
from dovetail.plan import Plan
from dovetail.plugin.config import load_config
from dovetail.plugin.discovery import load_registry
from dovetail.types import FinishReason, SamplingParams, SequenceOutput, TokenLogprobs

@dataclass
class Completion:
    index: int
    text: str = ''
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

@dataclass
class RequestOutput:
    request_id: str
    prompt: Prompt
    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[dict[int, float] | None] | None = None
    num_cached_tokens: int = 0

    @property
    def text(self) -> str:
        ...

    @property
    def token_ids(self) -> list[int]:
        ...

    @property
    def logprobs(self) -> list[dict[int, float]] | None:
        ...

    @property
    def finish_reason(self) -> FinishReason | None:
        ...

def no_progress(what: str, done: int, total: int) -> None:
    ...

class LLM:

    def __init__(self, model: str | os.PathLike[str] | None=None, *, config: str | os.PathLike[str] | None=None, progress: Progress=no_progress, **values: Any) -> None:
        ...

    @property
    def engine(self) -> Engine:
        ...

    @property
    def shadow(self) -> ShadowReport | None:
        ...

    @property
    def vocab_size(self) -> int:
        ...

    def generate(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None=None) -> list[RequestOutput]:
        ...

    def stream(self, prompt: Prompt, params: SamplingParams | None=None) -> Iterator[Delta]:
        ...

    def chat(self, messages: list[dict[str, Any]], params: SamplingParams | None=None) -> RequestOutput:
        ...

    def default_params(self, **values: Any) -> SamplingParams:
        ...

    def chat_prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        ...

    def reset_prefix_cache(self) -> None:
        ...

    def close(self) -> None:
        ...

def as_dict(position: TokenLogprobs) -> dict[int, float]:
    ...
