"""The contract of the architecture extension point, as tests. A plugin's test is a subclass:

    class TestMyModel(ArchitectureContract):
        provider = PROVIDER
        configs = ({"architectures": ["MyForCausalLM"], "num_hidden_layers": 2, …},)

        @staticmethod
        def reference_logits(config, tensors, token_ids): ...

Models are made from the configs with random weights and run over prompts, whole and in pieces, with
an attention that is slow and obviously right.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from dovetail.facts import ModelFacts, model_facts
from dovetail.interfaces.architecture import ArchitectureCapabilities, Model, ModelBuild
from dovetail.plugin.provider import Context
from dovetail_testing.architecture_steps import (
    DenseAttention,
    PlainLayers,
    ragged_logits,
    random_tensors,
    run_step,
    store,
    whole_logits,
)
from dovetail_testing.contract import Broken, Contract, common_causes

if TYPE_CHECKING:
    from torch import Tensor

CLOSE = 1e-4
"""Of the largest logit, in float32: what another order of sums may change."""


class ArchitectureContract(Contract):
    """Models of a provider: what they load, what they ask of attention, and what they compute."""

    extension_point = "architecture"
    configs: ClassVar[tuple[dict[str, Any], ...]] = ()
    """Contents of config.json of tiny models to try, in place of the `examples` that the provider
    declares."""
    reference_logits: ClassVar[
        Callable[[dict[str, Any], dict[str, Tensor], list[int]], Tensor] | None
    ] = None
    """(config, the checkpoint's tensors in float32, token ids) → `f32[T, V]`, by other code than
    the provider's."""

    @property
    def can(self) -> ArchitectureCapabilities:
        can = self.provider.capabilities
        assert isinstance(can, ArchitectureCapabilities), (
            "a provider of architectures declares an ArchitectureCapabilities"
        )
        return can

    @property
    def tried(self) -> tuple[dict[str, Any], ...]:
        if self.can.loads_weights:
            pytest.skip(
                "its models load their weights themselves, and this kit makes checkpoints of"
                " targets"
            )
        return self.configs or self.can.examples

    # The declaration.

    @common_causes("an architecture without a config to try it", "model code for another framework")
    def test_declaration(self) -> None:
        """Every declared architecture has a config, and is taken; others are refused unless any is
        declared."""
        assert self.can.framework == "torch", "this kit's tensors are torch's"
        examples = self.configs or self.can.examples
        given = {config["architectures"][0] for config in examples}
        assert given or self.can.loads_weights, (
            "examples are needed: contents of config.json, of tiny models"
        )
        if self.can.architectures is not None:
            assert given == set(self.can.architectures), (
                f"{self.can.architectures} are declared, examples are of {sorted(given)}"
            )
            refusal = self.refusal(self.selection_context())
            assert refusal, "an architecture that is not declared is not refused"
            assert "KitForCausalLM" in refusal, f"the reason must name the architecture: {refusal}"
        for config in examples:
            assert self.refusal(self.context_for(config)) is None, self.refusal(
                self.context_for(config)
            )

    @common_causes("linear layers made with torch instead of build.layers")
    def test_quantization(self) -> None:
        """With `quantization` the linear layers are the maker's, one a layer of attention at least;
        without, it is refused."""
        examples = self.configs or self.can.examples
        context = self.context_for(examples[0]) if examples else self.selection_context()
        self.needs(
            self.can.quantization,
            "quantized layers",
            replace(context, needs={"quantized": ["kit"]}),
        )
        for config in self.tried:
            model, layers, _ = self.make(config)
            assert len(layers.linears) >= len(model.attention_layers), (
                f"only {layers.linears} are asked of build.layers"
            )
            names = layers.linears + layers.embeddings
            assert len(names) == len(set(names)), f"a name was asked for twice: {sorted(names)}"

    # Loading.

    @common_causes(
        "a tensor that is read and not used",
        "one vector of several copied over another",
        "a bias left out",
    )
    def test_every_tensor_of_the_checkpoint_counts(self) -> None:
        """Changing any tensor that `targets` names changes the logits; `unused` names none of
        them."""
        import torch

        for config in self.tried:
            model, layers, tensors = self.make(config)
            unused = [n for n in tensors for glob in model.unused() if fnmatchcase(n, glob)]
            assert not unused, f"{unused} are both in targets and unused"
            prompt = self.prompts(model)[-1]
            before = whole_logits(model, prompt, layers.dtype)
            left_out = set(layers.linears + layers.embeddings) - layers.used
            assert not left_out, f"layers made and never used: {sorted(left_out)}"
            for name, tensor in tensors.items():
                other = torch.randn(
                    tensor.shape, generator=torch.Generator().manual_seed(self.seed + 1)
                )
                changed, layers, _ = self.make(config, {**tensors, name: other})
                after = whole_logits(changed, prompt, layers.dtype)
                assert not torch.equal(before, after), (
                    f"{name} can be anything: the logits are the same"
                )

    @common_causes("a view of the checkpoint is kept", "a dtype that is fixed")
    def test_weights_are_copies_in_the_models_dtype(self) -> None:
        """Nothing of what a target is given is kept, and the model computes in the dtype that was
        asked for."""
        import torch

        for config in self.tried:
            for dtype in (torch.float32, torch.bfloat16):
                model = self.make(config, dtype=dtype)[0]
                hidden = run_step(
                    model,
                    DenseAttention(model.attention_layers, dtype),
                    [(0, range(5))],
                    [[1, 2, 3, 4, 5]],
                )
                assert hidden.dtype == dtype, f"hidden states are {hidden.dtype}, the model {dtype}"
                assert bool(hidden.isfinite().all()), (
                    "hidden states are not finite: a weight was never stored, or not copied"
                )

    # What it asks of attention.

    @common_causes(
        "a layer called twice or left out",
        "heads, windows or head size that config.json does not say",
    )
    def test_attention_is_called_once_a_layer_in_order(self) -> None:
        """`attention_layers` are numbered from 0, agree with config.json, and each is called once a
        pass, in order."""
        for config in self.tried:
            model, layers, _ = self.make(config)
            declared, facts = model.attention_layers, self.facts(config)
            order = list(range(len(declared)))
            made = {id(layer) for layer in layers.attention_layers}
            assert all(id(layer) in made for layer in declared), (
                "attention layers are not what build.layers.attention gave"
            )
            assert [layer.index for layer in declared] == order, (
                f"indexes {[layer.index for layer in declared]}"
            )
            assert len(declared) == facts.num_layers, (
                f"{len(declared)} layers, and {facts.num_layers} by config.json"
            )
            windows = {layer.window for layer in declared}
            assert windows == {kind.window for kind in facts.layer_kinds}, (
                f"windows {windows} are not those of config.json"
            )
            for layer in declared:
                found = (layer.num_heads, layer.num_kv_heads, layer.head_size, layer.logit_soft_cap)
                expected = (
                    facts.num_heads,
                    facts.num_kv_heads,
                    facts.head_size,
                    facts.logit_soft_cap,
                )
                assert found == expected, (
                    f"heads, KV heads, head size, soft cap {found}; {expected} by config.json"
                )
            attention = DenseAttention(declared, layers.dtype)
            run_step(model, attention, [(0, range(3)), (1, range(1))], [[1, 2, 3], [4]])
            assert attention.called == order, f"attention was called for layers {attention.called}"

    # What comes out.

    @common_causes(
        "logits in the model's dtype",
        "the output projection in forward",
        "a final norm left out of forward",
    )
    def test_logits(self) -> None:
        """`logits` gives f32[R, vocab_size] for any rows of the hidden states, each row by
        itself."""
        import torch

        for config in self.tried:
            model, layers, _ = self.make(config)
            assert model.vocab_size == self.facts(config).vocab_size, (
                f"vocab_size {model.vocab_size} is not config.json's"
            )
            hidden = run_step(
                model,
                DenseAttention(model.attention_layers, layers.dtype),
                [(0, range(7))],
                [list(range(1, 8))],
            )
            with torch.inference_mode():
                logits, some = model.logits(hidden), model.logits(hidden[[5, 2]])
            assert logits.dtype == torch.float32, f"logits are {logits.dtype}"
            assert logits.shape == (7, model.vocab_size), f"logits have shape {list(logits.shape)}"
            self.same(some, logits[[5, 2]], "logits of two rows and of all")

    @common_causes(
        "state kept between passes",
        "positions counted instead of taken",
        "tokens mixed outside attention",
    )
    def test_pieces_are_the_whole(self) -> None:
        """A token's logits are the same in one prefill and in pieces, alone and among other
        sequences; and each time."""
        import torch

        for config in self.tried:
            model, layers, _ = self.make(config)
            prompts = self.prompts(model)
            whole = [whole_logits(model, prompt, layers.dtype) for prompt in prompts]
            assert torch.equal(whole[-1], whole_logits(model, prompts[-1], layers.dtype)), (
                "the same prompt gave two results"
            )
            pieces = ragged_logits(model, prompts, layers.dtype, random.Random(self.seed))
            for prompt, one, other in zip(prompts, whole, pieces, strict=True):
                self.same(
                    other,
                    one,
                    f"a prompt of {len(prompt)} tokens, in pieces and whole",
                    {"prompt": prompt},
                )

    @common_causes("positions that forward ignores")
    def test_positions_count(self) -> None:
        """Tokens at other positions, as far as each other is concerned, give other logits."""
        import torch

        for config in self.tried:
            model, layers, _ = self.make(config)
            hidden = []
            for positions in ([0, 1, 2], [0, 1, 5]):
                attention = DenseAttention(model.attention_layers, layers.dtype, [(0, 3)])
                with torch.inference_mode():
                    hidden.append(
                        model.forward(
                            torch.tensor([3, 1, 2]), torch.tensor(positions), attention
                        ).clone()
                    )
            assert not torch.equal(*hidden), (
                "positions 0, 1, 2 and 0, 1, 5 give the same hidden states"
            )

    @common_causes("weights or buffers of the class instead of the object")
    def test_models_of_a_process_do_not_meet(self) -> None:
        """Two models of one config and different weights give what each gives alone."""
        import torch

        for config in self.tried:
            first, layers, _ = self.make(config)
            prompt = self.prompts(first)[-1]
            before = whole_logits(first, prompt, layers.dtype)
            other = self.make(config, random_tensors(first.targets(), self.seed + 9))[0]
            assert not torch.equal(whole_logits(other, prompt, layers.dtype), before), (
                "other weights, the same logits"
            )
            assert torch.equal(whole_logits(first, prompt, layers.dtype), before), (
                "a second model changed what the first gives"
            )

    @common_causes(
        "an epsilon, an activation or a scale that is not the config's",
        "a matrix the wrong way round",
    )
    def test_reference(self) -> None:
        """The logits are those of `reference_logits`, where the test has one."""
        reference = type(self).reference_logits
        if reference is None:
            pytest.skip("the test has no reference_logits")
        for config in self.tried:
            model, layers, tensors = self.make(config)
            for prompt in self.prompts(model):
                exact = reference(config, {name: t.clone() for name, t in tensors.items()}, prompt)
                self.same(
                    whole_logits(model, prompt, layers.dtype),
                    exact,
                    "the logits and the reference's",
                    {"prompt": prompt},
                )

    # How a model is tried.

    def make(
        self, config: dict[str, Any], tensors: dict[str, Tensor] | None = None, dtype: Any = None
    ) -> tuple[Model, PlainLayers, dict[str, Tensor]]:
        """A model with its weights, the maker of its layers, and its checkpoint: by default, of
        random tensors."""
        import torch

        def model_of(names: frozenset[str]) -> tuple[Model, PlainLayers]:
            layers = PlainLayers(dtype or torch.float32)
            build = ModelBuild(
                Path("kit-model"),
                config,
                names,
                layers,
                layers.dtype,
                torch.device("cpu"),
                lambda *_: None,
            )
            return self.build(self.build_context(model=self.facts(config))).model(build), layers

        if tensors is None:
            tensors = random_tensors(model_of(frozenset())[0].targets(), self.seed)
        model, layers = model_of(frozenset(tensors))
        store(model, tensors)
        return model, layers, tensors

    def prompts(self, model: Model) -> list[list[int]]:
        rng = random.Random(self.seed)
        return [
            [rng.randrange(model.vocab_size) for _ in range(length)] for length in (1, 9, 26, 17)
        ]

    def facts(self, config: dict[str, Any]) -> ModelFacts:
        """What the core reads from such a config.json, before there is a model."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            return model_facts(Path(folder))

    def context_for(self, config: dict[str, Any]) -> Context:
        return replace(self.selection_context(), model=self.facts(config))

    def same(
        self, found: Tensor, exact: Tensor, what: str, given: dict[str, Any] | None = None
    ) -> None:
        if found.shape != exact.shape:
            raise Broken(
                f"{what}: shapes {list(found.shape)} and {list(exact.shape)}",
                input=str(given or ""),
            )
        error = float((found.double() - exact.double()).abs().max() / exact.double().abs().max())
        if not error <= CLOSE:
            raise Broken(f"{what} differ by {error:.1e} of the largest", input=str(given or ""))
