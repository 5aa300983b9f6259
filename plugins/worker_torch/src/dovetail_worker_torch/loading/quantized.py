"""Linear layers of quantization schemes: which layer gets which, and how their tensors come from
the checkpoint.

A layer is made (`Scheme.linear`) as soon as its last tensor has been read, so that a scheme which
keeps another form of the weights holds both forms of one layer at a time, not of all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from dovetail.errors import ConfigError, DovetailError, PluginError
from dovetail.interfaces.architecture import Embedding, LayerMaker, Linear, Target
from dovetail.interfaces.attention import AttentionLayer
from dovetail.interfaces.compiled import Compiled, CompiledLinear
from dovetail.interfaces.matmul import MatmulScheme
from dovetail.interfaces.quantization import (
    OUT,
    Declined,
    LinearLayer,
    Parameter,
    Part,
    Scheme,
    quantization_rule,
)
from dovetail.interfaces.weights import LayerWeights
from dovetail.plugin.build_context import BuildContext
from dovetail_worker_torch.loading.agreement import check_stored, stored_tensors
from dovetail_worker_torch.loading.checkpoint import BY_CONFIG, few
from dovetail_worker_torch.runner.shadow import Shadow, ShadowLinear

CANDIDATE = "shadow.quantization"
"""Key of the plan."""
log = logging.getLogger(__name__)


class QuantizedLayers:
    """A `LayerMaker` that follows the plan's rules; what they leave as it is comes from `plain`."""

    def __init__(
        self,
        context: BuildContext,
        plain: LayerMaker,
        dtype: str,
        kv_dtype: str,
        shadow: Shadow | None = None,
    ) -> None:
        self._context, self._plain, self._dtype = context, plain, dtype
        self._has_kv_scales = kv_dtype == "float8_e4m3fn"
        self._kv_scales: dict[str, Target] = {}
        self._passed_over: list[str] = []
        self._schemes: dict[str, Scheme | None] = {
            key: context.build(key) for key in context.plan.quantization_rules
        }
        self._shadow = shadow if CANDIDATE in context.plan.choices else None
        self._candidate: Scheme | None = None if self._shadow is None else context.build(CANDIDATE)
        self._records: list[LayerRecord] = []
        self._declined: dict[str, list[str]] = {}

    def linear(self, name: str, parts: Sequence[Part], in_features: int, bias: bool) -> Linear:
        plan = self._context.plan
        layer = LinearLayer(name, tuple(parts), in_features, bias, self._dtype, plan.device)
        key = quantization_rule(plan, layer)
        made, declined = self._made(key, self._schemes[key], layer), ""
        if isinstance(made, Declined):
            declined = made.reason
            if not self._as(key, layer).stored:
                self._declined.setdefault(made.reason, []).append(name)
            made = self._plain.linear(name, parts, in_features, bias)
        self._records.append(LayerRecord(key, layer, made, declined))
        return made if self._shadow is None else self._shadowed(self._shadow, made, layer)

    def _as(self, key: str, layer: LinearLayer) -> LinearLayer:
        """A layer as a scheme finds it in the checkpoint."""
        method = self._context.model.quantization_method
        return replace(layer, stored=method in self._context.capabilities(key).methods)

    def _made(self, key: str, scheme: Scheme | None, layer: LinearLayer) -> Linear | Declined:
        if scheme is None:
            return self._plain.linear(layer.name, layer.parts, layer.in_features, layer.bias)
        layer, provider = self._as(key, layer), self._context.plan.choices[key].provider
        declared = _ask(provider, layer, partial(scheme.parameters, layer))
        if isinstance(declared, Declined):
            return declared
        return QuantizedLinear(
            provider, scheme, layer, declared, self._context.model.quantization_said
        )

    def _shadowed(self, shadow: Shadow, trusted: Linear, layer: LinearLayer) -> Linear:
        """With the candidate's beside it, unless that declines the layer, or has failed."""
        if CANDIDATE in shadow.report.failed:
            return trusted
        made = shadow.attempt(CANDIDATE, lambda: self._made(CANDIDATE, self._candidate, layer))
        if made is None or isinstance(made, Declined):
            return trusted
        scheme, own = self._candidate, self._as(CANDIDATE, layer)
        plain = layer.in_features * layer.out_features * getattr(torch, layer.dtype).itemsize
        shadow.report.extra_bytes += (
            plain if scheme is None else shadow.attempt(CANDIDATE, lambda: scheme.nbytes(own)) or 0
        )
        return ShadowLinear(shadow, CANDIDATE, layer.name, trusted, made)

    def embedding(self, name: str, vocab_size: int, size: int) -> Embedding:
        return self._plain.embedding(name, vocab_size, size)

    def tied(self, name: str, embedding: Embedding, of: str, vocab_size: int, size: int) -> Linear:
        """Quantized where a rule names it, beside the embedding, which stays as it is: rows of it
        are looked up."""
        plan = self._context.plan
        layer = LinearLayer(name, (Part(name, vocab_size),), size, False, self._dtype, plan.device)
        key = quantization_rule(plan, layer)
        scheme, is_named = self._schemes[key], plan.choices[key].match not in ("", "*")
        # What a checkpoint holds once, and as an embedding, is plain, whatever its method.
        if scheme is None or not is_named or self._as(key, layer).stored:
            return self._plain.tied(name, embedding, of, vocab_size, size)
        layer = replace(layer, parts=(Part(of, vocab_size),))
        made = self._made(key, scheme, layer)
        if isinstance(made, Declined):
            self._declined.setdefault(made.reason, []).append(name)
            return self._plain.tied(name, embedding, of, vocab_size, size)
        self._records.append(LayerRecord(key, layer, made, ""))
        return made

    def attention(self, name: str, layer: AttentionLayer) -> AttentionLayer:
        for scheme in self._schemes.values():
            if scheme is not None and (found := scheme.kv_scales(name)):
                if not self._has_kv_scales:
                    self._passed_over += found
                    return layer
                scales = torch.ones(2, device=self._context.plan.device)
                for kept, (tensor, parameter) in zip(scales, found.items(), strict=True):
                    shape = tuple(axis for axis in parameter.axes if isinstance(axis, int))
                    dtype = getattr(torch, parameter.dtype)
                    self._kv_scales[tensor] = Target(
                        shape, dtype, partial(_copy_scale, tensor, parameter, kept)
                    )
                return replace(layer, kv_scales=scales)
        return layer

    def targets(self) -> dict[str, Target]:
        """Tensors that no layer of the model names: scales of the KV cache."""
        return self._kv_scales

    def unused(self) -> list[str]:
        """Tensors that the schemes do not read, as globs, and scales that the KV cache has no use
        for."""
        schemes = (*self._schemes.values(), self._candidate)
        return self._passed_over + [
            glob for scheme in schemes if scheme is not None for glob in scheme.unused
        ]

    def check(self, tensor_names: Collection[str]) -> None:
        """Once the model is made: raise `ConfigError` for a rule that matches none of its layers,
        and for layers that the checkpoint, which holds `tensor_names`, stores otherwise than they
        are to be read."""
        choices, stored = self._context.plan.choices, stored_tensors(tensor_names)
        for key in self._schemes:
            if choices[key].requested != "auto" and all(
                taken.key != key for taken in self._records
            ):
                layers = few([part.name for taken in self._records for part in taken.layer.parts])
                rule = choices[key].match
                raise ConfigError(
                    f"{key}: {rule!r} matches no linear layer that an earlier rule does not."
                    f" Layers: {layers}"
                )
        for taken in self._records:
            wanted = taken.made.stored if isinstance(taken.made, QuantizedLinear) else None
            for part in taken.layer.parts:
                found = stored.get(part.name, set())
                check_stored(
                    self._context.model, taken.key, choices[taken.key], part.name, found, wanted
                )
        for reason, names in self._declined.items():
            log.warning("not quantized: %s: %s", few(names), reason)

    def weights(self, plain: str) -> list[LayerWeights]:
        """What was made of each layer. `plain`: the kind of those that no scheme makes."""
        return [self._weights(taken, plain) for taken in self._records]

    def _weights(self, taken: LayerRecord, plain: str) -> LayerWeights:
        key, layer, context = taken.key, taken.layer, self._context
        sizes = (layer.name, layer.in_features, layer.out_features, key)
        if not isinstance(taken.made, QuantizedLinear):
            nbytes = layer.in_features * layer.out_features * getattr(torch, layer.dtype).itemsize
            return LayerWeights(*sizes, "none", layer.dtype, plain, nbytes, taken.declined)
        scheme, layer, provider = (
            taken.made.scheme,
            taken.made.layer,
            context.plan.choices[key].provider,
        )
        nbytes = _ask(provider, layer, partial(scheme.nbytes, layer))
        form = (
            str(_ask(provider, layer, partial(scheme.format, layer)))
            if isinstance(scheme, MatmulScheme)
            else ""
        )
        shared = context.capabilities(key).codes
        by = (
            f"matmul: {context.plan.choices['matmul'].provider}"
            if shared
            else f"quantization: {provider}"
        )
        return LayerWeights(*sizes, provider, form, by, nbytes)


