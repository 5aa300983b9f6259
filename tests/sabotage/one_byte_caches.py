"""Mistakes that attention kernels make with KV caches of one byte."""

from __future__ import annotations

import torch

from sabotage import Sabotages
from sabotage.plain_attention import CAPABILITIES, OneByteAttention, provider

KV_DTYPES = (*CAPABILITIES.kv_dtypes, "float8_e4m3fn", "int8")
SABOTAGES = Sabotages("attention", provider(OneByteAttention, kv_dtypes=KV_DTYPES))
SCALES, SIZES, MOVED = (
    "test_scales_of_keys_and_values",
    "test_every_declared_size_and_type",
    "test_export_and_import",
)


def sabotage(*caught_by):
    return lambda cls: SABOTAGES.add(cls, caught_by, build=provider(cls).build)


@sabotage(SCALES)
class KeysScaleForValues(OneByteAttention):
    """Values are scaled by the keys' scale."""

    def scale(self, layer, which):
        return super().scale(layer, 0)


@sabotage(SCALES)
class ScalesSwappedWhenRead(OneByteAttention):
    """Stored by the right scales, keys are read by the values' and values by the keys'."""

    def meaning(self, layer, codes, which):
        return codes * self.scale(layer, 1 - which)


@sabotage(SCALES, SIZES)
class ScaleForgottenWhenRead(OneByteAttention):
    """What is read is not multiplied by the scale."""

    def meaning(self, layer, codes, which):
        return codes


@sabotage(SCALES)
class ScaleForgottenWhenStored(OneByteAttention):
    """What is stored is not divided by the scale."""

    def code(self, layer, x, which, dtype):
        return super().code(layer, x * self.scale(layer, which), which, dtype)


@sabotage(SCALES)
class ScaleByTheHead(OneByteAttention):
    """The two scales are taken for those of two heads."""

    def code(self, layer, x, which, dtype):
        return super().code(layer, x, self.heads(x), dtype)

    def meaning(self, layer, codes, which):
        return super().meaning(layer, codes, self.heads(codes))

    def heads(self, x):
        return torch.arange(x.shape[-2]) % 2

    def scale(self, layer, which):
        scale = super().scale(layer, which)
        return scale[:, None] if scale.ndim else scale


@sabotage(SCALES)
class NotLimited(OneByteAttention):
    """What is too large for the type is cast as it is, and wraps around or becomes NaN."""

    def limited(self, x, largest):
        return x


@sabotage(SCALES)
class AnotherFloat8(OneByteAttention):
    """float8 is limited to 240, as a variant of it is on some devices."""

    def limited(self, x, largest):
        return super().limited(x, min(largest, 240.0))


@sabotage(SCALES)
class OneCodeTooMany(OneByteAttention):
    """int8 goes down to -128, and up to 127."""

    def limited(self, x, largest):
        return x.clamp(-128, 127) if largest == 127 else super().limited(x, largest)


@sabotage(SCALES)
class CutOff(OneByteAttention):
    """int8 is cut off towards zero instead of rounded."""

    def rounded(self, x):
        return x.trunc()


@sabotage(MOVED)
class ExportedInFull(OneByteAttention):
    """What is exported is what the codes stand for, as float32, and what is imported is cast."""

    def export_kv(self, cache, block_ids, out=None):
        if cache[0].element_size() > 1:
            return super().export_kv(cache, block_ids, out)
        return tuple(own.float()[block_ids] * 0.01 for own in cache)
