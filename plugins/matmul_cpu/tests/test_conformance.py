"""All that this plugin needs to test: it keeps the contract it declares."""

import torch

from dovetail.testing.matmul import MatmulContract, Product
from dovetail_matmul_cpu import PROVIDER


class TestCpuMatmul(MatmulContract):
    provider = PROVIDER

    def test_an_output_does_not_depend_on_the_number_of_rows(self) -> None:
        """Batch invariance, to the last bit."""
        for inputs in (None, *self.can.inputs):
            for f in self.formats(inputs):
                for dtype in self.dtypes:
                    one = Product(f, 200, 640, 130, dtype=dtype)
                    multiply, _, _ = self.made(one)
                    x = self.input(one)
                    whole = multiply(x)
                    for rows in (1, 2, 3, 4, 6, 7, 31):
                        assert torch.equal(multiply(x[-rows:]), whole[-rows:]), f"{one}: the last {rows} rows alone"
