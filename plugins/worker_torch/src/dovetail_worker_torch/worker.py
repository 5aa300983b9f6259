"""`TorchWorker`: the worker contract on one torch device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import msgspec
import torch

from dovetail.errors import OutOfMemory, PluginError
from dovetail.facts import model_facts
from dovetail.interfaces.architecture import ArchitectureCapabilities, LayerMaker, Model
from dovetail.interfaces.attention import AttentionBackend, KVCacheSpec
from dovetail.interfaces.shadow import ShadowReport
from dovetail.interfaces.weights import LayerWeights
from dovetail.interfaces.worker import Progress
from dovetail.plan import SHADOW_PREFIX
from dovetail.plugin.build_context import BuildContext
from dovetail.types import (
    DRAFTED_BY_WORKER,
    KVGroup,
    SamplingParams,
    SequenceStart,
    StepPlan,
    StepResult,
)
from dovetail_worker_torch.accelerator import Accelerator, Cuda
from dovetail_worker_torch.execution import OPERATIONS, TORCH_COMPILE, fuses
from dovetail_worker_torch.loading.calibration import calibrate
from dovetail_worker_torch.loading.linear import TorchLinears
from dovetail_worker_torch.loading.model import Unread, describe_weights, load_model
from dovetail_worker_torch.loading.packed import PackedLinears
from dovetail_worker_torch.loading.quantized import QuantizedLayers
from dovetail_worker_torch.native import Kernels
from dovetail_worker_torch.options import WorkerOptions
from dovetail_worker_torch.runner.batch import SequenceTable
from dovetail_worker_torch.runner.compiled import CompiledModel
from dovetail_worker_torch.runner.device_runner import DeviceRunner, InFlightStep
from dovetail_worker_torch.runner.device_table import DeviceTable
from dovetail_worker_torch.runner.drafting import DraftRunner, draft_group
from dovetail_worker_torch.runner.gpu_memory import GpuMemory, largest_step
from dovetail_worker_torch.runner.host_tier import CachedLayer, HostTier
from dovetail_worker_torch.runner.memory import cpu_memory
from dovetail_worker_torch.runner.runner import Computed, Runner
from dovetail_worker_torch.runner.shadow import Shadow, ShadowAttention
from dovetail_worker_torch.runner.threads import set_num_threads
from dovetail_worker_torch.sampling.backends import CompiledSampler, SamplerBackend, TorchSampler

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_DTYPES = {**DTYPES, "float8_e4m3fn": torch.float8_e4m3fn, "int8": torch.int8}


class TorchWorker:
    """One device in this process. With an overlapped loop on a CPU, steps run on a thread of their
    own."""

    def __init__(self, context: BuildContext, options: WorkerOptions) -> None:
        plan = context.plan
        self._context = context
        self._device = torch.device(plan.device)
        self._dtype = DTYPES[plan.dtype]
        kv_dtype = context.option("kv_cache", "dtype")
        self._kv_dtype = plan.dtype if kv_dtype == "auto" else kv_dtype
        self._block_size: int = context.option("kv_cache", "block_size")
        set_num_threads(options.num_threads, context.device.num_cores)
        self._accelerator = self.make_accelerator()
        # What an accelerator is given is queued: it needs no thread to run beside the host.
        self._thread = (
            ThreadPoolExecutor(1, "dovetail-steps")
            if plan.overlap and self._accelerator is None
            else None
        )
        self._is_random = options.weights == "random"
        self._captures, self._on_capture_failure = (
            options.execution == "graphs",
            options.on_capture_failure,
        )
        self._made: ArchitectureCapabilities = context.capabilities("architecture")
        self._fuses = fuses(options.execution, plan.device, self._made)
        self._compiled = options.execution == "compiled"
        self._torch_compile = self._compiled and self._made.compiled == TORCH_COMPILE
        own_threads = self._compiled and not self._torch_compile
        self._kernels = (
            Kernels.load(context.device, own_threads=own_threads)
            if options.linear == "packed"
            else None
        )
        names = {key: context.name(key) for key in plan.choices if key.startswith(SHADOW_PREFIX)}
        self._shadow = Shadow(plan.shadow_share, names, self._device) if names else None
        self._plain = "worker: packed" if self._kernels else "worker: torch"
        self._weights: list[LayerWeights] | None = None
        self._model: Model | None = None
        self._draft: Model | None = None
        self._runner: Runner | None = None
        self._cached: list[list[CachedLayer]] = []
        """By KV group."""
        self._reserved_for_graphs: int | None = None
        """Bytes; None if nothing was measured."""

    def make_accelerator(self) -> Accelerator | None:
        return Cuda(self._device) if self._device.type == "cuda" else None

    def _on_device(self) -> AbstractContextManager[Any]:
        """Within it, the worker's device is the current one, to which Triton launches and for which
        memory is pinned."""
        return nullcontext() if self._accelerator is None else self._accelerator.current()

    def load(self, progress: Progress) -> None:
        with self._on_device():
            self._load_models(progress)

    def _load_models(self, progress: Progress) -> None:
        plan, kernels = self._context.plan, self._kernels
        plain: LayerMaker = (
            PackedLinears(kernels, self._dtype)
            if kernels
            else TorchLinears(self._dtype, self._device)
        )
        layers = QuantizedLayers(self._context, plain, plan.dtype, self._kv_dtype, self._shadow)
        self._model = self._load(Path(plan.folder), self._context, "architecture", layers, progress)
        self._weights = layers.weights(self._plain)
        if plan.draft is not None:
            folder = Path(plan.draft.folder)
            of_draft = self._context.for_model(model_facts(folder))
            self._draft = self._load(folder, of_draft, "architecture.draft", plain, progress)

    def weights(self) -> list[LayerWeights]:
        if self._weights is not None:
            return self._weights
        if not self._made.quantization or self._made.loads_weights:
            return []  # the model's code makes its layers itself
        layers = QuantizedLayers(self._context, Unread(), self._context.plan.dtype, self._kv_dtype)
        return describe_weights(
            Path(self._context.plan.folder),
            self._context.build("architecture"),
            layers,
            self._plain,
        )

    def _load(
        self, folder: Path, context: BuildContext, key: str, layers: LayerMaker, progress: Progress
    ) -> Model:
        made: ArchitectureCapabilities = context.capabilities(key)
        model: Any = load_model(
            folder,
            context.build(key),
            layers,
            dtype=self._dtype,
            device=self._device,
            progress=progress,
            loads_weights=made.loads_weights,
            is_random=self._is_random,
            compiled=self._torch_compile and made.compiled == TORCH_COMPILE,
            fused=self._fuses and made.fused,
        )
        if self._kv_dtype == "int8":
            calibrate(model, context.plan.max_model_len, self._device, progress)
        # A draft model too is compiled only where the plan has looked whether the model can be.
        if self._compiled and made.compiled == self._made.compiled == OPERATIONS:
            model = CompiledModel(
                model, self._kernels, context.option("scheduler", "max_num_batched_tokens")
            )
        return cast(Model, model)

    def kv_groups(self) -> list[KVGroup]:
        assert self._model is not None
        layers = self._model.attention_layers
        size = KV_DTYPES[self._kv_dtype].itemsize
        groups = []
        for window in dict.fromkeys(layer.window for layer in layers):
            members = [layer for layer in layers if layer.window == window]
            per_token = sum(2 * m.num_kv_heads * m.head_size * size for m in members)
            kind = "full" if window is None else "sliding"
            groups.append(
                KVGroup(
                    [m.index for m in members],
                    kind,
                    self._block_size,
                    per_token * self._block_size,
                    window,
                )
            )
        if self._draft is not None:
            groups.append(draft_group(self._draft, len(layers), self._block_size, size))
        return groups

    def kv_memory(self) -> int:
        option = self._context.option
        fraction, gigabytes = option("kv_cache", "memory_fraction"), option("kv_cache", "memory_gb")
        if gigabytes is not None:
            return int(gigabytes * 2**30)
        if self._accelerator is None:
            return cpu_memory(fraction)
        num_rows, num_tokens = (
            option("scheduler", "max_num_seqs"),
            option("scheduler", "max_num_batched_tokens"),
        )
        with self._on_device():
            found = self._profile(self._accelerator, num_tokens, min(num_rows, num_tokens))
        if self._captures:
            self._reserved_for_graphs = found.graphs
        log.info(
            "reserved on %s beside the KV cache: %s MiB for a step, %s for tables of sequences, %s"
            " for CUDA graphs",
            self._device,
            _mib(found.step),
            _mib(found.tables),
            _mib(found.graphs),
        )
        return found.for_cache(fraction, num_tokens, num_rows)

    def _profile(self, accelerator: Accelerator, num_tokens: int, num_rows: int) -> GpuMemory:
        """Measure what a step, the tables and the graphs take, the last two with the smallest KV
        cache that there can be."""
        assert self._model is not None
        step = largest_step(self._model, self._sampler(), accelerator, num_tokens, num_rows)
        free, total = accelerator.memory()
        self._allocate([2] * len(self.kv_groups()))  # block 0, of padding, and one more
        tables = max(0, free - accelerator.memory()[0])
        graphs = 0
        if self._captures and isinstance(runner := self._runner, DeviceRunner):
            max_num_seqs = self._context.option("scheduler", "max_num_seqs")
            graphs = self._capturing(lambda: runner.measure_capture(max_num_seqs)) or 0
        self._runner, self._cached = None, []
        return GpuMemory(total, total - free, step, tables, graphs)

    def allocate(self, num_blocks: list[int]) -> None:
        with self._on_device():
            self._allocate(num_blocks)

    def _allocate(self, num_blocks: list[int]) -> None:
        assert self._model is not None
        groups, last = self.kv_groups(), None
        if self._draft is not None:
            *groups, last = groups
        self._cached = []
        backends, caches = self._make_caches(self._model, groups, num_blocks)
        max_num_seqs, max_num_tokens = (
            self._context.option("scheduler", name)
            for name in ("max_num_seqs", "max_num_batched_tokens")
        )
        table = self._table(max_num_seqs, groups, last)
        sampler = self._sampler()
        extension_points = ("attention", "architecture", "quantization")
        provider_names = {
            k: self._context.name(k)
            for k in self._context.plan.choices
            if k.split(".")[0] in extension_points
        }
        drafting = None
        if self._draft is not None and last is not None:
            own = msgspec.structs.replace(
                last, layers=[layer.index for layer in self._draft.attention_layers]
            )
            (backend,), draft_caches = self._make_caches(self._draft, [own], num_blocks[-1:])
            drafting = DraftRunner(
                self._draft,
                own,
                num_blocks[-1],
                backend,
                draft_caches,
                table,
                self._device,
                sampler,
                provider_names,
                max_num_tokens,
            )
        parts = (
            self._model,
            groups,
            backends,
            caches,
            table,
            self._device,
            sampler,
            provider_names,
            self._shadow_attention(groups),
            drafting,
        )
        self._runner = (
            Runner(*parts)
            if self._accelerator is None
            else DeviceRunner(*parts, accelerator=self._accelerator)
        )

    def _sampler(self) -> SamplerBackend:
        if self._fuses:
            from dovetail_worker_torch.sampling.triton_sampler import TritonSampler

            return TritonSampler()
        return (
            CompiledSampler(self._kernels) if self._kernels and self._compiled else TorchSampler()
        )

    def _table(
        self, max_num_seqs: int, groups: list[KVGroup], draft_group: KVGroup | None
    ) -> SequenceTable:
        max_len = self._context.plan.max_model_len
        if self._accelerator is None:
            return SequenceTable(max_num_seqs, max_len, groups, draft_group)
        return DeviceTable(self._accelerator, max_num_seqs, max_len, groups, draft_group)

    def _make_caches(
        self, model: Model, groups: list[KVGroup], num_blocks: list[int]
    ) -> tuple[list[AttentionBackend], dict[int, object]]:
        """Backends by group and caches by layer, bound to the model if it is compiled."""
        backends: dict[str, AttentionBackend] = {}
        caches: dict[int, object] = {}
        for group, count in zip(groups, num_blocks, strict=False):
            if group.kind not in backends:
                backends[group.kind] = self._context.build(f"attention.{group.kind}")
            backend = backends[group.kind]
            for index in group.layers:
                layer = model.attention_layers[index]
                spec = KVCacheSpec(
                    count, group.block_size, layer.num_kv_heads, layer.head_size, self._kv_dtype
                )
                try:
                    caches[index] = backend.allocate_cache(spec)
                except (RuntimeError, MemoryError, OSError) as e:
                    raise OutOfMemory(
                        f"the KV cache of {count} blocks could not be allocated: {e}"
                    ) from None
        if isinstance(model, CompiledModel):
            kind_of = {layer: group.kind for group in groups for layer in group.layers}
            order = range(len(model.attention_layers))
            model.bind([backends[kind_of[i]] for i in order], [caches[i] for i in order])
        for group in groups:
            fixed = [model.attention_layers[i] for i in group.layers]
            self._cached.append(
                [CachedLayer(layer, backends[group.kind], caches[layer.index]) for layer in fixed]
            )
        return [backends[group.kind] for group in groups], caches

    def allocate_host(self, num_blocks: list[int]) -> None:
        dtype = KV_DTYPES[self._kv_dtype]
        with self._on_device():
            self._require_runner().host_tier = HostTier(
                self.kv_groups(), num_blocks, self._cached, dtype, self._device
            )

    def _shadow_attention(self, groups: list[KVGroup]) -> ShadowAttention | None:
        if self._shadow is None:
            return None
        assert self._model is not None
        keys = {group.kind: f"{SHADOW_PREFIX}attention.{group.kind}" for group in groups}
        choices = self._context.plan.choices
        candidates = {
            kind: self._context.build(key) for kind, key in keys.items() if key in choices
        }
        return ShadowAttention(
            self._shadow, groups, self._model.attention_layers, candidates, self._kv_dtype
        )

    def shadow_report(self) -> ShadowReport | None:
        return None if self._shadow is None else self._shadow.report

    def warm_up(self, progress: Progress) -> None:
        """Two small steps, a prefill and a decode, over blocks that are still free: kernels are
        built and loaded. With a draft model, the second has a draft."""
        what = "compiling (once; cached)" if self._torch_compile else "warming up"
        progress(what, 0, 2)
        groups = self.kv_groups()
        room = self._context.option("scheduler", "max_num_batched_tokens")
        length = min(8, room, self._context.plan.max_model_len - 1)
        if length > 0:
            blocks = [list(range(1, 2 + length // g.block_size)) for g in groups]
            start = SequenceStart(
                -1, "", 0, [0] * length, length, blocks, SamplingParams(), 0, [], length + 1
            )
            nothing: list[list[int]] = [[] for _ in groups]
            self.sample(
                self.submit(StepPlan(-1, [-1], [length], [0], [True], [nothing], starts=[start]))
            )
            progress(what, 1, 2)
            decode = StepPlan(-1, [-1], [1], [length], [False], [nothing])
            if self._draft is not None and length > 1:
                decode = StepPlan(
                    -1, [-1], [2], [length - 1], [True], [nothing], [[DRAFTED_BY_WORKER]]
                )
            self.sample(self.submit(decode))
            with self._on_device():
                self._require_runner().table.update(StepPlan(-1, [], [], [], [], [], released=[-1]))
        progress(what, 2, 2)
        if self._captures and isinstance(self._runner, DeviceRunner):
            self._capture(self._runner, progress)

    def _capture(self, runner: DeviceRunner, progress: Progress) -> None:
        max_num_seqs: int = self._context.option("scheduler", "max_num_seqs")

        def capture() -> int:
            before, _ = runner.accelerator.memory()
            runner.capture(
                max_num_seqs, lambda done, total: progress("capturing CUDA graphs", done, total)
            )
            return max(0, before - runner.accelerator.memory()[0])

        took, reserved = self._capturing(capture), self._reserved_for_graphs
        if took is None:
            return
        of = (
            "none was measured, as kv_cache.memory_gb is given"
            if reserved is None
            else f"reserved were {_mib(reserved)}"
        )
        log.info("CUDA graphs took %s MiB of %s (%s)", _mib(took), self._device, of)
        if reserved is not None and took > reserved:
            log.warning(
                "CUDA graphs took %s MiB of %s, more than the %s reserved: large steps may find no"
                " memory. If they do, lower kv_cache.memory_fraction",
                _mib(took),
                self._device,
                _mib(reserved),
            )

    def _capturing(self, work: Callable[[], int]) -> int | None:
        """Do what captures graphs. If it fails, raises an error, or returns None where the worker
        then runs without graphs."""
        try:
            with torch.inference_mode(), self._on_device():
                return work()
        except Exception as e:
            if self._on_capture_failure == "plain":
                log.warning(
                    "decode steps could not be captured, and run without graphs: %s: %s",
                    type(e).__name__,
                    e,
                )
                self._captures = False
                return None
            max_num_seqs = self._context.option("scheduler", "max_num_seqs")
            what = (
                f"CUDA graphs for up to {max_num_seqs} sequences could not be captured:"
                f" {type(e).__name__}: {e}"
            )
            hint = "set worker.on_capture_failure or worker.execution to plain"
            if isinstance(e, torch.OutOfMemoryError):
                raise OutOfMemory(
                    f"{what}. Lower kv_cache.memory_fraction or scheduler.max_num_seqs, or {hint}"
                ) from e
            raise PluginError(f"{what}. To run without them, {hint}") from e

    def submit(self, plan: StepPlan) -> Any:
        runner = self._require_runner()
        if isinstance(runner, DeviceRunner):
            with torch.inference_mode(), self._on_device():
                return runner.submit(plan)

        def run() -> Computed | StepResult:
            with torch.inference_mode():
                computed = runner.forward(plan)
                return computed if plan.masked else runner.draw(computed)

        return run() if self._thread is None else self._thread.submit(run)

    def sample(self, handle: Any, masks: dict[int, bytes] | None = None) -> StepResult:
        done: Computed | InFlightStep | StepResult = (
            handle.result() if isinstance(handle, Future) else handle
        )
        if isinstance(done, StepResult):
            return done
        with torch.inference_mode(), self._on_device():
            if isinstance(done, InFlightStep):
                return cast(DeviceRunner, self._require_runner()).finalize(done)
            return self._require_runner().draw(
                done, masks
            )  # a masked plan is not overlapped, so nothing else runs now

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        with self._on_device():
            if self._accelerator is not None and self._runner is not None:
                self._accelerator.synchronize()
            self._runner = None
            self._model = self._draft = None
            self._cached = []
        if self._kernels is not None:
            self._kernels.close()

    def _require_runner(self) -> Runner:
        if self._runner is None:
            raise RuntimeError(
                "the worker has no cache: allocate comes before submit, and nothing after close"
            )
        return self._runner


def _mib(num_bytes: int) -> int:
    return -(-num_bytes // 2**20)
