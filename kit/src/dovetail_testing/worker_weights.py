"""Provide the checks of workers that serve quantized models, with a scheme of the kit and its
checkpoints, intact and damaged."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dovetail.errors import CheckpointError, DovetailError
from dovetail.interfaces.quantization import (
    IN,
    OUT,
    Declined,
    LinearLayer,
    Parameter,
    QuantizationCapabilities,
)
from dovetail.interfaces.weights import LayerWeights
from dovetail.interfaces.worker import WorkerCapabilities
from dovetail.plugin.provider import Options, Provider
from dovetail_testing.contract import common_causes
from dovetail_testing.tiny_model import (
    LAYERS,
    Matrix,
    Tensors,
    TinyModel,
    floats,
    softmax,
    write_tensors,
)
from dovetail_testing.worker_driver import GREEDY
from dovetail_testing.worker_trial import (
    KV_CACHE,
    WorkerTrial,
    error_of,
    no_progress,
    replace_params,
)

METHOD, HEAD = "kit-int8", "lm_head"
LARGE = 1024.0
"""Factor on the values in `large_values`: far more than a one-byte cache can represent without a
scale."""
FP8_LARGEST = 448
NEAR = 1.0
"""Allowed average difference of log-probabilities with keys and values in float8."""


class KitScheme:
    """A scheme with `codes i8[out, in]` and `scale f32[out]`. Its checkpoints do not quantize the
    output projection."""

    unused: tuple[str, ...] = ()

    def parameters(self, layer: LinearLayer) -> dict[str, Parameter] | Declined:
        if layer.stored and layer.name == HEAD:
            return Declined("the kit does not quantize the output projection")
        return {
            "codes": Parameter((OUT, IN), "int8"),
            "scale": Parameter((OUT,), "float32", scale="not negative"),
        }

    def linear(self, layer: LinearLayer, tensors: Mapping[str, Any]) -> Callable[[Any], Any]:
        codes, scale, bias = tensors["codes"], tensors["scale"], tensors.get("bias")

        def multiply(x: Any) -> Any:
            out = x.float() @ codes.float().T * scale
            return (out if bias is None else out + bias.float()).to(x.dtype)

        return multiply

    def kv_scales(self, name: str) -> dict[str, Parameter]:
        return {
            f"{name}.{which}_scale": Parameter((1,), "float32", scale="positive")
            for which in ("k", "v")
        }

    def nbytes(self, layer: LinearLayer) -> int:
        return nbytes(layer.out_features, layer.in_features)

    def dequantize(self, layer: LinearLayer, tensors: Mapping[str, Any]) -> Any:
        return tensors["codes"].float() * tensors["scale"][:, None]

    def quantize(self, layer: LinearLayer, weight: Any) -> dict[str, Any]:
        scale = weight.float().abs().amax(1) / 127
        return {
            "codes": (weight.float() / scale.clamp_min(1e-30)[:, None]).round().char(),
            "scale": scale,
        }


def nbytes(outs: int, ins: int) -> int:
    return outs * ins + 4 * outs


SCHEME: Provider[KitScheme] = Provider(
    METHOD,
    "8 bits, one scale per output",
    lambda context, options: KitScheme(),
    Options,
    QuantizationCapabilities(
        (METHOD,), on_the_fly=True, devices=None, examples=({"quant_method": METHOD},)
    ),
)


def rounded(matrix: Matrix) -> tuple[list[list[int]], list[float]]:
    """Return codes, and the scale of each row as float32."""
    scales = list(array("f", (max(map(abs, row)) / 127 for row in matrix.rows)))
    return [
        [round(x / scale) for x in row] for row, scale in zip(matrix.rows, scales, strict=True)
    ], scales


def large_values(model: TinyModel) -> TinyModel:
    """Return an equivalent model with large values: the output of attention is unchanged."""
    large = TinyModel(model.seed)
    for i in range(LAYERS):
        for name, factor in (("v", LARGE), ("o", 1 / LARGE)):
            key = f"model.layers.{i}.self_attn.{name}_proj.weight"
            large.weights[key] = Matrix(
                [[x * factor for x in row] for row in model.weights[key].rows]
            )
    return large


def write_quantized(
    model: TinyModel, folder: Path, damage: dict[str, float] | None = None
) -> TinyModel:
    """Write the model's checkpoint in the kit's scheme; return the model that it represents.
    `damage` maps the name of a scale to a value to store as its second element."""
    model.write(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": METHOD}})
    )
    tensors: Tensors = {}
    represented = TinyModel(model.seed)
    for name, matrix in model.weights.items():
        stem, rows = name.removesuffix(".weight"), matrix.rows
        if not stem.endswith("_proj"):
            tensors[name] = (
                "F32",
                [len(rows[0])] if "norm" in name else [len(rows), len(rows[0])],
                floats(rows),
            )
            continue
        codes, scales = rounded(matrix)
        represented.weights[name] = Matrix(
            [[c * s for c in row] for row, s in zip(codes, scales, strict=True)]
        )
        scales[1] = (damage or {}).get(f"{stem}.scale", scales[1])
        tensors[f"{stem}.codes"] = (
            "I8",
            [len(rows), len(rows[0])],
            array("b", (c for row in codes for c in row)).tobytes(),
        )
        tensors[f"{stem}.scale"] = ("F32", [len(scales)], floats([scales]))
    for i in range(LAYERS):  # scales for keys of up to 16, and values 1024 times as large
        for which, largest in (("k", 16.0), ("v", 16 * LARGE)):
            name = f"model.layers.{i}.self_attn.{which}_scale"
            tensors[name] = (
                "F32",
                [1],
                floats([[(damage or {}).get(name, largest / FP8_LARGEST)]]),
            )
    write_tensors(folder, tensors)
    return represented


class WeightChecks(WorkerTrial):
    """Checks of weights, mixed into `WorkerContract`."""

    @common_causes(
        "parts of a fused layer are in a different order",
        "a scheme is used for a layer that the checkpoint does not quantize",
    )
    def test_a_quantized_checkpoint(self) -> None:
        """A quantized checkpoint gives the tokens of the weights that it represents."""
        folder = self.folder / "quantized"
        reference = write_quantized(self.model, folder)
        self.or_refused(folder)
        driver = self.new_driver(folder, schemes=(SCHEME,))
        try:
            prompt = list(self.some(21).prompt)
            seq_id = driver.add(prompt)
            (output,) = driver.generate([seq_id], 6)
        finally:
            driver.worker.close()
        for i, logits in enumerate(reference.logits([*prompt, *output])[len(prompt) - 1 : -1]):
            best, second = sorted(logits, reverse=True)[:2]
            if best - second <= 1e-3:
                return
            assert logits[output[i]] == best, (
                f"token {i} is {output[i]}, but the reference has {logits.index(best)}"
            )

    @pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
    @common_causes(
        "`Parameter.check` is not called for tensors that are read",
        "it is called for weights, but not for scales of the cache",
    )
    def test_damaged_scales_are_named(self, wrong: float) -> None:
        """If `Parameter.check` rejects a scale, `load` raises a `CheckpointError` that names the
        tensor: for weights, and for keys and values if the cache has a one-byte dtype."""
        of_weights, of_values = (
            "model.layers.1.mlp.up_proj.scale",
            "model.layers.0.self_attn.v_scale",
        )
        for name, more in (
            (of_weights, {}),
            (of_values, {"kv_cache": {**KV_CACHE, "dtype": "fp8"}}),
        ):
            folder = self.folder / "damaged"
            write_quantized(self.model, folder, {name: wrong})
            self.or_refused(folder, **more)
            worker = self.new_worker(folder, schemes=(SCHEME,), **more)
            error = error_of(lambda worker=worker: worker.load(no_progress))  # type: ignore[misc]
            worker.close()
            assert isinstance(error, CheckpointError), (
                f"{name} has the value {wrong}, but load returned {error!r}"
            )
            assert name in error.message, f"the error does not name {name}: {error.message}"

    @common_causes(
        "the scale of the keys is used for the values",
        "scales are read after the layers were copied",
        "scales are not read",
    )
    def test_scales_of_the_kv_cache(self) -> None:
        """In a float8 cache, keys and values use the scales of the checkpoint, each its own."""
        folder = self.folder / "large-values"
        reference = write_quantized(large_values(self.model), folder)
        more = {"kv_cache": {**KV_CACHE, "dtype": "fp8"}}
        self.or_refused(folder, **more)
        driver = self.new_driver(folder, schemes=(SCHEME,), **more)
        try:
            seq_id = driver.add(
                list(self.some(17).prompt), replace_params(GREEDY, prompt_logprobs=1)
            )
            driver.generate([seq_id], 1, chunk=5)
            state = driver.sequences[seq_id]
            given = [
                e
                for result, row in state.results
                if result.prompt_logprobs
                for e in result.prompt_logprobs[row]
            ]
        finally:
            driver.worker.close()
        assert given, "the prompt has no log-probabilities"
        pairs = zip(reference.logits(state.tokens), state.tokens[1:], strict=False)
        expected = [math.log(softmax(logits)[token]) for logits, token in pairs]
        mean = sum(
            abs(entry.logprobs[0] - want) for entry, want in zip(given, expected, strict=False)
        ) / len(given)
        assert mean <= NEAR, (
            f"log-probabilities are off by {mean:.3f} on average; {NEAR} is allowed with float8"
        )

    @common_causes(
        "layers are in the order of the checkpoint",
        "bytes are those of the plain weight",
        "fused layers are listed twice",
    )
    def test_weights_are_described(self) -> None:
        """`weights` returns for each linear layer its scheme and its bytes, with the same result
        before and after `load`."""
        can = self.provider.capabilities
        if not isinstance(can, WorkerCapabilities) or not can.describes_weights:
            pytest.skip("describes_weights is not declared")
        stored = self.folder / "described"
        write_quantized(self.model, stored)
        for folder, more in ((stored, {}), (self.folder / "model", {"quantization": METHOD})):
            self.or_refused(folder, **more)
            worker: Any = self.new_worker(folder, schemes=(SCHEME,), **more)
            before = worker.weights()
            worker.load(no_progress)
            after = worker.weights()
            worker.close()
            assert before == after, f"weights is {before} before load, but {after} afterwards"
            self.check_described(before)

    def check_described(self, layers: list[LayerWeights]) -> None:
        sizes = {
            n: m
            for n, m in self.model.weights.items()
            if n.endswith("_proj.weight") or n == f"{HEAD}.weight"
        }
        elements = sum(len(m.rows) * len(m.rows[0]) for m in sizes.values())
        total = sum(layer.in_features * layer.out_features for layer in layers)
        assert total == elements, (
            f"the layers have {total} weights in total, but the model has {elements}"
        )
        names = [layer.name for layer in layers]
        ordered = sorted(names, key=lambda n: (n == HEAD, n.split(".")[2:3]))
        assert names == ordered, f"the layers are not in the model's order: {names}"
        for layer in layers:
            scheme = "none" if layer.name == HEAD else METHOD
            plain = layer.in_features * layer.out_features * 4
            expected = (
                plain if layer.name == HEAD else nbytes(layer.out_features, layer.in_features)
            )
            assert layer.scheme == scheme, (
                f"the scheme of {layer.name} is {layer.scheme}, but in the plan it is {scheme}"
            )
            assert layer.nbytes == expected, (
                f"{layer.name} has {layer.nbytes} bytes, but {expected} in the scheme"
            )

    def or_refused(self, folder: Path, **more: Any) -> None:
        """Skip the check if the plan is rejected with a reason, because this model cannot be
        served."""
        error = error_of(lambda: self.composed(folder, schemes=(SCHEME,), **more))
        if isinstance(error, DovetailError):
            pytest.skip(f"not supported, and rejected: {error.message.splitlines()[0]}")
        if isinstance(error, Exception):
            raise error
