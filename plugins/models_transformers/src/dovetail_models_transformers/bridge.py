"""Any other decoder-only architecture of transformers, its attention replaced by the engine's.

transformers looks attention up by name in a registry and hands it the module that calls. So one
stateless function is registered; it finds the step in progress through the module, which belongs to
one model of one engine, and engines do not meet, in one thread or in many. (A keyword of `forward`
would reach it too, but not in every architecture.) No mask is built, because the registry of masks
does not know the name.

What a layer asks of attention (heads, scale, window, soft cap, sinks) is read from one recorded
pass over three tokens rather than from the config, whose keys differ from family to family.
Whatever that pass shows and the contract cannot express is refused, with the reason.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from dovetail.errors import CheckpointError
from dovetail.facts import window_of_layers
from dovetail.interfaces.architecture import Attend, ModelBuild, Target, WeightFiles
from dovetail.interfaces.attention import AttentionLayer
from dovetail.interfaces.worker import Progress
from dovetail_models_transformers.versions import TESTED_TRANSFORMERS

if TYPE_CHECKING:
    from dovetail_models_transformers.torch_compile import CompiledBody

log = logging.getLogger(__name__)

NAME = "dovetail"
Step = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None, dict[str, Any]], Tensor]

UNDERSTOOD = frozenset({"scaling", "sliding_window", "softcap", "s_aux", "is_causal"})
"""Keywords of the attention call that the contract expresses."""

HARMLESS = frozenset(
    {
        "dropout",
        "position_ids",
        "position_embeddings",
        "cache_position",
        "use_cache",
        "past_key_values",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
    }
)
"""Keywords that change nothing here: no dropout outside training, positions are applied before,
nothing is returned."""

KINDS = frozenset({"full_attention", "sliding_attention"})
"""Kinds of layers, as configs name them, that the attention contract expresses."""


class Relay:
    """What a model's attention modules call during a pass; one object a model, known to each of
    them."""

    step: Step | None = None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: `query [1, Hq, T, D]`, `key, value [1, Hkv, T, D]` -> `[1,
    T, Hq, D]`."""
    relay: Any = module.dovetail_relay
    return relay.step(module, query, key, value, attention_mask, arguments), None


transformers.AttentionInterface.register(NAME, _attention)


class BridgeArchitecture:
    """An `Architecture` whose models load themselves. `trust_remote_code` allows the code that a
    checkpoint brings along."""

    def __init__(self, trust_remote_code: bool) -> None:
        self._trust_remote_code = trust_remote_code

    def model(self, build: ModelBuild) -> BridgedModel:
        if build.compiled:
            from dovetail_models_transformers.torch_compile import check_compile

            check_compile(str(build.device))
        model = load_bridged(
            build.folder,
            dtype=build.dtype,
            device=build.device,
            progress=build.progress,
            files=build.files,
            trust_remote_code=self._trust_remote_code,
        )
        if build.compiled:
            model.compile()
        return model


def load_bridged(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    files: WeightFiles | None,
    trust_remote_code: bool,
) -> BridgedModel:
    """Load a folder through transformers. Raises `CheckpointError` that says why, if it cannot be
    served."""
    if transformers.__version__ not in TESTED_TRANSFORMERS:
        log.warning(
            "transformers %s was not tried with the bridge (tried: %s): if %s fails to load or"
            " answers wrongly, install one of these",
            transformers.__version__,
            ", ".join(TESTED_TRANSFORMERS),
            folder,
        )
    total = 0 if files is None else files.check()
    progress("loading weights", 0, total)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **local)
        _check_config(folder, config, trust_remote_code)
        # Mismatched shapes are let through here, because the report names them and transformers'
        # own error does not.
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            **local,
            dtype=dtype,
            attn_implementation=NAME,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        model, report = loaded
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        ImportError,
    ) as e:
        if isinstance(e, KeyError) and e.args == (NAME,):
            reason = (
                f"{config.architectures[0]} chooses its attention from a fixed list, not from"
                " transformers' registry"
            )
            raise CheckpointError(f"{folder}: {reason}") from None
        raise CheckpointError(f"{folder}: transformers cannot load it: {e}") from e
    for what, names in (
        ("lacks", report["missing_keys"]),
        ("has no place for", report["unexpected_keys"]),
    ):
        if names:
            raise CheckpointError(f"{folder}: transformers {what} {few(sorted(names))}")
    if report["mismatched_keys"]:
        name, found, expected = sorted(report["mismatched_keys"])[0]
        raise CheckpointError(
            f"{folder}: {name} has shape {list(found)}, the model's config asks for"
            f" {list(expected)}"
        )
    model = model.to(device).eval().requires_grad_(False)
    progress("loading weights", total, total)
    return BridgedModel(folder, model, device)


