from __future__ import annotations
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from dovetail.errors import ConfigError
from dovetail.interfaces.worker import Progress
if TYPE_CHECKING:
    from dovetail.runtime.llm import LLM
FLAGS: tuple[tuple[str, str, type, str], ...] = (('--device', 'device', str, 'auto, cpu, cuda:0'), ('--dtype', 'dtype', str, 'auto, float32, bfloat16, float16'), ('--max-model-len', 'max_model_len', int, 'longest sequence, in tokens'), ('--revision', 'revision', str, 'branch, tag or commit of a model on the hub'), ('--served-model-name', 'served_model_name', str, 'the name clients use'), ('--quantization', 'quantization', str, 'auto, none, or a scheme for the whole model'), ('--architecture', 'architecture.use', str, 'architecture provider'), ('--worker', 'worker.use', str, 'worker provider'), ('--attention', 'attention.default.use', str, 'attention provider'), ('--prefix-cache', 'prefix_cache.use', str, 'prefix-cache provider; none: without'), ('--speculation', 'speculation.use', str, 'drafter provider; none: without'), ('--num-draft-tokens', 'speculation.num_draft_tokens', int, 'most tokens drafted for a sequence in a step'), ('--scheduler', 'scheduler.use', str, 'scheduler provider'), ('--max-num-seqs', 'scheduler.max_num_seqs', int, 'sequences that run at a time'), ('--max-num-batched-tokens', 'scheduler.max_num_batched_tokens', int, 'tokens in a step'), ('--block-size', 'kv_cache.block_size', int, 'tokens in a KV block'), ('--kv-cache-dtype', 'kv_cache.dtype', str, 'auto, float32, bfloat16, float16, fp8, int8'), ('--gpu-memory-utilization', 'kv_cache.memory_fraction', float, 'share of the memory that the engine may take'), ('--kv-cache-memory-gb', 'kv_cache.memory_gb', float, 'GiB for the KV cache'), ('--max-num-waiting', 'max_num_waiting', int, 'sequences that may wait'), ('--queue-timeout', 'queue_timeout', float, 'seconds that a request may wait for its first step'), ('--request-timeout', 'request_timeout', float, 'seconds that a request may take in all'), ('--stall-timeout', 'stall_timeout', float, 'seconds after which a step counts as stalled'))

def add_engine_arguments(parser: ArgumentParser, *, with_config: bool=True) -> None:
    ...

def config_values(args: Namespace) -> dict[str, Any]:
    ...

def check_lock(args: Namespace) -> None:
    ...

@contextmanager
def loaded_llm(args: Namespace, progress: Progress, **values: Any) -> Iterator[LLM]:
    ...