class LayerRecord(NamedTuple):
    """A layer as a rule's scheme, or the plain maker, has made it."""

    key: str
    """Of the rule."""
    layer: LinearLayer
    made: Any
    declined: str
    """Why the rule's scheme did not."""


class QuantizedLinear:
    """A layer of a scheme. Complete when all its targets have been stored."""

    def __init__(
        self,
        provider: str,
        scheme: Scheme,
        layer: LinearLayer,
        parameters: dict[str, Parameter],
        asked_by: str = BY_CONFIG,
    ) -> None:
        """`asked_by`: what says how it is stored, for errors."""
        self.layer = layer
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scheme = scheme
        self._provider, self._parameters, self._asked_by = provider, parameters, asked_by
        self._tensors: dict[str, Tensor] = {}
        self._missing = set(self.targets())
        self._multiply: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        y = self._multiply(x)
        if y.shape != (*x.shape[:-1], self.out_features) or y.dtype != x.dtype:
            raise PluginError(
                f"{self.layer.name}: x {[*x.shape]} {x.dtype} became {[*y.shape]} {y.dtype}, not"
                f" {self.out_features} outputs of x's dtype",
                provider=self._provider,
            )
        return y if dtype is None else y.to(dtype)

    def compile(self, x: Tensor, y: Tensor) -> Compiled:
        """See `CompiledLinear`; of schemes that declare `compiled_steps`."""
        return cast(CompiledLinear, self._multiply).compile(x, y)

    @property
    def stored(self) -> list[str] | None:
        """Names of its tensors in the checkpoint; None if that holds a plain weight."""
        return list(self._parameters) if self.layer.stored else None

    def targets(self) -> dict[str, Target]:
        layer, dtype = self.layer, getattr(torch, self.layer.dtype)
        found = {}
        for i, part in enumerate(layer.parts):
            if layer.stored:
                for name, parameter in self._parameters.items():
                    shape, kept = parameter.part_shape(layer, i), getattr(torch, parameter.dtype)
                    made = self._target(
                        part, name, shape, kept, partial(self._put_stored, name, parameter, i)
                    )
                    found[f"{part.name}.{name}"] = made._replace(asked_by=self._asked_by)
            else:
                shape = (part.out_features, layer.in_features)
                found[f"{part.name}.weight"] = self._target(
                    part, "weight", shape, dtype, partial(self._quantize, i)
                )
            if layer.bias:
                put = partial(self._put, "bias", Parameter((OUT,), layer.dtype), i)
                found[f"{part.name}.bias"] = self._target(
                    part, "bias", (part.out_features,), dtype, put
                )
        return found

    def _target(
        self,
        part: Part,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        store: Callable[[Tensor], None],
    ) -> Target:
        def store_one(tensor: Tensor) -> None:
            store(tensor)
            self._missing.discard(f"{part.name}.{name}")
            if not self._missing:
                self._multiply = _ask(
                    self._provider,
                    self.layer,
                    lambda: self.scheme.linear(self.layer, self._tensors),
                )
                self._tensors = {}

        return Target(shape, dtype, store_one)

    def _put_stored(self, name: str, parameter: Parameter, part: int, tensor: Tensor) -> None:
        parameter.check(f"{self.layer.parts[part].name}.{name}", tensor)
        self._put(name, parameter, part, tensor)

    def _put(self, name: str, parameter: Parameter, part: int, tensor: Tensor) -> None:
        if name not in self._tensors:
            shape, dtype = parameter.shape(self.layer), getattr(torch, parameter.dtype)
            self._tensors[name] = torch.empty(shape, dtype=dtype, device=self.layer.device)
        self._tensors[name][parameter.part_index(self.layer, part)].copy_(tensor)

    def _quantize(self, part: int, weight: Tensor) -> None:
        layer = self.layer.part(part)
        made = _ask(self._provider, layer, lambda: self.scheme.quantize(layer, weight.contiguous()))
        for name, parameter in self._parameters.items():
            found, expected = made.get(name), parameter.part_shape(self.layer, part)
            if (
                found is None
                or tuple(found.shape) != expected
                or str(found.dtype) != f"torch.{parameter.dtype}"
            ):
                what = "nothing" if found is None else f"{list(found.shape)} {found.dtype}"
                raise PluginError(
                    f"quantization: {self._provider} declares {name} {list(expected)}"
                    f" {parameter.dtype} for {layer.name}, and quantize gave {what}",
                    provider=self._provider,
                )
            parameter.check(f"{layer.name}.weight, quantized: its {name}", found)
            self._put(name, parameter, part, found)


def _copy_scale(name: str, parameter: Parameter, kept: Tensor, tensor: Tensor) -> None:
    parameter.check(name, tensor)
    kept.copy_(tensor.reshape(()))


def _ask(provider: str, layer: LinearLayer, question: Callable[[], Any]) -> Any:
    """A scheme's answer. What it raises and does not explain becomes a `PluginError` that names
    it."""
    try:
        return question()
    except DovetailError:
        raise
    except Exception as e:
        raise PluginError(
            f"quantization: {provider} failed at {layer.name}: {type(e).__name__}: {e}",
            provider=provider,
        ) from e
