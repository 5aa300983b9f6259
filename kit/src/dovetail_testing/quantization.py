"""Test the contract of the quantization extension point. A plugin's test is a subclass:

    class TestMyScheme(QuantizationContract):
        provider = PROVIDER
        configs = ({"quant_method": "mine", "bits": 4},)

Layers of many shapes are stored as the scheme declares, loaded as a worker would (whole, fused and
sharded), and compared with a product by the weight that the scheme's own `dequantize` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from dovetail.errors import CheckpointError, ConfigError
from dovetail.interfaces.quantization import (
    PLAIN,
    Declined,
    LinearLayer,
    Parameter,
    Part,
    QuantizationCapabilities,
    Scheme,
    Side,
)
from dovetail.plugin.provider import Provider
from dovetail_testing.contract import KIT_MODEL, Broken, Contract, common_causes
from dovetail_testing.layers import (
    ACTIVATIONS,
    PRECISION,
    Case,
    as_read,
    bias_of,
    compare,
    fill,
    fill_shard,
    held_bytes,
    make_input,
    make_weights,
    rows_of,
)
from dovetail_testing.matmul import KIT_MATMUL

if TYPE_CHECKING:
    from torch import Tensor

SHAPES = (
    ((256,), 256),
    ((512,), 128),
    ((128, 64, 64), 256),
    ((192, 192), 512),
    ((64,), 1024),
    ((320,), 320),
)
ODD = ((61,), 128), ((128,), 100), ((64, 24), 256), ((8,), 8)
"""Numbers of outputs by part, and of inputs. A scheme may decline the odd ones with a reason."""
ROWS = 1, 2, 7, 33, 130


class QuantizationContract(Contract):
    """The contract of quantization schemes, from the checkpoint to the product."""

    extension_point = "quantization"
    inner: ClassVar[dict[str, Provider[Any]]] = {"matmul": KIT_MATMUL}
    configs: ClassVar[tuple[dict[str, Any], ...]] = ()
    """quantization_configs of checkpoints to test, instead of the `examples` that the provider
    declares."""
    pack: ClassVar[Callable[[dict[str, Any], LinearLayer, Tensor], dict[str, Tensor]] | None] = None
    """(quantization_config, layer of one part, plain weight) → what a tool that writes such
    checkpoints would store for the part, in the tool's own floating-point types. The default is the
    scheme's own `quantize`, as for weights quantized on the fly."""
    weight_error: ClassVar[float] = 0.15
    """Allowed error of dequantized weights, relative to the norm of the plain ones."""
    declined: ClassVar[tuple[str, ...]] = ()
    """Names of layers that those checkpoints do not quantize."""

    @property
    def can(self) -> QuantizationCapabilities:
        can = self.provider.capabilities
        assert isinstance(can, QuantizationCapabilities), (
            "the capabilities of a quantization provider must be QuantizationCapabilities"
        )
        return can

    @property
    def tried(self) -> tuple[dict[str, Any], ...]:
        return self.configs or self.can.examples

    # The declaration.

    @common_causes("capabilities declare a method that examples do not contain")
    def test_declaration(self) -> None:
        """The provider reads checkpoints of some method or quantizes on the fly, and declares an
        example for each method."""
        can = self.can
        assert can.framework == "torch", "the kit supports only torch tensors"
        assert can.methods or can.on_the_fly, (
            "the provider neither reads checkpoints (methods) nor quantizes (on_the_fly)"
        )
        given = {config["quant_method"] for config in self.tried}
        assert given == set(can.methods) - {PLAIN}, (
            f"methods {can.methods} are declared, but the examples are of {sorted(given)}"
        )
        assert self.can.activations is None or self.can.activations in ACTIVATIONS, (
            f"activations must be one of {list(ACTIVATIONS)}"
        )
        for config in [*self.tried, *([None] if self.can.on_the_fly else [])]:
            scheme = self.scheme(config)
            assert all(isinstance(glob, str) for glob in scheme.unused), "unused must contain globs"
            scales = scheme.kv_scales("model.layers.0.self_attn")
            if scales is not None:
                assert len(scales) == 2, (
                    f"kv_scales must have a tensor for keys and one for values: {list(scales)}"
                )
                assert all(axis == 1 for p in scales.values() for axis in p.axes), (
                    "kv_scales must be tensors with one element"
                )

    @common_causes("on_the_fly is declared, or not declared, by mistake")
    def test_plain_weights(self) -> None:
        """Plain weights are quantized if `on_the_fly` is declared, and rejected otherwise."""
        accepts_plain = self.can.on_the_fly or PLAIN in self.can.methods
        self.needs(
            accepts_plain,
            "quantizing plain weights (on_the_fly)",
            self.selection_context(by_name=True),
        )

    @common_causes("why_not does not check the method")
    def test_checkpoints_of_another_method_are_refused(self) -> None:
        """A checkpoint whose method is not declared is rejected with a reason."""
        model = replace(KIT_MODEL, quantization_config={"quant_method": "kit-unknown"})
        refusal = self.refusal(replace(self.selection_context(by_name=True), model=model))
        assert refusal is not None, "a checkpoint of an unknown method is not rejected"
        assert "kit-unknown" in refusal, f"the reason must name the method: {refusal}"

    @common_causes(
        "a size that is not a multiple of a group or a word is neither supported nor declined",
        "the reason is empty",
    )
    def test_every_layer_is_taken_or_declined_with_a_reason(self) -> None:
        """`parameters` declares tensors of torch dtypes, or declines with a reason; the usual sizes
        are not all declined."""
        import torch

        for config in self.kinds():
            scheme, num_supported = self.scheme(config), 0
            for outs, in_features in SHAPES + ODD:
                case = Case(config, outs, in_features)
                declared = self.declared(scheme, case.layer(self.device))
                if not isinstance(declared, dict):
                    assert declared, f"{case}: declined without a reason"
                    continue
                num_supported += (outs, in_features) in SHAPES
                assert declared, f"{case}: no tensors are declared"
                for name, parameter in declared.items():
                    assert isinstance(getattr(torch, parameter.dtype, None), torch.dtype), (
                        f"{name}: dtype {parameter.dtype}"
                    )
                assert "bias" not in declared, "a scheme must not declare the bias"
            assert num_supported, f"none of {SHAPES} is supported ({Case(config)})"

    @common_causes(
        "the checkpoint's list of layers that are not quantized is not read",
        "names are compared as a whole although they are patterns",
    )
    def test_layers_that_are_not_quantized_are_declined(self) -> None:
        """A layer that the checkpoint does not quantize (`declined`) is declined; if it is fused
        with one that is quantized, that is a `ConfigError`."""
        for config in self.kinds():
            for name in self.declined if config else ():
                scheme, layer = (
                    self.scheme(config),
                    LinearLayer(name, (Part(name, 256),), 256, False, "float32", self.device),
                )
                answer = scheme.parameters(layer)
                assert isinstance(answer, Declined), f"{name} is not declined"
                assert answer.reason, f"{name} is declined without a reason"
                mixed = replace(
                    layer,
                    name="fused",
                    parts=(Part(name, 256), Part("model.layers.7.mlp.kit_proj", 256)),
                )
                try:
                    scheme.parameters(mixed)
                except ConfigError:
                    continue
                raise Broken(
                    f"a layer fused of {name} and a quantized layer was accepted",
                    input=str(mixed),
                )

    # Results.

    @common_causes(
        "scales are along the wrong axis",
        "a zero point is left out",
        "sums are computed in 16 bits",
        "the output has another dtype",
    )
    def test_products_are_those_of_the_dequantized_weight(self) -> None:
        """`linear` computes `x @ dequantize().T + bias` in x's dtype, for any number of rows, and
        does not modify its input."""
        dtypes = self.can.dtypes or tuple(PRECISION)
        cases = [
            Case(c, outs, n, dtype=dtypes[0]) for c in self.kinds() for outs, n in SHAPES + ODD
        ]
        cases += [Case(c, bias=True, dtype=d) for c in self.kinds() for d in dtypes]
        cases += [Case(c, num_rows=rows, dtype=dtypes[-1]) for c in self.kinds() for rows in ROWS]
        for case in cases:
            self.attempt(case, self.check_product, Case.simpler)

    @common_causes(
        "rounding is not to the nearest value",
        "scales belong to the wrong group",
        "codes are packed in a different order",
    )
    def test_weights_are_near_the_plain_ones(self) -> None:
        """The dequantized weight is within `weight_error` of the plain one, and is the same each
        time."""
        for config in self.kinds():
            for outs, in_features in SHAPES:
                self.attempt(Case(config, outs, in_features), self.check_weights, Case.simpler)

    @common_causes("a scale of zero is used as a divisor")
    def test_zeros_stay_zero(self) -> None:
        """A weight of zeros has a zero product, and a row of zeros causes no NaN in another."""

        def check(case: Case) -> None:
            weights = make_weights(case, self.seed)
            weights[0][1:] = 0
            if loaded := self.load(case, weights):
                scheme, layer, _, tensors, _ = loaded
                weight = scheme.dequantize(layer, tensors)
                if not bool(weight.isfinite().all()) or bool(weight[1 : case.outs[0]].any()):
                    raise Broken("rows of zeros are not zero, or not finite, after dequantization")

        for config in self.kinds():
            self.attempt(Case(config), check, Case.simpler)

    @common_causes(
        "a scale is not declared as one (Parameter.scale)",
        "the error raised is not a CheckpointError",
    )
    def test_damaged_scales_are_refused(self) -> None:
        """A tensor of 16-bit or 32-bit numbers with NaN or an infinity is rejected, by what
        `Parameter.scale` declares or with a `CheckpointError` from `linear`; or it does not affect
        any product."""
        for config in self.kinds():
            self.attempt(Case(config), self.check_damage, Case.simpler)

    # Fused and sharded.

    @common_causes(
        "one scale for the whole tensor is used for all parts",
        "the order of the inputs is that of the first part",
    )
    def test_fused_is_its_parts(self) -> None:
        """A fused layer computes the concatenated products of its parts, whose weights differ in
        magnitude."""
        for config in self.kinds():
            for outs in ((128, 64, 64), (256, 256)):
                self.attempt(Case(config, outs), self.check_fused, Case.simpler)

    @common_causes(
        "an axis is not declared",
        "the pack factor or the group is wrong",
        "sizes are those of the whole layer",
    )
    def test_sharded_is_whole(self) -> None:
        """The tensors of each rank are slices of the whole ones along the declared axes, and
        compute its share of the product."""
        for config in self.kinds():
            for outs in ((256,), (128, 64, 64)):
                self.attempt(Case(config, outs, 512), self.check_sharded_by_outputs, Case.simpler)
                self.attempt(Case(config, outs, 512), self.check_sharded_by_inputs, Case.simpler)

    # Cost.

    @common_causes(
        "weights are expanded and kept",
        "the checkpoint's tensors are kept besides a converted form",
    )
    def test_memory_is_as_declared(self) -> None:
        """The memory of a layer is within 5 % of `nbytes`."""
        for config in self.kinds():
            case = Case(config, (1024,), 1024)
            loaded = self.load(case, make_weights(case, self.seed))
            assert loaded, f"{case} is declined"
            scheme, layer, _, tensors, _ = loaded
            multiply = scheme.linear(layer, tensors)
            shared = held_bytes(scheme)  # tables that all layers of the scheme use
            del tensors
            held, declared = held_bytes(multiply), scheme.nbytes(layer)
            assert declared * 0.95 <= held <= declared * 1.05 + shared + 4096, (
                f"{case}: {held} bytes are in use, but {declared} are declared"
            )

    # How a layer is tested.

    def kinds(self) -> list[dict[str, Any] | None]:
        """Return the quantization_configs to test, with None for plain weights."""
        found = [*self.tried, *([None] if self.can.on_the_fly else [])]
        if not found:
            pytest.skip("the provider quantizes nothing, so there is no layer to test")
        return found

    def scheme(self, config: dict[str, Any] | None) -> Scheme:
        built: Scheme = self.build(
            self.build_context(model=replace(KIT_MODEL, quantization_config=config))
        )
        return built

    def declared(self, scheme: Scheme, layer: LinearLayer) -> dict[str, Parameter] | str:
        """Return what the scheme declares, or the reason why it declines."""
        try:
            answer = scheme.parameters(layer)
        except CheckpointError as e:
            if not layer.stored:
                raise
            return e.message
        return answer.reason if isinstance(answer, Declined) else answer

    def load(
        self, case: Case, weights: list[Tensor]
    ) -> (
        tuple[Scheme, LinearLayer, dict[str, Parameter], dict[str, Tensor], list[dict[str, Tensor]]]
        | None
    ):
        """Return scheme, layer, parameters, tensors, and the parts' tensors, or None if the scheme
        declines the layer."""
        scheme, layer = self.scheme(case.config), case.layer(self.device)
        parameters = self.declared(scheme, layer)
        if not isinstance(parameters, dict):
            return None
        parts, pack = [], type(self).pack
        for i, weight in enumerate(weights):
            part = layer.part(i)
            stored = pack and case.config and as_read(parameters, pack(case.config, part, weight))
            parts.append(stored or scheme.quantize(part, weight))
        return scheme, layer, parameters, fill(layer, parameters, parts), parts

    def limit(self, case: Case) -> float:
        return PRECISION[case.dtype] + (
            ACTIVATIONS[self.can.activations] if self.can.activations else 0
        )

    def check_product(self, case: Case) -> None:
        import torch

        if not (loaded := self.load(case, make_weights(case, self.seed))):
            return
        scheme, layer, _, tensors, _ = loaded
        bias, x = bias_of(layer, self.seed), make_input(case, self.seed, self.device)
        exact = x.double() @ scheme.dequantize(layer, tensors).double().T + (
            bias["bias"].double() if bias else 0
        )
        multiply, before = scheme.linear(layer, {**tensors, **bias}), x.clone()
        out = multiply(x)
        if out.dtype != x.dtype:
            raise Broken(f"the output is {out.dtype}, the input {x.dtype}")
        compare(out, exact, self.limit(case), "x @ dequantize().T + bias")
        if not torch.equal(x, before):
            raise Broken("the input was modified")
        if not torch.equal(multiply(x), out):
            raise Broken("the same input gave two different results")

    def check_weights(self, case: Case) -> None:
        import torch

        weights = make_weights(case, self.seed)
        if not (loaded := self.load(case, weights)):
            return
        scheme, layer, _, tensors, _ = loaded
        found = scheme.dequantize(layer, tensors)
        if found.dtype != torch.float32:
            raise Broken(f"dequantize returned {found.dtype}, not float32")
        start = 0
        for plain in weights:
            part = found[start : start + len(plain)].cpu()
            start += len(plain)
            compare(part, plain, self.weight_error, "the dequantized weight")
        again = self.load(case, weights)
        assert again is not None
        if not torch.equal(scheme.dequantize(layer, again[3]), found):
            raise Broken("the same weight was quantized differently the second time")

    def check_damage(self, case: Case) -> None:
        if not (loaded := self.load(case, make_weights(case, self.seed))):
            return
        scheme, layer, parameters, _, (part, *others) = loaded
        x = make_input(case, self.seed, self.device)
        for name, tensor in part.items():
            if not tensor.is_floating_point() or tensor.element_size() == 1:
                continue
            for wrong in (float("nan"), float("inf")):
                damaged = tensor.clone()
                damaged.view(-1)[0] = wrong
                try:
                    tensors = fill(layer, parameters, [{**part, name: damaged}, *others])
                    product = scheme.linear(layer, tensors)(x)
                except CheckpointError:
                    continue
                if not bool(product.isfinite().all()):
                    raise Broken(
                        f"{name} contains {wrong}, which is not rejected and affects products"
                    )

    def check_fused(self, case: Case) -> None:
        import torch

        if not (loaded := self.load(case, make_weights(case, self.seed))):
            return
        scheme, layer, parameters, tensors, parts = loaded
        x = make_input(case, self.seed, self.device)
        whole, weight = scheme.linear(layer, tensors)(x), scheme.dequantize(layer, tensors)
        alone = [
            (layer.part(i), fill(layer.part(i), parameters, [found]))
            for i, found in enumerate(parts)
        ]
        if not torch.equal(weight, torch.cat([scheme.dequantize(*one) for one in alone])):
            raise Broken("dequantize of the fused layer differs from that of its parts")
        compare(
            whole,
            torch.cat([scheme.linear(*one)(x) for one in alone], 1),
            2 * self.limit(case),
            "the parts' products",
        )

    def check_sharded_by_outputs(self, case: Case) -> None:
        self.check_sharded(case, "out")

    def check_sharded_by_inputs(self, case: Case) -> None:
        self.check_sharded(case, "in")

    def check_sharded(self, case: Case, side: Side) -> None:
        import torch

        if not (loaded := self.load(case, make_weights(case, self.seed))):
            return
        scheme, layer, parameters, tensors, parts = loaded
        x, weight = make_input(case, self.seed, self.device), scheme.dequantize(layer, tensors)
        whole = scheme.linear(layer, tensors)(x)
        for size in (2, 4):
            try:
                shards = [
                    fill_shard(layer, parameters, parts, side, rank, size) for rank in range(size)
                ]
            except ValueError:  # the declared axes do not allow this sharding
                return
            total = torch.zeros_like(whole)
            for rank, (shard, own) in enumerate(shards):
                columns = (
                    slice(rank * shard.in_features, (rank + 1) * shard.in_features)
                    if side == "in"
                    else slice(None)
                )
                rows = torch.cat(
                    [torch.arange(r.start, r.stop) for r in rows_of(layer, rank, size)]
                )
                rows = rows if side == "out" else torch.arange(layer.out_features)
                if not torch.equal(
                    scheme.dequantize(shard, own), weight[rows.to(weight.device)][:, columns]
                ):
                    raise Broken(
                        f"rank {rank} of {size}, by {side}puts: dequantize of the shard is not its"
                        " share of the whole"
                    )
                total[:, rows] += scheme.linear(shard, own)(x[:, columns])
            compare(
                total, whole, 2 * self.limit(case), f"the product of {size} ranks, by {side}puts"
            )
