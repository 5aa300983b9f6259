from __future__ import annotations
import msgspec
from dovetail.errors import ERRORS, DovetailError
from dovetail.frontend.detokenizer import StopStrings, detokenizer
from dovetail.frontend.tokenizer import Tokenizer
from dovetail.types import FinishReason, Request, RequestTimes, SequenceOutput, TokenLogprobs

class Delta(msgspec.Struct, gc=False):
    index: int
    text: str = ''
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    times: RequestTimes | None = None

    def extend(self, later: Delta) -> None:
        ...

class SampleState:

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer | None, *, stream: bool) -> None:
        ...

    def push(self, output: SequenceOutput) -> Delta | None:
        ...

class RequestState:

    def __init__(self, request: Request, tokenizer: Tokenizer | None, *, stream: bool=True) -> None:
        ...

    @property
    def finished(self) -> bool:
        ...

    def push(self, output: SequenceOutput) -> tuple[Delta | None, bool]:
        ...
