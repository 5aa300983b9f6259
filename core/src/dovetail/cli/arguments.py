"""Arguments that describe an engine, for every command that makes one: those of plugins too."""

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
    ("--max-model-len", "max_model_len", int, "longest sequence, in tokens"),
    ("--revision", "revision", str, "branch, tag or commit of a model on the hub"),
    ("--served-model-name", "served_model_name", str, "the name clients use"),
    ("--quantization", "quantization", str, "auto, none, or a scheme for the whole model"),
    ("--architecture", "architecture.use", str, "architecture provider"),
    ("--worker", "worker.use", str, "worker provider"),
    ("--attention", "attention.default.use", str, "attention provider"),
    ("--prefix-cache", "prefix_cache.use", str, "prefix-cache provider; none: without"),
    ("--speculation", "speculation.use", str, "drafter provider; none: without"),
    (
        "--num-draft-tokens",
        "speculation.num_draft_tokens",
        int,
        "most tokens drafted for a sequence in a step",
    ),
    ("--scheduler", "scheduler.use", str, "scheduler provider"),
    ("--max-num-seqs", "scheduler.max_num_seqs", int, "sequences that run at a time"),
    ("--max-num-batched-tokens", "scheduler.max_num_batched_tokens", int, "tokens in a step"),
    ("--block-size", "kv_cache.block_size", int, "tokens in a KV block"),
    ("--kv-cache-dtype", "kv_cache.dtype", str, "auto, float32, bfloat16, float16, fp8, int8"),
    (
        "--gpu-memory-utilization",
        "kv_cache.memory_fraction",
        float,
        "share of the memory that the engine may take",
    ),
    ("--kv-cache-memory-gb", "kv_cache.memory_gb", float, "GiB for the KV cache"),
    ("--max-num-waiting", "max_num_waiting", int, "sequences that may wait"),
    (
        "--queue-timeout",
        "queue_timeout",
        float,
        "seconds that a request may wait for its first step",
    ),
    ("--request-timeout", "request_timeout", float, "seconds that a request may take in all"),
    ("--stall-timeout", "stall_timeout", float, "seconds after which a step counts as stalled"),
)


class _PrefixCaching(BooleanOptionalAction):
    """vLLM's flag, for the extension point: any prefix cache, or none."""

    def __init__(self, option_strings: list[str], dest: str, nargs: int = 0, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, **kwargs)

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        wanted = option_string is not None and not option_string.startswith("--no-")
        setattr(namespace, self.dest, "auto" if wanted else "none")


def add_engine_arguments(parser: ArgumentParser, *, with_config: bool = True) -> None:
    """`--config`, `--locked` (unless the command takes the config otherwise) and a flag for each
    option that is set often."""
    group = parser.add_argument_group("engine")
    if with_config:
        group.add_argument(
            "--config", dest="config_file", metavar="FILE", help="an engine config (YAML or TOML)"
        )
        group.add_argument(
            "--locked",
            metavar="LOCK",
            help="refuse to run what differs from this lock; see `dovetail lock`",
        )
    for flag, key, kind, help in FLAGS:
        group.add_argument(flag, dest=f"engine:{key}", type=kind, help=help)
    group.add_argument(
        "--overlap",
        dest="engine:overlap",
        action=BooleanOptionalAction,
        help="schedule a step while one runs",
    )
    group.add_argument(
        "--enable-prefix-caching",
        dest="engine:prefix_cache.use",
        action=_PrefixCaching,
        nargs=0,
        help="--no-enable-prefix-caching: without (--prefix-cache none)",
    )
    group.add_argument(
        "--trust-remote-code", dest="engine:trust_remote_code", action="store_true", default=None
    )
    group.add_argument("--tensor-parallel-size", type=int, default=1, help="only 1 so far")


def config_values(args: Namespace) -> dict[str, Any]:
    """The engine flags that were given, as nested config values."""
    if getattr(args, "tensor_parallel_size", 1) != 1:
        raise ConfigError(
            "--tensor-parallel-size: no installed worker runs on more than one device yet; use 1"
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
    """Raise `ConfigError` for an engine that differs from `--locked`."""
    if args.locked is not None:
        from dovetail.cli.lock import check
        from dovetail.plugin.config import load_config

        check(load_config(args.config_file, **config_values(args)), args.locked)


@contextmanager
def loaded_llm(args: Namespace, progress: Progress, **values: Any) -> Iterator[LLM]:
    """The engine that the arguments describe; `values` are config values that come on top."""
    from dovetail.runtime.llm import LLM

    check_lock(args)
    with LLM(
        config=args.config_file, progress=progress, **{**config_values(args), **values}
    ) as llm:
        yield llm
