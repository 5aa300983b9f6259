"""One layer of the decoder."""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.interfaces.architecture import Attend, LayerMaker, Linear, Target
from dovetail.interfaces.quantization import Part
from dovetail_models_torch.config import DecoderConfig
from dovetail_models_torch.operations import Operations


class DecoderLayer:
    """Attention and MLP, each around a residual. `name` is the checkpoint's ("model.layers.3")."""

    def __init__(
        self,
        name: str,
        index: int,
        c: DecoderConfig,
        maker: LayerMaker,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.name, self.index = name, index
        self.num_heads, self.num_kv_heads, self.head_size, self.eps = (
            c.num_heads,
            c.num_kv_heads,
            c.head_size,
            c.norm_eps,
        )
        self.num_qk_heads = c.num_heads + c.num_kv_heads
        self.num_qkv_heads = c.num_heads + 2 * c.num_kv_heads
        self.activation = c.activation
        q_size, kv_size = c.num_heads * c.head_size, c.num_kv_heads * c.head_size

        def linear(fused: str, in_features: int, bias: bool, **parts: int) -> Linear:
            block, _, _ = fused.partition(".")
            full = [
                Part(f"{name}.{block}.{part}", out_features) for part, out_features in parts.items()
            ]
            return maker.linear(f"{name}.{fused}", full, in_features, bias)

        h, f = c.hidden_size, c.intermediate_size
        self.qkv_proj = linear(
            "self_attn.qkv_proj", h, c.qkv_bias, q_proj=q_size, k_proj=kv_size, v_proj=kv_size
        )
        self.o_proj = linear("self_attn.o_proj", q_size, c.o_bias, o_proj=h)
        self.gate_up_proj = linear("mlp.gate_up_proj", h, c.mlp_bias, gate_proj=f, up_proj=f)
        self.down_proj = linear("mlp.down_proj", f, c.mlp_bias, down_proj=h)
        self.linears = (self.qkv_proj, self.o_proj, self.gate_up_proj, self.down_proj)
        self.input_norm = torch.empty(h, dtype=dtype, device=device)
        self.post_attention_norm = torch.empty(h, dtype=dtype, device=device)
        # A row a head, so that queries and keys are scaled in one multiplication.
        self.qk_norm = (
            torch.empty(self.num_qk_heads, c.head_size, dtype=dtype, device=device)
            if c.qk_norm
            else None
        )

    def targets(self) -> dict[str, Target]:
        found = {
            f"{self.name}.input_layernorm.weight": Target.into(self.input_norm),
            f"{self.name}.post_attention_layernorm.weight": Target.into(self.post_attention_norm),
        }
        if self.qk_norm is not None:
            shape = (self.head_size,)
            found[f"{self.name}.self_attn.q_norm.weight"] = Target.into(
                self.qk_norm[: self.num_heads], shape
            )
            found[f"{self.name}.self_attn.k_norm.weight"] = Target.into(
                self.qk_norm[self.num_heads :], shape
            )
        for layer in self.linears:
            found |= layer.targets()
        return found

    def forward(
        self,
        hidden: Tensor,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: Attend,
        ops: Operations,
        next_norm: Tensor,
    ) -> Tensor:
        """Add the layer's two contributions to `hidden: [T, H]`, in place. `x` is `hidden` under
        the layer's first norm; returns the new `hidden` under `next_norm`."""
        num_tokens = hidden.shape[0]
        qkv = self.qkv_proj(x).view(num_tokens, self.num_qkv_heads, self.head_size)
        q, k, v = ops.rotated(
            qkv, self.num_heads, self.num_kv_heads, self.qk_norm, self.eps, cos, sin
        )
        seen = attend(self.index, q, k, v)
        x = ops.add_rms_norm(
            hidden, self.o_proj(seen.view(num_tokens, -1)), self.post_attention_norm, self.eps
        )
        gated = ops.gated(self.gate_up_proj(x), self.activation)
        return ops.add_rms_norm(hidden, self.down_proj(gated), next_norm, self.eps)
