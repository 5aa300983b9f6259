"""Implement the matmul contract with the Triton kernels. Weights are converted to the kernels'
layout once, and kernels are launched in each call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from dovetail.errors import PluginError
from dovetail.interfaces.matmul import WeightFormat
from dovetail.interfaces.quantization import LinearLayer
from dovetail_matmul_cuda import kernels, layout
from dovetail_matmul_cuda.choice import Case, Choice, Table, bucket, by_rule, table_for

KINDS = {"uint4": "uint4", "int8": "int8", "float8_e4m3fn": "float8"}
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
ROUND_BLOCK = 16384
"""Maximum number of inputs that `round_rows` loads at once."""
ScaledMM = Callable[..., Tensor]


class TritonMatmul:
    """A `Matmul`. `scaled_mm` is `torch._scaled_mm` if its FP8 products are supported, else
    None."""

    def __init__(
        self,
        device: str,
        num_sms: int,
        table: Table | None = None,
        scaled_mm: ScaledMM | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.num_sms, self.table, self.scaled_mm = num_sms, table or Table(), scaled_mm
        self.is_interpreted = isinstance(kernels.multiply_words, InterpretedFunction)

    @staticmethod
    def on(device: str, table: str | None = None) -> TritonMatmul:
        if isinstance(kernels.multiply_words, InterpretedFunction):
            return TritonMatmul(device, 1, table_for("none", table) if table else None)
        facts = torch.cuda.get_device_properties(torch.device(device))
        has_fp8 = facts.major >= 9  # on older GPUs, PyTorch supports one scale per tensor only
        return TritonMatmul(
            device,
            facts.multi_processor_count,
            table_for(facts.name, table),
            torch._scaled_mm if has_fp8 else None,
        )

    def linear(
        self, format: WeightFormat, layer: LinearLayer, tensors: Mapping[str, Tensor]
    ) -> Linear:
        kind = CodesLinear if layout.multiplies_codes(format) else WordsLinear
        return kind(self, format, layer, tensors)

    def by_rule(self, case: Case, able: tuple[str, ...], dtype: torch.dtype) -> Choice:
        """Return the choice for a product without a measurement."""
        if self.is_interpreted:
            # Few programs, because in the interpreter every operation takes about the same time,
            # and small tiles, because of NumPy's threads.
            rows, outs = (triton.next_power_of_2(max(16, n)) for n in (case.rows, case.outs))
            return Choice(
                able[0], min(64, rows), min(256, outs), split_k=2 if case.rows == 4 else 1
            )
        return by_rule(case, able, self.num_sms, dtype.itemsize)

    def nbytes(self, format: WeightFormat, layer: LinearLayer) -> int:
        return layout.nbytes(format, layer.in_features, layer.out_features)


class Linear:
    """The common base class of both kinds of layers."""

    def __init__(
        self,
        matmul: TritonMatmul,
        format: WeightFormat,
        layer: LinearLayer,
        tensors: Mapping[str, Tensor],
    ) -> None:
        self._matmul, self.format = matmul, format
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._at = layout.geometry(format, layer.in_features)
        self._codes = layout.packed(format, layer.in_features, tensors)
        self._scales = layout.by_group(tensors["scales"].float(), self._at)
        self._bias = tensors["bias"].contiguous() if layer.bias else None
        self._order = tensors["order"] if format.order else None
        self._input_scale = tensors["input_scale"].float() if format.input_scale else None
        self._choices: dict[tuple[int, torch.dtype], Choice] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.in_features or x.dtype not in TYPES:
            raise PluginError(
                f"x is {list(x.shape)} {x.dtype}, but must be [T, {self.in_features}] in float32,"
                " bfloat16 or float16"
            )
        if not len(x):
            return x.new_empty(0, self.out_features)
        if self._order is not None:
            x = x.index_select(1, self._order)
        if x.stride(1) != 1:
            x = x.contiguous()
        return self.multiply(x, self.choice(len(x), x.dtype))

    def kernels(self, dtype: torch.dtype) -> tuple[str, ...]:
        """Return the kernels that support inputs of a dtype, the best one for many rows first."""
        raise NotImplementedError

    def choice(self, num_rows: int, dtype: torch.dtype) -> Choice:
        key = (bucket(num_rows), dtype)
        if key not in self._choices:
            case, able = (
                Case.of(self.format, self.out_features, self.in_features, num_rows),
                self.kernels(dtype),
            )
            found = self._matmul.table.find(case) if dtype.itemsize == 2 else None
            if found is None or found.kernel not in able:
                found = self._matmul.by_rule(case, able, dtype)
            self._choices[key] = found
        return self._choices[key]

    def multiply(self, x: Tensor, how: Choice) -> Tensor:
        """Multiply `x [T, in]`, whose columns are in the order of the codes, with a kernel of
        `kernels`."""
        raise NotImplementedError

    def _rounded(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Quantize x. Returns codes `[T, in]`, or their values if `dtype` is bfloat16, and scales
        f32[T]."""
        codes = torch.empty(x.shape, dtype=dtype, device=x.device)
        scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
        block = min(ROUND_BLOCK, triton.next_power_of_2(self.in_features))
        block_m = 16 if self._matmul.is_interpreted else 1
        kernels.round_rows[(triton.cdiv(len(x), block_m),)](
            x,
            self._input_scale,
            codes.view(torch.uint8) if dtype == torch.float8_e4m3fn else codes,
            scales,
            len(x),
            x.stride(0),
            IN=self.in_features,
            BLOCK_M=block_m,
            BLOCK=block,
            KIND=KINDS[str(self.format.inputs)],
            HAS_FIXED=self._input_scale is not None,
            AS_FLOAT=dtype == torch.bfloat16,
            num_warps=8 if block > 2048 else 4,
        )
        return codes, scales

    def _target(self, x: Tensor, split_k: int) -> Tensor:
        """Allocate the output of a kernel: the product or its partial sums."""
        if split_k == 1:
            return torch.empty(len(x), self.out_features, dtype=x.dtype, device=x.device)
        return torch.empty(split_k, len(x), self.out_features, dtype=torch.float32, device=x.device)

    def _finished(self, x: Tensor, target: Tensor, x_scales: Tensor | None, split_k: int) -> Tensor:
        if split_k == 1:
            return target
        out = torch.empty(len(x), self.out_features, dtype=x.dtype, device=x.device)
        block = 256
        kernels.add_up[(triton.cdiv(self.out_features, block), len(x))](
            target,
            x_scales,
            self._bias,
            out,
            len(x),
            self.out_features,
            HAS_X_SCALES=x_scales is not None,
            HAS_BIAS=self._bias is not None,
            SPLIT_K=split_k,
            BLOCK=block,
            INTERPRETED=self._matmul.is_interpreted,
            num_warps=2,
        )
        return out


