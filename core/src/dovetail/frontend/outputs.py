"""Convert the engine's outputs to what a user sees: text, stop strings, finish reasons."""

from __future__ import annotations

import msgspec

from dovetail.errors import ERRORS, DovetailError
from dovetail.frontend.detokenizer import StopStrings, detokenizer
from dovetail.frontend.tokenizer import Tokenizer
from dovetail.types import FinishReason, Request, RequestTimes, SequenceOutput, TokenLogprobs


class Delta(msgspec.Struct, gc=False):
    """New output of one sample of a request. The concatenated deltas of a sample are its whole
    output."""

    index: int
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the sample."""
    num_cached_tokens: int = 0
    """Number of prompt tokens found in the prefix cache when the sample started."""
    times: RequestTimes | None = None
    """Set in one delta of the sample, the one with its first token."""

    def extend(self, later: Delta) -> None:
        """Merge a later delta of the same sample into this one."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.prompt_logprobs += later.prompt_logprobs
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason
        self.num_cached_tokens = later.num_cached_tokens
        self.times = self.times or later.times


class SampleState:
    """Converts the tokens of one sample to text.

    If the text is not streamed and has no stop strings to find, it is converted all at once at the
    end.
    """

    def __init__(
        self, request: Request, index: int, tokenizer: Tokenizer | None, *, stream: bool
    ) -> None:
        params = request.params
        self.index = index
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.times: RequestTimes | None = None
        """Times that have not been returned yet."""
        self.finished = False
        self._params = params
        self._stops = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self._detokenizer = (
            detokenizer(
                tokenizer, request.prompt_token_ids, skip_special_tokens=params.skip_special_tokens
            )
            if tokenizer is not None
            else None
        )
        self._gathered = (
            None if stream or params.stop else SequenceOutput(request.request_id, index, [])
        )

    def push(self, output: SequenceOutput) -> Delta | None:
        """Add outputs of the engine. If a stop string ends the sample, `finish_reason` is set and
        later tokens are dropped."""
        gathered = self._gathered
        if gathered is not None:
            gathered.token_ids += output.token_ids
            if output.logprobs:
                gathered.logprobs += output.logprobs
            if output.prompt_logprobs:
                gathered.prompt_logprobs += output.prompt_logprobs
            if output.finish_reason is None:
                return None
            gathered.finish_reason, gathered.stop_token_id = (
                output.finish_reason,
                output.stop_token_id,
            )
            output = gathered
        return self._find_stop(output) if self._params.stop else self._convert(output)

    def _convert(self, output: SequenceOutput) -> Delta:
        """Convert all tokens at once."""
        token_ids, reason = output.token_ids, output.finish_reason
        self.num_tokens += len(token_ids)
        text = ""
        if self._detokenizer is not None:
            text = self._detokenizer.push(token_ids[:-1] if self._hides_last(output) else token_ids)
            if reason is not None and reason != "abort":
                text += self._detokenizer.flush()
        self.finished = reason is not None
        return Delta(
            self.index,
            text,
            token_ids,
            output.logprobs,
            output.prompt_logprobs,
            reason,
            output.stop_token_id,
        )

    def _find_stop(self, output: SequenceOutput) -> Delta:
        """Convert token by token; tokens after the one that completes a stop string are dropped."""
        delta = Delta(self.index, prompt_logprobs=output.prompt_logprobs)
        last = len(output.token_ids) - 1
        for i, token in enumerate(output.token_ids):
            self.num_tokens += 1
            delta.token_ids.append(token)
            delta.logprobs += output.logprobs[i : i + 1]
            piece = ""
            if self._detokenizer is not None and not (i == last and self._hides_last(output)):
                piece = self._detokenizer.push([token])
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

    def _hides_last(self, output: SequenceOutput) -> bool:
        """Return whether the last token is not part of the text: it ended the sequence, and
        including it was not requested."""
        return output.finish_reason == "stop" and not self._params.include_stop_str_in_output

    def _emit(self, delta: Delta, piece: str) -> bool:
        text, stop = self._stops.push(piece, check=self.num_tokens > self._params.min_tokens)
        delta.text += text
        if stop is not None:
            delta.finish_reason, delta.stop_reason = "stop", stop
            self.finished = True
        return stop is not None


class RequestState:
    """The samples of one request in the front-end."""

    def __init__(
        self, request: Request, tokenizer: Tokenizer | None, *, stream: bool = True
    ) -> None:
        """Create the state. Without `stream`, the output of a sample is returned when it has
        ended."""
        self.request = request
        self.samples = [
            SampleState(request, i, tokenizer, stream=stream) for i in range(request.params.n)
        ]
        self._num_running = request.params.n

    @property
    def finished(self) -> bool:
        return self._num_running == 0

    def push(self, output: SequenceOutput) -> tuple[Delta | None, bool]:
        """Add outputs of the engine. Returns (delta or None, whether the engine must abort this
        sample because a stop string ended it).

        Raises the error that the engine reports for the request.
        """
        sample = self.samples[output.sample_index]
        if sample.finished:
            return None, False
        if output.error is not None:
            code, message = output.error
            raise ERRORS.get(code, DovetailError)(message)
        if output.num_cached_tokens:
            sample.num_cached_tokens = output.num_cached_tokens
        delta = sample.push(output)
        sample.times = sample.times or output.times
        if delta is not None:
            delta.num_cached_tokens = sample.num_cached_tokens
            delta.times, sample.times = sample.times, None
        if not sample.finished:
            return delta, False
        self._num_running -= 1
        return delta, output.finish_reason is None
