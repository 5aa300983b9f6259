"""Select a quantization scheme for each rule of the engine config. The layers are known later, when
the model is built."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import msgspec

from dovetail.composition.selection import find
from dovetail.errors import ConfigError, PluginError
from dovetail.facts import ModelFacts
from dovetail.interfaces.quantization import PLAIN, QuantizationCapabilities
from dovetail.plan import Choice
from dovetail.plugin.config import ProviderConfig, QuantizationConfig, QuantizationRule
from dovetail.plugin.discovery import Registry

Select = Callable[..., Choice]
"""Function to select a provider: (extension point, requested provider, path in the engine config,
**requirements) -> choice."""

ALL = "*"
SUPPLIERS = {
    "fp8": "dovetail-quant-fp8",
    "bitsandbytes": "dovetail-quant-int8",
    "awq": "dovetail-quant-awq-gptq",
    "gptq": "dovetail-quant-awq-gptq",
    "compressed-tensors": "dovetail-quant-compressed-tensors",
}
"""Our package that reads a method, by method. Used only for the error if none is installed."""
OUTPUT = "lm_head"
"""The output projection. A scheme that quantizes the whole model on the fly leaves it unquantized,
because quantizing it costs the most quality; a rule that names it is respected."""


def choose_schemes(
    config: QuantizationConfig, model: ModelFacts, registry: Registry, select: Select
) -> dict[str, Choice]:
    """Select a scheme for each rule. The plan keys are `quantization.0`, … (`quantization` if there
    is one rule); the last rule matches every layer.

    Raises `PluginError` if no installed plugin reads the checkpoint's method, or if a rule is not
    possible for the checkpoint.
    """
    rules = list(config.rules)
    if not rules or rules[-1].match != ALL:
        rules.append(QuantizationRule())
    if any(rule.use == "auto" for rule in rules):
        _check_readable(model, registry)
    is_whole = len(rules) == 1
    chosen = [
        _choose(rule, "quantization" if is_whole else f"quantization.{i}", select, model)
        for i, rule in enumerate(rules)
    ]
    if is_whole and model.quantization_method not in _methods(
        find(registry, chosen[0]).provider.capabilities
    ):
        chosen.insert(0, _choose(QuantizationRule(match=OUTPUT), "quantization", select, model))
    return {
        f"quantization.{i}" if len(chosen) > 1 else "quantization": choice
        for i, choice in enumerate(chosen)
    }


def _choose(rule: QuantizationRule, where: str, select: Select, model: ModelFacts) -> Choice:
    wanted = ProviderConfig(use=rule.use, on_unsupported=rule.on_unsupported, options=rule.options)
    try:
        choice = select(
            "quantization", wanted, where, by_name=rule.use != "auto", some_layers=rule.match != ALL
        )
    except ConfigError as e:
        if model.quantization_method == PLAIN:
            raise
        raise ConfigError(
            f"{e.message}. The checkpoint {model.folder} declares {model.quantization_said}"
        ) from None
    return msgspec.structs.replace(choice, match=rule.match)


def _check_readable(model: ModelFacts, registry: Registry) -> None:
    """Raise `PluginError` if the checkpoint is quantized and no provider declares its method."""
    method = model.quantization_method
    readers = {
        m: o.qualified_name
        for o in registry.of("quantization")
        for m in _methods(o.provider.capabilities)
    }
    if method in readers:
        return
    near = difflib.get_close_matches(method, readers, n=3, cutoff=0.4)
    hint = f" Similar: {', '.join(f'{m} ({readers[m]})' for m in near)}." if near else ""
    others = ", ".join(sorted(set(readers) - {PLAIN})) or "none"
    install = (
        f"Install a package with a quantization provider for {method!r}, or use an unquantized"
        " checkpoint"
    )
    if supplier := SUPPLIERS.get(method):
        install = f"Install one: pip install {supplier}"
    elif alike := difflib.get_close_matches(
        method, SUPPLIERS.keys() - readers.keys(), n=1, cutoff=0.6
    ):
        install += f". If {alike[0]!r} is meant: pip install {SUPPLIERS[alike[0]]}"
    raise PluginError(
        f"quantization: the weights of {model.folder} are quantized with {method!r}, which no"
        f" installed plugin reads.{hint} Installed: {others}. {install}"
    )


def _methods(capabilities: Any) -> tuple[str, ...]:
    return capabilities.methods if isinstance(capabilities, QuantizationCapabilities) else ()
