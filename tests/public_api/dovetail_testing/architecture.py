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
from dovetail_testing.architecture_steps import DenseAttention, PlainLayers, ragged_logits, random_tensors, run_step, store, whole_logits
from dovetail_testing.contract import Broken, Contract, common_causes
if TYPE_CHECKING:
    from torch import Tensor
CLOSE = 0.0001

class ArchitectureContract(Contract):
    extension_point = 'architecture'
    configs: ClassVar[tuple[dict[str, Any], ...]] = ()
    reference_logits: ClassVar[Callable[[dict[str, Any], dict[str, Tensor], list[int]], Tensor] | None] = None

    @property
    def can(self) -> ArchitectureCapabilities:
        ...

    @property
    def tried(self) -> tuple[dict[str, Any], ...]:
        ...

    @common_causes('an architecture has no config to test it', 'the code is for another framework')
    def test_declaration(self) -> None:
        ...

    @common_causes('linear layers are built with torch instead of build.layers')
    def test_quantization(self) -> None:
        ...

    @common_causes('a tensor is read but not used', 'one vector overwrites another one', 'a bias is left out')
    def test_every_tensor_of_the_checkpoint_counts(self) -> None:
        ...

    @common_causes('a view of the checkpoint is kept', 'the dtype is fixed')
    def test_weights_are_copies_in_the_models_dtype(self) -> None:
        ...

    @common_causes('a layer is called twice or left out', 'heads, windows or head size differ from config.json')
    def test_attention_is_called_once_a_layer_in_order(self) -> None:
        ...

    @common_causes("logits have the model's dtype", 'forward includes the output projection', 'forward omits the final norm')
    def test_logits(self) -> None:
        ...

    @common_causes('state is kept between passes', 'positions are counted instead of passed', 'tokens are mixed outside attention')
    def test_pieces_are_the_whole(self) -> None:
        ...

    @common_causes('forward ignores positions')
    def test_positions_count(self) -> None:
        ...

    @common_causes('weights or buffers belong to the class instead of the object')
    def test_models_of_a_process_do_not_meet(self) -> None:
        ...

    @common_causes('an epsilon, an activation or a scale differs from the config', 'a matrix is transposed')
    def test_reference(self) -> None:
        ...

    def make(self, config: dict[str, Any], tensors: dict[str, Tensor] | None=None, dtype: Any=None) -> tuple[Model, PlainLayers, dict[str, Tensor]]:
        ...

    def prompts(self, model: Model) -> list[list[int]]:
        ...

    def facts(self, config: dict[str, Any]) -> ModelFacts:
        ...

    def context_for(self, config: dict[str, Any]) -> Context:
        ...

    def same(self, found: Tensor, exact: Tensor, what: str, given: dict[str, Any] | None=None) -> None:
        ...
