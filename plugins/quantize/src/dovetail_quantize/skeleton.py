"""A model of transformers without its weights: decoder layers come into memory one at a time, and
go again.

Weights are made on the meta device. One pass over it, whose layers do nothing but note what they
are given, shows the arguments of each (rotary tables, masks); with these a layer runs by itself on
hidden states that are kept between layers.
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
    """Raises `CheckpointError` for a model that cannot be taken apart."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkpoint = folder, Checkpoint(folder)
        try:
            # Said outright: left open, transformers asks on the terminal whether to run the code of
            # a model folder.
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
        _forget(self.model)
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
        """Of the checkpoint's weights."""
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
        """Of a layer's tensors: "model.layers.3."."""
        return f"{self._prefix}.{index}."

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """Of a layer, by name within it."""
        return {n: m for n, m in self.layers[index].named_modules() if isinstance(m, nn.Linear)}

    def other_linears(self) -> list[str]:
        """Those outside the decoder layers: the output projection."""
        return [
            n
            for n, m in self.model.named_modules()
            if isinstance(m, nn.Linear) and not n.startswith(self._prefix + ".")
        ]

    def outside(self) -> list[str]:
        """The checkpoint's tensors that belong to no decoder layer."""
        return [name for name in self.checkpoint.files if not name.startswith(self._prefix + ".")]

    def of_layer(self, index: int) -> list[str]:
        """The checkpoint's tensors of a layer."""
        return [name for name in self.checkpoint.files if name.startswith(self.prefix(index))]

    @contextmanager
    def loaded(self, index: int) -> Iterator[Any]:
        """A layer with its weights in float32, which are gone afterwards."""
        layer, prefix = self.layers[index], self.prefix(index)
        self._fill({prefix + name: tensor for name, tensor in layer.state_dict().items()})
        try:
            yield layer
        finally:
            _forget(layer)

    def run_layer(self, index: int, hidden: Tensor) -> Tensor:
        """`hidden f32[1, T, size]` through a loaded layer, T as in `embed`."""
        args, kwargs = self._arguments[index]
        out = self.layers[index](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]

    @contextmanager
    def ends_loaded(self) -> Iterator[Ends]:
        """All but the decoder layers, with weights."""
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
            _forget(self.model)

    def _fill(self, wanted: dict[str, Tensor]) -> None:
        """Read tensors of the model into it, as float32. Their shapes are those wanted."""
        tensors = self.checkpoint.read(sorted(wanted))
        for name, tensor in tensors.items():
            if tensor.shape != wanted[name].shape:
                shapes = (
                    f"{list(tensor.shape)}, the model's config asks for {list(wanted[name].shape)}"
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
                f"{others[0]} is no linear layer's weight (experts and convolutions are not"
                " supported)"
            )


class Ends:
    """What comes before the first decoder layer and after the last."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton

    def embed(self, token_ids: Tensor) -> Tensor:
        """`i64[1, T]` → what the first layer is given, `f32[1, T, size]`; notes the arguments of
        all layers."""
        noted: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hidden: list[Tensor] = []

        def note(*args: Any, **kwargs: Any) -> Tensor:
            x = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
            noted.append((args[1:], kwargs))
            hidden.append(x)
            return x  # type: ignore[no-any-return]

        self._run(token_ids, note)
        self._skeleton._arguments = noted
        return hidden[0]

    def logits(self, token_ids: Tensor, hidden: Tensor) -> Tensor:
        """What the last layer gave, `f32[1, T, size]` → `f32[1, T, vocab]`."""
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
            raise skeleton.refusal(f"a pass without its layers failed with {e!r}") from e
        finally:
            for module in skeleton.layers:
                del module.forward


class _NoMemory(TorchFunctionMode):
    """Weights are made by `torch.empty`, and go to the meta device; tables that follow from the
    config are made as ever."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(
            *args, **({**(kwargs or {}), "device": "meta"} if func is torch.empty else kwargs or {})
        )


def _forget(module: nn.Module) -> None:
    for inner in module.modules():
        for name, parameter in inner.named_parameters(recurse=False):
            inner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    # glibc keeps what was freed, in pieces that the next layer's tensors do not fit into: memory
    # would grow with every layer.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