def _check_config(folder: Path, config: Any, trust_remote_code: bool) -> None:
    """Refuse what can be seen before any weight is read."""
    path, text = folder / "config.json", config.get_text_config(decoder=True)
    (architecture,) = config.architectures
    if config.is_encoder_decoder:
        raise CheckpointError(
            f"{path}: {architecture} is an encoder-decoder; only decoder-only models are served"
        )
    remote = trust_remote_code and "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    )
    if not remote:
        known: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if known is None or known.__name__ != architecture:
            served = f"; for this config it is {known.__name__}" if known else ""
            raise CheckpointError(
                f"{path}: {architecture} is not a causal language model of transformers{served}"
            )
    if other := sorted(set(getattr(text, "layer_types", None) or ()) - KINDS):
        raise CheckpointError(
            f"{path}: {architecture} has layers of kind {few(other)}, which attention backends do"
            " not serve"
        )
    rope, length = (
        getattr(text, "rope_parameters", None) or {},
        getattr(text, "max_position_embeddings", 0),
    )
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        original = parameters.get("original_max_position_embeddings") or length
        if parameters.get("rope_type") == "longrope" and length > original:
            raise CheckpointError(
                f"{path}: longrope past {original} positions is not supported: transformers chooses"
                " the frequencies by the longest sequence of the batch, so that a request's output"
                " would depend on the other rows"
            )


