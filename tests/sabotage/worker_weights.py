"""Mistakes that workers make with quantized weights, over torch's."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import msgspec

from dovetail.interfaces.quantization import Parameter
from dovetail_worker_torch import dovetail_workers
from dovetail_worker_torch.loading.quantized import QuantizedLinear
from dovetail_worker_torch.worker import TorchWorker
from sabotage import Sabotages

(TORCH,) = dovetail_workers()
SABOTAGES = Sabotages("worker", TORCH, {"execution": "plain"})
DESCRIBED, DAMAGED, CACHE = (
    "test_weights_are_described",
    "test_damaged_scales_are_named",
    "test_scales_of_the_kv_cache",
)
sabotage = SABOTAGES.of_class(lambda cls, context, options: cls(context, options))


@sabotage(DESCRIBED)
class BytesOfThePlainWeight(TorchWorker):
    """The bytes told are those of the weight before it was quantized."""

    def weights(self):
        return [
            msgspec.structs.replace(w, nbytes=w.in_features * w.out_features * 4)
            for w in super().weights()
        ]


@sabotage(DESCRIBED)
class ALayerLeftOut(TorchWorker):
    """The output projection is not described."""

    def weights(self):
        return super().weights()[:-1]


@sabotage(DESCRIBED)
class DescribesTheRule(TorchWorker):
    """A layer that the scheme has declined is said to be the scheme's."""

    def weights(self):
        found = super().weights()
        return [msgspec.structs.replace(w, scheme=found[0].scheme) for w in found]


@sabotage(DESCRIBED)
class ForgetsAfterLoading(TorchWorker):
    """Once the weights are read, they are no longer described."""

    def load(self, progress):
        super().load(progress)
        self._weights = []


@sabotage(DAMAGED)
class ScalesNotChecked(TorchWorker):
    """What a scale may be is not looked at."""

    def load(self, progress):
        with patch.object(Parameter, "check", lambda self, name, tensor: None):
            super().load(progress)


@sabotage(DAMAGED)
class ScalesOfWeightsAlone(TorchWorker):
    """Scales of keys and values are taken as they are."""

    def load(self, progress):
        check = Parameter.check

        def of_weights(self, name, tensor):
            if "self_attn.k_scale" not in name and "self_attn.v_scale" not in name:
                check(self, name, tensor)

        with patch.object(Parameter, "check", of_weights):
            super().load(progress)


@sabotage(CACHE)
class KeysScaleForValues(TorchWorker):
    """Keys and values have the keys' scale."""

    def load(self, progress):
        super().load(progress)
        layers = self._model.attention_layers
        for i, layer in enumerate(layers):
            if layer.kv_scales is not None:
                layers[i] = replace(layer, kv_scales=layer.kv_scales[:1].repeat(2))


@sabotage(CACHE)
class ScalesNotRead(TorchWorker):
    """The checkpoint's scales of keys and values are passed over."""

    def load(self, progress):
        super().load(progress)
        layers = self._model.attention_layers
        layers[:] = [replace(layer, kv_scales=None) for layer in layers]


@sabotage("test_a_quantized_checkpoint")
class PartsInAnotherOrder(TorchWorker):
    """In a fused layer, the scales of the second part are the first one's."""

    def load(self, progress):
        put = QuantizedLinear._put

        def first(self, name, parameter, part, tensor):
            if name == "scale" and part == 1:
                tensor = self._tensors[name][: len(tensor)]
            put(self, name, parameter, part, tensor)

        with patch.object(QuantizedLinear, "_put", first):
            super().load(progress)
