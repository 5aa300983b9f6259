"""Quantize a model layer by layer: each decoder layer is read, measured, quantized, written and
released before the next one is read.

Three streams of hidden states pass through the layers. The calibration text passes through
quantized layers, so that each layer is fitted to the inputs that it will get. The evaluation text
passes through the original and through the quantized layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dovetail.errors import ConfigError
from dovetail.interfaces.worker import Progress
from dovetail_quantize.checkpoint import INDEX, as_float
from dovetail_quantize.folder import OutputFolder
from dovetail_quantize.inputs import measure
from dovetail_quantize.report import Report
from dovetail_quantize.schemes import Scheme
from dovetail_quantize.skeleton import Skeleton
from dovetail_quantize.texts import Texts

Streams = dict[str, Tensor]
STEPS = 4
"""Number of progress steps per layer."""


def check(skeleton: Skeleton, scheme: Scheme) -> None:
    """Raise `ConfigError`, before anything is written, if the scheme does not support the model."""
    for index in range(len(skeleton.layers)):
        for name, linear in skeleton.linears(index).items():
            scheme.check(skeleton.prefix(index) + name, linear)


def bytes_needed(skeleton: Skeleton, scheme: Scheme, texts: Texts) -> int:
    """Return the disk space needed: the finished weights and the hidden states, twice, because new
    ones are written before the old ones are deleted."""
    sizes = skeleton.checkpoint.sizes()
    total = sum(sizes.values())
    for index in range(len(skeleton.layers)):
        for name, linear in skeleton.linears(index).items():
            total += scheme.nbytes(linear) - sizes.get(f"{skeleton.prefix(index)}{name}.weight", 0)
    windows = len(texts.calibration) + 2 * len(texts.evaluation)
    return total + 2 * 4 * windows * texts.calibration.shape[1] * int(skeleton.text.hidden_size)


@torch.inference_mode()
def quantize_model(
    skeleton: Skeleton, scheme: Scheme, texts: Texts, folder: OutputFolder, progress: Progress
) -> Report:
    """Quantize the remaining layers into the folder. Returns the report."""
    num_layers = len(skeleton.layers)
    task = f"quantizing {num_layers} layers"

    def report_progress(index: int, step: int) -> None:
        progress(task, index * STEPS + step, (num_layers + 1) * STEPS)

    report_progress(len(folder.rows), 0)
    embedded = _embed(skeleton, texts, only_one=bool(folder.rows))
    if folder.rows:
        streams = folder.streams()
    else:
        streams = _initial_streams(embedded, len(texts.calibration))
        folder.begin(streams)
    del embedded
    file_of = _Files(num_layers + 1)
    for index in range(len(folder.rows), num_layers):
        with skeleton.loaded(index) as layer:
            tensors, row = _quantize_layer(
                skeleton,
                scheme,
                index,
                layer,
                streams,
                lambda step, i=index: report_progress(i, step),
            )  # type: ignore[misc]
        folder.finish_layer(file_of.layer(index), tensors, row, streams)
        report_progress(index + 1, 0)
    perplexity = _perplexities(skeleton, texts, streams) if len(texts.evaluation) else None
    _finish(skeleton, scheme, folder, file_of)
    report_progress(num_layers, STEPS)
    before = sum(skeleton.checkpoint.sizes().values())
    return Report(folder.rows, before, folder.size(), perplexity, texts.remark)


def _embed(skeleton: Skeleton, texts: Texts, *, only_one: bool) -> list[Tensor]:
    """Return the hidden states before the first layer for each window. As a side effect, the
    skeleton learns the arguments of all layers; one window (`only_one`) is enough for that."""
    samples = torch.cat([texts.calibration, texts.evaluation])
    if not len(samples):
        return []
    with skeleton.ends_loaded() as ends:
        return [ends.embed(ids[None]) for ids in (samples[:1] if only_one else samples)]


def _initial_streams(embedded: list[Tensor], num_calibration: int) -> Streams:
    measured, evaluated = embedded[:num_calibration], embedded[num_calibration:]
    streams = {"calibration": measured, "plain": evaluated, "rounded": evaluated}
    return {name: torch.cat(stream) for name, stream in streams.items() if stream}


def _quantize_layer(
    skeleton: Skeleton,
    scheme: Scheme,
    index: int,
    layer: nn.Module,
    streams: Streams,
    report_progress: Callable[[int], None],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Quantize a layer. Returns its tensors by full name and its row of the report. Advances the
    streams to the next layer's inputs."""

    def through(name: str) -> None:
        for sample in torch.split(streams[name], 1) if name in streams else ():
            sample.copy_(skeleton.run_layer(index, sample))

    linears, prefix = skeleton.linears(index), skeleton.prefix(index)
    through("plain")
    report_progress(1)
    samples = torch.split(streams["calibration"], 1) if "calibration" in streams else ()
    inputs = measure(
        linears, skeleton.dtype, (partial(skeleton.run_layer, index, sample) for sample in samples)
    )
    report_progress(2)
    probe = partial(skeleton.run_layer, index, samples[0]) if samples else None
    rounded = scheme.round(layer, linears, inputs, skeleton.dtype, probe)
    report_progress(3)
    through("calibration")
    with _quantized_inputs(linears, scheme.round_inputs):
        through("rounded")
    row: dict[str, Any] = {"layer": index, "errors": rounded.errors}
    if "plain" in streams:
        row["drift"] = _ratio(streams["rounded"] - streams["plain"], streams["plain"])
    if not all(math.isfinite(e) for e in rounded.errors.values()):
        raise ConfigError(
            f"{prefix}*: the quantized weights are not finite: does the checkpoint contain NaN or"
            " infinite weights?"
        )
    others = _other_tensors(skeleton, index, layer, linears)
    return {f"{prefix}{name}": tensor for name, tensor in rounded.tensors.items()} | others, row


