"""The contract of the quantization extension point, as tests. A plugin's test is a subclass:

    class TestMyScheme(QuantizationContract):
        provider = PROVIDER
        configs = ({"quant_method": "mine", "bits": 4},)

Layers of many shapes are stored as the scheme declares it, loaded as a worker would, whole, fused
and in shards, and compared with a product by the weight that the scheme's own `dequantize` gives.
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
"""Outputs by part, and inputs. A scheme may refuse the odd ones, with a reason."""
ROWS = 1, 2, 7, 33, 130


class QuantizationContract(Contract):
    """Layers of a scheme, from the checkpoint to the product."""

    extension_point = "quantization"
    inner: ClassVar[dict[str, Provider[Any]]] = {"matmul": KIT_MATMUL}
    configs: ClassVar[tuple[dict[str, Any], ...]] = ()
    """quantization_configs of checkpoints to try, in place of the `examples` that the provider
    declares."""
    pack: ClassVar[Callable[[dict[str, Any], LinearLayer, Tensor], dict[str, Tensor]] | None] = None
    """(quantization_config, layer of one part, plain weight) → what a tool that writes such
    checkpoints would store for the part, in the tool's own floating types. By default the scheme's
    own `quantize`: then its checkpoints are as it quantizes on the fly."""
    weight_error: ClassVar[float] = 0.15
    """How far weights may be from the plain ones, relative to their norm."""
    declined: ClassVar[tuple[str, ...]] = ()
    """Names of layers that those checkpoints leave as they are."""

    @property
    def can(self) -> QuantizationCapabilities:
        can = self.provider.capabilities
        assert isinstance(can, QuantizationCapabilities), (
            "a provider of quantization declares a QuantizationCapabilities"
        )
        return can

    @property
    def tried(self) -> tuple[dict[str, Any], ...]:
        return self.configs or self.can.examples

    # The declaration.

    @common_causes("a method in capabilities that is missing in examples")
    def test_declaration(self) -> None:
        """It reads checkpoints of some method or quantizes on the fly; an example is given for each
        method."""
        can = self.can
        assert can.framework == "torch", "this kit's tensors are torch's"
        assert can.methods or can.on_the_fly, (
            "it neither reads checkpoints (methods) nor quantizes (on_the_fly)"
        )
        given = {config["quant_method"] for config in self.tried}
        assert given == set(can.methods) - {PLAIN}, (
            f"methods {can.methods} are declared, and examples are of {sorted(given)}"
        )
        assert self.can.activations is None or self.can.activations in ACTIVATIONS, (
            f"one of {list(ACTIVATIONS)}"
        )
        for config in [*self.tried, *([None] if self.can.on_the_fly else [])]:
            scheme = self.scheme(config)
            assert all(isinstance(glob, str) for glob in scheme.unused), "unused holds globs"
            scales = scheme.kv_scales("model.layers.0.self_attn")
            if scales is not None:
                assert len(scales) == 2, (
                    f"kv_scales: one tensor for keys and one for values, not {list(scales)}"
                )
                assert all(axis == 1 for p in scales.values() for axis in p.axes), (
                    "kv_scales: tensors of one element"
                )

    @common_causes("on_the_fly declared or not declared by mistake")
    def test_plain_weights(self) -> None:
        """Plain weights are quantized if `on_the_fly` is declared, and refused otherwise."""
        takes_plain = self.can.on_the_fly or PLAIN in self.can.methods
        self.needs(
            takes_plain,
            "quantizing plain weights (on_the_fly)",
            self.selection_context(by_name=True),
        )

    @common_causes("a why_not that does not hold")
    def test_checkpoints_of_another_method_are_refused(self) -> None:
        """A checkpoint whose method is not declared is refused with a reason."""
        model = replace(KIT_MODEL, quantization_config={"quant_method": "kit-unknown"})
        refusal = self.refusal(replace(self.selection_context(by_name=True), model=model))
        assert refusal is not None, "a checkpoint of an unknown method is not refused"
        assert "kit-unknown" in refusal, f"the reason must name the method: {refusal}"

    @common_causes(
        "a size that is not a multiple of a group or a word is neither handled nor declined",
        "an empty reason",
    )
    def test_every_layer_is_taken_or_declined_with_a_reason(self) -> None:
        """`parameters` declares tensors of torch dtypes, or declines with a reason; the usual sizes
        are not all declined."""
        import torch

        for config in self.kinds():
            scheme, taken = self.scheme(config), 0
            for outs, in_features in SHAPES + ODD:
                case = Case(config, outs, in_features)
                declared = self.declared(scheme, case.layer(self.device))
                if not isinstance(declared, dict):
                    assert declared, f"{case}: declined without a reason"
                    continue
                taken += (outs, in_features) in SHAPES
                assert declared, f"{case}: no tensors are declared"
                for name, parameter in declared.items():
                    assert isinstance(getattr(torch, parameter.dtype, None), torch.dtype), (
                        f"{name}: dtype {parameter.dtype}"
                    )
                assert "bias" not in declared, "the bias is not the scheme's"
            assert taken, f"none of {SHAPES} is taken ({Case(config)})"

    @common_causes(
        "the checkpoint's list of layers to leave out is not read",
        "names compared whole where they are patterns",
    )
    def test_layers_that_are_not_quantized_are_declined(self) -> None:
        """A layer that the checkpoint leaves out (`declined`) is declined; fused with one that is
        not, a `ConfigError`."""
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
                    f"a layer fused of {name} and one that is quantized was accepted",
                    input=str(mixed),
                )

    # What comes out.

    @common_causes(
        "scales along the wrong axis",
        "a zero point left out",
        "sums in 16 bits",
        "an output in another dtype",
    )
    def test_products_are_those_of_the_dequantized_weight(self) -> None:
        """`linear` gives `x @ dequantize().T + bias` in x's dtype, for any number of rows, and
        changes no input."""
        dtypes = self.can.dtypes or tuple(PRECISION)
        cases = [
            Case(c, outs, n, dtype=dtypes[0]) for c in self.kinds() for outs, n in SHAPES + ODD
        ]
        cases += [Case(c, bias=True, dtype=d) for c in self.kinds() for d in dtypes]
        cases += [Case(c, num_rows=rows, dtype=dtypes[-1]) for c in self.kinds() for rows in ROWS]
        for case in cases:
            self.attempt(case, self.check_product, Case.simpler)

    @common_causes(
        "rounding that does not go to the nearest",
        "scales of the wrong group",
        "codes packed in another order",
    )
    def test_weights_are_near_the_plain_ones(self) -> None:
        """The dequantized weight is within `weight_error` of the plain one, and is the same each
        time."""
        for config in self.kinds():
            for outs, in_features in SHAPES:
                self.attempt(Case(config, outs, in_features), self.check_weights, Case.simpler)

    @common_causes("a scale of zero divides")
    def test_zeros_stay_zero(self) -> None:
        """A weight of zeros has a zero product, and a row of zeros is no reason for NaN in
        another."""

        def check(case: Case) -> None:
            weights = make_weights(case, self.seed)
            weights[0][1:] = 0
            if loaded := self.load(case, weights):
                scheme, layer, _, tensors, _ = loaded
                weight = scheme.dequantize(layer, tensors)
                if not bool(weight.isfinite().all()) or bool(weight[1 : case.outs[0]].any()):
                    raise Broken("rows of zeros are not zeros, or not finite, once dequantized")

        for config in self.kinds():
            self.attempt(Case(config), check, Case.simpler)

    @common_causes(
        "a scale that is not declared as one (Parameter.scale)",
        "an error about it that is none of the kit's",
    )
    def test_damaged_scales_are_refused(self) -> None:
        """A tensor of numbers in 16 or 32 bits that holds NaN or an infinity is refused, by what
        `Parameter.scale` declares or with a `CheckpointError` from `linear`; or no product shows
        it."""
        for config in self.kinds():
            self.attempt(Case(config), self.check_damage, Case.simpler)

    # Fused and sharded.

    @common_causes(
        "one scale for the whole tensor used for all parts",
        "an order of the inputs taken from the first part",
    )
    def test_fused_is_its_parts(self) -> None:
        """A fused layer multiplies as its parts would, one after the other, whose weights differ in
        size."""
        for config in self.kinds():
            for outs in ((128, 64, 64), (256, 256)):
                self.attempt(Case(config, outs), self.check_fused, Case.simpler)

    @common_causes(
        "an axis that is not declared",
        "a wrong pack factor or group",
        "numbers taken from the whole layer",
    )
    def test_sharded_is_whole(self) -> None:
        """Each rank's tensors are slices of the whole ones, by the declared axes, and give its
        share of the product."""
        for config in self.kinds():
            for outs in ((256,), (128, 64, 64)):
                self.attempt(Case(config, outs, 512), self.check_sharded_by_outputs, Case.simpler)
                self.attempt(Case(config, outs, 512), self.check_sharded_by_inputs, Case.simpler)

    # Cost.

    @common_causes(
        "weights expanded and kept", "the checkpoint's tensors kept beside the scheme's own form"
    )
    def test_memory_is_as_declared(self) -> None:
        """What a layer holds is within 5 % of `nbytes`."""
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
                f"{case}: {held} bytes held, {declared} declared"
            )

    # How a layer is tried.

    def kinds(self) -> list[dict[str, Any] | None]:
        """The quantization_configs to try, None for plain weights."""
        found = [*self.tried, *([None] if self.can.on_the_fly else [])]
        if not found:
            pytest.skip("it quantizes nothing: there is no layer to try")
        return found

    def scheme(self, config: dict[str, Any] | None) -> Scheme:
        built: Scheme = self.build(
            self.build_context(model=replace(KIT_MODEL, quantization_config=config))
        )
        return built

    def declared(self, scheme: Scheme, layer: LinearLayer) -> dict[str, Parameter] | str:
        """What the scheme declares, or why it declines."""
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
        """Scheme, layer, parameters, tensors, and the parts' tensors; None if the scheme declines
        the layer."""
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
            raise Broken("the input was changed")
        if not torch.equal(multiply(x), out):
            raise Broken("the same input gave two results")

    def check_weights(self, case: Case) -> None:
        import torch

        weights = make_weights(case, self.seed)
        if not (loaded := self.load(case, weights)):
            return
        scheme, layer, _, tensors, _ = loaded
        found = scheme.dequantize(layer, tensors)
        if found.dtype != torch.float32:
            raise Broken(f"dequantize gives {found.dtype}, not float32")
        start = 0
        for plain in weights:
            part = found[start : start + len(plain)].cpu()
            start += len(plain)
            compare(part, plain, self.weight_error, "the dequantized weight")
        again = self.load(case, weights)
        assert again is not None
        if not torch.equal(scheme.dequantize(layer, again[3]), found):
            raise Broken("the same weight was quantized in two ways")

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
                    raise Broken(f"{name} holds {wrong}, nobody says so, and products show it")

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
            raise Broken("dequantize of the fused layer differs from its parts'")
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
            except ValueError:  # what the axes say cannot be shared so
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