class BridgedModel:
    """A `Model` around a transformers one."""

    def __init__(self, folder: Path, model: Any, device: torch.device) -> None:
        self._folder, self._device = folder, device
        self._body = model.base_model
        if self._body is model:
            raise self._refusal("its body and output projection cannot be told apart")
        self._head = _head_of(model)
        self._relay = Relay()
        for module in self._body.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.dovetail_relay = self._relay
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.attention_layers: list[AttentionLayer] = self._discover(model)
        self._compiled: CompiledBody | None = None

    def compile(self) -> None:
        """From now on run the body through `torch.compile`."""
        from dovetail_models_transformers import torch_compile

        self._relay.step = self._step(torch_compile.attend)
        self._compiled = torch_compile.CompiledBody(self._hidden, self._folder)

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        if self._compiled is not None:
            return self._compiled(token_ids, positions, attend)
        return self._run(token_ids, positions, self._step(attend))

    def targets(self) -> dict[str, Target]:
        """None: the weights are read."""
        return {}

    def unused(self) -> list[str]:
        return []

    def _step(self, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Step:
        def step(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            mask: Tensor | None,
            arguments: dict[str, Any],
        ) -> Tensor:
            if mask is not None:
                raise self._refusal("it masks some steps by itself")
            q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
            index: Any = module.layer_idx
            return attend(index, q, k, v)[None]

        return step

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._head(inputs_embeds=hidden[None], use_cache=False).logits
        return logits[0].float()

    def _run(self, token_ids: Tensor, positions: Tensor, step: Step) -> Tensor:
        self._relay.step = step
        try:
            return self._hidden(token_ids, positions)
        finally:
            self._relay.step = None

    def _hidden(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        ids = {"input_ids": token_ids[None], "position_ids": positions[None]}
        hidden: Tensor = self._body(**ids, use_cache=False).last_hidden_state
        return hidden[0]

    def _refusal(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self._folder}: the architecture cannot run on the engine's attention: {reason}"
        )

    @torch.inference_mode()
    def _discover(self, model: Any) -> list[AttentionLayer]:
        """Run three tokens with an attention that records its calls and returns zeros; check what
        they show."""
        config = model.config.get_text_config(decoder=True)
        layers: dict[int, AttentionLayer] = {}
        seen: list[Tensor] = []

        def record(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            mask: Tensor | None,
            arguments: dict[str, Any],
        ) -> Tensor:
            layer = self._layer(module, query, key, value, mask, arguments)
            if layer.index in layers:
                raise self._refusal(f"layer {layer.index} attends more than once a pass")
            layers[layer.index] = layer
            seen.extend((query.clone(), key.clone()))
            return torch.zeros_like(query).transpose(1, 2)

        tokens = torch.arange(3, device=self._device)
        passes = []
        for positions in ([0, 1, 2], [0, 1, 5]):
            layers.clear()
            seen.clear()
            try:
                hidden = self._run(tokens, torch.tensor(positions, device=self._device), record)
                logits = self.logits(hidden[1:])
            except (
                LookupError,
                TypeError,
                ValueError,
                AttributeError,
                RuntimeError,
                NotImplementedError,
            ) as e:
                raise self._refusal(f"a trial pass failed with {e!r}") from e
            if logits.shape != (2, self.vocab_size):
                raise self._refusal(
                    f"its logits have shape {list(logits.shape)}, expected {[2, self.vocab_size]}"
                )
            passes.append([hidden, *seen])
        self._check_head(model, tokens)
        if not layers:
            raise self._refusal("it does not call attention through transformers' interface")
        if sorted(layers) != list(range(config.num_hidden_layers)):
            absent = sorted(map(str, set(range(config.num_hidden_layers)) - set(layers)))
            raise self._refusal(
                f"layers {few(absent)} have no attention (state-space or linear layers, for"
                " example)"
            )
        if all(torch.equal(a, b) for a, b in zip(*passes, strict=True)):
            raise self._refusal("it does not use the positions that it is given")
        found = [layers[index] for index in sorted(layers)]
        if [layer.window for layer in found] != (expected := window_of_layers(config.to_dict())):
            windows = [layer.window for layer in found]
            raise self._refusal(
                f"its layers ask for the windows {windows}, its config for {expected}"
            )
        return found

    def _check_head(self, model: Any, tokens: Tensor) -> None:
        """Refuse a model whose logits are not those that the head computes from the body's hidden
        states alone."""
        positions = torch.arange(len(tokens), device=self._device)

        def zeros(module: nn.Module, query: Tensor, *_: Any) -> Tensor:
            return torch.zeros_like(query).transpose(1, 2)

        ours = self.logits(self._run(tokens, positions, zeros))
        self._relay.step = zeros
        try:
            whole: Tensor = (
                model(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
                .logits[0]
                .float()
            )
        except (
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RuntimeError,
            NotImplementedError,
        ) as e:
            raise self._refusal(f"a pass of the whole model failed with {e!r}") from e
        finally:
            self._relay.step = None
        # Equal but for kernels that add in any order. Weights that are not numbers show later, in
        # the logits of requests.
        tolerance = 0.01 * whole.nan_to_num(0, 0, 0).abs().max().item()
        if not torch.allclose(ours, whole, rtol=0, atol=tolerance, equal_nan=True):
            raise self._refusal(
                "its output projection needs more of the body's output than the hidden states"
            )

    def _layer(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        arguments: dict[str, Any],
    ) -> AttentionLayer:
        if mask is not None:
            raise self._refusal("it builds an attention mask or bias of its own")
        given = {name: value for name, value in arguments.items() if value is not None}
        if unknown := sorted(given.keys() - UNDERSTOOD - HARMLESS):
            raise self._refusal(
                f"it passes {few(unknown)} to attention, which the contract does not have"
            )
        if not given.get("is_causal", getattr(module, "is_causal", True)):
            raise self._refusal("its attention is not causal")
        if key.shape != value.shape or key.shape[-1] != query.shape[-1]:
            shapes = f"{list(query.shape[1:])}, {list(key.shape[1:])}, {list(value.shape[1:])}"
            raise self._refusal(
                f"its queries, keys and values differ in head size ({shapes}), as in latent"
                " attention (MLA)"
            )
        sinks = given.get("s_aux")
        return AttentionLayer(
            index=module.layer_idx,
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_size=query.shape[-1],
            scale=float(given.get("scaling", query.shape[-1] ** -0.5)),
            window=given.get("sliding_window"),
            logit_soft_cap=given.get("softcap"),
            sinks=None if sinks is None else sinks.detach().float(),
        )


class _BodyOutput(MoeModelOutputWithPast):
    """What a head receives in place of its body's output: hidden states, and None for every other
    field.

    Each family's output class has optional fields of its own (of images, audio, shared keys and
    values), which its head copies into its own output. They are None where nothing was asked for,
    and so is whatever else is read here; a list of their names would be out of date with each
    release. Whether a head computes its logits from the hidden states alone is not assumed:
    `BridgedModel` compares them with those of the whole model.
    """

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _Passthrough(nn.Module):
    """A body that gives back the hidden states that it is given."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _BodyOutput:
        return _BodyOutput(last_hidden_state=inputs_embeds)

    @property
    def decoder(self) -> _Passthrough:
        """Some older families call their body's decoder rather than their body."""
        return self


def _head_of(model: Any) -> Any:
    """The model without its body: the output projection and whatever its family does to the logits
    (soft cap, scale)."""
    head = copy.copy(model)
    head._modules = {**model._modules, model.base_model_prefix: _Passthrough()}
    return head


def few(names: list[str]) -> str:
    """Return the first five, and how many more there are."""
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest
