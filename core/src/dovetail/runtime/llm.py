"""Provide `LLM`, an engine in this process, for scripts and notebooks."""

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
    """The output of one sample."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None
    """One `{token_id: logprob}` per position, the sampled token first."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass
class RequestOutput:
    """The output for one prompt. `text`, `token_ids`, `logprobs` and `finish_reason` are those of
    the first sample."""

    request_id: str
    prompt: Prompt
    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[dict[int, float] | None] | None = None
    """One entry per prompt token. The first is None, because nothing comes before it."""
    num_cached_tokens: int = 0
    """Number of prompt tokens found in the prefix cache."""

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> list[dict[int, float]] | None:
        return self.outputs[0].logprobs

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.outputs[0].finish_reason


def no_progress(what: str, done: int, total: int) -> None:
    """Ignore progress."""


class LLM:
    """A loaded model that generates text.

        with LLM("demo") as llm:
            print(llm.generate(["import os"], SamplingParams(max_tokens=40))[0].text)

    Keyword arguments are the keys of an engine config: `LLM("demo", scheduler={"max_num_seqs": 8},
    dtype="float32")`. Several streams may be open at once in one thread; an LLM must not be used by
    several threads at once. Ctrl-C takes effect at the end of the running step (a second one takes
    effect at once) and leaves the engine usable.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        config: str | os.PathLike[str] | None = None,
        progress: Progress = no_progress,
        **values: Any,
    ) -> None:
        self.config = load_config(
            config, model=None if model is None else os.fspath(model), **values
        )
        registry = load_registry()
        self.plan: Plan = resolve(self.config, registry)
        folder = Path(self.plan.folder)
        try:
            self.tokenizer: Tokenizer | None = Tokenizer(folder)
        except CheckpointError:
            # Prompts of token ids still work; a text prompt is rejected with the reason.
            if (folder / "tokenizer.json").exists():
                raise
            self.tokenizer = None
        self._maker = RequestMaker(model_facts(folder), self.plan.max_model_len, self.tokenizer)
        self._defaults = sampling_defaults(folder)
        self._outputs: dict[str, deque[SequenceOutput]] = {}
        """Queue for the outputs of each request in flight, by request id. A step may be run for any
        request and distributes the outputs of all of them."""
        self.attestation = Attestation()
        self._engine: Engine | None = build_engine(self.plan, progress, registry, self.attestation)

    @property
    def engine(self) -> Engine:
        """The engine, for observers and tests. Raises `EngineUnavailable` after `close`."""
        if self._engine is None:
            raise EngineUnavailable("this LLM has been closed")
        return self._engine

    @property
    def shadow(self) -> ShadowReport | None:
        """Results of the shadow run so far, or None if there is none."""
        return shadow_report_of(self.engine.worker)

    @property
    def vocab_size(self) -> int:
        return self._maker.model.vocab_size

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, each a string or a list of token ids. Returns a list in the same order,
        even for a single prompt.

        `params` applies to all prompts, or is a list with one entry per prompt; None means
        `default_params()`. Raises `InvalidRequest` before any work if a prompt or a parameter is
        invalid, and the engine's error if it fails.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        batch: list[Prompt] = [prompts] if single else list(prompts)  # type: ignore[list-item, arg-type]
        if params is None or isinstance(params, SamplingParams):
            each = [params or self.default_params()] * len(batch)
        else:
            each = list(params)
        if len(each) != len(batch):
            raise InvalidRequest(
                f"{len(batch)} prompts but {len(each)} SamplingParams", param="params"
            )
        requests = [self._maker.make(p, s) for p, s in zip(batch, each, strict=True)]
        states = [RequestState(r, self.tokenizer, stream=False) for r in requests]
        outputs = [_empty(p, state) for p, state in zip(batch, states, strict=True)]
        index = {state.request.request_id: i for i, state in enumerate(states)}
        for request_id, delta in self._run(states):
            _extend(outputs[index[request_id]], delta)
        return outputs

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Complete one prompt and yield text as it is generated."""
        state = RequestState(
            self._maker.make(prompt, params or self.default_params()), self.tokenizer
        )
        for _, delta in self._run([state]):
            yield delta

    def chat(
        self, messages: list[dict[str, Any]], params: SamplingParams | None = None
    ) -> RequestOutput:
        """Complete a conversation of messages with `role` and `content`, using the model's chat
        template."""
        return self.generate(
            self.chat_prompt(messages), params or self.default_params(max_tokens=None)
        )[0]

    def default_params(self, **values: Any) -> SamplingParams:
        """Return the sampling parameters of the model's generation_config.json, which the server
        uses too; `values` override them."""
        return SamplingParams(**{**self._defaults, **values})

    def chat_prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Return the token ids of a conversation."""
        return self._maker.encode_chat(messages)

    def _run(self, states: list[RequestState]) -> Iterator[tuple[str, Delta]]:
        """Run steps until all requests are finished. If the caller stops early or an error is
        raised, the remaining requests are aborted."""
        engine = self.engine
        n, most = max((s.request.params.n for s in states), default=0), engine.max_num_waiting
        if n > most:
            raise InvalidRequest(
                f"n is {n}, but only {most} sequences may wait (max_num_waiting)", param="n"
            )
        live = {s.request.request_id: s for s in states}
        outputs: deque[SequenceOutput] = deque()
        pending = list(reversed(states))
        try:
            while live:
                # Queue as many as may wait; the rest follow when these have started.
                if pending:
                    self._enqueue(pending, outputs)
                if not outputs:
                    self._step()
                while outputs:
                    output = outputs.popleft()
                    state = live.get(output.request_id)
                    if state is None:
                        continue
                    delta, abort = state.push(output)
                    if abort:
                        with _interrupts_held():
                            engine.abort(output.request_id, output.sample_index)
                    if delta is not None:
                        if state.finished:
                            del live[output.request_id]
                            self._outputs.pop(output.request_id, None)
                        yield output.request_id, delta
        finally:
            with _interrupts_held():
                for s in states:
                    self._outputs.pop(s.request.request_id, None)
                    engine.abort(s.request.request_id)
            # The overlapped loop may have a step in flight for requests that have ended, which
            # holds their blocks until then.
            while self._engine is not None and any(
                s.request.request_id in engine.requests for s in states
            ):
                self._step()
            self._distribute(engine.take_outputs())

    def _enqueue(self, pending: list[RequestState], outputs: deque[SequenceOutput]) -> None:
        """Queue as many requests as may wait, taken from the end of `pending`."""
        engine = self.engine
        with _interrupts_held():
            while (
                pending
                and len(engine.scheduler.waiting) + pending[-1].request.params.n
                <= engine.max_num_waiting
            ):
                request = pending.pop().request
                self._outputs[request.request_id] = outputs
                engine.add(request)

    def _step(self) -> None:
        """Run one step for all requests."""
        with _interrupts_held():
            self._distribute(self.engine.step())

    def _distribute(self, outputs: list[SequenceOutput]) -> None:
        """Add outputs to the queues of their requests; those of abandoned requests are dropped."""
        for output in outputs:
            waiting = self._outputs.get(output.request_id)
            if waiting is not None:
                waiting.append(output)

    def reset_prefix_cache(self) -> None:
        """Clear the prefix cache. Running requests and open streams are not affected."""
        self.engine.kv.reset_prefix_cache()

    def close(self) -> None:
        """Release the device. Calling it again has no effect."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.worker.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _empty(prompt: Prompt, state: RequestState) -> RequestOutput:
    params = state.request.params
    completions = [
        Completion(i, logprobs=None if params.logprobs is None else []) for i in range(params.n)
    ]
    prompt_logprobs: list[dict[int, float] | None] | None = (
        None if params.prompt_logprobs is None else [None]
    )
    return RequestOutput(
        state.request.request_id,
        prompt,
        state.request.prompt_token_ids,
        completions,
        prompt_logprobs,
    )


def _extend(output: RequestOutput, delta: Delta) -> None:
    completion = output.outputs[delta.index]
    completion.text += delta.text
    completion.token_ids += delta.token_ids
    if completion.logprobs is not None:
        completion.logprobs += [as_dict(p) for p in delta.logprobs]
    if output.prompt_logprobs is not None and delta.index == 0:
        output.prompt_logprobs += [as_dict(p) for p in delta.prompt_logprobs]
    if delta.index == 0:
        output.num_cached_tokens = delta.num_cached_tokens
    if delta.finish_reason is not None:
        completion.finish_reason, completion.stop_reason = delta.finish_reason, delta.stop_reason


def as_dict(position: TokenLogprobs) -> dict[int, float]:
    """Convert to `{token_id: logprob}`, with the token at this position first."""
    return dict(zip(position.token_ids, position.logprobs, strict=True))


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block, so that no state change is interrupted; a second
    Ctrl-C is not delayed."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield  # other threads are never interrupted, and an ignored signal needs no delay
        return
    held: list[Any] = []

    def hold(number: int, frame: Any) -> None:
        if held:
            handler(number, frame)
        held.append(frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            handler(signal.SIGINT, held[0])
