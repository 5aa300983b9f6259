"""`TorchWorker`: the worker contract on one torch device."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dovetail.compose import BuildContext
from dovetail.errors import OutOfMemory
from dovetail.interfaces.architecture import ArchitectureCapabilities, LayerMaker, Model
from dovetail.interfaces.attention import AttentionBackend, KVCacheSpec
from dovetail.interfaces.worker import Progress
from dovetail.shadow import PREFIX, ShadowReport
from dovetail.types import KVGroup, SamplingParams, SequenceStart, StepPlan, StepResult
from dovetail_worker_torch import WorkerOptions
from dovetail_worker_torch.batch import SequenceTable
from dovetail_worker_torch.compiled import CompiledDecoder
from dovetail_worker_torch.drawing import CompiledDrawing, TorchDrawing
from dovetail_worker_torch.execution import TORCH_COMPILE
from dovetail_worker_torch.linear import TorchLinears
from dovetail_worker_torch.memory import kv_memory
from dovetail_worker_torch.model import load_model
from dovetail_worker_torch.native import Kernels
from dovetail_worker_torch.packed import PackedLinears
from dovetail_worker_torch.quantized import QuantizedLayers
from dovetail_worker_torch.runner import Computed, Runner
from dovetail_worker_torch.shadow import Shadow, ShadowAttention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchWorker:
    """One device in this process. With an overlapped loop, steps run on a thread of their own."""

    def __init__(self, context: BuildContext, options: WorkerOptions) -> None:
        plan = context.plan
        self._context = context
        self._device = torch.device(plan.device)
        self._dtype = DTYPES[plan.dtype]
        kv_dtype = context.option("kv_cache", "dtype")
        self._kv_dtype = plan.dtype if kv_dtype == "auto" else kv_dtype
        self._block_size: int = context.option("kv_cache", "block_size")
        if options.num_threads:
            torch.set_num_threads(options.num_threads)
        self._thread = ThreadPoolExecutor(1, "dovetail-steps") if plan.overlap else None
        self._made: ArchitectureCapabilities = context.capabilities("architecture")
        self._kernels = Kernels.load(context.device) if options.linear == "packed" else None
        self._compiled = options.execution == "compiled"
        self._torch_compile = self._compiled and self._made.compiled == TORCH_COMPILE
        if self._torch_compile:
            from dovetail_worker_torch.torch_compile import check_compile  # not at the top: few ask for it

            check_compile(plan.device)
        names = {key: context.name(key) for key in plan.choices if key.startswith(PREFIX)}
        self._shadow = Shadow(plan.shadow_share, names, self._device) if names else None
        self._model: Model | None = None
        self._runner: Runner | None = None

    def load(self, progress: Progress) -> None:
        plan, kernels = self._context.plan, self._kernels
        plain: LayerMaker = PackedLinears(kernels, self._dtype) if kernels else TorchLinears(self._dtype, self._device)
        layers = QuantizedLayers(self._context, plain, plan.dtype, self._kv_dtype, self._shadow)
        model: Any = load_model(
            Path(plan.folder), self._context.build("architecture"), layers,
            dtype=self._dtype, device=self._device, progress=progress, loads_weights=self._made.loads_weights,
        )  # fmt: skip
        if self._torch_compile:
            model.compile()
        elif self._compiled:
            model = model.compiled(kernels, self._context.option("scheduler", "max_num_batched_tokens"))
        self._model = model

    def kv_groups(self) -> list[KVGroup]:
        assert self._model is not None
        layers = self._model.attention_layers
        size = DTYPES[self._kv_dtype].itemsize
        groups = []
        for window in dict.fromkeys(layer.window for layer in layers):
            members = [layer for layer in layers if layer.window == window]
            per_token = sum(2 * m.num_kv_heads * m.head_size * size for m in members)
            kind = "full" if window is None else "sliding"
            groups.append(KVGroup([m.index for m in members], kind, self._block_size, per_token * self._block_size, window))
        return groups

    def kv_memory(self) -> int:
        option = self._context.option
        return kv_memory(self._device, option("kv_cache", "memory_fraction"), option("kv_cache", "memory_gb"))

    def allocate(self, num_blocks: list[int]) -> None:
        assert self._model is not None
        groups = self.kv_groups()
        backends: dict[str, AttentionBackend] = {}
        caches: dict[int, object] = {}
        for group, count in zip(groups, num_blocks, strict=True):
            if group.kind not in backends:
                backends[group.kind] = self._context.build(f"attention.{group.kind}")
            backend = backends[group.kind]
            for index in group.layers:
                layer = self._model.attention_layers[index]
                spec = KVCacheSpec(count, group.block_size, layer.num_kv_heads, layer.head_size, self._kv_dtype)
                try:
                    caches[index] = backend.allocate_cache(spec)
                except (RuntimeError, MemoryError, OSError) as e:
                    raise OutOfMemory(f"the KV cache of {count} blocks could not be allocated: {e}") from None
        if isinstance(self._model, CompiledDecoder):
            kind_of = {layer: group.kind for group in groups for layer in group.layers}
            order = range(len(self._model.attention_layers))
            self._model.bind([backends[kind_of[i]] for i in order], [caches[i] for i in order])
        table = SequenceTable(self._context.option("scheduler", "max_num_seqs"), self._context.plan.max_model_len, groups)
        drawing = CompiledDrawing(self._kernels) if self._kernels and self._compiled else TorchDrawing()
        sockets = ("attention", "architecture", "quantization")
        made_by = {k: self._context.name(k) for k in self._context.plan.choices if k.split(".")[0] in sockets}
        self._runner = Runner(
            self._model, groups, [backends[g.kind] for g in groups], caches, table, self._device, drawing, made_by,
            self._shadow_attention(groups),
        )  # fmt: skip

    def allocate_host(self, num_blocks: list[int]) -> None:
        runner = self._require_runner()
        runner.host_tier = runner.make_host_tier(num_blocks, DTYPES[self._kv_dtype])

    def _shadow_attention(self, groups: list[KVGroup]) -> ShadowAttention | None:
        if self._shadow is None:
            return None
        assert self._model is not None
        keys = {group.kind: f"{PREFIX}attention.{group.kind}" for group in groups}
        choices = self._context.plan.choices
        candidates = {kind: self._context.build(key) for kind, key in keys.items() if key in choices}
        return ShadowAttention(self._shadow, groups, self._model.attention_layers, candidates, self._kv_dtype)

    def shadow_report(self) -> ShadowReport | None:
        return None if self._shadow is None else self._shadow.report

    def warm_up(self, progress: Progress) -> None:
        """Two small steps, a prefill and a decode, over blocks that are still free: kernels are built and loaded."""
        what = "compiling (once; cached)" if self._torch_compile else "warming up"
        progress(what, 0, 2)
        groups = self.kv_groups()
        room = self._context.option("scheduler", "max_num_batched_tokens")
        length = min(8, room, self._context.plan.max_model_len - 1)
        if length > 0:
            blocks = [list(range(1, 2 + length // g.block_size)) for g in groups]
            start = SequenceStart(-1, "", 0, [0] * length, length, blocks, SamplingParams(), 0, [], length + 1)
            nothing: list[list[int]] = [[] for _ in groups]
            self.sample(self.submit(StepPlan(-1, [-1], [length], [0], [True], [nothing], starts=[start])))
            progress(what, 1, 2)
            self.sample(self.submit(StepPlan(-1, [-1], [1], [length], [False], [nothing])))
            self._require_runner().table.update(StepPlan(-1, [], [], [], [], [], released=[-1]))
        progress(what, 2, 2)

    def submit(self, plan: StepPlan) -> Any:
        runner = self._require_runner()

        def run() -> Computed | StepResult:
            with torch.inference_mode():
                computed = runner.forward(plan)
                return computed if plan.masked else runner.draw(computed)

        return run() if self._thread is None else self._thread.submit(run)

    def sample(self, handle: Any, masks: dict[int, bytes] | None = None) -> StepResult:
        done: Computed | StepResult = handle.result() if isinstance(handle, Future) else handle
        if isinstance(done, StepResult):
            return done
        with torch.inference_mode():  # a masked plan is not overlapped, so nothing else runs now
            return self._require_runner().draw(done, masks)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._runner = None
        self._model = None

    def _require_runner(self) -> Runner:
        if self._runner is None:
            raise RuntimeError("the worker has no cache: allocate comes before submit, and nothing after close")
        return self._runner
