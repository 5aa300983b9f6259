from __future__ import annotations
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar
import pytest
from dovetail.errors import CheckpointError, ConfigError
from dovetail.interfaces.quantization import PLAIN, Declined, LinearLayer, Parameter, Part, QuantizationCapabilities, Scheme, Side
from dovetail.plugin.provider import Provider
from dovetail_testing.contract import KIT_MODEL, Broken, Contract, common_causes
from dovetail_testing.layers import ACTIVATIONS, PRECISION, Case, as_read, bias_of, compare, fill, fill_shard, held_bytes, make_input, make_weights, rows_of
from dovetail_testing.matmul import KIT_MATMUL
if TYPE_CHECKING:
    from torch import Tensor
SHAPES = (((256,), 256), ((512,), 128), ((128, 64, 64), 256), ((192, 192), 512), ((64,), 1024), ((320,), 320))
ODD = (((61,), 128), ((128,), 100), ((64, 24), 256), ((8,), 8))
ROWS = (1, 2, 7, 33, 130)

class QuantizationContract(Contract):
    extension_point = 'quantization'
    inner: ClassVar[dict[str, Provider[Any]]] = {'matmul': KIT_MATMUL}
    configs: ClassVar[tuple[dict[str, Any], ...]] = ()
    pack: ClassVar[Callable[[dict[str, Any], LinearLayer, Tensor], dict[str, Tensor]] | None] = None
    weight_error: ClassVar[float] = 0.15
    declined: ClassVar[tuple[str, ...]] = ()

    @property
    def can(self) -> QuantizationCapabilities:
        ...

    @property
    def tried(self) -> tuple[dict[str, Any], ...]:
        ...

    @common_causes('capabilities declare a method that examples do not contain')
    def test_declaration(self) -> None:
        ...

    @common_causes('on_the_fly is declared, or not declared, by mistake')
    def test_plain_weights(self) -> None:
        ...

    @common_causes('why_not does not check the method')
    def test_checkpoints_of_another_method_are_refused(self) -> None:
        ...

    @common_causes('a size that is not a multiple of a group or a word is neither supported nor declined', 'the reason is empty')
    def test_every_layer_is_taken_or_declined_with_a_reason(self) -> None:
        ...

    @common_causes("the checkpoint's list of layers that are not quantized is not read", 'names are compared as a whole although they are patterns')
    def test_layers_that_are_not_quantized_are_declined(self) -> None:
        ...

    @common_causes('scales are along the wrong axis', 'a zero point is left out', 'sums are computed in 16 bits', 'the output has another dtype')
    def test_products_are_those_of_the_dequantized_weight(self) -> None:
        ...

    @common_causes('rounding is not to the nearest value', 'scales belong to the wrong group', 'codes are packed in a different order')
    def test_weights_are_near_the_plain_ones(self) -> None:
        ...

    @common_causes('a scale of zero is used as a divisor')
    def test_zeros_stay_zero(self) -> None:
        ...

    @common_causes('a scale is not declared as one (Parameter.scale)', 'the error raised is not a CheckpointError')
    def test_damaged_scales_are_refused(self) -> None:
        ...

    @common_causes('one scale for the whole tensor is used for all parts', 'the order of the inputs is that of the first part')
    def test_fused_is_its_parts(self) -> None:
        ...

    @common_causes('an axis is not declared', 'the pack factor or the group is wrong', 'sizes are those of the whole layer')
    def test_sharded_is_whole(self) -> None:
        ...

    @common_causes('weights are expanded and kept', "the checkpoint's tensors are kept besides a converted form")
    def test_memory_is_as_declared(self) -> None:
        ...

    def kinds(self) -> list[dict[str, Any] | None]:
        ...

    def scheme(self, config: dict[str, Any] | None) -> Scheme:
        ...

    def declared(self, scheme: Scheme, layer: LinearLayer) -> dict[str, Parameter] | str:
        ...

    def load(self, case: Case, weights: list[Tensor]) -> tuple[Scheme, LinearLayer, dict[str, Parameter], dict[str, Tensor], list[dict[str, Tensor]]] | None:
        ...

    def limit(self, case: Case) -> float:
        ...

    def check_product(self, case: Case) -> None:
        ...

    def check_weights(self, case: Case) -> None:
        ...

    def check_damage(self, case: Case) -> None:
        ...

    def check_fused(self, case: Case) -> None:
        ...

    def check_sharded_by_outputs(self, case: Case) -> None:
        ...

    def check_sharded_by_inputs(self, case: Case) -> None:
        ...

    def check_sharded(self, case: Case, side: Side) -> None:
        ...
