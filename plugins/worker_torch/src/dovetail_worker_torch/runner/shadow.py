"""Shadow runs: a candidate computes what a trusted provider has just computed, from the same
inputs, and is compared with it.

A sampled step runs as every other does, on the trusted providers, whose outputs are the step's.
Beside them each layer's attention is computed again by the candidate, in a cache of its own, into
which the blocks that the step reads are imported through the canonical layout just before; and each
linear layer by the candidate scheme's, on the same input. A candidate that raises is switched off.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dovetail.interfaces.architecture import Linear, Target
from dovetail.interfaces.attention import (
    AttentionBackend,
    AttentionBatch,
    AttentionLayer,
    KVCacheSpec,
)
from dovetail.interfaces.shadow import ShadowLayer, ShadowReport
from dovetail.types import KVGroup

log = logging.getLogger(__name__)


class Shadow:
    """Which steps are sampled, and what they have shown. One object a worker."""

    def __init__(self, share: float, names: Mapping[str, str], device: torch.device) -> None:
        """`names`: of the candidates, `dist:name` by key of the plan."""
        self.report = ShadowReport(share)
        self.active = False
        """This step is sampled."""
        self._names, self._device = names, device
        self._layers: dict[tuple[str, str], ShadowLayer] = {}

    def begin_step(self) -> None:
        """Steps are sampled evenly: one in ten, for a share of 0.1."""
        report = self.report
        report.num_steps += 1
        # Not added up step by step: ten times 0.1 is less than 1.
        self.active = int(report.num_steps * report.share + 1e-9) > report.num_sampled_steps
        report.num_sampled_steps += self.active

    def runs(self, key: str) -> bool:
        return self.active and key not in self.report.failed

    def attempt(self, key: str, work: Callable[[], Any]) -> Any:
        """Let a candidate work; None, and no more of it, if it raises."""
        try:
            return work()
        except Exception as e:
            self.report.failed[key] = f"{type(e).__name__}: {e}"
            log.error(
                "%s (%s) failed and is switched off: %s",
                key,
                self._names[key],
                self.report.failed[key],
            )
            return None

    def timed(self, work: Callable[[], Tensor]) -> tuple[Tensor, float]:
        """What it returns, and seconds."""
        self._wait()
        began = time.perf_counter()
        result = work()
        self._wait()
        return result, time.perf_counter() - began

    def compare(
        self,
        key: str,
        layer: str,
        trusted: Tensor,
        work: Callable[[], Tensor],
        trusted_seconds: float,
    ) -> None:
        """Let the candidate compute one layer, and note how far it is from `trusted`, which took
        `trusted_seconds`."""

        def note() -> None:
            candidate, seconds = self.timed(work)
            if candidate.shape != trusted.shape:
                raise ValueError(f"{layer}: gave {[*candidate.shape]}, not {[*trusted.shape]}")
            difference = (candidate.float() - trusted.float()).abs().max().item()
            largest = trusted.float().abs().max().item()
            seen = self._layers.get((key, layer))
            if seen is None:
                seen = self._layers[key, layer] = ShadowLayer(key, layer)
                self.report.layers.append(seen)
            seen.num_compared += 1
            seen.trusted_seconds += trusted_seconds
            seen.candidate_seconds += seconds
            # Once NaN, it stays: `max` would forget it.
            if seen.max_abs_error == seen.max_abs_error and not difference <= seen.max_abs_error:
                seen.max_abs_error = difference
            relative = difference / largest if largest else difference
            if seen.max_rel_error == seen.max_rel_error and not relative <= seen.max_rel_error:
                seen.max_rel_error = relative

        self.attempt(key, note)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class ShadowLinear:
    """A linear layer that answers, and the candidate's beside it. Both read their weights while the
    checkpoint is read."""

    def __init__(
        self, shadow: Shadow, key: str, name: str, trusted: Linear, candidate: Linear
    ) -> None:
        self._shadow, self._key, self._name = shadow, key, name
        self._trusted, self._candidate = trusted, candidate

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if not self._shadow.runs(self._key):
            return self._call(x, dtype)
        given = x.clone()
        y, seconds = self._shadow.timed(lambda: self._call(x, dtype))
        self._shadow.compare(
            self._key, self._name, y, lambda: self._candidate(given, dtype), seconds
        )
        return y

    def _call(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        y: Tensor = self._trusted(x, dtype)
        return y

    def targets(self) -> dict[str, Target]:
        found, others = self._trusted.targets(), self._candidate.targets()
        for name, other in others.items():
            found[name] = self._both(found.get(name), other)
        return found

    def _both(self, one: Target | None, other: Target) -> Target:
        def store(tensor: Tensor) -> None:
            if one is not None:
                one.store(tensor)
            if self._key not in self._shadow.report.failed:
                self._shadow.attempt(self._key, lambda: other.store(tensor))

        return Target((one or other).shape, (one or other).dtype, store)


@dataclass
class CandidateGroup:
    """A KV group's candidate, and what it has of this step."""

    key: str
    backend: AttentionBackend
    spec: KVCacheSpec
    cache: Any = None
    """Of blocks 1 … n, the step's; every layer's in turn."""
    blocks: list[int] | None = None
    """The step's blocks in the trusted cache: block i here is blocks[i - 1] there. None: not this
    step."""
    plan: Any = None


