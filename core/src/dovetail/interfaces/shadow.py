"""What a shadow run reports: how far a candidate is from the provider that answers, and how fast it
is beside it."""

from __future__ import annotations

import msgspec


class ShadowLayer(msgspec.Struct):
    """A candidate at one layer, over all steps that were compared."""

    key: str
    """Of the plan."""
    layer: str
    num_compared: int = 0
    max_abs_error: float = 0.0
    """The largest difference of two elements; NaN if the candidate gave one where the trusted
    provider did not."""
    max_rel_error: float = 0.0
    """The same, over the largest magnitude of the trusted output of its step."""
    trusted_seconds: float = 0.0
    candidate_seconds: float = 0.0
    """Import of the step's KV blocks aside."""

    @property
    def speed(self) -> float:
        """The candidate's, of which 1 is the trusted provider's."""
        return self.trusted_seconds / self.candidate_seconds if self.candidate_seconds else 0.0


class ShadowReport(msgspec.Struct):
    """Since the engine's start."""

    share: float
    """Of the steps, that was asked for."""
    num_steps: int = 0
    num_sampled_steps: int = 0
    layers: list[ShadowLayer] = []
    extra_bytes: int = 0
    """Weights that are held for candidates alone."""
    failed: dict[str, str] = {}
    """By key of the plan: candidates that were switched off, and why."""

    def lines(self, names: dict[str, str]) -> list[str]:
        """For people: a line for each candidate, the worst layer of each named. `names`: of
        providers, by key."""
        share = f"{self.num_sampled_steps} of {self.num_steps} steps compared"
        out = []
        for key in sorted({layer.key for layer in self.layers} | set(self.failed)):
            layers = [layer for layer in self.layers if layer.key == key]
            said = [f"{key} ({names.get(key, '?')}): {share}"]
            if layers:
                # A NaN is the worst, and compares as nothing.
                worst = max(
                    layers, key=lambda of: (of.max_abs_error != of.max_abs_error, of.max_abs_error)
                )
                trusted, candidate = (
                    sum(of.trusted_seconds for of in layers),
                    sum(of.candidate_seconds for of in layers),
                )
                errors = f"{worst.max_abs_error:.3g} ({worst.max_rel_error:.3g} relative)"
                said.append(f"differs by up to {errors}, at {worst.layer}")
                said.append(
                    f"{trusted / candidate:.3g} × the speed" if candidate else "no time measured"
                )
            if self.extra_bytes and "quantization" in key:
                said.append(f"{self.extra_bytes / 2**20:.1f} MiB of weights held for it")
            if key in self.failed:
                said.append(f"switched off: {self.failed[key]}")
            out.append("; ".join(said))
        return out
