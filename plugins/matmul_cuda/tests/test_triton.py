"""The Triton kernels fulfil the contract in Triton's interpreter, with any launch parameters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dovetail.errors import PluginError
from dovetail.interfaces.matmul import WeightFormat
from dovetail_matmul_cuda import CAPABILITIES, PROVIDER
from dovetail_matmul_cuda.choice import Case, Choice, Table
from dovetail_matmul_cuda.matmul import TritonMatmul
from dovetail_testing.matmul import MatmulContract, Product

F8 = "float8_e4m3fn"
ON_CPU = replace(PROVIDER, capabilities=replace(CAPABILITIES, devices=("cpu",)))


class TestTriton(MatmulContract):
    """The contract in the dtype of most models."""

    provider = replace(PROVIDER, capabilities=replace(ON_CPU.capabilities, dtypes=("bfloat16",)))


@pytest.mark.real  # the interpreter takes a minute
class TestTritonInEveryDtype(MatmulContract):
    provider = ON_CPU


def kit_of(matmul):
    """Return the contract with this object under test."""
    built = replace(ON_CPU, build=lambda context, options: matmul)
    return type("Kit", (MatmulContract,), {"provider": built})()


def check(format, choice, *, outs=72, ins=320, rows=20, dtype="bfloat16"):
    """Check a product of the kit with the given choice."""
    matmul = TritonMatmul("cpu", 1, Table({Case.of(format, outs, ins, rows): choice}))
    kit_of(matmul).check(Product(format, outs, ins, rows, dtype=dtype))


WORDS = [
    (WeightFormat("uint4", 128, zeros=True), Choice("words", 16, 64)),
    (WeightFormat("uint4", 32), Choice("words", 32, 32, split_k=3)),
    (WeightFormat("uint4", 48, zeros=True), Choice("words", 64, 128, split_k=2)),
    (WeightFormat("uint4", 20), Choice("words", 16, 128)),
    (WeightFormat("uint4", None, zeros=True), Choice("words", 16, 128, split_k=16)),
    (WeightFormat("int8", 100, zeros=True), Choice("words", 64, 64, split_k=2)),
    (WeightFormat("int8", 64, order=True), Choice("words", 64, 64)),
    (WeightFormat(F8, 128), Choice("words", 16, 64, split_k=5)),
    (WeightFormat("uint4", 128, inputs="int8"), Choice("words", 16, 64, split_k=2)),
    (WeightFormat("uint4", 128, zeros=True), Choice("dequantize", block_n=48)),
    (WeightFormat("uint4", 20, order=True), Choice("dequantize", block_n=256)),
    (WeightFormat("int8", None, zeros=True), Choice("dequantize", block_n=64)),
    (WeightFormat(F8, 100), Choice("dequantize", block_n=100)),
]


@pytest.mark.parametrize(("format", "choice"), WORDS, ids=str)
def test_dequantized_weights(format, choice):
    check(format, choice, dtype="float16" if format.group_size == 20 else "bfloat16")


CODES = [
    (WeightFormat("int8", inputs="int8"), Choice("codes", 16, 64, 64, split_k=4)),
    (WeightFormat("int8", 32, inputs="int8"), Choice("codes", 64, 64, 128)),
    (
        WeightFormat("int8", 100, inputs="int8", input_scale=True),
        Choice("codes", 32, 128, 128, split_k=3),
    ),
    (WeightFormat(F8, 128, inputs=F8), Choice("codes", 16, 64, 128, split_k=2)),
    (WeightFormat(F8, inputs=F8, input_scale=True), Choice("codes", 64, 32, 32)),
    (WeightFormat(F8, 128, inputs=F8, order=True), Choice("codes", 32, 64, 64)),
]


@pytest.mark.parametrize(("format", "choice"), CODES, ids=str)
def test_codes_by_codes(format, choice):
    check(format, choice)


@pytest.mark.parametrize("inputs", [None, "int8", F8])
def test_rows_do_not_depend_on_each_other(inputs):
    """Rows of one launch are bitwise independent."""
    format = WeightFormat("int8" if inputs != F8 else F8, 128, inputs=inputs)
    kernel = Choice("words" if inputs is None else "codes", 16, 128, split_k=2)
    matmul = TritonMatmul("cpu", 1, Table({Case.of(format, 64, 256, 8): kernel}))
    kit = kit_of(matmul)
    one = Product(format, 64, 256, 8, dtype="bfloat16")
    multiply, _, _ = kit.made(one)
    x = kit.input(one)
    before = multiply(x)
    other = x.clone()
    other[3:] *= 50
    other[7] = torch.nan
    assert torch.equal(multiply(other)[:3], before[:3])


def test_no_rows():
    kit = kit_of(TritonMatmul("cpu", 1))
    multiply, _, _ = kit.made(Product(WeightFormat("uint4", 32)))
    assert multiply(torch.empty(0, 256)).shape == (0, 128)


def test_inputs_that_do_not_fit_are_refused():
    kit = kit_of(TritonMatmul("cpu", 1))
    multiply, _, _ = kit.made(Product(WeightFormat("uint4", 32)))
    with pytest.raises(PluginError, match=r"x is \[3, 255\]"):
        multiply(torch.empty(3, 255))


def test_how_integers_are_converted():
    """The compiled kernels place 4-bit codes in the mantissa of these numbers. The interpreter does
    not use this path."""
    codes = torch.arange(16, dtype=torch.int16)
    assert torch.equal((codes | 0x4300).view(torch.bfloat16).float(), 128.0 + codes)
    assert torch.equal((codes | 0x6400).view(torch.float16).float(), 1024.0 + codes)
    difference = (codes | 0x4300).view(torch.bfloat16)[:, None] - (128.0 + codes).bfloat16()[None]
    assert torch.equal(difference.float(), (codes[:, None] - codes[None]).float())


class ScaledMM:
    """A fake `torch._scaled_mm` that checks the requirements on its arguments and computes the
    product by its definition."""

    def __init__(self):
        self.scaled_by = []

    def __call__(self, a, b, *, scale_a, scale_b, bias=None, out_dtype=None, use_fast_accum=False):
        (rows, ins), outs = a.shape, b.shape[1]
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        assert a.stride() == (ins, 1), "a is row-major"
        assert b.shape[0] == ins, "a and b fit"
        assert b.stride() == (1, ins), "b is column-major"
        assert ins % 16 == 0 == outs % 16, "sizes are multiples of 16"
        assert scale_a.dtype == scale_b.dtype == torch.float32
        if scale_a.numel() == scale_b.numel() == 1 and scale_a.ndim == scale_b.ndim == 1:
            self.scaled_by.append("tensor")
        else:
            assert scale_a.shape == (rows, 1)
            assert scale_b.shape == (1, outs)
            assert scale_a.is_contiguous()
            assert scale_b.is_contiguous()
            assert out_dtype == torch.bfloat16, "scaled by rows, the product is of bfloat16"
            self.scaled_by.append("rows")
        assert bias is None or (bias.dtype == out_dtype and bias.shape == (outs,))
        out = (a.float() @ b.float()) * scale_a * scale_b
        return (out if bias is None else out + bias.float()).to(out_dtype)


@pytest.mark.parametrize("input_scale", [False, True])
@pytest.mark.parametrize("rows", [1, 33])
def test_fp8_with_scales_per_row(rows, input_scale):
    scaled_mm = ScaledMM()
    format = WeightFormat(F8, inputs=F8, input_scale=input_scale)
    kit_of(TritonMatmul("cpu", 1, None, scaled_mm)).check(
        Product(format, 48, 256, rows, dtype="bfloat16")
    )
    assert scaled_mm.scaled_by == ["rows", "rows"]


def test_fp8_with_one_scale_per_operand():
    scaled_mm, kit = ScaledMM(), kit_of(None)
    format = WeightFormat(F8, inputs=F8, input_scale=True)
    one = Product(format, 48, 256, 5, dtype="bfloat16")
    _, layer, tensors = kit_of(TritonMatmul("cpu", 1)).made(one)
    tensors["scales"] = torch.full_like(tensors["scales"], 0.01)
    x = kit.input(one)
    x[4, 0] = torch.nan
    found = TritonMatmul("cpu", 1, None, scaled_mm).linear(format, layer, tensors)(x)
    plain = TritonMatmul("cpu", 1).linear(format, layer, tensors)(x)
    assert scaled_mm.scaled_by == ["tensor"]
    torch.testing.assert_close(found[:4], plain[:4], rtol=0.02, atol=0.02)
    assert found[4].isnan().all()


@pytest.mark.parametrize(
    "one",
    [
        Product(WeightFormat(F8, 128, inputs=F8), 48, 256, dtype="bfloat16"),
        Product(WeightFormat(F8, inputs=F8), 40, 256, dtype="bfloat16"),
        Product(WeightFormat(F8, inputs=F8), 48, 264, dtype="bfloat16"),
        Product(WeightFormat(F8, inputs=F8), 48, 256, dtype="float32"),
    ],
    ids=["groups", "outputs", "inputs", "float32"],
)
def test_products_without_scaled_mm_support_use_codes(one):
    scaled_mm = ScaledMM()
    kit_of(TritonMatmul("cpu", 1, None, scaled_mm)).check(one)
    assert scaled_mm.scaled_by == []
