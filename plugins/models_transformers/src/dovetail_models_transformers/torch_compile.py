"""A bridged model's body through `torch.compile`: one graph for steps of one token, one for all
others.

Attention is an operator that the compiler does not look into, so the whole body is a graph without
a break. Operators take tensors and numbers and no Python object: the step that a call belongs to is
found through the thread that runs it.

Of the guards, which are evaluated before every step, those on the number of tokens are kept. The
others watch the model's own attributes, which nothing changes, and the number of threads, which
other engines of the process may.

The output projection is not compiled: it is one product of matrices, and measured the same either
way.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from dovetail import native
from dovetail.errors import ConfigError, PluginError
from dovetail.facts import device_facts

if TYPE_CHECKING:
    from dovetail.interfaces.architecture import Attend

log = logging.getLogger(__name__)

Body = Callable[[Tensor, Tensor], Tensor]
"""(token_ids i64[T], positions i64[T]) -> hidden states [T, H]"""

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def check_compile(device: str) -> None:
    """Raise `ConfigError` if torch cannot compile here, before any weight is read; `PluginError` if
    somebody else could put kernels where torch is to look for them."""
    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        raise ConfigError(
            f"worker.execution: compiled: torch {torch.__version__} is too old: install 2.13 or"
            " later, or set it to plain"
        )
    headers = Path(sysconfig.get_path("include"))
    if device == "cpu" and not (headers / "Python.h").is_file():
        raise ConfigError(
            f"worker.execution: compiled: Python's headers are not in {headers}: install them"
            " (python3-dev), or set it to plain"
        )
    if _takes_our_cache():
        folder = cache_folder()
        try:
            native.private_folder("torch (execution: compiled)", folder)
        except OSError as e:
            raise ConfigError(
                f"worker.execution: compiled: cannot write kernels to {folder}: {e}; set"
                " XDG_CACHE_HOME"
            ) from e


def _takes_our_cache() -> bool:
    """Unless the user has set another. The default is what torch itself writes to the
    environment."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return os.environ.get(CACHE_VARIABLE) in (None, default_cache_dir())


def cache_folder() -> Path:
    """`dovetail/torch-compile` in `$XDG_CACHE_HOME`, which is `~/.cache` by default; in it, a
    folder per kind of CPU, as the kernels are compiled for all that it has and a home folder may be
    shared."""
    facts = device_facts()
    kind = hashlib.sha256(" ".join((facts.machine, *sorted(facts.cpu_flags))).encode()).hexdigest()[
        :16
    ]
    return native.cache_folder("torch-compile") / kind


class _Pass(threading.local):
    """The pass in progress in a thread."""

    attend: Attend | None = None


_current = _Pass()


@torch.library.custom_op("dovetail::attend", mutates_args=())
def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The `Attend` of the pass in progress."""
    assert _current.attend is not None
    seen: Tensor = _current.attend(layer, q, k, v)
    return seen


@attend.register_fake
def _(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


class CompiledBody:
    """Compiles at the first step of one token and at the first of several. Used by one thread at a
    time."""

    def __init__(self, body: Body, folder: Path) -> None:
        self._folder = folder
        self._compiled = {"one token": False, "several tokens": False}
        self._kind = ""
        self._warned = False
        # fullgraph: a body that falls apart is an error. Isolated: models of one class do not share
        # a list of graphs.
        torch_compile: Any = torch.compile  # its overloads do not know isolate_recompiles
        self._run: Body = torch_compile(
            body,
            fullgraph=True,
            isolate_recompiles=True,
            backend=self._compile,
            options={"guard_filter_fn": _of_inputs},
        )

    def __call__(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run the body. Raises `PluginError` if it cannot be compiled."""
        self._kind = "one token" if len(token_ids) == 1 else "several tokens"
        if len(token_ids) > 1 and not self._compiled[self._kind]:
            torch._dynamo.mark_dynamic(token_ids, 0)
            torch._dynamo.mark_dynamic(positions, 0)
        _current.attend = attend
        try:
            hidden = self._run(token_ids, positions)
        except torch._dynamo.exc.TorchDynamoException as e:
            reason = " ".join(str(e).partition("\n\n")[0].split()).rstrip(".")
            raise PluginError(
                f"worker.execution: torch.compile cannot compile {self._folder}: {reason}. Set it"
                " to plain",
                provider="torch",
            ) from e
        finally:
            _current.attend = None
        self._compiled[self._kind] = True
        return hidden

    def _compile(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        if self._compiled[self._kind] and not self._warned:
            self._warned = True
            log.warning(
                "%s is compiled again, for a step of %s: requests wait", self._folder, self._kind
            )
        with _cache_variable():
            done: Any = compile_fx(graph, inputs)
        return done  # type: ignore[no-any-return]


def _of_inputs(entries: Sequence[Any]) -> list[bool]:
    """Which guards to keep: those on the shapes of tensors that are not weights."""
    tensors: list[bool] = torch.compiler.keep_tensor_guards_unsafe(entries)  # type: ignore[no-untyped-call]
    return [
        kept or entry.guard_type == "SHAPE_ENV"
        for kept, entry in zip(tensors, entries, strict=True)
    ]


@contextmanager
def _cache_variable() -> Iterator[None]:
    """torch reads its cache's place from the environment: ours while we compile, unless the user
    has set one. Compilations of a process take turns (a lock of torch's)."""
    if not _takes_our_cache():
        yield
        return
    before = os.environ.get(CACHE_VARIABLE)
    os.environ[CACHE_VARIABLE] = str(cache_folder())
    try:
        yield
    finally:
        os.environ.pop(CACHE_VARIABLE)
        if before is not None:
            os.environ[CACHE_VARIABLE] = before