class WordsLinear(Linear):
    """Weights that are dequantized to the dtype of the inputs: in registers, or in memory for
    cuBLAS if there are many rows."""

    def __init__(
        self,
        matmul: TritonMatmul,
        format: WeightFormat,
        layer: LinearLayer,
        tensors: Mapping[str, Tensor],
    ) -> None:
        super().__init__(matmul, format, layer, tensors)
        self._zeros = None
        if format.zeros:
            raised = tensors["zeros"].to(torch.int16) + (128 if format.codes == "int8" else 0)
            self._zeros = layout.by_group(raised.to(torch.uint8), self._at)
        self._shape: dict[str, Any] = {
            "IN": self.in_features,
            "GROUP": self._at.group,
            "PADDED": self._at.padded,
            "KIND": KINDS[format.codes],
            "HAS_ZEROS": format.zeros,
            "INTERPRETED": matmul.is_interpreted,
        }

    def kernels(self, dtype: torch.dtype) -> tuple[str, ...]:
        return ("words", "dequantize") if self.format.inputs is None else ("words",)

    def multiply(self, x: Tensor, how: Choice) -> Tensor:
        if how.kernel == "dequantize":
            return self._multiply_expanded(x, how.block_n)
        # bfloat16 represents the codes of quantized inputs exactly.
        inputs, x_scales = (
            (x, None) if self.format.inputs is None else self._rounded(x, torch.bfloat16)
        )
        split = min(how.split_k, len(self._codes))
        target = self._target(x, split)
        grid = (
            triton.cdiv(self.out_features, how.block_n),
            triton.cdiv(len(x), how.block_m),
            split,
        )
        kernels.multiply_words[grid](
            inputs,
            self._codes,
            self._scales,
            self._zeros,
            x_scales,
            self._bias,
            target,
            len(x),
            self.out_features,
            inputs.stride(0),
            self.out_features,
            NUM_CHUNKS=len(self._codes),
            IN_GROUPS=self._at.num_groups > 1,
            HAS_X_SCALES=x_scales is not None,
            HAS_BIAS=self._bias is not None,
            BLOCK_M=how.block_m,
            BLOCK_N=how.block_n,
            SPLIT_K=split,
            COMPUTE=TYPES[inputs.dtype],
            **self._shape,
            num_warps=how.num_warps,
            num_stages=how.num_stages,
        )
        return self._finished(x, target, x_scales, split)

    def _multiply_expanded(self, x: Tensor, outs: int) -> Tensor:
        out = torch.empty(len(x), self.out_features, dtype=x.dtype, device=x.device)
        for first in range(0, self.out_features, outs):
            weights = self._expanded(first, min(outs, self.out_features - first), x.dtype)
            into = out[:, first : first + outs]
            if self._bias is None:
                torch.mm(x, weights, out=into)
            else:
                torch.addmm(self._bias[first : first + outs].to(x.dtype), x, weights, out=into)
        return out

    def _expanded(self, first: int, width: int, dtype: torch.dtype) -> Tensor:
        """Return dequantized weights `[in, width]`."""
        weights, block = (
            torch.empty(self.in_features, width, dtype=dtype, device=self._codes.device),
            128,
        )
        kernels.expand_words[(triton.cdiv(width, block), len(self._codes))](
            self._codes,
            self._scales,
            self._zeros,
            weights,
            self.out_features,
            first,
            width,
            BLOCK_N=block,
            COMPUTE=TYPES[dtype],
            **self._shape,
            num_warps=4,
        )
        return weights


