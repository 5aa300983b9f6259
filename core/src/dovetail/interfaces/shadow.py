"""Define the report of a shadow run: how far a candidate's results are from those of the selected
provider, and how its speed compares."""

from __future__ import annotations

import msgspec


class ShadowLayer(msgspec.Struct):
    """Results of a candidate at one layer, over all compared steps."""

    key: str
    """Plan key of the candidate."""
    layer: str
    num_compared: int = 0
    max_abs_error: float = 0.0
    """Largest absolute difference of an element; NaN if the candidate returned NaN where the
    trusted provider did not."""
    max_rel_error: float = 0.0
    """Largest difference, relative to the largest magnitude of the trusted output of its step."""
    trusted_seconds: float = 0.0
    candidate_seconds: float = 0.0
    """Seconds spent in the candidate, without importing the step's KV blocks."""

    @property
    def speed(self) -> float:
        """Speed of the candidate relative to the trusted provider, which is 1."""
        return self.trusted_seconds / self.candidate_seconds if self.candidate_seconds else 0.0


class ShadowReport(msgspec.Struct):
    """Results of a shadow run since the engine's start."""

    share: float
    """Share of the steps to compare, as configured."""
    num_steps: int = 0
    num_sampled_steps: int = 0
    layers: list[ShadowLayer] = []
    extra_bytes: int = 0
    """Bytes of weights held only for candidates."""
    failed: dict[str, str] = {}
    """Candidates that were switched off, by plan key, with the reason."""

    def lines(self, names: dict[str, str]) -> list[str]:
        """Return a line for each candidate, with its worst layer. `names` has the provider names by
        plan key."""
        share = f"{self.num_sampled_steps} of {self.num_steps} steps compared"
        out = []
        for key in sorted({layer.key for layer in self.layers} | set(self.failed)):
            layers = [layer for layer in self.layers if layer.key == key]
            parts = [f"{key} ({names.get(key, '?')}): {share}"]
            if layers:
                # NaN counts as the worst, but does not compare as such.
                worst = max(
                    layers, key=lambda x: (x.max_abs_error != x.max_abs_error, x.max_abs_error)
                )
                trusted, candidate = (
                    sum(x.trusted_seconds for x in layers),
                    sum(x.candidate_seconds for x in layers),
                )
                errors = f"{worst.max_abs_error:.3g} ({worst.max_rel_error:.3g} relative)"
                parts.append(f"differs by up to {errors}, at {worst.layer}")
                parts.append(
                    f"{trusted / candidate:.3g} × the speed" if candidate else "no time measured"
                )
            if self.extra_bytes and "quantization" in key:
                parts.append(f"{self.extra_bytes / 2**20:.1f} MiB of weights held for it")
            if key in self.failed:
                parts.append(f"switched off: {self.failed[key]}")
            out.append("; ".join(parts))
        return out