def _other_tensors(
    skeleton: Skeleton, index: int, layer: nn.Module, linears: Mapping[str, nn.Linear]
) -> dict[str, Tensor]:
    """Return the layer's other tensors as they are in the checkpoint, except those that the scheme
    has changed."""
    prefix = skeleton.prefix(index)
    names = [
        n
        for n in skeleton.of_layer(index)
        if n.removeprefix(prefix).removesuffix(".weight") not in linears
    ]
    stored, now = skeleton.checkpoint.read(names), dict(layer.named_parameters())
    found = {}
    for name, tensor in stored.items():
        present = now.get(name.removeprefix(prefix))
        same = present is None or torch.equal(present, as_float(tensor))
        found[name] = tensor if same or present is None else present.to(tensor.dtype)
    return found


@contextmanager
def _quantized_inputs(
    linears: Mapping[str, nn.Linear], round_inputs: Callable[[Tensor], Tensor] | None
) -> Iterator[None]:
    """Apply the scheme's activation quantization to the inputs of the linear layers."""

    def rounded(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args if round_inputs is None else (round_inputs(args[0]), *args[1:])

    handles = [linear.register_forward_pre_hook(rounded) for linear in linears.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _ratio(difference: Tensor, of: Tensor) -> float:
    return float(difference.norm() / of.norm().clamp_min(1e-30))


def _perplexities(skeleton: Skeleton, texts: Texts, streams: Streams) -> tuple[float, float]:
    """Return the perplexity before and after quantization."""
    losses = {"plain": 0.0, "rounded": 0.0}
    with skeleton.ends_loaded() as ends:
        for i, ids in enumerate(texts.evaluation):
            for name in losses:
                logits = ends.logits(ids[None], streams[name][i : i + 1])[0]
                losses[name] += float(nn.functional.cross_entropy(logits[:-1], ids[1:]))
    before, after = (
        math.exp(losses[name] / len(texts.evaluation)) for name in ("plain", "rounded")
    )
    return before, after


class _Files:
    """Names of the weight files: one per layer, and the last one for all other tensors."""

    def __init__(self, count: int) -> None:
        self.count = count

    def layer(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{self.count:05d}.safetensors"

    @property
    def outside(self) -> str:
        return self.layer(self.count - 1)


def _finish(skeleton: Skeleton, scheme: Scheme, folder: OutputFolder, file_of: _Files) -> None:
    folder.write_tensors(file_of.outside, skeleton.checkpoint.read(skeleton.outside()))
    weight_map = {}
    for i in range(file_of.count):
        with safe_open(folder.path / file_of.layer(i), framework="pt") as file:
            weight_map.update(dict.fromkeys(file.keys(), file_of.layer(i)))
    index = {
        "metadata": {"total_size": folder.size()},
        "weight_map": dict(sorted(weight_map.items())),
    }
    folder.write_text(INDEX, json.dumps(index, indent=2) + "\n")
    folder.copy_from(skeleton.folder)
