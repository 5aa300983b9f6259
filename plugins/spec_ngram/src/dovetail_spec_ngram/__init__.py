"""Register two drafters without a model: `ngram` copies from the sequence itself, `suffix` from
earlier outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from dovetail.interfaces.drafter import Drafter, DrafterCapabilities
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import DrafterOptions, Provider

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext


class NgramOptions(DrafterOptions):
    num_draft_tokens: int = Field(
        16, ge=1, le=32, description="maximum number of draft tokens per sequence and step"
    )
    max_ngram: int = Field(4, ge=1, le=16, description="maximum n-gram length to match")
    min_ngram: int = Field(
        2, ge=1, le=16, description="minimum n-gram length to match; each length has its own index"
    )

    @model_validator(mode="after")
    def _in_order(self) -> NgramOptions:
        if self.min_ngram > self.max_ngram:
            raise ValueError(f"min_ngram ({self.min_ngram}) is above max_ngram ({self.max_ngram})")
        return self


class SuffixOptions(NgramOptions):
    max_match: int = Field(
        16, ge=1, le=64, description="longer matches are preferred up to this number of tokens"
    )
    max_tokens: int = Field(
        100_000,
        ge=1_000,
        le=10_000_000,
        description="earlier output tokens to keep, about 300 bytes each; the oldest are dropped",
    )


def _ngram(context: BuildContext, options: NgramOptions) -> Drafter:
    from dovetail_spec_ngram.ngram import NgramDrafter

    return NgramDrafter(options.max_ngram, options.min_ngram)


def _suffix(context: BuildContext, options: SuffixOptions) -> Drafter:
    from dovetail_spec_ngram.ngram import NgramDrafter
    from dovetail_spec_ngram.suffix import EarlierOutputs, SuffixDrafter

    earlier = EarlierOutputs(options.min_ngram, options.max_match, options.max_tokens)
    return SuffixDrafter(earlier, NgramDrafter(options.max_ngram, options.min_ngram))


NGRAM = Provider(
    "ngram",
    "proposes what followed the same tokens earlier in prompt and output",
    _ngram,
    NgramOptions,
    DrafterCapabilities(),
    priority=50,
)
SUFFIX = Provider(
    "suffix",
    "proposes what followed the same tokens in most earlier outputs",
    _suffix,
    SuffixOptions,
    DrafterCapabilities(learns_from_other_requests=True),
    priority=40,
)


@hookimpl
def dovetail_drafters() -> list[Provider[Drafter]]:
    return [NGRAM, SUFFIX]
