from __future__ import annotations
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from dovetail.errors import ConfigError
from dovetail.interfaces.worker import Progress
if TYPE_CHECKING:
    from dovetail.runtime.llm import LLM
FLAGS: tuple[tuple[str, str, type, str], ...] = (('--device', 'device', str, 'auto, cpu, cuda:0'), ('--dtype', 'dtype', str, 'auto, float32, bfloat16, float16'), ('--max-model-len', 'max_model_len', int, 'maximum sequence length in tokens'), ('--revision', 'revision', str, 'branch, tag or commit of a model on the hub'), ('--served-model-name', 'served_model_name', str, 'model name in the API'), ('--quantization', 'quantization', str, 'auto, none, or a scheme for the whole model'), ('--architecture', 'architecture.use', str, 'architecture provider'), ('--worker', 'worker.use', str, 'worker provider'), ('--attention', 'attention.default.use', str, 'attention provider'), ('--prefix-cache', 'prefix_cache.use', str, 'prefix-cache provider; none: disabled'), ('--speculation', 'speculation.use', str, 'drafter provider; none: disabled'), ('--num-draft-tokens', 'speculation.num_draft_tokens', int, 'maximum number of draft tokens per sequence and step'), ('--scheduler', 'scheduler.use', str, 'scheduler provider'), ('--max-num-seqs', 'scheduler.max_num_seqs', int, 'maximum number of running sequences'), ('--max-num-batched-tokens', 'scheduler.max_num_batched_tokens', int, 'maximum number of tokens per step'), ('--block-size', 'kv_cache.block_size', int, 'tokens per KV block'), ('--kv-cache-dtype', 'kv_cache.dtype', str, 'auto, float32, bfloat16, float16, fp8, int8'), ('--gpu-memory-utilization', 'kv_cache.memory_fraction', float, 'fraction of the free memory that the engine may use'), ('--kv-cache-memory-gb', 'kv_cache.memory_gb', float, 'size of the KV cache in GiB'), ('--max-num-waiting', 'max_num_waiting', int, 'maximum number of waiting sequences'), ('--queue-timeout', 'queue_timeout', float, 'seconds that a request may wait for its first step'), ('--request-timeout', 'request_timeout', float, 'seconds that a request may take in total'), ('--stall-timeout', 'stall_timeout', float, 'seconds after which a step counts as stalled'))

def add_engine_arguments(parser: ArgumentParser, *, with_config: bool=True) -> None:
    ...

def config_values(args: Namespace) -> dict[str, Any]:
    ...

def check_lock(args: Namespace) -> None:
    ...

@contextmanager
def loaded_llm(args: Namespace, progress: Progress, **values: Any) -> Iterator[LLM]:
    ...
