"""Build a transformers model without its weights, and load decoder layers one at a time.

Weights are created on the meta device. One forward pass, in which the layers only record their
arguments, shows the arguments of each layer (rotary tables, masks). With these, a layer can run
alone on hidden states that are stored between layers.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dovetail.errors import CheckpointError
from dovetail_quantize.checkpoint import Checkpoint, as_float

logging.getLogger("transformers").setLevel(logging.ERROR)


class Skeleton:
    """A transformers model on the meta device. Raises `CheckpointError` for a model that cannot be
    quantized layer by layer."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkpoint = folder, Checkpoint(folder)
        try:
            # Set explicitly: by default, transformers asks on the terminal whether to run code from
            # the model folder.
            self.config: Any = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            self.text: Any = self.config.get_text_config(decoder=True)
            self.dtype = self._dtype()
            with _NoMemory():
                auto: Any = transformers.AutoModelForCausalLM
                self.model: Any = auto.from_config(
                    self.config, dtype=torch.float32, trust_remote_code=False
                )
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RuntimeError,
            ImportError,
        ) as e:
            raise CheckpointError(f"{folder}: transformers cannot build the model: {e}") from e
        self.model.eval().requires_grad_(False)
        _release(self.model)
        count = self.text.num_hidden_layers
        lists = [
            (n, m)
            for n, m in self.model.named_modules()
            if isinstance(m, nn.ModuleList) and len(m) == count
        ]
        if not lists:
            raise self.refusal(f"it has no list of {count} decoder layers")
        self._prefix, self.layers = lists[0]
        self._arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        for i in range(count):
            self._check_layer(i)

    def _dtype(self) -> torch.dtype:
        """Return the dtype of the checkpoint's weights."""
        found = (
            getattr(self.text, "dtype", None)
            or getattr(self.config, "dtype", None)
            or torch.float32
        )
        dtype: torch.dtype = (
            found
            if isinstance(found, torch.dtype)
            else getattr(torch, str(found).removeprefix("torch."))
        )
        return dtype

    def refusal(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: {type(self.model).__name__} cannot be quantized layer by layer:"
            f" {reason}"
        )

    def prefix(self, index: int) -> str:
        """Return the prefix of a layer's tensor names, such as "model.layers.3."."""
        return f"{self._prefix}.{index}."

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """Return the linear layers of a decoder layer by their names within it."""
        return {n: m for n, m in self.layers[index].named_modules() if isinstance(m, nn.Linear)}

    def other_linears(self) -> list[str]:
        """Return the linear layers outside the decoder layers, that is, the output projection."""
        return [
            n
            for n, m in self.model.named_modules()
            if isinstance(m, nn.Linear) and not n.startswith(self._prefix + ".")
        ]

    def outside(self) -> list[str]:
        """Return the names of the checkpoint's tensors outside the decoder layers."""
        return [name for name in self.checkpoint.files if not name.startswith(self._prefix + ".")]

    def of_layer(self, index: int) -> list[str]:
        """Return the names of the checkpoint's tensors of a layer."""
        return [name for name in self.checkpoint.files if name.startswith(self.prefix(index))]

    @contextmanager
    def loaded(self, index: int) -> Iterator[Any]:
        """Load a layer's weights in float32, and release them afterwards."""
        layer, prefix = self.layers[index], self.prefix(index)
        self._fill({prefix + name: tensor for name, tensor in layer.state_dict().items()})
        try:
            yield layer
        finally:
            _release(layer)

    def run_layer(self, index: int, hidden: Tensor) -> Tensor:
        """Run `hidden f32[1, T, size]` through a loaded layer. T is the same as in `embed`."""
        args, kwargs = self._arguments[index]
        out = self.layers[index](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]

    @contextmanager
    def ends_loaded(self) -> Iterator[Ends]:
        """Load the weights outside the decoder layers, and release them afterwards."""
        state = {
            n: t for n, t in self.model.state_dict().items() if not n.startswith(self._prefix + ".")
        }
        is_tied = getattr(self.text, "tie_word_embeddings", False)
        tied = set(getattr(self.model, "_tied_weights_keys", None) or ()) if is_tied else set()
        self._fill({n: t for n, t in state.items() if n in self.checkpoint.files or n not in tied})
        if is_tied:
            self.model.tie_weights()
        try:
            yield Ends(self)
        finally:
            _release(self.model)

    def _fill(self, expected: dict[str, Tensor]) -> None:
        """Load tensors into the model as float32. Their shapes must equal those of `expected`."""
        tensors = self.checkpoint.read(sorted(expected))
        for name, tensor in tensors.items():
            if tensor.shape != expected[name].shape:
                shapes = (
                    f"{list(tensor.shape)}, but the model's config implies"
                    f" {list(expected[name].shape)}"
                )
                raise CheckpointError(f"{self.folder}: {name} has shape {shapes}")
        self.model.load_state_dict(
            {n: as_float(t) for n, t in tensors.items()}, assign=True, strict=False
        )
        self.model.requires_grad_(False)

    def _check_layer(self, index: int) -> None:
        layer, prefix = self.layers[index], self.prefix(index)
        ours = {f"{n}.weight" for n in self.linears(index)}
        if not ours:
            raise self.refusal(f"{prefix}* has no linear layers")
        others = [prefix + n for n, p in layer.named_parameters() if p.dim() > 1 and n not in ours]
        if others:
            raise self.refusal(
                f"{others[0]} is not the weight of a linear layer (experts and convolutions are"
                " not supported)"
            )


class Ends:
    """The parts of the model before the first and after the last decoder layer."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the first layer's input: `i64[1, T]` → `f32[1, T, size]`. Records the arguments of
        all layers."""
        recorded: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hidden: list[Tensor] = []

        def record(*args: Any, **kwargs: Any) -> Tensor:
            x = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
            recorded.append((args[1:], kwargs))
            hidden.append(x)
            return x  # type: ignore[no-any-return]

        self._run(token_ids, record)
        self._skeleton._arguments = recorded
        return hidden[0]

    def logits(self, token_ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the logits for the last layer's output: `f32[1, T, size]` → `f32[1, T, vocab]`."""
        return self._run(token_ids, lambda *args, **kwargs: hidden).logits.float()  # type: ignore[no-any-return]

    def _run(self, token_ids: Tensor, layer: Any) -> Any:
        skeleton = self._skeleton
        for module in skeleton.layers:
            module.forward = layer
        try:
            return skeleton.model(input_ids=token_ids, use_cache=False)
        except (
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RuntimeError,
            NotImplementedError,
        ) as e:
            raise skeleton.refusal(f"a forward pass without its layers failed with {e!r}") from e
        finally:
            for module in skeleton.layers:
                del module.forward


class _NoMemory(TorchFunctionMode):
    """Moves tensors created by `torch.empty`, which weights are, to the meta device. Tables
    computed from the config are created as usual."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(
            *args, **({**(kwargs or {}), "device": "meta"} if func is torch.empty else kwargs or {})
        )


def _release(module: nn.Module) -> None:
    for inner in module.modules():
        for name, parameter in inner.named_parameters(recurse=False):
            inner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    # glibc does not return freed memory, and the next layer's tensors do not fit into its
    # fragments: without trimming, memory would grow with every layer.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
