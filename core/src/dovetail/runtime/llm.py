"""`LLM`: an engine in this process, for scripts and notebooks."""

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
    """One sample."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None
    """One `{token_id: logprob}` a position, the sampled token first."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass
class RequestOutput:
    """The answer to one prompt. `text`, `token_ids`, `logprobs` and `finish_reason` are the first
    sample's."""

    request_id: str
    prompt: Prompt
    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[dict[int, float] | None] | None = None
    """The first is None: nothing comes before it."""
    num_cached_tokens: int = 0
    """Of the prompt, found in the prefix cache."""

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
    """Tell nobody."""


class LLM:
    """Load a model and generate.

        with LLM("demo") as llm:
            print(llm.generate(["import os"], SamplingParams(max_tokens=40))[0].text)

    Keywords are the keys of an engine config: `LLM("demo", scheduler={"max_num_seqs": 8},
    dtype="float32")`. Several streams may be open at once, in one thread; not for use from several
    threads at once. Ctrl-C takes effect at the end of the step that is running (a second one, at
    once) and leaves an engine that can be used further.
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
            # Token ids still work; a prompt that needs the tokenizer is refused with the reason.
            if (folder / "tokenizer.json").exists():
                raise
            self.tokenizer = None
        self._maker = RequestMaker(model_facts(folder), self.plan.max_model_len, self.tokenizer)
        self._defaults = sampling_defaults(folder)
        self._outputs: dict[str, deque[SequenceOutput]] = {}
        """By id of a request in flight, where its outputs go. Whoever runs a step files those of
        all requests."""
        self.attestation = Attestation()
        self._engine: Engine | None = build_engine(self.plan, progress, registry, self.attestation)

    @property
    def engine(self) -> Engine:
        """The loop itself, for observers and tests. Raises `EngineUnavailable` after `close`."""
        if self._engine is None:
            raise EngineUnavailable("this LLM has been closed")
        return self._engine

    @property
    def shadow(self) -> ShadowReport | None:
        """What the candidates of a shadow run have shown so far; None without one."""
        return shadow_report_of(self.engine.worker)

    @property
    def vocab_size(self) -> int:
        return self._maker.model.vocab_size

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, each a string or a list of token ids; results in their order (a list
        for a single one too).

        `params` is for all, or one for each; None is `default_params()`. Raises `InvalidRequest`
        before any work if a prompt or a parameter is bad, and the engine's error if it fails.
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
        """Complete one prompt, giving out text as it comes."""
        state = RequestState(
            self._maker.make(prompt, params or self.default_params()), self.tokenizer
        )
        for _, delta in self._run([state]):
            yield delta

    def chat(
        self, messages: list[dict[str, Any]], params: SamplingParams | None = None
    ) -> RequestOutput:
        """Answer a conversation: messages of `role` and `content`, through the model's chat
        template."""
        return self.generate(
            self.chat_prompt(messages), params or self.default_params(max_tokens=None)
        )[0]

    def default_params(self, **values: Any) -> SamplingParams:
        """Sampling parameters as the model's generation_config.json has them, as in the server;
        `values` go first."""
        return SamplingParams(**{**self._defaults, **values})

    def chat_prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation."""
        return self._maker.encode_chat(messages)

    def _run(self, states: list[RequestState]) -> Iterator[tuple[str, Delta]]:
        """Step until all are finished. What is left, if the caller stops early or an error is
        raised, is aborted."""
        engine = self.engine
        n, most = max((s.request.params.n for s in states), default=0), engine.max_num_waiting
        if n > most:
            raise InvalidRequest(
                f"n is {n}, and only {most} sequences may wait (max_num_waiting)", param="n"
            )
        live = {s.request.request_id: s for s in states}
        outputs: deque[SequenceOutput] = deque()
        pending = list(reversed(states))
        try:
            while live:
                # Feed as many as may wait; the rest follow as these start.
                if pending:
                    self._feed(pending, outputs)
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
            # The overlapped loop may have a step in flight for what has ended, and until then its
            # blocks.
            while self._engine is not None and any(
                s.request.request_id in engine.requests for s in states
            ):
                self._step()
            self._file(engine.take_outputs())

    def _feed(self, pending: list[RequestState], outputs: deque[SequenceOutput]) -> None:
        """Hand over as many as may wait, from the end."""
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
        """One step for all requests."""
        with _interrupts_held():
            self._file(self.engine.step())

    def _file(self, outputs: list[SequenceOutput]) -> None:
        """To whoever waits for them; those of requests that were left are dropped."""
        for output in outputs:
            waiting = self._outputs.get(output.request_id)
            if waiting is not None:
                waiting.append(output)

    def reset_prefix_cache(self) -> None:
        """Find nothing of what has been computed so far. Loses nothing: a stream that is open goes
        on."""
        self.engine.kv.reset_prefix_cache()

    def close(self) -> None:
        """Free the device. Idempotent."""
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
    """`{token_id: logprob}`, the token that stands there first."""
    return dict(zip(position.token_ids, position.logprobs, strict=True))


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Within it, Ctrl-C waits for the end, so that nothing is cut in the middle of a change; a
    second one does not wait."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield  # another thread is never interrupted, and what is ignored needs no holding
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
