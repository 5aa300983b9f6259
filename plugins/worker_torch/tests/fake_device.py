"""A device that runs behind the host, played on the CPU: what is queued is computed at once, and
seen only when it is waited for.

A graph is what a CUDA graph is: the operations of one run with the tensors that they had. Replaying
it does them again on those tensors, so that whatever the host decided in between, or kept in a new
tensor, does not count.

Whatever the worker does through torch, it must do while the device is the current one.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dovetail.assembly.compose import PlanContext
from dovetail.interfaces.attention import AttentionCapabilities
from dovetail.plugin.provider import Options, Provider
from dovetail_worker_torch.attention import Cache, ReferenceAttention, ReferencePlan, read, stored
from dovetail_worker_torch.worker import TorchWorker

WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Recorded(TorchDispatchMode):
    """The operations done under it, to be done again."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in WAITS:
            raise RuntimeError(f"what is captured may not wait for the device ({function})")
        result = function(*args, **(kwargs or {}))
        self._calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for function, args, kwargs, result in self._calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Fetched:
    def __init__(self, device, tensor):
        self._device, self._tensor = device, tensor.clone()
        device.outstanding += 1

    def wait(self):
        self._device.outstanding -= 1
        return self._tensor


class OnlyWhenCurrent(TorchDispatchMode):
    """Refuses operations while the device is not the current one."""

    def __init__(self, device: FakeAccelerator) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._device.check_current(function)
        return function(*args, **(kwargs or {}))


class FakeAccelerator:
    def __init__(self):
        self.device, self.num_captured, self.num_replayed = torch.device("cpu"), 0, 0
        self.outstanding = self.most_outstanding = 0
        self.depth = 0
        """How many `current()` it is within."""
        self.free, self.total, self.num_graphs = 8 * 2**30, 10 * 2**30, 0

    @contextlib.contextmanager
    def current(self):
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def bytes_of_capture(self):
        """Memory that the next capture takes, and its graph holds."""
        return 0

    def check_current(self, what):
        assert self.depth, f"{what} while the device is not the current one"

    def upload(self, numbers):
        self.check_current("upload")
        return torch.from_numpy(numbers.copy())

    def fetch(self, tensor):
        self.check_current("fetch")
        fetched = Fetched(self, tensor)
        self.most_outstanding = max(self.most_outstanding, self.outstanding)
        return fetched

    def capture(self, run):
        self.check_current("capture")
        run()
        recorded = Recorded()
        with recorded:
            run()
        taken, graph = self.bytes_of_capture(), CountedGraph(self, recorded)
        self._hold(1, taken)
        weakref.finalize(graph, self._hold, -1, -taken)
        self.num_captured += 1
        return graph

    def _hold(self, num_graphs, taken):
        self.num_graphs += num_graphs
        self.free -= taken

    def synchronize(self):
        self.check_current("synchronize")

    def memory(self):
        self.check_current("memory")
        gc.collect()
        return self.free, self.total

    def peak_memory(self, run):
        self.check_current("peak_memory")
        run()
        return 2**20


class CountedGraph:
    def __init__(self, device, recorded):
        self._device, self._recorded = device, recorded

    def replay(self):
        self._device.num_replayed += 1
        self._recorded.replay()


class CapturableAttention(ReferenceAttention):
    """Decode steps over the whole block table, in operations that look at no number on the host."""

    def run(self, layer, q, k, v, cache: Cache, plan: ReferencePlan, out):
        batch = plan.batch
        if batch.num_tokens != batch.num_seqs:
            return super().run(layer, q, k, v, cache, plan, out)
        scales = (None, None) if layer.kv_scales is None else layer.kv_scales.unbind()
        for own, new, scale in zip(cache, (k, v), scales, strict=True):
            own.flatten(0, 1).index_put_((batch.slot_mapping,), stored(new, own.dtype, scale))
        # An entry past a sequence may be any number: not every one is a block.
        table = batch.block_table.long()
        key_at = torch.arange(table.shape[1] * plan.block_size, device=q.device)
        seen = key_at < batch.seq_lens[:, None]
        if layer.window is not None:
            seen &= key_at >= batch.seq_lens[:, None] - layer.window
        slots = table[:, key_at // plan.block_size] * plan.block_size + key_at % plan.block_size
        slots = torch.where(seen, slots, 0)
        keys, values = (
            torch.where(seen[:, :, None, None], read(own.flatten(0, 1)[slots], scale), 0.0)
            for own, scale in zip(cache, scales, strict=True)
        )
        group = layer.num_heads // layer.num_kv_heads
        keys, values = (
            x.repeat_interleave(group, 2).transpose(1, 2) for x in (keys, values)
        )  # [B, Hq, S, D]
        logits = (keys @ q.float()[..., None])[..., 0] * layer.scale  # [B, Hq, S]
        if layer.logit_soft_cap is not None:
            logits = layer.logit_soft_cap * torch.tanh(logits / layer.logit_soft_cap)
        logits = logits.masked_fill(~seen[:, None], float("-inf"))
        if layer.sinks is not None:
            sinks = layer.sinks.float()[None, :, None].expand(len(q), -1, 1)
            logits = torch.cat([logits, sinks], -1)
        weights = logits.softmax(-1)[..., : key_at.shape[0]]
        out.copy_((weights[:, :, None] @ values)[:, :, 0])


CAPTURABLE = Provider(
    "capturable",
    "for tests",
    lambda context, options: CapturableAttention(),
    Options,
    AttentionCapabilities(
        kv_dtypes=("float32", "bfloat16", "float16", "float8_e4m3fn", "int8"),
        sliding_window=True,
        logit_soft_cap=True,
        sinks=True,
        graph_capture=True,
    ),
)


@dataclass(frozen=True)
class WithCapturableAttention(PlanContext):
    """Builds this attention, whichever was chosen."""

    def build(self, key):
        return CapturableAttention() if key.startswith("attention.") else super().build(key)


def checked(name):
    """The worker's method of this name, whose operations the device checks."""

    def method(self, *arguments):
        with OnlyWhenCurrent(self.accelerator):
            return getattr(TorchWorker, name)(self, *arguments)

    return method


class FakeDeviceWorker(TorchWorker):
    """The worker as it is on a GPU, graphs included."""

    def __init__(self, context, options):
        super().__init__(
            WithCapturableAttention(**vars(context)),
            options.model_copy(update={"execution": "graphs"}),
        )

    def make_accelerator(self):
        return FakeAccelerator()

    load, kv_memory, allocate, allocate_host, warm_up, submit, sample, close = map(
        checked,
        ("load", "kv_memory", "allocate", "allocate_host", "warm_up", "submit", "sample", "close"),
    )

    @property
    def accelerator(self):
        return self._accelerator
