"""From the engine's tokens to what a user sees: text, stop strings, finish reasons."""

from __future__ import annotations

from dataclasses import dataclass, field

from dovetail.errors import ERRORS, DovetailError
from dovetail.frontend.detokenizer import Detokenizer, StopStrings
from dovetail.frontend.tokenizer import Tokenizer
from dovetail.types import FinishReason, Request, SequenceOutput, TokenLogprobs


@dataclass
class Delta:
    """News of one sample of a request. Concatenated, the deltas of a sample are its whole output."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended it."""

    def extend(self, later: Delta) -> None:
        """Merge a later delta of the same sample into this one."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.prompt_logprobs += later.prompt_logprobs
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason


class SampleState:
    """One sample's way from tokens to text."""

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer | None) -> None:
        params = request.params
        self.index = index
        self.num_tokens = 0
        self.finished = False
        self._params = params
        self._stops = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self._detokenizer = (
            Detokenizer(tokenizer, request.prompt_token_ids, skip_special_tokens=params.skip_special_tokens)
            if tokenizer is not None
            else None
        )

    def push(self, output: SequenceOutput) -> Delta:
        """Take the engine's news. A stop string ends the sample here: `finish_reason` is set, the rest is dropped."""
        delta = Delta(self.index, prompt_logprobs=output.prompt_logprobs)
        for i, token in enumerate(output.token_ids):
            self.num_tokens += 1
            delta.token_ids.append(token)
            delta.logprobs += output.logprobs[i : i + 1]
            # A token that ends the sequence is no part of its text, unless asked for.
            ends = output.finish_reason == "stop" and i == len(output.token_ids) - 1
            ends = ends and not self._params.include_stop_str_in_output
            piece = "" if self._detokenizer is None or ends else self._detokenizer.push(token)
            if self._emit(delta, piece):
                return delta
        if output.finish_reason is not None:
            rest = self._detokenizer.flush() if self._detokenizer is not None else ""
            if output.finish_reason != "abort" and self._emit(delta, rest):
                return delta
            delta.text += self._stops.flush()
            delta.finish_reason = output.finish_reason
            delta.stop_reason = output.stop_token_id
            self.finished = True
        return delta

    def _emit(self, delta: Delta, piece: str) -> bool:
        text, stop = self._stops.push(piece, check=self.num_tokens > self._params.min_tokens)
        delta.text += text
        if stop is not None:
            delta.finish_reason, delta.stop_reason = "stop", stop
            self.finished = True
        return stop is not None


class RequestState:
    """All samples of one request, in the front-end."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self.request = request
        self.samples = [SampleState(request, i, tokenizer) for i in range(request.params.n)]

    @property
    def finished(self) -> bool:
        return all(s.finished for s in self.samples)

    def push(self, output: SequenceOutput) -> tuple[Delta | None, bool]:
        """Returns (delta or None, whether the engine must be told to abort this sample: a stop string ended it).

        Raises the error that the engine reports for the request.
        """
        sample = self.samples[output.sample_index]
        if sample.finished:
            return None, False
        if output.error is not None:
            code, message = output.error
            raise ERRORS.get(code, DovetailError)(message)
        delta = sample.push(output)
        return delta, sample.finished and output.finish_reason is None