class CodesLinear(Linear):
    """8-bit weights that are multiplied by inputs quantized to the same type."""

    def __init__(
        self,
        matmul: TritonMatmul,
        format: WeightFormat,
        layer: LinearLayer,
        tensors: Mapping[str, Tensor],
    ) -> None:
        super().__init__(matmul, format, layer, tensors)
        # cuBLAS requires FP8 sizes to be multiples of 16, and either scales per row of both
        # operands or one scale each.
        is_whole = self._at.num_places == self.in_features and self.out_features % 16 == 0
        self._has_scaled_mm = (
            format.codes == "float8_e4m3fn"
            and self._at.num_groups == 1
            and is_whole
            and matmul.scaled_mm is not None
        )
        self._one_scale = None
        if format.input_scale and bool((self._scales == self._scales[0, 0]).all()):
            self._one_scale = self._scales[0, :1]

    def kernels(self, dtype: torch.dtype) -> tuple[str, ...]:
        """Return the kernels. `scaled_mm` with scales per row supports bfloat16 outputs only."""
        return (
            ("scaled_mm", "codes")
            if self._has_scaled_mm and dtype == torch.bfloat16
            else ("codes",)
        )

    def multiply(self, x: Tensor, how: Choice) -> Tensor:
        codes, x_scales = self._rounded(x, self._codes.dtype)
        if how.kernel == "scaled_mm":
            return self._scaled_mm(codes, x_scales)
        block_k = min(how.block_k, self._at.padded)
        split = min(how.split_k, self._at.num_places // block_k)
        target = self._target(x, split)
        grid = (
            triton.cdiv(len(x), how.block_m),
            triton.cdiv(self.out_features, how.block_n),
            split,
        )
        kernels.multiply_codes[grid](
            codes,
            self._codes,
            self._scales,
            x_scales,
            self._bias,
            target,
            len(x),
            self.out_features,
            codes.stride(0),
            self.out_features,
            IN=self.in_features,
            GROUP=self._at.group,
            PADDED=self._at.padded,
            NUM_PLACES=self._at.num_places,
            IN_GROUPS=self._at.num_groups > 1,
            HAS_BIAS=self._bias is not None,
            BLOCK_M=how.block_m,
            BLOCK_N=how.block_n,
            BLOCK_K=block_k,
            SPLIT_K=split,
            INTERPRETED=self._matmul.is_interpreted,
            num_warps=how.num_warps,
            num_stages=how.num_stages,
        )
        return self._finished(x, target, x_scales, split)

    def _scaled_mm(self, codes: Tensor, x_scales: Tensor) -> Tensor:
        """Multiply with one scale for all inputs and one for all weights if possible, for which
        cuBLAS has its fastest kernels."""
        scales = (
            (x_scales[:, None], self._scales)
            if self._one_scale is None
            else (self._input_scale, self._one_scale)
        )
        bias = None if self._bias is None else self._bias.to(torch.bfloat16)
        multiply = self._matmul.scaled_mm
        assert multiply is not None
        return multiply(
            codes,
            self._codes.t(),
            scale_a=scales[0],
            scale_b=scales[1],
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
