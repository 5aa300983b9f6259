"""Checks of workers that serve quantized models: a scheme of the kit, its checkpoint, and what may
be wrong with that."""

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
"""What the values of `large_values` are multiplied by: far more than a cache of one byte holds
without a scale."""
FP8_LARGEST = 448
NEAR = 1.0
"""How far log-probabilities may be off with keys and values in float8."""


class KitScheme:
    """`codes i8[out, in]` and `scale f32[out]`; the output projection is left out of its
    checkpoints."""

    unused: tuple[str, ...] = ()

    def parameters(self, layer: LinearLayer) -> dict[str, Parameter] | Declined:
        if layer.stored and layer.name == HEAD:
            return Declined("the kit leaves it out")
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
    "8 bits, a scale for each output",
    lambda context, options: KitScheme(),
    Options,
    QuantizationCapabilities(
        (METHOD,), on_the_fly=True, devices=None, examples=({"quant_method": METHOD},)
    ),
)


def rounded(matrix: Matrix) -> tuple[list[list[int]], list[float]]:
    """Codes, and the scale of each row as float32 holds it."""
    scales = list(array("f", (max(map(abs, row)) / 127 for row in matrix.rows)))
    return [
        [round(x / scale) for x in row] for row, scale in zip(matrix.rows, scales, strict=True)
    ], scales


def large_values(model: TinyModel) -> TinyModel:
    """The same model, in which values are large: what comes out of attention is as it was."""
    made = TinyModel(model.seed)
    for i in range(LAYERS):
        for name, factor in (("v", LARGE), ("o", 1 / LARGE)):
            key = f"model.layers.{i}.self_attn.{name}_proj.weight"
            made.weights[key] = Matrix(
                [[x * factor for x in row] for row in model.weights[key].rows]
            )
    return made


def write_quantized(
    model: TinyModel, folder: Path, damage: dict[str, float] | None = None
) -> TinyModel:
    """The model's checkpoint in the kit's scheme, and the model that it stands for. `damage`: a
    scale's name, and what is to stand in its second place."""
    model.write(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": METHOD}})
    )
    tensors: Tensors = {}
    stands_for = TinyModel(model.seed)
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
        stands_for.weights[name] = Matrix(
            [[c * s for c in row] for row, s in zip(codes, scales, strict=True)]
        )
        scales[1] = (damage or {}).get(f"{stem}.scale", scales[1])
        tensors[f"{stem}.codes"] = (
            "I8",
            [len(rows), len(rows[0])],
            array("b", (c for row in codes for c in row)).tobytes(),
        )
        tensors[f"{stem}.scale"] = ("F32", [len(scales)], floats([scales]))
    for i in range(LAYERS):  # scales that hold keys of up to 16, and values 1024 times as large
        for which, largest in (("k", 16.0), ("v", 16 * LARGE)):
            name = f"model.layers.{i}.self_attn.{which}_scale"
            tensors[name] = (
                "F32",
                [1],
                floats([[(damage or {}).get(name, largest / FP8_LARGEST)]]),
            )
    write_tensors(folder, tensors)
    return stands_for


class WeightChecks(WorkerTrial):
    """Mixed into `WorkerContract`."""

    @common_causes(
        "parts of a fused layer in another order",
        "a scheme asked for a layer that the checkpoint leaves out",
    )
    def test_a_quantized_checkpoint(self) -> None:
        """A checkpoint of a scheme gives the tokens of the weights that it stands for."""
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
                f"token {i} is {output[i]}, and the reference says {logits.index(best)}"
            )

    @pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
    @common_causes(
        "`Parameter.check` not called for what is read", "called for weights, and not for the cache"
    )
    def test_damaged_scales_are_named(self, wrong: float) -> None:
        """A scale that `Parameter.check` refuses is a `CheckpointError` from `load` that names the
        tensor: of weights, and of keys and values where the cache has one byte."""
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
                f"{name} holds {wrong}, and load says {error!r}"
            )
            assert name in error.message, f"the error does not name {name}: {error.message}"

    @common_causes(
        "the keys' scale given to the values",
        "scales read after the layers were copied",
        "scales not read",
    )
    def test_scales_of_the_kv_cache(self) -> None:
        """In a cache of float8, keys and values have the scales of the checkpoint, each its own."""
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
            told = driver.told[seq_id]
            given = [
                e
                for result, row in told.results
                if result.prompt_logprobs
                for e in result.prompt_logprobs[row]
            ]
        finally:
            driver.worker.close()
        assert given, "the prompt has no log-probabilities"
        pairs = zip(reference.logits(told.tokens), told.tokens[1:], strict=False)
        expected = [math.log(softmax(logits)[token]) for logits, token in pairs]
        mean = sum(
            abs(entry.logprobs[0] - want) for entry, want in zip(given, expected, strict=False)
        ) / len(given)
        assert mean <= NEAR, (
            f"log-probabilities are off by {mean:.3f} on average, {NEAR} is allowed with float8"
        )

    @common_causes(
        "layers in the order of the checkpoint",
        "bytes of the plain weight",
        "fused layers told twice",
    )
    def test_weights_are_described(self) -> None:
        """`weights` says of each linear layer which scheme keeps it and in how many bytes: before
        `load` what it says after."""
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
            assert before == after, f"before load it says {before}, and after it {after}"
            self.check_described(before)

    def check_described(self, layers: list[LayerWeights]) -> None:
        sizes = {
            n: m
            for n, m in self.model.weights.items()
            if n.endswith("_proj.weight") or n == f"{HEAD}.weight"
        }
        elements = sum(len(m.rows) * len(m.rows[0]) for m in sizes.values())
        told = sum(layer.in_features * layer.out_features for layer in layers)
        assert told == elements, f"the layers have {told} weights in all, and the model {elements}"
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
                f"{layer.name} is kept by {layer.scheme}, and the plan says {scheme}"
            )
            assert layer.nbytes == expected, (
                f"{layer.name}: {layer.nbytes} bytes, and the scheme says {expected}"
            )

    def or_refused(self, folder: Path, **more: Any) -> None:
        """End the check if the plan is refused, with a reason, because nobody here serves it."""
        error = error_of(lambda: self.composed(folder, schemes=(SCHEME,), **more))
        if isinstance(error, DovetailError):
            pytest.skip(f"not served here, and refused: {error.message.splitlines()[0]}")
        if isinstance(error, Exception):
            raise error
