"""Test the contract of the architecture extension point. A plugin's test is a subclass:

    class TestMyModel(ArchitectureContract):
        provider = PROVIDER
        configs = ({"architectures": ["MyForCausalLM"], "num_hidden_layers": 2, …},)

        @staticmethod
        def reference_logits(config, tensors, token_ids): ...

Models are built from the configs with random weights and run over prompts, whole and in pieces,
with an attention that is slow and obviously correct.
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
"""Allowed error relative to the largest logit, in float32, for a different order of summation."""


class ArchitectureContract(Contract):
    """The contract of architectures: what their models load, require of attention, and compute."""

    extension_point = "architecture"
    configs: ClassVar[tuple[dict[str, Any], ...]] = ()
    """Contents of config.json of tiny models to test, instead of the `examples` that the provider
    declares."""
    reference_logits: ClassVar[
        Callable[[dict[str, Any], dict[str, Tensor], list[int]], Tensor] | None
    ] = None
    """(config, the checkpoint's tensors in float32, token ids) → `f32[T, V]`, computed by code
    other than the provider's."""

    @property
    def can(self) -> ArchitectureCapabilities:
        can = self.provider.capabilities
        assert isinstance(can, ArchitectureCapabilities), (
            "the capabilities of an architecture provider must be ArchitectureCapabilities"
        )
        return can

    @property
    def tried(self) -> tuple[dict[str, Any], ...]:
        if self.can.loads_weights:
            pytest.skip(
                "its models load their weights themselves, but the kit creates checkpoints from"
                " targets"
            )
        return self.configs or self.can.examples

    # The declaration.

    @common_causes("an architecture has no config to test it", "the code is for another framework")
    def test_declaration(self) -> None:
        """Every declared architecture has a config and is accepted; others are rejected, unless any
        is declared."""
        assert self.can.framework == "torch", "the kit supports only torch tensors"
        examples = self.configs or self.can.examples
        given = {config["architectures"][0] for config in examples}
        assert given or self.can.loads_weights, (
            "examples are needed: contents of config.json of tiny models"
        )
        if self.can.architectures is not None:
            assert given == set(self.can.architectures), (
                f"{self.can.architectures} are declared, but the examples are of {sorted(given)}"
            )
            refusal = self.refusal(self.selection_context())
            assert refusal, "an architecture that is not declared is not rejected"
            assert "KitForCausalLM" in refusal, f"the reason must name the architecture: {refusal}"
        for config in examples:
            assert self.refusal(self.context_for(config)) is None, self.refusal(
                self.context_for(config)
            )

    @common_causes("linear layers are built with torch instead of build.layers")
    def test_quantization(self) -> None:
        """If `quantization` is declared, the linear layers come from the `LayerMaker`, at least one
        per attention layer; if not, quantization is rejected."""
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
                f"only {layers.linears} come from build.layers"
            )
            names = layers.linears + layers.embeddings
            assert len(names) == len(set(names)), f"a name was used twice: {sorted(names)}"

    # Loading.

    @common_causes(
        "a tensor is read but not used",
        "one vector overwrites another one",
        "a bias is left out",
    )
    def test_every_tensor_of_the_checkpoint_counts(self) -> None:
        """Changing any tensor in `targets` changes the logits, and `unused` matches none of
        them."""
        import torch

        for config in self.tried:
            model, layers, tensors = self.make(config)
            unused = [n for n in tensors for glob in model.unused() if fnmatchcase(n, glob)]
            assert not unused, f"{unused} are both in targets and unused"
            prompt = self.prompts(model)[-1]
            before = whole_logits(model, prompt, layers.dtype)
            left_out = set(layers.linears + layers.embeddings) - layers.used
            assert not left_out, f"layers that were built but never used: {sorted(left_out)}"
            for name, tensor in tensors.items():
                other = torch.randn(
                    tensor.shape, generator=torch.Generator().manual_seed(self.seed + 1)
                )
                changed, layers, _ = self.make(config, {**tensors, name: other})
                after = whole_logits(changed, prompt, layers.dtype)
                assert not torch.equal(before, after), f"changing {name} does not change the logits"

    @common_causes("a view of the checkpoint is kept", "the dtype is fixed")
    def test_weights_are_copies_in_the_models_dtype(self) -> None:
        """A target keeps no reference to the tensor it is given, and the model computes in the
        requested dtype."""
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
                assert hidden.dtype == dtype, (
                    f"hidden states are {hidden.dtype}, but the model is {dtype}"
                )
                assert bool(hidden.isfinite().all()), (
                    "hidden states are not finite: a weight was never stored, or not copied"
                )

    # What models require of attention.

    @common_causes(
        "a layer is called twice or left out",
        "heads, windows or head size differ from config.json",
    )
    def test_attention_is_called_once_a_layer_in_order(self) -> None:
        """`attention_layers` are numbered from 0 and match config.json, and each is called once per
        forward pass, in order."""
        for config in self.tried:
            model, layers, _ = self.make(config)
            declared, facts = model.attention_layers, self.facts(config)
            order = list(range(len(declared)))
            from_maker = {id(layer) for layer in layers.attention_layers}
            assert all(id(layer) in from_maker for layer in declared), (
                "attention layers are not those that build.layers.attention returned"
            )
            assert [layer.index for layer in declared] == order, (
                f"the indices are {[layer.index for layer in declared]}"
            )
            assert len(declared) == facts.num_layers, (
                f"there are {len(declared)} layers, but {facts.num_layers} in config.json"
            )
            windows = {layer.window for layer in declared}
            assert windows == {kind.window for kind in facts.layer_kinds}, (
                f"windows {windows} differ from config.json"
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
                    f"heads, KV heads, head size, soft cap: {found}, but {expected} in config"
                )
            attention = DenseAttention(declared, layers.dtype)
            run_step(model, attention, [(0, range(3)), (1, range(1))], [[1, 2, 3], [4]])
            assert attention.called == order, f"attention was called for layers {attention.called}"

    # Results.

    @common_causes(
        "logits have the model's dtype",
        "forward includes the output projection",
        "forward omits the final norm",
    )
    def test_logits(self) -> None:
        """`logits` returns f32[R, vocab_size] for any rows of the hidden states, each row
        independently."""
        import torch

        for config in self.tried:
            model, layers, _ = self.make(config)
            assert model.vocab_size == self.facts(config).vocab_size, (
                f"vocab_size {model.vocab_size} differs from config.json"
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
            self.same(some, logits[[5, 2]], "the logits of two rows and of all rows")

    @common_causes(
        "state is kept between passes",
        "positions are counted instead of passed",
        "tokens are mixed outside attention",
    )
    def test_pieces_are_the_whole(self) -> None:
        """The logits of a token are the same in one prefill and in pieces, alone and among other
        sequences, and each time."""
        import torch

        for config in self.tried:
            model, layers, _ = self.make(config)
            prompts = self.prompts(model)
            whole = [whole_logits(model, prompt, layers.dtype) for prompt in prompts]
            assert torch.equal(whole[-1], whole_logits(model, prompts[-1], layers.dtype)), (
                "the same prompt gave two different results"
            )
            pieces = ragged_logits(model, prompts, layers.dtype, random.Random(self.seed))
            for prompt, one, other in zip(prompts, whole, pieces, strict=True):
                self.same(
                    other,
                    one,
                    f"the logits of a prompt of {len(prompt)} tokens in pieces and whole",
                    {"prompt": prompt},
                )

    @common_causes("forward ignores positions")
    def test_positions_count(self) -> None:
        """Tokens at other relative positions have other logits."""
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

    @common_causes("weights or buffers belong to the class instead of the object")
    def test_models_of_a_process_do_not_meet(self) -> None:
        """Two models with one config and different weights have the same results as each alone."""
        import torch

        for config in self.tried:
            first, layers, _ = self.make(config)
            prompt = self.prompts(first)[-1]
            before = whole_logits(first, prompt, layers.dtype)
            other = self.make(config, random_tensors(first.targets(), self.seed + 9))[0]
            assert not torch.equal(whole_logits(other, prompt, layers.dtype), before), (
                "different weights give the same logits"
            )
            assert torch.equal(whole_logits(first, prompt, layers.dtype), before), (
                "a second model changed the results of the first"
            )

    @common_causes(
        "an epsilon, an activation or a scale differs from the config",
        "a matrix is transposed",
    )
    def test_reference(self) -> None:
        """The logits equal those of `reference_logits`, if the test has one."""
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
                    "the logits and those of the reference",
                    {"prompt": prompt},
                )

    # How a model is tested.

    def make(
        self, config: dict[str, Any], tensors: dict[str, Tensor] | None = None, dtype: Any = None
    ) -> tuple[Model, PlainLayers, dict[str, Tensor]]:
        """Return a model with its weights, the maker of its layers, and its checkpoint, which has
        random tensors by default."""
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
        """Return what the core reads from such a config.json, before a model is built."""
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
            raise Broken(
                f"{what} differ by {error:.1e} of the largest value", input=str(given or "")
            )
