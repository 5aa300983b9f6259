"""A plugin that misbehaves on demand: a provider "chaos" for every extension point, which does what
it should until it is told not to.

Each holds something sound (`inner`) and lets one of its methods go wrong: `Chaotic` says how.
Installed by `install` of `dovetail_testing.plugin`, as a distribution `dovetail-chaos`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dovetail.interfaces.architecture import ArchitectureCapabilities
from dovetail.interfaces.attention import AttentionCapabilities
from dovetail.interfaces.model import ModelSource
from dovetail.interfaces.quantization import IN, OUT, Parameter, QuantizationCapabilities
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import (
    DrafterOptions,
    KVCacheOptions,
    Options,
    Provider,
    SchedulerOptions,
)

VICTIM = 17
"""A request whose prompt begins with it is the one that request-scoped parts fail at."""
NAN = float("nan")
Wrong = Callable[[str, Any, tuple[Any, ...]], Any]
"""(fault, what the sound method returned, its arguments) -> what is returned instead"""


class Chaotic:
    """`inner`, whose method `method` goes wrong at its `at`-th call, or at every one from there on
    if it is slow."""

    def __init__(
        self,
        options: Any,
        inner: Any,
        method: str,
        wrong: Wrong | None = None,
        *,
        only_victim: bool = False,
    ) -> None:
        self._fault, self._at, self._inner, self._method = (
            options.fault,
            options.at,
            inner,
            options.method or method,
        )
        self._wrong, self._only_victim, self._calls = wrong, only_victim and not options.method, 0
        self._once = options.once

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return partial(self._call, found) if name == self._method else found

    def __call__(self, *args: Any) -> Any:
        return self._call(self._inner, *args)

    def _call(self, sound: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._calls += 1
        due = args[0].tokens[0] == VICTIM if self._only_victim else self._calls == self._at
        if self._fault == "slow" and self._calls >= self._at:
            time.sleep(0.05)
        elif due and self._fault == "raise":
            raise RuntimeError("chaos")
        elif due and self._fault == "hang" and is_first(self._once):
            time.sleep(3600)
        elif due and self._fault == "crash":
            os.abort()
        elif self._fault == "starve" and self._calls >= self._at:
            return None
        result = sound(*args, **kwargs)
        if self._fault == "off" and self._wrong is not None and self._calls >= self._at:
            return self._wrong("off", result, args)
        if due and self._wrong is not None and self._fault in ("nan", "shape", "dtype"):
            return self._wrong(self._fault, result, args)
        return result


def is_first(marker: str) -> bool:
    """Whether nobody, in any process, has asked before with this file; always without one."""
    if not marker:
        return True
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class Fault(Options):
    fault: str = "none"
    at: int = 8
    method: str = ""
    """That goes wrong, in place of the usual one."""
    once: str = ""
    """A file, made by the first process that hangs: the others do not."""


class KVCacheFault(KVCacheOptions, Fault):
    pass


class SchedulerFault(SchedulerOptions, Fault):
    pass


class DrafterFault(DrafterOptions, Fault):
    pass


def building(make: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def build(context: Any, options: Any) -> Any:
        if options.fault == "build":
            raise RuntimeError("chaos")
        if options.fault == "hang" and options.method == "build" and is_first(options.once):
            time.sleep(3600)
        return object() if options.fault == "build-wrong" else make(context, options)

    return build


# Request-scoped.


class Repeats:
    """A drafter: the last token again."""

    def propose(self, seq: Any, max_tokens: int) -> list[int]:
        return [seq.tokens[-1]] * max_tokens

    def forget(self, seq_id: int) -> None:
        pass


def drafter(context: Any, options: Any) -> Any:
    wrong = {"nan": [NAN], "shape": [[1]], "dtype": (1,)}
    return Chaotic(
        options, Repeats(), "propose", lambda fault, result, args: wrong[fault], only_victim=True
    )


def prefix_cache(context: Any, options: Any) -> Any:
    from dovetail_prefix_cache.eviction import LeastRecentlyUsed
    from dovetail_prefix_cache.index import HashIndex

    wrong = {"nan": [(NAN,)], "shape": [(1, 2, 3, 4)], "dtype": "abc"}
    index = HashIndex(context.kv_groups[0].block_size, list(context.num_blocks), LeastRecentlyUsed)
    return Chaotic(
        options, index, "match", lambda fault, result, args: wrong[fault], only_victim=True
    )


def eviction(context: Any, options: Any) -> Any:
    from dovetail_prefix_cache.eviction import LeastRecentlyUsed

    wrong = {"nan": NAN, "shape": [1, 2], "dtype": "one"}
    return lambda n: Chaotic(
        options, LeastRecentlyUsed(n), "pop", lambda fault, result, args: wrong[fault]
    )


def routes(context: Any, options: Any) -> Any:
    from fastapi import APIRouter
    from fastapi.responses import JSONResponse

    def make(engine: Any) -> APIRouter:
        router = APIRouter()

        @router.get("/chaos/{fault}", response_model=dict[str, float])
        def chaos(fault: str) -> Any:
            if fault == "slow":
                time.sleep(0.5)
            if fault == "raise":
                raise RuntimeError("chaos")
            wrong: dict[str, Any] = {"shape": [1], "dtype": {"x": "y"}}
            return JSONResponse({"x": NAN}) if fault == "nan" else wrong.get(fault, {"x": 1.0})

        return router

    return make


# Step-scoped.


def scheduler(context: Any, options: Any) -> Any:
    from dovetail.engine.scheduler import TokenBudgetScheduler, fcfs

    def wrong(fault: str, plan: Any, args: Any) -> Any:
        if fault == "nan":
            plan.num_tokens[0] = NAN
        elif fault == "shape":
            plan.num_computed.pop()
        else:
            plan.seq_ids = list(map(str, plan.seq_ids))
        return plan

    limits = options.model_dump(include=set(SchedulerOptions.model_fields))
    return Chaotic(options, TokenBudgetScheduler(context.kv, fcfs, **limits), "schedule", wrong)


def kv_cache(context: Any, options: Any) -> Any:
    from dovetail.engine.kv_cache import PagedKVCache

    wrong = {"nan": [[NAN]], "shape": [], "dtype": [["1"]]}
    inner = PagedKVCache(list(context.kv_groups), list(context.num_blocks))
    return Chaotic(options, inner, "grow", lambda fault, result, args: wrong[fault])


def worker(context: Any, options: Any) -> Any:
    from dovetail_testing.plugin import SimulatedOptions, _worker

    def wrong(fault: str, result: Any, args: Any) -> Any:
        if fault == "shape":
            result.token_ids.pop()
        else:
            result.token_ids[0] = [NAN if fault == "nan" else "1"]
        return result

    return Chaotic(options, _worker(context, SimulatedOptions()), "sample", wrong)


def attention(context: Any, options: Any) -> Any:
    from dovetail_worker_torch.attention import ReferenceAttention

    def wrong(fault: str, result: Any, args: Any) -> None:
        out = args[6]
        if fault == "nan":
            out[0] = NAN
        elif fault == "off":
            out.mul_(1.5)
        elif fault == "shape":
            out.resize_(1, 2, 3)
        else:
            out.data = out.data.double()

    return Chaotic(options, ReferenceAttention(), "run", wrong)


class PlainScheme:
    """Plain weights, through a quantization scheme."""

    unused: tuple[str, ...] = ()

    def parameters(self, layer: Any) -> Any:
        return {"weight": Parameter((OUT, IN), layer.dtype)}

    def linear(self, layer: Any, tensors: Any) -> Any:
        import torch.nn.functional as F

        weight = tensors["weight"]
        return lambda x: F.linear(x, weight)

    def nbytes(self, layer: Any) -> int:
        return 4 * int(layer.in_features * layer.out_features)

    def kv_scales(self, name: str) -> None:
        return None

    def dequantize(self, layer: Any, tensors: Any) -> Any:
        return tensors["weight"]

    def quantize(self, layer: Any, weight: Any) -> Any:
        import torch

        return {"weight": weight.to(getattr(torch, layer.dtype))}


class ChaoticScheme(PlainScheme):
    def __init__(self, options: Any) -> None:
        self._options = options

    def linear(self, layer: Any, tensors: Any) -> Any:
        def wrong(fault: str, y: Any, args: Any) -> Any:
            if fault == "nan":
                y[0] = NAN
            return {
                "nan": lambda: y,
                "off": lambda: y * 1.5,
                "shape": lambda: y[:, 1:],
                "dtype": y.double,
            }[fault]()

        sound = super().linear(layer, tensors)
        return (
            Chaotic(self._options, sound, "", wrong)
            if "layers.1.mlp.down_proj" in layer.name
            else sound
        )


class ChaoticArchitecture:
    def __init__(self, options: Any) -> None:
        self._options = options

    def model(self, build: Any) -> Any:
        from dovetail_models_torch.decoder import DecoderArchitecture

        def wrong(fault: str, hidden: Any, args: Any) -> Any:
            if fault == "nan":
                hidden[0] = NAN
            return {"nan": lambda: hidden, "shape": lambda: hidden[1:], "dtype": hidden.double}[
                fault
            ]()

        def wrong_logits(fault: str, logits: Any, args: Any) -> Any:
            return {"shape": lambda: logits[:, 1:], "dtype": logits.double}[fault]()

        model = DecoderArchitecture().model(build)
        if self._options.fault == "dtype":
            return Chaotic(self._options, model, "logits", wrong_logits)
        return Chaotic(self._options, model, "forward", wrong)


@hookimpl
def dovetail_models() -> list[Provider[Any]]:
    def build(context: Any, options: Any) -> ModelSource:
        raise RuntimeError("chaos")

    return [Provider("chaos", "cannot be built", build)]


@hookimpl
def dovetail_quantization() -> list[Provider[Any]]:
    can = QuantizationCapabilities(on_the_fly=True)
    return [Provider("chaos", "misbehaves", building(lambda c, o: ChaoticScheme(o)), Fault, can)]


@hookimpl
def dovetail_architectures() -> list[Provider[Any]]:
    can = ArchitectureCapabilities(("LlamaForCausalLM",))
    return [
        Provider(
            "chaos",
            "misbehaves",
            building(lambda c, o: ChaoticArchitecture(o)),
            Fault,
            can,
            priority=-1,
        )
    ]


@hookimpl
def dovetail_workers() -> list[Provider[Any]]:
    return [Provider("chaos", "misbehaves", building(worker), Fault, priority=-1)]


@hookimpl
def dovetail_attention() -> list[Provider[Any]]:
    can = AttentionCapabilities(sliding_window=True)
    return [Provider("chaos", "misbehaves", building(attention), Fault, can, priority=-1)]


@hookimpl
def dovetail_kv_caches() -> list[Provider[Any]]:
    return [Provider("chaos", "misbehaves", building(kv_cache), KVCacheFault, priority=-1)]


@hookimpl
def dovetail_schedulers() -> list[Provider[Any]]:
    return [Provider("chaos", "misbehaves", building(scheduler), SchedulerFault, priority=-1)]


@hookimpl
def dovetail_prefix_caches() -> list[Provider[Any]]:
    return [Provider("chaos", "misbehaves", building(prefix_cache), Fault, priority=-1)]


@hookimpl
def dovetail_drafters() -> list[Provider[Any]]:
    return [Provider("chaos", "misbehaves", building(drafter), DrafterFault, priority=-1)]


@hookimpl
def dovetail_servers() -> list[Provider[Any]]:
    return [Provider("chaos", "misbehaves", building(lambda c, o: None), Fault, priority=-1)]


@hookimpl(optionalhook=True)
def dovetail_eviction_policies() -> list[Provider[Any]]:
    return [Provider("chaos", "misbehaves", building(eviction), Fault, priority=-1)]


@hookimpl(optionalhook=True)
def dovetail_routes() -> list[Provider[Any]]:
    return [Provider("chaos", "misbehaves", building(routes), Fault)]
