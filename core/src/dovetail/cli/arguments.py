"""Define the arguments that describe an engine, for every command that builds one, including
commands of plugins."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dovetail.errors import ConfigError
from dovetail.interfaces.worker import Progress

if TYPE_CHECKING:
    from dovetail.runtime.llm import LLM

FLAGS: tuple[tuple[str, str, type, str], ...] = (
    ("--device", "device", str, "auto, cpu, cuda:0"),
    ("--dtype", "dtype", str, "auto, float32, bfloat16, float16"),
    ("--max-model-len", "max_model_len", int, "maximum sequence length in tokens"),
    ("--revision", "revision", str, "branch, tag or commit of a model on the hub"),
    ("--served-model-name", "served_model_name", str, "model name in the API"),
    ("--quantization", "quantization", str, "auto, none, or a scheme for the whole model"),
    ("--architecture", "architecture.use", str, "architecture provider"),
    ("--worker", "worker.use", str, "worker provider"),
    ("--attention", "attention.default.use", str, "attention provider"),
    ("--prefix-cache", "prefix_cache.use", str, "prefix-cache provider; none: disabled"),
    ("--speculation", "speculation.use", str, "drafter provider; none: disabled"),
    (
        "--num-draft-tokens",
        "speculation.num_draft_tokens",
        int,
        "maximum number of draft tokens per sequence and step",
    ),
    ("--scheduler", "scheduler.use", str, "scheduler provider"),
    ("--max-num-seqs", "scheduler.max_num_seqs", int, "maximum number of running sequences"),
    (
        "--max-num-batched-tokens",
        "scheduler.max_num_batched_tokens",
        int,
        "maximum number of tokens per step",
    ),
    ("--block-size", "kv_cache.block_size", int, "tokens per KV block"),
    ("--kv-cache-dtype", "kv_cache.dtype", str, "auto, float32, bfloat16, float16, fp8, int8"),
    (
        "--gpu-memory-utilization",
        "kv_cache.memory_fraction",
        float,
        "fraction of the free memory that the engine may use",
    ),
    ("--kv-cache-memory-gb", "kv_cache.memory_gb", float, "size of the KV cache in GiB"),
    ("--max-num-waiting", "max_num_waiting", int, "maximum number of waiting sequences"),
    (
        "--queue-timeout",
        "queue_timeout",
        float,
        "seconds that a request may wait for its first step",
    ),
    ("--request-timeout", "request_timeout", float, "seconds that a request may take in total"),
    ("--stall-timeout", "stall_timeout", float, "seconds after which a step counts as stalled"),
)


class _PrefixCaching(BooleanOptionalAction):
    """vLLM's flag, applied to the extension point: any prefix cache, or none."""

    def __init__(self, option_strings: list[str], dest: str, nargs: int = 0, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, **kwargs)

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        wanted = option_string is not None and not option_string.startswith("--no-")
        setattr(namespace, self.dest, "auto" if wanted else "none")


def add_engine_arguments(parser: ArgumentParser, *, with_config: bool = True) -> None:
    """Add a flag for each option that is often set and, unless the command has another way to
    accept an engine config, `--config` and `--locked`."""
    group = parser.add_argument_group("engine")
    if with_config:
        group.add_argument(
            "--config", dest="config_file", metavar="FILE", help="an engine config (YAML or TOML)"
        )
        group.add_argument(
            "--locked",
            metavar="LOCK",
            help="fail if the engine differs from this lock; see `dovetail lock`",
        )
    for flag, key, kind, help in FLAGS:
        group.add_argument(flag, dest=f"engine:{key}", type=kind, help=help)
    group.add_argument(
        "--overlap",
        dest="engine:overlap",
        action=BooleanOptionalAction,
        help="schedule the next step while one runs",
    )
    group.add_argument(
        "--enable-prefix-caching",
        dest="engine:prefix_cache.use",
        action=_PrefixCaching,
        nargs=0,
        help="select a prefix cache (auto), or none with --no-enable-prefix-caching",
    )
    group.add_argument(
        "--trust-remote-code", dest="engine:trust_remote_code", action="store_true", default=None
    )
    group.add_argument(
        "--tensor-parallel-size", type=int, default=1, help="only 1 is supported yet"
    )


def config_values(args: Namespace) -> dict[str, Any]:
    """Convert the engine flags that were given to nested config values."""
    if getattr(args, "tensor_parallel_size", 1) != 1:
        raise ConfigError(
            "--tensor-parallel-size: no installed worker supports more than one device yet; use 1"
        )
    values: dict[str, Any] = {}
    for name, value in vars(args).items():
        if name.startswith("engine:") and value is not None:
            *path, last = name.removeprefix("engine:").split(".")
            place = values
            for part in path:
                place = place.setdefault(part, {})
            place[last] = value
    if getattr(args, "model", None) is not None:
        values["model"] = args.model
    return values


def check_lock(args: Namespace) -> None:
    """Raise `ConfigError` if the engine differs from the lock given by `--locked`."""
    if args.locked is not None:
        from dovetail.cli.lock import check
        from dovetail.plugin.config import load_config

        check(load_config(args.config_file, **config_values(args)), args.locked)


@contextmanager
def loaded_llm(args: Namespace, progress: Progress, **values: Any) -> Iterator[LLM]:
    """Load the engine that the arguments describe; `values` are config values that override
    them."""
    from dovetail.runtime.llm import LLM

    check_lock(args)
    with LLM(
        config=args.config_file, progress=progress, **{**config_values(args), **values}
    ) as llm:
        yield llm