class ShadowAttention:
    """The candidates' side of a step's attention."""

    def __init__(
        self,
        shadow: Shadow,
        groups: list[KVGroup],
        layers: list[AttentionLayer],
        candidates: Mapping[str, AttentionBackend],
        kv_dtype: str,
    ) -> None:
        """`candidates`: by kind of layer."""
        self._shadow = shadow
        self._candidates: list[CandidateGroup | None] = []
        for group in groups:
            of = layers[group.layers[0]]
            spec = KVCacheSpec(0, group.block_size, of.num_kv_heads, of.head_size, kv_dtype)
            key = f"shadow.attention.{group.kind}"
            backend = candidates.get(group.kind)
            self._candidates.append(None if backend is None else CandidateGroup(key, backend, spec))

    def begin_step(self, step_id: int) -> None:
        """Before the step is planned. Those that warm the worker up have a negative id, and are not
        sampled."""
        self._shadow.active = False
        if step_id >= 0:
            self._shadow.begin_step()

    def plan(self, group: int, batch: AttentionBatch, layers: list[AttentionLayer]) -> None:
        """Take in a step of a group: number its blocks anew, and let the candidate plan it."""
        candidate = self._candidates[group]
        if candidate is None:
            return
        candidate.blocks = None
        if self._shadow.runs(candidate.key):
            blocks, own = renumbered(batch, candidate.spec.block_size, layers[0].window)
            if self._shadow.attempt(
                candidate.key, lambda: self._prepare(candidate, len(blocks), own, layers)
            ):
                candidate.blocks = blocks

    @staticmethod
    def _prepare(
        c: CandidateGroup, num_blocks: int, batch: AttentionBatch, layers: list[AttentionLayer]
    ) -> bool:
        if c.cache is None or c.spec.num_blocks <= num_blocks:
            c.cache = None  # before the larger one is made
            c.spec = replace(c.spec, num_blocks=1 << (num_blocks + 1).bit_length())
            c.cache = c.backend.allocate_cache(c.spec)
        c.plan = c.backend.plan(batch, layers, c.spec.block_size)
        return True

    def run(
        self,
        group: int,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        trusted: AttentionBackend,
        cache: Any,
        answer: Callable[[], Tensor],
    ) -> Tensor:
        """`answer` is the trusted provider's `run`; its result is returned, whatever the candidate
        does."""
        c = self._candidates[group]
        if c is None or c.blocks is None or not self._shadow.runs(c.key):
            return answer()
        blocks, given, out = c.blocks, (q.clone(), k.clone(), v.clone()), torch.empty_like(q)

        def imported() -> bool:
            keys, values = trusted.export_kv(cache, blocks)
            c.backend.import_kv(c.cache, list(range(1, len(blocks) + 1)), keys, values)
            return True

        def work() -> Tensor:
            c.backend.run(layer, *given, c.cache, c.plan, out)
            return out

        # Before the answer: this step's keys and values are for the candidate to write.
        ready = self._shadow.attempt(c.key, imported)
        seen, seconds = self._shadow.timed(answer)
        if ready:
            self._shadow.compare(c.key, f"layer {layer.index}", seen, work, seconds)
        return seen


def renumbered(
    batch: AttentionBatch, block_size: int, window: int | None
) -> tuple[list[int], AttentionBatch]:
    """The blocks that a step reads or writes, in ascending order, and the step in a cache that
    holds only those, from 1 on."""
    table, visible = batch.block_table, torch.zeros_like(batch.block_table, dtype=torch.bool)
    for b in range(batch.num_seqs):
        length, start, end = (
            batch.host_seq_lens[b],
            batch.host_query_start[b],
            batch.host_query_start[b + 1],
        )
        first = 0 if window is None else max(0, length - (end - start) - window + 1)
        visible[b, first // block_size : -(-length // block_size)] = True
    ids = table[visible].unique()  # sorted
    own = torch.zeros_like(table)
    own[visible] = (torch.searchsorted(ids, table[visible]) + 1).to(table.dtype)
    slots = batch.slot_mapping[: batch.num_tokens]
    at = torch.searchsorted(ids, (slots // block_size).to(ids.dtype)) + 1
    return ids.tolist(), replace(
        batch, block_table=own, slot_mapping=at * block_size + slots % block_size
    )
