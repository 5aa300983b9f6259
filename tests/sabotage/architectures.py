"""Mistakes that model code makes, over the GPT-2 of the examples."""

from __future__ import annotations

from dataclasses import replace

import torch

from dovetail.interfaces.architecture import Target
from dovetail_architecture_gpt2 import CAPABILITIES, PROVIDER, TINY
from dovetail_architecture_gpt2.model import GPT2
from sabotage import Sabotages


def right_logits(config, tensors, token_ids):
    import transformers

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    model.load_state_dict({**tensors, "lm_head.weight": tensors["transformer.wte.weight"]})
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0]


SABOTAGES = Sabotages(
    "architecture", PROVIDER, configs=(TINY,), reference_logits=staticmethod(right_logits)
)
ATTENTION, PIECES, COPIES, REFERENCE, LOGITS = (
    "test_attention_is_called_once_a_layer_in_order",
    "test_pieces_are_the_whole",
    "test_weights_are_copies_in_the_models_dtype",
    "test_reference",
    "test_logits",
)


class Architecture:
    def __init__(self, model):
        self.model = model


sabotage = SABOTAGES.of_class(lambda cls, c, o: Architecture(cls))


@sabotage(PIECES, "test_positions_count")
class PositionsCounted(GPT2):
    """Positions are counted from the step's first token, in place of those given."""

    def forward(self, token_ids, positions, attend):
        return super().forward(token_ids, torch.arange(len(token_ids)), attend)


@sabotage(PIECES)
class KeepsState(GPT2):
    """Something is kept from step to step."""

    steps = 0

    def forward(self, token_ids, positions, attend):
        self.steps += 1
        return super().forward(token_ids, positions, attend) * (1 + 0.01 * self.steps)


@sabotage(PIECES)
class MixesTokens(GPT2):
    """Tokens of a step mix outside attention."""

    def forward(self, token_ids, positions, attend):
        hidden = super().forward(token_ids, positions, attend)
        return hidden + 0.01 * hidden.mean(0)


@sabotage(ATTENTION)
class AttendsTwice(GPT2):
    """A layer calls attention twice."""

    def forward(self, token_ids, positions, attend):
        return super().forward(token_ids, positions, lambda *a: (attend(*a), attend(*a))[1])


@sabotage(ATTENTION)
class LayersBackwards(GPT2):
    """Layers attend in another order than they are numbered."""

    def forward(self, token_ids, positions, attend):
        return super().forward(
            token_ids, positions, lambda layer, q, k, v: attend(1 - layer, q, k, v)
        )


@sabotage(ATTENTION)
class StridedQueries(GPT2):
    """Queries are not contiguous."""

    def forward(self, token_ids, positions, attend):
        def strided(layer, q, k, v):
            return attend(layer, torch.cat((q, q), 2)[..., : q.shape[2]], k, v)

        return super().forward(token_ids, positions, strided)


@sabotage(COPIES)
class KeepsResults(GPT2):
    """What attention returned is read again after its next call."""

    def forward(self, token_ids, positions, attend):
        seen = []

        def keeping(layer, q, k, v):
            seen.append(attend(layer, q, k, v))
            return seen[-1]

        return super().forward(token_ids, positions, keeping) + 0 * seen[0].flatten(1)


@sabotage(PIECES)
class WritesPositions(GPT2):
    """The positions given are overwritten."""

    def forward(self, token_ids, positions, attend):
        hidden = super().forward(token_ids, positions, attend)
        positions += 1
        return hidden


@sabotage(ATTENTION)
class LayersFromOne(GPT2):
    """The first layer is missing among those that attend."""

    def __init__(self, build):
        super().__init__(build)
        del self.attention_layers[0]


@sabotage(ATTENTION)
class AnotherWindow(GPT2):
    """A layer has a window that the configuration does not have."""

    def __init__(self, build):
        super().__init__(build)
        self.attention_layers = [replace(layer, window=8) for layer in self.attention_layers]


@sabotage(REFERENCE)
class AnotherScale(GPT2):
    """The scale of attention is doubled."""

    def __init__(self, build):
        super().__init__(build)
        self.attention_layers = [
            replace(layer, scale=2 * layer.scale) for layer in self.attention_layers
        ]


@sabotage(REFERENCE)
class WithoutFinalNorm(GPT2):
    """The final norm is left out."""

    def __init__(self, build):
        super().__init__(build)
        self.norm.__class__ = type("Nothing", (type(self.norm),), {"__call__": lambda self, x: x})


@sabotage(REFERENCE)
class AnotherEpsilon(GPT2):
    """The norms' epsilon is not the configuration's."""

    def __init__(self, build):
        super().__init__(build)
        for norm in (self.norm, *(layer.norm_1 for layer in self.layers)):
            norm.eps = 0.05


@sabotage(LOGITS)
class NarrowLogits(GPT2):
    """Logits are in bfloat16."""

    def logits(self, hidden):
        return super().logits(hidden).to(torch.bfloat16)


@sabotage(LOGITS)
class RowsTogether(GPT2):
    """The logits of a row depend on the other rows."""

    def logits(self, hidden):
        logits = super().logits(hidden)
        return logits - 0.01 * logits.mean(0)


@sabotage(LOGITS)
class AnotherVocabulary(GPT2):
    """`vocab_size` is one too small."""

    def __init__(self, build):
        super().__init__(build)
        self.vocab_size -= 1


@sabotage(COPIES)
class KeepsAView(GPT2):
    """A tensor of the checkpoint is kept, in place of a copy of it."""

    def targets(self):
        def keep(tensor):
            self.positions = tensor

        return {
            **super().targets(),
            "transformer.wpe.weight": Target(tuple(self.positions.shape), torch.float32, keep),
        }


@sabotage("test_models_of_a_process_do_not_meet")
class SharesWeights(GPT2):
    """All models of a process have one tensor in common."""

    shared = {}  # noqa: RUF012

    def __init__(self, build):
        super().__init__(build)
        self.positions = self.shared.setdefault("positions", self.positions)


@sabotage("test_every_tensor_of_the_checkpoint_counts")
class TensorNotUsed(GPT2):
    """A tensor is asked for that nothing reads."""

    def targets(self):
        return {**super().targets(), "transformer.extra": Target.into(torch.empty(48))}


@sabotage("test_quantization")
class LinearsOfItsOwn(GPT2):
    """Linear layers are made beside those that can be quantized."""

    def __init__(self, build):
        super().__init__(build)
        build.layers.linears.clear()


@sabotage(
    "test_declaration",
    capabilities=replace(
        CAPABILITIES, architectures=("GPT2LMHeadModel", "OtherForCausalLM"), examples=()
    ),
)
class ArchitectureThatLies(GPT2):
    """An architecture is declared, and no configuration of it given."""
