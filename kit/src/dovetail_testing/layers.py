"""Create linear layers for tests of quantization schemes: weights, tensors and expected results."""

from __future__ import annotations

import itertools
import types
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from dovetail.interfaces.quantization import LinearLayer, Parameter, Part, Side
from dovetail_testing.contract import Broken

if TYPE_CHECKING:
    from torch import Tensor

PRECISION = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 1.2e-2}
"""Allowed error of a product relative to its norm, by dtype of the layer."""
ACTIVATIONS = {"int8": 0.02, "float8_e4m3fn": 0.06}
"""Additional error from quantized inputs."""


@dataclass(frozen=True)
class Case:
    """A layer to test."""

    config: dict[str, Any] | None
    """The checkpoint's quantization_config; None for plain weights, quantized on the fly."""
    outs: tuple[int, ...] = (256,)
    """Number of outputs of each part."""
    in_features: int = 256
    bias: bool = False
    dtype: str = "float32"
    num_rows: int = 3

    def __str__(self) -> str:
        stored = "plain weights" if self.config is None else f"quantization_config {self.config}"
        parts = " + ".join(map(str, self.outs))
        size = f"{parts} outputs of {self.in_features} inputs"
        return f"{size}{', bias' * self.bias}, {self.dtype}, {self.num_rows} rows, {stored}"

    def layer(self, device: str, name: str = "model.layers.0.mlp.kit_proj") -> LinearLayer:
        names = [name] if len(self.outs) == 1 else [f"{name}{i}" for i in range(len(self.outs))]
        parts = tuple(Part(n, size) for n, size in zip(names, self.outs, strict=True))
        return LinearLayer(
            name, parts, self.in_features, self.bias, self.dtype, device, self.config is not None
        )

    def simpler(self) -> list[Case]:
        """Return cases that are simpler in one respect."""
        found = [
            replace(self, outs=self.outs[:1]),
            replace(self, bias=False),
            replace(self, num_rows=1),
        ]
        found += [replace(self, dtype="float32"), replace(self, in_features=self.in_features // 2)]
        found.append(replace(self, outs=tuple(size // 2 for size in self.outs)))
        return [
            case
            for case in found
            if case != self and case.in_features >= 32 and min(case.outs) >= 32
        ]


def make_weights(case: Case, seed: int) -> list[Tensor]:
    """Create a plain weight for each part. Rows, columns and parts have different magnitudes, so
    that a misplaced scale is detected."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    weights = []
    for i, size in enumerate(case.outs):
        weight = torch.randn(size, case.in_features, generator=generator)
        weight *= torch.rand(size, 1, generator=generator) + 0.2
        weight *= torch.rand(1, case.in_features, generator=generator) + 0.5
        weights.append(weight * 0.05 * 4**i)
    return weights


def new_tensors(layer: LinearLayer, parameters: dict[str, Parameter]) -> dict[str, Tensor]:
    """Allocate tensors as declared."""
    import torch

    return {
        name: torch.zeros(p.shape(layer), dtype=getattr(torch, p.dtype), device=layer.device)
        for name, p in parameters.items()
    }


def fill(
    layer: LinearLayer, parameters: dict[str, Parameter], parts: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Assemble the layer's tensors from those of its parts, as a worker loads them. Raises `Broken`
    if they are not as declared."""
    tensors = new_tensors(layer, parameters)
    for i, found in enumerate(parts):
        if found.keys() != parameters.keys():
            raise Broken(f"tensors {sorted(found)} are stored, but {sorted(parameters)} declared")
        for name, parameter in parameters.items():
            kind = str(found[name].dtype).removeprefix("torch.")
            expected = (parameter.part_shape(layer, i), parameter.dtype)
            if (tuple(found[name].shape), kind) != expected:
                raise Broken(
                    f"{name} is {list(found[name].shape)} {kind}, but declared as"
                    f" {list(expected[0])} {expected[1]}"
                )
            parameter.check(f"{layer.parts[i].name}.{name}", found[name])
            tensors[name][parameter.part_index(layer, i)] = found[name].to(layer.device)
    return tensors


def as_read(parameters: dict[str, Parameter], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a checkpoint's tensors as a worker does: floating types of 16 and more bits are
    converted to each other."""
    import torch

    floating = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
    wanted = {
        name: getattr(torch, parameters[name].dtype) for name in found.keys() & parameters.keys()
    }
    return {
        name: tensor.to(wanted[name]) if {tensor.dtype, wanted.get(name)} <= floating else tensor
        for name, tensor in found.items()
    }


def fill_shard(
    layer: LinearLayer,
    parameters: dict[str, Parameter],
    parts: list[dict[str, Tensor]],
    side: Side,
    rank: int,
    size: int,
) -> tuple[LinearLayer, dict[str, Tensor]]:
    """Return what one rank reads. Raises `ValueError` if the layer cannot be sharded this way."""
    shard = layer.shard(side, rank, size)
    tensors = new_tensors(shard, parameters)
    for i, found in enumerate(parts):
        for name, parameter in parameters.items():
            piece = found[name][parameter.shard_index(layer, i, side, rank, size)]
            tensors[name][parameter.part_index(shard, i)] = piece.to(layer.device)
    return shard, tensors


def rows_of(layer: LinearLayer, rank: int, size: int) -> list[slice]:
    """Return the layer's outputs that a rank of `size` has: a share of each part."""
    starts = itertools.accumulate((part.out_features for part in layer.parts), initial=0)
    shares = [
        (start, part.out_features // size) for start, part in zip(starts, layer.parts, strict=False)
    ]
    return [slice(start + rank * share, start + (rank + 1) * share) for start, share in shares]


def make_input(case: Case, seed: int, device: str) -> Tensor:
    """Create `[T, in]`, whose rows are parts of wider ones."""
    import torch

    wide = torch.randn(
        case.num_rows, case.in_features + 24, generator=torch.Generator().manual_seed(seed + 1)
    )
    return wide.to(getattr(torch, case.dtype)).to(device)[:, : case.in_features]


def compare(found: Tensor, exact: Tensor, limit: float, what: str) -> None:
    """Raise `Broken` if `found [T, out]` differs from `exact` by more than `limit` of its norm:
    overall, by row or by output."""
    import torch

    if found.shape != exact.shape:
        raise Broken(f"{what}: the output is {list(found.shape)}, expected {list(exact.shape)}")
    got, exact = found.double().cpu(), exact.double().cpu()
    if not bool(torch.isfinite(got).all()):
        raise Broken(f"{what}: the output contains NaN or infinity")
    # Single numbers may be unlucky: a column of one row is judged by the magnitude of all.
    for axis, factor in ((None, 1.0), (1, 2.0), (0, 8.0)):
        dims = (0, 1) if axis is None else (axis,)
        error, size = (got - exact).norm(dim=dims), exact.norm(dim=dims)
        typical = exact.pow(2).mean().sqrt() * (exact.numel() / max(1, error.numel())) ** 0.5
        worst = (error / torch.maximum(size, typical).clamp_min(1e-30)).max()
        if worst > limit * factor:
            where = {None: "", 1: " in a row", 0: " in an output"}[axis]
            raise Broken(
                f"{what}: off by {worst:.2%} of its norm{where}; {limit * factor:.2%} is allowed"
            )


def bias_of(layer: LinearLayer, seed: int) -> dict[str, Tensor]:
    """Return the bias by name, if the layer has one."""
    import torch

    bias = torch.randn(layer.out_features, generator=torch.Generator().manual_seed(seed + 2))
    return {"bias": bias.to(getattr(torch, layer.dtype)).to(layer.device)} if layer.bias else {}


def held_bytes(root: object) -> int:
    """Return the bytes of all tensors that an object references through attributes, containers,
    closures and bound methods."""
    import torch

    seen: set[int] = set()
    storages: dict[int, int] = {}
    todo: list[Any] = [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(
            item, type | types.ModuleType | str | bytes | int | float
        ):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple | set | frozenset):
            todo += item
        elif isinstance(item, types.MethodType):
            todo += [item.__self__, item.__func__]
        elif isinstance(item, types.FunctionType):
            todo += [cell.cell_contents for cell in item.__closure__ or ()] + list(
                item.__defaults__ or ()
            )
        elif isinstance(item, partial):
            todo += [item.func, *item.args, *item.keywords.values()]
        else:
            todo += getattr(item, "__dict__", {}).values()
            slots = [s for cls in type(item).__mro__ for s in getattr(cls, "__slots__", ())]
            todo += [getattr(item, s) for s in slots if isinstance(s, str) and hasattr(item, s)]
    return sum(storages.values())
