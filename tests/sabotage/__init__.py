"""Plugins that are wrong on purpose, one mistake each: the conformance kit must catch every one of
them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dovetail.plugin.discovery import load_registry
from dovetail.plugin.provider import Provider
from dovetail_testing.contract import Contract
from dovetail_testing.contracts import contract_of

EXAMPLES = Path(__file__).parents[2] / "examples"
# Some mistakes are made in an example's code, which is imported as it is, without being installed.
sys.path += [str(path) for path in EXAMPLES.glob("*/src") if str(path) not in sys.path]


@dataclass(frozen=True)
class Sabotage:
    """A provider with one mistake; or with none, as a control: then nothing may catch it."""

    name: str
    extension_point: str
    wrong: str
    """What is wrong with it."""
    provider: Provider[Any]
    caught_by: tuple[str, ...] = ()
    """Checks that are there for this mistake: each must fail, whatever the seed."""
    options: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    """Of the contract class: what else a plugin's own test would set."""

    def contract(self, seed: int) -> type[Contract]:
        """The extension point's contract with this provider, as a plugin's own test would subclass
        it."""
        base = contract_of(load_registry().extension_points[self.extension_point])
        assert base is not None
        own = {"provider": self.provider, "options": self.options, "seed": seed}
        return type("Sabotaged", (base,), {**own, **self.attributes})


class Sabotages(list[Sabotage]):
    """Those of one extension point, over one correct provider."""

    def __init__(
        self,
        extension_point: str,
        provider: Provider[Any],
        options: dict[str, Any] | None = None,
        **attributes: Any,
    ) -> None:
        super().__init__()
        self.control = Sabotage(
            "control",
            extension_point,
            "nothing",
            provider,
            options=options or {},
            attributes=attributes,
        )

    def add(
        self,
        made: Any,
        caught_by: tuple[str, ...],
        attributes: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Any:
        """A function or class named for its mistake, whose docstring says it. `changes` are of the
        provider, `attributes` of the contract class."""
        words = "".join(
            f" {c.lower()}" if c.isupper() else c for c in made.__name__.replace("_", " ")
        )
        provider = replace(self.control.provider, **changes)
        attributes = {**self.control.attributes, **(attributes or {})}
        wrong = " ".join(made.__doc__.split())
        self.append(
            Sabotage(
                words.strip(),
                self.control.extension_point,
                wrong,
                provider,
                caught_by,
                self.control.options,
                attributes,
            )
        )
        return made

    def of_class(
        self, build: Callable[[Any, Any, Any], Any]
    ) -> Callable[..., Callable[[type], type]]:
        """The decorator `@sabotage(*checks, **changes)` for classes; `build(class, context,
        options)` makes what is served."""

        def sabotage(*caught_by: str, **changes: Any) -> Callable[[type], type]:
            return lambda cls: self.add(
                cls, caught_by, **{"build": lambda c, o: build(cls, c, o), **changes}
            )

        return sabotage


def all_sabotages() -> list[Sabotage]:
    return [sabotage for module in _modules() for sabotage in module.SABOTAGES]


def controls() -> list[Sabotage]:
    """What the sabotages are made of, with nothing wrong."""
    return [module.SABOTAGES.control for module in _modules()]


def _modules() -> list[Any]:
    from sabotage import (
        architectures,
        attention,
        attention_plans,  # noqa: F401 - it adds to those of attention
        drafters,
        eviction,
        kv_caches,
        matmuls,
        models,
        one_byte_caches,
        prefix_caches,
        quantization,
        routes,
        schedulers,
        servers,
        worker_weights,
        workers,
    )

    return [
        attention,
        one_byte_caches,
        quantization,
        matmuls,
        architectures,
        schedulers,
        kv_caches,
        prefix_caches,
        eviction,
        drafters,
        workers,
        worker_weights,
        models,
        servers,
        routes,
    ]
