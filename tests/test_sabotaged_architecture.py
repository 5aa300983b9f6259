"""The contract of architectures catches models that are wrong, each by the check that is for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sabotaged import failures
from strangers import EXAMPLES

from dovetail.interfaces.architecture import ArchitectureCapabilities, Target
from dovetail.provider import Provider
from dovetail.testing.architecture import ArchitectureContract

TINY = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 203, "n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 64}
CAPABILITIES = ArchitectureCapabilities(("GPT2LMHeadModel",))


@pytest.fixture(autouse=True)
def _example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES / "architecture_gpt2/src")


def right_logits(config: dict[str, Any], tensors: dict[str, Any], token_ids: list[int]) -> Any:
    import transformers

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    model.load_state_dict({**tensors, "lm_head.weight": tensors["transformer.wte.weight"]})
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0]


def sabotaged(change: Callable[[type], type], can: ArchitectureCapabilities = CAPABILITIES) -> dict[str, Any]:
    from dovetail_architecture_gpt2.model import GPT2  # type: ignore[import-not-found]

    wrong = change(GPT2)

    class Architecture:
        def model(self, build: Any) -> Any:
            return wrong(build)

    provider = Provider("gpt2", "for tests", lambda c, o: Architecture(), capabilities=can)
    return failures(ArchitectureContract, provider=provider, configs=(TINY,), reference_logits=staticmethod(right_logits))


def forward(change: Callable[..., Any]) -> Callable[[type], type]:
    """A model whose forward is `change(model, its own forward, token_ids, positions, attend)`."""

    def made(base: type) -> type:
        class Wrong(base):
            def forward(self, token_ids: Any, positions: Any, attend: Any) -> Any:
                return change(self, super().forward, token_ids, positions, attend)

        return Wrong

    return made


def built(change: Callable[[Any, Any], None]) -> Callable[[type], type]:
    """A model that `change(model, build)` was called with."""

    def made(base: type) -> type:
        class Wrong(base):
            def __init__(self, build: Any) -> None:
                super().__init__(build)
                change(self, build)

        return Wrong

    return made


def layers(**changes: Any) -> Callable[[type], type]:
    def change(model: Any, build: Any) -> None:
        model.attention_layers = [replace(layer, **changes) for layer in model.attention_layers]

    return built(change)


def counts_positions(model: Any, run: Any, token_ids: Any, positions: Any, attend: Any) -> Any:
    return run(token_ids, torch.arange(len(token_ids)), attend)


def keeps_state(model: Any, run: Any, token_ids: Any, positions: Any, attend: Any) -> Any:
    model.steps = getattr(model, "steps", 0) + 1
    return run(token_ids, positions, attend) * (1 + 0.01 * model.steps)


def mixes_tokens(model: Any, run: Any, token_ids: Any, positions: Any, attend: Any) -> Any:
    hidden = run(token_ids, positions, attend)
    return hidden + 0.01 * hidden.mean(0)


def twice(model: Any, run: Any, token_ids: Any, positions: Any, attend: Any) -> Any:
    return run(token_ids, positions, lambda layer, q, k, v: (attend(layer, q, k, v), attend(layer, q, k, v))[1])


def backwards(model: Any, run: Any, token_ids: Any, positions: Any, attend: Any) -> Any:
    return run(token_ids, positions, lambda layer, q, k, v: attend(1 - layer, q, k, v))


def strided(model: Any, run: Any, token_ids: Any, positions: Any, attend: Any) -> Any:
    return run(token_ids, positions, lambda i, q, k, v: attend(i, torch.cat((q, q), 2)[..., : q.shape[2]], k, v))


def keeps_results(model: Any, run: Any, token_ids: Any, positions: Any, attend: Any) -> Any:
    seen: list[Any] = []

    def keeping(layer: int, q: Any, k: Any, v: Any) -> Any:
        seen.append(attend(layer, q, k, v))
        return seen[-1]

    return run(token_ids, positions, keeping) + 0 * seen[0].flatten(1)


def writes_positions(model: Any, run: Any, token_ids: Any, positions: Any, attend: Any) -> Any:
    hidden = run(token_ids, positions, attend)
    positions += 1
    return hidden


def without_final_norm(model: Any, build: Any) -> None:
    model.norm.__class__ = type("Nothing", (type(model.norm),), {"__call__": lambda self, x: x})


def another_epsilon(model: Any, build: Any) -> None:
    model.norm.eps = 0.05
    for layer in model.layers:
        layer.norm_1.eps = 0.05


def half_the_logits(base: type) -> type:
    class Wrong(base):
        def logits(self, hidden: Any) -> Any:
            return super().logits(hidden).to(torch.bfloat16)

    return Wrong


def rows_together(base: type) -> type:
    class Wrong(base):
        def logits(self, hidden: Any) -> Any:
            logits = super().logits(hidden)
            return logits - 0.01 * logits.mean(0)

    return Wrong


def keeps_a_view(base: type) -> type:
    class Wrong(base):
        def targets(self) -> Any:
            def keep(tensor: Any) -> None:
                self.positions = tensor

            name = "transformer.wpe.weight"
            return {**super().targets(), name: Target(tuple(self.positions.shape), torch.float32, keep)}

    return Wrong


def shares_weights(base: type) -> type:
    shared: dict[str, Any] = {}

    class Wrong(base):
        def __init__(self, build: Any) -> None:
            super().__init__(build)
            self.positions = shared.setdefault("positions", self.positions)

    return Wrong


def forgets_a_tensor(base: type) -> type:
    class Wrong(base):
        def targets(self) -> Any:
            spare = torch.empty(48)
            return {**super().targets(), "transformer.extra": Target.into(spare)}

    return Wrong


def its_own_linears(model: Any, build: Any) -> None:
    build.layers.linears.clear()


def twice_the_scale(model: Any, build: Any) -> None:
    model.attention_layers = [replace(layer, scale=2 * layer.scale) for layer in model.attention_layers]


ATTENTION, PIECES = "test_attention_is_called_once_a_layer_in_order", "test_pieces_are_the_whole"
COPIES = "test_weights_are_copies_in_the_models_dtype"
SABOTAGE: dict[str, tuple[Callable[[type], type], str]] = {
    "positions are counted": (forward(counts_positions), PIECES),
    "positions are ignored": (forward(counts_positions), "test_positions_count"),
    "state is kept": (forward(keeps_state), PIECES),
    "tokens are mixed": (forward(mixes_tokens), PIECES),
    "a layer attends twice": (forward(twice), ATTENTION),
    "layers attend in another order": (forward(backwards), ATTENTION),
    "queries are not contiguous": (forward(strided), ATTENTION),
    "a result of attention is kept": (forward(keeps_results), COPIES),
    "positions are overwritten": (forward(writes_positions), PIECES),
    "layers are numbered from 1": (built(lambda m, b: setattr(m, "attention_layers", m.attention_layers[1:])), ATTENTION),
    "a window that the config does not have": (layers(window=8), ATTENTION),
    "the final norm is left out": (built(without_final_norm), "test_reference"),
    "another epsilon": (built(another_epsilon), "test_reference"),
    "another scale": (built(twice_the_scale), "test_reference"),
    "logits in bfloat16": (half_the_logits, "test_logits"),
    "logits of rows together": (rows_together, "test_logits"),
    "another vocab_size": (built(lambda m, b: setattr(m, "vocab_size", 202)), "test_logits"),
    "a view of the checkpoint is kept": (keeps_a_view, COPIES),
    "weights of the class": (shares_weights, "test_models_of_a_process_do_not_meet"),
    "a tensor that is not used": (forgets_a_tensor, "test_every_tensor_of_the_checkpoint_counts"),
    "linear layers of its own": (built(its_own_linears), "test_quantization"),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_is_caught(name: str) -> None:
    change, check = SABOTAGE[name]
    found = sabotaged(change)
    assert check in found, f"caught by {sorted(found)}"
    assert "the contract asks" in str(found[check])
    assert "common causes" in str(found[check])


def test_what_is_right_is_not_accused() -> None:
    assert sabotaged(lambda base: base) == {}


def test_an_architecture_without_a_config_is_a_lie() -> None:
    assert "test_declaration" in sabotaged(lambda base: base, ArchitectureCapabilities(("GPT2LMHeadModel", "OtherForCausalLM")))
