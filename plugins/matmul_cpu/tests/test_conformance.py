"""The kernels fulfil the matmul contract and keep their other guarantees."""

import pytest
import torch

from dovetail.facts import device_facts
from dovetail.interfaces.matmul import dequantized
from dovetail.plugin.provider import why_not_built
from dovetail_matmul_cpu import NEEDED_FLAGS, PROVIDER
from dovetail_testing.matmul import MatmulContract, Product

NO_KERNELS = why_not_built(device_facts(), NEEDED_FLAGS)


@pytest.mark.skipif(bool(NO_KERNELS), reason=f"the kernels are not usable: {NO_KERNELS}")
class TestCpuMatmul(MatmulContract):
    provider = PROVIDER

    def test_an_output_does_not_depend_on_the_number_of_rows(self) -> None:
        """Outputs are bitwise batch invariant."""
        for inputs in (None, *self.can.inputs):
            for f in self.formats(inputs):
                for dtype in self.dtypes:
                    one = Product(f, 200, 640, 130, dtype=dtype)
                    multiply, _, _ = self.made(one)
                    x = self.input(one)
                    whole = multiply(x)
                    for rows in (1, 2, 3, 4, 6, 7, 31):
                        assert torch.equal(multiply(x[-rows:]), whole[-rows:]), (
                            f"{one}: the last {rows} rows alone"
                        )

    def test_a_large_input_leaves_room_for_the_small_ones(self) -> None:
        """For unquantized inputs of which one is a thousand times the others, the contribution of
        the others is preserved."""
        for f in self.formats(None):
            one = Product(f, 128, 512, 4, bias=False, dtype="bfloat16")
            multiply, _, tensors = self.made(one)
            x = self.input(one)
            x[:, 7] = 1000 * x[:, 7:8].sign().squeeze(1)
            weight = dequantized(f, 512, tensors).double()
            weight[:, 7] = 0
            rest = x.double() @ weight.T
            alone = torch.zeros_like(x)
            alone[:, 7] = x[:, 7]
            off = (multiply(x).double() - multiply(alone).double() - rest).norm() / multiply(
                alone
            ).double().norm()
            assert off < 0.01, f"{one}: off by {off:.2%} of the large input's product"

    def test_eight_times_the_inputs_give_eight_times_the_product(self) -> None:
        """The outputs are bitwise equal, so the scale of a row does not depend on earlier rows."""
        for inputs in (None, *self.can.inputs):
            for f in self.formats(inputs):
                one = Product(f, 128, 512, 9, bias=False, dtype="bfloat16")
                multiply, _, _ = self.made(one)
                x = self.input(one)
                assert f.input_scale or torch.equal(multiply(8 * x), 8 * multiply(x)), (
                    f"{one}: not eight times"
                )
